//! [`Checkpoint`]: one view of a Hugging Face folder, a GGUF file or a native packed folder.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anybit_core::{BlockSites, HalfRow, QuantizedMatrix, RowSource, Site};
use rayon::prelude::*;
use serde_json::Value;

use crate::gguf::{self, GgufFile};
use crate::native::Manifest;
use crate::safetensors_file::{RawTensor, map_file, open_folder};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::ChatTemplate;
use crate::{IoError, ModelConfig, Result, StoredTensor, nearest_name};

/// Where a checkpoint came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `config.json` and `*.safetensors` in F32, F16 or BF16.
    HuggingFace,
    /// A GGUF file.
    Gguf,
    /// Our own packed folder.
    Native,
}

/// A weight matrix, however it is stored.
#[derive(Debug, Clone)]
pub enum Weight {
    /// In a memory-mapped file.
    Stored(StoredTensor),
    /// Packed codes, in memory.
    Quantized(Arc<QuantizedMatrix>),
}

impl RowSource for Weight {
    fn shape(&self) -> (usize, usize) {
        match self {
            Self::Stored(t) => RowSource::shape(t),
            Self::Quantized(q) => q.shape(),
        }
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        match self {
            Self::Stored(t) => t.read_rows(rows, out),
            Self::Quantized(q) => q.read_rows(rows, out),
        }
    }

    fn stored_bytes(&self) -> usize {
        match self {
            Self::Stored(t) => t.stored_bytes(),
            Self::Quantized(q) => q.stored_bytes(),
        }
    }

    fn half_row(&self, row: usize) -> Option<HalfRow<'_>> {
        match self {
            Self::Stored(t) => t.half_row(row),
            Self::Quantized(_) => None,
        }
    }
}

enum Source {
    Folder { raw: BTreeMap<String, RawTensor>, manifest: Option<Box<Manifest>> },
    Gguf { file: Box<GgufFile>, tensors: BTreeMap<String, StoredTensor> },
}

/// A model on disk: configuration, tensors by Hugging Face name, tokenizer, chat template.
pub struct Checkpoint {
    /// The folder or file.
    pub path: PathBuf,
    /// What the model is.
    pub config: ModelConfig,
    source: Source,
}

impl Checkpoint {
    /// Opens a folder or a `.gguf` file and checks that every tensor of the configuration is
    /// there with the right shape. Reads headers only.
    ///
    /// # Errors
    /// Everything that can be known from the headers: missing files, damage, unsupported
    /// architectures or types, missing tensors, wrong shapes.
    pub fn open(path: &Path) -> Result<Self> {
        let checkpoint = match path {
            p if p.is_dir() => Self::open_folder(p)?,
            p if p.is_file() => Self::open_gguf(p)?,
            p => {
                let e = std::io::Error::from(std::io::ErrorKind::NotFound);
                return Err(IoError::file("read", p, e));
            }
        };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        if !config_path.exists() {
            let what = "it holds no config.json".to_string();
            return Err(IoError::NoCheckpoint { path: path.to_owned(), what });
        }
        let text =
            fs::read_to_string(&config_path).map_err(|e| IoError::file("read", &config_path, e))?;
        let mut config = ModelConfig::from_json(&text, &config_path)?;
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let manifest = match value.get("quantization_config").filter(|q| !q.is_null()) {
            None => None,
            Some(q) if q["quant_method"] == "anybit" => Some(Box::new(Manifest::read(path)?)),
            Some(q) => {
                let what = format!(
                    "quant_method {} cannot be read yet; supported: unquantized F32, F16, BF16 \
                     and \"anybit\"",
                    q["quant_method"]
                );
                return Err(IoError::unsupported(&config_path, what));
            }
        };
        if let Some(extra) = read_json(&path.join("generation_config.json"))? {
            config.add_generation_config(&extra);
        }
        let raw = open_folder(path)?;
        Ok(Self { path: path.to_owned(), config, source: Source::Folder { raw, manifest } })
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        let file = Box::new(GgufFile::open(path)?);
        let config = file.config()?;
        let tensors = file.hf_tensors(&config)?;
        Ok(Self { path: path.to_owned(), config, source: Source::Gguf { file, tensors } })
    }

    /// Where it came from.
    pub fn format(&self) -> Format {
        match &self.source {
            Source::Folder { manifest: None, .. } => Format::HuggingFace,
            Source::Folder { manifest: Some(_), .. } => Format::Native,
            Source::Gguf { .. } => Format::Gguf,
        }
    }

    /// The manifest of a native checkpoint.
    pub fn manifest(&self) -> Option<&Manifest> {
        match &self.source {
            Source::Folder { manifest, .. } => manifest.as_deref(),
            Source::Gguf { .. } => None,
        }
    }

    /// Whether its weights are packed codes.
    pub fn is_packed(&self) -> bool {
        self.manifest().is_some_and(|m| !m.quantized.is_empty())
    }

    /// Whether activations go through transforms or quantizers: something that other formats
    /// cannot hold.
    pub fn has_sites(&self) -> bool {
        self.manifest().is_some_and(|m| !m.sites.is_empty())
    }

    /// What stands at the sites of block `layer`.
    ///
    /// # Errors
    /// A record that does not fit the model or its parts.
    pub fn block_sites(&self, layer: usize) -> Result<BlockSites> {
        let mut sites = BlockSites::default();
        let Some(manifest) = self.manifest() else { return Ok(sites) };
        for site in Site::ALL {
            let name = site.full_name(layer);
            if let Some(record) = manifest.sites.get(&name) {
                *sites.at_mut(site) = record.load(&name, self.config.site_size(site), self)?;
            }
        }
        Ok(sites)
    }

    /// The GGUF file behind it, if there is one.
    pub fn gguf(&self) -> Option<&GgufFile> {
        match &self.source {
            Source::Gguf { file, .. } => Some(file),
            Source::Folder { .. } => None,
        }
    }

    fn check_tensors(&self) -> Result<()> {
        for (name, expected) in self.config.tensors() {
            let found = self.stored_shape(&name)?;
            let flat_bias =
                name.ends_with(".bias") && found.iter().product::<usize>() == expected[0];
            if found != expected && !flat_bias {
                return Err(IoError::Shape { path: self.path.clone(), name, expected, found });
            }
        }
        Ok(())
    }

    fn stored_shape(&self, name: &str) -> Result<Vec<usize>> {
        if let Some(record) = self.manifest().and_then(|m| m.quantized.get(name)) {
            return Ok(vec![record.rows, record.cols]);
        }
        Ok(self.tensor(name)?.shape)
    }

    fn missing(&self, name: &str) -> IoError {
        // A misnamed tensor is one that the configuration does not call for.
        let expected: BTreeSet<String> =
            self.config.tensors().into_iter().map(|(name, _)| name).collect();
        let stray = |n: &&str| !expected.contains(*n);
        let near = match &self.source {
            Source::Folder { raw, .. } => {
                nearest_name(name, raw.keys().map(String::as_str).filter(stray))
            }
            Source::Gguf { tensors, .. } => {
                nearest_name(name, tensors.keys().map(String::as_str).filter(stray))
            }
        };
        IoError::MissingTensor { path: self.path.clone(), name: name.into(), near }
    }

    /// A tensor that is stored unquantized (GGUF block types count as stored).
    ///
    /// # Errors
    /// [`IoError::MissingTensor`], or an element type that cannot be read.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor> {
        match &self.source {
            Source::Folder { raw, .. } => {
                raw.get(name).ok_or_else(|| self.missing(name))?.weights(name)
            }
            Source::Gguf { tensors, .. } => {
                tensors.get(name).cloned().ok_or_else(|| self.missing(name))
            }
        }
    }

    /// The raw part of a native tensor, such as `….codes.0.0`.
    ///
    /// # Errors
    /// [`IoError::MissingTensor`].
    pub fn raw(&self, name: &str) -> Result<&RawTensor> {
        match &self.source {
            Source::Folder { raw, .. } => raw.get(name).ok_or_else(|| self.missing(name)),
            Source::Gguf { .. } => Err(self.missing(name)),
        }
    }

    /// Every stored tensor by name, the parts of packed ones included; none of a GGUF file.
    pub fn raw_tensors(&self) -> impl Iterator<Item = (&String, &RawTensor)> {
        let raw = match &self.source {
            Source::Folder { raw, .. } => Some(raw),
            Source::Gguf { .. } => None,
        };
        raw.into_iter().flatten()
    }

    /// A weight matrix, packed or not.
    ///
    /// # Errors
    /// As [`Self::tensor`]; a packed one that does not fit its record.
    pub fn weight(&self, name: &str) -> Result<Weight> {
        match self.manifest().and_then(|m| m.quantized.get(name)) {
            Some(record) => Ok(Weight::Quantized(Arc::new(record.load(name, self)?))),
            None => Ok(Weight::Stored(self.tensor(name)?)),
        }
    }

    /// A vector (norm weight, bias) as f32.
    ///
    /// # Errors
    /// As [`Self::tensor`]; [`IoError::NotFinite`] for NaN or infinity.
    pub fn vector(&self, name: &str) -> Result<Vec<f32>> {
        let values = self.tensor(name)?.to_vec();
        match values.iter().position(|v| !v.is_finite()) {
            None => Ok(values),
            Some(index) => Err(IoError::NotFinite {
                path: self.path.clone(),
                name: name.into(),
                index,
                value: values[index],
            }),
        }
    }

    /// Reads every unquantized tensor once and fails at the first NaN or infinity; seconds now
    /// instead of hours later.
    ///
    /// # Errors
    /// [`IoError::NotFinite`].
    pub fn check_finite(&self) -> Result<()> {
        for (name, _) in self.config.tensors() {
            let Ok(tensor) = self.tensor(&name) else { continue };
            let (rows, cols) = RowSource::shape(&tensor);
            let chunk = ((1 << 18) / cols.max(1)).max(1);
            let bad = (0..rows.div_ceil(chunk)).into_par_iter().find_map_first(|c| {
                let range = c * chunk..((c + 1) * chunk).min(rows);
                let mut values = vec![0f32; range.len() * cols];
                tensor.read_rows(range.clone(), &mut values);
                let at = values.iter().position(|v| !v.is_finite())?;
                Some((range.start * cols + at, values[at]))
            });
            tensor.release();
            if let Some((index, value)) = bad {
                return Err(IoError::NotFinite { path: self.path.clone(), name, index, value });
            }
        }
        Ok(())
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// There is none, or it cannot be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        match &self.source {
            Source::Gguf { file, .. } => Tokenizer::from_gguf(file),
            Source::Folder { .. } => Tokenizer::from_file(&self.path.join("tokenizer.json")),
        }
    }

    /// Whether tokenization starts a text with BOS.
    pub fn adds_bos(&self) -> Result<bool> {
        Ok(match self.config.bos_token_id {
            None => false,
            Some(bos) => self.tokenizer()?.encode("a", true)?.first() == Some(&bos),
        })
    }

    /// Source of the chat template: `chat_template.jinja`, `tokenizer_config.json` or the GGUF
    /// metadata; `None` when there is none.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn chat_template_source(&self) -> Result<Option<String>> {
        if let Source::Gguf { file, .. } = &self.source {
            return Ok(file.metadata.get_str("tokenizer.chat_template").map(str::to_owned));
        }
        let file = self.path.join("chat_template.jinja");
        if file.exists() {
            let text = fs::read_to_string(&file).map_err(|e| IoError::file("read", &file, e))?;
            return Ok(Some(text));
        }
        let config = read_json(&self.path.join("tokenizer_config.json"))?.unwrap_or_default();
        let template = &config["chat_template"];
        // Some models carry a list of named templates.
        let named = template.as_array().and_then(|list| {
            list.iter().find(|t| t["name"] == "default").or(list.first())?["template"].as_str()
        });
        Ok(template.as_str().or(named).map(str::to_owned))
    }

    /// The chat template, ready to render; `None` when the model has none.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn chat_template(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let Some(source) = self.chat_template_source()? else { return Ok(None) };
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
        let bos = token(self.config.bos_token_id);
        let eos = token(self.config.eos_token_ids.first().copied());
        ChatTemplate::new(&source, bos.as_deref(), eos.as_deref()).map(Some)
    }

    /// Bytes of all tensors as they are stored, without the headers and metadata of their files.
    pub fn tensor_bytes(&self) -> u64 {
        match &self.source {
            Source::Folder { raw, .. } => raw.values().map(|r| r.bytes().len() as u64).sum(),
            Source::Gguf { tensors, .. } => {
                let unique: BTreeMap<_, u64> = tensors
                    .values()
                    .map(|t| (t.bytes().as_ptr(), t.bytes().len() as u64))
                    .collect();
                unique.values().sum()
            }
        }
    }

    /// [`Self::tensor_bytes`] of the checkpoint at `path`, which may be a GGUF file of types that
    /// cannot be read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn tensor_bytes_at(path: &Path) -> Result<u64> {
        match path.is_file() {
            true => gguf::header::tensor_bytes(&map_file(path)?, path),
            false => Ok(Self::open(path)?.tensor_bytes()),
        }
    }

    /// Size of the files that hold the weights.
    pub fn weight_file_bytes(&self) -> u64 {
        let paths: BTreeSet<&Path> = match &self.source {
            Source::Gguf { .. } => [self.path.as_path()].into(),
            Source::Folder { raw, .. } => raw.values().map(|r| r.path.as_path()).collect(),
        };
        paths.into_iter().filter_map(|p| Some(fs::metadata(p).ok()?.len())).sum()
    }
}

/// Reads a JSON file; `None` when it is not there.
///
/// # Errors
/// A file that is there and cannot be read or parsed.
pub fn read_json(path: &Path) -> Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
    serde_json::from_str(&text).map(Some).map_err(|e| IoError::damaged(path, e.to_string()))
}
