//! Equal steps without a zero, `±½Δ, ±3/2Δ, … ±c` with `Δ = 2c/(n − 1)` and `n = 2^b` levels: the
//! grid of QuEST, of the straight-through estimators and of `absmax`.
//!
//! ```text
//! c = α*_b · RMS(row) + 1e-8   or   max|row| + 1e-8
//! q = clamp(floor(a / Δ), −n/2, n/2 − 1)        â = (q + ½) Δ
//! ```
//!
//! Zero belongs to `+½Δ`. An entry passes gradient when `|a| ≤ s·c`:
//!
//! | `s` | estimator |
//! |---|---|
//! | `n/(n − 1)` | QuEST's trust: an error of at most half a step, `\|â − a\| ≤ Δ/2` (algorithm 2) |
//! | 1.30, without rotation 1.25 | QuEST at one bit (appendix A.2) |
//! | 1 | clipped straight-through |
//! | ∞ | straight-through |
//!
//! Trust is taken in this closed form: comparing errors would let float noise decide at the
//! boundaries between levels, and would mask rows of zeros.

use super::rows::{RowGrid, rms, set_bits};
use super::{EPSILON, level_count};

/// `α*_b` at index `b − 1`: where a grid of `2^b` levels should end to have the least mean squared
/// error on N(0, 1). As the released code has them (`IST-DASLab/QuEST`), which is loose at 8 bits:
/// the least error is at 3.9222.
pub const ALPHA: [f64; 8] = [
    0.7978845587140913,
    1.4935346200015913,
    2.051068354131873,
    2.513930578568423,
    2.9160938834961225,
    3.276597282593217,
    3.6010497188221655,
    3.884938678807525,
];

/// What the end of a row's grid follows.
#[derive(Debug, Clone, Copy)]
enum Scale {
    /// So many times the row's root mean square.
    Rms(f32),
    /// The row's largest magnitude.
    Largest,
}

/// `2^bits` equal steps around zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct UniformGrid {
    /// `n`.
    levels: f32,
    scale: Scale,
    /// `s`.
    reach: f32,
}

impl UniformGrid {
    /// The grid that ends at `α*·RMS`; gradient passes up to `reach` times its end.
    pub fn gaussian(bits: u8, reach: f32) -> Self {
        let scale = Scale::Rms(ALPHA[bits as usize - 1] as f32);
        Self { levels: level_count(bits), scale, reach }
    }

    /// The grid that ends at the largest magnitude, with gradient everywhere.
    pub fn largest(bits: u8) -> Self {
        Self { levels: level_count(bits), scale: Scale::Largest, reach: f32::INFINITY }
    }

    /// `c`, where the grid of a row ends.
    pub fn end(&self, row: &[f32]) -> f32 {
        let end = match self.scale {
            Scale::Rms(alpha) => alpha * rms(row),
            Scale::Largest => row.iter().fold(0f32, |most, a| most.max(a.abs())),
        };
        end + EPSILON
    }

    /// `Δ` of a grid that ends at `end`.
    pub fn step(&self, end: f32) -> f32 {
        2.0 * end / (self.levels - 1.0)
    }

    /// `q`.
    #[inline(always)]
    pub fn code(&self, a: f32, step: f32) -> f32 {
        let half = 0.5 * self.levels;
        (a / step).floor().clamp(-half, half - 1.0)
    }

    /// `â`.
    #[inline(always)]
    pub fn value(&self, a: f32, step: f32) -> f32 {
        (self.code(a, step) + 0.5) * step
    }

    /// Largest magnitude that passes gradient.
    pub fn limit(&self, end: f32) -> f32 {
        self.reach * end
    }
}

/// `s` of QuEST's trust: half a step beyond the end of the grid.
pub(super) fn trust(bits: u8) -> f32 {
    level_count(bits) / (level_count(bits) - 1.0)
}

impl RowGrid for UniformGrid {
    fn quantize(&self, row: &mut [f32], mask: &mut [u64]) {
        let end = self.end(row);
        let (step, limit) = (self.step(end), self.limit(end));
        set_bits(mask, row, |a| a.abs() <= limit);
        row.iter_mut().for_each(|a| *a = self.value(*a, step));
    }
}
