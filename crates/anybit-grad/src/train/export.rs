//! The trained model as a checkpoint that does not need the trainer.
//!
//! What is multiplied in training, `X̂_h Ŵ_hᵀ`, becomes either a *packed* checkpoint, with the codes
//! of `Ŵ_h` and the rotation and rounding of the inputs recorded at the sites, or, where the format
//! has no codes for an estimator's values, a *dense* one with `Ŵ = Ŵ_h H`: ordinary weights that
//! happen to lie on a grid in a rotated basis, whose inputs are not rounded. Called at the end of a
//! run.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{
    ActivationQuantizer, Hadamard, Matrix, QuantizedMatrix, RowScale, Site, SiteState, Transform,
    rounding::half_integer,
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
    match grids(student) {
        Some(_) => Format::Packed,
        None => Format::Dense,
    }
}

/// Writes the model into `folder`.
///
/// # Errors
/// What the operating system refuses.
pub fn write(student: &QuantizedDecoder, recipe: &TrainRecipe, folder: &Path) -> Result<()> {
    let partial = PartialFolder::create(folder, false, true)?;
    let tokenizer = recipe.out.join("tokenizer");
    match grids(student) {
        Some(grids) => {
            write_model(&packed(student, recipe, grids)?, partial.path())?;
            copy_files(&tokenizer, partial.path())?;
        }
        None => {
            let tensors = dense(student);
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
            let values = block.params[&format!("{linear}.weight")].data().to_vec();
            let fail = |source| TrainError::from(IoError::Matrix { name: name.clone(), source });
            let mut matrix = Matrix { rows: out, cols, data: values };
            if weights.block > 0 {
                Hadamard::blocks(cols, weights.block).map_err(fail)?.apply(&mut matrix.data);
            }
            let plane = half_integer(&matrix, weights.bits, None, weights.scale).map_err(fail)?;
            let codes = QuantizedMatrix::single(plane);
            let measured = Measured::against(&matrix, &codes);
            quantized.insert(name.clone(), (codes, measured));
        }
        for site in Site::ALL {
            let before = block.sites.at(site).transform.clone();
            let cols = config.site_size(site);
            let name = format!("model.layers.{}.{}", block.layer, site.name());
            let state = match site.linears().is_empty() {
                true => SiteState { transform: before, quantizer: None },
                false => {
                    let fail =
                        |source| TrainError::from(IoError::Matrix { name: name.clone(), source });
                    let steps = before.map(|t| (*t).clone()).into_iter().chain(
                        rotation(cols, weights.block).map_err(fail)?.map(Transform::Hadamard),
                    );
                    let transform = composed(steps.collect()).map(Into::into);
                    let quantizer = activations
                        .map(|g| ActivationQuantizer::half_integer(cols, g.bits, g.scale));
                    SiteState { transform, quantizer }
                }
            };
            if state.transform.is_some() || state.quantizer.is_some() {
                sites.insert(name, state);
            }
        }
    }
    let rest = dense(student).into_iter().filter(|(name, _)| !quantized.contains_key(name));
    let dense = rest.map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect();
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

fn rotation(cols: usize, block: usize) -> anybit_core::Result<Option<Hadamard>> {
    (block > 0).then(|| Hadamard::blocks(cols, block)).transpose()
}

fn composed(mut steps: Vec<Transform>) -> Option<Transform> {
    match steps.len() {
        0 | 1 => steps.pop(),
        _ => Some(Transform::Compose(steps)),
    }
}

/// Every parameter, those of the linears rounded and in their own basis.
pub fn dense(student: &QuantizedDecoder) -> Vec<(String, Tensor)> {
    let mut tape = Tape::default();
    let weights = student.weights(&mut tape, false);
    let block = student.recipe.weights.as_ref().map_or(0, EstimatorSpec::basis);
    let linears = student.decoder.config.block_linears();
    let tensor = |(name, var): (String, crate::Var)| {
        let mut tensor = tape.value(var).clone();
        let linear = linears.iter().find(|(l, ..)| name.ends_with(&format!(".{l}.weight")));
        if let Some((_, _, cols)) = linear
            && let Ok(Some(rotation)) = rotation(*cols, block)
        {
            rotation.apply(tensor.data_mut());
        }
        (name, tensor)
    };
    weights.operands().named().into_iter().map(tensor).collect()
}
