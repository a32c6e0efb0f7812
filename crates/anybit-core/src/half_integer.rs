//! Equal steps around zero, without zero: `±½Δ, ±3/2Δ, … ±c` with `Δ = 2c/(n − 1)` and `n = 2^b`
//! levels. The grid that QuEST trains weights and activations on (Panferov et al., ICML 2025, arXiv
//! 2502.05003), and that of straight-through estimators.
//!
//! ```text
//! c = α*_b · RMS(row) + 1e-8   or   max|row| + 1e-8
//! q = clamp(floor(a / Δ), −n/2, n/2 − 1)        â = (q + ½) Δ
//! ```
//!
//! Zero belongs to `+½Δ`. Training ([`HalfIntegerGrid`]), packed weights
//! ([`crate::rounding::half_integer`]) and quantized activations ([`crate::ActivationQuantizer`])
//! share this arithmetic, so that what was trained is what is computed, to the bit.

use serde::{Deserialize, Serialize};

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

/// What keeps the end of a grid above zero.
pub const EPSILON: f32 = 1e-8;

/// What the end of a row's grid follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowScale {
    /// `α*_b` times the row's root mean square.
    Rms,
    /// The row's largest magnitude.
    Largest,
}

/// `2^bits` equal steps around zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HalfIntegerGrid {
    /// `n`.
    levels: f32,
    /// `α*_b`.
    alpha: f32,
    scale: RowScale,
}

impl HalfIntegerGrid {
    /// The grid of `bits`, whose end follows `scale`.
    ///
    /// # Panics
    /// When `bits` is not 1 to 8.
    pub fn new(bits: u8, scale: RowScale) -> Self {
        assert!((1..=8).contains(&bits), "no half-integer grid of {bits} bits");
        let alpha = ALPHA[bits as usize - 1] as f32;
        Self { levels: (1u32 << bits) as f32, alpha, scale }
    }

    /// `c`, where the grid of a row ends.
    pub fn end(&self, row: &[f32]) -> f32 {
        let end = match self.scale {
            RowScale::Rms => self.alpha * rms(row),
            RowScale::Largest => largest(row),
        };
        end + EPSILON
    }

    /// `Δ` of a grid that ends at `end`.
    #[inline]
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
}

/// Root of the mean square.
pub fn rms(row: &[f32]) -> f32 {
    // Partial sums: enough that the loop vectorizes.
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail: f64 = chunks.remainder().iter().map(|v| (*v as f64).powi(2)).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane += v * v);
    }
    let sum = lanes.iter().map(|lane| *lane as f64).sum::<f64>() + tail;
    (sum / row.len().max(1) as f64).sqrt() as f32
}

/// Largest magnitude, 0 of nothing.
fn largest(row: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(0f32, |most, v| most.max(v.abs()));
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = lane.max(v.abs()));
    }
    lanes.iter().copied().fold(tail, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Hadamard;

    const GOLDEN: [f32; 8] = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, 3.0];

    /// Codes and mean squared error of a row.
    fn coded(row: &[f32], bits: u8) -> (Vec<i32>, f64) {
        let grid = HalfIntegerGrid::new(bits, RowScale::Rms);
        let step = grid.step(grid.end(row));
        let error = |a: &f32| (grid.value(*a, step) as f64 - *a as f64).powi(2);
        let codes = row.iter().map(|a| grid.code(*a, step) as i32).collect();
        (codes, row.iter().map(error).sum::<f64>() / row.len() as f64)
    }

    /// The golden row of section 8 of QuEST's specification, as it is and rotated.
    #[test]
    fn golden_rows() {
        approx::assert_relative_eq!(rms(&GOLDEN), 1.140_175, max_relative = 1e-6);
        let plain: [([i32; 8], f64); 4] = [
            ([0, -1, 0, -1, 0, -1, 0, 0], 0.808_500),
            ([0, -1, 0, -1, 0, -1, 0, 1], 0.269_899),
            ([0, -1, 0, -1, 0, -1, 1, 3], 0.088_169_2),
            ([0, -1, 0, -2, 1, -2, 1, 7], 0.011_284_1),
        ];
        let rotated: [([i32; 8], f64); 4] = [
            ([0, -1, -1, 0, -1, 0, 0, -1], 0.197_780),
            ([1, -1, -2, 0, -2, 0, 1, -2], 0.162_705),
            ([1, -1, -3, 1, -3, 1, 2, -3], 0.073_819_9),
            ([3, -1, -4, 2, -4, 2, 3, -4], 0.009_452_54),
        ];
        let mut turned = GOLDEN;
        Hadamard::new(8).unwrap().apply(&mut turned);
        for (row, table) in [(GOLDEN, plain), (turned, rotated)] {
            for (bits, (codes, mse)) in (1u8..).zip(table) {
                let (found, error) = coded(&row, bits);
                assert_eq!(found, codes, "{bits} bits");
                approx::assert_relative_eq!(error, mse, max_relative = 2e-5);
            }
        }
    }

    /// A row ends where its scale says, and only there: G2.
    #[test]
    fn ends_are_on_the_grid() {
        let row: Vec<f32> = (0..45).map(|i| (i as f32 * 0.7).sin() * 3.0 - 0.4).collect();
        for bits in 1..=8 {
            for scale in [RowScale::Rms, RowScale::Largest] {
                let grid = HalfIntegerGrid::new(bits, scale);
                let end = grid.end(&row);
                let step = grid.step(end);
                for far in [9.0, -9.0] {
                    let value = grid.value(far, step);
                    approx::assert_relative_eq!(value.abs(), end, max_relative = 1e-6);
                }
                assert!(grid.value(0.0, step) > 0.0);
            }
            let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
            assert_eq!(HalfIntegerGrid::new(bits, RowScale::Largest).end(&row), most + EPSILON);
            assert_eq!(HalfIntegerGrid::new(bits, RowScale::Rms).end(&[0.0; 5]), EPSILON);
        }
    }
}
