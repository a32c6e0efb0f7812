//! Writing GGUF version 3: [`write_gguf`] the container, [`export`] a whole model as floats.
//!
//! Layout as in [`super::header`]. Tensors are produced one at a time in the order of the plan, so
//! memory holds the largest tensor and not the model. As llama.cpp's converter does: norms and
//! biases stay F32, and rows of q and k of the llama architecture are permuted within each head
//! (viewed as `[2, head_dim/2]`, transposed) so that rotary pairs are adjacent.

use std::io::{self, Write};
use std::path::Path;

use super::header::{DEFAULT_ALIGNMENT, MAGIC, type_id};
use super::{Value, metadata, names};
use crate::atomic;
use crate::config::{ModelConfig, RopeScaling};
use crate::tensor::Dtype;
use crate::{IoError, Result};

const VERSION: u32 = 3;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPlan {
    /// GGUF name.
    pub name: String,
    /// Element type; rows must be a whole number of its blocks.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorPlan {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Length of the data in bytes.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes(self.elements())
    }
}

/// Writes a file to `out`: the header, then each tensor of the plan, whose data `source` writes.
/// `path` is for messages.
///
/// # Errors
/// What `source` or `out` say; metadata arrays of mixed types, another alignment than 32, rows that
/// are no whole number of blocks, and a `source` that writes another length than planned.
pub fn write_gguf(
    out: impl Write,
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[TensorPlan],
    mut source: impl FnMut(&TensorPlan, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let io = |e: io::Error| IoError::file("write", path, e);
    let mut out = Counted { out, written: 0 };
    out.write_all(&header(path, metadata, tensors)?).map_err(io)?;
    out.pad().map_err(io)?;
    for plan in tensors {
        let start = out.written;
        source(plan, &mut out)?;
        let (written, planned) = (out.written - start, plan.bytes());
        if written != planned {
            let name = &plan.name;
            let what = format!("tensor {name} came with {written} bytes, {planned} were planned");
            return Err(IoError::unsupported(path, what));
        }
        out.pad().map_err(io)?;
    }
    out.flush().map_err(io)
}

/// A writer that knows how much it wrote.
struct Counted<W> {
    out: W,
    written: usize,
}

impl<W: Write> Counted<W> {
    fn pad(&mut self) -> io::Result<()> {
        let padding = self.written.next_multiple_of(DEFAULT_ALIGNMENT) - self.written;
        self.write_all(&[0; DEFAULT_ALIGNMENT][..padding])
    }
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn header(path: &Path, metadata: &[(String, Value)], tensors: &[TensorPlan]) -> Result<Vec<u8>> {
    let unsupported = |what: String| IoError::unsupported(path, what);
    let mut b = MAGIC.to_vec();
    b.extend(VERSION.to_le_bytes());
    b.extend((tensors.len() as u64).to_le_bytes());
    b.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        if key == "general.alignment" && value.as_u64() != Some(DEFAULT_ALIGNMENT as u64) {
            return Err(unsupported(format!("only the alignment {DEFAULT_ALIGNMENT} is written")));
        }
        put_string(&mut b, key);
        b.extend(value.type_id().to_le_bytes());
        put_value(&mut b, value)
            .ok_or_else(|| unsupported(format!("metadata array {key} mixes types")))?;
    }
    let mut offset = 0u64;
    for t in tensors {
        let row = t.shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(t.dtype.block_len()) {
            let (name, dtype) = (&t.name, t.dtype);
            return Err(unsupported(format!(
                "tensor {name}: rows of {row} are no whole number of {dtype:?} blocks"
            )));
        }
        put_string(&mut b, &t.name);
        b.extend((t.shape.len() as u32).to_le_bytes());
        for dim in t.shape.iter().rev() {
            b.extend((*dim as u64).to_le_bytes());
        }
        b.extend(type_id(t.dtype).to_le_bytes());
        b.extend(offset.to_le_bytes());
        offset += t.bytes().next_multiple_of(DEFAULT_ALIGNMENT) as u64;
    }
    Ok(b)
}

fn put_string(b: &mut Vec<u8>, text: &str) {
    b.extend((text.len() as u64).to_le_bytes());
    b.extend(text.as_bytes());
}

/// Appends a value; `None` when an array mixes types, which the format cannot say.
fn put_value(b: &mut Vec<u8>, value: &Value) -> Option<()> {
    match value {
        Value::U8(v) => b.push(*v),
        Value::I8(v) => b.extend(v.to_le_bytes()),
        Value::U16(v) => b.extend(v.to_le_bytes()),
        Value::I16(v) => b.extend(v.to_le_bytes()),
        Value::U32(v) => b.extend(v.to_le_bytes()),
        Value::I32(v) => b.extend(v.to_le_bytes()),
        Value::F32(v) => b.extend(v.to_le_bytes()),
        Value::Bool(v) => b.push(u8::from(*v)),
        Value::String(v) => put_string(b, v),
        Value::U64(v) => b.extend(v.to_le_bytes()),
        Value::I64(v) => b.extend(v.to_le_bytes()),
        Value::F64(v) => b.extend(v.to_le_bytes()),
        Value::Array(values) => {
            // An empty array has a type all the same. Those of tokenizers hold strings, and
            // llama.cpp insists on it.
            let kind =
                values.first().map_or(Value::String(String::new()).type_id(), Value::type_id);
            b.extend(kind.to_le_bytes());
            b.extend((values.len() as u64).to_le_bytes());
            for v in values {
                if v.type_id() != kind {
                    return None;
                }
                put_value(b, v)?;
            }
        }
    }
    Some(())
}

/// Writes a model in F32, F16 or BF16 to `path`, replacing what is there only once the new file
/// is complete and on the disk ([`atomic::write_file`]).
///
/// `read` gives each tensor by its Hugging Face name, in Hugging Face order. Without `tokenizer`
/// (its metadata; start and end tokens there win over the configuration's) the file says that it
/// has none. A sliding window is not written: llama.cpp attends to the whole context in these
/// architectures.
///
/// # Errors
/// What `read` says, values that are not finite or too large for `dtype`, other dtypes, Llama 3's
/// rotary scaling in another architecture, and whatever the operating system says.
pub fn export(
    config: &ModelConfig,
    read: &dyn Fn(&str) -> Result<Vec<f32>>,
    tokenizer: Option<&[(String, Value)]>,
    dtype: Dtype,
    path: &Path,
) -> Result<()> {
    config.validate(path)?;
    let file_type = file_type(dtype, path)?;
    let permuted = metadata::arch_name(config.architecture) == "llama";
    if !permuted && matches!(config.rope_scaling, Some(RopeScaling::Llama3 { .. })) {
        let arch = config.architecture.class_name();
        let what = format!("GGUF has no place for Llama 3's rope scaling in a {arch}");
        return Err(IoError::unsupported(path, what));
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let mut keys = metadata::from_config(config, &name, file_type);
    match tokenizer {
        Some(tokenizer) => {
            keys.retain(|(key, _)| tokenizer.iter().all(|(other, _)| other != key));
            keys.extend_from_slice(tokenizer);
        }
        None => keys.push(("tokenizer.ggml.model".into(), Value::String("no_vocab".into()))),
    }
    let divisors = metadata::rope_divisors(config);
    let plans = plans(config, &divisors, dtype, path)?;
    atomic::write_file(path, |file| {
        write_gguf(file, path, &keys, &plans, |plan, out| {
            let values = match names::to_hf(&plan.name) {
                Some(hf) => read(&hf)?,
                None => divisors.clone(),
            };
            let rotary = permuted && names::is_rotary(&plan.name);
            write_rows(&values, plan, rotary.then_some(config.head_dim), path, out)
        })
    })
}

/// llama.cpp's `llama_ftype`.
fn file_type(dtype: Dtype, path: &Path) -> Result<u32> {
    match dtype {
        Dtype::F32 => Ok(0),
        Dtype::F16 => Ok(1),
        Dtype::BF16 => Ok(32),
        _ => {
            let what = format!("export as {dtype:?} is not supported; supported: F32, F16, BF16");
            Err(IoError::unsupported(path, what))
        }
    }
}

fn plans(
    config: &ModelConfig,
    divisors: &[f32],
    dtype: Dtype,
    path: &Path,
) -> Result<Vec<TensorPlan>> {
    let mut all = Vec::new();
    if !divisors.is_empty() {
        let (name, shape) = (names::ROPE_FREQS.to_string(), vec![divisors.len()]);
        all.push(TensorPlan { name, dtype: Dtype::F32, shape });
    }
    for (hf, shape) in config.tensors() {
        let name = names::to_gguf(&hf)
            .ok_or_else(|| IoError::unsupported(path, format!("GGUF has no name for {hf}")))?;
        let dtype = if shape.len() == 1 { Dtype::F32 } else { dtype };
        all.push(TensorPlan { name, dtype, shape });
    }
    Ok(all)
}

/// Encodes a tensor row by row, in rotary pairs within heads of `head_dim` rows if that is given.
fn write_rows(
    values: &[f32],
    plan: &TensorPlan,
    head_dim: Option<usize>,
    path: &Path,
    out: &mut dyn Write,
) -> Result<()> {
    if values.len() != plan.elements() {
        let (name, found) = (plan.name.clone(), vec![values.len()]);
        let expected = plan.shape.clone();
        return Err(IoError::Shape { path: path.to_owned(), name, expected, found });
    }
    // The rows of a bias are its elements.
    let cols = match plan.shape[..] {
        [_] if head_dim.is_some() => 1,
        _ => plan.shape.last().copied().unwrap_or(1),
    };
    let mut buffer = Vec::with_capacity(4 * cols);
    for file_row in 0..values.len() / cols {
        let row = head_dim.map_or(file_row, |d| natural_row(file_row, d));
        buffer.clear();
        encode(&values[row * cols..(row + 1) * cols], row * cols, plan, path, &mut buffer)?;
        out.write_all(&buffer).map_err(|e| IoError::file("write", path, e))?;
    }
    Ok(())
}

/// The row of a Hugging Face checkpoint that stands at `file_row`: the inverse of what
/// [`crate::tensor::RowOrder::RotaryPairs`] does on reading.
fn natural_row(file_row: usize, head_dim: usize) -> usize {
    let (head, within) = (file_row / head_dim, file_row % head_dim);
    head * head_dim + within % 2 * (head_dim / 2) + within / 2
}

/// Appends `values`, of which the first is element `first` of the tensor.
fn encode(
    values: &[f32],
    first: usize,
    plan: &TensorPlan,
    path: &Path,
    buffer: &mut Vec<u8>,
) -> Result<()> {
    for (i, &value) in values.iter().enumerate() {
        let (index, name) = (first + i, &plan.name);
        if !value.is_finite() {
            let (path, name) = (path.to_owned(), name.clone());
            return Err(IoError::NotFinite { path, name, index, value });
        }
        let fits = match plan.dtype {
            Dtype::F16 => {
                let half = half::f16::from_f32(value);
                buffer.extend(half.to_le_bytes());
                half.is_finite()
            }
            Dtype::BF16 => {
                let half = half::bf16::from_f32(value);
                buffer.extend(half.to_le_bytes());
                half.is_finite()
            }
            _ => {
                buffer.extend(value.to_le_bytes());
                true
            }
        };
        if !fits {
            let what = format!(
                "tensor {name} holds {value} at element {index}, too large for {:?}; export a \
                 wider type (BF16 or F32)",
                plan.dtype
            );
            return Err(IoError::unsupported(path, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::GgufFile;
    use super::super::testing::{export as export_tiny, tiny, values};
    use super::*;
    use crate::config::Architecture;

    const FLOATS: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    /// Exports `config`, and checks that reading gives it and its tensors back.
    fn round_trip(config: &ModelConfig, dtype: Dtype) -> GgufFile {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        export_tiny(config, dtype, &path);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no partial file is left");
        let file = GgufFile::open(&path).unwrap();
        let found = file.config().unwrap();
        let llama = Architecture::LlamaForCausalLM;
        let mistral = config.architecture == Architecture::MistralForCausalLM;
        let architecture = if mistral { llama } else { config.architecture };
        assert_eq!(found, ModelConfig { architecture, ..config.clone() });
        let tensors = file.hf_tensors(&found).unwrap();
        let names: Vec<String> = config.tensors().into_iter().map(|(name, _)| name).collect();
        assert_eq!(tensors.len(), names.len());
        for name in names {
            assert_eq!(tensors[&name].to_vec(), values(config, &name), "{name}");
            let want = if tensors[&name].shape.len() == 1 || name.ends_with("bias") {
                Dtype::F32
            } else {
                dtype
            };
            assert_eq!(tensors[&name].dtype, want, "{name}");
        }
        file
    }

    #[test]
    fn every_architecture_and_type_round_trips() {
        for architecture in Architecture::ALL {
            for dtype in FLOATS {
                let file = round_trip(&tiny(architecture), dtype);
                assert_eq!(file.metadata.get_str("tokenizer.ggml.model"), Some("no_vocab"));
            }
        }
    }

    #[test]
    fn only_the_llama_architecture_is_permuted() {
        for architecture in Architecture::ALL {
            let config = tiny(architecture);
            let file = round_trip(&config, Dtype::F32);
            let natural = values(&config, "model.layers.0.self_attn.q_proj.weight");
            let stored = file.tensors["blk.0.attn_q.weight"].to_vec();
            // Heads of 4: file rows 0, 1, 2, 3 are natural rows 0, 2, 1, 3.
            let row = |m: &[f32], i: usize| m[8 * i..8 * (i + 1)].to_vec();
            let order = if file.metadata.get_str("general.architecture") == Some("llama") {
                [0, 2, 1, 3, 4, 6, 5, 7]
            } else {
                [0, 1, 2, 3, 4, 5, 6, 7]
            };
            for (at, from) in order.into_iter().enumerate() {
                assert_eq!(row(&stored, at), row(&natural, from), "{architecture:?} row {at}");
            }
        }
    }

    #[test]
    fn biases_round_trip_and_are_permuted_too() {
        let llama = tiny(Architecture::LlamaForCausalLM);
        let config = ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..llama };
        let file = round_trip(&config, Dtype::BF16);
        let natural = values(&config, "model.layers.1.self_attn.k_proj.bias");
        let stored = file.tensors["blk.1.attn_k.bias"].to_vec();
        assert_eq!(stored, [natural[0], natural[2], natural[1], natural[3]]);
    }

    #[test]
    fn rotary_scaling_round_trips() {
        let rope_scaling = Some(RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 4096.0,
        });
        let llama = tiny(Architecture::LlamaForCausalLM);
        let llama = ModelConfig { head_dim: 8, rope_theta: 500_000.0, rope_scaling, ..llama };
        let file = round_trip(&llama, Dtype::F16);
        assert_eq!(file.tensors[names::ROPE_FREQS].len(), 4);
        let qwen = ModelConfig { rope_scaling, ..tiny(Architecture::Qwen3ForCausalLM) };
        let read = |name: &str| Ok(values(&qwen, name));
        let error =
            export(&qwen, &read, None, Dtype::F16, Path::new("unwritten.gguf")).unwrap_err();
        assert!(error.to_string().contains("rope scaling"), "{error}");
    }

    #[test]
    fn tokenizer_metadata_is_written_and_wins() {
        let config = tiny(Architecture::Qwen2ForCausalLM);
        let strings =
            |list: &[&str]| Value::Array(list.iter().map(|s| Value::String((*s).into())).collect());
        let tokenizer = [
            ("tokenizer.ggml.model".to_string(), Value::String("gpt2".into())),
            ("tokenizer.ggml.tokens".to_string(), strings(&["a", "ß", ""])),
            ("tokenizer.ggml.merges".to_string(), Value::Array(Vec::new())),
            ("tokenizer.ggml.scores".to_string(), Value::Array(vec![Value::F32(-1.5)])),
            ("tokenizer.ggml.eos_token_id".to_string(), Value::U32(7)),
            ("tokenizer.ggml.add_bos_token".to_string(), Value::Bool(true)),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        let read = |name: &str| Ok(values(&config, name));
        export(&config, &read, Some(&tokenizer), Dtype::F16, &path).unwrap();
        let file = GgufFile::open(&path).unwrap();
        for (key, value) in &tokenizer {
            assert_eq!(file.metadata.get(key), Some(value), "{key}");
        }
        assert_eq!(file.metadata.get_strings("tokenizer.ggml.tokens"), Some(vec!["a", "ß", ""]));
        assert_eq!(file.metadata.get_f32s("tokenizer.ggml.scores"), Some(vec![-1.5]));
        assert_eq!(file.metadata.get_bool("tokenizer.ggml.add_bos_token"), Some(true));
        assert_eq!(file.config().unwrap().eos_token_ids, [7, 3]);
    }

    #[test]
    fn values_that_do_not_fit_are_named_and_leave_the_old_file() {
        let config = tiny(Architecture::LlamaForCausalLM);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        fs::write(&path, "the old file").unwrap();
        let attempt = |dtype: Dtype, value: f32| {
            let read = |name: &str| {
                let mut v = values(&config, name);
                if name.contains("1.mlp.up_proj") {
                    v[5] = value;
                }
                Ok(v)
            };
            let text = export(&config, &read, None, dtype, &path).unwrap_err().to_string();
            assert!(text.contains("blk.1.ffn_up.weight") && text.contains("element 5"), "{text}");
        };
        attempt(Dtype::F16, 70_000.0);
        attempt(Dtype::F16, -1e6);
        attempt(Dtype::BF16, f32::MAX);
        attempt(Dtype::F32, f32::NAN);
        attempt(Dtype::F16, f32::INFINITY);
        assert_eq!(fs::read(&path).unwrap(), b"the old file");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let short = |_: &str| Ok(vec![0.0; 3]);
        assert!(export(&config, &short, None, Dtype::F32, &path).is_err());
        let read = |name: &str| Ok(values(&config, name));
        assert!(export(&config, &read, None, Dtype::Q8_0, &path).is_err());
    }

    #[test]
    fn the_container_refuses_what_it_cannot_say() {
        let path = Path::new("x.gguf");
        let plan = TensorPlan { name: "w".into(), dtype: Dtype::F32, shape: vec![2, 3] };
        let keys = [("list".to_string(), Value::Array(vec![Value::U8(1), Value::U16(1)]))];
        assert!(write_gguf(io::sink(), path, &keys, &[], |_, _| Ok(())).is_err());
        let keys = [("general.alignment".to_string(), Value::U32(64))];
        assert!(write_gguf(io::sink(), path, &keys, &[], |_, _| Ok(())).is_err());
        let one = std::slice::from_ref(&plan);
        let error = write_gguf(io::sink(), path, &[], one, |_, out| {
            out.write_all(&[0; 8]).map_err(|e| IoError::file("write", path, e))
        });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("tensor w came with 8 bytes, 24 were planned"), "{text}");
        let blocks = TensorPlan { dtype: Dtype::Q8_0, ..plan };
        assert!(write_gguf(io::sink(), path, &[], &[blocks], |_, _| Ok(())).is_err());
    }
}
