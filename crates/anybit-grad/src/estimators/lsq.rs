//! Learned steps: LSQ (Esser et al., ICLR 2020) and LSQ+ (Bhalgat et al., 2020), one step per
//! tensor.
//!
//! With `v = (x − β)/s − h`, codes `q = clamp(round(v), −n/2, n/2 − 1)` for `n = 2^b`, rounded to
//! even:
//!
//! ```text
//! y = (q + h) s + β            inside: −n/2 ≤ v ≤ n/2 − 1       clamped
//!                      ∂y/∂x   1                                0
//!                      ∂y/∂s   q + h − (x − β)/s                q + h
//!                      ∂y/∂β   0                                1
//! ```
//!
//! | estimator | `h` | `β` | `s` at first |
//! |---|---|---|---|
//! | `lsq` | ½, or 0 without `raise_zero` | 0 | `2 mean|x| / √q_max` |
//! | `lsq_plus_weight` | ½ | 0 | `2 α*_b RMS(x) / (n − 1)` |
//! | `lsq_plus_activation` | 0 | learned, `min x + s·n/2` at first | `(max x − min x) / (n − 1)` |
//!
//! Gradients of `s` and `β` are multiplied by `1/√(numel · q_max)`, `q_max = max(n/2 − 1, ½)` (LSQ,
//! section 2.2), so that they move as fast as the values do; the released code of QuEST divides by
//! zero at one bit. Without `h` one bit has no positive value. LSQ+ takes the first range of an
//! activation from its extremes, as its paper does; QuEST's code takes the Gaussian step with the
//! lowest level at the minimum, which starts with most of the range beyond the grid. A step below
//! `1e-8` counts as `1e-8`, and keeps its gradient.

use super::rows::rms;
use super::uniform::ALPHA;
use super::{EPSILON, Estimator, add_to_scalar, level_count};
use crate::tape::Pass;
use crate::tiles::{map, total};
use crate::{Tape, Tensor, Var};

/// How the first step is found.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// From the mean magnitude.
    Mean,
    /// As for N(0, 1), from the root mean square.
    Gaussian,
    /// From the extremes; there is an offset.
    Extremes,
}

/// LSQ and its kin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lsq {
    name: &'static str,
    bits: u8,
    /// `h`.
    raise: f32,
    start: Start,
}

/// A grid with its learned values.
#[derive(Debug, Clone, Copy)]
struct StepGrid {
    min: f32,
    max: f32,
    raise: f32,
    step: f32,
    offset: f32,
}

/// What becomes of a value.
struct Point {
    value: f32,
    inside: bool,
    /// `∂y/∂s`.
    by_step: f32,
}

impl StepGrid {
    #[inline(always)]
    fn at(self, x: f32) -> Point {
        let steps = (x - self.offset) / self.step;
        let v = steps - self.raise;
        let code = v.round_ties_even().clamp(self.min, self.max) + self.raise;
        let inside = v >= self.min && v <= self.max;
        // Selected, not multiplied: the steps of a clamped value may be infinite.
        let by_step = code - if inside { steps } else { 0.0 };
        Point { value: code * self.step + self.offset, inside, by_step }
    }
}

impl Lsq {
    /// LSQ; `raise_zero` shifts the grid by half a step.
    pub fn new(bits: u8, raise_zero: bool) -> Self {
        let raise = if raise_zero { 0.5 } else { 0.0 };
        Self { name: "lsq", bits, raise, start: Start::Mean }
    }

    /// LSQ+ for weights.
    pub fn plus_weight(bits: u8) -> Self {
        Self { name: "lsq_plus_weight", bits, raise: 0.5, start: Start::Gaussian }
    }

    /// LSQ+ for activations.
    pub fn plus_activation(bits: u8) -> Self {
        Self { name: "lsq_plus_activation", bits, raise: 0.0, start: Start::Extremes }
    }

    /// `max(n/2 − 1, ½)`.
    fn most(self) -> f32 {
        (0.5 * level_count(self.bits) - 1.0).max(0.5)
    }

    fn has_offset(self) -> bool {
        matches!(self.start, Start::Extremes)
    }

    fn grid(self, step: f32, offset: f32) -> StepGrid {
        let half = 0.5 * level_count(self.bits);
        StepGrid { min: -half, max: half - 1.0, raise: self.raise, step: step.max(EPSILON), offset }
    }

    /// `dx`, `ds` and `dβ` as the table says.
    fn backward(self, pass: &mut Pass<'_>, x: Var, step: Var, offset: Option<Var>) {
        let (values, dy) = (pass.value(x), pass.grad());
        let grid = self.grid(pass.value(step)[0], offset.map_or(0.0, |o| pass.value(o)[0]));
        pass.accumulate2(x, dy, values, |g, x| if grid.at(x).inside { g } else { 0.0 });
        let factor = 1.0 / (values.len().max(1) as f64 * self.most() as f64).sqrt();
        let sum = |f: &(dyn Fn(Point) -> f32 + Sync)| {
            total(dy.len(), |range| {
                let inputs = dy[range.clone()].iter().zip(&values[range]);
                inputs.map(|(g, x)| (g * f(grid.at(*x))) as f64).sum()
            })
        };
        if pass.wants(step) {
            add_to_scalar(pass, step, factor * sum(&|point| point.by_step));
        }
        if let Some(offset) = offset.filter(|o| pass.wants(*o)) {
            let clamped = |point: Point| if point.inside { 0.0 } else { 1.0 };
            add_to_scalar(pass, offset, factor * sum(&clamped));
        }
    }
}

impl Estimator for Lsq {
    fn name(&self) -> &'static str {
        self.name
    }

    fn parameters(&self, first: &[f32], _cols: usize) -> Vec<(&'static str, Tensor)> {
        let scalar = |value: f32| Tensor::new([1], vec![value]);
        let last = level_count(self.bits) - 1.0;
        let step = match self.start {
            Start::Mean => {
                let sum: f64 = first.iter().map(|v| v.abs() as f64).sum();
                2.0 * (sum / first.len().max(1) as f64) as f32 / self.most().sqrt()
            }
            Start::Gaussian => 2.0 * ALPHA[self.bits as usize - 1] as f32 * rms(first) / last,
            Start::Extremes => {
                let low = first.iter().copied().fold(f32::INFINITY, f32::min);
                let high = first.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let step = ((high - low) / last).max(EPSILON);
                let offset = low + 0.5 * level_count(self.bits) * step;
                return vec![("step", scalar(step)), ("offset", scalar(offset))];
            }
        };
        vec![("step", scalar(step.max(EPSILON)))]
    }

    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var {
        let (step, offset) = match (learned, self.has_offset()) {
            (&[step], false) => (step, None),
            (&[step, offset], true) => (step, Some(offset)),
            _ => panic!("{} of {} learned values", self.name, learned.len()),
        };
        let (rows, cols) = tape.dims(x);
        let mut y = tape.buffer(rows * cols);
        let grid = self.grid(tape.data(step)[0], offset.map_or(0.0, |o| tape.data(o)[0]));
        map(&mut y, false, tape.data(x), |x| grid.at(x).value);
        let inputs: Vec<Var> = [x, step].into_iter().chain(offset).collect();
        let own = *self;
        tape.custom(&inputs, Tensor::new([rows, cols], y), move |pass| {
            own.backward(pass, x, step, offset);
        })
    }

    fn trusted_share(&self, x: &[f32], _cols: usize, learned: &[&[f32]]) -> f64 {
        let grid = self.grid(learned[0][0], learned.get(1).map_or(0.0, |o| o[0]));
        super::share(x, |x| grid.at(x).inside)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    /// Gradients of `x`, step and offset for `Σ c·y`, without the factor of the latter two.
    fn gradients(lsq: Lsq, x: &[f32], learned: &[f32], c: &[f32]) -> (Vec<f32>, Vec<f64>) {
        let mut tape = Tape::default();
        let v = tape.leaf(Tensor::new([1, x.len()], x.to_vec()), true);
        let scalar = |l: &f32| tape.leaf(Tensor::new([1], vec![*l]), true);
        let parts: Vec<Var> = learned.iter().map(scalar).collect();
        let y = lsq.record(&mut tape, v, &parts);
        tape.backward_from(y, c);
        let factor = (x.len() as f64 * lsq.most() as f64).sqrt();
        let learned = parts.iter().map(|p| tape.grad(*p).unwrap()[0] as f64 * factor).collect();
        (tape.grad(v).unwrap().to_vec(), learned)
    }

    /// The function whose exact gradient is LSQ's: `round(v) = v + δ` with `δ` and who is clamped
    /// held where they were at `x₀, s₀, β₀`.
    fn frozen(grid: StepGrid, moved: [f64; 3], x0: f32) -> f64 {
        let [x, step, offset] = moved;
        let raise = grid.raise as f64;
        let v0 = (x0 as f64 - grid.offset as f64) / grid.step as f64 - raise;
        let (min, max) = (grid.min as f64, grid.max as f64);
        let v = match v0 {
            v0 if v0 < min => min,
            v0 if v0 > max => max,
            v0 => (x - offset) / step - raise + (v0.round_ties_even() - v0),
        };
        (v + raise) * step + offset
    }

    #[test]
    fn gradients_are_those_of_the_frozen_rounding() {
        let kinds = [
            (Lsq::new(1, true), vec![0.9]),
            (Lsq::new(3, true), vec![0.43]),
            (Lsq::new(4, false), vec![0.21]),
            (Lsq::plus_weight(2), vec![0.8]),
            (Lsq::plus_activation(3), vec![0.37, 0.25]),
        ];
        for (lsq, learned) in kinds {
            let (x, c) = (normals(1, 300), normals(2, 300));
            let (dx, dl) = gradients(lsq, &x, &learned, &c);
            let grid = lsq.grid(learned[0], learned.get(1).copied().unwrap_or(0.0));
            let sum = |dstep: f64, doffset: f64| -> f64 {
                let moved =
                    |x: &f32| [*x as f64, grid.step as f64 + dstep, grid.offset as f64 + doffset];
                x.iter().zip(&c).map(|(x, c)| *c as f64 * frozen(grid, moved(x), *x)).sum()
            };
            let h = 1e-6;
            let step = (sum(h, 0.0) - sum(-h, 0.0)) / (2.0 * h);
            approx::assert_relative_eq!(dl[0], step, max_relative = 1e-4, epsilon = 1e-3);
            if dl.len() > 1 {
                let offset = (sum(0.0, h) - sum(0.0, -h)) / (2.0 * h);
                approx::assert_relative_eq!(dl[1], offset, max_relative = 1e-4, epsilon = 1e-3);
            }
            let mut clamped = 0;
            for ((x, c), dx) in x.iter().zip(&c).zip(&dx) {
                let at = |d: f64| {
                    frozen(grid, [*x as f64 + d, grid.step as f64, grid.offset as f64], *x)
                };
                let slope = (at(h) - at(-h)) / (2.0 * h);
                approx::assert_abs_diff_eq!(*dx as f64, *c as f64 * slope, epsilon = 1e-5);
                clamped += usize::from(slope == 0.0);
            }
            assert!((1..300).contains(&clamped), "{} clamped", clamped);
        }
    }

    /// Clamped values are linear in the step: there the plain finite difference holds.
    #[test]
    fn clamped_values_follow_the_step_itself() {
        let (lsq, x) = (Lsq::new(2, true), [5.0f32, -7.0, 9.0]);
        let value = |step: f32| -> f64 {
            let mut tape = Tape::default();
            let v = tape.constant(Tensor::new([1, 3], x.to_vec()));
            let s = tape.constant(Tensor::new([1], vec![step]));
            let y = lsq.record(&mut tape, v, &[s]);
            tape.data(y).iter().map(|v| *v as f64).sum()
        };
        let (dx, ds) = gradients(lsq, &x, &[0.5], &[1.0; 3]);
        assert_eq!(dx, [0.0; 3]);
        approx::assert_relative_eq!(ds[0], (value(0.75) - value(0.25)) / 0.5, max_relative = 1e-6);
    }

    #[test]
    fn first_steps() {
        let x = [1.0f32, -3.0, 2.0, 2.0];
        let first = |lsq: Lsq| -> Vec<f32> {
            lsq.parameters(&x, 4).iter().map(|(_, t)| t.data()[0]).collect()
        };
        // 2·2/√7, and √½ for a q_max that would be zero.
        approx::assert_relative_eq!(
            first(Lsq::new(4, true))[0],
            4.0 / 7f32.sqrt(),
            max_relative = 1e-6
        );
        approx::assert_relative_eq!(
            first(Lsq::new(1, true))[0],
            4.0 / 0.5f32.sqrt(),
            max_relative = 1e-6
        );
        let weight = 2.0 * 1.493_534_6 * 4.5f32.sqrt() / 3.0;
        approx::assert_relative_eq!(first(Lsq::plus_weight(2))[0], weight, max_relative = 1e-6);
        let activation = first(Lsq::plus_activation(2));
        approx::assert_relative_eq!(activation[0], 5.0 / 3.0, max_relative = 1e-6);
        // The extremes are levels.
        let grid = Lsq::plus_activation(2).grid(activation[0], activation[1]);
        for end in [-3.0, 2.0] {
            approx::assert_abs_diff_eq!(grid.at(end).value, end, epsilon = 1e-6);
        }
    }
}
