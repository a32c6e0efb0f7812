//! `anybit attribute`: which cause in which block a quantized model loses by.
//!
//! Isolated is one cause in one block: its weights, the inputs of its linears, its keys and values,
//! or only the clipping of both (their grids at 8 bits, with the clips of the quantized model, so
//! that next to nothing but the clips is left). All else stays unquantized, in the basis of the
//! model's transform. Control: with nothing quantized the divergence is exactly 0. Trap: effects do
//! not add up, since errors of one block pass through the others; the sum is no prediction of the
//! whole, which is measured beside it.

use std::path::{Path, PathBuf};

use anybit_core::{RowSource, Site};
use anybit_eval::report::Attribution;
use anybit_eval::{Convention, HiddenStates, compare_hidden};
use anybit_io::Checkpoint;
use anybit_ptq::streams::{Mover, Stream};
use anybit_runtime::{Decoder, DecoderLayer};

use crate::stages::unquantized;
use crate::{Error, Result};

/// What is isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    Weights,
    Activations,
    Cache,
    Clips,
}

const CAUSES: [(Cause, &str); 4] = [
    (Cause::Weights, "weights"),
    (Cause::Activations, "activations"),
    (Cause::Cache, "cache"),
    (Cause::Clips, "clips"),
];

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The quantized model.
    pub model: PathBuf,
    /// The model that was quantized: the original, or what its transform made of it; found in the
    /// cache when absent.
    pub reference: Option<PathBuf>,
    /// Folder of the cache; `.anybit-cache` beside the model when absent.
    pub cache: Option<PathBuf>,
    /// Tokens of a window.
    pub ctx: usize,
    /// Tokens to score at most.
    pub limit_tokens: usize,
}

/// Measures every cause in every block on `text`; `progress` hears measurements done and in all.
///
/// # Errors
/// A model that cannot be read or run, a reference in another basis, a text too short.
pub fn run(
    options: &Options,
    text: &str,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Attribution> {
    let packed = Checkpoint::open(&options.model)?;
    let base = unquantized(&packed, options.reference.as_deref(), options.cache.as_deref())?;
    let tokens = packed.tokenizer()?.encode(text, true)?;
    let limit = Some(options.limit_tokens.max(options.ctx));
    let windows = Convention::Hf.windows(&tokens, options.ctx, limit, None)?;
    let bench = Bench::new(&packed, &base, windows)?;
    let layers = base.config.num_layers;
    let total = layers * CAUSES.len() + 2;
    let mut kl = vec![vec![0.0; layers]; CAUSES.len()];
    let mut done = 0;
    let mut step = || {
        done += 1;
        progress(done, total);
    };
    let control = bench.divergence(0, |layer| Ok(layer.clone()))?;
    step();
    for (row, (cause, _)) in kl.iter_mut().zip(CAUSES) {
        for (index, cell) in row.iter_mut().enumerate() {
            *cell = bench.divergence(index, |layer| isolate(&packed, index, layer, cause))?;
            step();
        }
    }
    let all = bench.whole(&packed)?;
    step();
    let tokens = bench.windows.len() * (options.ctx - 1);
    let base_model = packed.manifest().map_or(String::new(), |m| m.base_model.clone());
    let causes = CAUSES.iter().map(|(_, name)| name.to_string()).collect();
    Ok(Attribution { base_model, tokens, causes, kl, control, all })
}

/// The unquantized block with one cause of the quantized one.
fn isolate(
    packed: &Checkpoint,
    index: usize,
    base: &DecoderLayer,
    cause: Cause,
) -> Result<DecoderLayer> {
    let mut quantized = DecoderLayer::load(packed, index)?;
    if cause == Cause::Weights {
        for site in Site::ALL {
            quantized.sites.at_mut(site).quantizer = None;
            for linear in site.linears() {
                quantized.linear_mut(linear).into_iter().for_each(|l| l.without_integers());
            }
        }
        return Ok(quantized);
    }
    let mut layer = base.clone();
    for site in Site::ALL {
        let cache = matches!(site, Site::Key | Site::Value);
        let wanted = match cause {
            Cause::Activations => !cache,
            Cause::Cache => cache,
            _ => true,
        };
        let mut quantizer = quantized.sites.quantizer(site).filter(|_| wanted).cloned();
        if let Some(quantizer) = quantizer.as_mut().filter(|_| cause == Cause::Clips) {
            quantizer.segments.iter_mut().for_each(|s| s.bits = 8);
        }
        layer.sites.at_mut(site).quantizer = quantizer;
    }
    Ok(layer)
}

/// The unquantized model with the states before each of its blocks.
struct Bench {
    base: Decoder,
    windows: Vec<Vec<u32>>,
    before: Vec<Stream>,
    final_states: Vec<f32>,
}

impl Bench {
    fn new(packed: &Checkpoint, base: &Checkpoint, windows: Vec<Vec<u32>>) -> Result<Self> {
        if base.config.num_layers != packed.config.num_layers
            || base.config.hidden_size != packed.config.hidden_size
        {
            return Err(Error::Usage(format!(
                "{} has other sizes than {}: is it the model that was quantized?",
                base.path.display(),
                packed.path.display()
            )));
        }
        let ctx = windows.first().map_or(2, Vec::len);
        let decoder = Decoder::load(base, ctx)?;
        let mut stream = Stream::embed(&windows, &*decoder.embedding);
        let mut mover = Mover::new(&decoder.config, ctx);
        let mut before = Vec::new();
        for layer in &decoder.layers {
            before.push(stream.clone());
            mover.advance(layer, &mut stream);
        }
        let final_states = normed(&decoder, &stream);
        Ok(Self { base: decoder, windows, before, final_states })
    }

    /// Divergence when `change` replaces block `index`.
    fn divergence(
        &self,
        index: usize,
        change: impl Fn(&DecoderLayer) -> Result<DecoderLayer>,
    ) -> Result<f64> {
        let mut stream = self.before[index].clone();
        let mut mover = Mover::new(&self.base.config, stream.seqlen);
        mover.advance(&change(&self.base.layers[index])?, &mut stream);
        for layer in &self.base.layers[index + 1..] {
            mover.advance(layer, &mut stream);
        }
        self.compare(&normed(&self.base, &stream), &*self.base.head.weight)
    }

    /// Divergence of the quantized model as it is.
    fn whole(&self, packed: &Checkpoint) -> Result<f64> {
        let ctx = self.windows.first().map_or(2, Vec::len);
        let decoder = Decoder::load(packed, ctx)?;
        let mut stream = Stream::embed(&self.windows, &*decoder.embedding);
        let mut mover = Mover::new(&decoder.config, ctx);
        decoder.layers.iter().for_each(|layer| mover.advance(layer, &mut stream));
        self.compare(&normed(&decoder, &stream), &*decoder.head.weight)
    }

    fn compare(&self, states: &[f32], head: &dyn RowSource) -> Result<f64> {
        let reference = HiddenStates { states: &self.final_states, head: &*self.base.head.weight };
        let model = HiddenStates { states, head };
        let (_, scores) = compare_hidden(&reference, &model, &self.windows, Convention::Hf)?;
        Ok(scores.kl_mean.unwrap_or_default())
    }
}

fn normed(decoder: &Decoder, stream: &Stream) -> Vec<f32> {
    let mut out = vec![0.0; stream.data.len()];
    anybit_kernels::rms_norm(&stream.data, &decoder.norm, decoder.config.rms_norm_eps, &mut out);
    out
}

/// Whether `folder` holds a checkpoint.
pub(crate) fn is_checkpoint(folder: &Path) -> bool {
    folder.join("config.json").exists()
}
