//! `anybit verify`: everything that a packed checkpoint claims of itself, checked.

use anybit_core::{Matrix, RowSource, Site};
use serde::Serialize;

use super::{QuantizedRecord, SiteRecord};
use crate::{Checkpoint, IoError, Result};

/// Something that is not as the manifest says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Problem {
    /// The tensor.
    pub tensor: String,
    /// What is wrong.
    pub what: String,
}

/// Errors are recorded in f64 from f32 values; a recomputed one may differ by rounding alone.
const TOLERANCE: f64 = 1e-6;

/// Checks hashes, shapes, code ranges, finite scales and decoded norms; with the original model
/// also that each recorded error is the real one. Calls `progress` after each tensor.
///
/// # Errors
/// Only when `checkpoint` is not a native one or `original` cannot be read: what is wrong inside
/// the checkpoint is returned as problems.
pub fn verify(
    checkpoint: &Checkpoint,
    original: Option<&Checkpoint>,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<Problem>> {
    let manifest = checkpoint.manifest().ok_or_else(|| {
        let what = "not a packed checkpoint of anybit: there is nothing to verify";
        IoError::unsupported(&checkpoint.path, what)
    })?;
    if let Some(original) = original {
        let basis = original.manifest().and_then(|m| m.transform.as_ref());
        if let Some(transform) = manifest.transform.as_ref().filter(|t| Some(*t) != basis) {
            let what = format!(
                "its weights are in the basis of the transform {transform}: compare them with the \
                 transformed model, which the cache of `quantize` holds"
            );
            return Err(IoError::unsupported(&checkpoint.path, what));
        }
    }
    let total = manifest.quantized.len() + manifest.dense.len() + manifest.sites.len();
    let mut problems = Vec::new();
    let mut report = |tensor: &str, what: String| {
        problems.push(Problem { tensor: tensor.into(), what });
    };
    for (done, (name, record)) in manifest.quantized.iter().enumerate() {
        match check_matrix(checkpoint, original, name, record) {
            Ok(None) => {}
            Ok(Some(what)) => report(name, what),
            Err(e @ (IoError::File { .. } | IoError::NotFinite { .. })) => return Err(e),
            Err(e) => report(name, e.to_string()),
        }
        progress(done + 1, total);
    }
    for (done, (name, record)) in manifest.dense.iter().enumerate() {
        match checkpoint.raw(name) {
            Err(e) => report(name, e.to_string()),
            Ok(raw) => {
                let hash = QuantizedRecord::hash(std::iter::once(raw.bytes()));
                if raw.shape != record.shape || raw.dtype.to_string() != record.dtype {
                    report(name, "its shape or element type is not as recorded".into());
                } else if hash != record.blake3 {
                    report(name, "its bytes do not match the recorded hash".into());
                } else if let Ok(tensor) = checkpoint.tensor(name)
                    && tensor.to_vec().iter().any(|v| !v.is_finite())
                {
                    report(name, "it holds NaN or infinity".into());
                }
            }
        }
        progress(manifest.quantized.len() + done + 1, total);
    }
    for (done, (name, record)) in manifest.sites.iter().enumerate() {
        if let Some(what) = check_site(checkpoint, name, record) {
            report(name, what);
        }
        progress(total - manifest.sites.len() + done + 1, total);
    }
    Ok(problems)
}

fn check_site(checkpoint: &Checkpoint, name: &str, record: &SiteRecord) -> Option<String> {
    let parts = match record.find_parts(name, checkpoint) {
        Ok(parts) => parts,
        Err(e) => return Some(e.to_string()),
    };
    let hash = QuantizedRecord::hash(parts.iter().map(|p| p.bytes()));
    if record.transform.is_some() && hash != record.blake3 {
        return Some("the numbers of its transform do not match the recorded hash".into());
    }
    let (layer, site) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let known = Site::ALL.into_iter().find(|s| s.name() == site);
    let layer = layer.parse::<usize>().ok().filter(|l| *l < checkpoint.config.num_layers);
    let (Some(site), Some(_)) = (known, layer) else {
        return Some("the model has no such site".into());
    };
    let loaded = record.load(name, checkpoint.config.site_size(site), checkpoint);
    loaded.err().map(|e| e.to_string())
}

fn check_matrix(
    checkpoint: &Checkpoint,
    original: Option<&Checkpoint>,
    name: &str,
    record: &QuantizedRecord,
) -> Result<Option<String>> {
    let matrix = record.load(name, checkpoint)?;
    let parts = record.find_parts(name, |part| checkpoint.raw(part))?;
    if QuantizedRecord::hash(parts.iter().map(|p| p.bytes())) != record.blake3 {
        return Ok(Some("its bytes do not match the recorded hash".into()));
    }
    // Of the parts as they are stored, since a permutation can be stored in two ways.
    let bytes: u64 = parts.iter().map(|p| p.bytes().len() as u64).sum();
    if (bytes, matrix.code_bits()) != (record.bytes, record.code_bits) {
        return Ok(Some("its size is not as recorded".into()));
    }
    let decoded = matrix.dequantize();
    let norm = squared_norm(&decoded);
    if !close(norm, record.decoded_norm) {
        let recorded = record.decoded_norm;
        return Ok(Some(format!("it decodes to norm² {norm:e}, recorded was {recorded:e}")));
    }
    let Some(original) = original else { return Ok(None) };
    let weight = Matrix::from_rows(&original.weight(name)?);
    if weight.shape() != decoded.shape() {
        return Ok(Some("the original has another shape: is it the right model?".into()));
    }
    let decoded = match checkpoint.manifest().and_then(|m| m.folded.get(name)) {
        None => decoded,
        Some(norm) => {
            let factors = fold_factors(&checkpoint.vector(norm)?, &original.vector(norm)?);
            if factors.len() != decoded.cols {
                return Ok(Some(format!("{norm}, which took up its factors, has another size")));
            }
            scale_columns(&decoded, &factors)
        }
    };
    let error = relative_error(&weight, &decoded);
    if !close(error, record.relative_error) {
        let recorded = record.relative_error;
        return Ok(Some(format!(
            "its error against this original is {error:e}, recorded was {recorded:e}"
        )));
    }
    Ok(None)
}

/// What each channel of a norm took up: stored over original, 1 where the original is zero.
pub fn fold_factors(stored: &[f32], original: &[f32]) -> Vec<f32> {
    let factor = |(s, o): (&f32, &f32)| if *o == 0.0 { 1.0 } else { s / o };
    stored.iter().zip(original).map(factor).collect()
}

/// `W diag(s)`.
pub fn scale_columns(weights: &Matrix, scale: &[f32]) -> Matrix {
    let mut scaled = weights.clone();
    for row in scaled.data.chunks_mut(scale.len().max(1)) {
        row.iter_mut().zip(scale).for_each(|(w, s)| *w *= s);
    }
    scaled
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * a.abs().max(b.abs()) + 1e-30
}

/// `‖m‖²` in f64.
pub fn squared_norm(m: &Matrix) -> f64 {
    m.data.iter().map(|v| *v as f64 * *v as f64).sum()
}

/// `‖w − q‖² / ‖w‖²` in f64; 0 when both are zero.
pub fn relative_error(w: &Matrix, q: &Matrix) -> f64 {
    let error: f64 = w.data.iter().zip(&q.data).map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum();
    if error == 0.0 { 0.0 } else { error / squared_norm(w).max(f64::MIN_POSITIVE) }
}
