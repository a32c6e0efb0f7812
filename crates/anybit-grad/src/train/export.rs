//! The trained model as a checkpoint that does not need the trainer.
//!
//! What is multiplied in training, `X̂_h Ŵ_hᵀ`, becomes either a *packed* checkpoint, with the codes
//! of `Ŵ_h` and the rotation and rounding of the inputs recorded at the sites, or, where the format
//! has no codes for an estimator's values, a *dense* one with `Ŵ = Ŵ_h H`: ordinary weights that
//! happen to lie on a grid in a rotated basis, whose inputs are not rounded. A model whose codes were
//! kept is its packed checkpoint with other values ([`super::kept`]). Called at the end of a run.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{
    ActivationQuantizer, CoreError, Hadamard, Matrix, QuantizedMatrix, RowScale, Site, SiteState,
    Transform, rounding::half_integer,
};
use anybit_io::IoError;
use anybit_io::atomic::PartialFolder;
use anybit_io::native::{Measured, PackedModel, write_model};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checkpoint::{copy_files, write_dense};
use super::{QuantizedDecoder, Result, TrainError, TrainRecipe};
use crate::{EstimatorSpec, Tape, Tensor};

/// What the model's files hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Codes; inputs of linears are rounded as in training.
    Packed,
    /// Numbers; inputs of linears are not rounded.
    Dense,
}

/// A grid of [`HalfInteger`](anybit_core::GridSpec::HalfInteger) codes behind a rotation.
#[derive(Clone, Copy)]
struct Grid {
    bits: u8,
    /// Columns of a Hadamard block; 0 for none.
    block: usize,
    scale: RowScale,
}

/// The grid of an estimator, if it is one of these.
fn grid(spec: &EstimatorSpec) -> Option<Grid> {
    match *spec {
        EstimatorSpec::Quest { bits, hadamard, .. }
        | EstimatorSpec::Ste { bits, hadamard, .. }
        | EstimatorSpec::Clip { bits, hadamard, .. } => {
            Some(Grid { bits, block: hadamard, scale: RowScale::Rms })
        }
        EstimatorSpec::Absmax { bits, hadamard, .. } => {
            Some(Grid { bits, block: hadamard, scale: RowScale::Largest })
        }
        _ => None,
    }
}

/// Grids of weights and inputs, if codes can be written: the rotations of both must meet.
fn grids(student: &QuantizedDecoder) -> Option<(Grid, Option<Grid>)> {
    let weights = grid(student.recipe.weights.as_ref()?)?;
    let Some(activations) = &student.recipe.activations else { return Some((weights, None)) };
    let activations = grid(activations)?;
    (weights.block == activations.block).then_some((weights, Some(activations)))
}

/// How the model of `student` is written.
pub fn format(student: &QuantizedDecoder) -> Format {
    match student.kept().is_some() || grids(student).is_some() {
        true => Format::Packed,
        false => Format::Dense,
    }
}

/// Writes the model into `folder`.
///
/// # Errors
/// What the operating system refuses.
pub fn write(student: &QuantizedDecoder, recipe: &TrainRecipe, folder: &Path) -> Result<()> {
    let partial = PartialFolder::create(folder, false, true)?;
    let tokenizer = recipe.out.join("tokenizer");
    if let Some(kept) = student.kept() {
        kept.write(student, recipe, partial.path())?;
        copy_files(&tokenizer, partial.path())?;
        return Ok(partial.finish()?);
    }
    match grids(student) {
        Some(grids) => {
            write_model(&packed(student, recipe, grids)?, partial.path())?;
            copy_files(&tokenizer, partial.path())?;
        }
        None => {
            let tensors = dense(student)?;
            let list: Vec<(String, &Tensor)> =
                tensors.iter().map(|(name, t)| (name.clone(), t)).collect();
            write_dense(partial.path(), &student.decoder.config, &list, &tokenizer)?;
        }
    }
    Ok(partial.finish()?)
}

/// The model in codes.
fn packed(
    student: &QuantizedDecoder,
    recipe: &TrainRecipe,
    (weights, activations): (Grid, Option<Grid>),
) -> Result<PackedModel> {
    let config = student.decoder.config.clone();
    let (mut quantized, mut sites) = (BTreeMap::new(), BTreeMap::new());
    for block in &student.decoder.blocks {
        for (linear, out, cols) in config.block_linears() {
            let name = format!("model.layers.{}.{linear}.weight", block.layer);
            let data = block.params[&format!("{linear}.weight")].data().to_vec();
            let codes = codes(Matrix { rows: out, cols, data }, weights);
            quantized.insert(name.clone(), codes.map_err(|e| named(&name, e))?);
        }
        for site in Site::ALL {
            let name = format!("model.layers.{}.{}", block.layer, site.name());
            let before = block.sites.transform(site);
            let cols = config.site_size(site);
            let state = match site.linears().is_empty() {
                true => SiteState { transform: before.cloned().map(Into::into), quantizer: None },
                false => {
                    state(before, cols, weights.block, activations).map_err(|e| named(&name, e))?
                }
            };
            if state.transform.is_some() || state.quantizer.is_some() {
                sites.insert(name, state);
            }
        }
    }
    let mut tape = Tape::default();
    let masters = student.decoder.vars(&mut tape, &|_| false).named();
    let rest = masters.into_iter().filter(|(name, _)| !quantized.contains_key(name));
    let dense = rest.map(|(name, var)| {
        let tensor = tape.value(var);
        (name, (tensor.shape().to_vec(), tensor.data().to_vec()))
    });
    let dense = dense.collect();
    let transform = sites.values().any(|s| s.transform.is_some());
    Ok(PackedModel {
        config,
        base_model: recipe.out.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        method: student.recipe.weights.as_ref().map_or("none", EstimatorSpec::name).into(),
        recipe: serde_json::to_value(&recipe.quantizer).unwrap_or(Value::Null),
        calibration: Value::Null,
        transform: transform.then(|| format!("hadamard-{}", weights.block)),
        quantized,
        dense,
        sites,
    })
}

fn named(name: &str, source: CoreError) -> TrainError {
    IoError::Matrix { name: name.into(), source }.into()
}

/// A weight in codes, in the basis of its rounding, with what that lost.
fn codes(
    mut weight: Matrix,
    grid: Grid,
) -> std::result::Result<(QuantizedMatrix, Measured), CoreError> {
    rotate(&mut weight.data, weight.cols, grid.block)?;
    let codes = QuantizedMatrix::single(half_integer(&weight, grid.bits, None, grid.scale)?);
    let measured = Measured::against(&weight, &codes);
    Ok((codes, measured))
}

/// What stands at the input of linears: the model's own transform, the rotation, the rounding.
fn state(
    before: Option<&Transform>,
    cols: usize,
    block: usize,
    activations: Option<Grid>,
) -> std::result::Result<SiteState, CoreError> {
    let rotation = (block > 0).then(|| Hadamard::blocks(cols, block)).transpose()?;
    let rotation = rotation.map(Transform::Hadamard);
    let transform = match (before.cloned(), rotation) {
        (Some(before), Some(rotation)) => Some(Transform::Compose(vec![before, rotation])),
        (before, rotation) => before.or(rotation),
    };
    let quantizer =
        activations.map(|grid| ActivationQuantizer::half_integer(cols, grid.bits, grid.scale));
    Ok(SiteState { transform: transform.map(Into::into), quantizer })
}

/// `x H` for rows of `cols`; nothing for a block of 0.
fn rotate(x: &mut [f32], cols: usize, block: usize) -> std::result::Result<(), CoreError> {
    if block > 0 {
        Hadamard::blocks(cols, block)?.apply(x);
    }
    Ok(())
}

/// Every parameter, those of the linears rounded and in their own basis.
fn dense(student: &QuantizedDecoder) -> Result<Vec<(String, Tensor)>> {
    let mut tape = Tape::default();
    let weights = student.weights(&mut tape, false);
    let block = student.recipe.weights.as_ref().map_or(0, EstimatorSpec::basis);
    let linears = student.decoder.config.block_linears();
    let mut tensors = Vec::new();
    for (name, var) in weights.operands().named() {
        let mut tensor = tape.value(var).clone();
        let linear = linears.iter().find(|(l, ..)| name.ends_with(&format!(".{l}.weight")));
        if let Some((_, _, cols)) = linear {
            rotate(tensor.data_mut(), *cols, block).map_err(|e| named(&name, e))?;
        }
        tensors.push((name, tensor));
    }
    Ok(tensors)
}
