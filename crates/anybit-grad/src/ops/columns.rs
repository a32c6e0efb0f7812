//! `y = x · c` and `y = x / c`, a factor per column: scales of channels, which activations are
//! multiplied by and weights divided by.

use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::{CHUNK, sum_rows};
use crate::{Tape, Tensor, Var};

/// `dst (+)= f(src, c)`, where `c` belongs to the column.
fn by_columns(
    dst: &mut [f32],
    accumulate: bool,
    src: &[f32],
    factors: &[f32],
    f: impl Fn(f32, f32) -> f32 + Send + Sync,
) {
    let cols = factors.len();
    let task = (CHUNK / cols).max(1) * cols;
    dst.par_chunks_mut(task).zip(src.par_chunks(task)).for_each(|(dst, src)| {
        for (dst, src) in dst.chunks_exact_mut(cols).zip(src.chunks_exact(cols)) {
            let inputs = src.iter().zip(factors);
            if accumulate {
                dst.iter_mut().zip(inputs).for_each(|(d, (x, c))| *d += f(*x, *c));
            } else {
                dst.iter_mut().zip(inputs).for_each(|(d, (x, c))| *d = f(*x, *c));
            }
        }
    });
}

/// `x · c`, or `x / c`.
fn scaled(dst: &mut [f32], accumulate: bool, x: &[f32], factors: &[f32], reciprocal: bool) {
    match reciprocal {
        true => by_columns(dst, accumulate, x, factors, |x, c| x / c),
        false => by_columns(dst, accumulate, x, factors, |x, c| x * c),
    }
}

/// `dx = dy · c` and `dc = Σ_rows dy · x`; of the quotient `dx = dy / c` and
/// `dc = −Σ_rows dy · x / c²`.
fn backward(pass: &mut Pass<'_>, x: Var, factors: Var, reciprocal: bool) {
    let (values, c, dy) = (pass.value(x), pass.value(factors), pass.grad());
    if pass.wants(x) {
        let mut dx = pass.take(x);
        scaled(&mut dx.data, dx.accumulate, dy, c, reciprocal);
        pass.put(x, dx);
    }
    if pass.wants(factors) {
        let cols = c.len();
        let mut dc = pass.take(factors);
        let outer: Vec<f32> =
            c.iter().map(|c| if reciprocal { -1.0 / (c * c) } else { 1.0 }).collect();
        sum_rows(&mut dc.data, dc.accumulate, values.len() / cols, |row, sum| {
            let part = row * cols..(row + 1) * cols;
            let inputs = values[part.clone()].iter().zip(&dy[part]).zip(&outer);
            sum.iter_mut().zip(inputs).for_each(|(s, ((x, g), o))| *s += g * x * o);
        });
        pass.put(factors, dc);
    }
}

impl Tape {
    /// `y[r, j] = x[r, j] · c[j]`, or `x[r, j] / c[j]` when `reciprocal`: `x` is of any shape made
    /// of rows of `factors.len()` values, which `y` keeps.
    ///
    /// # Panics
    /// When `x` is not made of whole rows, or there are no factors.
    pub fn scale_columns(&mut self, x: Var, factors: Var, reciprocal: bool) -> Var {
        let (len, cols) = (self.value(x).len(), self.value(factors).len());
        assert!(cols > 0 && len.is_multiple_of(cols), "not made of rows of {cols}");
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(len);
        scaled(&mut y, false, self.data(x), self.data(factors), reciprocal);
        self.custom(&[x, factors], Tensor::new(shape, y), move |pass| {
            backward(pass, x, factors, reciprocal);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    /// Factors away from zero, where a quotient has no usable finite difference.
    fn factors(seed: u64, cols: usize) -> Tensor {
        let mut factors = random(seed, [cols]);
        factors.data_mut().iter_mut().for_each(|c| *c = c.signum() * (c.abs() + 0.5));
        factors
    }

    #[test]
    fn multiplies_and_divides() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 2], vec![1.0, 2.0, 3.0, -4.0]));
        let c = tape.constant(Tensor::new([2], vec![2.0, 0.5]));
        let product = tape.scale_columns(x, c, false);
        let quotient = tape.scale_columns(x, c, true);
        assert_eq!(tape.data(product), [2.0, 1.0, 6.0, -2.0]);
        assert_eq!(tape.data(quotient), [0.5, 4.0, 1.5, -8.0]);
    }

    #[test]
    fn gradients() {
        for reciprocal in [false, true] {
            // The second has more rows than one partial sum, the third more than one task.
            for (rows, cols) in [(4, 5), (150, 3), (30, 700)] {
                let inputs = [random(1, [rows, cols]), factors(2, cols)];
                check_gradients(&inputs, |t, v| t.scale_columns(v[0], v[1], reciprocal));
            }
            // Both gradients add to what is there.
            check_gradients(&[random(3, [1, 6]), factors(4, 6)], |t, v| {
                let y = t.scale_columns(v[0], v[1], reciprocal);
                let z = t.scale_columns(y, v[1], reciprocal);
                t.mul(z, v[0])
            });
        }
    }
}
