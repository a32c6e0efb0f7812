//! Training a byte-level BPE tokenizer on texts, with the tokenizers crate. Every byte is a token,
//! so that no text is outside the vocabulary. Ties between pairs of equal count go to the smaller
//! ids, so that the same texts give the same file. Called by training runs.

use std::path::Path;

use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerImpl,
};

use crate::atomic::write_bytes;
use crate::{IoError, Result};

/// Bytes, which are always tokens.
const BYTES: usize = 256;

/// What is trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpeOptions {
    /// Tokens at most, bytes and special ones included.
    pub vocab_size: usize,
    /// Times that a pair must occur to become a token.
    pub min_frequency: u64,
    /// The token at the start of a document.
    pub bos: String,
    /// The token at the end of an answer.
    pub eos: String,
}

impl BpeOptions {
    /// Pairs that occur twice; `<s>` and `</s>`.
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, min_frequency: 2, bos: "<s>".into(), eos: "</s>".into() }
    }
}

/// A tokenizer that was trained.
#[derive(Debug, Clone)]
pub struct TrainedTokenizer {
    json: String,
    vocab_size: usize,
    options: BpeOptions,
}

type Parts = TokenizerImpl<
    BPE,
    NormalizerWrapper,
    PreTokenizerWrapper,
    PostProcessorWrapper,
    DecoderWrapper,
>;

/// Trains on `texts`.
///
/// # Errors
/// A vocabulary that has no room for all bytes; what the tokenizers crate refuses.
pub fn train_bpe(
    texts: &mut (dyn Iterator<Item = String> + Send),
    options: &BpeOptions,
) -> Result<TrainedTokenizer> {
    let path = Path::new("a new tokenizer");
    let least = BYTES + 2;
    if options.vocab_size < least {
        let what = format!("{} tokens are too few: {least} at least", options.vocab_size);
        return Err(IoError::unsupported(path, what));
    }
    let special = [&options.bos, &options.eos].map(|t| AddedToken::from(t.as_str(), true));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(options.vocab_size)
        .min_frequency(options.min_frequency)
        .show_progress(false)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Parts::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(byte_level)));
    tokenizer.with_decoder(Some(DecoderWrapper::ByteLevel(byte_level)));
    tokenizer.train(&mut trainer, texts).map_err(|e| super::refused(path, &e))?;
    let json = tokenizer.to_string(false).map_err(|e| super::refused(path, &e))?;
    let json = with_bos(&json, &options.bos, path)?;
    let vocab_size = tokenizer.get_vocab_size(true);
    Ok(TrainedTokenizer { json, vocab_size, options: options.clone() })
}

/// `tokenizer.json` with a post-processor that begins a text with BOS, as documents begin in
/// training; `add_bos_token` of `tokenizer_config.json` alone does not make loaders do it.
fn with_bos(json: &str, bos: &str, path: &Path) -> Result<String> {
    let damaged = |e: serde_json::Error| IoError::damaged(path, e.to_string());
    let mut json: serde_json::Value = serde_json::from_str(json).map_err(damaged)?;
    let id = json["model"]["vocab"][bos].clone();
    let special = |kind: u32| json!({"SpecialToken": {"id": bos, "type_id": kind}});
    let text = |name: &str, kind: u32| json!({"Sequence": {"id": name, "type_id": kind}});
    json["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [special(0), text("A", 0)],
        "pair": [special(0), text("A", 0), special(1), text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [id], "tokens": [bos]}},
    });
    serde_json::to_string_pretty(&json).map_err(damaged)
}

impl TrainedTokenizer {
    /// Tokens; fewer than asked for when the texts have no more pairs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `folder`.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn save(&self, folder: &Path) -> Result<()> {
        write_bytes(&folder.join("tokenizer.json"), self.json.as_bytes())?;
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.options.bos,
            "eos_token": self.options.eos,
            "add_bos_token": true,
            "clean_up_tokenization_spaces": false,
        });
        write_bytes(&folder.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;
    use proptest::prelude::*;

    fn trained(vocab_size: usize) -> TrainedTokenizer {
        let text = |i: usize| format!("the rain in spain falls on the plain {}\n", i % 7);
        let mut texts = (0..200).map(text);
        train_bpe(&mut texts, &BpeOptions::new(vocab_size)).unwrap()
    }

    fn loaded(tokenizer: &TrainedTokenizer) -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        tokenizer.save(folder.path()).unwrap();
        Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap()
    }

    #[test]
    fn the_same_texts_give_the_same_file() {
        let (a, b) = (trained(280), trained(280));
        assert_eq!(a.json, b.json);
        assert_eq!(a.vocab_size(), 280);
        let tokenizer = loaded(&a);
        assert!(tokenizer.encode("the rain", false).unwrap().len() < 5);
        assert_eq!((tokenizer.id_of("<s>"), tokenizer.id_of("</s>")), (Some(0), Some(1)));
        let [plain, begun] = [false, true].map(|add| tokenizer.encode("the rain", add).unwrap());
        assert_eq!(begun, [&[0][..], &plain[..]].concat());
        // There are not so many pairs.
        assert!(trained(5000).vocab_size() < 400);
    }

    #[test]
    fn a_vocabulary_without_room_for_bytes_is_refused() {
        let error = train_bpe(&mut std::iter::empty(), &BpeOptions::new(200)).unwrap_err();
        assert!(error.to_string().contains("258"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in "\\PC{0,60}") {
            let tokenizer = loaded(&trained(300));
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        }
    }
}
