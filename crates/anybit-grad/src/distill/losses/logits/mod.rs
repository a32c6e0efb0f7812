//! Divergences of logits `z = x Wᵀ` as operations of the tape, of logits or of hidden states
//! through a head.
//!
//! ```text
//! L = Σ_t c_t T² D(p_t, q_t),  q = softmax(z / T)       ∂L/∂z_t = c_t T ∂D/∂(z_t / T)
//! k likeliest tokens and the rest R:  ∂D/∂z_j = G_j for the likeliest,  G_R q_j / q_R for the rest
//! ```
//!
//! `c_t` is `1/n` over the `n` tokens with a target, 0 for the others; `token_scaled` has its own.
//! The gradient needs nothing that comes later, so the forward pass makes it while the logits are at
//! hand, as [`crate::Tape::linear_cross_entropy`] does. [`crate::Tape::linear_distill_joint`] makes
//! the task's too from the same logits, and what balancers want to know about both.

use std::ops::Range;

use rayon::prelude::*;

use super::divergence::{Kernel, log_softmax, log_sum_exp};
use super::teacher::Facts;
use super::{DistillLoss, Gamma, JsdForm, Teacher, TopK};
use crate::distill::error::{DistillError, Result};
use crate::ops::IGNORE;
use crate::tiles::{Operand, product};
use crate::{Tape, Tensor, Var};

/// Logits of a tile when the head is fused in (64 MiB).
const LOGITS: usize = 1 << 24;

/// A loss and what it compares the student with.
#[derive(Debug, Clone, Copy)]
pub struct Distillation<'a> {
    /// The loss, one that compares logits.
    pub loss: &'a DistillLoss,
    /// The teacher's outputs for the same tokens.
    pub teacher: Teacher<'a>,
    /// For each token the one that follows; tokens with [`crate::IGNORE`] do not count.
    pub targets: &'a [u32],
    /// Tokens of a sequence; read by `token_scaled` alone.
    pub seqlen: usize,
}

/// Both losses of the same logits.
#[derive(Debug, Clone, Copy)]
pub struct Joint {
    /// Mean cross-entropy, a scalar.
    pub task: Var,
    /// The divergence from the teacher, a scalar.
    pub teacher: Var,
    /// Norms of the gradients of both with respect to all logits, in that order.
    pub norms: [f64; 2],
    /// Cosine between these gradients; 0 when one of them is 0.
    pub cosine: f64,
}

/// What is done for every token.
struct Plan<'a> {
    teacher: Teacher<'a>,
    temperature: f64,
    /// `c_t`.
    coefficients: Vec<f64>,
    kernel: Kernel,
    /// `γ_t`, when tokens differ in it.
    gammas: Option<Vec<f64>>,
    vocab: usize,
}

/// `1/n` for tokens with a target.
fn means(targets: &[u32]) -> Vec<f64> {
    let count = targets.iter().filter(|t| **t != IGNORE).count().max(1) as f64;
    targets.iter().map(|t| if *t == IGNORE { 0.0 } else { 1.0 / count }).collect()
}

/// TSLD's weights: softmax of `CE_t / scale` within each sequence, and the mean over sequences that
/// have a token with a target.
fn token_scales(facts: &[Option<Facts>], seqlen: usize, scale: f64) -> Vec<f64> {
    let mut weights: Vec<f64> = Vec::with_capacity(facts.len());
    let mut sequences = 0usize;
    for sequence in facts.chunks(seqlen) {
        let hardness = sequence.iter().map(|f| f.map(|f| -f.label / scale));
        let max = hardness.clone().flatten().fold(f64::NEG_INFINITY, f64::max);
        let all: Vec<f64> = hardness.map(|h| h.map_or(0.0, |h| (h - max).exp())).collect();
        let sum: f64 = all.iter().sum();
        sequences += usize::from(sum > 0.0);
        weights.extend(all.iter().map(|w| if sum > 0.0 { w / sum } else { 0.0 }));
    }
    weights.iter_mut().for_each(|w| *w /= sequences.max(1) as f64);
    weights
}

/// Fails unless there is one target per token, within the vocabulary.
fn check_targets(place: &'static str, targets: &[u32], tokens: usize, vocab: usize) -> Result<()> {
    if targets.len() != tokens {
        let (what, other) = ("the list of targets".into(), "the student");
        let (found, expected) = (targets.len(), tokens);
        return Err(DistillError::Rows { what, found, other, expected });
    }
    match targets.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
        None => Ok(()),
        Some(target) => {
            let what = format!("the target {target} is outside a vocabulary of {vocab} tokens");
            Err(DistillError::input(place, what))
        }
    }
}

impl<'a> Plan<'a> {
    /// Checks everything and asks the teacher what the loss needs to know before it starts.
    fn new(distillation: &Distillation<'a>, tokens: usize, vocab: usize) -> Result<Self> {
        let Distillation { loss, teacher, targets, seqlen } = *distillation;
        loss.check_on_logits()?;
        check_targets(loss.name(), targets, tokens, vocab)?;
        teacher.check(tokens, vocab, loss.temperature())?;
        let (mut coefficients, mut gammas) = (means(targets), None);
        let kl = |forward: f64| Kernel::Kl { forward, reverse: 1.0 - forward };
        let kernel = match *loss {
            DistillLoss::ReverseKl { .. } => kl(0.0),
            DistillLoss::Jsd { beta, form, .. } => {
                let student = if form == JsdForm::Paper { 1.0 - beta } else { beta };
                Kernel::Jsd { teacher: 1.0 - student, student, beta }
            }
            DistillLoss::Cakld { gamma: Gamma::Const(gamma) } => kl(1.0 - gamma),
            DistillLoss::Cakld { gamma: Gamma::MaxProb } => {
                kl(1.0 - teacher.mean_confidence(targets, vocab)?.0)
            }
            DistillLoss::Cakld { gamma: Gamma::LabelProb } => {
                let facts = teacher.facts(targets, vocab);
                let gamma = |f: &Option<Facts>| f.map_or(0.0, |f| f.label.exp().min(1.0));
                gammas = Some(facts.iter().map(gamma).collect());
                kl(1.0)
            }
            DistillLoss::TokenScaled { scale } => {
                if seqlen == 0 || !tokens.is_multiple_of(seqlen) {
                    let what = format!("{tokens} tokens are not whole sequences of {seqlen}");
                    return Err(DistillError::input("token_scaled", what));
                }
                coefficients = token_scales(&teacher.facts(targets, vocab), seqlen, scale);
                kl(1.0)
            }
            DistillLoss::ForwardKl { .. }
            | DistillLoss::FeatureMse { .. }
            | DistillLoss::AttentionTransfer {} => kl(1.0),
        };
        let temperature = loss.temperature();
        Ok(Self { teacher, temperature, coefficients, kernel, gammas, vocab })
    }

    /// The kernel of a token.
    fn kernel(&self, token: usize) -> Kernel {
        match &self.gammas {
            Some(gammas) => Kernel::Kl { forward: 1.0 - gammas[token], reverse: gammas[token] },
            None => self.kernel,
        }
    }

    /// Turns the student's logits of one token into their gradient and returns the token's share of
    /// the loss. `compare` turns log-probabilities of the student into the divergence and its
    /// gradient.
    fn token(
        &self,
        token: usize,
        student: &mut [f32],
        compare: impl FnOnce(Kernel, &mut [f32]) -> f64,
    ) -> f64 {
        let coefficient = self.coefficients[token];
        if coefficient == 0.0 {
            student.fill(0.0);
            return 0.0;
        }
        log_softmax(student, self.temperature);
        let value = compare(self.kernel(token), student);
        let factor = (coefficient * self.temperature) as f32;
        student.iter_mut().for_each(|g| *g *= factor);
        coefficient * self.temperature * self.temperature * value
    }

    /// [`Self::token`] of a tile of tokens. `teacher` is room for the teacher's logits, of no size
    /// when it has none. Shares are added in order.
    fn tile(&self, tokens: Range<usize>, student: &mut [f32], teacher: &mut [f32]) -> f64 {
        let rows = student.par_chunks_exact_mut(self.vocab).zip(tokens.clone());
        let each: Vec<f64> = match self.teacher {
            Teacher::TopK(top) => rows
                .map(|(student, token)| {
                    self.token(token, student, |kernel, lq| against_top_k(kernel, top, token, lq))
                })
                .collect(),
            Teacher::Logits(_) | Teacher::Hidden { .. } => {
                self.teacher.logits(tokens, teacher);
                rows.zip(teacher.par_chunks_exact_mut(self.vocab))
                    .map(|((student, token), teacher)| {
                        self.token(token, student, |kernel, lq| {
                            log_softmax(teacher, self.temperature);
                            kernel.apply(teacher, lq)
                        })
                    })
                    .collect()
            }
        };
        each.iter().sum()
    }

    /// Values that the teacher's logits of `tokens` take.
    fn room(&self, tokens: usize) -> usize {
        if self.teacher.is_full() { tokens * self.vocab } else { 0 }
    }
}

/// The divergence over the likeliest tokens and the rest; without a rest when all are likeliest.
fn against_top_k(kernel: Kernel, top: &TopK, token: usize, lq: &mut [f32]) -> f64 {
    let (ids, log_probs) = top.row(token);
    let mut lp = log_probs.to_vec();
    let mut outcomes: Vec<f32> = ids.iter().map(|id| lq[*id as usize]).collect();
    // Out of the way of the sum over the others.
    ids.iter().for_each(|id| lq[*id as usize] = f32::NEG_INFINITY);
    let rest = log_sum_exp(lq.iter().copied());
    let has_rest = ids.len() < lq.len();
    if has_rest {
        lp.push(top.tail[token]);
        outcomes.push(rest);
    }
    let value = kernel.apply(&mut lp, &mut outcomes);
    let of_rest = if has_rest { outcomes[ids.len()] } else { 0.0 };
    lq.iter_mut().for_each(|lq| *lq = of_rest * anybit_kernels::activation::exp(*lq - rest));
    ids.iter().zip(&outcomes).for_each(|(id, g)| lq[*id as usize] = *g);
    value
}

/// Turns logits into the gradient of the mean cross-entropy and returns that.
fn task_tile(logits: &mut [f32], vocab: usize, targets: &[u32], factor: f64) -> f64 {
    let token = |(logits, target): (&mut [f32], &u32)| {
        if *target == IGNORE {
            logits.fill(0.0);
            return 0.0;
        }
        log_softmax(logits, 1.0);
        let log = logits[*target as usize] as f64;
        logits.iter_mut().for_each(|l| *l = factor as f32 * anybit_kernels::activation::exp(*l));
        logits[*target as usize] -= factor as f32;
        -factor * log
    };
    let rows = logits.par_chunks_exact_mut(vocab).zip(targets);
    let each: Vec<f64> = rows.map(token).collect();
    each.iter().sum()
}

/// The student's hidden states and head.
struct Head<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    hidden: usize,
    vocab: usize,
}

/// Gradients with respect to hidden states and head, where they are wanted.
struct Grads {
    dx: Option<Vec<f32>>,
    dw: Option<Vec<f32>>,
}

impl Head<'_> {
    /// The rows of `tokens` in something with `hidden` values per token.
    fn part(&self, tokens: &Range<usize>) -> Range<usize> {
        tokens.start * self.hidden..tokens.end * self.hidden
    }

    /// `z = x Wᵀ` of some tokens.
    fn logits(&self, tokens: &Range<usize>, dst: &mut [f32]) {
        let x = Operand::new(&self.x[self.part(tokens)], tokens.len(), self.hidden);
        product(dst, false, x, Operand::new(self.weight, self.vocab, self.hidden).t());
    }

    /// `dx = dz W`, `dW += dzᵀ x` of some tokens.
    fn pass_on(&self, tokens: &Range<usize>, dz: &[f32], grads: &mut Grads) {
        let part = self.part(tokens);
        let dz = Operand::new(dz, tokens.len(), self.vocab);
        if let Some(dx) = &mut grads.dx {
            let weight = Operand::new(self.weight, self.vocab, self.hidden);
            product(&mut dx[part.clone()], false, dz, weight);
        }
        if let Some(dw) = &mut grads.dw {
            let x = Operand::new(&self.x[part], tokens.len(), self.hidden);
            product(dw, true, dz.t(), x);
        }
    }
}

/// Sums over all logits of the products of two gradients.
#[derive(Default)]
struct Products {
    task: f64,
    teacher: f64,
    both: f64,
}

impl Products {
    fn add(&mut self, task: &[f32], teacher: &[f32]) {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            crate::tiles::total(a.len(), |range| {
                let pairs = a[range.clone()].iter().zip(&b[range]);
                pairs.map(|(a, b)| *a as f64 * *b as f64).sum()
            })
        };
        self.task += dot(task, task);
        self.teacher += dot(teacher, teacher);
        self.both += dot(task, teacher);
    }

    /// Norms and cosine.
    fn finish(&self) -> ([f64; 2], f64) {
        let norms = [self.task.sqrt(), self.teacher.sqrt()];
        let size = norms[0] * norms[1];
        (norms, if size > 0.0 { self.both / size } else { 0.0 })
    }
}

impl Tape {
    /// Divergence of `logits: [tokens, vocab]` from a teacher: a scalar, in nats per token (times
    /// `T²` where the loss has a temperature).
    ///
    /// # Errors
    /// A loss that compares hidden states or is out of range; a teacher or targets of other sizes.
    ///
    /// # Panics
    /// When `logits` is no matrix.
    pub fn distill(&mut self, logits: Var, distillation: &Distillation<'_>) -> Result<Var> {
        let (tokens, vocab) = self.dims(logits);
        let plan = Plan::new(distillation, tokens, vocab)?;
        let mut grad = self.buffer(tokens * vocab);
        grad.copy_from_slice(self.data(logits));
        let mut teacher = self.buffer(plan.room(tokens));
        let loss = plan.tile(0..tokens, &mut grad, &mut teacher);
        self.recycle(teacher);
        let grad = self.constant(Tensor::new([tokens, vocab], grad));
        Ok(self.saved(&[(logits, grad)], loss))
    }

    /// [`Self::distill`] of the logits `x Wᵀ` of hidden states `x: [tokens, hidden]` and a head
    /// `weight: [vocab, hidden]`, without ever holding all logits.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// When the shapes of `x` and `weight` do not fit together.
    pub fn linear_distill(
        &mut self,
        x: Var,
        weight: Var,
        distillation: &Distillation<'_>,
    ) -> Result<Var> {
        let (plan, tile) = self.head_plan(x, weight, distillation)?;
        let mut grads = self.head_grads(x, weight);
        let mut student = self.buffer(tile * plan.vocab);
        let mut teacher = self.buffer(plan.room(tile));
        let head = self.head(x, weight);
        let (tokens, mut sum) = (plan.coefficients.len(), 0.0);
        for start in (0..tokens).step_by(tile) {
            let rows = start..(start + tile).min(tokens);
            let student = &mut student[..rows.len() * plan.vocab];
            head.logits(&rows, student);
            sum += plan.tile(rows.clone(), student, &mut teacher[..plan.room(rows.len())]);
            head.pass_on(&rows, student, &mut grads);
        }
        self.recycle(student);
        self.recycle(teacher);
        Ok(self.head_loss(x, weight, grads, sum))
    }

    /// [`Self::linear_distill`] and [`Self::linear_cross_entropy`] of the same logits, which are
    /// computed once, with the norms of both gradients and the angle between them.
    ///
    /// # Errors
    /// As [`Self::distill`].
    ///
    /// # Panics
    /// When the shapes of `x` and `weight` do not fit together.
    pub fn linear_distill_joint(
        &mut self,
        x: Var,
        weight: Var,
        distillation: &Distillation<'_>,
    ) -> Result<Joint> {
        let (plan, tile) = self.head_plan(x, weight, distillation)?;
        let targets = distillation.targets;
        let factor = means(targets).into_iter().fold(0.0, f64::max);
        let (mut grads, mut task_grads) = (self.head_grads(x, weight), self.head_grads(x, weight));
        let mut student = self.buffer(tile * plan.vocab);
        let mut task = self.buffer(tile * plan.vocab);
        let mut teacher = self.buffer(plan.room(tile));
        let head = self.head(x, weight);
        let (mut sum, mut task_sum, mut products) = (0.0, 0.0, Products::default());
        for start in (0..targets.len()).step_by(tile) {
            let rows = start..(start + tile).min(targets.len());
            let (student, task) =
                (&mut student[..rows.len() * plan.vocab], &mut task[..rows.len() * plan.vocab]);
            head.logits(&rows, student);
            task.copy_from_slice(student);
            task_sum += task_tile(task, plan.vocab, &targets[rows.clone()], factor);
            sum += plan.tile(rows.clone(), student, &mut teacher[..plan.room(rows.len())]);
            products.add(task, student);
            head.pass_on(&rows, task, &mut task_grads);
            head.pass_on(&rows, student, &mut grads);
        }
        for buffer in [student, task, teacher] {
            self.recycle(buffer);
        }
        let (norms, cosine) = products.finish();
        let task = self.head_loss(x, weight, task_grads, task_sum);
        let teacher = self.head_loss(x, weight, grads, sum);
        Ok(Joint { task, teacher, norms, cosine })
    }

    /// The plan for a head, and the tokens of a tile.
    fn head_plan<'a>(
        &self,
        x: Var,
        weight: Var,
        distillation: &Distillation<'a>,
    ) -> Result<(Plan<'a>, usize)> {
        let ((tokens, hidden), (vocab, inner)) = (self.dims(x), self.dims(weight));
        assert_eq!(hidden, inner, "hidden states and head differ in width");
        let plan = Plan::new(distillation, tokens, vocab)?;
        Ok((plan, (LOGITS / vocab).clamp(16, 256).min(tokens.max(1))))
    }

    fn head(&self, x: Var, weight: Var) -> Head<'_> {
        let (vocab, hidden) = self.dims(weight);
        Head { x: self.data(x), weight: self.data(weight), hidden, vocab }
    }

    /// Room for gradients; the head's starts at 0 because tiles add to it.
    fn head_grads(&mut self, x: Var, weight: Var) -> Grads {
        let (x_len, weight_len) = (self.value(x).len(), self.value(weight).len());
        let dx = self.wants(x).then(|| self.buffer(x_len));
        let mut dw = self.wants(weight).then(|| self.buffer(weight_len));
        if let Some(dw) = &mut dw {
            dw.fill(0.0);
        }
        Grads { dx, dw }
    }

    fn head_loss(&mut self, x: Var, weight: Var, grads: Grads, loss: f64) -> Var {
        let mut saved = Vec::new();
        for (input, grad) in [(x, grads.dx), (weight, grads.dw)] {
            if let Some(grad) = grad {
                let shape = self.value(input).shape().to_vec();
                saved.push((input, self.constant(Tensor::new(shape, grad))));
            }
        }
        self.saved(&saved, loss)
    }

    /// A scalar whose gradients were made with it: `dinput += dL · saved`.
    pub(super) fn saved(&mut self, saved: &[(Var, Var)], loss: f64) -> Var {
        let inputs: Vec<Var> = saved.iter().map(|(input, _)| *input).collect();
        let saved = saved.to_vec();
        self.custom(&inputs, Tensor::scalar(loss as f32), move |pass| {
            let factor = pass.grad()[0];
            for &(input, gradient) in &saved {
                let gradient = pass.value(gradient);
                pass.accumulate(input, gradient, |g| factor * g);
            }
        })
    }
}

#[cfg(test)]
mod tests;
