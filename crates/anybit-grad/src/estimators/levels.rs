//! Levels of any spacing, in units of the row's root mean square: the nearest one is taken, the
//! upper of two as near.

use super::EPSILON;
use super::rows::{RowGrid, rms, set_bits};

/// Which entries pass gradient; bounds in units of the row's root mean square.
#[derive(Debug, Clone, Copy)]
pub(super) enum Passing {
    /// Those of at most this magnitude.
    Within(f32),
    /// Those whose error is at most this.
    Error(f32),
}

/// A table of levels.
#[derive(Debug, Clone)]
pub(super) struct LevelGrid {
    /// Ascending.
    levels: Vec<f32>,
    /// Halfway between neighbours.
    bounds: Vec<f32>,
    passing: Passing,
}

impl LevelGrid {
    /// A grid of ascending `levels`.
    pub fn new(levels: &[f64], passing: Passing) -> Self {
        let bounds = levels.windows(2).map(|pair| (0.5 * (pair[0] + pair[1])) as f32).collect();
        Self { levels: levels.iter().map(|l| *l as f32).collect(), bounds, passing }
    }

    /// A grid of ascending levels from zero up, or from above zero, and their negatives.
    pub fn mirrored(magnitudes: &[f64], passing: Passing) -> Self {
        let negative = magnitudes.iter().rev().filter(|l| **l > 0.0).map(|l| -l);
        let levels: Vec<f64> = negative.chain(magnitudes.iter().copied()).collect();
        Self::new(&levels, passing)
    }

    /// The level nearest to `a`, in units of the root mean square.
    #[inline(always)]
    pub fn nearest(&self, a: f32) -> f32 {
        self.levels[self.bounds.partition_point(|bound| *bound <= a)]
    }

    /// Whether `a`, in units of the root mean square, passes gradient.
    #[inline(always)]
    pub fn passes(&self, a: f32) -> bool {
        match self.passing {
            Passing::Within(limit) => a.abs() <= limit,
            Passing::Error(limit) => (self.nearest(a) - a).abs() <= limit,
        }
    }

    #[cfg(test)]
    pub fn levels(&self) -> &[f32] {
        &self.levels
    }
}

impl RowGrid for LevelGrid {
    fn quantize(&self, row: &mut [f32], mask: &mut [u64]) {
        // Only rows of zeros notice the addend.
        let unit = rms(row) + EPSILON;
        set_bits(mask, row, |a| self.passes(a / unit));
        row.iter_mut().for_each(|a| *a = self.nearest(*a / unit) * unit);
    }
}
