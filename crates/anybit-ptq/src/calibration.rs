//! Calibration: text to token sequences, the same for the same seed.

use std::path::{Path, PathBuf};

use anybit_core::rng::SplitMix64;
use anybit_io::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::recipe::CalibrationRecipe;
use crate::site::Needs;
use crate::{PtqError, Result};

/// Public-domain prose that ships with the program: technical English of the Jargon File, a novel
/// of Jane Austen, plays of Shakespeare.
const BUILTIN: &str = include_str!("../data/calibration.txt");

/// A text to calibrate on.
#[derive(Debug, Clone)]
pub struct CalibrationText {
    /// What it was asked for as, without folders.
    pub name: String,
    /// The text.
    pub text: String,
}

impl CalibrationText {
    /// Loads `spec`: `builtin`, the path of a text file or of a `.jsonl` file with `text` fields,
    /// or the name of a data set below the folder `ANYBIT_DATA`: a file of that name, or a folder
    /// whose `train*` or `valid*` file is taken (never its test file).
    ///
    /// # Errors
    /// No such file or name, text that is not UTF-8 or empty, JSON lines without `text`.
    pub fn load(spec: &str) -> Result<Self> {
        let fail = |what: String| PtqError::Calibration { name: spec.to_string(), what };
        if spec == "builtin" {
            return Ok(Self { name: spec.into(), text: BUILTIN.into() });
        }
        let path = match Path::new(spec) {
            p if p.is_file() => p.to_owned(),
            _ => named_data(spec).ok_or_else(|| {
                let data = std::env::var("ANYBIT_DATA");
                fail(match data {
                    Ok(folder) => format!("no such file, and {folder} holds no data of that name"),
                    Err(_) => "no such file; for a data set by name, point ANYBIT_DATA at the \
                               folder that holds it"
                        .into(),
                })
            })?,
        };
        let bytes = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|e| {
            fail(format!("byte {} is not UTF-8; convert it", e.utf8_error().valid_up_to()))
        })?;
        let text = match path.extension().is_some_and(|e| e == "jsonl") {
            true => jsonl_text(&text).map_err(fail)?,
            false => text,
        };
        if text.trim().is_empty() {
            return Err(fail("it is empty".into()));
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, text })
    }
}

fn named_data(name: &str) -> Option<PathBuf> {
    let root = PathBuf::from(std::env::var_os("ANYBIT_DATA")?);
    let direct = ["", ".txt", ".raw", ".jsonl"].map(|e| root.join(format!("{name}{e}")));
    if let Some(file) = direct.into_iter().find(|p| p.is_file()) {
        return Some(file);
    }
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(root.join(name)).ok()?.flatten().map(|e| e.path()).collect();
    files.sort();
    let starts = |p: &Path, prefix: &str| {
        p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix))
    };
    ["train", "valid"]
        .into_iter()
        .find_map(|prefix| files.iter().find(|p| p.is_file() && starts(p, prefix)).cloned())
}

fn jsonl_text(text: &str) -> std::result::Result<String, String> {
    let mut out = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let value: Value =
            serde_json::from_str(line).map_err(|e| format!("line {}: {e}", i + 1))?;
        let text = value["text"].as_str();
        out.push(text.ok_or_else(|| format!("line {} has no \"text\"", i + 1))?.to_string());
    }
    Ok(out.join("\n\n"))
}

/// Token sequences of equal length.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// The sequences.
    pub sequences: Vec<Vec<u32>>,
    /// Names, hashes and counts, for the manifest.
    pub description: Value,
}

impl Calibration {
    /// No sequences, for methods that need no data.
    pub fn none() -> Self {
        Self { sequences: Vec::new(), description: Value::Null }
    }

    /// Cuts the recipe's texts into disjoint sequences and draws as many as it asks for.
    ///
    /// # Errors
    /// A text that cannot be read, or too few tokens for one sequence.
    pub fn sample(recipe: &CalibrationRecipe, seed: u64, tokenizer: &Tokenizer) -> Result<Self> {
        let mut windows = Vec::new();
        let mut sources = Vec::new();
        for spec in &recipe.data {
            let source = CalibrationText::load(spec)?;
            let tokens = tokenizer.encode(&source.text, true)?;
            let hash = blake3::hash(source.text.as_bytes()).to_hex().to_string();
            sources.push(json!({"name": source.name, "blake3": hash, "tokens": tokens.len()}));
            windows.extend(tokens.chunks_exact(recipe.seqlen).map(<[u32]>::to_vec));
        }
        if windows.is_empty() {
            return Err(PtqError::Calibration {
                name: recipe.data.join(", "),
                what: format!(
                    "fewer tokens than one sequence of {}; use more text or a smaller --seqlen",
                    recipe.seqlen
                ),
            });
        }
        let wanted = recipe.tokens.div_ceil(recipe.seqlen).min(windows.len());
        let mut rng = SplitMix64::new(seed);
        // Partial Fisher–Yates: the first `wanted` places are a uniform draw.
        for i in 0..wanted {
            let j = i + rng.below(windows.len() - i);
            windows.swap(i, j);
        }
        windows.truncate(wanted);
        let description = json!({
            "sources": sources,
            "sequences": wanted,
            "seqlen": recipe.seqlen,
            "tokens": wanted * recipe.seqlen,
            "tokens_asked_for": recipe.tokens,
            "seed": seed,
        });
        Ok(Self { sequences: windows, description })
    }

    /// Tokens of a sequence; 1 when there are none.
    pub fn seqlen(&self) -> usize {
        self.sequences.first().map_or(1, Vec::len)
    }

    /// The first sequences, as many as `tokens` need: those that gradients are taken on.
    pub fn gradient_sequences(&self, tokens: usize) -> &[Vec<u32>] {
        let count = tokens.div_ceil(self.seqlen()).clamp(1, self.sequences.len().max(1));
        &self.sequences[..count.min(self.sequences.len())]
    }

    /// The sequences that are worth observing: all, or those that gradients were taken on where
    /// inputs count by them alone.
    pub fn observed(&self, needs: Needs, gradient_tokens: usize) -> &[Vec<u32>] {
        match (needs.gram || needs.magnitudes, needs.guided.is_some()) {
            (true, _) => &self.sequences,
            (false, true) => self.gradient_sequences(gradient_tokens),
            (false, false) => &[],
        }
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }
}
