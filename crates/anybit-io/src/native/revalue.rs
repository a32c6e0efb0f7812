//! A packed checkpoint written again with other values behind the same codes: what training of
//! scales and codebooks ends in. Codes, zero points, permutations, sparse parts, transforms and
//! every tensor that is not named are copied byte by byte, so that files keep their size and layout.
//!
//! What such a checkpoint was made from is the packed one, not the model before it, which need not
//! be at hand: `base_model` names the packed one, recorded errors are against what it decodes to,
//! and `verify --reference` checks them against it.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{GridSpec, QuantizedMatrix};
use half::f16;
use serde_json::Value;

use super::matrix::linear_name;
use super::{Manifest, Measured, QuantizedRecord, write_descriptions};
use crate::checkpoint::read_json;
use crate::convert::encode;
use crate::safetensors_file::{FileLayout, PlannedTensor, layout_in_shards};
use crate::{Checkpoint, IoError, Result};

/// What is written in the place of a packed checkpoint's values.
pub struct Revalued<'a> {
    /// The packed checkpoint.
    pub source: &'a Checkpoint,
    /// Settings, for information.
    pub recipe: Value,
    /// Matrices with the codes and the layout of the source's, and their error against those.
    pub quantized: BTreeMap<String, (QuantizedMatrix, Measured)>,
    /// Values of tensors that are stored unquantized, to be rounded to the source's type.
    pub dense: BTreeMap<String, Vec<f32>>,
}

/// Writes weight files, manifest and `config.json` into `folder`, which exists.
///
/// # Errors
/// A source that is not packed, tensors that it does not have or that have another size there, or
/// what the system refuses.
pub fn write_revalued(model: &Revalued<'_>, folder: &Path) -> Result<Manifest> {
    let source = model.source;
    let mut manifest = source.manifest().cloned().ok_or_else(|| {
        let what = "not a packed checkpoint of anybit: it has no codes to keep";
        IoError::unsupported(&source.path, what)
    })?;
    let mut changed = BTreeMap::new();
    record_matrices(model, &mut manifest, &mut changed)?;
    for (name, values) in &model.dense {
        let record = manifest.dense.get_mut(name).ok_or_else(|| missing(source, name))?;
        let Some(dtype) = record.element() else {
            let what = format!("{name} is stored as {}, which cannot be written", record.dtype);
            return Err(IoError::unsupported(&source.path, what));
        };
        let mut bytes = Vec::new();
        encode(dtype, values, &mut bytes);
        record.blake3 = QuantizedRecord::hash(std::iter::once(bytes.as_slice()));
        changed.insert(name.clone(), bytes);
    }
    let files = layouts(source);
    for file in &files {
        file.write(folder, |tensor, out| {
            let bytes = match changed.get(&tensor.name) {
                Some(bytes) => bytes.as_slice(),
                None => source.raw(&tensor.name)?.bytes(),
            };
            out.write_all(bytes).map_err(|e| IoError::file("write", folder, e))
        })?;
    }
    manifest.anybit_version = env!("CARGO_PKG_VERSION").into();
    let absolute = std::path::absolute(&source.path).unwrap_or(source.path.clone());
    manifest.base_model = absolute.file_name().unwrap_or_default().to_string_lossy().into_owned();
    manifest.recipe = model.recipe.clone();
    // Against the source no norm took up anything.
    manifest.folded.clear();
    let config = read_json(&source.path.join("config.json"))?.unwrap_or_default();
    let summary = &config["quantization_config"];
    write_descriptions(&source.config, &files, &manifest, summary, folder)?;
    Ok(manifest)
}

/// The records of all matrices as they will be; `changed` gets the bytes of their new parts.
fn record_matrices(
    model: &Revalued<'_>,
    manifest: &mut Manifest,
    changed: &mut BTreeMap<String, Vec<u8>>,
) -> Result<()> {
    if let Some(name) = model.quantized.keys().find(|n| !manifest.quantized.contains_key(*n)) {
        return Err(missing(model.source, name));
    }
    for (name, record) in &mut manifest.quantized {
        record.output_error = None;
        let Some((matrix, measured)) = model.quantized.get(name) else {
            record.relative_error = 0.0;
            continue;
        };
        let values = value_parts(name, matrix);
        let mut parts = Vec::new();
        for part in record.parts(name) {
            parts.push(match values.get(&part.name) {
                Some(bytes) => bytes.as_slice(),
                None => model.source.raw(&part.name)?.bytes(),
            });
        }
        record.blake3 = QuantizedRecord::hash(parts.into_iter());
        record.relative_error = measured.relative_error;
        record.decoded_norm = measured.decoded_norm;
        changed.extend(values);
    }
    Ok(())
}

/// The parts of a matrix that hold values, by the names of their tensors.
fn value_parts(tensor: &str, matrix: &QuantizedMatrix) -> BTreeMap<String, Vec<u8>> {
    let linear = linear_name(tensor);
    let halves = |values: &[f16]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut parts = BTreeMap::new();
    for (i, plane) in matrix.planes.iter().enumerate() {
        let place = format!("{}.{}", i / matrix.column_groups, i % matrix.column_groups);
        let kind = match plane.grid {
            GridSpec::Codebook { .. } => "codebook",
            _ => "scales",
        };
        let values = match plane.grid.has_exact_scales() {
            true => plane.exact_scales.iter().flat_map(|v| v.to_le_bytes()).collect(),
            false => halves(&plane.scales),
        };
        parts.insert(format!("{linear}.{kind}.{place}"), values);
        if !plane.table.is_empty() {
            parts.insert(format!("{linear}.table.{place}"), halves(&plane.table));
        }
    }
    if let Some(scale) = &matrix.column_scale {
        parts.insert(format!("{linear}.column_scale"), halves(scale));
    }
    parts
}

/// The source's files, tensor by tensor.
fn layouts(source: &Checkpoint) -> Vec<FileLayout> {
    let mut files: BTreeMap<&Path, Vec<PlannedTensor>> = BTreeMap::new();
    for (name, raw) in source.raw_tensors() {
        let tensor = PlannedTensor::new(name.clone(), raw.dtype, raw.shape.clone());
        files.entry(raw.path.as_path()).or_default().push(tensor);
    }
    let mut all = Vec::new();
    for (path, tensors) in files {
        for mut file in layout_in_shards(tensors, u64::MAX) {
            file.file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            all.push(file);
        }
    }
    all
}

fn missing(source: &Checkpoint, name: &str) -> IoError {
    IoError::MissingTensor { path: source.path.clone(), name: name.into(), near: String::new() }
}
