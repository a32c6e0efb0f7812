//! [`Operand`]: activations as 16-bit integers, run by run of four blocks.
//!
//! Values are rounded to 15 bits of the largest of 256 columns, which is finer than the f16 that
//! others compute with; quantized activations are integers already and stay exactly what they are. With
//! `A = 2a` and a weight `(u − z)·s_w`
//!
//! ```text
//! Σ (u − z)·s_w · a·s_a = ½·s_w·s_a · ( Σ u·A − 2z·Σ a )
//! ```
//!
//! and everything in the bracket is an integer for half-integer `z` too.

use super::lines::Lines;
use super::plane::BLOCK;
use crate::QuantizedRows;

/// Largest magnitude of `a`.
const LARGEST: f32 = 16383.0;
/// Blocks that share a scale: their integers add up in an i32 whatever the grid.
pub(super) const RUN: usize = 4;
/// Lanes of a vector of sums.
pub(super) const LANES: usize = 8;

/// Activations of some tokens for the columns of one plane.
#[derive(Debug, Clone, Default)]
pub(super) struct Operand {
    pub tokens: usize,
    pub blocks: usize,
    /// Runs of a token, the last one shorter.
    pub runs: usize,
    /// `A`, `[tokens, blocks, 64]`; zero behind the last column.
    pub codes: Lines<i16>,
    /// What `A·u` = 1 is worth but for the weight's scale, `[tokens, runs]`.
    pub scales: Vec<f32>,
    /// `Σ a` of either half of a block as vector lanes sum it: lane `l` holds the columns `2l`
    /// and `2l + 1` of every sixteen. `[tokens, blocks, 2, 8]`.
    pub sums: Vec<i32>,
}

impl Operand {
    fn reset(&mut self, tokens: usize, cols: usize) {
        let blocks = cols.div_ceil(BLOCK);
        (self.tokens, self.blocks, self.runs) = (tokens, blocks, blocks.div_ceil(RUN));
        self.codes.resize(tokens * blocks * BLOCK);
        self.scales.resize(tokens * self.runs, 0.0);
        self.sums.resize(tokens * blocks * 2 * LANES, 0);
    }

    /// Rounds columns `first..first + cols` of rows of `x` of `width` columns, each times its
    /// factor. A value that is not finite makes the token's products NaN.
    pub fn fill(
        &mut self,
        x: &[f32],
        width: usize,
        (first, cols): (usize, usize),
        factors: Option<&[f32]>,
    ) {
        let tokens = x.len() / width;
        self.reset(tokens, cols);
        let (blocks, runs) = (self.blocks, self.runs);
        for (token, x) in x.chunks_exact(width).enumerate() {
            for (run, own) in x[first..first + cols].chunks(RUN * BLOCK).enumerate() {
                let mut values = [0f32; RUN * BLOCK];
                values[..own.len()].copy_from_slice(own);
                if let Some(factors) = factors {
                    let factors = &factors[first + run * RUN * BLOCK..];
                    values.iter_mut().zip(factors).take(own.len()).for_each(|(v, f)| *v *= f);
                }
                let at = token * blocks + run * RUN;
                let count = RUN.min(blocks - run * RUN);
                let codes = &mut self.codes[at * BLOCK..(at + count) * BLOCK];
                self.scales[token * runs + run] = round(&values[..count * BLOCK], codes);
                (at..at + count).for_each(|block| self.sum(block));
            }
        }
    }

    /// Takes columns `first..first + cols` of quantized rows, which are segment `segment`.
    pub fn fill_codes(&mut self, x: &QuantizedRows, segment: usize, (first, cols): (usize, usize)) {
        let segments = x.segments.len();
        let tokens = x.codes.len() / x.cols.max(1);
        self.reset(tokens, cols);
        let (blocks, runs) = (self.blocks, self.runs);
        for (token, row) in x.codes.chunks_exact(x.cols).enumerate() {
            let zero = x.doubled_zeros[token * segments + segment];
            let scale = 0.25 * x.scales[token * segments + segment];
            for (block, own) in row[first..first + cols].chunks(BLOCK).enumerate() {
                let at = token * blocks + block;
                let codes = &mut self.codes[at * BLOCK..(at + 1) * BLOCK];
                codes[own.len()..].fill(0);
                for (code, a) in codes.iter_mut().zip(own) {
                    *code = (2 * (2 * *a as i32 - zero)) as i16;
                }
                self.sum(at);
            }
            self.scales[token * runs..(token + 1) * runs].fill(scale);
        }
    }

    fn sum(&mut self, at: usize) {
        let codes = &self.codes[at * BLOCK..(at + 1) * BLOCK];
        let sums = &mut self.sums[at * 2 * LANES..(at + 1) * 2 * LANES];
        for (sums, codes) in sums.as_chunks_mut::<LANES>().0.iter_mut().zip(codes.chunks_exact(32))
        {
            for (lane, sum) in sums.iter_mut().enumerate() {
                let pair = |at: usize| codes[at] as i32 + codes[at + 1] as i32;
                *sum = (pair(2 * lane) + pair(2 * lane + 16)) / 2;
            }
        }
    }
}

/// Rounds a run to codes and returns its scale.
fn round(values: &[f32], codes: &mut [i16]) -> f32 {
    // As integers, magnitudes compare like the numbers, and what is not finite is largest.
    let largest = values.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff));
    if largest >= f32::INFINITY.to_bits() {
        codes.fill(0);
        return f32::NAN;
    }
    let step = f32::from_bits(largest) / LARGEST;
    let inverse = 1.0 / step;
    if !inverse.is_finite() {
        codes.fill(0);
        return 0.0;
    }
    for (code, v) in codes.iter_mut().zip(values) {
        // Rounds to the nearest integer of this size, ties to even.
        const SHIFT: f32 = 12_582_912.0;
        let rounded = (v * inverse + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32;
        *code = (2 * rounded) as i16;
    }
    0.5 * step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_broken_values_are_seen() {
        let x: Vec<f32> = (0..300).map(|i| ((i * 37 % 41) as f32 - 20.0) * 0.37).collect();
        let mut operand = Operand::default();
        operand.fill(&x, 300, (0, 300), None);
        assert_eq!((operand.blocks, operand.runs), (5, 2));
        for (col, v) in x.iter().enumerate() {
            let scale = operand.scales[col / (RUN * BLOCK)];
            let near = operand.codes[col] as f32 * scale;
            assert!((near - v).abs() <= 1.01 * scale, "{near} {v}");
        }
        assert!(operand.codes[300..].iter().all(|c| *c == 0));
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = x.clone();
            x[270] = broken;
            operand.fill(&x, 300, (0, 300), None);
            assert!(operand.scales[1].is_nan() && !operand.scales[0].is_nan());
        }
        operand.fill(&[0.0; 64], 64, (0, 64), None);
        assert_eq!(operand.scales, [0.0]);
    }
}
