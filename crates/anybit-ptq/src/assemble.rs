//! The final folder: packed matrices from the journal, everything else from the source, and the
//! manifest with a hash of each.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{QuantizedMatrix, RowSource};
use anybit_io::convert::{copy_text_files, encode};
use anybit_io::native::{
    DenseRecord, Manifest, QuantizedRecord, format_version, has_trained_grids, write_descriptions,
};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, RawTensor};
use anybit_io::{Checkpoint, Dtype, IoError};
use serde_json::json;

use crate::driver::Event;
use crate::journal::{Journal, block_name};
use crate::plan::{EMBEDDING, HEAD};
use crate::{Calibration, Plan, Recipe, Result};

/// Writes the weight files, `config.json`, the manifest and the tokenizer into `folder`.
///
/// # Errors
/// What reading and writing report.
pub fn write(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    plan: &Plan,
    calibration: &Calibration,
    journal: &Journal,
    folder: &Path,
    observe: &mut dyn FnMut(Event),
) -> Result<()> {
    let mut parts = BTreeMap::new();
    for name in journal_names(checkpoint, plan) {
        parts.extend(journal.parts(&name)?);
    }
    let total = plan.weight_bytes();
    let mut done = 0;
    let mut dense = BTreeMap::new();
    for file in &plan.files {
        file.write(folder, |tensor, out| {
            match parts.get(&tensor.name) {
                Some(part) => {
                    let fail = |e| IoError::file("write", folder, e);
                    out.write_all(part.bytes()).map_err(fail)?;
                    // A norm that took up factors.
                    if plan.dense.iter().any(|t| t.name == tensor.name) {
                        let hash = blake3::hash(part.bytes()).to_hex().to_string();
                        dense.insert(tensor.name.clone(), dense_record(tensor, hash));
                    }
                }
                None => {
                    let hash = copy_dense(checkpoint, tensor, out)?;
                    dense.insert(tensor.name.clone(), dense_record(tensor, hash));
                }
            }
            done += tensor.bytes();
            observe(Event::Assembling(done, total));
            Ok(())
        })?;
    }
    let trained = has_trained_grids(journal.records(), &plan.sites);
    let version = format_version(!plan.sites.is_empty(), trained);
    let manifest = Manifest {
        format_version: version.0,
        format_minor: version.1,
        anybit_version: env!("CARGO_PKG_VERSION").into(),
        base_model: base_name(checkpoint),
        recipe: json!(recipe.published()),
        calibration: calibration.description.clone(),
        quantized: journal.records().clone(),
        dense,
        folded: journal.folded().clone(),
        transform: checkpoint.manifest().and_then(|m| m.transform.clone()),
        transformed: checkpoint.has_sites().then(|| folder_name(&checkpoint.path)),
        sites: plan.sites.clone(),
    };
    let summary = json!({
        "method": recipe.method,
        "transform": recipe.transform,
        "activation_bits": recipe.a_bits,
        "kv_bits": recipe.kv_bits,
    });
    write_descriptions(&checkpoint.config, &plan.files, &manifest, &summary, folder)?;
    copy_text_files(checkpoint, folder)?;
    Ok(())
}

fn journal_names(checkpoint: &Checkpoint, plan: &Plan) -> Vec<String> {
    let mut names: Vec<String> = (0..checkpoint.config.num_layers)
        .filter(|l| plan.block(*l).next().is_some())
        .map(block_name)
        .collect();
    names.extend(plan.matrix(EMBEDDING).map(|_| "embedding".into()));
    names.extend(plan.matrix(HEAD).map(|_| "head".into()));
    names
}

/// Name of the source's folder or file: never its path, which says more about a machine than
/// about a model.
pub fn base_name(checkpoint: &Checkpoint) -> String {
    // A transformed model knows what it comes from.
    if let Some(manifest) = checkpoint.manifest() {
        return manifest.base_model.clone();
    }
    folder_name(&checkpoint.path)
}

fn folder_name(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or(path.to_owned());
    absolute.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn dense_record(tensor: &PlannedTensor, blake3: String) -> DenseRecord {
    let dtype = tensor.dtype.to_string();
    DenseRecord { dtype, shape: tensor.shape.clone(), bytes: tensor.bytes(), blake3 }
}

/// Copies a tensor that stays unquantized, bit for bit where its type can be kept.
fn copy_dense(
    checkpoint: &Checkpoint,
    planned: &PlannedTensor,
    out: &mut dyn std::io::Write,
) -> anybit_io::Result<String> {
    let fail = |e| IoError::file("write", Path::new(&planned.name), e);
    let tensor = checkpoint.tensor(&planned.name)?;
    let mut hasher = blake3::Hasher::new();
    let (rows, cols) = RowSource::shape(&tensor);
    let step = ((1 << 20) / cols.max(1)).max(1);
    let dtype = match planned.dtype {
        FileDtype::BF16 => Dtype::BF16,
        FileDtype::F16 => Dtype::F16,
        _ => Dtype::F32,
    };
    let mut bytes = Vec::new();
    for first in (0..rows).step_by(step) {
        let last = (first + step).min(rows);
        let mut values = vec![0f32; (last - first) * cols];
        tensor.read_rows(first..last, &mut values);
        encode(dtype, &values, &mut bytes);
        hasher.update(&bytes);
        out.write_all(&bytes).map_err(fail)?;
        if last == rows || last % (8 * step) == 0 {
            tensor.release();
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Rebuilds a packed matrix from its stored parts.
///
/// # Errors
/// Parts that do not fit the record.
pub fn matrix_from_parts(
    tensor: &str,
    record: &QuantizedRecord,
    parts: &BTreeMap<String, RawTensor>,
) -> Result<QuantizedMatrix> {
    Ok(record.load_with(tensor, |name| {
        parts.get(name).ok_or_else(|| IoError::MissingTensor {
            path: "journal".into(),
            name: name.into(),
            near: String::new(),
        })
    })?)
}
