//! Conversion between checkpoint formats: anything readable to a Hugging Face folder or to GGUF.

use std::fs;
use std::io::Write;
use std::path::Path;

use anybit_core::RowSource;
use half::{bf16, f16};
use serde_json::{Value, json};

use crate::atomic::{PartialFolder, check_absent, check_space, write_bytes};
use crate::checkpoint::read_json;
use crate::gguf::Value as Field;
use crate::off_grid::OffGrid;
use crate::safetensors_file::{FileDtype, PlannedTensor, index_json, layout};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::gguf::{GgufVocab, to_gguf as to_gguf_vocab};
use crate::{Checkpoint, Dtype, IoError, Result};

/// Settings of [`to_folder`].
#[derive(Debug, Clone, Copy)]
pub struct FolderOptions {
    /// Element type of all tensors: F32, F16 or BF16.
    pub dtype: Dtype,
    /// Spread and seed of the factors that take the model off its grid.
    pub off_grid: Option<(f64, u64)>,
    /// Replace an existing output.
    pub force: bool,
}

/// The safetensors type of an element type that a folder can be written in.
fn file_dtype(dtype: Dtype) -> Option<(FileDtype, &'static str)> {
    match dtype {
        Dtype::F32 => Some((FileDtype::F32, "float32")),
        Dtype::F16 => Some((FileDtype::F16, "float16")),
        Dtype::BF16 => Some((FileDtype::BF16, "bfloat16")),
        _ => None,
    }
}

/// Writes `source` as a Hugging Face folder that `transformers` loads. Streams a few rows at a
/// time; `progress` hears bytes done and bytes in all.
///
/// # Errors
/// The output exists, the disk is too small, a value overflows f16, or what reading finds.
pub fn to_folder(
    source: &Checkpoint,
    out: &Path,
    options: FolderOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    refuse_sites(source)?;
    let (dtype, dtype_name) = file_dtype(options.dtype).ok_or_else(|| {
        let what =
            format!("{:?} is not an element type of folders: use f32, f16 or bf16", options.dtype);
        IoError::unsupported(out, what)
    })?;
    let planned: Vec<PlannedTensor> = source
        .config
        .tensors()
        .into_iter()
        .map(|(name, shape)| PlannedTensor::new(name, dtype, shape))
        .collect();
    let layouts = layout(planned);
    let total: u64 = layouts.iter().map(|l| l.file_bytes()).sum();
    check_absent(out, options.force)?;
    check_space(out, total)?;
    source.check_finite()?;
    let folder = PartialFolder::create(out, false, options.force)?;
    let off_grid = options.off_grid.map(|(sigma, seed)| OffGrid::new(&source.config, sigma, seed));
    let mut done = 0;
    for file in &layouts {
        file.write(folder.path(), |tensor, out| {
            write_tensor(source, tensor, off_grid.as_ref(), options.dtype, out)?;
            done += tensor.bytes();
            progress(done, total);
            Ok(())
        })?;
    }
    if let Some(index) = index_json(&layouts) {
        write_bytes(&folder.path().join("model.safetensors.index.json"), index.as_bytes())?;
    }
    let config = source.config.to_json(dtype_name);
    write_bytes(&folder.path().join("config.json"), format!("{config:#}\n").as_bytes())?;
    copy_text_files(source, folder.path())?;
    folder.finish()
}

/// Transforms and quantizers of activations are part of what the model computes, and no other
/// format holds them.
fn refuse_sites(source: &Checkpoint) -> Result<()> {
    if !source.has_sites() {
        return Ok(());
    }
    let what = "its activations go through transforms or quantizers, which this format cannot \
                hold: convert the original model";
    Err(IoError::unsupported(&source.path, what))
}

fn write_tensor(
    source: &Checkpoint,
    tensor: &PlannedTensor,
    off_grid: Option<&OffGrid<'_>>,
    dtype: Dtype,
    out: &mut dyn Write,
) -> Result<()> {
    let weight = source.weight(&tensor.name)?;
    let factors = off_grid.map(|o| o.factors(&tensor.name));
    // A vector is one row to `RowSource` but a column of single factors here.
    let (rows, cols) = match tensor.shape[..] {
        [n] => (n, 1),
        _ => weight.shape(),
    };
    let chunk = if tensor.shape.len() == 1 { rows } else { ((1 << 20) / cols.max(1)).max(1) };
    let mut values = Vec::new();
    let mut bytes = Vec::new();
    for first in (0..rows).step_by(chunk.max(1)) {
        let count = chunk.min(rows - first);
        values.resize(count * cols, 0f32);
        match &weight {
            crate::Weight::Stored(t) if tensor.shape.len() == 1 => values = t.to_vec(),
            _ => weight.read_rows(first..first + count, &mut values),
        }
        if let Some(factors) = &factors {
            factors.apply(first, cols, &mut values);
        }
        encode(dtype, &values, &mut bytes);
        if let Some(at) = overflow(dtype, &values) {
            return Err(IoError::NotFinite {
                path: source.path.clone(),
                name: format!("{} as {dtype:?}", tensor.name),
                index: first * cols + at,
                value: values[at],
            });
        }
        out.write_all(&bytes).map_err(|e| IoError::file("write", Path::new(&tensor.name), e))?;
    }
    if let crate::Weight::Stored(t) = &weight {
        t.release();
    }
    Ok(())
}

fn overflow(dtype: Dtype, values: &[f32]) -> Option<usize> {
    let overflows = |v: &f32| match dtype {
        Dtype::F16 => f16::from_f32(*v).is_infinite(),
        Dtype::BF16 => bf16::from_f32(*v).is_infinite(),
        _ => false,
    };
    values.iter().position(overflows)
}

/// Rounds f32 values to `dtype` (F32, F16 or BF16), little-endian, replacing `bytes`.
pub fn encode(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    bytes.clear();
    match dtype {
        Dtype::F16 => bytes.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        Dtype::BF16 => bytes.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        _ => bytes.extend(values.iter().flat_map(|v| v.to_le_bytes())),
    }
}

/// Copies tokenizer, chat template, generation settings and licence; from a GGUF they are made
/// from its metadata.
///
/// # Errors
/// A file that cannot be read or written.
pub fn copy_text_files(source: &Checkpoint, folder: &Path) -> Result<()> {
    if source.gguf().is_some() {
        return write_text_files(source, folder);
    }
    const NAMES: [&str; 11] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE",
        "NOTICE",
    ];
    for name in NAMES {
        let from = source.path.join(name);
        if from.exists() {
            let bytes = fs::read(&from).map_err(|e| IoError::file("read", &from, e))?;
            write_bytes(&folder.join(name), &bytes)?;
        }
    }
    Ok(())
}

fn write_text_files(source: &Checkpoint, folder: &Path) -> Result<()> {
    let tokenizer = source.tokenizer()?;
    tokenizer.save(&folder.join("tokenizer.json"))?;
    let license = source.gguf().and_then(|g| g.metadata.get_str("general.license"));
    if let Some(license) = license.filter(|l| l.chars().all(|c| !c.is_control())) {
        write_bytes(
            &folder.join("README.md"),
            format!("---\nlicense: {license}\n---\n").as_bytes(),
        )?;
    }
    let json_file = |name: &str, value: Value| {
        write_bytes(&folder.join(name), format!("{value:#}\n").as_bytes())
    };
    json_file("tokenizer_config.json", tokenizer_config(source, &tokenizer)?)?;
    let mut generation = json!({});
    if let Some(bos) = source.config.bos_token_id {
        generation["bos_token_id"] = json!(bos);
    }
    if !source.config.eos_token_ids.is_empty() {
        generation["eos_token_id"] = json!(source.config.eos_token_ids);
    }
    json_file("generation_config.json", generation)
}

fn tokenizer_config(source: &Checkpoint, tokenizer: &Tokenizer) -> Result<Value> {
    let mut value = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.max_positions,
        "clean_up_tokenization_spaces": false,
        "add_bos_token": source.adds_bos()?,
    });
    let token = |id: Option<u32>| id.and_then(|id| tokenizer.token(id));
    if let Some(bos) = token(source.config.bos_token_id) {
        value["bos_token"] = json!(bos);
    }
    if let Some(eos) = token(source.config.eos_token_ids.first().copied()) {
        value["eos_token"] = json!(eos);
    }
    if let Some(template) = source.chat_template_source()? {
        value["chat_template"] = json!(template);
    }
    Ok(value)
}

/// Writes `source` as a GGUF file that llama.cpp loads. Packed matrices are decoded.
///
/// # Errors
/// The output exists, the disk is too small, a tokenizer that GGUF cannot hold, a value that
/// overflows f16, or what reading finds.
pub fn to_gguf(source: &Checkpoint, out: &Path, dtype: Dtype, force: bool) -> Result<()> {
    check_absent(out, force)?;
    refuse_sites(source)?;
    let elements: usize =
        source.config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).sum();
    check_space(out, dtype.bytes(elements) as u64)?;
    source.check_finite()?;
    let metadata = gguf_tokenizer(source)?;
    let read = |name: &str| {
        let weight = source.weight(name)?;
        let (rows, cols) = weight.shape();
        let mut values = vec![0f32; rows * cols];
        weight.read_rows(0..rows, &mut values);
        Ok(values)
    };
    crate::gguf::write::export(&source.config, &read, Some(&metadata), dtype, out)
}

/// Tokenizer and chat template as GGUF metadata.
fn gguf_tokenizer(source: &Checkpoint) -> Result<Vec<(String, Field)>> {
    let vocab = match source.gguf() {
        Some(file) => GgufVocab::read(&file.metadata, &source.path)?,
        None => {
            let path = source.path.join("tokenizer.json");
            let json = read_json(&path)?.ok_or_else(|| {
                let e = std::io::Error::from(std::io::ErrorKind::NotFound);
                IoError::file("read", &path, e)
            })?;
            let config = &source.config;
            let eos = config.eos_token_ids.first().copied();
            to_gguf_vocab(&json, config.vocab_size, config.bos_token_id, eos, &path)?
        }
    };
    let mut keys = vocab.keys();
    if let Some(template) = source.chat_template_source()? {
        keys.push(("tokenizer.chat_template".into(), Field::String(template)));
    }
    Ok(keys)
}
