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

use anybit_core::{HalfIntegerGrid, RowScale};

use super::level_count;
use super::rows::{RowGrid, set_bits};

pub use anybit_core::half_integer::ALPHA;

/// `2^bits` equal steps around zero.
#[derive(Debug, Clone, Copy)]
pub(super) struct UniformGrid {
    grid: HalfIntegerGrid,
    /// `s`.
    reach: f32,
}

impl UniformGrid {
    /// The grid that ends at `α*·RMS`; gradient passes up to `reach` times its end.
    pub fn gaussian(bits: u8, reach: f32) -> Self {
        Self { grid: HalfIntegerGrid::new(bits, RowScale::Rms), reach }
    }

    /// The grid that ends at the largest magnitude, with gradient everywhere.
    pub fn largest(bits: u8) -> Self {
        Self { grid: HalfIntegerGrid::new(bits, RowScale::Largest), reach: f32::INFINITY }
    }

    /// `c`, where the grid of a row ends.
    pub fn end(&self, row: &[f32]) -> f32 {
        self.grid.end(row)
    }

    /// `Δ` of a grid that ends at `end`.
    pub fn step(&self, end: f32) -> f32 {
        self.grid.step(end)
    }

    /// `â`.
    #[inline(always)]
    pub fn value(&self, a: f32, step: f32) -> f32 {
        self.grid.value(a, step)
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
