//! The rotation in front of an estimator: `x_h = x H` with `H = blockdiag(H_B, …)`, `H_B` the
//! normalized Walsh–Hadamard matrix in Sylvester's order. It is symmetric and orthogonal, so that
//! the same routine undoes it, and both operands of a linear can be rotated without changing it:
//! `X_h W_hᵀ = X Wᵀ`. (QuEST, algorithm 1; no random signs.)

use anybit_core::Hadamard;
use serde::{Deserialize, Serialize};

use super::EstimatorError;

/// The basis in which a rotated and quantized operand is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// Still rotated, `Â_h`: the product is taken in the rotated basis. Both operands must be.
    #[default]
    Half,
    /// Rotated back, `Â_h H`: stands for the operand itself.
    Full,
}

/// Blocks of columns that are rotated, and the basis that is returned.
#[derive(Debug, Clone)]
pub(super) struct Rotation {
    /// One block; it applies to any number of them.
    map: Option<Hadamard>,
    form: Form,
}

impl Rotation {
    /// Blocks of `block` columns; 0 for none.
    pub fn new(block: usize, form: Form) -> Result<Self, EstimatorError> {
        if block == 0 {
            return Ok(Self { map: None, form });
        }
        if !block.is_power_of_two() {
            return Err(EstimatorError::Block { block });
        }
        let map = Hadamard::new(block).map_err(|_| EstimatorError::Block { block })?;
        Ok(Self { map: Some(map), form })
    }

    /// Whether rows of `cols` are whole blocks.
    pub fn check(&self, cols: usize) -> Result<(), EstimatorError> {
        let unit = self.map.as_ref().map_or(1, Hadamard::block);
        if cols > 0 && cols.is_multiple_of(unit) {
            return Ok(());
        }
        let fix = "choose a Hadamard block that divides K, or 0 for no rotation";
        Err(EstimatorError::Cols { cols, what: "Hadamard blocks", unit, fix })
    }

    /// `x H`, into the basis of the rounding; its own inverse.
    pub fn rotate(&self, x: &mut [f32]) {
        if let Some(map) = &self.map {
            map.apply(x);
        }
    }

    /// From the basis of the rounding into the one that is returned, and the other way.
    pub fn finish(&self, x: &mut [f32]) {
        if self.form == Form::Full {
            self.rotate(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    /// T1, T2, T4 and T5 of the specification.
    #[test]
    fn is_its_own_inverse_and_keeps_lengths() {
        let rotation = Rotation::new(128, Form::Half).unwrap();
        let x = normals(1, 512);
        let mut y = x.clone();
        rotation.rotate(&mut y);
        let norm = |v: &[f32]| v.iter().map(|v| (*v as f64).powi(2)).sum::<f64>().sqrt();
        for (x, y) in x.chunks(128).zip(y.chunks(128)) {
            approx::assert_relative_eq!(norm(x), norm(y), max_relative = 1e-6);
        }
        rotation.rotate(&mut y);
        for (x, y) in x.iter().zip(&y) {
            approx::assert_abs_diff_eq!(x, y, epsilon = 2e-6);
        }
        // Row by row the matrix: its first row is constant, and it is symmetric.
        let mut identity: Vec<f32> =
            (0..128 * 128).map(|i| if i / 128 == i % 128 { 1.0 } else { 0.0 }).collect();
        rotation.rotate(&mut identity);
        let entry = 2f32.powf(-3.5);
        for (j, v) in identity[..128].iter().enumerate() {
            approx::assert_abs_diff_eq!(*v, entry, epsilon = 1e-7);
            for i in 0..128 {
                assert_eq!(identity[i * 128 + j], identity[j * 128 + i]);
            }
        }
        for v in &identity[5 * 128..6 * 128] {
            approx::assert_abs_diff_eq!(10.0 * v.abs(), 0.883_883, epsilon = 1e-5);
        }
    }

    #[test]
    fn blocks_that_do_not_fit_are_named() {
        let block = Rotation::new(24, Form::Half).unwrap_err();
        assert_eq!(block, EstimatorError::Block { block: 24 });
        let rotation = Rotation::new(128, Form::Half).unwrap();
        assert!(rotation.check(640).is_ok());
        assert!(rotation.check(200).unwrap_err().to_string().contains("K = 200"));
        let none = Rotation::new(0, Form::Half).unwrap();
        assert!(none.check(7).is_ok() && none.check(0).is_err());
    }
}
