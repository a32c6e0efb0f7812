//! Quantizers of activations and of the key–value cache: a grid per row (token, or head of a token),
//! found when the row is there.
//!
//! A row is cut into segments, each with its own bits, scale and zero point. With `lo ≤ 0 ≤ hi` the
//! extremes of a segment, shrunk by the clip factors:
//!
//! ```text
//! symmetric    s = max(hi, −lo) / (2^(b−1) − 1)   q = clamp(round(x/s), −2^(b−1), 2^(b−1) − 1)
//! asymmetric   s = (hi − lo) / (2^b − 1)          q = clamp(round(x/s) + z, 0, 2^b − 1)
//!              z = clamp(round(−lo/s), 0, 2^b − 1)
//! ```
//!
//! and the value is `(q − z)·s`; rounding is to even. A segment of zeros has scale 1 (symmetric) or
//! range −1 to 1. (ResQ, section 1.6 of its specification; FlatQuant, 1.6.)
//!
//! With a [`RowScale`] the grid is the half-integer one that weights and activations are trained on
//! ([`crate::half_integer`]): `z = −½`, `q = clamp(floor(x/s), −2^(b−1), 2^(b−1) − 1)`.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::{CoreError, HalfIntegerGrid, Result, RowScale};

/// Columns that share a grid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Columns.
    pub cols: usize,
    /// Bits of a code, 2 to 8; half-integer 1 to 8.
    pub bits: u8,
}

/// How rows are put on grids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationQuantizer {
    /// Segments, which tile a row.
    pub segments: Vec<Segment>,
    /// Whether the grid is symmetric around zero.
    pub symmetric: bool,
    /// Factors of the largest and of the smallest value of a segment.
    pub clip: (f32, f32),
    /// Whether scales are rounded to f16: those of the cache, which are stored.
    pub half: bool,
    /// What the ends of half-integer grids follow; none for grids of the extremes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row_scale: Option<RowScale>,
}

/// The grid of one segment of one row; codes are signed, asymmetric ones re-centred by `2^(b−1)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActivationGrid {
    /// Step.
    pub scale: f32,
    /// Zero point, in units of codes: an integer, or −½.
    pub zero: f32,
    /// Least code.
    pub min: f32,
    /// Largest code.
    pub max: f32,
    /// Whether a code is the integer below instead of the nearest: half-integer grids.
    pub floor: bool,
}

impl ActivationGrid {
    /// Code of `x`.
    #[inline(always)]
    pub fn encode(&self, x: f32) -> f32 {
        let steps = x / self.scale;
        let code = match self.floor {
            true => steps.floor(),
            false => steps.round_ties_even() + self.zero,
        };
        code.clamp(self.min, self.max)
    }

    /// Value of a code.
    #[inline(always)]
    pub fn decode(&self, code: f32) -> f32 {
        (code - self.zero) * self.scale
    }
}

impl ActivationQuantizer {
    /// One grid for rows of `cols`.
    pub fn plain(cols: usize, bits: u8, symmetric: bool) -> Self {
        Self::tiered(cols, bits, 0, bits, symmetric)
    }

    /// Rows of `cols` whose last `high` columns have bits of their own.
    pub fn tiered(cols: usize, bits: u8, high: usize, high_bits: u8, symmetric: bool) -> Self {
        let parts = [Segment { cols: cols - high, bits }, Segment { cols: high, bits: high_bits }];
        let segments = parts.into_iter().filter(|s| s.cols > 0).collect();
        Self { segments, symmetric, clip: (1.0, 1.0), half: false, row_scale: None }
    }

    /// One half-integer grid for rows of `cols`, as they are trained with.
    pub fn half_integer(cols: usize, bits: u8, scale: RowScale) -> Self {
        Self { row_scale: Some(scale), ..Self::plain(cols, bits, true) }
    }

    /// Columns of a row.
    pub fn cols(&self) -> usize {
        self.segments.iter().map(|s| s.cols).sum()
    }

    /// Columns of each segment.
    pub fn widths(&self) -> Vec<usize> {
        self.segments.iter().map(|s| s.cols).collect()
    }

    /// Mean bits of a code.
    pub fn mean_bits(&self) -> f64 {
        let bits: usize = self.segments.iter().map(|s| s.cols * s.bits as usize).sum();
        bits as f64 / self.cols().max(1) as f64
    }

    /// Checks it against rows of `cols`.
    ///
    /// # Errors
    /// Segments that do not tile a row, bits that no grid has, clips outside `(0, 1]`, half-integer
    /// grids with clips or without symmetry.
    pub fn validate(&self, cols: usize) -> Result<()> {
        let fail = |expected: String, found: String| {
            Err(CoreError::Shape { what: "activation quantizer", expected, found })
        };
        let sum = self.segments.iter().try_fold(0usize, |sum, s| sum.checked_add(s.cols));
        if sum != Some(cols) || self.segments.iter().any(|s| s.cols == 0) {
            return fail(format!("segments of {cols} columns"), format!("{:?}", self.segments));
        }
        let (grid, min) = match self.row_scale {
            None => ("activation", 2),
            Some(_) => ("half-integer activation", 1),
        };
        if let Some(s) = self.segments.iter().find(|s| !(min..=8).contains(&s.bits)) {
            return Err(CoreError::Bits { bits: s.bits, grid, min, max: 8 });
        }
        if self.row_scale.is_some() && (!self.symmetric || self.clip != (1.0, 1.0)) {
            let found = format!("symmetric: {}, clip: {:?}", self.symmetric, self.clip);
            return fail("a symmetric half-integer grid with clips of 1".into(), found);
        }
        let fits = |c: f32| c > 0.0 && c <= 1.0;
        if !fits(self.clip.0) || !fits(self.clip.1) {
            return fail("clip factors in (0, 1]".into(), format!("{:?}", self.clip));
        }
        Ok(())
    }

    /// The grid of `x`, a segment of `bits`. Its step is NaN when a value is not finite, so that
    /// everything that is computed from the codes is NaN too: codes alone would hide it.
    #[inline(always)]
    pub fn grid(&self, x: &[f32], bits: u8) -> ActivationGrid {
        let round = |s: f32| match self.half {
            // Never zero, never infinite.
            true => f16::from_f32(s).clamp(f16::from_bits(1), f16::MAX).to_f32(),
            false => s,
        };
        let half_range = (1u32 << (bits - 1)) as f32;
        let (min, max) = (-half_range, half_range - 1.0);
        if !all_finite(x) {
            return ActivationGrid { scale: f32::NAN, zero: 0.0, min, max, floor: false };
        }
        // Tiny extremes leave no step.
        let positive = |s: f32| if s > 0.0 { s } else { 1.0 };
        if let Some(scale) = self.row_scale {
            let grid = HalfIntegerGrid::new(bits, scale);
            let scale = round(grid.step(grid.end(x)));
            return ActivationGrid { scale, zero: -0.5, min, max, floor: true };
        }
        let (mut lo, mut hi) = extremes(x);
        lo *= self.clip.1;
        hi *= self.clip.0;
        if self.symmetric {
            let magnitude = hi.max(-lo);
            let scale = round(positive(magnitude / (half_range - 1.0)));
            return ActivationGrid { scale, zero: 0.0, min, max, floor: false };
        }
        let levels = 2.0 * half_range - 1.0;
        if hi == lo {
            (lo, hi) = (-1.0, 1.0);
        }
        let scale = round(positive((hi - lo) / levels));
        let zero = (-lo / scale).round_ties_even().clamp(0.0, levels) - half_range;
        ActivationGrid { scale, zero, min, max, floor: false }
    }

    /// Replaces rows by the values that their codes stand for.
    pub fn fake(&self, rows: &mut [f32]) {
        for row in rows.chunks_exact_mut(self.cols().max(1)) {
            let mut rest = row;
            for segment in &self.segments {
                let (x, tail) = rest.split_at_mut(segment.cols);
                let grid = self.grid(x, segment.bits);
                x.iter_mut().for_each(|x| *x = grid.decode(grid.encode(*x)));
                rest = tail;
            }
        }
    }

    /// Codes of one row, with the scale and twice the zero point of each segment.
    pub fn encode_row(
        &self,
        row: &[f32],
        codes: &mut [i8],
        scales: &mut [f32],
        doubled_zeros: &mut [i32],
    ) {
        let mut start = 0;
        for (i, segment) in self.segments.iter().enumerate() {
            let x = &row[start..start + segment.cols];
            let grid = self.grid(x, segment.bits);
            let codes = &mut codes[start..start + segment.cols];
            codes.iter_mut().zip(x).for_each(|(code, x)| *code = grid.encode(*x) as i8);
            scales[i] = grid.scale;
            doubled_zeros[i] = (2.0 * grid.zero) as i32;
            start += segment.cols;
        }
    }
}

/// Whether no value is infinite or NaN.
#[inline(always)]
fn all_finite(x: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let (chunks, rest) = x.as_chunks::<8>();
    let mut lanes = [0u32; 8];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane |= u32::from(x.to_bits() & EXPONENT == EXPONENT);
        }
    }
    lanes == [0; 8] && rest.iter().all(|x| x.is_finite())
}

/// Least and largest of the values and zero.
#[inline(always)]
fn extremes(x: &[f32]) -> (f32, f32) {
    const LANES: usize = 8;
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn codes(q: &ActivationQuantizer, x: &[f32]) -> (Vec<i8>, f32, i32) {
        let mut codes = vec![0; x.len()];
        let (mut scale, mut zero) = ([0.0; 4], [0; 4]);
        q.encode_row(x, &mut codes, &mut scale, &mut zero);
        assert_eq!(zero[0] % 2, 0);
        (codes, scale[0], zero[0] / 2)
    }

    /// T1 of ResQ's specification.
    #[test]
    fn golden_rows() {
        let x = [-1.0, -0.42, 0.0, 0.33, 0.77, 2.0];
        for (bits, scale, zero, want) in [
            (4u8, 0.2f32, 5, [0, 3, 5, 7, 9, 15]),
            (8, 0.011_764_7, 85, [0, 49, 85, 113, 150, 255]),
            (6, 0.047_619, 21, [0, 12, 21, 28, 37, 63]),
            (2, 1.0, 1, [0, 1, 1, 1, 2, 3]),
        ] {
            let q = ActivationQuantizer::plain(6, bits, false);
            let (got, s, z) = codes(&q, &x);
            let half = 1i32 << (bits - 1);
            assert_eq!(got.map_to(half), want, "{bits} bits");
            approx::assert_relative_eq!(s, scale, max_relative = 1e-5);
            assert_eq!(z + half, zero);
        }
        let q = ActivationQuantizer::plain(6, 4, true);
        // −1 is a tie in exact arithmetic, and f32 has no 2/7.
        let (got, s, z) = codes(&q, &[-1.001, -0.42, 0.0, 0.33, 0.77, 2.0]);
        assert_eq!((got.as_slice(), z), (&[-4i8, -1, 0, 1, 3, 7][..], 0));
        approx::assert_relative_eq!(s, 0.285_714_3, max_relative = 1e-6);
        let (got, ..) = codes(&ActivationQuantizer::plain(6, 8, true), &x);
        assert_eq!(got, [-64, -27, 0, 21, 49, 127]);
    }

    trait MapTo {
        fn map_to(&self, half: i32) -> Vec<i32>;
    }

    impl MapTo for Vec<i8> {
        fn map_to(&self, half: i32) -> Vec<i32> {
            self.iter().map(|c| *c as i32 + half).collect()
        }
    }

    /// Section 8 of QuEST's specification; the values are those of training, to the bit.
    #[test]
    fn golden_rows_of_half_integers() {
        let x = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, 3.0];
        let rows: [(u8, [i8; 8]); 4] = [
            (1, [0, -1, 0, -1, 0, -1, 0, 0]),
            (2, [0, -1, 0, -1, 0, -1, 0, 1]),
            (3, [0, -1, 0, -1, 0, -1, 1, 3]),
            (4, [0, -1, 0, -2, 1, -2, 1, 7]),
        ];
        for (bits, want) in rows {
            let q = ActivationQuantizer::half_integer(8, bits, RowScale::Rms);
            let (mut codes, mut scale, mut zero) = ([0; 8], [0.0], [0]);
            q.encode_row(&x, &mut codes, &mut scale, &mut zero);
            assert_eq!((codes, zero), (want, [-1]), "{bits} bits");
        }
        for (bits, scale) in (1..=8).flat_map(|b| [(b, RowScale::Rms), (b, RowScale::Largest)]) {
            let mut fake = x;
            ActivationQuantizer::half_integer(8, bits, scale).fake(&mut fake);
            let grid = HalfIntegerGrid::new(bits, scale);
            let step = grid.step(grid.end(&x));
            assert_eq!(fake, x.map(|x| grid.value(x, step)));
        }
    }

    #[test]
    fn zeros_stay_zero() {
        for symmetric in [true, false] {
            let mut x = [0.0; 12];
            ActivationQuantizer::plain(12, 4, symmetric).fake(&mut x);
            assert_eq!(x, [0.0; 12]);
        }
    }

    proptest! {
        /// Without a clip the error is at most half a step; codes and fake values agree; what is on
        /// the grid stays there; segments do not see each other.
        #[test]
        fn codes_are_the_fake_values(
            x in prop::collection::vec(-4f32..4.0, 10..60), bits in 2u8..=8, high in 0usize..9,
            kind in 0usize..4, half in any::<bool>(),
        ) {
            let mut q = ActivationQuantizer::tiered(x.len(), bits, high, 8, kind != 0);
            q.half = half;
            q.row_scale = [None, None, Some(RowScale::Largest), Some(RowScale::Rms)][kind];
            prop_assert!(q.validate(x.len()).is_ok());
            let mut fake = x.clone();
            q.fake(&mut fake);
            let n = q.segments.len();
            let (mut codes, mut scales, mut zeros) = (vec![0; x.len()], vec![0.0; n], vec![0; n]);
            q.encode_row(&x, &mut codes, &mut scales, &mut zeros);
            for (j, (x, f)) in x.iter().zip(&fake).enumerate() {
                let s = usize::from(j >= q.segments[0].cols);
                let value = (2 * codes[j] as i32 - zeros[s]) as f32 * (0.5 * scales[s]);
                prop_assert_eq!(value, *f);
                if q.row_scale == Some(RowScale::Rms) {
                    continue;
                }
                // Half a step for rounding, half for the zero point, and what f16 takes away.
                let most = scales[s] * (if half { 1.2 } else { 1.001 });
                prop_assert!((x - f).abs() <= most, "{} {} {}", x, f, scales[s]);
            }
        }
    }

    /// Codes cannot say it, so steps do; and what is too small for a step is zero.
    #[test]
    fn what_is_not_finite_stays_so_and_tiny_rows_are_zero() {
        let mut half = ActivationQuantizer::plain(19, 4, false);
        half.half = true;
        let all = [
            ActivationQuantizer::plain(19, 4, true),
            ActivationQuantizer::plain(19, 8, false),
            half,
            ActivationQuantizer::half_integer(19, 1, RowScale::Rms),
        ];
        for q in all {
            for (at, bad) in [(0, f32::NAN), (9, f32::INFINITY), (18, f32::NEG_INFINITY)] {
                let mut x: Vec<f32> = (0..19).map(|i| i as f32 - 9.0).collect();
                x[at] = bad;
                assert!(codes(&q, &x).1.is_nan(), "{q:?}");
                q.fake(&mut x);
                assert!(x.iter().all(|v| v.is_nan()), "{q:?}");
            }
            let mut tiny = [f32::from_bits(1); 19];
            q.fake(&mut tiny);
            assert!(tiny.iter().all(|v| v.abs() <= 1e-6), "{q:?}: {tiny:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let q = ActivationQuantizer::tiered(16, 4, 4, 8, true);
        assert!(q.validate(16).is_ok() && q.validate(17).is_err());
        assert_eq!(q.mean_bits(), 5.0);
        assert!(ActivationQuantizer { clip: (0.0, 1.0), ..q.clone() }.validate(16).is_err());
        assert!(ActivationQuantizer::plain(16, 1, false).validate(16).is_err());
        let q = ActivationQuantizer::half_integer(16, 1, RowScale::Rms);
        assert!(q.validate(16).is_ok() && q.validate(15).is_err());
        assert!(ActivationQuantizer { symmetric: false, ..q.clone() }.validate(16).is_err());
        assert!(ActivationQuantizer { clip: (1.0, 0.9), ..q.clone() }.validate(16).is_err());
        assert!(ActivationQuantizer::half_integer(16, 9, RowScale::Rms).validate(16).is_err());
    }
}
