//! The journal of a run in progress, in `OUT.partial`: finished blocks and the inputs of the next,
//! so that an interrupted run ends in the same bytes as an undisturbed one.
//!
//! | file | holds |
//! |---|---|
//! | `journal.json` | identity of the run, number of finished blocks, their records |
//! | `journal/block-NNN.safetensors` | packed matrices of a finished block |
//! | `journal/inputs-NNN.bin` | streams that enter block NNN |
//!
//! A block's files are complete before the journal counts it: the rename of `journal.json` is the
//! moment at which the block is done.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anybit_io::native::{Measured, QuantizedRecord};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, layout_in_shards, open_file};
use anybit_io::{Checkpoint, IoError, atomic};
use serde::{Deserialize, Serialize};

use crate::driver::BlockReport;
use crate::rounded::{FoldedNorm, Rounded};
use crate::streams::Stream;
use crate::{Plan, PtqError, Recipe, Result};

/// What makes two runs the same run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Identity {
    /// The program: another one may round otherwise.
    #[serde(default)]
    pub version: String,
    /// The resolved recipe.
    pub recipe: Recipe,
    /// Hash of the source's configuration and tensors.
    pub source: String,
    /// Hash of the token sequences.
    pub tokens: String,
    /// Hash of the layout of every matrix: rows are allocated from measurements.
    pub layouts: String,
}

impl Identity {
    /// Identifies a run; `source` is [`hash_source`] of its model.
    pub fn new((recipe, source): (&Recipe, String), plan: &Plan, tokens: &[&[Vec<u32>]]) -> Self {
        let layouts: Vec<_> = plan.matrices.iter().map(|m| (&m.tensor, &m.layout)).collect();
        let layouts = blake3::hash(format!("{layouts:?}").as_bytes()).to_hex().to_string();
        let (version, tokens) = (crate::cache::VERSION.to_string(), hash_tokens(tokens));
        Self { version, recipe: recipe.clone(), source, tokens, layouts }
    }
}

/// Hash of a model's configuration and tensors.
///
/// # Errors
/// A tensor that cannot be read.
pub fn hash_source(checkpoint: &Checkpoint) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{:?}", checkpoint.config).as_bytes());
    if let Some(manifest) = checkpoint.manifest() {
        // Hashes of the transforms' numbers are in the records.
        hasher.update(format!("{:?}", manifest.sites).as_bytes());
    }
    for (name, shape) in checkpoint.config.tensors() {
        let tensor = checkpoint.tensor(&name)?;
        hasher.update(format!("{name} {shape:?} {:?}", tensor.dtype).as_bytes());
        for part in tensor.bytes().chunks(1 << 24) {
            hasher.update(part);
        }
        tensor.release();
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Hash of token sequences.
pub fn hash_tokens(tokens: &[&[Vec<u32>]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for sequence in tokens.iter().copied().flatten() {
        hasher.update(bytemuck::cast_slice(sequence));
        hasher.update(b"|");
    }
    hasher.finalize().to_hex().to_string()
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    identity: Identity,
    finished: usize,
    /// Hash of the inputs of the first unfinished block. Journals of older versions have none, and
    /// are refused for their version.
    #[serde(default)]
    inputs: String,
    records: BTreeMap<String, QuantizedRecord>,
    /// Packed matrices whose factors a norm took up.
    folded: BTreeMap<String, String>,
    blocks: Vec<BlockReport>,
}

/// The journal of one run.
pub struct Journal {
    path: PathBuf,
    /// Of everything that is large.
    folder: PathBuf,
    state: State,
}

impl Journal {
    /// Starts a journal, or with `resume` continues the one that is there.
    ///
    /// # Errors
    /// [`PtqError::Resume`] when the run that is there was another one.
    pub fn open(folder: &Path, identity: Identity, resume: bool) -> Result<Self> {
        let (path, folder) = (folder.join("journal.json"), folder.join("journal"));
        fs::create_dir_all(&folder).map_err(|e| IoError::file("create", &folder, e))?;
        let (records, folded) = (BTreeMap::new(), BTreeMap::new());
        let (inputs, blocks) = (String::new(), Vec::new());
        let fresh = State { identity, finished: 0, inputs, records, folded, blocks };
        if !(resume && path.exists()) {
            return Ok(Self { path, folder, state: fresh });
        }
        let text = fs::read_to_string(&path).map_err(|e| IoError::file("read", &path, e))?;
        let state: State =
            serde_json::from_str(&text).map_err(|e| IoError::damaged(&path, e.to_string()))?;
        let (then, now) = (&state.identity, &fresh.identity);
        let differs = match () {
            () if then.version != now.version => Some("version of anybit"),
            () if then.recipe != now.recipe => Some("recipe"),
            () if then.source != now.source => Some("model"),
            () if then.tokens != now.tokens => Some("text"),
            () if then.layouts != now.layouts => Some("choice of grids"),
            () => None,
        };
        match differs {
            Some(what) => Err(PtqError::Resume { path, what }),
            None => Ok(Self { path, folder, state }),
        }
    }

    /// Blocks that are done.
    pub fn finished(&self) -> usize {
        self.state.finished
    }

    /// What was said of them.
    pub fn blocks(&self) -> &[BlockReport] {
        &self.state.blocks
    }

    /// Records of all packed matrices so far.
    pub fn records(&self) -> &BTreeMap<String, QuantizedRecord> {
        &self.state.records
    }

    /// Norms that took up factors, by the tensor of each matrix that was divided by them.
    pub fn folded(&self) -> &BTreeMap<String, String> {
        &self.state.folded
    }

    fn inputs_path(&self, block: usize) -> PathBuf {
        self.folder.join(format!("inputs-{block:03}.bin"))
    }

    fn matrices_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.safetensors"))
    }

    /// Reads the streams that enter the first unfinished block.
    ///
    /// # Errors
    /// The file is missing or another than was written.
    pub fn read_inputs(&self, streams: &mut [&mut Stream]) -> Result<()> {
        let path = self.inputs_path(self.state.finished);
        if hash_file(&path)? != self.state.inputs {
            let what = "it is not what was written: begin again without --resume";
            return Err(IoError::damaged(&path, what).into());
        }
        let mut file = fs::File::open(&path).map_err(|e| IoError::file("read", &path, e))?;
        streams.iter_mut().try_for_each(|s| s.read(&mut file, &path))
    }

    /// Writes packed matrices, and norms that changed with them, under `name` and takes up their
    /// records.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write_matrices(
        &mut self,
        name: &str,
        method: &str,
        rounded: &[Rounded],
        norms: &[FoldedNorm],
    ) -> Result<()> {
        let mut planned = Vec::new();
        let mut bytes: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for norm in norms {
            let shape = vec![norm.weight.len()];
            planned.push(PlannedTensor::new(norm.tensor.clone(), FileDtype::F32, shape));
            let data = norm.weight.iter().flat_map(|v| v.to_le_bytes()).collect();
            bytes.insert(norm.tensor.clone(), data);
            let consumers = norm.consumers.iter();
            self.state.folded.extend(consumers.map(|c| (c.clone(), norm.tensor.clone())));
        }
        for r in rounded {
            let (record, parts) = describe(r, method);
            for (part, data) in record.parts(&r.tensor).into_iter().zip(parts) {
                bytes.insert(part.name.clone(), data);
                planned.push(part);
            }
            self.state.records.insert(r.tensor.clone(), record);
        }
        for mut file in layout_in_shards(planned, u64::MAX) {
            file.file_name = format!("{name}.safetensors");
            file.write(&self.folder, |part, out| {
                let data = bytes.get(&part.name).map(Vec::as_slice).unwrap_or_default();
                out.write_all(data).map_err(|e| IoError::file("write", &self.folder, e))
            })?;
        }
        Ok(())
    }

    /// Counts a block as done: its inputs are forgotten, those of the next are kept.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn finish_block(&mut self, report: BlockReport, streams: &[&Stream]) -> Result<()> {
        let next = self.state.finished + 1;
        let inputs = self.inputs_path(next);
        // Not flushed to the disk: after a crash of the machine the hash finds it, after a kill it
        // is complete.
        let file = fs::File::create(&inputs).map_err(|e| IoError::file("create", &inputs, e))?;
        let mut out = std::io::BufWriter::with_capacity(1 << 20, file);
        streams.iter().try_for_each(|s| s.write(&mut out, &inputs))?;
        out.flush().map_err(|e| IoError::file("write", &inputs, e))?;
        self.state.inputs = hash_file(&inputs)?;
        self.state.finished = next;
        self.state.blocks.push(report);
        self.save()?;
        let _ = fs::remove_file(self.inputs_path(next - 1));
        Ok(())
    }

    /// Writes the journal.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn save(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.state)
            .map_err(|e| IoError::damaged(&self.path, e.to_string()))?;
        Ok(atomic::write_bytes(&self.path, &text)?)
    }

    /// The stored parts written under `name`, by tensor name.
    ///
    /// # Errors
    /// A damaged file.
    pub fn parts(
        &self,
        name: &str,
    ) -> Result<BTreeMap<String, anybit_io::safetensors_file::RawTensor>> {
        Ok(open_file(&self.matrices_path(name))?)
    }

    /// Removes everything that belongs to the journal.
    pub fn remove(self) {
        // First of all: a journal without its files could not be resumed.
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn hash_file(path: &Path) -> Result<String> {
    let fail = |e| IoError::file("read", path, e);
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(fs::File::open(path).map_err(fail)?).map_err(fail)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Name under which a block's matrices are written.
pub fn block_name(index: usize) -> String {
    format!("block-{index:03}")
}

fn describe(r: &Rounded, method: &str) -> (QuantizedRecord, Vec<Vec<u8>>) {
    let measured = Measured {
        relative_error: r.relative_error,
        output_error: r.output_error,
        decoded_norm: r.decoded_norm,
    };
    QuantizedRecord::with_parts(&r.matrix, method, measured)
}
