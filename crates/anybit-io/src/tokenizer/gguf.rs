//! Vocabularies of GGUF files: the `tokenizer.ggml.*` keys, and the tokenizer that they describe.
//!
//! Two kinds are read, by `tokenizer.ggml.model`. `gpt2` is byte-level BPE: ranked merges, and a
//! pre-tokenizer that the file only names (`pre.rs`). `llama` is SentencePiece BPE: no
//! merges but a score per token, where of all neighbours that make a token together the pair with
//! the highest score is joined first. Both become a Hugging Face `tokenizer.json`, which the
//! tokenizers crate loads and which is what we save; [`to_gguf`] goes the other way. Ids are those
//! of llama.cpp, checked in `anybit/tests/tokenizer_vectors.rs`.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde_json::{Map, Value, json};

pub use super::hf::to_gguf;
use super::pre;
use crate::gguf::{Metadata, Value as Field};
use crate::{IoError, Result};

/// `tokenizer.ggml.token_type` of an ordinary token.
pub const NORMAL: i64 = 1;
/// The token for what nothing else stands for.
pub const UNKNOWN: i64 = 2;
/// A special token, left out of decoded text.
pub const CONTROL: i64 = 3;
/// A token that is found in the text before anything else, but is no special one.
pub const USER_DEFINED: i64 = 4;
/// A row of the embedding that no text leads to.
pub const UNUSED: i64 = 5;
/// A byte, `<0x00>` to `<0xFF>`.
pub const BYTE: i64 = 6;

/// Longest token; cutting one in two everywhere takes quadratic time.
const MAX_TOKEN: usize = 4096;

/// What `tokenizer.ggml.*` says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocab {
    /// "gpt2" or "llama".
    pub model: String,
    /// Name of the pre-tokenizer, for "gpt2".
    pub pre: String,
    /// The tokens by id.
    pub tokens: Vec<String>,
    /// Their types ([`NORMAL`] and so on); empty when all are normal.
    pub token_types: Vec<i64>,
    /// Their scores, for "llama".
    pub scores: Vec<f32>,
    /// Merges as "left right", first the ones to do first, for "gpt2".
    pub merges: Vec<String>,
    /// The token before a text.
    pub bos: Option<u32>,
    /// The token after a text.
    pub eos: Option<u32>,
    /// The token for what no other stands for.
    pub unk: Option<u32>,
    /// Whether encoding puts BOS before a text.
    pub add_bos: bool,
    /// Whether encoding puts EOS after a text.
    pub add_eos: bool,
    /// Whether a text starts as if a space stood before it, for "llama".
    pub add_space_prefix: bool,
}

impl GgufVocab {
    /// Reads `tokenizer.ggml.*`; what is absent has llama.cpp's default.
    ///
    /// # Errors
    /// A missing model, missing tokens, or a key of another type; `path` is for messages.
    pub fn read(metadata: &Metadata, path: &Path) -> Result<Self> {
        let missing = |name: &str| {
            IoError::damaged(path, format!("tokenizer.ggml.{name} is missing: it has no tokenizer"))
        };
        let strings = |name: &str| -> Result<Option<Vec<String>>> {
            let list = field(metadata, name, path, Metadata::get_strings)?;
            Ok(list.map(|list| list.into_iter().map(str::to_owned).collect()))
        };
        let flag = |name: &str| field(metadata, name, path, Metadata::get_bool);
        let model = field(metadata, "model", path, Metadata::get_str)?;
        let model = model.ok_or_else(|| missing("model"))?.to_owned();
        let pre = field(metadata, "pre", path, Metadata::get_str)?.unwrap_or_default().to_owned();
        let llama = model == "llama";
        let add_bos = llama || pre::by_name(&pre).is_some_and(|pre| pre.add_bos);
        let id = |name: &str, default: u32| -> Result<Option<u32>> {
            match field(metadata, name, path, Metadata::get_u64)? {
                None => Ok(llama.then_some(default)),
                Some(id) => u32::try_from(id)
                    .map(Some)
                    .map_err(|_| IoError::damaged(path, format!("tokenizer.ggml.{name} is {id}"))),
            }
        };
        Ok(Self {
            tokens: strings("tokens")?.ok_or_else(|| missing("tokens"))?,
            token_types: field(metadata, "token_type", path, Metadata::get_i64s)?
                .unwrap_or_default(),
            scores: field(metadata, "scores", path, Metadata::get_f32s)?.unwrap_or_default(),
            merges: strings("merges")?.unwrap_or_default(),
            bos: id("bos_token_id", 1)?,
            eos: id("eos_token_id", 2)?,
            unk: id("unknown_token_id", 0)?,
            add_bos: flag("add_bos_token")?.unwrap_or(add_bos),
            add_eos: flag("add_eos_token")?.unwrap_or(false),
            add_space_prefix: flag("add_space_prefix")?.unwrap_or(llama),
            model,
            pre,
        })
    }

    /// The `tokenizer.ggml.*` keys, for writing.
    pub fn keys(&self) -> Vec<(String, Field)> {
        let text = |s: &String| Field::String(s.clone());
        let mut keys = vec![
            ("model", text(&self.model)),
            ("pre", text(&self.pre)),
            ("tokens", Field::Array(self.tokens.iter().map(text).collect())),
            ("add_bos_token", Field::Bool(self.add_bos)),
            ("add_eos_token", Field::Bool(self.add_eos)),
        ];
        if !self.token_types.is_empty() {
            let types = self.token_types.iter().map(|t| Field::I32(*t as i32));
            keys.push(("token_type", Field::Array(types.collect())));
        }
        if self.model == "llama" {
            let scores = self.scores.iter().map(|s| Field::F32(*s));
            keys.push(("scores", Field::Array(scores.collect())));
            keys.push(("add_space_prefix", Field::Bool(self.add_space_prefix)));
        } else {
            keys.push(("merges", Field::Array(self.merges.iter().map(text).collect())));
        }
        let ids = [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("unknown_token_id", self.unk),
        ];
        keys.extend(ids.into_iter().filter_map(|(name, id)| Some((name, Field::U32(id?)))));
        keys.into_iter().map(|(name, value)| (format!("tokenizer.ggml.{name}"), value)).collect()
    }

    /// Type of a token.
    pub fn kind(&self, id: u32) -> i64 {
        self.token_types.get(id as usize).copied().unwrap_or(NORMAL)
    }

    /// Sizes that fit together, ids within the vocabulary.
    ///
    /// # Errors
    /// [`IoError::Damaged`], naming what does not fit.
    pub fn check(&self, path: &Path) -> Result<()> {
        let damaged = |what: String| Err(IoError::damaged(path, what));
        let n = self.tokens.len();
        if n == 0 || u32::try_from(n).is_err() {
            return damaged(format!("the vocabulary has {n} tokens"));
        }
        for (name, len) in [("token types", self.token_types.len()), ("scores", self.scores.len())]
        {
            if len != 0 && len != n {
                return damaged(format!("the vocabulary has {n} tokens, but {len} {name}"));
            }
        }
        if self.model == "llama" && self.scores.is_empty() {
            return damaged(
                "tokenizer.ggml.scores is missing, which a \"llama\" model needs".into(),
            );
        }
        if let Some((id, token)) = self.tokens.iter().enumerate().find(|t| t.1.len() > MAX_TOKEN) {
            let len = token.len();
            return damaged(format!("token {id} has {len} bytes, the limit is {MAX_TOKEN}"));
        }
        let specials = [("bos", self.bos), ("eos", self.eos), ("unknown", self.unk)];
        for (name, id) in specials {
            if let Some(id) = id.filter(|id| *id as usize >= n) {
                return damaged(format!("{name}_token_id is {id}, the vocabulary has {n} tokens"));
            }
        }
        for (name, wanted, id) in [("bos", self.add_bos, self.bos), ("eos", self.add_eos, self.eos)]
        {
            if wanted && id.is_none() {
                return damaged(format!("add_{name}_token is set, but {name}_token_id is missing"));
            }
        }
        Ok(())
    }
}

/// A key's value; of another type than asked for it is an error, not absent.
fn field<'m, T>(
    metadata: &'m Metadata,
    name: &str,
    path: &Path,
    get: impl Fn(&'m Metadata, &str) -> Option<T>,
) -> Result<Option<T>> {
    let key = format!("tokenizer.ggml.{name}");
    match get(metadata, &key) {
        None if metadata.get(&key).is_some() => {
            Err(IoError::damaged(path, format!("{key} has the wrong type")))
        }
        value => Ok(value),
    }
}

/// The tokenizer of a vocabulary; `path` is for messages.
///
/// # Errors
/// [`IoError::Unsupported`] for another model or an unknown pre-tokenizer, listing the supported
/// ones; [`IoError::Damaged`] for sizes, ids and merges that do not fit together.
pub fn build(vocab: &GgufVocab, path: &Path) -> Result<tokenizers::Tokenizer> {
    let json = tokenizer_json(vocab, path)?.to_string();
    json.parse::<tokenizers::Tokenizer>()
        .map_err(|e| IoError::Tokenizer { path: path.to_owned(), what: e.to_string() })
}

fn tokenizer_json(vocab: &GgufVocab, path: &Path) -> Result<Value> {
    vocab.check(path)?;
    let names = names(vocab);
    let ids = ids(&names, path)?;
    let mut json = match vocab.model.as_str() {
        "gpt2" => byte_level(vocab, &names, &ids, path)?,
        "llama" => sentence_piece(vocab, &names, &ids),
        other => {
            let what =
                format!("tokenizer {other:?} is not supported; supported: \"gpt2\", \"llama\"");
            return Err(IoError::unsupported(path, what));
        }
    };
    let mut all = Map::new();
    let mut added = Vec::new();
    for (id, name) in (0u32..).zip(&names) {
        let kind = vocab.kind(id);
        // The converter's filler up to the embedding's rows; no tokenizer.json has it.
        if kind == UNUSED && *name == padding(id as usize) {
            continue;
        }
        all.insert(name.to_string(), id.into());
        if matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) {
            added.push(json!({
                "id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != USER_DEFINED,
            }));
        }
    }
    json["version"] = "1.0".into();
    json["added_tokens"] = added.into();
    json["model"]["vocab"] = all.into();
    Ok(json)
}

/// What llama.cpp's converter calls an embedding row that is no token.
pub(super) fn padding(id: usize) -> String {
    format!("[PAD{id}]")
}

/// The tokens' names; as in llama.cpp, empty ones get one.
pub(super) fn names(vocab: &GgufVocab) -> Vec<Cow<'_, str>> {
    let tokens = vocab.tokens.iter().enumerate();
    tokens
        .map(|(id, token)| match token.is_empty() {
            true => Cow::Owned(format!("[EMPTY_{id}]")),
            false => Cow::Borrowed(token.as_str()),
        })
        .collect()
}

/// Ids by name.
pub(super) fn ids<'a>(names: &'a [Cow<'a, str>], path: &Path) -> Result<HashMap<&'a str, u32>> {
    let mut ids = HashMap::with_capacity(names.len());
    for (id, name) in (0u32..).zip(names) {
        if let Some(first) = ids.insert(name.as_ref(), id) {
            let what = format!("tokens {first} and {id} are both {name:?}");
            return Err(IoError::damaged(path, what));
        }
    }
    Ok(ids)
}

/// `gpt2`: the stages of `tokenizer.json`, the model still without its vocabulary.
fn byte_level(
    vocab: &GgufVocab,
    names: &[Cow<'_, str>],
    ids: &HashMap<&str, u32>,
    path: &Path,
) -> Result<Value> {
    let pre = pre::by_name(&vocab.pre).ok_or_else(|| {
        let (name, supported) = (&vocab.pre, pre::supported());
        let what = format!("pre-tokenizer {name:?} is not supported; supported: {supported}");
        IoError::unsupported(path, what)
    })?;
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true,
    });
    let post_processor = match template(vocab, names) {
        Value::Null => bytes.clone(),
        template => json!({"type": "Sequence", "processors": [bytes, template]}),
    };
    Ok(json!({
        "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": pre.json(),
        "post_processor": post_processor,
        "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges, "merges": merges(vocab, ids, path)?,
        },
    }))
}

/// The merges as pairs, each checked: the tokenizers crate does not survive one whose result is
/// no token.
fn merges(vocab: &GgufVocab, ids: &HashMap<&str, u32>, path: &Path) -> Result<Vec<Value>> {
    let mut seen = HashSet::with_capacity(vocab.merges.len());
    let mut pairs = Vec::with_capacity(vocab.merges.len());
    for (rank, merge) in vocab.merges.iter().enumerate() {
        // A part may itself start with a space: the first one that has something before it cuts.
        let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let pair = cut.map(|at| (&merge[..at], &merge[at + 1..])).filter(|(_, b)| !b.is_empty());
        let Some((a, b)) = pair else {
            return Err(IoError::damaged(path, format!("merge {rank} ({merge:?}) is no pair")));
        };
        let whole = format!("{a}{b}");
        if let Some(part) = [a, b, whole.as_str()].into_iter().find(|part| !ids.contains_key(*part))
        {
            let what = format!("merge {rank} ({merge:?}) needs {part:?}, which is no token");
            return Err(IoError::damaged(path, what));
        }
        if seen.insert((a, b)) {
            pairs.push(json!([a, b]));
        }
    }
    Ok(pairs)
}

/// `llama`: the stages of `tokenizer.json`, as transformers converts SentencePiece models.
fn sentence_piece(vocab: &GgufVocab, names: &[Cow<'_, str>], ids: &HashMap<&str, u32>) -> Value {
    let unk = vocab.unk.or_else(|| (0..names.len() as u32).find(|id| vocab.kind(*id) == UNKNOWN));
    let mut normalizers =
        vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if vocab.add_space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let mut cuts = cuts(vocab, names, ids);
    // Of equal scores llama.cpp takes the leftmost pair; among the cuts of one token, the id and
    // the cut only make the order definite.
    let score = |id: u32| vocab.scores[id as usize];
    cuts.sort_by(|x, y| score(y.0).total_cmp(&score(x.0)).then(x.cmp(y)));
    let merges: Vec<Value> =
        cuts.iter().map(|(id, at)| json!(names[*id as usize].split_at(*at))).collect();
    json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": template(vocab, names),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unk.map(|id| &names[id as usize]),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "ignore_merges": false, "merges": merges,
        },
    })
}

/// Every way in which a token is two tokens joined, as (token, bytes of the left one). As in
/// SentencePiece, tokens with a meaning of their own neither arise by merging nor take part.
pub(super) fn cuts(
    vocab: &GgufVocab,
    names: &[Cow<'_, str>],
    ids: &HashMap<&str, u32>,
) -> Vec<(u32, usize)> {
    let plain = |name: &str| ids.get(name).is_some_and(|id| merges_freely(vocab, *id));
    let mut cuts = Vec::new();
    for (id, name) in (0u32..).zip(names).filter(|(id, _)| merges_freely(vocab, *id)) {
        for (at, _) in name.char_indices().skip(1) {
            if plain(&name[..at]) && plain(&name[at..]) {
                cuts.push((id, at));
            }
        }
    }
    cuts
}

/// Whether a token takes part in merges.
pub(super) fn merges_freely(vocab: &GgufVocab, id: u32) -> bool {
    !matches!(vocab.kind(id), UNKNOWN | CONTROL | USER_DEFINED | BYTE)
}

/// The post-processor that puts BOS and EOS around a text; null when neither is wanted.
fn template(vocab: &GgufVocab, names: &[Cow<'_, str>]) -> Value {
    let bos = vocab.bos.filter(|_| vocab.add_bos);
    let eos = vocab.eos.filter(|_| vocab.add_eos);
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let around = |text: &str, type_id: u32| -> Vec<Value> {
        let special =
            |id: u32| json!({"SpecialToken": {"id": names[id as usize], "type_id": type_id}});
        let text = json!({"Sequence": {"id": text, "type_id": type_id}});
        bos.map(special).into_iter().chain([text]).chain(eos.map(special)).collect()
    };
    let mut specials = Map::new();
    for id in bos.into_iter().chain(eos) {
        let name = &names[id as usize];
        specials.insert(name.to_string(), json!({"id": name, "ids": [id], "tokens": [name]}));
    }
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({
        "type": "TemplateProcessing", "single": around("A", 0), "pair": pair,
        "special_tokens": specials,
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    /// All bytes, a few merges and two special tokens.
    pub fn byte_level_vocab(pre: &str) -> GgufVocab {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut tokens: Vec<String> = alphabet.into_iter().map(String::from).collect();
        tokens.sort();
        let merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"].map(String::from);
        tokens.extend(merges.iter().map(|m| m.replace(' ', "")));
        let specials = tokens.len();
        tokens.extend(["<|bos|>", "<|end|>", "<tool>", "[PAD265]"].map(String::from));
        let mut token_types = vec![NORMAL; tokens.len()];
        token_types[specials..].copy_from_slice(&[CONTROL, CONTROL, USER_DEFINED, UNUSED]);
        GgufVocab {
            model: "gpt2".into(),
            pre: pre.into(),
            tokens,
            token_types,
            merges: merges.into(),
            bos: Some(specials as u32),
            eos: Some(specials as u32 + 1),
            ..GgufVocab::default()
        }
    }

    /// Bytes, a few scored tokens and three special ones.
    pub fn sentence_piece_vocab() -> GgufVocab {
        let mut vocab = GgufVocab {
            model: "llama".into(),
            pre: "default".into(),
            bos: Some(1),
            eos: Some(2),
            unk: Some(0),
            add_bos: true,
            add_space_prefix: true,
            ..GgufVocab::default()
        };
        let mut put = |token: String, kind: i64, score: f32| {
            vocab.tokens.push(token);
            vocab.token_types.push(kind);
            vocab.scores.push(score);
        };
        put("<unk>".into(), UNKNOWN, 0.0);
        put("<s>".into(), CONTROL, 0.0);
        put("</s>".into(), CONTROL, 0.0);
        (0..256).for_each(|b| put(format!("<0x{b:02X}>"), BYTE, 0.0));
        let joined = ["▁a", "ab", "▁ab", "bc", "abc", "<s"];
        joined.iter().enumerate().for_each(|(i, t)| put(t.to_string(), NORMAL, -(i as f32)));
        "▁abc<s>".chars().for_each(|c| put(c.to_string(), NORMAL, -100.0));
        vocab
    }

    fn open(vocab: &GgufVocab) -> Tokenizer {
        Tokenizer::from_vocab(vocab, Path::new("x.gguf")).unwrap()
    }

    fn refusal(vocab: &GgufVocab) -> String {
        Tokenizer::from_vocab(vocab, Path::new("x.gguf")).unwrap_err().to_string()
    }

    fn words(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
        let ids = tokenizer.encode(text, false).unwrap();
        ids.iter().map(|id| tokenizer.token(*id).unwrap()).collect()
    }

    #[test]
    fn byte_level_merges_and_special_tokens() {
        let tokenizer = open(&byte_level_vocab("smollm"));
        assert_eq!(words(&tokenizer, "hello hello12"), ["hello", "Ġhello", "1", "2"]);
        let gpt2 = open(&byte_level_vocab("gpt-2"));
        assert_eq!(words(&gpt2, "hello12"), ["hello", "12"]);
        let text = "a <|end|><tool>é🦙\u{0}\n";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a <tool>é🦙\u{0}\n");
        assert_eq!((tokenizer.vocab_size(), tokenizer.token(265)), (265, None));
    }

    #[test]
    fn bos_and_eos_only_where_asked_for() {
        let mut vocab = byte_level_vocab("llama-bpe");
        (vocab.add_bos, vocab.add_eos) = (true, true);
        let tokenizer = open(&vocab);
        let bos = tokenizer.id_of("<|bos|>").unwrap();
        let plain = tokenizer.encode("hello", false).unwrap();
        assert_eq!(plain, [tokenizer.id_of("hello").unwrap()]);
        let full = tokenizer.encode("hello", true).unwrap();
        assert_eq!(full, [bos, plain[0], bos + 1]);
        let vocab = sentence_piece_vocab();
        assert_eq!(open(&vocab).encode("abc", true).unwrap()[0], 1);
        assert_eq!(open(&vocab).encode("", true).unwrap(), [1]);
        assert!(open(&vocab).encode("", false).unwrap().is_empty());
    }

    #[test]
    fn sentence_piece_joins_by_score_and_falls_back_to_bytes() {
        let mut vocab = sentence_piece_vocab();
        let tokenizer = open(&vocab);
        // "▁a" scores above "ab" and "bc", so "abc" does not arise.
        assert_eq!(words(&tokenizer, "abc"), ["▁ab", "c"]);
        assert_eq!(words(&tokenizer, "cab"), ["▁", "c", "ab"]);
        assert_eq!(words(&tokenizer, "é"), ["▁", "<0xC3>", "<0xA9>"]);
        assert_eq!(words(&tokenizer, "c<s>"), ["▁", "c", "<s>"]);
        for text in ["abc  é a", " a", "  "] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        vocab.add_space_prefix = false;
        let tokenizer = open(&vocab);
        assert_eq!(words(&tokenizer, "abc"), ["abc"]);
        assert_eq!(tokenizer.decode(&tokenizer.encode(" a", false).unwrap(), true).unwrap(), " a");
    }

    #[test]
    fn qwen_composes_text_first() {
        let (plain, nfc) = (byte_level_vocab("deepseek-r1-qwen"), byte_level_vocab("qwen2"));
        assert_eq!(open(&plain).encode("e\u{301}", false).unwrap().len(), 3);
        assert_eq!(open(&nfc).encode("e\u{301}", false).unwrap().len(), 2);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let with = |change: fn(&mut GgufVocab)| {
            let mut vocab = byte_level_vocab("qwen2");
            change(&mut vocab);
            refusal(&vocab)
        };
        let text = with(|v| v.pre = "qwen9".into());
        assert!(text.contains("qwen9") && text.contains("smollm"), "{text}");
        assert!(with(|v| v.model = "t5".into()).contains("t5"));
        assert!(with(|v| v.tokens.clear()).contains("0 tokens"));
        assert!(with(|v| v.token_types.truncate(3)).contains("3 token types"));
        assert!(with(|v| v.bos = Some(1 << 20)).contains("bos_token_id"));
        assert!(with(|v| (v.add_eos, v.eos) = (true, None)).contains("eos_token_id is missing"));
        assert!(with(|v| v.merges.push("hello hello".into())).contains("merge 6"));
        assert!(with(|v| v.merges.push("hello".into())).contains("no pair"));
        assert!(with(|v| v.tokens[0] = v.tokens[1].clone()).contains("tokens 0 and 1"));
        assert!(with(|v| v.tokens[0] = "x".repeat(5000)).contains("5000 bytes"));
        assert!(with(|v| v.model = "llama".into()).contains("scores"));
    }

    #[test]
    fn keys_read_back() {
        for vocab in [byte_level_vocab("smollm"), sentence_piece_vocab()] {
            let metadata: Metadata = vocab.keys().into_iter().collect();
            assert_eq!(GgufVocab::read(&metadata, Path::new("x.gguf")).unwrap(), vocab);
        }
        let bad: Metadata =
            [("tokenizer.ggml.model".to_string(), Field::U32(1))].into_iter().collect();
        let text = GgufVocab::read(&bad, Path::new("x.gguf")).unwrap_err().to_string();
        assert!(text.contains("wrong type"), "{text}");
    }
}
