//! Writing packed checkpoints: the texts beside the weight files, for everyone who writes one, and
//! a whole model from memory, for those who trained it. Tokenizer and licence are the caller's to
//! add ([`crate::convert::copy_text_files`]).

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{QuantizedMatrix, SiteState};
use serde_json::{Value, json};

use super::{
    DenseRecord, MANIFEST, Manifest, Measured, QuantizedRecord, SiteRecord, format_version,
    has_trained_grids, site_parts,
};
use crate::atomic::write_bytes;
use crate::convert::encode;
use crate::safetensors_file::{FileDtype, FileLayout, PlannedTensor, index_json, layout};
use crate::{Dtype, IoError, ModelConfig, Result};

/// Writes the index of several weight `files`, the manifest and `config.json`; `summary` is what
/// `config.json` says of the quantization beside the format and the bits.
///
/// # Errors
/// What the system refuses.
pub fn write_descriptions(
    config: &ModelConfig,
    files: &[FileLayout],
    manifest: &Manifest,
    summary: &Value,
    folder: &Path,
) -> Result<()> {
    if let Some(index) = index_json(files) {
        write_bytes(&folder.join("model.safetensors.index.json"), index.as_bytes())?;
    }
    write_bytes(&folder.join(MANIFEST), manifest.to_json().as_bytes())?;
    let dense = manifest.dense.get("model.norm.weight").map(|r| r.dtype.as_str());
    let dtype = match dense {
        Some("BF16") => "bfloat16",
        Some("F16") => "float16",
        _ => "float32",
    };
    let mut quantization =
        json!({"quant_method": "anybit", "format_version": manifest.format_version});
    for (key, value) in summary.as_object().into_iter().flatten() {
        quantization[key.as_str()] = value.clone();
    }
    let (codes, total) = manifest.bits_per_weight();
    quantization["bits_per_weight_codes"] = json!(codes);
    quantization["bits_per_weight_total"] = json!(total);
    quantization["manifest"] = json!(MANIFEST);
    let mut config = config.to_json(dtype);
    config["quantization_config"] = quantization;
    write_bytes(&folder.join("config.json"), format!("{config:#}\n").as_bytes())
}

/// A model in memory, to be written as a packed checkpoint.
#[derive(Debug, Clone)]
pub struct PackedModel {
    /// What it is.
    pub config: ModelConfig,
    /// Name of what it was made from, never a path.
    pub base_model: String,
    /// Method that chose the codes.
    pub method: String,
    /// Settings with every default filled in, for information.
    pub recipe: Value,
    /// Data that it was made with, for information; null for none.
    pub calibration: Value,
    /// Name of the transform that the packed weights went through; none for the original basis.
    pub transform: Option<String>,
    /// Packed weights, in the basis of their inputs, by tensor name.
    pub quantized: BTreeMap<String, (QuantizedMatrix, Measured)>,
    /// All other tensors of the configuration, shape and values, by name.
    pub dense: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// What stands at the sites of the blocks, by `model.layers.N.SITE`.
    pub sites: BTreeMap<String, SiteState>,
}

impl PackedModel {
    /// Fails unless the tensors are those of the configuration.
    fn check(&self, folder: &Path) -> Result<()> {
        for (name, expected) in self.config.tensors() {
            let path = folder.to_owned();
            let found = match (self.quantized.get(&name), self.dense.get(&name)) {
                (Some((matrix, _)), _) => vec![matrix.rows, matrix.cols],
                (None, Some((shape, _))) => shape.clone(),
                (None, None) => {
                    return Err(IoError::MissingTensor { path, name, near: String::new() });
                }
            };
            if found != expected {
                return Err(IoError::Shape { path, name, expected, found });
            }
        }
        Ok(())
    }
}

/// Tensors to write.
#[derive(Default)]
struct Tensors {
    planned: Vec<PlannedTensor>,
    bytes: BTreeMap<String, Vec<u8>>,
    dense: BTreeMap<String, DenseRecord>,
}

impl Tensors {
    fn add(&mut self, tensor: PlannedTensor, bytes: Vec<u8>) {
        self.bytes.insert(tensor.name.clone(), bytes);
        self.planned.push(tensor);
    }

    fn add_dense(&mut self, tensor: PlannedTensor, bytes: Vec<u8>) {
        let record = DenseRecord {
            dtype: tensor.dtype.to_string(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes(),
            blake3: QuantizedRecord::hash(std::iter::once(bytes.as_slice())),
        };
        self.dense.insert(tensor.name.clone(), record);
        self.add(tensor, bytes);
    }
}

/// Writes `model` into `folder`, which exists: weight files, manifest, `config.json`. Tensors that
/// are not packed are stored as f32.
///
/// # Errors
/// Tensors that are not those of the configuration, or what the system refuses.
pub fn write_model(model: &PackedModel, folder: &Path) -> Result<Manifest> {
    model.check(folder)?;
    let mut tensors = Tensors::default();
    let (mut quantized, mut sites) = (BTreeMap::new(), BTreeMap::new());
    for (name, (matrix, measured)) in &model.quantized {
        let (record, parts) = QuantizedRecord::with_parts(matrix, &model.method, *measured);
        for (part, bytes) in record.parts(name).into_iter().zip(parts) {
            tensors.add(part, bytes);
        }
        quantized.insert(name.clone(), record);
    }
    for (name, (shape, values)) in &model.dense {
        let mut bytes = Vec::new();
        encode(Dtype::F32, values, &mut bytes);
        tensors.add_dense(PlannedTensor::new(name.clone(), FileDtype::F32, shape.clone()), bytes);
    }
    for (name, state) in &model.sites {
        let transform = state.transform.as_deref();
        let quantizer = state.quantizer.clone();
        let record = SiteRecord { quantizer, ..SiteRecord::describe(transform, None, 0) };
        let parts = transform.map(site_parts).unwrap_or_default();
        for (part, bytes) in record.parts(name).into_iter().zip(parts) {
            tensors.add_dense(part, bytes);
        }
        sites.insert(name.clone(), record);
    }
    let Tensors { planned, bytes, dense } = tensors;
    let files = layout(planned);
    for file in &files {
        file.write(folder, |tensor, out| {
            let bytes = bytes.get(&tensor.name).map(Vec::as_slice).unwrap_or_default();
            out.write_all(bytes).map_err(|e| IoError::file("write", folder, e))
        })?;
    }
    let version = format_version(!sites.is_empty(), has_trained_grids(&quantized, &sites));
    let manifest = Manifest {
        format_version: version.0,
        format_minor: version.1,
        anybit_version: env!("CARGO_PKG_VERSION").into(),
        base_model: model.base_model.clone(),
        recipe: model.recipe.clone(),
        calibration: model.calibration.clone(),
        quantized,
        dense,
        folded: BTreeMap::new(),
        transform: model.transform.clone(),
        transformed: None,
        sites,
    };
    let summary = json!({"method": model.method, "transform": model.transform});
    write_descriptions(&model.config, &files, &manifest, &summary, folder)?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::{Revalued, verify, write_revalued};
    use crate::{Checkpoint, synth};
    use anybit_core::rng::SplitMix64;
    use anybit_core::rounding::half_integer;
    use anybit_core::{
        ActivationQuantizer, GridSpec, Hadamard, Matrix, RowScale, RowSource, Site, Transform,
    };

    const BLOCK: usize = 16;

    /// A random model of the shape `tiny`, as it would come out of training: rotated weights of
    /// `w_bits` and, with sites, rotated activations of `a_bits`.
    fn trained(w_bits: u8, a_bits: Option<u8>, scale: RowScale) -> PackedModel {
        let config = synth::preset("tiny").unwrap();
        let mut rng = SplitMix64::new(3);
        let (mut quantized, mut dense) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in config.tensors() {
            let len: usize = shape.iter().product();
            let values: Vec<f32> = (0..len).map(|_| 0.1 * rng.normal() as f32).collect();
            if !name.ends_with("_proj.weight") {
                dense.insert(name, (shape, values));
                continue;
            }
            let mut weight = Matrix::from_vec(shape[0], shape[1], values).unwrap();
            if a_bits.is_some() {
                Hadamard::blocks(weight.cols, BLOCK).unwrap().apply(&mut weight.data);
            }
            let plane = half_integer(&weight, w_bits, None, scale).unwrap();
            let matrix = QuantizedMatrix::single(plane);
            let measured = Measured::against(&weight, &matrix);
            quantized.insert(name, (matrix, measured));
        }
        let mut sites = BTreeMap::new();
        let inputs = Site::ALL.into_iter().filter(|s| !s.linears().is_empty());
        for (site, bits) in inputs.flat_map(|site| a_bits.map(|bits| (site, bits))) {
            let size = config.site_size(site);
            let transform = Transform::Hadamard(Hadamard::blocks(size, BLOCK).unwrap());
            let quantizer = ActivationQuantizer::half_integer(size, bits, scale);
            let state = SiteState { transform: Some(transform.into()), quantizer: Some(quantizer) };
            for layer in 0..config.num_layers {
                sites.insert(site.full_name(layer), state.clone());
            }
        }
        PackedModel {
            config,
            base_model: "tiny".into(),
            method: "quest".into(),
            recipe: json!({"bits": w_bits}),
            calibration: Value::Null,
            transform: a_bits.map(|_| "block_hadamard".to_string()),
            quantized,
            dense,
            sites,
        }
    }

    /// What was in memory is what is read, to the bit, and verifies.
    #[test]
    fn trained_models_are_read_as_they_were() {
        for (w_bits, a_bits, scale, version) in [
            (4, Some(4), RowScale::Rms, (2, 1)),
            (1, Some(1), RowScale::Largest, (2, 1)),
            (8, Some(3), RowScale::Rms, (2, 1)),
            (3, None, RowScale::Rms, (1, 2)),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let model = trained(w_bits, a_bits, scale);
            let manifest = write_model(&model, dir.path()).unwrap();
            assert_eq!((manifest.format_version, manifest.format_minor), version);
            let checkpoint = Checkpoint::open(dir.path()).unwrap();
            assert_eq!(checkpoint.manifest(), Some(&manifest));
            assert_eq!(checkpoint.has_sites(), a_bits.is_some());
            for (name, (matrix, _)) in &model.quantized {
                let crate::Weight::Quantized(found) = checkpoint.weight(name).unwrap() else {
                    panic!("{name} is not packed")
                };
                assert_eq!(*found, *matrix, "{name}");
                assert_eq!(found.stored_bytes() as u64, manifest.quantized[name].bytes);
            }
            for (name, (_, values)) in &model.dense {
                assert_eq!(checkpoint.tensor(name).unwrap().to_vec(), *values, "{name}");
            }
            let block = checkpoint.block_sites(1).unwrap();
            for site in Site::ALL {
                let want = model.sites.get(&format!("model.layers.1.{}", site.name()));
                assert_eq!(*block.at(site), want.cloned().unwrap_or_default());
            }
            let problems = verify(&checkpoint, None, |_, _| {}).unwrap();
            assert!(problems.is_empty(), "{problems:?}");
        }
    }

    /// Other scales and another norm: same codes, same size, and the source is what errors are
    /// against.
    #[test]
    fn other_values_stand_behind_the_same_codes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = trained(3, Some(4), RowScale::Rms);
        write_model(&model, from.path()).unwrap();
        let source = Checkpoint::open(from.path()).unwrap();
        let name = "model.layers.1.mlp.up_proj.weight";
        let before = model.quantized[name].0.clone();
        let mut after = before.clone();
        after.planes[0].exact_scales.iter_mut().for_each(|s| *s *= 1.5);
        let measured = Measured::against(&before.dequantize(), &after);
        approx::assert_relative_eq!(measured.relative_error, 0.25, max_relative = 1e-5);
        let norm = vec![0.5; source.config.hidden_size];
        let revalued = Revalued {
            source: &source,
            recipe: json!({"more": 1}),
            quantized: BTreeMap::from([(name.to_string(), (after.clone(), measured))]),
            dense: BTreeMap::from([("model.norm.weight".to_string(), norm.clone())]),
        };
        let manifest = write_revalued(&revalued, to.path()).unwrap();
        let written = Checkpoint::open(to.path()).unwrap();
        assert_eq!(written.manifest(), Some(&manifest));
        assert_eq!(written.weight_file_bytes(), source.weight_file_bytes());
        assert_eq!(written.tensor("model.norm.weight").unwrap().to_vec(), norm);
        for (name, (matrix, _)) in &model.quantized {
            let crate::Weight::Quantized(found) = written.weight(name).unwrap() else {
                panic!("{name} is not packed")
            };
            let other =
                if found.planes[0].codes == after.planes[0].codes { &after } else { matrix };
            assert_eq!(*found, *other, "{name}");
        }
        for reference in [None, Some(&source)] {
            let problems = verify(&written, reference, |_, _| {}).unwrap();
            assert!(problems.is_empty(), "{problems:?}");
        }
        let stranger = BTreeMap::from([("lm.norm.weight".to_string(), norm)]);
        let strange = Revalued { dense: stranger, ..revalued };
        let error = write_revalued(&strange, to.path()).unwrap_err().to_string();
        assert!(error.contains("lm.norm.weight"), "{error}");
    }

    #[test]
    fn what_is_missing_or_misshapen_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut model = trained(4, None, RowScale::Rms);
        let norm = model.dense.remove("model.norm.weight").unwrap();
        let error = write_model(&model, dir.path()).unwrap_err().to_string();
        assert!(error.contains("model.norm.weight"), "{error}");
        model.dense.insert("model.norm.weight".into(), (vec![1, 64], norm.1));
        assert!(matches!(write_model(&model, dir.path()), Err(IoError::Shape { .. })));
    }

    /// A step that is not finite, and a grid of a later minor version.
    #[test]
    fn what_no_reader_should_take_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut model = trained(4, None, RowScale::Rms);
        let name = "model.layers.0.mlp.up_proj.weight";
        write_model(&model, dir.path()).unwrap();
        let path = dir.path().join(MANIFEST);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("\"exact\": true", "\"later\": true")).unwrap();
        let error = Manifest::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("later") && error.contains("damaged"), "{error}");
        let newer = text
            .replace("\"exact\": true", "\"later\": true")
            .replace("\"format_minor\": 2", "\"format_minor\": 9");
        std::fs::write(&path, newer).unwrap();
        let error = Manifest::read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("1.9") && error.contains("update anybit"), "{error}");
        let matrix = &mut model.quantized.get_mut(name).unwrap().0;
        matrix.planes[0].exact_scales[2] = f32::NAN;
        write_model(&model, dir.path()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let problems = verify(&checkpoint, None, |_, _| {}).unwrap();
        assert_eq!(problems.len(), 1);
        assert!(problems[0].tensor == name && problems[0].what.contains("scales"));
    }

    /// Manifests of before exact scales are read, and written, as ever.
    #[test]
    fn new_keys_are_written_where_they_say_something() {
        let old = GridSpec::HalfInteger { bits: 3, group_size: None, exact: false };
        let text = r#"{"type":"half_integer","bits":3,"group_size":null}"#;
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
        assert_eq!(serde_json::from_str::<GridSpec>(text).unwrap(), old);
        let new = GridSpec::HalfInteger { bits: 3, group_size: Some(64), exact: true };
        let text = r#"{"type":"half_integer","bits":3,"group_size":64,"exact":true}"#;
        assert_eq!(serde_json::to_string(&new).unwrap(), text);
        assert_eq!(serde_json::from_str::<GridSpec>(text).unwrap(), new);
        assert!(serde_json::from_str::<GridSpec>(&text.replace("exact", "other")).is_err());
        let text =
            r#"{"segments":[{"cols":8,"bits":4}],"symmetric":true,"clip":[1.0,1.0],"half":false}"#;
        let old = ActivationQuantizer::plain(8, 4, true);
        assert_eq!(serde_json::to_string(&old).unwrap(), text);
        assert_eq!(serde_json::from_str::<ActivationQuantizer>(text).unwrap(), old);
        let new = ActivationQuantizer::half_integer(8, 4, RowScale::Rms);
        let text = text.replace("false}", "false,\"row_scale\":\"rms\"}");
        assert_eq!(serde_json::to_string(&new).unwrap(), text);
        assert_eq!(serde_json::from_str::<ActivationQuantizer>(&text).unwrap(), new);
    }
}
