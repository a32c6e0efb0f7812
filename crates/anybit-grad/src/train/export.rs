//! The trained model as a checkpoint that does not need the trainer.
//!
//! What is multiplied in training, `X̂_h Ŵ_hᵀ`, becomes either a *packed* checkpoint, with codes of
//! `Ŵ_h` and the rotation and rounding of the inputs recorded at the sites, or, where the format
//! has no codes for an estimator's values, a *dense* one with `Ŵ = Ŵ_h H`: ordinary weights that
//! happen to lie on a grid in a rotated basis; their inputs are not rounded. Called at the end of a
//! run.

use std::path::Path;

use anybit_core::Hadamard;
use anybit_io::atomic::PartialFolder;
use serde::{Deserialize, Serialize};

use super::checkpoint::write_dense;
use super::{QuantizedDecoder, Result, TrainRecipe};
use crate::{EstimatorSpec, Tape, Tensor};

/// What the model's files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Numbers; inputs of linears are not rounded.
    Dense,
}

/// How the model of `student` is written.
pub fn format(_student: &QuantizedDecoder) -> Format {
    Format::Dense
}

/// Writes the model into `folder`.
///
/// # Errors
/// What the operating system refuses.
pub fn write(student: &mut QuantizedDecoder, recipe: &TrainRecipe, folder: &Path) -> Result<()> {
    let partial = PartialFolder::create(folder, false, true)?;
    let tensors = dense(student);
    let list: Vec<(String, &Tensor)> = tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
    let config = &student.decoder.config;
    write_dense(partial.path(), config, &list, &recipe.out.join("tokenizer"))?;
    Ok(partial.finish()?)
}

/// Every parameter, those of the linears rounded and in their own basis.
pub fn dense(student: &QuantizedDecoder) -> Vec<(String, Tensor)> {
    let mut tape = Tape::default();
    let weights = student.weights(&mut tape, false);
    let block = student.recipe.weights.as_ref().map_or(0, EstimatorSpec::basis);
    let rotation = Hadamard::new(block.max(1)).ok().filter(|_| block > 1);
    let linears =
        student.decoder.config.block_linears().map(|(name, ..)| format!(".{name}.weight"));
    let tensor = |(name, var): (String, crate::Var)| {
        let mut tensor = tape.value(var).clone();
        if let Some(rotation) = &rotation
            && linears.iter().any(|linear| name.ends_with(linear))
        {
            rotation.apply(tensor.data_mut());
        }
        (name, tensor)
    };
    weights.operands().named().into_iter().map(tensor).collect()
}
