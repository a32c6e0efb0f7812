//! The head's part of the sensitivities: gradients of the loss with respect to the logits of one
//! sequence, `dz_t = (p_t − onehot(label_t)) / n`, what they say about the rows of the head, and
//! the gradient with respect to the hidden states.
//!
//! With labels of the text, squares of `dz` give the empirical Fisher information, as SKIM and
//! SqueezeLLM use it. With labels drawn from the model's own `p`, the expectation is the true one,
//! the curvature of `KL(model ‖ perturbed model)`; then the rows use its exact value,
//! `E[dz²] = p (1 − p) / n²`.

use anybit_core::Matrix;
use anybit_core::rng::SplitMix64;
use rayon::prelude::*;

use crate::GRADIENT_SCALE;
use crate::fisher::Labels;
use crate::tiles::{Operand, product, softmax_lse};

/// Tokens whose logits are held at a time.
const TOKENS: usize = 128;

/// What the rows of the head are worth.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadRows {
    /// Of each row of the head, `Σ_t dz_t²`, mean over sequences.
    pub rows: Vec<f32>,
    /// `dz_t²`, mean over each group of consecutive rows, `[groups, tokens]`.
    pub tokens: Matrix,
}

/// One sequence through the head.
pub(crate) struct HeadPass<'a> {
    /// Normalized hidden states, `[tokens, hidden]`.
    pub x: &'a [f32],
    /// The head, `[vocab, hidden]`.
    pub head: &'a [f32],
    /// Label of each token but the last.
    pub targets: &'a [u32],
    pub hidden: usize,
    pub labels: Labels,
    /// Index of the sequence, for drawing labels.
    pub sequence: usize,
}

impl HeadPass<'_> {
    /// Returns the mean loss on the text and the gradient with respect to `x`, scaled by
    /// [`GRADIENT_SCALE`]; adds `dz²` to `rows` and to the columns of `tokens` from `first` on.
    pub(crate) fn run(&self, mut statistics: Option<(&mut HeadRows, usize)>) -> (f32, Vec<f32>) {
        let Self { x, head, targets, hidden, .. } = *self;
        let vocab = head.len() / hidden;
        let factor = GRADIENT_SCALE / targets.len().max(1) as f32;
        let weight = Operand::new(head, vocab, hidden);
        let mut dx = vec![0f32; x.len()];
        let mut logits = vec![0f32; TOKENS.min(targets.len()) * vocab];
        let mut loss = 0f64;
        for (tile, targets) in targets.chunks(TOKENS).enumerate() {
            let (start, count) = (tile * TOKENS, targets.len());
            let part = start * hidden..(start + count) * hidden;
            let logits = &mut logits[..count * vocab];
            product(logits, false, Operand::new(&x[part.clone()], count, hidden), weight.t());
            let tokens = logits.par_chunks_exact_mut(vocab).zip(targets.par_iter());
            let losses: Vec<f64> = tokens
                .map(|(z, target)| {
                    let logit = z[*target as usize];
                    softmax_lse(z) as f64 - logit as f64
                })
                .collect();
            loss += losses.iter().sum::<f64>();
            if let Some((statistics, first)) = &mut statistics {
                self.add_statistics(statistics, *first + start, logits, targets, factor);
            }
            logits.par_chunks_exact_mut(vocab).enumerate().for_each(|(t, p)| {
                let label = self.label(start + t, targets[t], p);
                p.iter_mut().for_each(|p| *p *= factor);
                p[label] -= factor;
            });
            product(&mut dx[part], false, Operand::new(logits, count, vocab), weight);
        }
        ((loss / targets.len().max(1) as f64) as f32, dx)
    }

    /// The label that the gradient is taken for; drawn from `p` where it is the model's.
    fn label(&self, token: usize, target: u32, p: &[f32]) -> usize {
        let Labels::Model { seed } = self.labels else { return target as usize };
        let place = ((self.sequence as u64) << 32) | token as u64;
        let mut left = SplitMix64::new(seed ^ place.wrapping_mul(0x9E37_79B9_7F4A_7C15)).uniform();
        for (label, p) in p.iter().enumerate() {
            left -= *p as f64;
            if left < 0.0 {
                return label;
            }
        }
        // Rounding errors of the sum: the most probable one.
        p.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(label, _)| label)
    }

    /// Adds the squares of one tile's `dz`, from its probabilities.
    fn add_statistics(
        &self,
        statistics: &mut HeadRows,
        first: usize,
        p: &[f32],
        targets: &[u32],
        factor: f32,
    ) {
        let vocab = statistics.rows.len();
        let square = factor * factor;
        let labels = self.labels;
        let energy = |v: usize, p: f32, target: u32| match labels {
            Labels::Model { .. } => square * p * (1.0 - p),
            Labels::Text => {
                let dz = p - if target as usize == v { 1.0 } else { 0.0 };
                square * dz * dz
            }
        };
        statistics.rows.par_chunks_mut(1024).enumerate().for_each(|(chunk, rows)| {
            for (p, target) in p.chunks_exact(vocab).zip(targets) {
                for (i, row) in rows.iter_mut().enumerate() {
                    let v = chunk * 1024 + i;
                    *row += energy(v, p[v], *target);
                }
            }
        });
        let groups = statistics.tokens.rows;
        for group in 0..groups {
            let range = group * vocab / groups..(group + 1) * vocab / groups;
            let out = &mut statistics.tokens.row_mut(group)[first..first + targets.len()];
            out.par_iter_mut().enumerate().for_each(|(t, out)| {
                let p = &p[t * vocab..(t + 1) * vocab];
                let sum: f64 = range.clone().map(|v| energy(v, p[v], targets[t]) as f64).sum();
                *out = (sum / range.len() as f64) as f32;
            });
        }
    }
}
