//! FlatQuant (Sun, Liu, Bai, Bao, Zhao, Li, Hu, Yu, Hou, Yuan, Jiang, Liu, Yao, ICML 2025): an
//! invertible transform per input, learned with the quantizers in the loop, one block at a time:
//!
//! ```text
//! minimise ‖Y − Ŷ‖²   over  P, c, clips        Y the block's output, Ŷ the same with
//! X' = (X ∘ c) P      W' = (W ∘ 1/c) P⁻ᵀ       X', W', keys and values on their grids
//! P  = P₁ ⊗ P₂        P₁ = U diag(σ) Vᵀ B      P₁⁻ᵀ = U diag(1/σ) Vᵀ B
//! U  = (I − A/2)⁻¹ (I + A/2), A skew           range of a row: σ(a_max)·max … σ(a_min)·min
//! ```
//!
//! | name | acts on | where it goes |
//! |---|---|---|
//! | `P_a`, `c_a` | input of q, k, v | online; `c` into the norm |
//! | `P_h` | keys after the rotary embedding | online, `P_h⁻ᵀ` on queries |
//! | `P_v` | values of every head | into v and o |
//! | `P_o` | heads of the attention's output | online |
//! | `P_ug`, `c_ug` | input of gate and up | online; `c` into the norm |
//! | `P_d`, `c_d` | input of down | online; `c` into the rows of up |
//!
//! As in the reference the inputs of a block are those of the original model, so blocks do not
//! depend on each other. Differences, on purpose: `B` is a Hadamard (or cosine) matrix and U = V =
//! I at the start, where the reference starts half-way between the identity and a random rotation;
//! clips of activations are shared by the linears of a site; the clip of v's rows comes after `P_v`;
//! clips start lower and the learning rate is higher, which needs far fewer steps. `effort =
//! "paper"` restores the schedule, the starts and the learning rates of the paper.

mod block;
mod parameters;

use anybit_core::{ScaleFit, Site};
use anybit_grad::{
    AdamW, AdamWOptions, BlockShape, Rope, Tape, Tensor, TrainBlock, Update, block_forward_at,
};
use anybit_runtime::DecoderLayer;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use self::block::{Bits, Recorded};
use self::parameters::Parameters;
use super::scale::InputMaxima;
use super::{
    ActivationDefaults, Model, TransformMethod, TransformWriter, TransformedBlock, Transformer,
    Vocabulary,
};
use crate::methods::{Citation, options_table, read_transform_options};
use crate::plan::EMBEDDING;
use crate::streams::{Mover, Stream};
use crate::{PtqError, Recipe, Result};

/// FlatQuant.
pub struct FlatQuant;

/// How much work is put in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effort {
    /// A few dozen steps a block.
    Fast,
    /// What pays on a laptop.
    #[default]
    Default,
    /// The schedule of the paper.
    Paper,
}

/// Settings; what is absent follows from `effort`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Given {
    effort: Effort,
    steps: Option<usize>,
    samples: Option<usize>,
    seqlen: Option<usize>,
    batch: Option<usize>,
    lr: Option<f64>,
    clip_lr: Option<f64>,
    down: Option<bool>,
    diagonal: Option<bool>,
    clips: Option<bool>,
    auto: bool,
}

/// Settings of FlatQuant.
#[derive(Debug, Clone, Copy, Serialize)]
struct Options {
    /// See [`Effort`].
    effort: Effort,
    /// Steps per block.
    steps: usize,
    /// Calibration windows.
    samples: usize,
    /// Tokens of a window: calibration sequences are cut to them.
    seqlen: usize,
    /// Windows of a step.
    batch: usize,
    /// Learning rate of transforms and factors.
    lr: f64,
    /// Learning rate of clips.
    clip_lr: f64,
    /// Transform at the input of down.
    down: bool,
    /// Factors per channel.
    diagonal: bool,
    /// Learned clips.
    clips: bool,
    /// Transforms that do not lower the error at the start are left out, site by site.
    auto: bool,
}

impl Given {
    fn resolved(self) -> Options {
        let (steps, samples, seqlen, lr) = match self.effort {
            Effort::Fast => (28, 28, 256, 2e-2),
            Effort::Default => (128, 64, 256, 1.5e-2),
            Effort::Paper => (480, 128, 2048, 5e-3),
        };
        Options {
            effort: self.effort,
            steps: self.steps.unwrap_or(steps),
            samples: self.samples.unwrap_or(samples),
            seqlen: self.seqlen.unwrap_or(seqlen),
            batch: self.batch.unwrap_or(4),
            lr: self.lr.unwrap_or(lr),
            clip_lr: self.clip_lr.unwrap_or(5e-2),
            down: self.down.unwrap_or(true),
            diagonal: self.diagonal.unwrap_or(true),
            clips: self.clips.unwrap_or(true),
            auto: self.auto,
        }
    }
}

impl TransformMethod for FlatQuant {
    fn name(&self) -> &'static str {
        "flatquant"
    }

    fn summary(&self) -> &'static str {
        "learned Kronecker transforms, factors and clips, block by block"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "Y. Sun, R. Liu, H. Bai, H. Bao, K. Zhao, Y. Li, J. Hu, X. Yu, L. Hou, C. \
                        Yuan, X. Jiang, W. Liu, J. Yao. FlatQuant: Flatness Matters for LLM \
                        Quantization. ICML 2025, PMLR 267:57587-57613 (arXiv 2410.09426)",
            link: "https://proceedings.mlr.press/v267/sun25l.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String> {
        let given: Given = read_transform_options(recipe)?;
        let options = given.resolved();
        let rates = [options.lr, options.clip_lr];
        if rates.iter().any(|lr| !(*lr > 0.0 && *lr < 1.0)) {
            return Err(format!("learning rates {rates:?}: they lie between 0 and 1"));
        }
        let counts = [options.samples, options.batch, options.seqlen];
        if counts.contains(&0) || options.seqlen < 2 {
            return Err("samples, batch and seqlen must be positive, seqlen at least 2".into());
        }
        Ok(Box::new(Learned(options)))
    }
}

struct Learned(Options);

impl Transformer for Learned {
    fn options(&self) -> toml::Table {
        options_table(&self.0)
    }

    fn activations(&self) -> ActivationDefaults {
        ActivationDefaults { symmetric: true, clip: 1.0, kv_clip: 1.0, scale: ScaleFit::MinMax }
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn fitted_to(&self, recipe: &Recipe) -> String {
        let (weights, cache) = (recipe.bits.round(), recipe.kv_bits);
        let grids = (weights, recipe.group_size, recipe.symmetric, &recipe.layers, &recipe.skip);
        format!("{grids:?} {:?}", (recipe.a_bits, recipe.a_symmetric, &recipe.sites, cache))
    }

    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()> {
        let options = &self.0;
        let config = &model.checkpoint.config;
        let nothing = |index| Bits::of(model.recipe, index).nothing();
        if (0..config.num_layers).all(nothing) {
            let what = "flatquant has nothing to fit: weights, activations and cache all have 16 \
                        bits; give --bits, --a-bits or --kv-bits, or a --preset";
            return Err(PtqError::Recipe(what.into()));
        }
        let windows = windows(model.sequences, options)?;
        let embedding = model.checkpoint.weight(EMBEDDING)?;
        let mut stream = Stream::embed(&windows, &embedding);
        let mut mover = Mover::new(config, options.seqlen);
        let rope = Arc::new(Rope::new(config.rope_frequencies(), options.seqlen));
        for index in 0..config.num_layers {
            let layer = DecoderLayer::load(model.checkpoint, index)?;
            let inputs = stream.clone();
            let maxima = InputMaxima::observe(&layer, &mut stream, &mut mover);
            if index < out.finished() {
                continue;
            }
            let shape = BlockShape::new(config, index, &rope);
            let original = TrainBlock::load(model.checkpoint, index)?;
            let bits = Bits::of(model.recipe, index);
            let start = Parameters::start(config, &original, &maxima, options, &bits);
            let mut fit = BlockFit {
                options,
                bits: &bits,
                original: &original,
                shape: &shape,
                inputs: &inputs,
                targets: &stream,
                tape: Tape::default(),
            };
            let total = config.num_layers * options.steps;
            let mut progress = |step| out.progress(index * options.steps + step, total);
            let fitted = fit.run(start, &mut progress).map_err(|what| {
                PtqError::Recipe(format!(
                    "flatquant, block {index}: {what}; blocks before it are kept"
                ))
            })?;
            out.block(index, &fitted)?;
        }
        out.vocabulary(&Vocabulary::Kept)
    }
}

/// The windows that are trained on, and one batch more that is held out.
fn windows(sequences: &[Vec<u32>], options: &Options) -> Result<Vec<Vec<u32>>> {
    let available = sequences.first().map_or(0, Vec::len);
    if available < options.seqlen {
        return Err(PtqError::Recipe(format!(
            "flatquant: windows of {} tokens need --seqlen {} (it is {available})",
            options.seqlen, options.seqlen
        )));
    }
    let cut = |s: &Vec<u32>| s[..options.seqlen].to_vec();
    let mut windows: Vec<_> =
        sequences.iter().take(options.samples + options.batch).map(cut).collect();
    if windows.len() < 2 * options.batch {
        return Err(PtqError::Recipe(format!(
            "flatquant: {} calibration sequences; a batch of {} and as many held out need {}: use \
             more text or a smaller transform.batch",
            windows.len(),
            options.batch,
            2 * options.batch
        )));
    }
    let whole = windows.len() / options.batch * options.batch;
    windows.truncate(whole);
    Ok(windows)
}

/// Training of one block.
struct BlockFit<'a> {
    options: &'a Options,
    bits: &'a Bits,
    original: &'a TrainBlock,
    shape: &'a BlockShape,
    inputs: &'a Stream,
    targets: &'a Stream,
    tape: Tape,
}

impl<'a> BlockFit<'a> {
    fn run(
        &mut self,
        mut parameters: Parameters,
        progress: &mut dyn FnMut(usize),
    ) -> Result<TransformedBlock, String> {
        let batches = self.batches();
        if self.options.auto {
            self.leave_out(&mut parameters, batches - 1)?;
        }
        // The last batch is held out: what it gets worse on is not kept.
        let training = batches - 1;
        let paper = self.options.effort == Effort::Paper;
        let weight_decay = if paper { 0.01 } else { 0.0 };
        let mut optimizer = AdamW::new(AdamWOptions { weight_decay, ..Default::default() });
        let mut best = (self.loss(&parameters, batches - 1)?, parameters.clone());
        for step in 0..self.options.steps {
            self.step(&mut parameters, &mut optimizer, step, step % training)?;
            progress(step + 1);
            if step + 1 == self.options.steps || (step + 1) % 32 == 0 {
                let loss = self.loss(&parameters, batches - 1)?;
                if loss < best.0 {
                    best = (loss, parameters.clone());
                }
            }
        }
        self.transformed(&best.1)
    }

    /// Drops the transform of every site without which the held-out loss is no higher. Measured
    /// before training: a transform that does not pay as a Hadamard map costs time at every token.
    fn leave_out(&mut self, parameters: &mut Parameters, batch: usize) -> Result<(), String> {
        let mut loss = self.loss(parameters, batch)?;
        let sites: Vec<Site> = parameters.sizes.keys().copied().collect();
        // Values are folded and cost nothing.
        for site in sites.into_iter().filter(|s| *s != Site::Value) {
            let without = parameters.without(site);
            let found = self.loss(&without, batch)?;
            if found <= loss {
                (loss, *parameters) = (found, without);
            }
        }
        Ok(())
    }

    fn batches(&self) -> usize {
        self.inputs.data.len() / self.batch_len()
    }

    fn batch_len(&self) -> usize {
        self.options.batch * self.inputs.seqlen * self.inputs.hidden
    }

    /// Records the block on a batch; the loss is the mean squared error of its output.
    fn record(&mut self, parameters: &Parameters, batch: usize) -> Result<Recorded<'a>, String> {
        let range = batch * self.batch_len()..(batch + 1) * self.batch_len();
        let rows = self.options.batch * self.inputs.seqlen;
        let shape = [rows, self.inputs.hidden];
        let mut tape = std::mem::take(&mut self.tape);
        let x = tape.constant(Tensor::new(shape, self.inputs.data[range.clone()].to_vec()));
        let target = tape.constant(Tensor::new(shape, self.targets.data[range].to_vec()));
        let mut recorded =
            Recorded::new(&mut tape, parameters, self.original, self.shape, self.bits);
        let vars = recorded.quantized_weights(&mut tape);
        let mut at = |tape: &mut Tape, site, v| recorded.at(tape, site, v);
        let y = block_forward_at(&mut tape, x, &vars, self.shape, self.inputs.seqlen, &mut at).y;
        recorded.loss = tape.mse(y, target);
        let loss = tape.data(recorded.loss)[0];
        self.tape = tape;
        if !loss.is_finite() {
            return Err(format!("the loss is {loss}: lower transform.lr"));
        }
        Ok(recorded)
    }

    fn loss(&mut self, parameters: &Parameters, batch: usize) -> Result<f32, String> {
        let recorded = self.record(parameters, batch)?;
        let loss = self.tape.data(recorded.loss)[0];
        self.tape.reset();
        Ok(loss)
    }

    fn step(
        &mut self,
        parameters: &mut Parameters,
        optimizer: &mut AdamW,
        step: usize,
        batch: usize,
    ) -> Result<(), String> {
        let recorded = self.record(parameters, batch)?;
        let loss = self.tape.data(recorded.loss)[0];
        // The gradient of ln(mse): blocks of any size of output move alike.
        self.tape.backward_from(recorded.loss, &[1.0 / loss.max(f32::MIN_POSITIVE)]);
        let grads: Vec<Vec<f32>> = recorded
            .leaves
            .iter()
            .map(|(_, v)| {
                let len = self.tape.value(*v).len();
                self.tape.take_grad(*v).unwrap_or_else(|| vec![0.0; len])
            })
            .collect();
        let names: Vec<String> = recorded.leaves.into_iter().map(|(name, _)| name).collect();
        self.tape.reset();
        if let Some(at) = grads.iter().position(|g| g.iter().any(|v| !v.is_finite())) {
            return Err(format!("the gradient of {} is not finite: lower transform.lr", names[at]));
        }
        let lr = |name: &str| {
            let base = if name.contains("clip") { self.options.clip_lr } else { self.options.lr };
            cosine(base, self.options.lr * 1e-3, step, self.options.steps)
        };
        let mut updates = Vec::with_capacity(grads.len());
        for ((name, value), grad) in parameters.values.iter_mut().zip(&grads) {
            updates.push(Update { value: value.data_mut(), grad, lr: lr(name), decay: true });
        }
        optimizer.step(&mut updates, 1.0);
        parameters.check()
    }

    /// The block with everything folded that can be.
    fn transformed(&mut self, parameters: &Parameters) -> Result<TransformedBlock, String> {
        let mut recorded =
            Recorded::new(&mut self.tape, parameters, self.original, self.shape, self.bits);
        let block = recorded.materialize(&mut self.tape, parameters, self.original);
        self.tape.reset();
        block
    }
}

/// From `first` at step 0 towards `last` at `steps`, along half a cosine.
fn cosine(first: f64, last: f64, step: usize, steps: usize) -> f64 {
    let at = step as f64 / steps.max(1) as f64;
    last + (first - last) / 2.0 * (1.0 + (std::f64::consts::PI * at).cos())
}
