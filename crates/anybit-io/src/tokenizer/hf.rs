//! Hugging Face's `tokenizer.json`: what is checked before the tokenizers crate may load one, and
//! [`to_gguf`], its form in a GGUF file.
//!
//! GGUF knows fewer tokenizers, so the second is partial: byte-level BPE whose pre-tokenizer has a
//! GGUF name, and BPE with byte fallback whose merges follow from one score per token (what
//! transformers makes of a SentencePiece model). Anything else is refused.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Value, json};

use super::gguf::{self, BYTE, CONTROL, GgufVocab, NORMAL, UNKNOWN, UNUSED, USER_DEFINED};
use super::pre;
use crate::{IoError, Result};

/// Refuses what would make the tokenizers crate panic, at load or later.
///
/// # Errors
/// Merges that are no pairs or make no token, templates with unknown tokens, a decoder that
/// strips the end of a text.
pub(super) fn check(json: &Value, path: &Path) -> Result<()> {
    if json["model"]["dropout"].as_f64().is_some_and(|p| p != 0.0) {
        let what = "a tokenizer with dropout cuts the same text differently each time; set \
                    \"dropout\" to null";
        return Err(IoError::unsupported(path, what));
    }
    check_ids(json, path)?;
    check_merges(&json["model"], path)?;
    for stage in stages(&json["post_processor"], "processors") {
        if stage["type"] == "TemplateProcessing" {
            check_template(stage, path)?;
        }
    }
    for stage in stages(&json["pre_tokenizer"], "pretokenizers") {
        if stage["type"] == "FixedLength" && stage["length"].as_u64().is_none_or(|l| l == 0) {
            return Err(IoError::damaged(path, "a pre-tokenizer cuts the text into pieces of 0"));
        }
    }
    for stage in stages(&json["normalizer"], "normalizers") {
        if stage["type"] == "Precompiled" {
            let what = "a precompiled normalizer is not supported";
            return Err(IoError::unsupported(path, what));
        }
    }
    for stage in stages(&json["decoder"], "decoders") {
        if stage["type"] == "Strip" && stage["stop"] != 0 {
            let what = "a decoder that strips the end of a text is not supported";
            return Err(IoError::unsupported(path, what));
        }
    }
    Ok(())
}

/// Ids beyond any vocabulary would make the crate count up to them.
fn check_ids(json: &Value, path: &Path) -> Result<()> {
    const MAX_ID: u64 = 1 << 24;
    let vocab = json["model"]["vocab"].as_object().into_iter().flatten().map(|(_, id)| id);
    let added = json["added_tokens"].as_array().into_iter().flatten().map(|t| &t["id"]);
    match vocab.chain(added).find(|id| id.as_u64().is_some_and(|id| id > MAX_ID)) {
        Some(id) => Err(IoError::damaged(path, format!("a token has the id {id}"))),
        None => Ok(()),
    }
}

fn check_merges(model: &Value, path: &Path) -> Result<()> {
    let Some(vocab) = model["vocab"].as_object() else { return Ok(()) };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for (rank, merge) in merges(model).enumerate() {
        let whole = merge.and_then(|(a, b)| Some(format!("{a}{}", b.strip_prefix(prefix)?)));
        let known = |token: &str| vocab.contains_key(token);
        let good = merge.is_some_and(|(a, b)| known(a) && known(b));
        if !(good && whole.as_deref().is_some_and(known)) {
            let what = match merge {
                Some((a, b)) => format!("merge {rank} ({a:?}, {b:?}) is not of tokens"),
                None => format!("merge {rank} is no pair"),
            };
            return Err(IoError::damaged(path, what));
        }
    }
    Ok(())
}

fn check_template(stage: &Value, path: &Path) -> Result<()> {
    for piece in stage["single"].as_array().into_iter().flatten() {
        let special = &piece["SpecialToken"]["id"];
        let known = match special.as_str() {
            Some(name) => !stage["special_tokens"][name].is_null(),
            None => piece["Sequence"]["id"] == "A",
        };
        if !known {
            let what = format!("the post-processor's template has {piece}, which is not defined");
            return Err(IoError::damaged(path, what));
        }
    }
    Ok(())
}

/// The merges of a model, `None` for one that is no pair. Files have `"a b"` or `["a", "b"]`.
fn merges(model: &Value) -> impl Iterator<Item = Option<(&str, &str)>> {
    let list = model["merges"].as_array().into_iter().flatten();
    // Lists made from a merges.txt may still start with its first line.
    list.filter(|m| !m.as_str().is_some_and(|m| m.starts_with("#version"))).map(|m| match m {
        Value::String(text) => text.split_once(' ').filter(|(_, b)| !b.contains(' ')),
        Value::Array(pair) => match &pair[..] {
            [Value::String(a), Value::String(b)] => Some((a.as_str(), b.as_str())),
            _ => None,
        },
        _ => None,
    })
}

/// A stage's parts in order, a `Sequence` opened up; none for null.
fn stages<'a>(stage: &'a Value, list: &str) -> Vec<&'a Value> {
    match stage[list].as_array() {
        Some(parts) => parts.iter().flat_map(|part| stages(part, list)).collect(),
        None if stage.is_null() || stage["type"] == "Sequence" => Vec::new(),
        None => vec![stage],
    }
}

/// The vocabulary that a GGUF file of this `tokenizer.json` holds, filled up to `vocab_size`.
/// `bos` and `eos` are those of `config.json`; a post-processor that adds others wins.
///
/// # Errors
/// [`IoError::Unsupported`] for what GGUF cannot say, [`IoError::Damaged`] for broken content;
/// `path` is for messages.
pub fn to_gguf(
    json: &Value,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    path: &Path,
) -> Result<GgufVocab> {
    check(json, path)?;
    let model = &json["model"];
    let unset = |key: &str| model[key].is_null() || model[key] == "" || model[key] == 0.0;
    let plain = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"];
    if model["type"] != "BPE" || !plain.into_iter().all(unset) {
        let what = format!(
            "tokenizer {} has no form in GGUF; supported: BPE without dropout, prefix and suffix",
            model["type"]
        );
        return Err(IoError::unsupported(path, what));
    }
    let (tokens, token_types) = tokens(json, vocab_size, path)?;
    let (before, after) = ends(&json["post_processor"], path)?;
    let unk = model["unk_token"].as_str();
    let unk = unk.and_then(|unk| tokens.iter().position(|token| token == unk));
    let mut vocab = GgufVocab {
        tokens,
        token_types,
        bos: before.or(bos),
        eos: after.or(eos),
        unk: unk.and_then(|id| u32::try_from(id).ok()),
        add_bos: before.is_some(),
        add_eos: after.is_some(),
        ..GgufVocab::default()
    };
    match model["byte_fallback"] == true {
        true => sentence_piece(&mut vocab, json, path)?,
        false => byte_level(&mut vocab, json, path)?,
    }
    vocab.check(path)?;
    Ok(vocab)
}

/// Names and types by id, unused ids filled as llama.cpp's converter does.
fn tokens(json: &Value, vocab_size: usize, path: &Path) -> Result<(Vec<String>, Vec<i64>)> {
    let mut slots: Vec<Option<(String, i64)>> = vec![None; vocab_size];
    let mut place = |name: &str, id: &Value, kind: i64| -> Result<()> {
        let index = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let index = index.filter(|index| *index < vocab_size).ok_or_else(|| {
            let what = format!("token {name:?} has id {id}, but the model has {vocab_size} ids");
            IoError::unsupported(path, what)
        })?;
        let slot = &mut slots[index];
        if let Some((other, _)) = slot.as_ref().filter(|(other, _)| other != name) {
            let what = format!("tokens {other:?} and {name:?} both have id {id}");
            return Err(IoError::damaged(path, what));
        }
        *slot = Some((name.to_owned(), kind));
        Ok(())
    };
    for (name, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        place(name, id, NORMAL)?;
    }
    for token in json["added_tokens"].as_array().into_iter().flatten() {
        let name = token["content"].as_str().unwrap_or_default();
        let kind = if token["special"] == true { CONTROL } else { USER_DEFINED };
        place(name, &token["id"], kind)?;
    }
    let filler = |(id, slot): (usize, Option<(String, i64)>)| {
        slot.unwrap_or_else(|| (gguf::padding(id), UNUSED))
    };
    Ok(slots.into_iter().enumerate().map(filler).unzip())
}

/// The tokens that the post-processor puts before and after a text.
fn ends(stage: &Value, path: &Path) -> Result<(Option<u32>, Option<u32>)> {
    let mut found = (None, None);
    for part in stages(stage, "processors") {
        let ends = match part["type"].as_str() {
            Some("ByteLevel") => continue,
            Some("TemplateProcessing") => template_ends(part),
            _ => None,
        };
        found = ends.ok_or_else(|| {
            let what = "its post-processor has no form in GGUF; supported: none, or a template of \
                        at most one token before and one after the text";
            IoError::unsupported(path, what)
        })?;
    }
    Ok(found)
}

fn template_ends(template: &Value) -> Option<(Option<u32>, Option<u32>)> {
    let id = |pieces: &[Value]| -> Option<Option<u32>> {
        let [piece] = pieces else { return pieces.is_empty().then_some(None) };
        let name = piece["SpecialToken"]["id"].as_str()?;
        let [id] = &template["special_tokens"][name]["ids"].as_array()?[..] else { return None };
        u32::try_from(id.as_u64()?).ok().map(Some)
    };
    let pieces = template["single"].as_array()?;
    let text = pieces.iter().position(|piece| piece["Sequence"].is_object())?;
    Some((id(&pieces[..text])?, id(&pieces[text + 1..])?))
}

/// `gpt2`: the merges as they are, the pre-tokenizer by its name.
fn byte_level(vocab: &mut GgufVocab, json: &Value, path: &Path) -> Result<()> {
    let model = &json["model"];
    vocab.model = "gpt2".into();
    for (a, b) in merges(model).flatten() {
        if a.contains(' ') || b.contains(' ') {
            let what = format!("merge ({a:?}, {b:?}) holds a space, which GGUF cannot say");
            return Err(IoError::unsupported(path, what));
        }
        vocab.merges.push(format!("{a} {b}"));
    }
    let nfc = match stages(&json["normalizer"], "normalizers")[..] {
        [] => Some(false),
        [stage] if stage["type"] == "NFC" => Some(true),
        _ => None,
    };
    let ignore_merges = model["ignore_merges"] == true;
    let found = nfc.and_then(|nfc| pre::recognise(&json["pre_tokenizer"], ignore_merges, nfc));
    // Where nothing is merged it does not matter how the text is cut.
    let found = match vocab.merges.is_empty() && nfc == Some(false) {
        true => found.or(pre::by_name("gpt-2")),
        false => found,
    };
    let found = found.ok_or_else(|| {
        let what = format!(
            "its normalizer and pre-tokenizer have no GGUF name that we know; supported: those of \
             {}",
            pre::supported()
        );
        IoError::unsupported(path, what)
    })?;
    vocab.pre = found.names[0].into();
    Ok(())
}

/// `llama`: scores that give the same merges in the same order.
fn sentence_piece(vocab: &mut GgufVocab, json: &Value, path: &Path) -> Result<()> {
    vocab.model = "llama".into();
    vocab.pre = "default".into();
    vocab.add_space_prefix = space_prefix(json).ok_or_else(|| {
        let what = "its normalizer and pre-tokenizer have no form in GGUF; supported: those of \
                    SentencePiece BPE models (spaces as \"▁\", with or without one in front)";
        IoError::unsupported(path, what)
    })?;
    let is_byte = |name: &str| {
        let digits = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
    };
    for (name, kind) in vocab.tokens.iter().zip(&mut vocab.token_types) {
        if *kind == NORMAL && is_byte(name) {
            *kind = BYTE;
        }
    }
    if let Some(unk) = vocab.unk {
        vocab.token_types[unk as usize] = UNKNOWN;
    }
    vocab.scores = scores(vocab, &json["model"], path)?.ok_or_else(|| {
        let what = "its merges do not follow from one score per token, so GGUF's \"llama\" \
                    tokenizer cannot express them";
        IoError::unsupported(path, what)
    })?;
    Ok(())
}

/// Whether a text starts as if a space stood before it; `None` for other normalizations.
fn space_prefix(json: &Value) -> Option<bool> {
    let normalizers = stages(&json["normalizer"], "normalizers");
    let cutter = &json["pre_tokenizer"];
    if cutter.is_null() {
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let prepend = json!({"type": "Prepend", "prepend": "▁"});
        return match normalizers[..] {
            [one] if *one == replace => Some(false),
            [one, two] if *one == prepend && *two == replace => Some(true),
            _ => None,
        };
    }
    let spaces = cutter["type"] == "Metaspace" && cutter["replacement"] == "▁";
    if !(spaces && cutter["split"] == false && normalizers.is_empty()) {
        return None;
    }
    match cutter["prepend_scheme"].as_str()? {
        "always" | "first" => Some(true),
        "never" => Some(false),
        _ => None,
    }
}

/// A merge by the token that it makes.
struct Made {
    id: u32,
    /// Bytes of the left part.
    cut: usize,
    /// Characters of both parts.
    lengths: (usize, usize),
}

/// A score per token, higher for what merges earlier; `None` when no scores give these merges.
fn scores(vocab: &GgufVocab, model: &Value, path: &Path) -> Result<Option<Vec<f32>>> {
    let names = gguf::names(vocab);
    let ids = gguf::ids(&names, path)?;
    let mut made = Vec::new();
    for (a, b) in merges(model).flatten() {
        let whole = format!("{a}{b}");
        let [Some(left), Some(right), Some(id)] =
            [a, b, whole.as_str()].map(|part| ids.get(part).copied())
        else {
            return Ok(None);
        };
        if [left, right, id].iter().all(|id| gguf::merges_freely(vocab, *id)) {
            let lengths = (a.chars().count(), b.chars().count());
            made.push(Made { id, cut: a.len(), lengths });
        }
    }
    // Scores allow every pair that makes a token, so each must be among the merges.
    let mut pairs: Vec<(u32, usize)> = made.iter().map(|m| (m.id, m.cut)).collect();
    pairs.sort_unstable();
    pairs.dedup();
    if pairs != gguf::cuts(vocab, &names, &ids) {
        return Ok(None);
    }
    // What no merge makes comes after all that one makes.
    let mut scores = vec![-(names.len() as f32); names.len()];
    Ok(rank(&made, &mut scores).then_some(scores))
}

/// Scores by rank; false when the ranks follow from no scores.
///
/// The merges of one score stand together. Where they make several tokens, transformers 4 sorted
/// them by the lengths of their parts, longest first; any other mixture is not from scores.
fn rank(made: &[Made], scores: &mut [f32]) -> bool {
    let last: HashMap<u32, usize> = made.iter().enumerate().map(|(at, m)| (m.id, at)).collect();
    let (mut start, mut score) = (0, 0.0);
    while start < made.len() {
        let (mut at, mut end) = (start, start);
        while at <= end {
            end = end.max(last[&made[at].id]);
            at += 1;
        }
        let equal = &made[start..=end];
        let several = equal.iter().any(|m| m.id != equal[0].id);
        if several && !equal.is_sorted_by(|x, y| x.lengths >= y.lengths) {
            return false;
        }
        score -= 1.0;
        equal.iter().for_each(|m| scores[m.id as usize] = score);
        start = end + 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::super::gguf::tests::{byte_level_vocab, sentence_piece_vocab};
    use super::*;
    use crate::tokenizer::Tokenizer;

    fn path() -> &'static Path {
        Path::new("tokenizer.json")
    }

    /// `tokenizer.json` of a vocabulary, as we save it.
    fn saved(vocab: &GgufVocab) -> Value {
        let tokenizer = gguf::build(vocab, path()).unwrap();
        serde_json::from_str(&tokenizer.to_string(false).unwrap()).unwrap()
    }

    fn back(json: &Value, size: usize) -> Result<GgufVocab> {
        to_gguf(json, size, None, None, path())
    }

    fn refusal(json: &Value) -> String {
        back(json, 1000).unwrap_err().to_string()
    }

    #[test]
    fn byte_level_there_and_back() {
        for pre in ["smollm", "qwen2", "llama-bpe", "deepseek-r1-qwen", "tekken", "gpt-2"] {
            let mut vocab = byte_level_vocab(pre);
            vocab.add_bos = true;
            vocab.eos = None;
            assert_eq!(back(&saved(&vocab), vocab.tokens.len()).unwrap(), vocab);
        }
        let vocab = byte_level_vocab("smollm");
        let given = to_gguf(&saved(&vocab), 266, vocab.bos, vocab.eos, path()).unwrap();
        assert_eq!(given, vocab);
    }

    #[test]
    fn sentence_piece_there_and_back() {
        for prefix in [true, false] {
            let mut vocab = sentence_piece_vocab();
            vocab.add_space_prefix = prefix;
            let json = saved(&vocab);
            let again = to_gguf(&json, vocab.tokens.len() + 2, None, Some(2), path()).unwrap();
            assert_eq!(again.tokens[vocab.tokens.len()], gguf::padding(vocab.tokens.len()));
            assert_eq!(again.token_types[..3], [UNKNOWN, CONTROL, CONTROL]);
            assert_eq!(again.token_types[3..259], [BYTE; 256]);
            assert_eq!((again.add_bos, again.add_space_prefix), (true, prefix));
            let [one, two] = [&vocab, &again].map(|v| Tokenizer::from_vocab(v, path()).unwrap());
            for text in ["abc", "cab bca", "<s>ab", "aabbcc é"] {
                assert_eq!(one.encode(text, true).unwrap(), two.encode(text, true).unwrap());
            }
        }
    }

    #[test]
    fn metaspace_is_the_newer_form_of_the_same() {
        let mut json = saved(&sentence_piece_vocab());
        json["normalizer"] = Value::Null;
        json["pre_tokenizer"] = json!({
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false,
        });
        assert!(back(&json, 300).unwrap().add_space_prefix);
        json["pre_tokenizer"]["split"] = true.into();
        assert!(refusal(&json).contains("SentencePiece"));
    }

    #[test]
    fn merges_that_scores_cannot_give_are_refused() {
        let json = saved(&sentence_piece_vocab());
        let all = json["model"]["merges"].as_array().unwrap().clone();
        let mut fewer = json.clone();
        fewer["model"]["merges"] = all[1..].to_vec().into();
        assert!(refusal(&fewer).contains("score"));
        let with_two_ways = all.iter().position(|m| *m == json!(["a", "bc"])).unwrap();
        let mut parted = json.clone();
        let mut merges = all.clone();
        let moved = merges.remove(with_two_ways);
        merges.insert(0, moved);
        parted["model"]["merges"] = merges.into();
        assert!(refusal(&parted).contains("score"));
    }

    #[test]
    fn equal_scores_as_transformers_4_orders_them() {
        let mut vocab = sentence_piece_vocab();
        for token in ["aa", "aaa", "aaaa"] {
            vocab.tokens.push(token.into());
            vocab.token_types.push(NORMAL);
            vocab.scores.push(-50.0);
        }
        let mut json = saved(&vocab);
        let merges = json["model"]["merges"].as_array_mut().unwrap();
        let run = |part: &Value| part.as_str().unwrap().chars().all(|c| c == 'a');
        merges.retain(|m| !(run(&m[0]) && run(&m[1])));
        for pair in [("aaa", "a"), ("aa", "aa"), ("aa", "a"), ("a", "aaa"), ("a", "aa"), ("a", "a")]
        {
            merges.push(json!(pair));
        }
        let again = back(&json, vocab.tokens.len()).unwrap();
        let score = |token: &str| {
            let id = again.tokens.iter().position(|t| t == token).unwrap();
            again.scores[id]
        };
        assert_eq!(score("aaa"), score("aaaa"));
        assert!(score("aa") < score("aaa") && score("aaa") < score("<s"));
        let given: tokenizers::Tokenizer = json.to_string().parse().unwrap();
        let again = gguf::build(&again, path()).unwrap();
        for n in 0..20 {
            let text = "a".repeat(n);
            let [one, two] = [&given, &again].map(|t| t.encode_fast(text.as_str(), true).unwrap());
            assert_eq!(one.get_ids(), two.get_ids());
        }
    }

    #[test]
    fn what_gguf_cannot_say_is_refused() {
        let with = |change: fn(&mut Value)| {
            let mut json = saved(&byte_level_vocab("qwen2"));
            change(&mut json);
            refusal(&json)
        };
        assert!(with(|j| j["model"]["type"] = "Unigram".into()).contains("Unigram"));
        assert!(with(|j| j["model"]["end_of_word_suffix"] = "</w>".into()).contains("suffix"));
        assert!(with(|j| j["pre_tokenizer"]["pretokenizers"] = json!([])).contains("qwen2"));
        assert!(with(|j| j["normalizer"] = json!({"type": "Lowercase"})).contains("normalizer"));
        assert!(with(|j| j["post_processor"] = json!({"type": "BertProcessing"})).contains("post"));
        let json = saved(&byte_level_vocab("qwen2"));
        assert!(back(&json, 100).unwrap_err().to_string().contains("100 ids"));
    }

    #[test]
    fn files_that_would_crash_the_loader_are_refused() {
        let with = |change: fn(&mut Value)| {
            let mut json = saved(&byte_level_vocab("qwen2"));
            change(&mut json);
            check(&json, path()).unwrap_err().to_string()
        };
        assert!(with(|j| j["model"]["merges"] = json!([["hello", "hello"]])).contains("merge 0"));
        assert!(with(|j| j["model"]["merges"] = json!(["h e", "h e l"])).contains("merge 1"));
        assert!(with(|j| j["model"]["merges"] = json!([7])).contains("no pair"));
        assert!(with(|j| j["decoder"] = json!({"type": "Strip", "stop": 1})).contains("strips"));
        let template = |piece: Value| {
            let stage = json!({"type": "TemplateProcessing", "single": [piece]});
            check(&json!({"post_processor": stage}), path()).is_err()
        };
        assert!(template(json!({"SpecialToken": {"id": "<s>", "type_id": 0}})));
        assert!(template(json!({"Sequence": {"id": "B", "type_id": 0}})));
        assert!(!template(json!({"Sequence": {"id": "A", "type_id": 0}})));
    }

    #[test]
    fn a_merges_txt_header_is_no_merge() {
        let model = json!({"merges": ["#version: 0.2", "a b", ["c", "d"], "x"]});
        let all: Vec<_> = merges(&model).collect();
        assert_eq!(all, [Some(("a", "b")), Some(("c", "d")), None]);
    }
}
