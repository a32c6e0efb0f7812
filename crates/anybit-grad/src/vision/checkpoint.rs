//! A network on disk: a folder with `config.json` (what it is) and `model.safetensors`, all f32.
//!
//! | tensor | what |
//! |---|---|
//! | `LAYER.weight` | `[out, kernel² · in]`, columns by row, pixel and channel of the window; `[channels, kernel²]` for depthwise ones |
//! | `LAYER.norm.weight`, `.bias`, `.running_mean`, `.running_var` | batch normalization, `ε` = 1e-5 |
//! | `head.weight`, `head.bias` | the linear at the end |
//! | `LAYER.weight.step`, `LAYER.input.step`, `LAYER.input.offset` | what estimators have learned |
//!
//! Weights are those of full precision: with the steps, every code follows from them. Called by
//! [`mod@super::run`].

use std::collections::BTreeMap;
use std::path::Path;

use anybit_io::IoError;
use anybit_io::atomic::{PartialFolder, check_space, write_bytes};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, layout_in_shards, open_file};
use serde::{Deserialize, Serialize};

use super::Result;
use super::data::Normalization;
use super::model::{Architecture, End, ModelSpec};
use super::network::Network;
use super::ops::Shape;
use super::quantize::QuantizerSpec;
use crate::Tensor;

const MODEL: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const FORMAT: &str = "anybit-cnn";
const VERSION: u32 = 1;

/// What `config.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    format: String,
    format_version: u32,
    model: ModelSpec,
    /// Height, width, channels.
    input: [usize; 3],
    classes: usize,
    /// What the head looks at.
    #[serde(default, skip_serializing_if = "End::is_pooled")]
    end: End,
    normalization: Normalization,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    quantizer: Option<QuantizerSpec>,
}

/// Names, shapes and values of everything that is stored.
fn tensors(network: &Network) -> Vec<(String, Vec<usize>, &[f32])> {
    let parameters = network.parameters.iter();
    let mut all: Vec<(String, Vec<usize>, &[f32])> =
        parameters.map(|p| (p.name.clone(), p.value.shape().to_vec(), p.value.data())).collect();
    for (layer, running) in network.architecture.layers.iter().zip(&network.running) {
        for (end, values) in [("mean", &running.mean), ("var", &running.variance)] {
            let name = format!("{}.norm.running_{end}", layer.name);
            all.push((name, vec![values.len()], &values[..]));
        }
    }
    all
}

/// Writes `network` as the folder `target`, replacing what is there.
///
/// # Errors
/// What the operating system refuses.
pub fn save(network: &Network, target: &Path) -> Result<()> {
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(|e| IoError::file("create", parent, e))?;
    }
    let folder = PartialFolder::create(target, false, true)?;
    let Shape { height, width, channels } = network.architecture.input;
    let config = Config {
        format: FORMAT.into(),
        format_version: VERSION,
        model: network.architecture.spec,
        input: [height, width, channels],
        classes: network.architecture.classes,
        end: network.architecture.end,
        normalization: network.normalization.clone(),
        quantizer: network.quantizer().copied(),
    };
    let text = serde_json::to_string_pretty(&config);
    let text = text.map_err(|e| IoError::damaged(target, e.to_string()))? + "\n";
    write_bytes(&folder.path().join(CONFIG), text.as_bytes())?;
    let all = tensors(network);
    let planned = all
        .iter()
        .map(|(name, shape, _)| PlannedTensor::new(name.as_str(), FileDtype::F32, shape.clone()));
    let mut layouts = layout_in_shards(planned.collect(), u64::MAX);
    let layout = &mut layouts[0];
    layout.file_name = MODEL.into();
    check_space(folder.path(), layout.file_bytes())?;
    let by_name: BTreeMap<&str, &[f32]> = all.iter().map(|(n, _, v)| (n.as_str(), *v)).collect();
    layout.write(folder.path(), |tensor, out| {
        let bytes: &[u8] = bytemuck::cast_slice(by_name[tensor.name.as_str()]);
        out.write_all(bytes).map_err(|e| IoError::file("write", &folder.path().join(MODEL), e))
    })?;
    Ok(folder.finish()?)
}

/// Reads what [`save`] wrote.
///
/// # Errors
/// Files that cannot be read, are damaged or of another kind; tensors that are missing or of another
/// shape.
pub fn load(folder: &Path) -> Result<Network> {
    let path = folder.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| IoError::file("read", &path, e))?;
    let config: Config =
        serde_json::from_str(&text).map_err(|e| IoError::damaged(&path, e.to_string()))?;
    if config.format != FORMAT || config.format_version > VERSION {
        let what = format!(
            "format {} {}; this reads {FORMAT} up to {VERSION}",
            config.format, config.format_version
        );
        return Err(IoError::unsupported(&path, what).into());
    }
    let [height, width, channels] = config.input;
    if config.normalization.mean.len() != channels
        || config.normalization.deviation.len() != channels
    {
        let what = format!("its normalization is not of {channels} channels");
        return Err(IoError::damaged(&path, what).into());
    }
    let built = config.model.build(Shape { height, width, channels }, config.classes)?;
    let architecture = Architecture { end: config.end, ..built };
    let pixels = architecture.input.pixels();
    let mut network = Network::new(architecture, config.normalization, 0);
    if let Some(spec) = &config.quantizer {
        // First values of no meaning, which are replaced below.
        network.quantize(spec, &Tensor::new([pixels, channels], vec![0.0; pixels * channels]))?;
    }
    fill(&mut network, &folder.join(MODEL))?;
    Ok(network)
}

/// Takes all values from a file.
fn fill(network: &mut Network, path: &Path) -> Result<()> {
    let raw = open_file(path)?;
    let take = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        let tensor = raw
            .get(name)
            .ok_or_else(|| IoError::damaged(path, format!("tensor {name} is missing")))?;
        if tensor.shape != shape {
            let what = format!("tensor {name} is {:?}, not {shape:?}", tensor.shape);
            return Err(IoError::damaged(path, what).into());
        }
        let values = tensor.weights(name)?.to_vec();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(at) => {
                let what = format!("tensor {name} holds {} at element {at}", values[at]);
                Err(IoError::damaged(path, what).into())
            }
        }
    };
    for parameter in &mut network.parameters {
        let values = take(&parameter.name, parameter.value.shape())?;
        parameter.value = Tensor::new(parameter.value.shape().to_vec(), values);
    }
    for (layer, running) in network.architecture.layers.iter().zip(&mut network.running) {
        let shape = [running.mean.len()];
        running.mean = take(&format!("{}.norm.running_mean", layer.name), &shape)?;
        running.variance = take(&format!("{}.norm.running_var", layer.name), &shape)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::vision::model::Family;
    use crate::vision::network::Mode;
    use crate::{EstimatorSpec, Tape};

    #[test]
    fn what_is_read_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("a/model");
        let input = Shape { height: 5, width: 4, channels: 2 };
        let spec = ModelSpec { family: Family::Mobilenet, width: 3 };
        let normalization = Normalization { mean: vec![0.1, 0.2], deviation: vec![1.0, 0.3] };
        let mut network = Network::new(spec.build(input, 4).unwrap(), normalization, 7);
        let images = random(1, [3 * 20, 2]);
        let logits = |network: &Network| {
            let mut tape = Tape::default();
            let logits = network.forward(&mut tape, &images, Mode::Evaluate).logits;
            tape.data(logits).to_vec()
        };
        for quantizer in [None, Some(QuantizerSpec::lsq(2, 3))] {
            if let Some(spec) = &quantizer {
                network.quantize(spec, &images).unwrap();
            }
            save(&network, &target).unwrap();
            let again = load(&target).unwrap();
            assert_eq!(again.quantizer(), quantizer.as_ref());
            assert_eq!(logits(&again), logits(&network));
        }
        let bytes = std::fs::read(target.join(MODEL)).unwrap();
        std::fs::write(target.join(MODEL), &bytes[..bytes.len() - 4]).unwrap();
        assert!(load(&target).is_err());
        std::fs::write(target.join(MODEL), &bytes).unwrap();
        let config = std::fs::read_to_string(target.join(CONFIG)).unwrap();
        for (from, to, part) in [
            ("\"width\": 3", "\"width\": 4", "tensor conv1.weight"),
            ("anybit-cnn", "onnx", "format onnx"),
            ("\"format_version\": 1", "\"format_version\": 9", "up to 1"),
        ] {
            std::fs::write(target.join(CONFIG), config.replace(from, to)).unwrap();
            let error = load(&target).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        let spec =
            QuantizerSpec { weights: EstimatorSpec::Pact { bits: 2 }, ..QuantizerSpec::lsq(2, 2) };
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<QuantizerSpec>(&text).unwrap(), spec);
    }
}
