//! Mean cross-entropy `L = 1/n Σ_t (ln Σ_j e^{z_tj} − z_{t,target})` over tokens with a target, of
//! logits `z` or of hidden states through a head, `z = x Wᵀ`.
//!
//! The gradient `∂L/∂z_t = (softmax(z_t) − onehot(target)) / n` needs nothing that comes later, so
//! the forward pass makes it while the logits are at hand and the backward only scales it. With
//! the head fused in, logits exist for one tile of tokens at a time.

use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::{Operand, product, softmax_lse};
use crate::{Tape, Tensor, Var};

/// The target of a token that does not count.
pub const IGNORE: u32 = u32::MAX;

/// Logits that exist at a time when the head is fused in (64 MiB).
const LOGITS: usize = 1 << 24;

/// Turns the logits of one token into their gradient, `factor · (softmax − onehot)`, and returns
/// the token's loss.
fn token_loss(logits: &mut [f32], target: u32, factor: f32) -> f64 {
    if target == IGNORE {
        logits.fill(0.0);
        return 0.0;
    }
    let target = target as usize;
    let logit = logits[target];
    let lse = softmax_lse(logits);
    logits.iter_mut().for_each(|p| *p *= factor);
    logits[target] -= factor;
    lse as f64 - logit as f64
}

/// [`token_loss`] of `[tokens, vocab]`; returns the sum of the losses, added in order.
fn losses(logits: &mut [f32], vocab: usize, targets: &[u32], factor: f32) -> f64 {
    let tokens = logits.par_chunks_exact_mut(vocab).zip(targets.par_iter());
    let each: Vec<f64> =
        tokens.map(|(logits, target)| token_loss(logits, *target, factor)).collect();
    each.iter().sum()
}

/// `1/n`; 0 when no token counts, whose loss is then 0.
fn factor(targets: &[u32]) -> f32 {
    match targets.iter().filter(|t| **t != IGNORE).count() {
        0 => 0.0,
        n => 1.0 / n as f32,
    }
}

/// Inputs of [`head_losses`].
struct Head<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    targets: &'a [u32],
    hidden: usize,
    vocab: usize,
}

/// Goes through tiles of tokens: `z = x Wᵀ`, the losses, `dx = dz W`, `dW += dzᵀ x`. `logits` is
/// the room for one tile. Returns the sum of the losses.
fn head_losses(
    head: &Head<'_>,
    logits: &mut [f32],
    mut dx: Option<&mut [f32]>,
    mut dw: Option<&mut [f32]>,
) -> f64 {
    let Head { x, weight, targets, hidden, vocab } = *head;
    let factor = factor(targets);
    let tile = logits.len() / vocab;
    let weight = Operand::new(weight, vocab, hidden);
    let mut sum = 0.0;
    for (index, targets) in targets.chunks(tile.max(1)).enumerate() {
        let (first, count) = (index * tile, targets.len());
        let part = first * hidden..(first + count) * hidden;
        let x = Operand::new(&x[part.clone()], count, hidden);
        let logits = &mut logits[..count * vocab];
        product(logits, false, x, weight.t());
        sum += losses(logits, vocab, targets, factor);
        let dz = Operand::new(logits, count, vocab);
        if let Some(dx) = dx.as_deref_mut() {
            product(&mut dx[part], false, dz, weight);
        }
        if let Some(dw) = dw.as_deref_mut() {
            product(dw, index > 0, dz.t(), x);
        }
    }
    sum
}

/// `dinput += dL · saved`, for gradients made in the forward pass.
fn pass_back(pass: &mut Pass<'_>, input: Var, saved: Var) {
    let (factor, saved) = (pass.grad()[0], pass.value(saved));
    pass.accumulate(input, saved, |g| factor * g);
}

impl Tape {
    /// Mean cross-entropy of `logits: [tokens, vocab]` against `targets`, where [`IGNORE`] does not
    /// count: a scalar.
    ///
    /// # Panics
    /// When there are not as many targets as tokens, or a target is outside the vocabulary.
    pub fn cross_entropy(&mut self, logits: Var, targets: &[u32]) -> Var {
        let (tokens, vocab) = self.dims(logits);
        assert_eq!(tokens, targets.len(), "one target per token is needed");
        let mut grad = self.buffer(tokens * vocab);
        grad.copy_from_slice(self.data(logits));
        let factor = factor(targets);
        let loss = losses(&mut grad, vocab, targets, factor) * factor as f64;
        let grad = self.constant(Tensor::new([tokens, vocab], grad));
        self.custom(&[logits], Tensor::scalar(loss as f32), move |pass| {
            pass_back(pass, logits, grad);
        })
    }

    /// [`Self::cross_entropy`] of the logits `x Wᵀ` of hidden states `x: [tokens, hidden]` and a
    /// head `weight: [vocab, hidden]`, without ever holding all logits.
    ///
    /// # Panics
    /// When the shapes do not fit together, or a target is outside the vocabulary.
    pub fn linear_cross_entropy(&mut self, x: Var, weight: Var, targets: &[u32]) -> Var {
        let (vocab, hidden) = self.dims(weight);
        assert_eq!(self.dims(x), (targets.len(), hidden), "one target per token is needed");
        let tile = (LOGITS / vocab).clamp(16, 256).min(targets.len());
        let mut logits = self.buffer(tile * vocab);
        let mut dx = self.wants(x).then(|| self.buffer(targets.len() * hidden));
        let mut dw = self.wants(weight).then(|| self.buffer(vocab * hidden));
        let (x_data, weight_data) = (self.data(x), self.data(weight));
        let head = Head { x: x_data, weight: weight_data, targets, hidden, vocab };
        let sum = head_losses(&head, &mut logits, dx.as_deref_mut(), dw.as_deref_mut());
        let loss = sum * factor(targets) as f64;
        self.recycle(logits);
        let dx = dx.map(|g| self.constant(Tensor::new([targets.len(), hidden], g)));
        let dw = dw.map(|g| self.constant(Tensor::new([vocab, hidden], g)));
        self.custom(&[x, weight], Tensor::scalar(loss as f32), move |pass| {
            for (input, saved) in [(x, dx), (weight, dw)] {
                if let Some(saved) = saved {
                    pass_back(pass, input, saved);
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    const TARGETS: [u32; 6] = [3, 0, IGNORE, 10, 3, IGNORE];

    #[test]
    fn gradients() {
        check_gradients(&[random(1, [6, 11])], |t, v| t.cross_entropy(v[0], &TARGETS));
        let inputs = [random(2, [6, 5]), random(3, [11, 5])];
        check_gradients(&inputs, |t, v| t.linear_cross_entropy(v[0], v[1], &TARGETS));
    }

    #[test]
    fn the_fused_head_equals_a_linear_and_its_loss() {
        // More tokens than a tile of 256.
        let (x, w) = (random(4, [600, 8]), random(5, [40, 8]));
        let targets: Vec<u32> =
            (0..600).map(|i| if i % 7 == 0 { IGNORE } else { i * 13 % 40 }).collect();
        let run = |fused: bool| {
            let mut tape = Tape::default();
            let (x, w) = (tape.leaf(x.clone(), true), tape.leaf(w.clone(), true));
            let loss = if fused {
                tape.linear_cross_entropy(x, w, &targets)
            } else {
                let logits = tape.linear(x, w, None);
                tape.cross_entropy(logits, &targets)
            };
            tape.backward(loss);
            let grads = [tape.grad(x).unwrap(), tape.grad(w).unwrap()].concat();
            (tape.data(loss)[0], grads)
        };
        let ((loss, grads), (want, wants)) = (run(true), run(false));
        approx::assert_relative_eq!(loss, want, max_relative = 1e-6);
        for (a, b) in grads.iter().zip(&wants) {
            approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-7);
        }
    }

    #[test]
    fn no_target_is_no_loss() {
        let mut tape = Tape::default();
        let x = tape.leaf(random(6, [2, 5]), true);
        let loss = tape.cross_entropy(x, &[IGNORE; 2]);
        tape.backward(loss);
        assert_eq!(tape.data(loss), [0.0]);
        assert_eq!(tape.grad(x).unwrap(), [0.0; 10]);
    }
}
