//! DoReFa (Zhou et al., 2016, sections 2.3 and 2.4), with `r(v) = round(v (n − 1)) / (n − 1)` on
//! `[0, 1]`, `n = 2^b`, rounded to even.
//!
//! Weights, with `t = tanh w` and `m = max|t|` over the tensor:
//!
//! ```text
//! ŵ = S (2 r(t/2m + ½) − 1)                 one bit: ŵ = sign(w) · mean|w|
//! S = 1    dw = (1 − t²) (dŵ/m − [w is the first of the largest] sign(t) Σ dŵ t / m²)
//! S = m    dw = (1 − t²) dŵ                 one bit: dw = dŵ
//! ```
//!
//! `S = 1` is the paper's: weights fill `[−1, 1]` whatever their size, and batch normalization behind
//! every layer makes up for it. A decoder adds the outputs of its linears to a stream, where that
//! would be no small change; `S = m` (`rescale`) keeps the size of the weights, and `m` is a constant
//! there.
//!
//! Activations: `x̂ = r(clamp(x, 0, 1))`, or with `signed`, for operands of either sign,
//! `x̂ = 2 r((clamp(x, −1, 1) + 1)/2) − 1`; gradient passes where nothing is clamped.

use rayon::prelude::*;

use super::{EPSILON, Estimator, level_count};
use crate::tiles::{CHUNK, map, total};
use crate::{Tape, Tensor, Var};

/// `r`.
#[inline(always)]
fn rounded(v: f32, last: f32) -> f32 {
    (v * last).round_ties_even() / last
}

/// DoReFa's weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct DorefaWeight {
    pub bits: u8,
    /// Whether `S = m`.
    pub rescale: bool,
}

impl Estimator for DorefaWeight {
    fn name(&self) -> &'static str {
        "dorefa_weight"
    }

    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var {
        assert!(learned.is_empty(), "dorefa_weight learns nothing");
        let (rows, cols) = tape.dims(x);
        let mut y = tape.buffer(rows * cols);
        let values = tape.data(x);
        if self.bits == 1 {
            let sum = total(values.len(), |r| values[r].iter().map(|w| w.abs() as f64).sum());
            let mean = (sum / values.len().max(1) as f64) as f32;
            map(&mut y, false, values, |w| if w < 0.0 { -mean } else { mean });
            return tape.custom(&[x], Tensor::new([rows, cols], y), move |pass| {
                let dy = pass.grad();
                pass.accumulate(x, dy, |g| g);
            });
        }
        let largest = |w: &[f32]| w.iter().fold(0f32, |most, w| most.max(w.abs()));
        // tanh is monotone.
        let most = values.par_chunks(CHUNK).map(largest).reduce(|| 0.0, f32::max);
        let m = most.tanh().max(EPSILON);
        let (last, rescale) = (level_count(self.bits) - 1.0, self.rescale);
        let size = if rescale { m } else { 1.0 };
        map(&mut y, false, values, |w| {
            size * (2.0 * rounded(0.5 * (w.tanh() / m) + 0.5, last) - 1.0)
        });
        tape.custom(&[x], Tensor::new([rows, cols], y), move |pass| {
            let (values, dy) = (pass.value(x), pass.grad());
            let direct = if rescale { 1.0 } else { 1.0 / m };
            pass.accumulate2(x, dy, values, |g, w| g * direct * (1.0 - w.tanh().powi(2)));
            if rescale || !pass.wants(x) {
                return;
            }
            let by_most = total(dy.len(), |range| {
                let inputs = dy[range.clone()].iter().zip(&values[range]);
                inputs.map(|(g, w)| (g * w.tanh()) as f64).sum()
            });
            if let Some(at) = values.iter().position(|w| w.abs() == most) {
                let t = values[at].tanh();
                let slope = t.signum() * (1.0 - t * t) / (m * m);
                let mut dx = pass.take(x);
                dx.ready()[at] -= by_most as f32 * slope;
                pass.put(x, dx);
            }
        })
    }

    fn trusted_share(&self, _x: &[f32], _cols: usize, _learned: &[&[f32]]) -> f64 {
        1.0
    }
}

/// DoReFa's activations.
#[derive(Debug, Clone, Copy)]
pub(super) struct DorefaActivation {
    pub bits: u8,
    /// Whether the range is `[−1, 1]`.
    pub signed: bool,
}

impl DorefaActivation {
    /// Least value that is not clamped; the largest is 1.
    fn least(self) -> f32 {
        if self.signed { -1.0 } else { 0.0 }
    }
}

impl Estimator for DorefaActivation {
    fn name(&self) -> &'static str {
        "dorefa_activation"
    }

    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var {
        assert!(learned.is_empty(), "dorefa_activation learns nothing");
        let (rows, cols) = tape.dims(x);
        let mut y = tape.buffer(rows * cols);
        let (last, least) = (level_count(self.bits) - 1.0, self.least());
        let range = 1.0 - least;
        map(&mut y, false, tape.data(x), |x| {
            range * rounded((x.clamp(least, 1.0) - least) / range, last) + least
        });
        tape.custom(&[x], Tensor::new([rows, cols], y), move |pass| {
            let (values, dy) = (pass.value(x), pass.grad());
            pass.accumulate2(x, dy, values, |g, x| if x >= least && x <= 1.0 { g } else { 0.0 });
        })
    }

    fn trusted_share(&self, x: &[f32], _cols: usize, _learned: &[&[f32]]) -> f64 {
        let least = self.least();
        super::share(x, |x| x >= least && x <= 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    fn run(estimator: &dyn Estimator, x: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let mut tape = Tape::default();
        let v = tape.leaf(Tensor::new([1, x.len()], x.to_vec()), true);
        let y = estimator.record(&mut tape, v, &[]);
        tape.backward_from(y, dy);
        (tape.data(y).to_vec(), tape.grad(v).unwrap().to_vec())
    }

    #[test]
    fn weights_fill_the_range_or_keep_their_size() {
        let w = [0.1f32, -0.3, 0.15, 0.05];
        let m = 0.3f32.tanh();
        for (rescale, size) in [(false, 1.0), (true, m)] {
            let (y, _) = run(&DorefaWeight { bits: 2, rescale }, &w, &[1.0; 4]);
            // t/2m + ½ is .67, 0, .76, .59: codes 2, 0, 2, 2 of 3.
            let want = [1.0 / 3.0, -1.0, 1.0 / 3.0, 1.0 / 3.0];
            for (y, want) in y.iter().zip(want) {
                approx::assert_abs_diff_eq!(*y, size * want, epsilon = 1e-6);
            }
        }
        let (y, dx) = run(&DorefaWeight { bits: 1, rescale: false }, &w, &[1.0, 2.0, 3.0, 4.0]);
        for (y, sign) in y.iter().zip([1.0, -1.0, 1.0, 1.0]) {
            approx::assert_abs_diff_eq!(*y, sign * 0.15, epsilon = 1e-7);
        }
        assert_eq!(dx, [1.0, 2.0, 3.0, 4.0]);
    }

    /// Against finite differences of the function without its rounding.
    #[test]
    fn gradients_of_weights_are_those_of_the_smooth_part() {
        let (w, c) = (normals(1, 40), normals(2, 40));
        for rescale in [false, true] {
            let (_, dx) = run(&DorefaWeight { bits: 3, rescale }, &w, &c);
            let smooth = |w: &[f64]| -> f64 {
                let t: Vec<f64> = w.iter().map(|w| w.tanh()).collect();
                let m = t.iter().fold(0f64, |m, t| m.max(t.abs()));
                let m = if rescale { 1.0 } else { m };
                t.iter().zip(&c).map(|(t, c)| t / m * *c as f64).sum()
            };
            let at: Vec<f64> = w.iter().map(|w| *w as f64).collect();
            for (i, dx) in dx.iter().enumerate() {
                let moved = |d: f64| {
                    let mut moved = at.clone();
                    moved[i] += d;
                    smooth(&moved)
                };
                let slope = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                approx::assert_abs_diff_eq!(*dx as f64, slope, epsilon = 1e-4);
            }
        }
    }

    #[test]
    fn activations_are_clamped() {
        let x = [-2.0f32, -0.4, 0.1, 0.6, 1.5];
        let third = 1.0 / 3.0;
        let kinds = [
            (false, [0.0, 0.0, 0.0, 2.0 * third, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0], 0.4),
            (true, [-1.0, -third, third, third, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0], 0.6),
        ];
        for (signed, values, gradients, share) in kinds {
            let estimator = DorefaActivation { bits: 2, signed };
            let (y, dx) = run(&estimator, &x, &[1.0; 5]);
            for (y, want) in y.iter().zip(values) {
                approx::assert_abs_diff_eq!(*y, want, epsilon = 1e-6);
            }
            assert_eq!(dx, gradients);
            approx::assert_relative_eq!(estimator.trusted_share(&x, 5, &[]), share);
        }
    }
}
