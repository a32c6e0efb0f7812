//! GGUF, the file format of llama.cpp: one file with configuration, tokenizer and weights.
//!
//! Read: versions 2 and 3, little-endian, of the architectures llama (Mistral included), qwen2
//! and qwen3, with weights in the float types and ggml's block types that [`crate::Dtype`] lists.
//! Written: version 3 with float weights. Layout: [`header`]; quantized blocks: [`blocks`];
//! configuration: [`metadata`]; names: [`names`]; export: [`mod@write`]. Sources: ggml
//! `docs/gguf.md`, llama.cpp `gguf-py` and `convert_hf_to_gguf.py`.

pub mod blocks;
pub mod header;
pub mod metadata;
pub mod names;
pub mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;

use crate::config::ModelConfig;
use crate::tensor::{RowOrder, StoredTensor};
use crate::{IoError, Result};

/// A memory-mapped GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    /// Where it lies.
    pub path: PathBuf,
    /// Its metadata.
    pub metadata: Metadata,
    /// Its tensors by GGUF name, rows as they are stored.
    pub tensors: BTreeMap<String, StoredTensor>,
    map: Arc<Mmap>,
    /// First byte of each tensor: what another view of it starts from.
    offsets: BTreeMap<String, usize>,
}

impl GgufFile {
    /// Maps the file and parses its header; no weights are read.
    ///
    /// # Errors
    /// What [`header::parse`] refuses, a file of several shards, and whatever the operating
    /// system says.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| IoError::file("open", path, e))?;
        // SAFETY: the mapping is read-only; as for every mapped checkpoint, another process that
        // truncates the file under us ends this one with SIGBUS, which no reader can prevent.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| IoError::file("map", path, e))?;
        let header = header::parse(&map, path)?;
        if let Some(shards) = header.metadata.get_u64("split.count").filter(|n| *n > 1) {
            let what = format!(
                "one of {shards} shards; merge them with `llama-gguf-split --merge` of llama.cpp"
            );
            return Err(IoError::unsupported(path, what));
        }
        let map = Arc::new(map);
        let (mut tensors, mut offsets) = (BTreeMap::new(), BTreeMap::new());
        for info in header.tensors {
            let natural = RowOrder::Natural;
            let tensor =
                StoredTensor::new(map.clone(), info.offset, info.dtype, info.shape, natural)
                    .ok_or_else(|| does_not_fit(path, &info.name))?;
            offsets.insert(info.name.clone(), info.offset);
            tensors.insert(info.name, tensor);
        }
        Ok(Self { path: path.to_owned(), metadata: header.metadata, tensors, map, offsets })
    }

    /// GGUF names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The model's configuration, from the metadata and from which tensors there are.
    ///
    /// # Errors
    /// An architecture, rotary scaling or shape of heads that is not supported; missing or
    /// contradictory keys.
    pub fn config(&self) -> Result<ModelConfig> {
        metadata::config(self)
    }

    /// The tensors by Hugging Face name, with the rows of q and k in Hugging Face order.
    ///
    /// llama.cpp permutes q and k of the llama architecture (and of no other) so that rotary pairs
    /// are adjacent; their views carry [`RowOrder::RotaryPairs`]. A bias among them has the shape
    /// `[n, 1]` here, because the order is one of rows: read biases flat.
    ///
    /// # Errors
    /// [`IoError::Unsupported`] for a tensor that a model of this `config` has no place for, since
    /// leaving it out would change what the model computes.
    pub fn hf_tensors(&self, config: &ModelConfig) -> Result<BTreeMap<String, StoredTensor>> {
        let known: BTreeSet<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        let permuted = self.metadata.get_str("general.architecture") == Some("llama");
        let mut all = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            if name == names::ROPE_FREQS {
                continue; // part of the configuration
            }
            let hf = names::to_hf(name).filter(|hf| known.contains(hf)).ok_or_else(|| {
                let arch = config.architecture.class_name();
                let what = format!("tensor {name} has no place in a {arch}; it is not supported");
                IoError::unsupported(&self.path, what)
            })?;
            let view = match permuted && names::is_rotary(name) {
                true => self.rotary_view(name, tensor, config.head_dim)?,
                false => tensor.clone(),
            };
            all.insert(hf, view);
        }
        Ok(all)
    }

    fn rotary_view(
        &self,
        name: &str,
        tensor: &StoredTensor,
        head_dim: usize,
    ) -> Result<StoredTensor> {
        let shape = match tensor.shape[..] {
            [] => vec![1, 1],
            [n] => vec![n, 1],
            _ => tensor.shape.clone(),
        };
        let rows: usize = shape.iter().rev().skip(1).product();
        if !rows.is_multiple_of(head_dim) {
            let what =
                format!("tensor {name}: {rows} rows are no whole number of heads of {head_dim}");
            return Err(IoError::damaged(&self.path, what));
        }
        let order = RowOrder::RotaryPairs { head_dim };
        self.offsets
            .get(name)
            .and_then(|at| StoredTensor::new(self.map.clone(), *at, tensor.dtype, shape, order))
            .ok_or_else(|| does_not_fit(&self.path, name))
    }
}

fn does_not_fit(path: &Path, tensor: &str) -> IoError {
    IoError::damaged(path, format!("tensor {tensor} does not fit its place in the file"))
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // the names are the types
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Vec<Value>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// The type's number in the file.
    pub fn type_id(&self) -> u32 {
        match self {
            Self::U8(_) => 0,
            Self::I8(_) => 1,
            Self::U16(_) => 2,
            Self::I16(_) => 3,
            Self::U32(_) => 4,
            Self::I32(_) => 5,
            Self::F32(_) => 6,
            Self::Bool(_) => 7,
            Self::String(_) => 8,
            Self::Array(_) => 9,
            Self::U64(_) => 10,
            Self::I64(_) => 11,
            Self::F64(_) => 12,
        }
    }

    /// A whole number of any type.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::I64(v) => Some(v),
            Self::U64(v) => i64::try_from(v).ok(),
            _ => None,
        }
    }

    /// A whole number of any type that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(v) => Some(v),
            _ => self.as_i64().and_then(|v| u64::try_from(v).ok()),
        }
    }

    /// A floating-point number of either type.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(v) => Some(v),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }
}

/// The metadata of a file. The typed getters give `None` both for an absent key and for one of
/// another type.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata {
    values: BTreeMap<String, Value>,
}

impl FromIterator<(String, Value)> for Metadata {
    fn from_iter<I: IntoIterator<Item = (String, Value)>>(pairs: I) -> Self {
        Self { values: pairs.into_iter().collect() }
    }
}

impl Metadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// All keys and values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A whole number of any type that is not negative.
    pub fn get_u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// A floating-point number of either type.
    pub fn get_f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.as_f64()
    }

    /// A string.
    pub fn get_str(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A truth value.
    pub fn get_bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn get_strings(&self, key: &str) -> Option<Vec<&str>> {
        self.get(key)?.as_array()?.iter().map(Value::as_str).collect()
    }

    /// An array of floating-point numbers.
    pub fn get_f32s(&self, key: &str) -> Option<Vec<f32>> {
        self.get(key)?.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect()
    }

    /// An array of whole numbers of any type.
    pub fn get_i64s(&self, key: &str) -> Option<Vec<i64>> {
        self.get(key)?.as_array()?.iter().map(Value::as_i64).collect()
    }
}

#[cfg(test)]
mod testing {
    //! Tiny models that the tests of this folder write and read.

    use super::*;
    use crate::config::Architecture;
    use crate::tensor::Dtype;

    pub fn tiny(architecture: Architecture) -> ModelConfig {
        let qwen2 = architecture == Architecture::Qwen2ForCausalLM;
        let qwen3 = architecture == Architecture::Qwen3ForCausalLM;
        ModelConfig {
            architecture,
            hidden_size: 8,
            intermediate_size: 16,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            vocab_size: 12,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            max_positions: 128,
            tie_embeddings: qwen2,
            qkv_bias: qwen2,
            o_bias: false,
            mlp_bias: false,
            qk_norm: qwen3,
            sliding_window: None,
            window_from: if qwen2 || qwen3 { 2 } else { 0 },
            bos_token_id: Some(1),
            eos_token_ids: vec![2, 3],
        }
    }

    /// Values of a tensor by its Hugging Face name, exact in every float type.
    pub fn values(config: &ModelConfig, name: &str) -> Vec<f32> {
        let (_, shape) = config.tensors().into_iter().find(|(n, _)| n == name).unwrap();
        let seed: usize = name.bytes().map(usize::from).sum();
        let len: usize = shape.iter().product();
        (0..len).map(|i| ((i * 7 + seed) % 101) as f32 / 64.0 - 0.75).collect()
    }

    pub fn export(config: &ModelConfig, dtype: Dtype, path: &Path) {
        write::export(config, &|name| Ok(values(config, name)), None, dtype, path).unwrap();
    }

    /// A file with just these keys and F32 tensors.
    pub fn open_with(
        metadata: &[(String, Value)],
        tensors: &[(&str, Vec<usize>, Vec<f32>)],
    ) -> Result<GgufFile> {
        let plans: Vec<write::TensorPlan> = tensors
            .iter()
            .map(|(name, shape, _)| write::TensorPlan {
                name: (*name).into(),
                dtype: Dtype::F32,
                shape: shape.clone(),
            })
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.gguf");
        let mut bytes = Vec::new();
        write::write_gguf(&mut bytes, &path, metadata, &plans, |plan, out| {
            let (_, _, values) = tensors.iter().find(|(name, _, _)| *name == plan.name).unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            out.write_all(&bytes).map_err(|e| IoError::file("write", &path, e))
        })
        .unwrap();
        std::fs::write(&path, bytes).unwrap();
        GgufFile::open(&path)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::testing::*;
    use super::*;
    use crate::config::Architecture;
    use crate::tensor::Dtype;

    /// A valid file, and where its data starts.
    fn valid() -> &'static (Vec<u8>, usize) {
        static FILE: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
        FILE.get_or_init(|| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tiny.gguf");
            export(&tiny(Architecture::LlamaForCausalLM), Dtype::F16, &path);
            let bytes = std::fs::read(&path).unwrap();
            let data_start = header::parse(&bytes, &path).unwrap().data_start;
            (bytes, data_start)
        })
    }

    /// Everything that a loader does with a file.
    fn read_all(path: &Path) -> Result<usize> {
        let file = GgufFile::open(path)?;
        let mut elements: usize = file.tensors.values().map(|t| t.to_vec().len()).sum();
        let config = file.config()?;
        for tensor in file.hf_tensors(&config)?.values() {
            elements += tensor.to_vec().len();
        }
        Ok(elements)
    }

    #[test]
    fn every_prefix_is_refused() {
        let (bytes, _) = valid();
        let path = Path::new("prefix.gguf");
        let tensors = header::parse(bytes, path).unwrap().tensors;
        // Padding follows the last tensor; a file without it is whole.
        let end = tensors.iter().map(|t| t.offset + t.bytes).max().unwrap();
        for n in 0..end {
            assert!(header::parse(&bytes[..n], path).is_err(), "{n} bytes");
        }
        assert!(header::parse(&bytes[..end], path).is_ok());
    }

    #[test]
    fn short_files_are_refused_when_mapped() {
        let (bytes, data_start) = valid();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short.gguf");
        for n in [0, 1, 4, 24, *data_start, bytes.len() / 2] {
            std::fs::write(&path, &bytes[..n]).unwrap();
            assert!(GgufFile::open(&path).is_err(), "{n} bytes");
        }
        std::fs::write(&path, bytes).unwrap();
        assert!(read_all(&path).unwrap() > 0);
        assert!(GgufFile::open(&dir.path().join("absent.gguf")).is_err());
    }

    #[test]
    fn a_tensor_without_a_place_is_named() {
        let config = tiny(Architecture::LlamaForCausalLM);
        let keys = metadata::from_config(&config, "tiny", 0);
        for name in ["blk.0.ffn_gate_inp.weight", "blk.0.attn_q_norm.weight", "blk.2.attn_q.weight"]
        {
            let embed = ("token_embd.weight", vec![12, 8], vec![0.0; 96]);
            let file = open_with(&keys, &[embed, (name, vec![8], vec![0.0; 8])]).unwrap();
            let text = file.hf_tensors(&config).unwrap_err().to_string();
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn a_shard_is_refused() {
        let text =
            open_with(&[("split.count".into(), Value::U16(3))], &[]).unwrap_err().to_string();
        assert!(text.contains("3 shards"), "{text}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Flipped, inserted and removed bytes give an error or other values, never a panic. Half
        /// of the edits go to the header, which is a small part of the file.
        #[test]
        fn damage_never_panics(
            edits in prop::collection::vec(
                (any::<usize>(), any::<u8>(), 0..4u8, any::<bool>()),
                1..6,
            )
        ) {
            let (original, data_start) = valid();
            let mut bytes = original.clone();
            for (at, value, kind, in_header) in edits {
                let at = at % if in_header { *data_start } else { bytes.len() };
                match kind {
                    0 => bytes[at] = value,
                    1 => bytes[at] ^= 1 << (value % 8),
                    2 => bytes.insert(at, value),
                    _ => {
                        bytes.remove(at);
                    }
                }
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("damaged.gguf");
            std::fs::write(&path, bytes).unwrap();
            let _ = read_all(&path);
        }
    }
}
