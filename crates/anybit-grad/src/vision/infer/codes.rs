//! Operands as codes, with the arithmetic of their estimators: inputs of one step per tensor or per
//! pixel, weights on half-integer grids. Called by [`super::IntegerNetwork`].

use anybit_core::half_integer::EPSILON;
use anybit_core::{GridSpec, GroupGrid, HalfIntegerGrid, Plane, QuantizedMatrix, RowScale};
use rayon::prelude::*;

use super::TASK;
use crate::{EstimatorSpec, Tensor};

/// A grid of one step for all values: `x̂ = (q + h) s + β`, `q` from `min` to `max`.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepGrid {
    step: f32,
    offset: f32,
    raise: f32,
    min: f32,
    max: f32,
}

impl StepGrid {
    pub fn new(bits: u8, raise: f32, step: f32, offset: f32) -> Self {
        let half = 0.5 * (1u32 << bits) as f32;
        Self { step: step.max(EPSILON), offset, raise, min: -half, max: half - 1.0 }
    }

    /// `q`, with the arithmetic of the estimator.
    #[inline(always)]
    pub fn code(&self, x: f32) -> f32 {
        let steps = (x - self.offset) / self.step;
        (steps - self.raise).round_ties_even().clamp(self.min, self.max)
    }
}

/// How a layer's input becomes codes.
#[derive(Debug, Clone, Copy)]
pub(super) enum InputGrid {
    /// One step for all.
    Tensor(StepGrid),
    /// A step per pixel.
    Pixels(HalfIntegerGrid),
}

/// Pixels as codes.
pub(super) struct PixelCodes {
    /// `[pixels, channels]`.
    pub codes: Vec<i8>,
    /// `[pixels]`.
    pub scales: Vec<f32>,
    /// `2 z_a`.
    pub doubled_zero: i32,
}

impl InputGrid {
    /// The grid of an operand with what it learned; `None` for those without integer codes.
    pub fn new(spec: &EstimatorSpec, learned: &[f32]) -> Option<Self> {
        let rms = |bits: u8| Some(Self::Pixels(HalfIntegerGrid::new(bits, RowScale::Rms)));
        match (*spec, learned) {
            (EstimatorSpec::Lsq { bits, raise_zero }, &[step]) => {
                let raise = if raise_zero { 0.5 } else { 0.0 };
                Some(Self::Tensor(StepGrid::new(bits, raise, step, 0.0)))
            }
            (EstimatorSpec::LsqPlusWeight { bits }, &[step]) => {
                Some(Self::Tensor(StepGrid::new(bits, 0.5, step, 0.0)))
            }
            (EstimatorSpec::LsqPlusActivation { bits }, &[step, offset]) => {
                Some(Self::Tensor(StepGrid::new(bits, 0.0, step, offset)))
            }
            (
                EstimatorSpec::Quest { bits, hadamard: 0, .. }
                | EstimatorSpec::Ste { bits, hadamard: 0, .. }
                | EstimatorSpec::Clip { bits, hadamard: 0, .. },
                _,
            ) => rms(bits),
            (EstimatorSpec::Absmax { bits, hadamard: 0, .. }, _) => {
                Some(Self::Pixels(HalfIntegerGrid::new(bits, RowScale::Largest)))
            }
            _ => None,
        }
    }

    /// `β_a`.
    pub fn offset(&self) -> f32 {
        match self {
            Self::Tensor(grid) => grid.offset,
            Self::Pixels(_) => 0.0,
        }
    }

    /// Puts pixels on the grid.
    pub fn encode(&self, x: &[f32], channels: usize) -> PixelCodes {
        let mut codes = vec![0i8; x.len()];
        let mut scales = vec![0f32; x.len() / channels];
        let pixels = (TASK / channels).max(1);
        let outputs = codes.par_chunks_mut(pixels * channels).zip(scales.par_chunks_mut(pixels));
        let tasks = outputs.zip(x.par_chunks(pixels * channels));
        let doubled_zero = match *self {
            Self::Tensor(grid) => {
                tasks.for_each(|((codes, scales), x)| {
                    scales.fill(grid.step);
                    codes.iter_mut().zip(x).for_each(|(c, x)| *c = grid.code(*x) as i8);
                });
                (-2.0 * grid.raise) as i32
            }
            Self::Pixels(grid) => {
                tasks.for_each(|((codes, scales), x)| {
                    let pixels = codes.chunks_exact_mut(channels).zip(x.chunks_exact(channels));
                    for (scale, (codes, x)) in scales.iter_mut().zip(pixels) {
                        *scale = grid.step(grid.end(x));
                        let code = |x: f32| grid.code(x, *scale) as i8;
                        codes.iter_mut().zip(x).for_each(|(c, x)| *c = code(*x));
                    }
                });
                -1
            }
        };
        PixelCodes { codes, scales, doubled_zero }
    }
}

/// A weight as half-integer codes: row `r` stands for `(u − (2^bits − 1)/2) · scales[r]`.
pub(super) struct Codes {
    bits: u8,
    pub shape: [usize; 2],
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

impl Codes {
    /// The codes of an operand; `None` for grids that are not half-integer.
    pub fn new(spec: &EstimatorSpec, learned: &[f32], weight: &Tensor) -> Option<Self> {
        let shape = [weight.shape()[0], weight.shape()[1]];
        let half = |bits: u8| (1u32 << (bits - 1)) as f32;
        let (mut codes, mut scales) = (Vec::with_capacity(weight.len()), Vec::new());
        let bits = match (*spec, InputGrid::new(spec, learned)?) {
            (EstimatorSpec::Lsq { bits, raise_zero: true }, InputGrid::Tensor(grid))
            | (EstimatorSpec::LsqPlusWeight { bits }, InputGrid::Tensor(grid)) => {
                codes.extend(weight.data().iter().map(|w| (grid.code(*w) + half(bits)) as u8));
                scales.resize(shape[0], grid.step);
                bits
            }
            (
                EstimatorSpec::Quest { bits, .. }
                | EstimatorSpec::Ste { bits, .. }
                | EstimatorSpec::Clip { bits, .. }
                | EstimatorSpec::Absmax { bits, .. },
                InputGrid::Pixels(grid),
            ) => {
                for row in weight.data().chunks_exact(shape[1]) {
                    let step = grid.step(grid.end(row));
                    codes.extend(row.iter().map(|w| (grid.code(*w, step) + half(bits)) as u8));
                    scales.push(step);
                }
                bits
            }
            _ => return None,
        };
        Some(Self { bits, shape, codes, scales })
    }

    /// `z_w`.
    pub fn zero(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32 / 2.0
    }

    /// `Σ_k ŵ_k` of a row.
    pub fn row_sum(&self, row: usize) -> f32 {
        let codes = &self.codes[row * self.shape[1]..][..self.shape[1]];
        let sum: f64 = codes.iter().map(|u| f64::from(*u) - f64::from(self.zero())).sum();
        (sum * f64::from(self.scales[row])) as f32
    }

    /// Packed, with columns in these segments.
    pub fn packed(&self, segments: &[usize]) -> anybit_core::Result<QuantizedMatrix> {
        let [rows, cols] = self.shape;
        let grid = GridSpec::HalfInteger { bits: self.bits, group_size: None, exact: true };
        let (zero, max_code) = (self.zero(), ((1u32 << self.bits) - 1) as f32);
        let (mut planes, mut start) = (Vec::new(), 0);
        for length in segments {
            let mut plane = Plane::empty(grid, rows, *length)?;
            plane.rows_mut().enumerate().for_each(|(row, mut out)| {
                let codes = &self.codes[row * cols + start..][..*length];
                out.set_affine(codes, &[GroupGrid { scale: self.scales[row], zero, max_code }]);
            });
            planes.push(plane);
            start += length;
        }
        QuantizedMatrix::from_planes((rows, cols), planes, segments.len(), None, None)
    }
}
