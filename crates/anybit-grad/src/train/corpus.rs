//! [`Corpus`]: the tokenized texts of a run, and which sequences a step takes. A sequence is
//! `context + 1` tokens: inputs are all but the last, targets all but the first. Called by the
//! trainer.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anybit_io::IoError;
use anybit_io::tokenizer::{BpeOptions, Tokenizer, train_bpe};

use super::data::{DataError, Documents, Order, TokenFile};
use super::recipe::{DataRecipe, TokenizerRecipe};
use super::trainer::Sequences;
use super::{Result, TrainError};

/// Called with bytes read and bytes in all while texts are tokenized.
pub type Tokenizing<'a> = &'a mut dyn FnMut(u64, u64);

/// Tokenized texts.
#[derive(Debug)]
pub struct Corpus {
    train: TokenFile,
    order: Order,
    validation: Option<TokenFile>,
    /// Windows to train on, where some of the same file are held out.
    own: Vec<u32>,
    /// Windows to validate on, of the validation file or of the training file.
    held_out: Vec<u32>,
    context: usize,
    vocab: usize,
}

/// The tokenizer of a run: its files in `folder`, written there first unless they are.
///
/// # Errors
/// A tokenizer or text that cannot be read, a vocabulary that cannot be trained.
pub fn tokenizer(recipe: &DataRecipe, init: Option<&Path>, folder: &Path) -> Result<Tokenizer> {
    let file = folder.join("tokenizer.json");
    if file.exists() {
        return Ok(Tokenizer::from_file(&file)?);
    }
    std::fs::create_dir_all(folder).map_err(|e| IoError::file("create", folder, e))?;
    match &recipe.tokenizer {
        Some(TokenizerRecipe::Bpe(bpe)) => {
            let mut documents = Documents::open(&recipe.train, &recipe.text_key)?;
            let mut failed = None;
            // The trainer knows no errors of ours: the first one ends the texts and is kept.
            let mut texts = std::iter::from_fn(|| match documents.next()? {
                Ok(piece) => Some(piece.text),
                Err(error) => {
                    failed = Some(error);
                    None
                }
            });
            let mut options = BpeOptions::new(bpe.vocab_size);
            options.min_frequency = bpe.min_frequency;
            let trained = train_bpe(&mut texts, &options);
            if let Some(error) = failed {
                return Err(error.into());
            }
            trained?.save(folder)?;
        }
        Some(TokenizerRecipe::Path(path)) => copy_tokenizer(path, folder)?,
        None => match init {
            Some(path) => copy_tokenizer(path, folder)?,
            None => return Err(TrainError::recipe("data.tokenizer", "is missing")),
        },
    }
    Ok(Tokenizer::from_file(&file)?)
}

/// Copies the tokenizer of a checkpoint, a folder, or a file into `folder`.
fn copy_tokenizer(path: &Path, folder: &Path) -> Result<()> {
    if path.extension().is_some_and(|e| e == "gguf") {
        let tokenizer = Tokenizer::from_gguf_file(path)?;
        return Ok(tokenizer.save(&folder.join("tokenizer.json"))?);
    }
    let names: [PathBuf; 2] = match path.is_dir() {
        true => [path.join("tokenizer.json"), path.join("tokenizer_config.json")],
        false => [path.to_owned(), path.with_file_name("tokenizer_config.json")],
    };
    for (from, name) in names.iter().zip(["tokenizer.json", "tokenizer_config.json"]) {
        match std::fs::read(from) {
            Ok(bytes) => anybit_io::atomic::write_bytes(&folder.join(name), &bytes)?,
            Err(_) if name == "tokenizer_config.json" => {}
            Err(e) => return Err(IoError::file("read", from, e).into()),
        }
    }
    Ok(())
}

impl Corpus {
    /// Tokenizes the texts of `recipe` into `folder`, or takes what is there from before.
    ///
    /// # Errors
    /// Texts that cannot be read or are too short.
    pub fn prepare(
        recipe: &DataRecipe,
        tokenizer: &Tokenizer,
        bos: Option<u32>,
        seed: u64,
        folder: &Path,
        progress: Tokenizing<'_>,
    ) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|e| IoError::file("create", folder, e))?;
        let mut file = |name: &str, files: &[PathBuf]| {
            let path = folder.join(name);
            TokenFile::prepare(&path, files, &recipe.text_key, tokenizer, bos, progress)
        };
        let train = file("train.tokens", &recipe.train)?;
        let validation = match recipe.validation.is_empty() {
            true => None,
            false => Some(file("validation.tokens", &recipe.validation)?),
        };
        let windows = |tokens: &TokenFile| match tokens.windows(recipe.context) {
            0 => Err(DataError::too_short(tokens.len(), recipe.context)),
            n => Ok(n),
        };
        let all = windows(&train)? as u32;
        let (own, held_out) = match &validation {
            Some(tokens) => ((0..all).collect(), (0..windows(tokens)? as u32).collect()),
            None => split(all, recipe.validation_share),
        };
        let (order, context) = (Order::new(own.len(), seed), recipe.context);
        let vocab = tokenizer.vocab_size();
        Ok(Self { train, order, validation, own, held_out, context, vocab })
    }

    /// Sequences to train on.
    pub fn windows(&self) -> usize {
        self.order.windows()
    }

    /// Sequences to validate on.
    pub fn validation_windows(&self) -> usize {
        self.held_out.len()
    }

    /// Tokens that the tokenizer has.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// Hash of all texts as they are used, to compare ranks.
    pub fn key(&self) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(self.train.key().as_bytes());
        hash.update(self.validation.as_ref().map_or("", |v| v.key()).as_bytes());
        *hash.finalize().as_bytes()
    }

    /// Which training sequence comes at which position.
    pub fn order(&self) -> Order {
        self.order.clone()
    }

    /// Inputs of training sequences by their numbers, which are below [`Self::windows`].
    pub fn inputs(&self, sequences: &[u32]) -> Vec<u32> {
        let window = |sequence: &u32| self.own[*sequence as usize] as usize;
        let windows: Vec<usize> = sequences.iter().map(window).collect();
        pairs(&self.train, &windows, self.context).0
    }

    /// Hash of [`Self::inputs`], without reading them.
    pub fn inputs_key(&self, sequences: &[u32]) -> [u8; 32] {
        let mut hash = blake3::Hasher::new();
        hash.update(self.train.hash().as_bytes());
        hash.update(&(self.context as u64).to_le_bytes());
        for sequence in sequences {
            hash.update(&self.own[*sequence as usize].to_le_bytes());
        }
        *hash.finalize().as_bytes()
    }

    /// Inputs and targets of validation sequences.
    pub fn validation(&self, windows: &[usize]) -> (Vec<u32>, Vec<u32>) {
        let windows: Vec<usize> = windows.iter().map(|w| self.held_out[*w] as usize).collect();
        pairs(self.validation.as_ref().unwrap_or(&self.train), &windows, self.context)
    }
}

impl Sequences for Corpus {
    fn batch(&mut self, positions: Range<u64>) -> (Vec<u32>, Vec<u32>) {
        let windows: Vec<usize> =
            positions.map(|position| self.own[self.order.at(position)] as usize).collect();
        pairs(&self.train, &windows, self.context)
    }
}

/// Divides `all` windows into those to train on and `share` of them to validate on, which lie evenly
/// among the others: the end of the texts alone may be unlike the rest.
fn split(all: u32, share: f64) -> (Vec<u32>, Vec<u32>) {
    let held = ((f64::from(all) * share).ceil() as u32).min(all - 1);
    // Window i is held out where i · held/all passes a whole number.
    let passes = |i: u32| {
        let at = |i: u32| u64::from(i) * u64::from(held) / u64::from(all);
        at(i + 1) > at(i)
    };
    (0..all).partition(|i| !passes(*i))
}

fn pairs(tokens: &TokenFile, windows: &[usize], context: usize) -> (Vec<u32>, Vec<u32>) {
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    let mut window = Vec::new();
    for index in windows {
        window.clear();
        tokens.window(*index, context, &mut window);
        inputs.extend_from_slice(&window[..context]);
        targets.extend_from_slice(&window[1..]);
    }
    (inputs, targets)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn held_out_windows_lie_evenly() {
        let (own, held) = split(100, 0.04);
        assert_eq!(held, [24, 49, 74, 99]);
        assert_eq!(own.len(), 96);
        assert_eq!(split(7, 0.0), ((0..7).collect(), Vec::new()));
        assert_eq!(split(1, 0.5), (vec![0], Vec::new()));
    }
}
