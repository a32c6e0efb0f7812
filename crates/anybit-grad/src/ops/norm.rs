//! RMSNorm over groups of `n` channels: `y = x · r · w` with `r = (mean(x²) + ε)^−½`. The residual
//! stream is one group per token, queries and keys of Qwen3 one group per head.

use anybit_kernels::dot::dot;
use anybit_kernels::{rms_norm, with_scratch};
use rayon::prelude::*;

use crate::tape::{Pass, Slot};
use crate::tiles::sum_rows;
use crate::{Tape, Tensor, Var};

/// Groups that one task handles.
const ROWS: usize = 16;

/// `r` of one group.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// With `t = w · dy`: `dx = r (t − x · r² mean(t · x))`.
fn backward_input(x: &[f32], weight: &[f32], eps: f32, dy: &[f32], dx: &mut Slot) {
    let n = weight.len();
    let accumulate = dx.accumulate;
    let inputs = x.par_chunks(ROWS * n).zip(dy.par_chunks(ROWS * n));
    dx.data.par_chunks_mut(ROWS * n).zip(inputs).for_each(|(dx, (x, dy))| {
        with_scratch(n, |t| {
            let inputs = x.chunks_exact(n).zip(dy.chunks_exact(n));
            for (dx, (x, dy)) in dx.chunks_exact_mut(n).zip(inputs) {
                t.iter_mut().zip(weight.iter().zip(dy)).for_each(|(t, (w, g))| *t = w * g);
                let r = inverse_rms(x, eps);
                let c = dot(t, x) / n as f32 * r * r;
                for (dx, (t, x)) in dx.iter_mut().zip(t.iter().zip(x)) {
                    let value = r * (t - c * x);
                    *dx = if accumulate { *dx + value } else { value };
                }
            }
        });
    });
}

/// `dw = Σ_groups dy · x · r`.
fn backward_weight(x: &[f32], eps: f32, dy: &[f32], dw: &mut Slot) {
    let n = dw.data.len();
    sum_rows(&mut dw.data, dw.accumulate, x.len() / n, |row, sum| {
        let (x, dy) = (&x[row * n..(row + 1) * n], &dy[row * n..(row + 1) * n]);
        let r = inverse_rms(x, eps);
        sum.iter_mut().zip(x.iter().zip(dy)).for_each(|(s, (x, g))| *s += g * x * r);
    });
}

fn backward(pass: &mut Pass<'_>, x: Var, weight: Var, eps: f32) {
    let (values, dy) = (pass.value(x), pass.grad());
    if pass.wants(x) {
        let mut dx = pass.take(x);
        backward_input(values, pass.value(weight), eps, dy, &mut dx);
        pass.put(x, dx);
    }
    if pass.wants(weight) {
        let mut dw = pass.take(weight);
        backward_weight(values, eps, dy, &mut dw);
        pass.put(weight, dw);
    }
}

impl Tape {
    /// RMSNorm of every group of `weight.len()` consecutive values of `x`; keeps `x`'s shape.
    ///
    /// # Panics
    /// When `x` is not made of whole groups.
    pub fn rms_norm(&mut self, x: Var, weight: Var, eps: f32) -> Var {
        let n = self.value(weight).len();
        assert!(self.value(x).len().is_multiple_of(n), "not made of groups of {n}");
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(self.value(x).len());
        rms_norm(self.data(x), self.data(weight), eps, &mut y);
        self.custom(&[x, weight], Tensor::new(shape, y), move |pass| {
            backward(pass, x, weight, eps);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let (x, w) = (random(1, [5, 12]), random(2, [12]));
        check_gradients(&[x.clone(), w], |t, v| t.rms_norm(v[0], v[1], 1e-5));
        // Per head, and with an ε that matters.
        check_gradients(&[x, random(3, [4])], |t, v| t.rms_norm(v[0], v[1], 0.5));
        // The gradient adds to what is there, over more groups than a task has.
        check_gradients(&[random(4, [100, 6]), random(5, [6])], |t, v| {
            let y = t.rms_norm(v[0], v[1], 1e-5);
            t.mul(y, v[0])
        });
    }
}
