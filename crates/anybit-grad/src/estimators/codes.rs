//! Codes of what was trained, for packing.

use anybit_core::{HalfIntegerGrid, RowScale};

use super::EstimatorError;
use super::rotation::{Form, Rotation};

/// Codes `u` below `2^bits` and the step `s` of one row on QuEST's grid, after a rotation in blocks
/// of `hadamard` columns (0 for none): in the rotated basis the quantized value is
///
/// ```text
/// (u − (2^b − 1)/2) · s
/// ```
///
/// to the bit. That is `anybit_core::GridSpec::HalfInteger` with one group per row and exact
/// scales; `u = q + 2^(b−1)` of the signed codes that QuEST's kernels take. Whole matrices are
/// packed by `anybit_core::rounding::half_integer`.
///
/// # Errors
/// [`EstimatorError`] when the bits are not 1 to 8, or the row is not made of whole blocks of a
/// power of two.
pub fn half_integer_codes(
    row: &[f32],
    bits: u8,
    hadamard: usize,
) -> Result<(Vec<u8>, f32), EstimatorError> {
    if !(1..=8).contains(&bits) {
        return Err(EstimatorError::Bits { estimator: "quest", bits, min: 1, max: 8 });
    }
    let rotation = Rotation::new(hadamard, Form::Half)?;
    rotation.check(row.len())?;
    let mut rotated = row.to_vec();
    rotation.rotate(&mut rotated);
    let grid = HalfIntegerGrid::new(bits, RowScale::Rms);
    let step = grid.step(grid.end(&rotated));
    let half = (1u32 << (bits - 1)) as f32;
    let codes = rotated.iter().map(|a| (grid.code(*a, step) + half) as u8).collect();
    Ok((codes, step))
}
