//! [`Trainer`]: one optimizer step after another.
//!
//! ```text
//! for every micro-batch    loss, dŴ
//! all ranks                mean of the gradients
//! ‖g‖ > clip               g = g · clip/‖g‖
//! AdamW                    W = W − lr·…
//! ```
//!
//! Which sequences a step takes follows from its number, the seed and the rank. A step that finds a
//! value that is no number changes nothing and says where it was. Called by [`super::run`].

use std::collections::BTreeMap;
use std::ops::Range;

use super::corpus::Corpus;
use super::data::slice;
use super::distributed::{Communicator, sum_f64, sum_gradients};
use super::quantized::{LeafGradients, WeightVars};
use super::{QuantizedDecoder, Result, TrainSettings};
use crate::{
    AdamW, DecoderOutput, DecoderVars, OneCycle, Tape, Update, Var, clip_factor, global_norm,
};

/// The sequences that are at hand together.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// Their positions in training.
    pub positions: Range<u64>,
    /// Their tokens, one sequence after another.
    pub inputs: &'a [u32],
    /// The token after each.
    pub targets: &'a [u32],
}

/// What a micro-batch minimizes: `(tape, output, parameters, batch)` to a scalar.
pub type Objective<'a> =
    &'a mut dyn FnMut(&mut Tape, &DecoderOutput, &DecoderVars, &Batch<'_>) -> Result<Var>;

/// Where a step's sequences come from.
pub trait Sequences {
    /// Inputs and targets of the sequences at these positions of training, one after another.
    fn batch(&mut self, positions: Range<u64>) -> (Vec<u32>, Vec<u32>);
}

/// The mean cross-entropy of the next token.
pub fn cross_entropy(
    tape: &mut Tape,
    output: &DecoderOutput,
    vars: &DecoderVars,
    batch: &Batch<'_>,
) -> Result<Var> {
    Ok(tape.linear_cross_entropy(output.hidden, vars.head, batch.targets))
}

/// A model in training.
pub struct Trainer {
    /// The model.
    pub student: QuantizedDecoder,
    /// The optimizer.
    pub adam: AdamW,
    /// Steps taken.
    pub step: u64,
    schedule: OneCycle,
    settings: TrainSettings,
    context: usize,
    weights_tape: Tape,
    tape: Tape,
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Loss over the batch before the step, in nats per token.
    pub loss: f64,
    /// Norm of the gradients before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
}

/// Values that are no numbers: what and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotFinite {
    /// What was found.
    pub what: String,
    /// The layer or parameter.
    pub place: String,
}

fn finite(values: &[f32]) -> bool {
    values.iter().all(|v| v.is_finite())
}

impl Trainer {
    /// A model that has taken no step yet, to take `steps`.
    pub fn new(
        student: QuantizedDecoder,
        settings: &TrainSettings,
        steps: u64,
        context: usize,
    ) -> Self {
        Self {
            student,
            adam: AdamW::new(settings.adamw()),
            step: 0,
            schedule: settings.schedule(steps),
            settings: settings.clone(),
            context,
            weights_tape: Tape::default(),
            tape: Tape::default(),
        }
    }

    /// Takes one step on this rank's part of the batch. Fails, with nothing changed, when a value
    /// is no number; the outer error is what the system or the other ranks refuse.
    ///
    /// # Errors
    /// Tokens outside the vocabulary; ranks that lost each other.
    pub fn step(
        &mut self,
        sequences: &mut dyn Sequences,
        comm: &mut dyn Communicator,
        objective: Objective<'_>,
    ) -> Result<std::result::Result<StepReport, NotFinite>> {
        let positions = slice(self.step, self.settings.batch, comm.rank(), comm.size())?;
        let found = self.leaf_gradients(sequences, positions, objective)?;
        let (loss, mut sum, weights) = match found {
            Ok((loss, sum, weights)) => (loss, sum, Ok(weights)),
            // The other ranks must hear of it too: their sums become NaN.
            Err(failed) => (f64::NAN, self.student.no_gradients(f32::NAN), Err(failed)),
        };
        let loss = reduce(loss, &mut sum, comm)?;
        let weights = match weights {
            Ok(weights) => weights,
            Err(failed) => {
                self.weights_tape.reset();
                return Ok(Err(failed));
            }
        };
        let grads = self.student.finish(&weights, &mut self.weights_tape, sum);
        self.weights_tape.reset();
        let ranks = comm.size() as f64;
        let grad_norm = global_norm(grads.iter().map(|g| &g[..])) / ranks;
        if !grad_norm.is_finite() || !loss.is_finite() {
            return Ok(Err(self.not_finite_gradient(&grads)));
        }
        let factor = clip_factor(grad_norm, self.settings.clip) / ranks as f32;
        let lr = self.schedule.lr(self.step as usize);
        let mut parameters = self.student.parameters();
        let mut updates: Vec<Update<'_>> = parameters
            .iter_mut()
            .zip(&grads)
            .map(|((_, tensor, decay), grad)| Update {
                value: tensor.data_mut(),
                grad,
                lr,
                decay: *decay,
            })
            .collect();
        self.adam.step(&mut updates, factor);
        self.step += 1;
        grads.into_iter().for_each(|g| self.weights_tape.recycle(g));
        Ok(Ok(StepReport { loss, grad_norm, lr }))
    }

    /// Mean loss over the sequences at `positions`, and its gradients with respect to the operands.
    fn leaf_gradients(
        &mut self,
        sequences: &mut dyn Sequences,
        positions: Range<u64>,
        objective: Objective<'_>,
    ) -> Result<std::result::Result<(f64, LeafGradients, WeightVars), NotFinite>> {
        let Self { student, weights_tape, tape, context, .. } = self;
        let weights = student.weights(weights_tape, true);
        let count = positions.end - positions.start;
        let micro = self.settings.micro_batch.map_or(count, |m| m as u64).clamp(1, count.max(1));
        let (mut sum, mut total) = (LeafGradients::default(), 0.0);
        let mut start = positions.start;
        while start < positions.end {
            let end = (start + micro).min(positions.end);
            let (inputs, targets) = sequences.batch(start..end);
            let leaves = student.leaves(&weights, weights_tape, tape, true);
            let output = student.forward(tape, &leaves, &inputs, *context)?;
            let batch = Batch { positions: start..end, inputs: &inputs, targets: &targets };
            let loss = objective(tape, &output, &leaves.vars, &batch)?;
            let value = tape.data(loss)[0];
            if !value.is_finite() {
                let found = not_finite_forward(tape, &output, value);
                tape.reset();
                return Ok(Err(found));
            }
            let share = (end - start) as f64 / count as f64;
            total += value as f64 * share;
            tape.backward_from(loss, &[share as f32]);
            student.collect(tape, &leaves, &mut sum);
            tape.reset();
            start = end;
        }
        Ok(Ok((total, sum, weights)))
    }

    /// The uppermost parameter whose gradient is no number: gradients flow downwards from there.
    fn not_finite_gradient(&mut self, grads: &[Vec<f32>]) -> NotFinite {
        let names: Vec<String> = self.student.parameters().into_iter().map(|p| p.0).collect();
        let layer = |name: &str| {
            let rest = name.strip_prefix("model.layers.")?;
            rest.split('.').next()?.parse::<usize>().ok()
        };
        let bad = names.iter().zip(grads).filter(|(_, g)| !finite(g)).map(|(name, _)| name);
        let place = bad.max_by_key(|name| layer(name)).cloned();
        NotFinite {
            what: "a gradient is no number".into(),
            place: place.unwrap_or_else(|| "another rank".into()),
        }
    }

    /// Mean loss of the validation sequences in `windows`, over all ranks, in nats per token.
    ///
    /// # Errors
    /// Tokens outside the vocabulary; ranks that lost each other.
    pub fn validate(
        &mut self,
        corpus: &Corpus,
        windows: Range<usize>,
        comm: &mut dyn Communicator,
    ) -> Result<f64> {
        let Self { student, weights_tape, tape, context, .. } = self;
        let weights = student.weights(weights_tape, false);
        let (rank, ranks) = (comm.rank(), comm.size());
        let own = |i: usize| windows.start + (windows.len() * i) / ranks;
        let (mut sum, mut count) = (0.0, 0.0);
        let windows: Vec<usize> = (own(rank)..own(rank + 1)).collect();
        for part in windows.chunks(self.settings.micro_batch.unwrap_or(8)) {
            let (inputs, targets) = corpus.validation(part);
            let leaves = student.leaves(&weights, weights_tape, tape, false);
            let output = student.forward(tape, &leaves, &inputs, *context)?;
            let loss = tape.linear_cross_entropy(output.hidden, leaves.vars.head, &targets);
            sum += tape.data(loss)[0] as f64 * part.len() as f64;
            count += part.len() as f64;
            tape.reset();
        }
        weights_tape.reset();
        let mut sums = [sum, count];
        sum_f64(comm, &mut sums)?;
        Ok(sums[0] / sums[1])
    }

    /// [`QuantizedDecoder::trusted_shares`] on one validation sequence.
    ///
    /// # Errors
    /// As there.
    pub fn trusted_shares(&self, corpus: &Corpus) -> Result<BTreeMap<String, f64>> {
        if self.student.recipe.is_none() || corpus.validation_windows() == 0 {
            return Ok(BTreeMap::new());
        }
        let (inputs, _) = corpus.validation(&[0]);
        self.student.trusted_shares(&inputs, self.context)
    }
}

/// Sums the gradients over the ranks; returns the mean of the losses. Operands' gradients are
/// summed, not parameters', so that ranks compute what micro-batches of one process do.
fn reduce(loss: f64, sum: &mut LeafGradients, comm: &mut dyn Communicator) -> Result<f64> {
    if comm.size() == 1 {
        return Ok(loss);
    }
    for grads in sum.parts_mut() {
        sum_gradients(comm, grads)?;
    }
    let mut loss = [loss];
    sum_f64(comm, &mut loss)?;
    Ok(loss[0] / comm.size() as f64)
}

/// The first layer whose output is no number.
fn not_finite_forward(tape: &Tape, output: &DecoderOutput, loss: f32) -> NotFinite {
    let layer = output.blocks.iter().position(|block| !finite(tape.data(block.y)));
    NotFinite {
        what: format!("the loss is {loss}"),
        place: layer.map_or("the head".into(), |layer| format!("the output of layer {layer}")),
    }
}
