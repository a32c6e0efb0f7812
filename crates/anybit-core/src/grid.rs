//! Grids: the values that codes stand for.
//!
//! Every affine grid decodes as `value = (u − z)·s` with the code `u` in `[0, 2^b)`:
//!
//! | grid | `z` | fitted scale `s` |
//! |---|---|---|
//! | uniform, symmetric | `2^(b−1)` | `2·max|w| / (2^b − 1)` |
//! | uniform, asymmetric | integer, stored with `b` bits | `(max − min) / (2^b − 1)`, range includes 0 |
//! | half-integer | `(2^b − 1)/2` | 1 bit: `2·mean|w|`, else `2·max|w| / (2^b − 1)` |
//!
//! A codebook grid decodes as `value = c[u]`, one table of `2^b` centroids per row; a shared
//! codebook as `value = c[u]·s`, one table for the whole plane and a scale per group. Scales and
//! centroids are stored as f16 and are rounded to f16 *before* any weight is put on the grid, so
//! that what was simulated is what is stored. Half-integer grids may have exact scales instead, as
//! f32: those of weights that were trained on them ([`crate::half_integer`]).

use half::f16;
use serde::{Deserialize, Serialize};

use crate::{CoreError, Result};

/// Which grid a plane uses; with the plane's shape this fixes every byte of its layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum GridSpec {
    /// Equally spaced values that include zero.
    Uniform {
        /// Bits of a code, 1 to 8 (symmetric: 2 to 8, since one bit has no positive value).
        bits: u8,
        /// Whether the zero point is fixed at the middle.
        symmetric: bool,
        /// Columns that share a scale; `None` for the whole row. The last group may be shorter.
        group_size: Option<usize>,
    },
    /// Equally spaced values symmetric around zero, without zero: `(k + ½)·s`.
    HalfInteger {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns that share a scale; `None` for the whole row.
        group_size: Option<usize>,
        /// Whether scales are stored as f32.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        exact: bool,
    },
    /// A table of `2^bits` values per row.
    Codebook {
        /// Bits of a code, 1 to 8.
        bits: u8,
    },
    /// A table of `2^bits` values for all rows of the plane, times a scale per group.
    SharedCodebook {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns that share a scale; `None` for the whole row.
        group_size: Option<usize>,
    },
}

impl GridSpec {
    /// The affine grid that `--bits`, `--asym` and `--group-size` name. One symmetric bit is the
    /// half-integer grid `±s/2`.
    pub fn affine(bits: u8, symmetric: bool, group_size: Option<usize>) -> Self {
        match (bits, symmetric) {
            (1, true) => Self::HalfInteger { bits, group_size, exact: false },
            _ => Self::Uniform { bits, symmetric, group_size },
        }
    }

    /// Bits of a code.
    pub fn bits(&self) -> u8 {
        match *self {
            Self::Uniform { bits, .. }
            | Self::HalfInteger { bits, .. }
            | Self::SharedCodebook { bits, .. }
            | Self::Codebook { bits } => bits,
        }
    }

    /// The same grid with other bits; one symmetric bit is half-integer.
    pub fn with_bits(&self, bits: u8) -> Self {
        match *self {
            Self::Uniform { symmetric, group_size, .. } => {
                Self::affine(bits, symmetric, group_size)
            }
            Self::HalfInteger { group_size, exact: true, .. } => {
                Self::HalfInteger { bits, group_size, exact: true }
            }
            Self::HalfInteger { group_size, .. } => Self::affine(bits, true, group_size),
            Self::Codebook { .. } => Self::Codebook { bits },
            Self::SharedCodebook { group_size, .. } => Self::SharedCodebook { bits, group_size },
        }
    }

    /// The same grid with one scale for the whole row.
    pub fn ungrouped(mut self) -> Self {
        match &mut self {
            Self::Uniform { group_size, .. }
            | Self::HalfInteger { group_size, .. }
            | Self::SharedCodebook { group_size, .. } => *group_size = None,
            Self::Codebook { .. } => {}
        }
        self
    }

    /// Columns that share parameters in a row of `cols`.
    pub fn group_len(&self, cols: usize) -> usize {
        self.group_size().unwrap_or(cols).max(1)
    }

    /// Columns that share a scale; `None` for the whole row.
    pub fn group_size(&self) -> Option<usize> {
        match *self {
            Self::Uniform { group_size, .. }
            | Self::HalfInteger { group_size, .. }
            | Self::SharedCodebook { group_size, .. } => group_size,
            Self::Codebook { .. } => None,
        }
    }

    /// Groups in a row of `cols`, the shorter last one included.
    pub fn groups(&self, cols: usize) -> usize {
        cols.div_ceil(self.group_len(cols))
    }

    /// Whether scales are stored as f32 instead of f16.
    pub fn has_exact_scales(&self) -> bool {
        matches!(self, Self::HalfInteger { exact: true, .. })
    }

    /// Whether zero points are stored.
    pub fn has_zeros(&self) -> bool {
        matches!(self, Self::Uniform { symmetric: false, .. })
    }

    /// Checks bits and group size against rows of `cols`.
    ///
    /// # Errors
    /// [`CoreError::Bits`] or [`CoreError::GroupSize`].
    pub fn validate(&self, cols: usize) -> Result<()> {
        let (grid, min) = match self {
            Self::Uniform { symmetric: true, .. } => ("symmetric uniform", 2),
            Self::Uniform { .. } => ("asymmetric uniform", 1),
            Self::HalfInteger { .. } => ("half-integer", 1),
            Self::Codebook { .. } => ("codebook", 1),
            Self::SharedCodebook { .. } => ("shared codebook", 1),
        };
        let bits = self.bits();
        if !(min..=8).contains(&bits) {
            return Err(CoreError::Bits { bits, grid, min, max: 8 });
        }
        match self.group_size() {
            Some(g) if g == 0 || g % 8 != 0 || g > cols => {
                Err(CoreError::GroupSize { group_size: g, cols })
            }
            _ => Ok(()),
        }
    }

    /// The zero point that is implied when none is stored.
    pub fn implied_zero(&self) -> f32 {
        match *self {
            Self::Uniform { bits, .. } => (1u32 << (bits - 1)) as f32,
            Self::HalfInteger { bits, .. } => ((1u32 << bits) - 1) as f32 / 2.0,
            Self::Codebook { .. } | Self::SharedCodebook { .. } => 0.0,
        }
    }
}

/// How an affine grid's range is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleFit {
    /// The extreme values of the group are on the grid.
    #[default]
    MinMax,
    /// The range shrunk, in 100 steps down to 0.2, to where `Σ|w − q|^2.4` is least (the search
    /// of the GPTQ reference, its exponent included).
    Mse,
}

/// The fitted affine grid of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupGrid {
    /// Step, already rounded to f16 unless the grid's scales are exact. Zero for a group of zeros
    /// that was fitted.
    pub scale: f32,
    /// Zero point in code units.
    pub zero: f32,
    /// Largest code.
    pub max_code: f32,
}

impl GroupGrid {
    /// Fits `spec` to the weights of one group.
    ///
    /// # Errors
    /// [`CoreError::ScaleOverflow`] (with row and group left at 0 for the caller to fill in) when
    /// the scale exceeds what an f16 holds.
    pub fn fit(spec: GridSpec, weights: &[f32], fit: ScaleFit) -> Result<Self> {
        let min_max = Self::fit_range(spec, weights, 1.0)?;
        if fit == ScaleFit::MinMax || spec.bits() == 1 || min_max.scale == 0.0 {
            return Ok(min_max);
        }
        let mut best = (min_max.error(weights), min_max);
        for step in 1..80 {
            let candidate = Self::fit_range(spec, weights, 1.0 - step as f32 / 100.0)?;
            let error = candidate.error(weights);
            if error < best.0 {
                best = (error, candidate);
            }
        }
        Ok(best.1)
    }

    fn fit_range(spec: GridSpec, weights: &[f32], shrink: f32) -> Result<Self> {
        let levels = ((1u32 << spec.bits()) - 1) as f32;
        let (lo, hi) = weights
            .iter()
            .fold((0f32, 0f32), |(lo, hi), &w| (lo.min(w * shrink), hi.max(w * shrink)));
        let magnitude = hi.max(-lo);
        let exact = match spec {
            GridSpec::Uniform { symmetric: false, .. } => (hi - lo) / levels,
            GridSpec::HalfInteger { bits: 1, .. } => {
                let sum: f64 = weights.iter().map(|w| w.abs() as f64).sum();
                (2.0 * sum / weights.len().max(1) as f64) as f32
            }
            _ => 2.0 * magnitude / levels,
        };
        let rounded = if spec.has_exact_scales() { Some(exact) } else { round_scale(exact) };
        let scale = rounded.ok_or(CoreError::ScaleOverflow { row: 0, group: 0, magnitude })?;
        let zero = match spec {
            GridSpec::Uniform { symmetric: false, .. } if scale > 0.0 => {
                (-lo / scale).round_ties_even().clamp(0.0, levels)
            }
            GridSpec::Uniform { symmetric: false, .. } => 0.0,
            _ => spec.implied_zero(),
        };
        Ok(Self { scale, zero, max_code: levels })
    }

    /// `Σ|w − q|^2.4`, in eight partial sums so that it vectorizes in a fixed order.
    fn error(&self, weights: &[f32]) -> f64 {
        const LANES: usize = 8;
        // Codes as f32: the same values as `decode(encode(w))`.
        let power = |w: f32| {
            let code = (w / self.scale + self.zero).round_ties_even().clamp(0.0, self.max_code);
            power_2_4((w - (code - self.zero) * self.scale).abs())
        };
        let chunks = weights.chunks_exact(LANES);
        let mut total: f64 = chunks.remainder().iter().map(|w| power(*w) as f64).sum();
        let mut sums = [0f32; LANES];
        for chunk in chunks {
            sums.iter_mut().zip(chunk).for_each(|(sum, w)| *sum += power(*w));
        }
        total += sums.iter().map(|s| *s as f64).sum::<f64>();
        total
    }

    /// Nearest code of `w`, ties to the even code.
    #[inline]
    pub fn encode(&self, w: f32) -> u8 {
        if self.scale == 0.0 {
            return self.zero as u8;
        }
        (w / self.scale + self.zero).round_ties_even().clamp(0.0, self.max_code) as u8
    }

    /// Value of a code.
    #[inline]
    pub fn decode(&self, code: u8) -> f32 {
        (code as f32 - self.zero) * self.scale
    }
}

/// `x^2.4 = x² · 2^(0.4 log₂ x)` for `x ≥ 0`, to 0.4%: for comparing errors, at a tenth of `powf`'s
/// cost.
#[inline(always)]
fn power_2_4(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits >> 23) as i32 - 127;
    let m = f32::from_bits((bits & 0x007f_ffff) | 0x3f80_0000);
    // log₂ of the mantissa on [1, 2), and 2^f on [−½, ½].
    let log = ((((-0.081_615_81f32 * m + 0.645_142_4) * m - 2.120_674_6) * m + 4.070_091) * m
        - 2.512_853_6)
        + exponent as f32;
    let t = (0.4 * log).max(-120.0);
    let n = t.round_ties_even();
    let f = t - n;
    let p = ((0.055_504_1f32 * f + 0.240_226_5) * f + std::f32::consts::LN_2) * f + 1.0;
    x * x * p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// Rounds a non-negative scale to f16. A positive scale never becomes zero: the smallest f16
/// stands in for it. `None` when it exceeds the largest f16.
pub fn round_scale(scale: f32) -> Option<f32> {
    if scale == 0.0 {
        return Some(0.0);
    }
    let rounded = f16::from_f32(scale);
    match rounded {
        r if r.is_infinite() || r.is_nan() => None,
        r if r == f16::ZERO => Some(f16::from_bits(1).to_f32()),
        r => Some(r.to_f32()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn specs() -> impl Strategy<Value = GridSpec> {
        (1u8..=8, any::<bool>()).prop_map(|(bits, sym)| GridSpec::affine(bits, sym, None))
    }

    proptest! {
        /// Nearest really is nearest: no other code decodes closer.
        #[test]
        fn encode_is_nearest(spec in specs(), w in prop::collection::vec(-3f32..3.0, 1..40)) {
            let grid = GroupGrid::fit(spec, &w, ScaleFit::MinMax).unwrap();
            for &v in &w {
                let got = (grid.decode(grid.encode(v)) - v).abs();
                let best = (0..=grid.max_code as u32)
                    .map(|u| (grid.decode(u as u8) - v).abs())
                    .fold(f32::INFINITY, f32::min);
                prop_assert!(got <= best + 1e-5 * (1.0 + v.abs()), "{got} > {best}");
            }
        }

        #[test]
        fn mse_fit_is_never_worse(bits in 2u8..=6, w in prop::collection::vec(-3f32..3.0, 4..64)) {
            let spec = GridSpec::affine(bits, true, None);
            let plain = GroupGrid::fit(spec, &w, ScaleFit::MinMax).unwrap();
            let searched = GroupGrid::fit(spec, &w, ScaleFit::Mse).unwrap();
            prop_assert!(searched.error(&w) <= plain.error(&w));
        }
    }

    #[test]
    fn the_power_is_near_enough() {
        let mut x = 1e-9f32;
        while x < 1e4 {
            approx::assert_relative_eq!(power_2_4(x), x.powf(2.4), max_relative = 4e-3);
            x *= 1.37;
        }
        assert_eq!(power_2_4(0.0), 0.0);
    }

    #[test]
    fn zeros_decode_to_zero_and_overflow_is_an_error() {
        for spec in [GridSpec::affine(4, true, None), GridSpec::affine(4, false, None)] {
            let g = GroupGrid::fit(spec, &[0.0; 8], ScaleFit::MinMax).unwrap();
            assert_eq!(g.decode(g.encode(0.0)), 0.0);
        }
        let spec = GridSpec::affine(2, true, None);
        assert!(matches!(
            GroupGrid::fit(spec, &[1e9], ScaleFit::MinMax),
            Err(CoreError::ScaleOverflow { .. })
        ));
        let tiny = GroupGrid::fit(spec, &[1e-12, -1e-12], ScaleFit::MinMax).unwrap();
        assert!(tiny.scale > 0.0);
    }

    #[test]
    fn exact_scales_are_not_rounded() {
        let spec = GridSpec::HalfInteger { bits: 3, group_size: None, exact: true };
        let fitted = GroupGrid::fit(spec, &[0.123_456_7, -0.1], ScaleFit::MinMax).unwrap();
        assert_eq!(fitted.scale, 2.0 * 0.123_456_7 / 7.0);
        let wider = spec.with_bits(5);
        assert!(wider.bits() == 5 && wider.has_exact_scales());
        assert!(!GridSpec::affine(1, true, None).has_exact_scales());
    }

    #[test]
    fn group_sizes_are_checked() {
        let ok = GridSpec::affine(4, true, Some(128));
        assert!(ok.validate(576).is_ok());
        assert_eq!(ok.groups(576), 5);
        for bad in [0, 7, 100, 1024] {
            let spec = GridSpec::affine(4, true, Some(bad));
            assert!(matches!(spec.validate(576), Err(CoreError::GroupSize { .. })), "{bad}");
        }
        assert!(GridSpec::affine(9, true, None).validate(64).is_err());
        assert!(GridSpec::affine(0, false, None).validate(64).is_err());
    }
}
