//! The transformed model as it is written: one file per block, then embedding and head, then the
//! manifest that makes a checkpoint of the folder. A killed run goes on from its last block.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{Matrix, Site, Transform};
use anybit_grad::Tensor;
use anybit_io::convert::copy_text_files;
use anybit_io::native::{DenseRecord, MANIFEST, Manifest, SiteRecord, format_version, site_parts};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, layout_in_shards, open_file};
use anybit_io::{Checkpoint, IoError, ModelConfig, atomic};
use serde_json::json;

use crate::assemble::base_name;
use crate::cache::Cache;
use crate::plan::{EMBEDDING, HEAD};
use crate::rounded::Clips;
use crate::{Event, Recipe, Result};

/// Its presence says that the model is whole.
pub const DONE: &str = "done.json";
const VOCABULARY: &str = "vocabulary.safetensors";
const NORM: &str = "model.norm.weight";
/// Rows of an embedding or head that are transformed at a time.
const ROWS: usize = 1 << 12;

/// What was fitted to a site.
#[derive(Debug, Clone, Default)]
pub struct FittedSite {
    /// What is applied online.
    pub transform: Option<Transform>,
    /// Clip factors of the largest and smallest activation.
    pub clip: Option<(f32, f32)>,
    /// Last channels that want more bits.
    pub high: usize,
}

/// A transformed block.
#[derive(Debug, Clone, Default)]
pub struct TransformedBlock {
    /// All its tensors, by name below `model.layers.N.`.
    pub tensors: BTreeMap<String, Tensor>,
    /// What stands at its sites.
    pub sites: BTreeMap<Site, FittedSite>,
    /// Clip factors of a linear's rows, `[rows, 2]`: of the largest and the smallest weight; by the
    /// linear's name below `model.layers.N.`.
    pub clips: Clips,
}

/// What becomes of embedding, final norm and head.
pub enum Vocabulary<'a> {
    /// They stay.
    Kept,
    /// The residual stream is in this orthogonal basis; the norm's weight is folded into the head,
    /// which is not the embedding any more.
    Rotated(&'a Transform),
}

/// Where transformed blocks go.
pub struct TransformWriter<'a> {
    checkpoint: &'a Checkpoint,
    config: ModelConfig,
    transform: String,
    recipe: serde_json::Value,
    cache: &'a Cache,
    finished: usize,
    observe: &'a mut dyn FnMut(Event),
}

fn block_file(index: usize) -> String {
    format!("block-{index:03}.safetensors")
}

fn sites_file(index: usize) -> String {
    format!("sites-{index:03}.json")
}

impl<'a> TransformWriter<'a> {
    /// Takes up where an earlier run ended.
    ///
    /// # Errors
    /// The disk is too small.
    pub fn open(
        checkpoint: &'a Checkpoint,
        recipe: &Recipe,
        cache: &'a Cache,
        observe: &'a mut dyn FnMut(Event),
    ) -> Result<Self> {
        let config = checkpoint.config.clone();
        let elements: usize = config.tensors().iter().map(|t| t.1.iter().product::<usize>()).sum();
        let head = config.vocab_size * config.hidden_size;
        atomic::check_space(cache.folder(), 4 * (elements + head) as u64)?;
        // Sites are written after the tensors of their block.
        let done = |index: &usize| cache.path(&sites_file(*index)).exists();
        let finished = (0..config.num_layers).take_while(done).count();
        let (transform, recipe) = (recipe.transform.clone(), json!(recipe.published()));
        Ok(Self { checkpoint, config, transform, recipe, cache, finished, observe })
    }

    /// Blocks that are there already.
    pub fn finished(&self) -> usize {
        self.finished
    }

    /// Says how far fitting is: steps done and in all.
    pub fn progress(&mut self, done: usize, total: usize) {
        (self.observe)(Event::Transforming(done, total));
    }

    /// Writes the next block.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn block(&mut self, index: usize, block: &TransformedBlock) -> Result<()> {
        let prefix = format!("model.layers.{index}");
        let mut tensors: Vec<(PlannedTensor, Vec<u8>)> = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, bytes: Vec<u8>| {
            tensors.push((PlannedTensor::new(name, FileDtype::F32, shape), bytes));
        };
        for (name, tensor) in &block.tensors {
            add(format!("{prefix}.{name}"), tensor.shape().to_vec(), to_bytes(tensor.data()));
        }
        for (name, clip) in &block.clips {
            add(clip_name(&format!("{prefix}.{name}")), vec![clip.rows, 2], to_bytes(&clip.data));
        }
        let mut records = BTreeMap::new();
        for (site, fitted) in &block.sites {
            let name = format!("{prefix}.{}", site.name());
            let transform = fitted.transform.as_ref();
            let record = SiteRecord::describe(transform, fitted.clip, fitted.high);
            let bytes = transform.map(site_parts).unwrap_or_default();
            for (part, bytes) in record.parts(&name).into_iter().zip(bytes) {
                add(part.name, part.shape, bytes);
            }
            records.insert(name, record);
        }
        write_file(self.cache.folder(), &block_file(index), tensors)?;
        self.cache.write(&sites_file(index), &records)?;
        self.finished = index + 1;
        self.progress(self.finished, self.config.num_layers);
        Ok(())
    }

    /// Writes embedding, final norm and head.
    ///
    /// # Errors
    /// What reading and writing report.
    pub fn vocabulary(&mut self, vocabulary: &Vocabulary<'_>) -> Result<()> {
        let (vocab, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let tied = self.config.tie_embeddings;
        let mut norm = self.checkpoint.vector(NORM)?;
        let head = if tied { EMBEDDING } else { HEAD };
        let rotation = match vocabulary {
            Vocabulary::Kept => None,
            Vocabulary::Rotated(rotation) => {
                self.config.tie_embeddings = false;
                Some(*rotation)
            }
        };
        let gamma = norm.clone();
        if rotation.is_some() {
            norm.fill(1.0);
        }
        let table = |name: &str| PlannedTensor::new(name, FileDtype::F32, vec![vocab, hidden]);
        let mut planned =
            vec![table(EMBEDDING), PlannedTensor::new(NORM, FileDtype::F32, vec![hidden])];
        if !self.config.tie_embeddings {
            planned.push(table(HEAD));
        }
        let mut layouts = layout_in_shards(planned, u64::MAX);
        layouts[0].file_name = VOCABULARY.into();
        let checkpoint = self.checkpoint;
        layouts[0].write(self.cache.folder(), |tensor, out| {
            let fail = |e| IoError::file("write", Path::new(&tensor.name), e);
            if tensor.name == NORM {
                return out.write_all(&to_bytes(&norm)).map_err(fail);
            }
            let is_head = tensor.name == HEAD;
            let source = checkpoint.weight(if is_head { head } else { EMBEDDING })?;
            for first in (0..vocab).step_by(ROWS) {
                let count = ROWS.min(vocab - first);
                let mut rows = vec![0f32; count * hidden];
                anybit_core::RowSource::read_rows(&source, first..first + count, &mut rows);
                if let Some(rotation) = rotation {
                    if is_head {
                        Transform::Diagonal(gamma.clone()).apply(&mut rows);
                    }
                    anybit_kernels::transform_rows(rotation, &mut rows);
                }
                out.write_all(&to_bytes(&rows)).map_err(fail)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Makes a checkpoint of the folder.
    ///
    /// # Errors
    /// What reading and writing report.
    pub fn finish(self) -> Result<()> {
        let folder = self.cache.folder();
        let mut sites: BTreeMap<String, SiteRecord> = BTreeMap::new();
        let mut dense = BTreeMap::new();
        let mut index = serde_json::Map::new();
        let blocks = (0..self.config.num_layers).map(block_file);
        for file in blocks.chain([VOCABULARY.to_string()]) {
            for (name, raw) in open_file(&folder.join(&file))? {
                let blake3 = blake3::hash(raw.bytes()).to_hex().to_string();
                let (dtype, bytes) = (raw.dtype.to_string(), raw.bytes().len() as u64);
                let shape = raw.shape.clone();
                dense.insert(name.clone(), DenseRecord { dtype, shape, bytes, blake3 });
                index.insert(name, json!(file));
            }
        }
        for layer in 0..self.config.num_layers {
            sites
                .extend(self.cache.read::<BTreeMap<_, _>>(&sites_file(layer))?.unwrap_or_default());
        }
        let version = format_version(true, false);
        let manifest = Manifest {
            format_version: version.0,
            format_minor: version.1,
            anybit_version: env!("CARGO_PKG_VERSION").into(),
            base_model: base_name(self.checkpoint),
            recipe: self.recipe,
            calibration: serde_json::Value::Null,
            quantized: BTreeMap::new(),
            dense,
            folded: BTreeMap::new(),
            transform: Some(self.transform.clone()),
            transformed: None,
            sites,
        };
        atomic::write_bytes(&folder.join(MANIFEST), manifest.to_json().as_bytes())?;
        let index = format!("{:#}\n", json!({"metadata": {}, "weight_map": index}));
        atomic::write_bytes(&folder.join("model.safetensors.index.json"), index.as_bytes())?;
        let mut config = self.config.to_json("float32");
        config["quantization_config"] = json!({
            "quant_method": "anybit",
            "format_version": version.0,
            "transform": self.transform,
            "manifest": MANIFEST,
        });
        let config = format!("{config:#}\n");
        atomic::write_bytes(&folder.join("config.json"), config.as_bytes())?;
        copy_text_files(self.checkpoint, folder)?;
        self.cache.write(DONE, &json!({"transform": self.transform}))
    }
}

/// Name of the clip factors of a linear's rows.
pub fn clip_name(linear: &str) -> String {
    format!("{linear}.clip")
}

/// Clip factors of a block's linears that were fitted with its transform.
///
/// # Errors
/// Tensors of another shape.
pub fn read_clips(checkpoint: &Checkpoint, index: usize) -> Result<Clips> {
    let mut clips = Clips::new();
    if !checkpoint.has_sites() {
        return Ok(clips);
    }
    for (name, rows, _) in checkpoint.config.block_linears() {
        let tensor = clip_name(&format!("model.layers.{index}.{name}"));
        let Ok(stored) = checkpoint.tensor(&tensor) else { continue };
        if stored.shape != [rows, 2] {
            let (path, expected, found) = (checkpoint.path.clone(), vec![rows, 2], stored.shape);
            return Err(IoError::Shape { path, name: tensor, expected, found }.into());
        }
        clips.insert(name.to_string(), Matrix { rows, cols: 2, data: stored.to_vec() });
    }
    Ok(clips)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

fn write_file(folder: &Path, name: &str, tensors: Vec<(PlannedTensor, Vec<u8>)>) -> Result<()> {
    let mut bytes: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut planned = Vec::new();
    for (tensor, data) in tensors {
        bytes.insert(tensor.name.clone(), data);
        planned.push(tensor);
    }
    let mut layouts = layout_in_shards(planned, u64::MAX);
    layouts[0].file_name = name.into();
    layouts[0].write(folder, |tensor, out| {
        let data = bytes.get(&tensor.name).map_or(&[][..], |d| d);
        out.write_all(data).map_err(|e| IoError::file("write", Path::new(&tensor.name), e))
    })?;
    Ok(())
}
