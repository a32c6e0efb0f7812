//! The fastest exact product that a packed weight and an activation quantizer allow.

use anybit_core::{ActivationQuantizer, QuantizedMatrix};

use super::{BinaryWeight, IntegerWeight, QuantizedRows};

/// A packed weight that multiplies with codes.
#[derive(Debug, Clone)]
pub enum CodedWeight {
    /// Signs on both sides.
    Binary(BinaryWeight),
    /// Any affine grids.
    Integer(IntegerWeight),
}

impl CodedWeight {
    /// Prepares `matrix` for the codes of `quantizer`; `None` as for [`IntegerWeight::new`].
    pub fn new(matrix: &QuantizedMatrix, quantizer: &ActivationQuantizer) -> Option<Self> {
        let integer = || IntegerWeight::new(matrix, &quantizer.widths()).map(Self::Integer);
        Self::binary(matrix, quantizer).or_else(integer)
    }

    /// As [`Self::new`] for signs on both sides alone.
    pub fn binary(matrix: &QuantizedMatrix, quantizer: &ActivationQuantizer) -> Option<Self> {
        let bits: Vec<u8> = quantizer.segments.iter().map(|s| s.bits).collect();
        quantizer.row_scale?;
        BinaryWeight::new(matrix, &quantizer.widths(), &bits).map(Self::Binary)
    }

    /// Bytes in memory.
    pub fn stored_bytes(&self) -> usize {
        match self {
            Self::Binary(weight) => weight.stored_bytes(),
            Self::Integer(weight) => weight.stored_bytes(),
        }
    }

    /// Computes `y[tokens, out] = x · Wᵀ + bias`, where `x` and `W` are the values of their codes.
    ///
    /// # Panics
    /// When `x` is not of the quantizer's codes, or a buffer's length does not fit.
    pub fn forward(&self, x: &QuantizedRows, bias: Option<&[f32]>, y: &mut [f32]) {
        match self {
            Self::Binary(weight) => weight.forward(x, bias, y),
            Self::Integer(weight) => weight.forward(x, bias, y),
        }
    }
}
