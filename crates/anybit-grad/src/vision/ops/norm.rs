//! Batch normalization over the columns of `x: [n, C]` (Ioffe and Szegedy, 2015):
//!
//! ```text
//! x̂ = (x − μ) / √(v + ε)        y = γ x̂ + β
//! dβ = Σ dy        dγ = Σ dy x̂        dx = γ/√(v + ε) · (dy − dβ/n − x̂ dγ/n)
//! ```
//!
//! `μ` and `v` are mean and variance of the batch; with given ones, which do not depend on `x`, the
//! two last terms of `dx` fall away. Sums run in f64 over parts of a fixed number of rows.

use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::CHUNK;
use crate::{Tape, Tensor, Var};

/// `ε`, as PyTorch has it.
pub const NORM_EPSILON: f32 = 1e-5;

/// Mean and variance of every column.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// `μ`.
    pub mean: Vec<f32>,
    /// `v`, divided by `n`.
    pub variance: Vec<f32>,
    /// `n`.
    pub rows: usize,
}

/// Rows of a task.
fn task_rows(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

/// `Σ` over the rows of what `f(row, sums)` adds.
fn column_sums(
    rows: usize,
    width: usize,
    cols: usize,
    f: impl Fn(usize, &mut [f64]) + Send + Sync,
) -> Vec<f64> {
    let step = task_rows(cols);
    let part = |task: usize| {
        let mut sums = vec![0f64; width];
        for row in task * step..((task + 1) * step).min(rows) {
            f(row, &mut sums);
        }
        sums
    };
    let parts: Vec<Vec<f64>> = (0..rows.div_ceil(step)).into_par_iter().map(part).collect();
    let mut all = vec![0f64; width];
    for part in &parts {
        all.iter_mut().zip(part).for_each(|(a, p)| *a += p);
    }
    all
}

impl Moments {
    /// Those of `x: [rows, cols]`.
    fn of(x: &[f32], cols: usize) -> Self {
        let rows = x.len() / cols;
        let row = |row: usize| &x[row * cols..][..cols];
        let n = rows.max(1) as f64;
        let sums = column_sums(rows, cols, cols, |at, sums| {
            sums.iter_mut().zip(row(at)).for_each(|(s, x)| *s += *x as f64);
        });
        let mean: Vec<f64> = sums.iter().map(|s| s / n).collect();
        let squares = column_sums(rows, cols, cols, |at, sums| {
            let centred = row(at).iter().zip(&mean).map(|(x, m)| *x as f64 - m);
            sums.iter_mut().zip(centred).for_each(|(s, d)| *s += d * d);
        });
        Self {
            mean: mean.iter().map(|m| *m as f32).collect(),
            variance: squares.iter().map(|s| (s / n) as f32).collect(),
            rows,
        }
    }
}

/// `1/√(v + ε)`.
fn inverses(variance: &[f32]) -> Vec<f32> {
    variance.iter().map(|v| 1.0 / (v + NORM_EPSILON).sqrt()).collect()
}

/// What the backward pass needs.
struct Saved {
    mean: Vec<f32>,
    inverse: Vec<f32>,
    /// Whether mean and variance are those of `x`.
    of_batch: bool,
}

impl Saved {
    /// `dβ` and `dγ`, one behind the other.
    fn sums(&self, x: &[f32], dy: &[f32]) -> Vec<f64> {
        let cols = self.mean.len();
        column_sums(x.len() / cols, 2 * cols, cols, |row, sums| {
            let (beta, gamma) = sums.split_at_mut(cols);
            let (x, dy) = (&x[row * cols..][..cols], &dy[row * cols..][..cols]);
            for c in 0..cols {
                let normal = (x[c] - self.mean[c]) * self.inverse[c];
                beta[c] += dy[c] as f64;
                gamma[c] += (dy[c] * normal) as f64;
            }
        })
    }

    fn backward(&self, pass: &mut Pass<'_>, [x, gamma, beta]: [Var; 3]) {
        let (values, dy, cols) = (pass.value(x), pass.grad(), self.mean.len());
        let sums = self.sums(values, dy);
        if pass.wants(x) {
            let n = (values.len() / cols).max(1) as f64;
            let share = |s: &f64| if self.of_batch { (s / n) as f32 } else { 0.0 };
            let shares: Vec<f32> = sums.iter().map(share).collect();
            let gammas = pass.value(gamma);
            let mut dx = pass.take(x);
            let step = task_rows(cols) * cols;
            let inputs = values.par_chunks(step).zip(dy.par_chunks(step));
            dx.ready().par_chunks_mut(step).zip(inputs).for_each(|(dx, (x, dy))| {
                let inputs = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
                for (dx, (x, dy)) in dx.chunks_exact_mut(cols).zip(inputs) {
                    for c in 0..cols {
                        let normal = (x[c] - self.mean[c]) * self.inverse[c];
                        let centred = dy[c] - shares[c] - normal * shares[cols + c];
                        dx[c] += gammas[c] * self.inverse[c] * centred;
                    }
                }
            });
            pass.put(x, dx);
        }
        for (v, sums) in [(beta, &sums[..cols]), (gamma, &sums[cols..])] {
            if pass.wants(v) {
                let mut slot = pass.take(v);
                slot.ready().iter_mut().zip(sums).for_each(|(d, s)| *d += *s as f32);
                pass.put(v, slot);
            }
        }
    }
}

impl Tape {
    /// Batch normalization with the moments of `x: [n, C]`, which are returned too.
    ///
    /// # Panics
    /// When `gamma` or `beta` has not one value per column.
    pub fn batch_norm(&mut self, x: Var, gamma: Var, beta: Var) -> (Var, Moments) {
        let moments = Moments::of(self.data(x), self.dims(x).1);
        (self.normalized(x, gamma, beta, (&moments.mean, &moments.variance), true), moments)
    }

    /// Batch normalization with a given mean and variance: an affine function of each column.
    ///
    /// # Panics
    /// When something has not one value per column.
    pub fn fixed_norm(&mut self, x: Var, gamma: Var, beta: Var, moments: (&[f32], &[f32])) -> Var {
        self.normalized(x, gamma, beta, moments, false)
    }

    fn normalized(
        &mut self,
        x: Var,
        gamma: Var,
        beta: Var,
        (mean, variance): (&[f32], &[f32]),
        of_batch: bool,
    ) -> Var {
        let (rows, cols) = self.dims(x);
        let lengths = [self.value(gamma).len(), self.value(beta).len(), mean.len(), variance.len()];
        assert_eq!(lengths, [cols; 4], "one value per column is needed");
        let saved = Saved { mean: mean.to_vec(), inverse: inverses(variance), of_batch };
        let mut y = self.buffer(rows * cols);
        let (gammas, betas) = (self.data(gamma), self.data(beta));
        let step = task_rows(cols) * cols;
        y.par_chunks_mut(step).zip(self.data(x).par_chunks(step)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(cols).zip(x.chunks_exact(cols)) {
                for c in 0..cols {
                    y[c] = (x[c] - saved.mean[c]) * saved.inverse[c] * gammas[c] + betas[c];
                }
            }
        });
        let inputs = [x, gamma, beta];
        let y = Tensor::new([rows, cols], y);
        self.custom(&inputs, y, move |pass| saved.backward(pass, inputs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let inputs = [random(1, [40, 3]), random(2, [3]), random(3, [3])];
        check_gradients(&inputs, |t, v| t.batch_norm(v[0], v[1], v[2]).0);
        let moments = ([0.3, -1.0, 0.0], [1.5, 0.2, 4.0]);
        check_gradients(&inputs, |t, v| t.fixed_norm(v[0], v[1], v[2], (&moments.0, &moments.1)));
    }

    #[test]
    fn columns_have_mean_beta_and_deviation_gamma() {
        // More rows than a task has.
        let mut tape = Tape::default();
        let x = tape.constant(random(4, [20_000, 2]));
        let gamma = tape.constant(Tensor::new([2], vec![2.0, 0.5]));
        let beta = tape.constant(Tensor::new([2], vec![-1.0, 3.0]));
        let (y, moments) = tape.batch_norm(x, gamma, beta);
        let again = Moments::of(tape.data(y), 2);
        for (got, want) in again.mean.iter().zip([-1.0, 3.0]) {
            approx::assert_abs_diff_eq!(*got, want, epsilon = 1e-4);
        }
        for (got, want) in again.variance.iter().zip([4.0, 0.25]) {
            approx::assert_relative_eq!(*got, want, max_relative = 1e-3);
        }
        let same = tape.fixed_norm(x, gamma, beta, (&moments.mean, &moments.variance));
        assert_eq!(tape.data(same), tape.data(y));
    }
}
