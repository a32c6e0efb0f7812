//! A dense f32 matrix, and the one view of a weight that every consumer needs: rows as f32.

use std::ops::Range;

use crate::{CoreError, Result};

/// Weights that can be read row by row as f32, however they are stored.
///
/// Implemented by dense matrices, tensors in a memory-mapped file of any type and
/// [`crate::QuantizedMatrix`]; kernels and quantizers take this and nothing more specific.
pub trait RowSource: Send + Sync {
    /// Rows (`out`) and columns (`in`).
    fn shape(&self) -> (usize, usize);

    /// Decodes `rows` into `out`, `[rows.len(), cols]` row-major.
    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]);

    /// Bytes that the weights occupy as stored: what one pass over them moves.
    fn stored_bytes(&self) -> usize;

    /// Row `row` where it lies, if it is stored in sixteen-bit numbers: products with one token
    /// need no copy of it.
    fn half_row(&self, _row: usize) -> Option<HalfRow<'_>> {
        None
    }
}

/// A row of sixteen-bit numbers, little-endian, at any address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HalfRow<'a> {
    /// IEEE half precision.
    F16(&'a [[u8; 2]]),
    /// The upper half of an f32.
    Bf16(&'a [[u8; 2]]),
}

/// Dense row-major f32 matrix.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `rows · cols` values, row-major.
    pub data: Vec<f32>,
}

impl Matrix {
    /// A matrix of zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Wraps `data`.
    ///
    /// # Errors
    /// [`CoreError::Shape`] when the length is not `rows · cols`.
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Result<Self> {
        if data.len() != rows * cols {
            return Err(CoreError::Shape {
                what: "matrix data",
                expected: format!("{rows}×{cols} = {}", rows * cols),
                found: data.len().to_string(),
            });
        }
        Ok(Self { rows, cols, data })
    }

    /// Decodes all of `source`.
    pub fn from_rows(source: &dyn RowSource) -> Self {
        let (rows, cols) = source.shape();
        let mut m = Self::zeros(rows, cols);
        source.read_rows(0..rows, &mut m.data);
        m
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Row `i`, mutable.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Fails at the first value that is NaN or infinite.
    ///
    /// # Errors
    /// [`CoreError::NotFinite`] with its place.
    pub fn check_finite(&self, what: &'static str) -> Result<()> {
        match self.data.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(at) => Err(CoreError::NotFinite {
                what,
                row: at / self.cols,
                col: at % self.cols,
                value: self.data[at].to_string(),
            }),
        }
    }
}

impl RowSource for Matrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.data[rows.start * self.cols..rows.end * self.cols]);
    }

    fn stored_bytes(&self) -> usize {
        self.data.len() * 4
    }
}
