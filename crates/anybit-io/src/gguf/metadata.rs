//! [`ModelConfig`] from GGUF metadata, and back.
//!
//! Keys are `general.*`, `tokenizer.ggml.*` and, below the architecture's name, the sizes
//! (llama.cpp `gguf-py/gguf/constants.py`). What has no key is seen in the tensors: the
//! vocabulary's size, biases, a tied head, and Llama 3's rotary scaling, which GGUF holds only as
//! the divisors of the frequencies θ^(−2i/d) in `rope_freqs.weight`. Our own files add the
//! parameters behind the divisors as `anybit.rope.*`, which other readers ignore.

use std::path::Path;

use anybit_core::RowSource;

use super::header::DEFAULT_ALIGNMENT;
use super::{GgufFile, Value, names};
use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::{IoError, Result};

/// Tokens that end a generation: of the text, of a turn, of a message.
const EOS_KEYS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];
const BOS_KEY: &str = "tokenizer.ggml.bos_token_id";

const LLAMA3_FACTOR: &str = "anybit.rope.factor";
const LLAMA3_LOW: &str = "anybit.rope.low_freq_factor";
const LLAMA3_HIGH: &str = "anybit.rope.high_freq_factor";
const LLAMA3_CONTEXT: &str = "anybit.rope.original_context";

/// GGUF's name for an architecture; it has none of its own for Mistral.
pub fn arch_name(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::LlamaForCausalLM | Architecture::MistralForCausalLM => "llama",
        Architecture::Qwen2ForCausalLM => "qwen2",
        Architecture::Qwen3ForCausalLM => "qwen3",
    }
}

fn architecture(name: &str, path: &Path) -> Result<Architecture> {
    match name {
        "llama" => Ok(Architecture::LlamaForCausalLM),
        "qwen2" => Ok(Architecture::Qwen2ForCausalLM),
        "qwen3" => Ok(Architecture::Qwen3ForCausalLM),
        _ => {
            let what =
                format!("architecture {name} is not supported; supported: llama, qwen2, qwen3");
            Err(IoError::unsupported(path, what))
        }
    }
}

/// The configuration of a file's model; see [`GgufFile::config`].
pub(super) fn config(file: &GgufFile) -> Result<ModelConfig> {
    let path = &file.path;
    let arch = file
        .metadata
        .get_str("general.architecture")
        .ok_or_else(|| IoError::damaged(path, "general.architecture is missing"))?;
    let architecture = architecture(arch, path)?;
    let keys = Keys { file, arch };
    if keys.size("expert_count")?.is_some_and(|n| n > 0) {
        return Err(IoError::unsupported(path, "mixtures of experts are not supported"));
    }
    let num_layers = keys.need("block_count")?;
    let n_tensors = file.tensors.len();
    if num_layers > n_tensors {
        let what = format!("it claims {num_layers} layers and has {n_tensors} tensors");
        return Err(IoError::damaged(path, what));
    }
    let hidden_size = keys.need("embedding_length")?;
    let num_heads = keys.need("attention.head_count")?;
    let head_dim = head_dim(&keys, hidden_size, num_heads)?;
    let rope_theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let eps = "attention.layer_norm_rms_epsilon";
    let rms_norm_eps = keys.number(eps)?.ok_or_else(|| keys.missing(eps))? as f32;
    let embedding = file
        .tensors
        .get("token_embd.weight")
        .ok_or_else(|| IoError::damaged(path, "tensor token_embd.weight is missing"))?;
    let has = |tensor: &str| file.tensors.contains_key(tensor);
    let is_qwen3 = architecture == Architecture::Qwen3ForCausalLM;
    let is_qwen = is_qwen3 || architecture == Architecture::Qwen2ForCausalLM;
    let config = ModelConfig {
        architecture,
        hidden_size,
        intermediate_size: keys.need("feed_forward_length")?,
        num_layers,
        num_heads,
        num_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(num_heads),
        head_dim,
        vocab_size: RowSource::shape(embedding).0,
        rms_norm_eps,
        rope_theta,
        rope_scaling: rope_scaling(&keys, head_dim, rope_theta)?,
        max_positions: keys.need("context_length")?,
        tie_embeddings: !has("output.weight"),
        qkv_bias: has("blk.0.attn_q.bias"),
        o_bias: has("blk.0.attn_output.bias"),
        mlp_bias: has("blk.0.ffn_down.bias"),
        qk_norm: is_qwen3,
        // llama.cpp attends to the whole context in these architectures, and so the files do not
        // say what the window was.
        sliding_window: None,
        window_from: if is_qwen { num_layers } else { 0 },
        bos_token_id: token_id(file, BOS_KEY),
        eos_token_ids: eos_token_ids(file),
    };
    config.validate(path)?;
    Ok(config)
}

/// Lookups below the architecture's name.
struct Keys<'a> {
    file: &'a GgufFile,
    arch: &'a str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.file.metadata.get(&format!("{}.{key}", self.arch))
    }

    fn missing(&self, key: &str) -> IoError {
        IoError::damaged(&self.file.path, format!("{}.{key} is missing", self.arch))
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = value.as_u64().and_then(|v| usize::try_from(v).ok());
        size.map(Some).ok_or_else(|| {
            let what = format!(
                "{}.{key} is not one whole number; models with a value per layer are not supported",
                self.arch
            );
            IoError::unsupported(&self.file.path, what)
        })
    }

    fn need(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_f64().filter(|v| v.is_finite()).map(Some).ok_or_else(|| {
            let what = format!("{}.{key} is {value:?}, not a finite number", self.arch);
            IoError::damaged(&self.file.path, what)
        })
    }
}

fn token_id(file: &GgufFile, key: &str) -> Option<u32> {
    file.metadata.get_u64(key).and_then(|id| u32::try_from(id).ok())
}

fn eos_token_ids(file: &GgufFile) -> Vec<u32> {
    let mut ids = Vec::new();
    for id in EOS_KEYS.iter().filter_map(|key| token_id(file, key)) {
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    ids
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let (key, value) = (keys.size("attention.key_length")?, keys.size("attention.value_length")?);
    let rotary = keys.size("rope.dimension_count")?;
    let head_dim = key.or(rotary).unwrap_or(hidden_size / num_heads.max(1));
    let unsupported = |what: String| Err(IoError::unsupported(&keys.file.path, what));
    if let Some(value) = value.filter(|v| *v != head_dim) {
        return unsupported(format!(
            "keys of {head_dim} and values of {value} channels per head; only equal ones are \
             supported"
        ));
    }
    if let Some(rotary) = rotary.filter(|r| *r != head_dim) {
        return unsupported(format!(
            "rotary embedding of {rotary} in heads of {head_dim} channels; only whole heads are \
             supported"
        ));
    }
    Ok(head_dim)
}

fn rope_scaling(keys: &Keys<'_>, head_dim: usize, theta: f64) -> Result<Option<RopeScaling>> {
    let path = &keys.file.path;
    let factor = match keys.number("rope.scaling.factor")? {
        None => keys.number("rope.scale_linear")?, // its name before 2024
        some => some,
    };
    let linear = match keys.get("rope.scaling.type").and_then(Value::as_str) {
        Some("none") => None,
        // As llama.cpp: linear by default, and 0 for no scaling.
        None | Some("linear") => factor.filter(|f| *f != 0.0 && *f != 1.0),
        Some(other) => {
            let what = format!(
                "rope scaling {other:?} is not supported; supported: \"none\", \"linear\" and \
                 Llama 3's"
            );
            return Err(IoError::unsupported(path, what));
        }
    };
    match (linear, llama3_scaling(keys.file, head_dim, theta)?) {
        (None, llama3) => Ok(llama3),
        (Some(factor), None) if factor > 0.0 => Ok(Some(RopeScaling::Linear { factor })),
        (Some(factor), None) => {
            Err(IoError::damaged(path, format!("the rope scaling factor is {factor}")))
        }
        (Some(_), Some(_)) => {
            let what = "linear rope scaling together with rope_freqs.weight is not supported";
            Err(IoError::unsupported(path, what))
        }
    }
}

/// Llama 3's scaling from the divisors in `rope_freqs.weight`: taken from our own keys where they
/// are, else the parameters that every Llama 3 release has; either way checked against the
/// divisors.
fn llama3_scaling(file: &GgufFile, head_dim: usize, theta: f64) -> Result<Option<RopeScaling>> {
    let Some(tensor) = file.tensors.get(names::ROPE_FREQS) else { return Ok(None) };
    let (len, half) = (tensor.len(), head_dim / 2);
    if len != half {
        let what = format!("tensor {} has {len} values, expected {half}", names::ROPE_FREQS);
        return Err(IoError::damaged(&file.path, what));
    }
    let stored = tensor.to_vec();
    let recorded = |key: &str| file.metadata.get_f64(key);
    if recorded(LLAMA3_FACTOR).is_none() && stored.iter().all(|v| *v == 1.0) {
        return Ok(None);
    }
    let largest = stored.iter().copied().fold(1.0, f32::max);
    let factor = recorded(LLAMA3_FACTOR).unwrap_or(largest.into());
    let low_freq_factor = recorded(LLAMA3_LOW).unwrap_or(1.0);
    let high_freq_factor = recorded(LLAMA3_HIGH).unwrap_or(4.0);
    let original_context = recorded(LLAMA3_CONTEXT).unwrap_or(8192.0);
    let scaling =
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context };
    let parameters =
        [factor, low_freq_factor, original_context, high_freq_factor - low_freq_factor];
    let sane = parameters.iter().all(|p| p.is_finite() && *p > 0.0);
    let expected = divisors(head_dim, theta, scaling);
    let close = |(&s, want): (&f32, f32)| (s - want).abs() <= 1e-3 * want;
    if sane && stored.iter().zip(expected).all(close) {
        return Ok(Some(scaling));
    }
    let what = format!(
        "the divisors in {} are not those of Llama 3's rope scaling with factor {factor}; only \
         that one is supported; convert the model from its original checkpoint",
        names::ROPE_FREQS
    );
    Err(IoError::unsupported(&file.path, what))
}

/// What to write as `rope_freqs.weight`; empty without Llama 3's scaling.
pub fn rope_divisors(config: &ModelConfig) -> Vec<f32> {
    match config.rope_scaling {
        Some(scaling @ RopeScaling::Llama3 { .. }) => {
            divisors(config.head_dim, config.rope_theta, scaling)
        }
        _ => Vec::new(),
    }
}

/// Divisor of each of the `head_dim / 2` frequencies.
fn divisors(head_dim: usize, theta: f64, scaling: RopeScaling) -> Vec<f32> {
    let frequency = |i: usize| theta.powf(-2.0 * i as f64 / head_dim as f64);
    (0..head_dim / 2).map(|i| scaling.divisor(frequency(i)) as f32).collect()
}

/// The keys of a model, without its tokenizer except for the start and end tokens; of the end
/// tokens the first three, since GGUF has a key for each of three roles. `file_type` is
/// llama.cpp's number for the tensors' type.
pub fn from_config(config: &ModelConfig, name: &str, file_type: u32) -> Vec<(String, Value)> {
    let arch = arch_name(config.architecture);
    let size = |v: usize| Value::U32(u32::try_from(v).unwrap_or(u32::MAX));
    let mut all: Vec<(String, Value)> = vec![
        ("general.architecture".into(), Value::String(arch.into())),
        ("general.type".into(), Value::String("model".into())),
        ("general.name".into(), Value::String(name.into())),
        ("general.file_type".into(), Value::U32(file_type)),
        ("general.quantization_version".into(), Value::U32(2)),
        ("general.alignment".into(), size(DEFAULT_ALIGNMENT)),
    ];
    let mut put = |key: &str, value: Value| all.push((format!("{arch}.{key}"), value));
    put("context_length", size(config.max_positions));
    put("embedding_length", size(config.hidden_size));
    put("block_count", size(config.num_layers));
    put("feed_forward_length", size(config.intermediate_size));
    put("vocab_size", size(config.vocab_size));
    put("attention.head_count", size(config.num_heads));
    put("attention.head_count_kv", size(config.num_kv_heads));
    put("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    if config.head_dim * config.num_heads != config.hidden_size {
        put("attention.key_length", size(config.head_dim));
        put("attention.value_length", size(config.head_dim));
    }
    put("rope.dimension_count", size(config.head_dim));
    put("rope.freq_base", Value::F32(config.rope_theta as f32));
    if let Some(RopeScaling::Linear { factor }) = config.rope_scaling {
        put("rope.scaling.type", Value::String("linear".into()));
        put("rope.scaling.factor", Value::F32(factor as f32));
    }
    if let Some(RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_context,
    }) = config.rope_scaling
    {
        all.push((LLAMA3_FACTOR.into(), Value::F64(factor)));
        all.push((LLAMA3_LOW.into(), Value::F64(low_freq_factor)));
        all.push((LLAMA3_HIGH.into(), Value::F64(high_freq_factor)));
        all.push((LLAMA3_CONTEXT.into(), Value::F64(original_context)));
    }
    all.extend(config.bos_token_id.map(|id| (BOS_KEY.to_string(), Value::U32(id))));
    let eos = EOS_KEYS.iter().zip(&config.eos_token_ids);
    all.extend(eos.map(|(key, id)| ((*key).to_string(), Value::U32(*id))));
    all
}

#[cfg(test)]
mod tests {
    use super::super::testing::{open_with, tiny};
    use super::*;

    const LLAMA: Architecture = Architecture::LlamaForCausalLM;

    /// The configuration read from `keys` and an embedding, a head, and `more` of 4 values.
    fn read(keys: &[(String, Value)], more: &[(&str, Vec<f32>)]) -> Result<ModelConfig> {
        let mut tensors = vec![
            ("token_embd.weight", vec![12, 8], vec![0.0; 96]),
            ("output.weight", vec![12, 8], vec![0.0; 96]),
        ];
        tensors.extend(more.iter().map(|(name, v)| (*name, vec![v.len()], v.clone())));
        open_with(keys, &tensors)?.config()
    }

    fn with(mut keys: Vec<(String, Value)>, key: &str, value: Value) -> Vec<(String, Value)> {
        keys.retain(|(k, _)| k != key);
        keys.push((key.into(), value));
        keys
    }

    fn refusal(key: &str, value: Value) -> String {
        let keys = with(from_config(&tiny(LLAMA), "tiny", 0), key, value);
        read(&keys, &[]).unwrap_err().to_string()
    }

    /// Llama 3.1's parameters on heads of 8 channels: divisors 1, 1, one on the ramp, 8.
    fn llama3() -> ModelConfig {
        let rope_scaling = Some(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        });
        ModelConfig { head_dim: 8, rope_theta: 500_000.0, rope_scaling, ..tiny(LLAMA) }
    }

    #[test]
    fn what_is_unsupported_is_named() {
        let text = refusal("general.architecture", Value::String("gemma3".into()));
        assert!(text.contains("gemma3") && text.contains("llama, qwen2, qwen3"), "{text}");
        let text = refusal("llama.rope.scaling.type", Value::String("yarn".into()));
        assert!(text.contains("yarn"), "{text}");
        assert!(refusal("llama.attention.value_length", Value::U32(6)).contains("values of 6"));
        let partial =
            with(from_config(&llama3(), "tiny", 0), "llama.rope.dimension_count", Value::U32(2));
        assert!(
            read(&partial, &[]).unwrap_err().to_string().contains("embedding of 2 in heads of 8")
        );
        assert!(refusal("llama.expert_count", Value::U32(8)).contains("experts"));
        assert!(refusal("llama.block_count", Value::U32(1 << 23)).contains("layers"));
        let per_layer = Value::Array(vec![Value::U32(2), Value::U32(1)]);
        assert!(refusal("llama.attention.head_count", per_layer).contains("per layer"));
        assert!(refusal("llama.embedding_length", Value::F32(8.0)).contains("embedding_length"));
    }

    #[test]
    fn linear_scaling_round_trips_and_older_keys_are_read() {
        let linear = Some(RopeScaling::Linear { factor: 4.0 });
        let config = ModelConfig { rope_scaling: linear, ..tiny(LLAMA) };
        let keys = from_config(&config, "tiny", 0);
        assert_eq!(read(&keys, &[]).unwrap(), config);
        let keys = from_config(&tiny(LLAMA), "tiny", 0);
        let older = with(keys.clone(), "llama.rope.scale_linear", Value::F32(4.0));
        assert_eq!(read(&older, &[]).unwrap().rope_scaling, linear);
        let off = with(older, "llama.rope.scaling.type", Value::String("none".into()));
        assert_eq!(read(&off, &[]).unwrap().rope_scaling, None);
    }

    #[test]
    fn llama3_scaling_is_recovered_from_its_divisors() {
        let config = llama3();
        let freqs = rope_divisors(&config);
        assert_eq!((freqs[0], freqs[1], freqs[3]), (1.0, 1.0, 8.0));
        // θ^(-1/2) = 1/707.1: wavelength 4442.9, s = (8192/4442.9 - 1)/3 = 0.28128.
        approx::assert_relative_eq!(freqs[2], 2.6945, max_relative = 1e-3);
        let keys = from_config(&config, "tiny", 0);
        let foreign: Vec<_> =
            keys.iter().filter(|(k, _)| !k.starts_with("anybit.")).cloned().collect();
        for keys in [&keys, &foreign] {
            let found = read(keys, &[(names::ROPE_FREQS, freqs.clone())]).unwrap();
            assert_eq!(found, config);
        }
        let ones = read(&foreign, &[(names::ROPE_FREQS, vec![1.0; 4])]).unwrap();
        assert_eq!(ones.rope_scaling, None);
    }

    #[test]
    fn other_divisors_are_refused() {
        let keys = from_config(&llama3(), "tiny", 0);
        let good = rope_divisors(&llama3());
        for (at, value) in [(1, 1.5), (2, 2.0), (3, 9.0), (0, f32::NAN), (0, f32::INFINITY)] {
            let mut freqs = good.clone();
            freqs[at] = value;
            let text = read(&keys, &[(names::ROPE_FREQS, freqs)]).unwrap_err().to_string();
            assert!(text.contains(names::ROPE_FREQS), "{text}");
        }
        assert!(read(&keys, &[(names::ROPE_FREQS, vec![1.0; 3])]).is_err());
    }
}
