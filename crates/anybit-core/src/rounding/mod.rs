//! Rounding: how the weights of one matrix are put on a grid.
//!
//! [`nearest`] needs the weights alone, and so does [`half_integer()`], for weights that were
//! trained on their grid; [`gptq`] also needs the Gram matrix of the inputs. All return a
//! [`crate::Plane`] and leave the decoded result to be read back from it, so that what is measured
//! is what is stored.

pub mod gptq;
pub mod half_integer;
pub mod nearest;

pub use gptq::{GptqFactor, GptqOptions, gptq, gptq_tiers, gptq_with};
pub use half_integer::half_integer;
pub use nearest::{nearest, nearest_tiers};

use crate::{CoreError, GridSpec, GroupGrid, Result, ScaleFit};

/// Fits the grid of every group of a row.
pub(crate) fn fit_row(
    spec: GridSpec,
    weights: &[f32],
    fit: ScaleFit,
    row: usize,
) -> Result<Vec<GroupGrid>> {
    weights
        .chunks(spec.group_len(weights.len()))
        .enumerate()
        .map(|(group, w)| GroupGrid::fit(spec, w, fit).map_err(|e| place(e, row, group)))
        .collect()
}

/// Fills in where an overflow happened.
pub(crate) fn place(error: CoreError, row: usize, group: usize) -> CoreError {
    match error {
        CoreError::ScaleOverflow { magnitude, .. } => {
            CoreError::ScaleOverflow { row, group, magnitude }
        }
        other => other,
    }
}
