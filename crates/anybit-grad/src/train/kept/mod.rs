//! Training of what a packed checkpoint's codes stand for: `weights = { type = "kept" }`.
//!
//! Codes, zero points, permutations and sparse parts of `model.init` stay, and with them the layout
//! and the size of the files. Codebooks and scales ([`KeptMatrix`]), norms and biases are trained;
//! embedding, head and linears that `init` stores as numbers stay as they are. Everything is
//! multiplied as it will be stored, so that the training graph computes what the written file does.
//! No full-precision weights exist but those that a step decodes.
//!
//! Called by the trainer and by export.

mod matrix;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use anybit_io::convert::copy_text_files;
use anybit_io::native::{Manifest, Measured, Revalued, write_revalued};
use anybit_io::{Checkpoint, Dtype, Weight};
use half::f16;
use serde_json::{Value, json};

pub use matrix::KeptMatrix;

use super::quantized::{Learned, round_to_bf16};
use super::run::refuse_rounded;
use super::{Precision, QuantizedDecoder, QuantizerRecipe, Result, TrainError, TrainRecipe};
use crate::{DecoderVars, EstimatorSpec, Tape, TrainDecoder, Var};

/// A linear whose codes stay.
#[derive(Debug)]
struct KeptLinear {
    layer: usize,
    /// Its name below `model.layers.N.`.
    key: String,
    matrix: Arc<KeptMatrix>,
}

impl KeptLinear {
    fn name(&self) -> String {
        full_name(self.layer, &self.key)
    }
}

/// What stays of a packed checkpoint.
#[derive(Debug)]
pub struct Kept {
    linears: Vec<KeptLinear>,
    /// Stored types of the trained tensors that are numbers, by name.
    dense: BTreeMap<String, Dtype>,
    /// Hash of all that is stored.
    key: String,
}

fn full_name(layer: usize, key: &str) -> String {
    format!("model.layers.{layer}.{key}")
}

/// Layer and name below it of the packed weights in blocks.
fn packed_linears(checkpoint: &Checkpoint) -> Vec<(usize, String)> {
    let Some(manifest) = checkpoint.manifest() else { return Vec::new() };
    let mut all = Vec::new();
    for layer in 0..checkpoint.config.num_layers {
        let keys = checkpoint.config.block_linears().map(|(name, ..)| format!("{name}.weight"));
        let packed = |key: &String| manifest.quantized.contains_key(&full_name(layer, key));
        all.extend(keys.into_iter().filter(packed).map(|key| (layer, key)));
    }
    all
}

/// Opens the checkpoint whose codes a recipe keeps; takes no longer than to read its headers.
///
/// # Errors
/// None is named, it cannot be read, it is not packed, or it rounds its activations.
pub fn open(recipe: &TrainRecipe) -> Result<Checkpoint> {
    let Some(path) = &recipe.model.init else {
        let what = "kept codes are those of a packed checkpoint: name it in model.init";
        return Err(TrainError::recipe("quantizer.weights", what));
    };
    let checkpoint = Checkpoint::open(path)?;
    if packed_linears(&checkpoint).is_empty() {
        let what = format!(
            "{} is not packed: it has no codes to keep. Quantize it first, or choose an estimator \
             as quantizer.weights",
            path.display()
        );
        return Err(TrainError::recipe("model.init", what));
    }
    refuse_rounded(&checkpoint, "model.init")?;
    Ok(checkpoint)
}

/// The student that a packed checkpoint is before the first step, for sequences of up to
/// `positions` tokens.
///
/// # Errors
/// A recipe that keeps no codes; what the checkpoint reports.
pub fn student(
    checkpoint: &Checkpoint,
    recipe: &QuantizerRecipe,
    precision: Precision,
    positions: usize,
) -> Result<QuantizedDecoder> {
    let Some(EstimatorSpec::Kept { column_scale }) = recipe.weights else {
        return Err(TrainError::recipe("quantizer.weights", "is not kept"));
    };
    let kept = Kept::load(checkpoint, column_scale)?;
    let names: BTreeSet<String> = kept.linears.iter().map(KeptLinear::name).collect();
    let decoder = TrainDecoder::load_without(checkpoint, positions, &|name| names.contains(name))?;
    Ok(QuantizedDecoder::with_kept(decoder, kept, recipe.clone(), precision))
}

/// Hash of all that a manifest has hashes of.
fn hash(manifest: &Manifest) -> String {
    let mut hash = blake3::Hasher::new();
    let packed = manifest.quantized.iter().map(|(name, record)| (name, &record.blake3));
    let dense = manifest.dense.iter().map(|(name, record)| (name, &record.blake3));
    for (name, own) in packed.chain(dense) {
        hash.update(name.as_bytes());
        hash.update(own.as_bytes());
    }
    hash.finalize().to_hex().to_string()
}

/// What is multiplied when `x` is stored as `dtype`; gradient passes as it is.
fn as_stored(tape: &mut Tape, x: Var, dtype: Dtype) -> Var {
    match dtype {
        Dtype::F16 => tape.straight_through(x, |x, y| {
            y.iter_mut().zip(x).for_each(|(y, x)| *y = f16::from_f32(*x).to_f32());
        }),
        Dtype::BF16 => tape.straight_through(x, round_to_bf16),
        _ => x,
    }
}

impl Kept {
    fn load(checkpoint: &Checkpoint, column_scale: bool) -> Result<Self> {
        let mut linears = Vec::new();
        for (layer, key) in packed_linears(checkpoint) {
            let weight = checkpoint.weight(&full_name(layer, &key))?;
            if let Weight::Quantized(matrix) = weight {
                let matrix = KeptMatrix::new(Arc::unwrap_or_clone(matrix), column_scale);
                linears.push(KeptLinear { layer, key, matrix: Arc::new(matrix) });
            }
        }
        let (mut dense, mut key) = (BTreeMap::new(), String::new());
        if let Some(manifest) = checkpoint.manifest() {
            key = hash(manifest);
            for (name, shape) in checkpoint.config.tensors() {
                let dtype = manifest.dense.get(&name).and_then(|record| record.element());
                if let Some(dtype) = dtype.filter(|_| shape.len() == 1) {
                    dense.insert(name, dtype);
                }
            }
        }
        Ok(Self { linears, dense, key })
    }

    /// Hash of the checkpoint that this was loaded from.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Whether the parameter `name`, which is no packed weight, is trained.
    pub fn trains(&self, name: &str) -> bool {
        self.dense.contains_key(name)
    }

    /// What is learned of the packed weights, before the first step.
    pub fn parameters(&self) -> Learned {
        self.linears.iter().map(|linear| (linear.name(), linear.matrix.parameters())).collect()
    }

    /// Puts what is multiplied in the place of `operands`; returns what it depends on, with names.
    pub(super) fn record(
        &self,
        tape: &mut Tape,
        operands: &mut DecoderVars,
        learned: &Learned,
        wants: bool,
    ) -> Vec<(String, Var)> {
        for (layer, block) in operands.blocks.iter_mut().enumerate() {
            for (key, var) in &mut block.vars {
                if let Some(dtype) = self.dense.get(&full_name(layer, key)) {
                    *var = as_stored(tape, *var, *dtype);
                }
            }
        }
        if let Some(dtype) = self.dense.get("model.norm.weight") {
            operands.norm = as_stored(tape, operands.norm, *dtype);
        }
        let mut all = Vec::new();
        for linear in &self.linears {
            let name = linear.name();
            let mut vars = Vec::new();
            for (end, value) in learned.get(&name).into_iter().flatten() {
                let var = tape.leaf(value.clone(), wants);
                all.push((format!("{name}.{end}"), var));
                vars.push(var);
            }
            let weight = linear.matrix.record(tape, &vars);
            operands.blocks[linear.layer].set(&linear.key, weight);
        }
        all
    }

    /// Writes the checkpoint again with what was learned.
    ///
    /// # Errors
    /// A checkpoint that is not the one from before; what the system refuses.
    pub(super) fn write(
        &self,
        student: &QuantizedDecoder,
        recipe: &TrainRecipe,
        folder: &Path,
    ) -> Result<()> {
        let source = open(recipe)?;
        let manifest = source.manifest().filter(|m| hash(m) == self.key);
        let Some(manifest) = manifest else {
            let what = format!(
                "{} changed while it was trained: put back what it was and go on with --resume",
                source.path.display()
            );
            return Err(TrainError::recipe("model.init", what));
        };
        let quantized = self.linears.iter().map(|linear| {
            let name = linear.name();
            let learned = student.learned.get(&name).into_iter().flatten();
            let values: Vec<&[f32]> = learned.map(|(_, value)| value.data()).collect();
            let matrix = linear.matrix.moved(&values);
            let measured = Measured::against(&linear.matrix.first().dequantize(), &matrix);
            (name, (matrix, measured))
        });
        let quantized = quantized.collect();
        let mut tape = Tape::default();
        let numbers = student.decoder.vars(&mut tape, &|_| false).named().into_iter();
        let trained = numbers.filter(|(name, _)| self.trains(name));
        let dense = trained.map(|(name, var)| (name, tape.data(var).to_vec())).collect();
        let recipe = published(manifest, recipe);
        write_revalued(&Revalued { source: &source, recipe, quantized, dense }, folder)?;
        copy_text_files(&source, folder)?;
        Ok(())
    }
}

/// The recipe of the packed checkpoint with a note of this training at the end of `trained`; without
/// paths, which say more about a machine than about a model.
fn published(manifest: &Manifest, recipe: &TrainRecipe) -> Value {
    let distill = recipe.distill.as_ref().map(|d| json!({"loss": d.loss, "balancer": d.balancer}));
    let note = json!({
        "of": manifest.base_model,
        "weights": recipe.quantizer.weights,
        "context": recipe.data.context,
        "train": recipe.train,
        "distill": distill,
        "seed": recipe.seed,
    });
    let mut all = match &manifest.recipe {
        Value::Object(all) => all.clone(),
        other => serde_json::Map::from_iter([("before".to_string(), other.clone())]),
    };
    match all.get_mut("trained").and_then(Value::as_array_mut) {
        Some(notes) => notes.push(note),
        None => {
            all.insert("trained".into(), json!([note]));
        }
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{DataRecipe, ModelRecipe, TrainSettings};
    use anybit_io::synth;

    fn recipe(init: &Path) -> TrainRecipe {
        let data = json!({"train": ["a.txt"], "context": 8});
        TrainRecipe {
            out: "out".into(),
            seed: 0,
            model: ModelRecipe { init: Some(init.to_owned()), ..Default::default() },
            data: serde_json::from_value::<DataRecipe>(data).unwrap(),
            quantizer: QuantizerRecipe {
                weights: Some(EstimatorSpec::Kept { column_scale: false }),
                activations: None,
            },
            train: TrainSettings::new(4, 2, 1e-3),
            distill: None,
        }
    }

    #[test]
    fn what_is_not_packed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny");
        synth::write(&synth::preset("tiny").unwrap(), 0, &path, false, &mut |_, _| {}).unwrap();
        let recipe = recipe(&path);
        recipe.check().unwrap();
        let error = open(&recipe).err().unwrap().to_string();
        assert!(error.starts_with("model.init") && error.contains("not packed"), "{error}");
        let none = TrainRecipe { model: ModelRecipe::default(), ..recipe };
        assert!(open(&none).err().unwrap().to_string().contains("model.init"));
    }

    #[test]
    fn notes_of_training_follow_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest: Manifest = serde_json::from_value(json!({
            "format_version": 1, "format_minor": 1, "anybit_version": "0", "base_model": "m",
            "recipe": {"method": "skim"}, "calibration": null, "quantized": {}, "dense": {},
        }))
        .unwrap();
        manifest.recipe = published(&manifest, &recipe(dir.path()));
        let twice = published(&manifest, &recipe(dir.path()));
        assert_eq!(twice["method"], "skim");
        assert_eq!(twice["trained"].as_array().unwrap().len(), 2);
        assert_eq!(twice["trained"][1]["weights"]["type"], "kept");
        assert!(!twice.to_string().contains(&dir.path().display().to_string()));
    }
}
