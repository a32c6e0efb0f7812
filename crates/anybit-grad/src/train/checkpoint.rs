//! Training checkpoints: all that a run needs to go on bit by bit.
//!
//! | file of `checkpoints/step-NNNNNNNN/` | holds |
//! |---|---|
//! | `model.safetensors`, `config.json`, tokenizer | the full-precision parameters, as an ordinary Hugging Face folder; where codes are kept, norms and biases alone |
//! | `training.safetensors` | what estimators learn, or what kept codes stand for; AdamW's moments as `m.NAME` and `v.NAME` |
//! | `state.json` | step, best validation, recipe, hash of every file |
//!
//! Which sequences come next follows from the step and the seed. A folder is written beside and
//! renamed; older ones are removed only after that. Called by the trainer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anybit_io::atomic::{PartialFolder, check_space, write_bytes};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, layout_in_shards, open_file};
use anybit_io::{IoError, ModelConfig};
use serde::{Deserialize, Serialize};

use super::kept::Kept;
use super::{QuantizedDecoder, Result, TrainError, TrainRecipe};
use crate::{AdamW, Tensor};

const MODEL: &str = "model.safetensors";
const TRAINING: &str = "training.safetensors";
const STATE: &str = "state.json";

/// The least validation loss so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Steps taken by then.
    pub step: u64,
    /// The loss, in nats per token.
    pub loss: f64,
}

/// What is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: u64,
    /// The least validation loss so far.
    pub best: Option<Best>,
    /// The recipe.
    pub recipe: TrainRecipe,
    /// Hash of the packed checkpoint whose codes are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<String>,
    /// What the balancer of a distillation has learned.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub balancer: Vec<(String, f64)>,
    /// blake3 of the files.
    pub files: BTreeMap<String, String>,
}

/// The folder of a step.
pub fn folder(out: &Path, step: u64) -> PathBuf {
    out.join("checkpoints").join(format!("step-{step:08}"))
}

/// Steps with a checkpoint, in rising order.
///
/// # Errors
/// When the folder cannot be listed; that it is not there is no error.
pub fn list(out: &Path) -> Result<Vec<u64>> {
    let folder = out.join("checkpoints");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(IoError::file("read", &folder, e).into()),
    };
    let step = |entry: fs::DirEntry| {
        entry.file_name().to_str()?.strip_prefix("step-")?.parse::<u64>().ok()
    };
    let mut steps: Vec<u64> = entries.flatten().filter_map(step).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Removes all but the newest `keep` checkpoints and that of step `best`.
///
/// # Errors
/// When a folder cannot be removed.
pub fn prune(out: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    let steps = list(out)?;
    let old = &steps[..steps.len().saturating_sub(keep)];
    for step in old.iter().filter(|step| Some(**step) != best) {
        let path = folder(out, *step);
        fs::remove_dir_all(&path).map_err(|e| IoError::file("remove", &path, e))?;
    }
    Ok(())
}

fn write_tensors(
    folder: &Path,
    name: &str,
    tensors: &[(String, &[usize], &[f32])],
) -> Result<String> {
    let planned = tensors
        .iter()
        .map(|(name, shape, _)| PlannedTensor::new(name, FileDtype::F32, shape.to_vec()));
    let by_name: BTreeMap<&str, &[f32]> =
        tensors.iter().map(|(name, _, data)| (name.as_str(), *data)).collect();
    // One file, whatever its size: it is read by us.
    let mut layouts = layout_in_shards(planned.collect(), u64::MAX);
    let layout = &mut layouts[0];
    layout.file_name = name.into();
    check_space(folder, layout.file_bytes())?;
    let mut hash = blake3::Hasher::new();
    layout.write(folder, |tensor, out| {
        let bytes: &[u8] = bytemuck::cast_slice(by_name[tensor.name.as_str()]);
        hash.update(tensor.name.as_bytes());
        hash.update(bytes);
        out.write_all(bytes).map_err(|e| IoError::file("write", &folder.join(name), e))
    })?;
    Ok(hash.finalize().to_hex().to_string())
}

/// Writes the full-precision parameters as a Hugging Face folder; returns the hash of the weights.
///
/// # Errors
/// What the operating system refuses.
pub fn write_dense(
    folder: &Path,
    config: &ModelConfig,
    tensors: &[(String, &Tensor)],
    tokenizer: &Path,
) -> Result<String> {
    let list: Vec<(String, &[usize], &[f32])> =
        tensors.iter().map(|(name, t)| (name.clone(), t.shape(), t.data())).collect();
    let hash = write_tensors(folder, MODEL, &list)?;
    let config = format!("{:#}\n", config.to_json("float32"));
    write_bytes(&folder.join("config.json"), config.as_bytes())?;
    copy_files(tokenizer, folder)?;
    Ok(hash)
}

/// Copies the tokenizer's files.
pub(super) fn copy_files(from: &Path, to: &Path) -> Result<()> {
    let fail = |path: &Path, e| IoError::file("read", path, e);
    for entry in fs::read_dir(from).map_err(|e| fail(from, e))?.flatten() {
        let bytes = fs::read(entry.path()).map_err(|e| fail(&entry.path(), e))?;
        write_bytes(&to.join(entry.file_name()), &bytes)?;
    }
    Ok(())
}

/// Writes the checkpoint of `state.step`.
///
/// # Errors
/// What the operating system refuses; nothing is left of it then.
pub fn save(
    out: &Path,
    student: &mut QuantizedDecoder,
    adam: &AdamW,
    mut state: State,
    tokenizer: &Path,
) -> Result<()> {
    let target = folder(out, state.step);
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(|e| IoError::file("create", parent, e))?;
    }
    let partial = PartialFolder::create(&target, false, true)?;
    let config = student.decoder.config.clone();
    state.kept = student.kept().map(|kept| kept.key().to_string());
    let learned: usize = student.learned.values().map(Vec::len).sum();
    let parameters = student.parameters();
    let decoder = parameters.len() - learned;
    let dense: Vec<(String, &Tensor)> =
        parameters[..decoder].iter().map(|(name, t, _)| (name.clone(), &**t)).collect();
    let hash = write_dense(partial.path(), &config, &dense, tokenizer)?;
    state.files.insert(MODEL.into(), hash);
    let mut rest: Vec<(String, &[usize], &[f32])> = parameters[decoder..]
        .iter()
        .map(|(name, t, _)| (name.clone(), t.shape(), t.data()))
        .collect();
    for ((name, t, _), (m, v)) in parameters.iter().zip(adam.state().1) {
        rest.push((format!("m.{name}"), t.shape(), m));
        rest.push((format!("v.{name}"), t.shape(), v));
    }
    state.files.insert(TRAINING.into(), write_tensors(partial.path(), TRAINING, &rest)?);
    let json = serde_json::to_string_pretty(&state).map_err(|e| damaged(&target, e.to_string()))?;
    write_bytes(&partial.path().join(STATE), json.as_bytes())?;
    Ok(partial.finish()?)
}

fn damaged(path: &Path, what: impl Into<String>) -> TrainError {
    TrainError::Checkpoint { path: path.to_owned(), what: what.into() }
}

fn read_tensors(folder: &Path, name: &str, state: &State) -> Result<BTreeMap<String, Vec<f32>>> {
    let path = folder.join(name);
    let mut hash = blake3::Hasher::new();
    let raw = open_file(&path).map_err(|e| damaged(folder, e.to_string()))?;
    let mut tensors = BTreeMap::new();
    // The hash is over tensors in the order of the file.
    let mut order: Vec<_> = raw.iter().collect();
    order.sort_by_key(|(_, tensor)| tensor.bytes().as_ptr() as usize);
    for (name, tensor) in order {
        hash.update(name.as_bytes());
        hash.update(tensor.bytes());
        let values = tensor.weights(name).map_err(|e| damaged(folder, e.to_string()))?;
        tensors.insert(name.clone(), values.to_vec());
    }
    match state.files.get(name) {
        Some(want) if *want == hash.finalize().to_hex().as_str() => Ok(tensors),
        _ => Err(damaged(folder, format!("{name} does not match its recorded hash"))),
    }
}

/// Reads the state of a checkpoint.
///
/// # Errors
/// [`TrainError::Checkpoint`].
pub fn read_state(folder: &Path) -> Result<State> {
    let text = fs::read_to_string(folder.join(STATE))
        .map_err(|e| damaged(folder, format!("cannot read {STATE}: {e}")))?;
    serde_json::from_str(&text).map_err(|e| damaged(folder, format!("{STATE}: {e}")))
}

/// Puts a checkpoint's values into `student` and its moments into an optimizer.
///
/// # Errors
/// [`TrainError::Checkpoint`] for files that are damaged or of another model.
pub fn load(folder: &Path, student: &mut QuantizedDecoder) -> Result<(State, AdamW)> {
    let state = read_state(folder)?;
    if state.kept.as_deref() != student.kept().map(Kept::key) {
        return Err(damaged(folder, "model.init is another than the one that was trained"));
    }
    let mut tensors = read_tensors(folder, MODEL, &state)?;
    tensors.extend(read_tensors(folder, TRAINING, &state)?);
    let mut moments = Vec::new();
    for (name, tensor, _) in student.parameters() {
        let mut take = |name: String| match tensors.remove(&name) {
            Some(values) if values.len() == tensor.len() => Ok(values),
            Some(values) => {
                let what = format!("{name} has {} values, not {}", values.len(), tensor.len());
                Err(damaged(folder, what))
            }
            None => Err(damaged(folder, format!("{name} is missing"))),
        };
        let (values, m, v) =
            (take(name.clone())?, take(format!("m.{name}"))?, take(format!("v.{name}"))?);
        tensor.data_mut().copy_from_slice(&values);
        moments.push((m, v));
    }
    let adam = AdamW::resume(state.recipe.train.adamw(), state.step as i32, moments);
    Ok((state, adam))
}
