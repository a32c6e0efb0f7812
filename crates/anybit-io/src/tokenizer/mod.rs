//! Text to token ids and back, and what generation needs around it: [`StreamDecoder`] turns ids
//! into text as they come, [`StopMatcher`] ends a text at a stop string, [`chat::ChatTemplate`]
//! turns a conversation into a prompt.
//!
//! Tokenizing is the tokenizers crate's, from a `tokenizer.json` or from GGUF metadata ([`gguf`]).
//! Checkpoints hand out a [`Tokenizer`]; evaluation and generation use it.

pub mod chat;
pub mod gguf;
mod hf;
mod pre;
mod train;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::gguf::GgufFile;
use crate::{IoError, Result};
use gguf::GgufVocab;
pub use train::{BpeOptions, TrainedTokenizer, train_bpe};

/// A tokenizer; clones share it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    path: PathBuf,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`.
    ///
    /// # Errors
    /// A file that cannot be read, is no JSON, or that the tokenizers crate does not understand.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
        let json: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| IoError::damaged(path, format!("not valid JSON ({e})")))?;
        hf::check(&json, path)?;
        let inner = text.parse::<tokenizers::Tokenizer>().map_err(|e| refused(path, &e))?;
        Self::new(inner, path)
    }

    /// The tokenizer of an open GGUF file.
    ///
    /// # Errors
    /// Metadata without a tokenizer, with one that is not supported, or with a broken one.
    pub fn from_gguf(file: &GgufFile) -> Result<Self> {
        Self::from_vocab(&GgufVocab::read(&file.metadata, &file.path)?, &file.path)
    }

    /// The tokenizer of a GGUF file, which may hold nothing else.
    ///
    /// # Errors
    /// As [`GgufFile::open`] and [`Tokenizer::from_gguf`].
    pub fn from_gguf_file(path: &Path) -> Result<Self> {
        Self::from_gguf(&GgufFile::open(path)?)
    }

    /// The tokenizer of a GGUF vocabulary; `path` is for messages.
    ///
    /// # Errors
    /// As [`gguf::build`].
    pub fn from_vocab(vocab: &GgufVocab, path: &Path) -> Result<Self> {
        Self::new(gguf::build(vocab, path)?, path)
    }

    fn new(mut inner: tokenizers::Tokenizer, path: &Path) -> Result<Self> {
        // Some files carry the truncation of their training run, which would cut texts silently.
        inner.with_truncation(None).map_err(|e| refused(path, &e))?;
        inner.with_padding(None);
        Ok(Self { inner: Arc::new(inner), path: path.to_owned() })
    }

    /// Ids of `text`; `add_special` puts around it what the model's post-processor adds (BOS for
    /// most). Special tokens that stand in the text are recognised either way.
    ///
    /// # Errors
    /// [`IoError::Tokenizer`] with the reason.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, add_special).map_err(|e| refused(&self.path, &e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `ids`, without special tokens when `skip_special`. Ids beyond the vocabulary stand
    /// for nothing; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`IoError::Tokenizer`] with the reason.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| refused(&self.path, &e))
    }

    /// Number of tokens, special ones included; a model may have more rows than that.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A token as the vocabulary spells it ("Ġthe", "▁the"); `None` beyond the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token in the vocabulary's spelling.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether decoded text leaves `id` out: a special token, or none at all.
    pub fn is_skipped(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        self.inner.id_to_token(id).is_none_or(|token| added.is_special_token(&token))
    }

    /// Writes `tokenizer.json`.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = self.inner.to_string(true).map_err(|e| refused(&self.path, &e))?;
        crate::atomic::write_bytes(path, text.as_bytes())
    }
}

fn refused(path: &Path, error: &tokenizers::Error) -> IoError {
    IoError::Tokenizer { path: path.to_owned(), what: error.to_string() }
}

/// Decodes ids one at a time into pieces of whole characters, special tokens left out.
///
/// A token may end within a character, and how it is spelled may depend on its neighbour (the
/// space before a word). So each piece is what a window of ids decodes to beyond its first part,
/// which was decoded before: the technique of text-generation-inference. The pieces together are
/// what all ids decode to at once.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The ids of the last piece, then those whose text is still due.
    window: Vec<u32>,
    /// How many of the window belong to the last piece.
    done: usize,
}

impl StreamDecoder {
    /// A decoder at the start of a text.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), window: Vec::new(), done: 0 }
    }

    /// Takes the next id; the text that it completes, if it completes any.
    ///
    /// # Errors
    /// [`IoError::Tokenizer`] with the reason.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        if self.tokenizer.is_skipped(id) {
            return Ok(None);
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, true)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        let piece = self.beyond_done(&text)?;
        // Without text of its own the id stays due: it may still change what follows.
        if piece.is_empty() {
            return Ok(None);
        }
        self.window.drain(..self.done);
        self.done = self.window.len();
        Ok(Some(piece))
    }

    /// Ends the text: what is still due, incomplete characters as U+FFFD.
    ///
    /// # Errors
    /// [`IoError::Tokenizer`] with the reason.
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.window, true)?;
        let rest = self.beyond_done(&text)?;
        self.window.clear();
        self.done = 0;
        Ok(rest)
    }

    /// What `text`, which the window decodes to, has beyond the last piece.
    fn beyond_done(&self, text: &str) -> Result<String> {
        let known = self.tokenizer.decode(&self.window[..self.done], true)?;
        match text.strip_prefix(&known) {
            Some(rest) => Ok(rest.to_owned()),
            // A broken run of byte tokens makes all of it U+FFFD, the part that was whole too.
            None => self.tokenizer.decode(&self.window[self.done..], true),
        }
    }
}

/// What a piece of text came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopOutcome {
    /// Text that certainly stands before any stop string.
    pub emit: String,
    /// Whether a stop string ended the text.
    pub stopped: bool,
}

/// Ends a streamed text at the first of some strings, and holds back text that may be the start
/// of one. The outcome does not depend on how the text is cut into pieces: the stop string that
/// is complete first wins, of those that end together the longest.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher at the start of a text; empty strings stop nothing.
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|stop| !stop.is_empty()).cloned().collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        if self.stopped {
            return StopOutcome { emit: String::new(), stopped: true };
        }
        self.held.push_str(text);
        let keep_from = match self.first_stop() {
            Some(start) => {
                self.stopped = true;
                start
            }
            None => self.possible_start(),
        };
        let rest = self.held.split_off(keep_from);
        let emit = std::mem::replace(&mut self.held, rest);
        StopOutcome { emit, stopped: self.stopped }
    }

    /// Ends the text: what was held back, nothing after a stop string.
    pub fn finish(&mut self) -> String {
        let held = std::mem::take(&mut self.held);
        if self.stopped { String::new() } else { held }
    }

    /// Start of the stop string in `held` that ends first.
    fn first_stop(&self) -> Option<usize> {
        let span = |stop: &String| self.held.find(stop).map(|at| (at + stop.len(), at));
        self.stops.iter().filter_map(span).min().map(|(_, start)| start)
    }

    /// Where in `held` a stop string may have begun; its length when nowhere.
    fn possible_start(&self) -> usize {
        let begins = |at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*at..]));
        let mut starts = self.held.char_indices().map(|(at, _)| at);
        starts.find(begins).unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::gguf::tests::{byte_level_vocab, sentence_piece_vocab};
    use super::*;

    fn tokenizers() -> [Tokenizer; 2] {
        [byte_level_vocab("smollm"), sentence_piece_vocab()]
            .map(|vocab| Tokenizer::from_vocab(&vocab, Path::new("x.gguf")).unwrap())
    }

    /// The pieces and the rest.
    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<String>, String) {
        let mut decoder = StreamDecoder::new(tokenizer);
        let pieces = ids.iter().filter_map(|id| decoder.push(*id).unwrap()).collect();
        (pieces, decoder.finish().unwrap())
    }

    #[test]
    fn streamed_text_is_the_text() {
        for tokenizer in tokenizers() {
            for text in ["hello abc", " a  b", "é", "🦙🦙 naïve\n\n你好", "", "  ", "a\u{fffd}b"]
            {
                let ids = tokenizer.encode(text, true).unwrap();
                let (pieces, rest) = stream(&tokenizer, &ids);
                assert_eq!(pieces.concat() + &rest, text);
                assert!(pieces.iter().all(|p| !p.is_empty()));
            }
        }
    }

    #[test]
    fn incomplete_characters_are_held_back() {
        for tokenizer in tokenizers() {
            let ids = tokenizer.encode("🦙", false).unwrap();
            let (pieces, rest) = stream(&tokenizer, &ids[..ids.len() - 1]);
            assert!(pieces.concat().is_empty(), "{pieces:?}");
            assert!(rest.contains('\u{fffd}'), "{rest}");
            let x = tokenizer.encode("xy", false).unwrap();
            let (pieces, rest) = stream(&tokenizer, &[&ids[..ids.len() - 1], &x[..]].concat());
            assert!(pieces.concat().ends_with('y') && rest.is_empty(), "{pieces:?}");
        }
    }

    #[test]
    fn a_broken_run_of_bytes_leaves_what_was_whole() {
        let [_, tokenizer] = tokenizers();
        let ids: Vec<u32> = ["<0xC3>", "<0xA9>", "<0xE5>", "b", "a"]
            .iter()
            .map(|token| tokenizer.id_of(token).unwrap())
            .collect();
        let (pieces, rest) = stream(&tokenizer, &ids);
        assert_eq!((pieces.concat().as_str(), rest.as_str()), ("é\u{fffd}ba", ""));
    }

    #[test]
    fn special_tokens_and_unknown_ids_make_no_text() {
        for tokenizer in tokenizers() {
            let special = tokenizer.encode("", true).unwrap();
            let ids = tokenizer.encode("hello", false).unwrap();
            let (first, last) = ids.split_at(ids.len() - 1);
            let ids = [first, &special[..], &[1 << 20][..], last].concat();
            let (pieces, rest) = stream(&tokenizer, &ids);
            assert_eq!(pieces.concat() + &rest, "hello");
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        for tokenizer in tokenizers() {
            tokenizer.save(&path).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            // What a training run left behind must not cut texts.
            let limit = "\"truncation\": {\"direction\": \"Right\", \"max_length\": 2, \
                         \"strategy\": \"LongestFirst\", \"stride\": 0}";
            fs::write(&path, text.replacen("\"truncation\": null", limit, 1)).unwrap();
            let again = Tokenizer::from_file(&path).unwrap();
            for text in ["hello hello 12 abc cab", "<|end|></s>é", ""] {
                let ids = tokenizer.encode(text, true).unwrap();
                assert_eq!(again.encode(text, true).unwrap(), ids);
            }
            again.save(&path).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn broken_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        let message = |text: &str| {
            fs::write(&path, text).unwrap();
            Tokenizer::from_file(&path).unwrap_err().to_string()
        };
        assert!(message("{").contains("not valid JSON"));
        assert!(message("{}").contains("tokenizer of"));
        let model = r#"{"model":{"type":"BPE","vocab":{"a":0,"b":1},"merges":[["a","b"]]}}"#;
        assert!(message(model).contains("merge 0"));
        assert!(Tokenizer::from_file(folder.path()).is_err());
    }

    /// Text before the stop, by pieces of `size` characters.
    fn until_stop(stops: &[&str], text: &str, size: usize) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| s.to_string()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let chars: Vec<char> = text.chars().collect();
        let mut out = String::new();
        let mut stopped = false;
        for piece in chars.chunks(size) {
            let outcome = matcher.push(&piece.iter().collect::<String>());
            out.push_str(&outcome.emit);
            stopped = outcome.stopped;
        }
        out.push_str(&matcher.finish());
        (out, stopped)
    }

    #[test]
    fn stops_are_found_however_the_text_is_cut() {
        let cases: [(&[&str], &str, &str, bool); 11] = [
            (&["END"], "some text END more", "some text ", true),
            (&["END"], "some EN text E", "some EN text E", false),
            (&["aab"], "aaaab!", "aa", true),
            (&["abcd", "bc"], "xabcd", "xa", true),
            (&["bc", "abc"], "xabc", "x", true),
            (&["\n\nUser:", "\n\n###"], "a\n\n\n\nUser: b", "a\n\n", true),
            (&["終わり"], "これで終わ終わり。", "これで終わ", true),
            (&["é!"], "café é!", "café ", true),
            (&["🦙🦚"], "🦙🦙🦚", "🦙", true),
            (&["", "x"], "abc", "abc", false),
            (&[], "abc", "abc", false),
        ];
        for (stops, text, before, stopped) in cases {
            for size in 1..=text.chars().count() {
                let found = until_stop(stops, text, size);
                assert_eq!(found, (before.to_string(), stopped), "{stops:?} {text:?} by {size}");
            }
        }
    }

    #[test]
    fn only_what_may_be_a_stop_is_held_back() {
        let mut matcher = StopMatcher::new(&["<end>".to_string()]);
        let outcome = |emit: &str, stopped| StopOutcome { emit: emit.into(), stopped };
        assert_eq!(matcher.push("a <b"), outcome("a <b", false));
        assert_eq!(matcher.push(" <en"), outcome(" ", false));
        assert_eq!(matcher.push("try"), outcome("<entry", false));
        assert_eq!(matcher.push("<"), outcome("", false));
        assert_eq!(matcher.push("end>x"), outcome("", true));
        assert_eq!(matcher.push("more"), outcome("", true));
        assert_eq!(matcher.finish(), "");
    }
}
