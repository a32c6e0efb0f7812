//! What stands at a site, in a file: the record in the manifest, the numbers of its transform as
//! f32 tensors `model.layers.N.SITE.transform.PART`.

use std::sync::Arc;

use anybit_core::{ActivationQuantizer, CoreError, SiteState, Transform, TransformSpec};
use serde::{Deserialize, Serialize};

use super::QuantizedRecord;
use crate::safetensors_file::{FileDtype, PlannedTensor, RawTensor};
use crate::{Checkpoint, IoError, Result};

/// What the manifest says of one site.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SiteRecord {
    /// The online transform.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transform: Option<TransformSpec>,
    /// The quantizer behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<ActivationQuantizer>,
    /// Clip factors that were fitted with the transform: of the largest and the smallest value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<(f32, f32)>,
    /// How many of the last channels carry most of the energy and want more bits.
    pub high: usize,
    /// BLAKE3 of the transform's numbers in order, in hex.
    pub blake3: String,
}

/// No transform has more numbers in one part; a manifest that says so is damaged.
const MAX_PART: usize = 1 << 28;

impl SiteRecord {
    /// Describes a transform and what was fitted with it.
    pub fn describe(transform: Option<&Transform>, clip: Option<(f32, f32)>, high: usize) -> Self {
        let bytes = transform.map(site_parts).unwrap_or_default();
        Self {
            transform: transform.map(Transform::spec),
            quantizer: None,
            clip,
            high,
            blake3: QuantizedRecord::hash(bytes.iter().map(Vec::as_slice)),
        }
    }

    /// The tensors that hold the numbers of the site `name`.
    pub fn parts(&self, name: &str) -> Vec<PlannedTensor> {
        let parts = self.transform.iter().flat_map(TransformSpec::parts);
        let planned = parts.map(|(part, shape)| {
            PlannedTensor::new(format!("{name}.transform.{part}"), FileDtype::F32, shape)
        });
        planned.collect()
    }

    /// Stored tensors of the site `name`, in the order in which they are hashed.
    ///
    /// # Errors
    /// Missing parts, or parts of another shape.
    pub fn find_parts<'a>(
        &self,
        name: &str,
        checkpoint: &'a Checkpoint,
    ) -> Result<Vec<&'a RawTensor>> {
        let fail = |found: String| {
            let source =
                CoreError::Shape { what: "transform", expected: "a possible size".into(), found };
            IoError::Matrix { name: name.to_string(), source }
        };
        // Sizes are checked before anything of their size is made.
        let sane = |spec: &TransformSpec| spec.size().is_some_and(|n| n > 0 && n < MAX_PART);
        if let Some(spec) = self.transform.as_ref().filter(|s| !sane(s)) {
            return Err(fail(format!("{spec:?}")));
        }
        let find = |part: PlannedTensor| {
            let found = checkpoint.raw(&part.name)?;
            if found.dtype == part.dtype && found.shape == part.shape {
                return Ok(found);
            }
            let (path, found) = (found.path.clone(), found.shape.clone());
            Err(IoError::Shape { path, name: part.name, expected: part.shape, found })
        };
        self.parts(name).into_iter().map(find).collect()
    }

    /// Reads what stands at the site `name`, whose rows have `cols` channels.
    ///
    /// # Errors
    /// Missing parts, sizes that do not fit, numbers that are not finite.
    pub fn load(&self, name: &str, cols: usize, checkpoint: &Checkpoint) -> Result<SiteState> {
        let fail = |source| IoError::Matrix { name: name.to_string(), source };
        let parts = self.find_parts(name, checkpoint)?;
        let mut values = parts.iter().map(|raw| {
            let bytes = raw.bytes().as_chunks::<4>().0;
            bytes.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>()
        });
        let transform = self.transform.as_ref().map(|t| t.build(&mut values)).transpose();
        let transform = transform.map_err(fail)?;
        if let Some(t) = transform.as_ref().filter(|t| t.size() != cols) {
            let (expected, found) = (cols.to_string(), t.size().to_string());
            return Err(fail(CoreError::Shape { what: "transform", expected, found }));
        }
        if let Some(quantizer) = &self.quantizer {
            quantizer.validate(cols).map_err(fail)?;
        }
        Ok(SiteState { transform: transform.map(Arc::new), quantizer: self.quantizer.clone() })
    }
}

/// The stored numbers of a transform, in the order of [`SiteRecord::parts`].
pub fn site_parts(transform: &Transform) -> Vec<Vec<u8>> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    transform.values().into_iter().map(bytes).collect()
}
