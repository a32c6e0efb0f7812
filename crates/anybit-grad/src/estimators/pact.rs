//! PACT: a learned clip per tensor (Choi et al., 2018), for values of either sign.
//!
//! ```text
//! y = (q + ½) Δ      Δ = 2c/(n − 1)      q = clamp(floor(x/Δ), −n/2, n/2 − 1)
//! ∂y/∂x = 1[|x| < c]                     ∂y/∂c = sign(x) · 1[|x| ≥ c]
//! ```
//!
//! The paper clips to `[0, c]` behind a ReLU; the operands of a linear have both signs. QuEST's
//! released `PACTQuantizer` passes no gradient to `x` at all: it multiplies by the mask of the
//! *clipped* entries and detaches the rest. This is the paper's gradient. The clip starts at
//! `α*_b RMS(x)`; one below `1e-8` counts as `1e-8`, and keeps its gradient.

use super::rows::rms;
use super::uniform::{ALPHA, UniformGrid};
use super::{EPSILON, Estimator, add_to_scalar};
use crate::tiles::{map, total};
use crate::{Tape, Tensor, Var};

/// PACT.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pact {
    bits: u8,
    grid: UniformGrid,
}

impl Pact {
    /// PACT at `bits`.
    pub fn new(bits: u8) -> Self {
        Self { bits, grid: UniformGrid::gaussian(bits, 1.0) }
    }
}

impl Estimator for Pact {
    fn name(&self) -> &'static str {
        "pact"
    }

    fn parameters(&self, first: &[f32], _cols: usize) -> Vec<(&'static str, Tensor)> {
        let clip = ALPHA[self.bits as usize - 1] as f32 * rms(first);
        vec![("clip", Tensor::new([1], vec![clip.max(EPSILON)]))]
    }

    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var {
        let &[clip] = learned else { panic!("pact of {} learned values", learned.len()) };
        let (rows, cols) = tape.dims(x);
        let mut y = tape.buffer(rows * cols);
        let (grid, end) = (self.grid, tape.data(clip)[0].max(EPSILON));
        let step = grid.step(end);
        map(&mut y, false, tape.data(x), |x| grid.value(x, step));
        tape.custom(&[x, clip], Tensor::new([rows, cols], y), move |pass| {
            let (values, dy) = (pass.value(x), pass.grad());
            pass.accumulate2(x, dy, values, |g, x| if x.abs() < end { g } else { 0.0 });
            if pass.wants(clip) {
                let clipped = |(g, x): (&f32, &f32)| match x.abs() >= end {
                    true => (g * x.signum()) as f64,
                    false => 0.0,
                };
                let sum = total(dy.len(), |range| {
                    dy[range.clone()].iter().zip(&values[range]).map(clipped).sum()
                });
                add_to_scalar(pass, clip, sum);
            }
        })
    }

    fn trusted_share(&self, x: &[f32], _cols: usize, learned: &[&[f32]]) -> f64 {
        let end = learned[0][0].max(EPSILON);
        super::share(x, |x| x.abs() < end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_reaches_both_the_values_and_the_clip() {
        let mut tape = Tape::default();
        let x = tape.leaf(Tensor::new([1, 5], vec![0.2, -0.9, 1.0, -3.0, 2.0]), true);
        let clip = tape.leaf(Tensor::new([1], vec![1.0]), true);
        let pact = Pact::new(2);
        let y = pact.record(&mut tape, x, &[clip]);
        for (y, want) in tape.data(y).iter().zip([1.0 / 3.0, -1.0, 1.0, -1.0, 1.0]) {
            approx::assert_abs_diff_eq!(*y, want, epsilon = 1e-6);
        }
        tape.backward_from(y, &[1.0, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!(tape.grad(x).unwrap(), [1.0, 2.0, 0.0, 0.0, 0.0]);
        assert_eq!(tape.grad(clip).unwrap(), [4.0 - 8.0 + 16.0]);
        assert_eq!(pact.trusted_share(&[0.2, -0.9, 1.0, -3.0], 4, &[&[1.0]]), 0.5);
    }

    #[test]
    fn starts_where_a_gaussian_would_end() {
        let (name, clip) = Pact::new(4).parameters(&[3.0, -4.0], 2).remove(0);
        assert_eq!(name, "clip");
        let want = 2.513_930_6 * 12.5f32.sqrt();
        approx::assert_relative_eq!(clip.data()[0], want, max_relative = 1e-6);
    }
}
