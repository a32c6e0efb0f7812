//! Values on a grid that is found per row, with the gradient of the identity through the rounding
//! alone: how clips of ranges, and transforms in front of a quantizer, are learned. (FlatQuant,
//! sections 1.5 and 1.6.)
//!
//! With `hi = max(0, max x) · σ(l_max)`, `lo = min(0, min x) · σ(l_min)`, `σ` the logistic function
//! (1 without a clip), `L = 2^b − 1` and `H = 2^(b−1)`, a segment of `b` bits of one row becomes
//! `y = s · v`:
//!
//! ```text
//! activations  symmetric    s = max(hi, −lo) / (H − 1)     v = clamp(round(x/s), −H, H − 1)
//!              asymmetric   s = (hi − lo) / L              v = clamp(round(x/s) + z, 0, L) − z
//! weights      symmetric    s = f16(2 max(hi, −lo) / L)    v = clamp(round(x/s + z), 0, L) − z
//!              asymmetric   s = f16((hi − lo) / L)         v = clamp(round(x/s + z), 0, L) − z
//! ```
//!
//! with `z = clamp(round(−lo/s), 0, L)`, and `z = H` for symmetric weights; one symmetric bit
//! of a weight has `z = ½` and `s = f16(2 mean|x|)` instead. Rounding is to even.
//!
//! Backward, with roundings to codes and to f16 taken as the identity and `z` as constant: a code
//! inside its range has `∂y/∂x = 1` and `∂y/∂s = v − x/s`; a clamped one has `∂y/∂x = 0` and
//! `∂y/∂s = v`. The gradient of `s` goes on to the ends of the range, from there to the logits and
//! to the largest and the smallest element.

use std::ops::Range;

use anybit_core::grid::round_scale;
use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::CHUNK;
use crate::{Tape, Tensor, Var};

/// Bits from which on a part of a row stays as it is.
const LOSSLESS: u8 = 16;
/// Partial results of loops over a row: enough that they vectorize.
const LANES: usize = 16;

/// How rows are put on grids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FakeQuant {
    /// Columns and bits of each part of a row, in order; they tile it. 16 or more bits leave their
    /// part as it is.
    pub segments: Vec<(usize, u8)>,
    /// Whether the grid is symmetric around zero.
    pub symmetric: bool,
    /// Whether these are rows of a weight, whose scales are stored as f16 and whose clips belong to
    /// each row; else activations, all rows of which share a clip.
    pub weight: bool,
}

/// The grid of one segment of one row: `v = clamp(round(x/s + before) + after, min, max) − zero`.
#[derive(Clone, Copy)]
struct Grid {
    scale: f32,
    before: f32,
    after: f32,
    min: f32,
    max: f32,
    zero: f32,
    /// What the scale follows.
    source: Source,
}

/// What a scale depends on, as far as gradients go.
#[derive(Clone, Copy)]
enum Source {
    /// `∂s/∂hi` and `∂s/∂lo`; zeros where a constant stands in for the scale.
    Range(f32, f32),
    /// `∂s/∂|x|` of every element.
    Mean(f32),
}

impl Grid {
    fn forward(self, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            let code = (*x / self.scale + self.before).round_ties_even() + self.after;
            *y = (code.clamp(self.min, self.max) - self.zero) * self.scale;
        }
    }

    /// Adds what reaches `dx` directly; returns `ds`.
    fn backward(self, x: &[f32], dy: &[f32], dx: &mut [f32]) -> f32 {
        let element = |x: f32, dy: f32, dx: &mut f32| {
            let steps = x / self.scale;
            let code = (steps + self.before).round_ties_even() + self.after;
            let clamped = code.clamp(self.min, self.max);
            let inside = clamped == code;
            *dx += if inside { dy } else { 0.0 };
            // Selected, not multiplied: the steps of a clamped value may be infinite.
            dy * (clamped - self.zero - if inside { steps } else { 0.0 })
        };
        let whole = x.len() / LANES * LANES;
        let mut lanes = [0f32; LANES];
        let inputs = x.chunks_exact(LANES).zip(dy.chunks_exact(LANES));
        for (dx, (x, dy)) in dx.chunks_exact_mut(LANES).zip(inputs) {
            for i in 0..LANES {
                lanes[i] += element(x[i], dy[i], &mut dx[i]);
            }
        }
        let mut ds: f32 = lanes.iter().sum();
        for i in whole..x.len() {
            ds += element(x[i], dy[i], &mut dx[i]);
        }
        ds
    }
}

/// Least and largest of the values and zero.
fn extremes(x: &[f32]) -> (f32, f32) {
    let (mut lows, mut highs) = ([0f32; LANES], [0f32; LANES]);
    let chunks = x.chunks_exact(LANES);
    for x in chunks.remainder() {
        lows[0] = lows[0].min(*x);
        highs[0] = highs[0].max(*x);
    }
    for chunk in chunks {
        for i in 0..LANES {
            lows[i] = if chunk[i] < lows[i] { chunk[i] } else { lows[i] };
            highs[i] = if chunk[i] > highs[i] { chunk[i] } else { highs[i] };
        }
    }
    (lows.iter().copied().fold(0.0, f32::min), highs.iter().copied().fold(0.0, f32::max))
}

/// A weight's scale as it is stored. Training goes on where a stored one would overflow; writing
/// the weight reports that.
fn stored(scale: f32) -> f32 {
    round_scale(scale).unwrap_or(scale)
}

/// The logistic function.
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Factors of the largest and of the smallest value, of one row.
fn factors_of(factors: &[f32], row: usize) -> [f32; 2] {
    let at = if factors.len() > 2 { 2 * row } else { 0 };
    [factors[at], factors[at + 1]]
}

impl FakeQuant {
    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.segments.iter().map(|(cols, _)| cols).sum()
    }

    /// Columns and bits of each part.
    fn parts(&self) -> impl Iterator<Item = (Range<usize>, u8)> {
        self.segments.iter().scan(0, |end, (cols, bits)| {
            let start = *end;
            *end += cols;
            Some((start..*end, *bits))
        })
    }

    /// Rows that one task handles.
    fn task_rows(&self) -> usize {
        (CHUNK / self.cols()).max(1)
    }

    /// The grid of `x`, a segment of `bits`, whose clipped range is `lo..=hi`.
    fn grid(&self, x: &[f32], bits: u8, lo: f32, hi: f32) -> Grid {
        let levels = ((1u32 << bits) - 1) as f32;
        let half = (1u32 << (bits - 1)) as f32;
        // The end that a symmetric range follows.
        let follow = |slope: f32| match hi >= -lo {
            true => Source::Range(slope, 0.0),
            false => Source::Range(0.0, -slope),
        };
        let magnitude = hi.max(-lo);
        if !self.weight {
            return self.activation_grid(lo, hi, levels, half, follow(1.0 / (half - 1.0)));
        }
        let (scale, source) = match (self.symmetric, bits) {
            (true, 1) => {
                let sum: f64 = x.iter().map(|v| v.abs() as f64).sum();
                let len = x.len().max(1) as f64;
                (stored((2.0 * sum / len) as f32), Source::Mean((2.0 / len) as f32))
            }
            (true, _) => (stored(2.0 * magnitude / levels), follow(2.0 / levels)),
            (false, _) => (stored((hi - lo) / levels), Source::Range(1.0 / levels, -1.0 / levels)),
        };
        if scale == 0.0 {
            // Every value is 0. Zeros count as inside, so that a row of zeros can leave them;
            // others, whose clip is closed, do not.
            return Grid {
                scale: f32::MIN_POSITIVE,
                before: 0.0,
                after: 0.0,
                min: 0.0,
                max: 0.0,
                zero: 0.0,
                source: Source::Range(0.0, 0.0),
            };
        }
        let zero = match (self.symmetric, bits) {
            (true, 1) => 0.5,
            (true, _) => half,
            (false, _) => (-lo / scale).round_ties_even().clamp(0.0, levels),
        };
        Grid { scale, before: zero, after: 0.0, min: 0.0, max: levels, zero, source }
    }

    /// The grid of a segment of an activation; `symmetric` is what a symmetric scale follows.
    fn activation_grid(
        &self,
        mut lo: f32,
        mut hi: f32,
        levels: f32,
        half: f32,
        symmetric: Source,
    ) -> Grid {
        // A segment of zeros has a grid too, which does not depend on it.
        let constant = Source::Range(0.0, 0.0);
        if self.symmetric {
            let magnitude = hi.max(-lo);
            let (scale, source) = match magnitude > 0.0 {
                true => (magnitude / (half - 1.0), symmetric),
                false => (1.0, constant),
            };
            let (min, max) = (-half, half - 1.0);
            return Grid { scale, before: 0.0, after: 0.0, min, max, zero: 0.0, source };
        }
        let mut source = Source::Range(1.0 / levels, -1.0 / levels);
        if hi == lo {
            (lo, hi, source) = (-1.0, 1.0, constant);
        }
        let scale = (hi - lo) / levels;
        let zero = (-lo / scale).round_ties_even().clamp(0.0, levels);
        Grid { scale, before: 0.0, after: zero, min: 0.0, max: levels, zero, source }
    }

    fn forward_row(&self, x: &[f32], factors: [f32; 2], y: &mut [f32]) {
        for (part, bits) in self.parts() {
            let (x, y) = (&x[part.clone()], &mut y[part]);
            if bits >= LOSSLESS {
                y.copy_from_slice(x);
                continue;
            }
            let (lo, hi) = extremes(x);
            self.grid(x, bits, lo * factors[1], hi * factors[0]).forward(x, y);
        }
    }

    /// Adds to `dx`; returns the gradients of both factors.
    fn backward_row(&self, x: &[f32], factors: [f32; 2], dy: &[f32], dx: &mut [f32]) -> [f32; 2] {
        let mut sums = [0f32; 2];
        for (part, bits) in self.parts() {
            let (x, dy, dx) = (&x[part.clone()], &dy[part.clone()], &mut dx[part]);
            if bits >= LOSSLESS {
                dx.iter_mut().zip(dy).for_each(|(d, g)| *d += g);
                continue;
            }
            let (lo, hi) = extremes(x);
            let grid = self.grid(x, bits, lo * factors[1], hi * factors[0]);
            let ds = grid.backward(x, dy, dx);
            match grid.source {
                Source::Mean(slope) => {
                    let step = ds * slope;
                    for (d, x) in dx.iter_mut().zip(x) {
                        // `signum` has no zero.
                        *d += step * ((*x > 0.0) as u8 as f32 - (*x < 0.0) as u8 as f32);
                    }
                }
                Source::Range(by_hi, by_lo) => {
                    for (i, (end, slope)) in [(hi, by_hi), (lo, by_lo)].into_iter().enumerate() {
                        // An end at zero is the range's own, no element's.
                        if end == 0.0 || slope == 0.0 {
                            continue;
                        }
                        sums[i] += ds * slope * end;
                        if let Some(at) = x.iter().position(|v| *v == end) {
                            dx[at] += ds * slope * factors[i];
                        }
                    }
                }
            }
        }
        sums
    }

    /// Factors of the ranges: two for all rows, or two for each.
    fn factors(clip: Option<&[f32]>) -> Vec<f32> {
        clip.map_or_else(|| vec![1.0; 2], |logits| logits.iter().map(|l| sigmoid(*l)).collect())
    }

    fn forward(&self, x: &[f32], clip: Option<&[f32]>, y: &mut [f32]) {
        let (cols, rows, factors) = (self.cols(), self.task_rows(), Self::factors(clip));
        let tasks = y.par_chunks_mut(rows * cols).zip(x.par_chunks(rows * cols)).enumerate();
        tasks.for_each(|(task, (y, x))| {
            let both = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
            for (row, (y, x)) in both.enumerate() {
                self.forward_row(x, factors_of(&factors, task * rows + row), y);
            }
        });
    }

    fn backward(&self, pass: &mut Pass<'_>, x: Var, clip: Option<Var>) {
        let (cols, rows) = (self.cols(), self.task_rows());
        let (values, dy) = (pass.value(x), pass.grad());
        let factors = Self::factors(clip.map(|c| pass.value(c)));
        // Both logits' gradients of every row, added up below in the order of the rows.
        let mut logits = pass.buffer(values.len() / cols * 2);
        let mut dx = pass.take(x);
        let accumulate = dx.accumulate;
        let inputs = values.par_chunks(rows * cols).zip(dy.par_chunks(rows * cols));
        let outputs = dx.data.par_chunks_mut(rows * cols).zip(logits.par_chunks_mut(rows * 2));
        outputs.zip(inputs).enumerate().for_each(|(task, ((dx, logits), (x, dy)))| {
            let inputs = x.chunks_exact(cols).zip(dy.chunks_exact(cols));
            let outputs = dx.chunks_exact_mut(cols).zip(logits.chunks_exact_mut(2));
            for (row, ((dx, logits), (x, dy))) in outputs.zip(inputs).enumerate() {
                if !accumulate {
                    dx.fill(0.0);
                }
                let factors = factors_of(&factors, task * rows + row);
                let sums = self.backward_row(x, factors, dy, dx);
                for (logit, (sum, f)) in logits.iter_mut().zip(sums.into_iter().zip(factors)) {
                    // σ' = σ (1 − σ)
                    *logit = sum * f * (1.0 - f);
                }
            }
        });
        pass.put(x, dx);
        if let Some(clip) = clip.filter(|c| pass.wants(*c)) {
            let mut slot = pass.take(clip);
            let dclip = slot.ready();
            if self.weight {
                dclip.iter_mut().zip(&logits).for_each(|(d, l)| *d += *l);
            } else {
                // f64: there may be a million rows.
                let mut sums = [0f64; 2];
                for row in logits.chunks_exact(2) {
                    sums.iter_mut().zip(row).for_each(|(s, l)| *s += *l as f64);
                }
                dclip.iter_mut().zip(sums).for_each(|(d, s)| *d += s as f32);
            }
            pass.put(clip, slot);
        }
        pass.recycle(logits);
    }
}

impl Tape {
    /// The rows of `x`, of `spec.cols()` values each, on their grids; the shape stays. `clip` holds
    /// the logits of the factors that the largest and the smallest value of a row are shrunk by:
    /// two for all rows of an activation, `[rows, 2]` for a weight; without it nothing is shrunk.
    ///
    /// Rounding has the gradient of the identity; a clamped value passes none on. The scale's
    /// gradient goes to the logits and to the elements at the ends of the range, the first of
    /// equals. One symmetric bit of a weight does not depend on its clip.
    ///
    /// # Panics
    /// When `x` is not made of whole rows, the number of logits is another, or a segment has no
    /// grid: 0 bits, or 1 bit of a symmetric activation.
    pub fn fake_quant(&mut self, x: Var, clip: Option<Var>, spec: &FakeQuant) -> Var {
        let (len, cols) = (self.value(x).len(), spec.cols());
        assert!(cols > 0 && len.is_multiple_of(cols), "not made of rows of {cols}");
        let least = if spec.symmetric && !spec.weight { 2 } else { 1 };
        assert!(spec.segments.iter().all(|(_, bits)| *bits >= least), "no grid of so few bits");
        if let Some(clip) = clip {
            let want = if spec.weight { len / cols * 2 } else { 2 };
            assert_eq!(self.value(clip).len(), want, "logits of clips");
        }
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(len);
        spec.forward(self.data(x), clip.map(|c| self.data(c)), &mut y);
        let inputs: Vec<Var> = [x].into_iter().chain(clip).collect();
        let spec = spec.clone();
        self.custom(&inputs, Tensor::new(shape, y), move |pass| spec.backward(pass, x, clip))
    }
}

#[cfg(test)]
mod tests;
