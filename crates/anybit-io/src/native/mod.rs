//! The native packed checkpoint: a Hugging Face folder whose linears are bit streams, and
//! `anybit.json`, the manifest that says how to decode each of them. Layout: `docs/format.md`.

mod matrix;
mod revalue;
mod sites;
mod verify;
mod write;

pub use matrix::{Measured, PlaneRecord, QuantizedRecord, part_bytes};
pub use revalue::{Revalued, write_revalued};
pub use sites::{SiteRecord, site_parts};
pub use verify::{Problem, fold_factors, relative_error, scale_columns, squared_norm, verify};
pub use write::{PackedModel, write_descriptions, write_model};

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Dtype, IoError, Result};

/// Newest major version of the format that is read: newer ones are rejected by name.
pub const FORMAT_VERSION: u32 = 2;

/// Newest minor version of each major version that this program knows everything of.
const FORMAT_MINOR: [u32; FORMAT_VERSION as usize + 1] = [0, 2, 1];

/// Major and minor version to write. Readers of version 1 do not know sites and would compute
/// something else without them; readers of minor versions before the newest refuse the grids of
/// [`has_trained_grids`], whose keys they do not know.
pub fn format_version(has_sites: bool, trained_grids: bool) -> (u32, u32) {
    match (has_sites, trained_grids) {
        (false, false) => (1, 1),
        (false, true) => (1, 2),
        (true, false) => (2, 0),
        (true, true) => (2, 1),
    }
}

/// Whether a weight has exact scales, or an activation a half-integer grid (formats 1.2 and 2.1).
pub fn has_trained_grids(
    quantized: &BTreeMap<String, QuantizedRecord>,
    sites: &BTreeMap<String, SiteRecord>,
) -> bool {
    let mut planes = quantized.values().flat_map(|r| &r.planes);
    let mut quantizers = sites.values().flat_map(|r| &r.quantizer);
    planes.any(|p| p.grid.has_exact_scales()) || quantizers.any(|q| q.row_scale.is_some())
}

/// Name of the manifest.
pub const MANIFEST: &str = "anybit.json";

/// What the manifest says of a whole checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Major version of the format.
    pub format_version: u32,
    /// Minor version of the format.
    pub format_minor: u32,
    /// Version of the program that wrote it.
    pub anybit_version: String,
    /// Name of the model that was quantized (its folder's or file's name).
    pub base_model: String,
    /// The recipe with every default filled in.
    pub recipe: Value,
    /// Calibration data: name, hash, tokens; null for methods that need none.
    pub calibration: Value,
    /// Packed matrices by tensor name.
    pub quantized: BTreeMap<String, QuantizedRecord>,
    /// Tensors stored unquantized, by name.
    pub dense: BTreeMap<String, DenseRecord>,
    /// Packed matrices whose column factors a norm took up, with the norm's name: the original
    /// weight is near `decoded · diag(stored norm / original norm)` (format 1.1).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub folded: BTreeMap<String, String>,
    /// Name of the transform that the weights went through; none for the original basis
    /// (format 2.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<String>,
    /// Name of the transformed model in the cache of the run that wrote this (format 2.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transformed: Option<String>,
    /// What stands at the sites of the blocks, by `model.layers.N.SITE` (format 2.0).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sites: BTreeMap<String, SiteRecord>,
}

/// A tensor stored unquantized.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DenseRecord {
    /// Element type as safetensors names it.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: u64,
    /// BLAKE3 of the bytes, in hex.
    pub blake3: String,
}

impl DenseRecord {
    /// Its element type, where that is one of those that weights are stored in.
    pub fn element(&self) -> Option<Dtype> {
        match self.dtype.as_str() {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::BF16),
            _ => None,
        }
    }
}

impl Manifest {
    /// Reads `anybit.json` of a folder.
    ///
    /// # Errors
    /// It is missing, broken, or of a newer major version.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(|e| IoError::file("read", &path, e))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| IoError::damaged(&path, e.to_string()))?;
        let version = value["format_version"].as_u64();
        match version {
            Some(v) if v <= FORMAT_VERSION as u64 => {}
            Some(v) => {
                let what = format!(
                    "format version {v} is newer than this program's {FORMAT_VERSION}; update anybit"
                );
                return Err(IoError::unsupported(&path, what));
            }
            None => return Err(IoError::damaged(&path, "no format_version")),
        }
        let minor = value["format_minor"].as_u64().unwrap_or(0);
        let major = version.unwrap_or(0) as usize;
        let known = FORMAT_MINOR.get(major).copied().unwrap_or(0);
        serde_json::from_value(value).map_err(|e| match minor > u64::from(known) {
            true => {
                let what = format!(
                    "format version {major}.{minor} is newer than this program's {major}.{known}, \
                     and holds what it does not know ({e}); update anybit"
                );
                IoError::unsupported(&path, what)
            }
            false => IoError::damaged(&path, e.to_string()),
        })
    }

    /// The manifest as it is written.
    pub fn to_json(&self) -> String {
        let value = serde_json::to_value(self).unwrap_or_default();
        format!("{value:#}\n")
    }

    /// Bits per weight over the linears of the blocks, packed or not: (codes, everything stored,
    /// transforms included).
    /// Embeddings and head are not among them.
    pub fn bits_per_weight(&self) -> (f64, f64) {
        let in_blocks = |name: &str| name.contains(".layers.");
        // In f64: a damaged manifest may say anything, and nothing here overflows.
        let (mut weights, mut codes, mut total) = (0f64, 0f64, 0f64);
        for (_, r) in self.quantized.iter().filter(|(name, _)| in_blocks(name)) {
            weights += r.rows as f64 * r.cols as f64;
            codes += r.code_bits as f64;
            total += r.bytes as f64 * 8.0;
        }
        let transform = |name: &str| name.contains(".transform.");
        for (_, r) in self.dense.iter().filter(|(n, _)| transform(n)) {
            total += r.bytes as f64 * 8.0;
        }
        let kept = |n: &str| in_blocks(n) && n.ends_with("_proj.weight");
        for (_, r) in self.dense.iter().filter(|(n, _)| kept(n)) {
            weights += r.shape.iter().map(|d| *d as f64).product::<f64>();
            codes += r.bytes as f64 * 8.0;
            total += r.bytes as f64 * 8.0;
        }
        let weights = weights.max(1.0);
        (codes / weights, total / weights)
    }
}
