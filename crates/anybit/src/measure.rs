//! `anybit eval`: models on a text, against a reference.

use std::path::{Path, PathBuf};

use anybit_eval::{Convention, EvalError, EvalOptions, ModelScores, evaluate};
use anybit_io::Checkpoint;
use anybit_runtime::Decoder;

use crate::{Result, machine};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The models.
    pub models: Vec<PathBuf>,
    /// The model to compare with.
    pub reference: Option<PathBuf>,
    /// Tokens of a window.
    pub ctx: usize,
    /// Which positions are scored.
    pub convention: Convention,
    /// Tokens to read at most.
    pub limit_tokens: Option<usize>,
}

/// Scores every model on `text`; `progress` hears windows done and in all.
///
/// # Errors
/// A model that cannot be read or run, a text too short, a reference with another vocabulary.
pub fn run(
    options: &Options,
    text: &str,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<ModelScores>> {
    let paths: Vec<&Path> =
        options.models.iter().chain(&options.reference).map(PathBuf::as_path).collect();
    let checkpoints: Vec<Checkpoint> =
        paths.iter().map(|p| Checkpoint::open(p)).collect::<anybit_io::Result<_>>()?;
    let tokens = same_tokens(&checkpoints, text)?;
    let first = &checkpoints[0];
    let bos = if first.adds_bos()? { first.config.bos_token_id } else { None };
    let windows = options.convention.windows(&tokens, options.ctx, options.limit_tokens, bos)?;
    let decoders: Vec<Decoder> = checkpoints
        .iter()
        .map(|c| Decoder::load(c, options.ctx))
        .collect::<anybit_runtime::Result<_>>()?;
    let (models, reference) = decoders.split_at(options.models.len());
    let models: Vec<&Decoder> = models.iter().collect();
    let eval_options = EvalOptions { ctx: options.ctx, convention: options.convention };
    let mut scores = evaluate(&models, reference.first(), &windows, eval_options, progress)?;
    let peak = machine::peak_rss_bytes();
    for (score, checkpoint) in scores.iter_mut().zip(&checkpoints) {
        let (codes, total) = bits_per_weight(checkpoint)?;
        score.path = checkpoint.path.clone();
        score.bits_per_weight_codes = Some(codes);
        score.bits_per_weight_total = Some(total);
        score.file_bytes = checkpoint.weight_file_bytes();
        score.peak_rss_bytes = peak;
    }
    Ok(scores)
}

/// Tokens of `text`, which every checkpoint must read alike.
fn same_tokens(checkpoints: &[Checkpoint], text: &str) -> Result<Vec<u32>> {
    let first = &checkpoints[0];
    let tokenizer = first.tokenizer()?;
    // A sample is enough to tell tokenizers apart, and all of the text would take seconds each.
    let end = text.char_indices().nth(20_000).map_or(text.len(), |(at, _)| at);
    let sample = tokenizer.encode(&text[..end], true)?;
    for other in &checkpoints[1..] {
        let same_size = other.config.vocab_size == first.config.vocab_size;
        if !same_size || other.tokenizer()?.encode(&text[..end], true)? != sample {
            return Err(EvalError::Vocabulary {
                model: first.path.display().to_string(),
                reference: other.path.display().to_string(),
            }
            .into());
        }
    }
    Ok(tokenizer.encode(text, true)?)
}

/// Bits per weight of the blocks' linears: (codes, everything stored, transforms included).
///
/// # Errors
/// A tensor that cannot be read.
pub fn bits_per_weight(checkpoint: &Checkpoint) -> Result<(f64, f64)> {
    let (mut weights, mut codes, mut total) = (0f64, 0f64, 0f64);
    for layer in 0..checkpoint.config.num_layers {
        for (linear, out, inp) in checkpoint.config.block_linears() {
            let name = format!("model.layers.{layer}.{linear}.weight");
            let n = (out * inp) as f64;
            let record = checkpoint.manifest().and_then(|m| m.quantized.get(&name));
            let (code_bits, stored_bits) = match record {
                Some(r) => (r.code_bits as f64, r.bytes as f64 * 8.0),
                None => {
                    let dtype = checkpoint.tensor(&name)?.dtype;
                    let stored = dtype.block_bytes() as f64 * 8.0 / dtype.block_len() as f64;
                    (n * dtype.code_bits() as f64, n * stored)
                }
            };
            weights += n;
            codes += code_bits;
            total += stored_bits;
        }
    }
    let sites = checkpoint.manifest().map(|m| &m.sites).into_iter().flatten();
    for (name, record) in sites {
        total += record.parts(name).iter().map(|p| p.bytes() as f64 * 8.0).sum::<f64>();
    }
    Ok((codes / weights, total / weights))
}
