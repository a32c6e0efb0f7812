//! [`Operand`]: activations as 16-bit integers, run by run of four blocks.
//!
//! Values are rounded to 15 bits of the largest of 256 columns; quantized activations are integers
//! already and stay exactly what they are. With `A = 2a` and a weight `(u − z)·s_w`
//!
//! ```text
//! Σ (u − z)·s_w · a·s_a = ½·s_w·s_a · ( Σ u·A − 2z·Σ a )
//! ```
//!
//! and everything in the bracket is an integer for half-integer `z` too.

use super::lines::Lines;
use crate::{DisjointMut, QuantizedRows, SpinPool};

/// Columns of a block.
pub(super) const BLOCK: usize = 64;

/// Tokens that one task rounds.
const TASK: usize = 8;
/// Largest magnitude of `a`.
const LARGEST: f32 = 16383.0;
/// Blocks that share a scale: their integers add up in an i32 whatever the grid.
pub(super) const RUN: usize = 4;
/// Halves of blocks in a run.
pub(super) const HALVES: usize = 2 * RUN;

/// Activations of some tokens for the columns of one plane.
#[derive(Debug, Clone, Default)]
pub(super) struct Operand {
    pub tokens: usize,
    pub blocks: usize,
    /// Runs of a token, the last one may be shorter.
    pub runs: usize,
    /// `A`, `[tokens, blocks, 64]`; zero behind the last column.
    pub codes: Lines<i16>,
    /// What `A·u` = 1 is worth but for the weight's scale, `[tokens, runs]`.
    pub scales: Vec<f32>,
    /// `Σ a` of either half of a block, `[tokens, blocks, 2]`.
    pub sums: Vec<i32>,
    /// Tokens that lie side by side in `wide` and `wide_scales`; one when these are not used.
    pub width: usize,
    /// Codes of tokens side by side, two columns of each: `[⌈tokens / width⌉, columns / 2, width, 2]`.
    wide: Lines<i16>,
    /// Their scales, `[⌈tokens / width⌉, runs, width]`.
    wide_scales: Vec<f32>,
    /// Twice the zero point of each token's codes, where these are quantized activations.
    zeros: Vec<i32>,
    /// Quantized activations of tokens side by side, four columns of each, in the order 0, 2, 1, 3:
    /// `[⌈tokens / width⌉, columns / 4, width, 4]`.
    bytes: Lines<i8>,
}

/// Quantized activations of a group of tokens that lie side by side.
pub(super) struct Bytes<'a> {
    /// `[columns / 4, width, 4]`.
    pub codes: &'a [i8],
    /// `[runs, width]`.
    pub scales: &'a [f32],
    /// Twice the zero points of those of `width` tokens that there are.
    pub doubled_zeros: &'a [i32],
}

impl Operand {
    /// Fills each token's codes, scales and sums by `fill(token, codes, scales)`.
    fn fill_with(
        &mut self,
        tokens: usize,
        cols: usize,
        fill: impl Fn(usize, &mut [i16], &mut [f32]) + Sync,
    ) {
        let blocks = cols.div_ceil(BLOCK);
        (self.tokens, self.blocks, self.runs) = (tokens, blocks, blocks.div_ceil(RUN));
        self.width = 1;
        self.zeros.clear();
        self.codes.resize(tokens * blocks * BLOCK);
        self.scales.resize(tokens * self.runs, 0.0);
        self.sums.resize(tokens * blocks * 2, 0);
        let (width, runs) = (blocks * BLOCK, self.runs);
        let codes = DisjointMut::new(&mut self.codes);
        let scales = DisjointMut::new(&mut self.scales);
        let sums = DisjointMut::new(&mut self.sums);
        SpinPool::global().each(tokens.div_ceil(TASK), |task| {
            for token in task * TASK..tokens.min((task + 1) * TASK) {
                // SAFETY: parts of a token, which belongs to this task alone.
                let (codes, scales, sums) = unsafe {
                    let scales = scales.slice(token * runs, runs);
                    (
                        codes.slice(token * width, width),
                        scales,
                        sums.slice(token * 2 * blocks, 2 * blocks),
                    )
                };
                fill(token, codes, scales);
                for (sum, codes) in sums.iter_mut().zip(codes.chunks_exact(BLOCK / 2)) {
                    *sum = codes.iter().map(|code| *code as i32).sum::<i32>() / 2;
                }
            }
        });
    }

    /// Whether these are quantized activations.
    pub fn is_coded(&self) -> bool {
        !self.zeros.is_empty()
    }

    /// Lays quantized activations side by side, `width` of them; behind the last one zeros follow.
    pub fn widen_bytes(&mut self, width: usize) {
        self.width = width;
        let (cols, tokens) = (self.blocks * BLOCK, self.tokens);
        self.bytes.resize(tokens.div_ceil(width) * width * cols);
        let (codes, zeros) = (&self.codes, &self.zeros);
        SpinPool::global().chunks(&mut self.bytes, width * cols, |group, bytes| {
            let fours = bytes.as_chunks_mut::<4>().0;
            for at in 0..width {
                let token = group * width + at;
                let own = fours.iter_mut().skip(at).step_by(width);
                if token >= tokens {
                    own.for_each(|four| *four = [0; 4]);
                    continue;
                }
                let codes = codes[token * cols..(token + 1) * cols].as_chunks::<4>().0;
                let byte = |code: i16| ((code as i32 / 2 + zeros[token]) >> 1) as i8;
                for (own, [a, b, c, d]) in own.zip(codes) {
                    *own = [byte(*a), byte(*c), byte(*b), byte(*d)];
                }
            }
        });
        self.widen_scales(width);
    }

    /// Quantized activations of the tokens of a group that lie side by side.
    pub fn bytes(&self, group: usize) -> Bytes<'_> {
        let (cols, runs) = (self.width * self.blocks * BLOCK, self.width * self.runs);
        let tokens = group * self.width..self.tokens.min((group + 1) * self.width);
        Bytes {
            codes: &self.bytes[group * cols..(group + 1) * cols],
            scales: &self.wide_scales[group * runs..(group + 1) * runs],
            doubled_zeros: &self.zeros[tokens],
        }
    }

    /// Lays scales side by side.
    fn widen_scales(&mut self, width: usize) {
        let (runs, tokens) = (self.runs, self.tokens);
        self.wide_scales.clear();
        self.wide_scales.resize(tokens.div_ceil(width) * width * runs, 0.0);
        for (token, scales) in self.scales.chunks_exact(runs).enumerate() {
            let own = &mut self.wide_scales[token / width * width * runs..];
            let own = own.iter_mut().skip(token % width).step_by(width);
            own.zip(scales).for_each(|(own, scale)| *own = *scale);
        }
    }

    /// Lays tokens side by side, `width` of them; behind the last one zeros follow.
    pub fn widen(&mut self, width: usize) {
        self.width = width;
        if width == 1 {
            return;
        }
        let (cols, tokens) = (self.blocks * BLOCK, self.tokens);
        self.wide.resize(tokens.div_ceil(width) * width * cols);
        let codes = &self.codes;
        SpinPool::global().chunks(&mut self.wide, width * cols, |group, wide| {
            let pairs = wide.as_chunks_mut::<2>().0;
            for at in 0..width {
                let token = group * width + at;
                let own = pairs.iter_mut().skip(at).step_by(width);
                if token >= tokens {
                    own.for_each(|pair| *pair = [0; 2]);
                    continue;
                }
                let codes = codes[token * cols..(token + 1) * cols].as_chunks::<2>().0;
                own.zip(codes).for_each(|(own, pair)| *own = *pair);
            }
        });
        self.widen_scales(width);
    }

    /// Codes and scales of the tokens of a group that lie side by side.
    pub fn group(&self, group: usize) -> (&[i16], &[f32]) {
        let (codes, scales) = match self.width {
            1 => (&self.codes[..], &self.scales[..]),
            _ => (&self.wide[..], &self.wide_scales[..]),
        };
        let (cols, runs) = (self.width * self.blocks * BLOCK, self.width * self.runs);
        (&codes[group * cols..(group + 1) * cols], &scales[group * runs..(group + 1) * runs])
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
        self.fill_with(x.len() / width, cols, |token, codes, scales| {
            let x = &x[token * width + first..][..cols];
            let runs = x.chunks(RUN * BLOCK).zip(codes.chunks_mut(RUN * BLOCK)).zip(scales);
            for (run, ((own, codes), scale)) in runs.enumerate() {
                let mut values = [0f32; RUN * BLOCK];
                values[..own.len()].copy_from_slice(own);
                if let Some(factors) = factors {
                    let factors = &factors[first + run * RUN * BLOCK..];
                    values.iter_mut().zip(factors).take(own.len()).for_each(|(v, f)| *v *= f);
                }
                *scale = round(&values[..codes.len()], codes);
            }
        });
    }

    /// Takes columns `first..first + cols` of quantized rows, which are segment `segment`.
    pub fn fill_codes(&mut self, x: &QuantizedRows, segment: usize, (first, cols): (usize, usize)) {
        let segments = x.segments.len();
        let tokens = x.tokens(x.segments.iter().sum(), &x.segments);
        self.fill_with(tokens, cols, |token, codes, scales| {
            let zero = x.doubled_zeros[token * segments + segment];
            let own = &x.codes[token * x.cols + first..][..cols];
            codes[cols..].fill(0);
            for (code, a) in codes.iter_mut().zip(own) {
                *code = (2 * (2 * *a as i32 - zero)) as i16;
            }
            scales.fill(0.25 * x.scales[token * segments + segment]);
        });
        self.zeros.extend((0..tokens).map(|token| x.doubled_zeros[token * segments + segment]));
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
