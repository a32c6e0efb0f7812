//! [`ModelConfig`]: what a decoder is, read from `config.json` or from GGUF metadata.
//!
//! Supported families share one shape (RMSNorm, rotary attention with grouped keys, SwiGLU) and
//! differ in biases, per-head norms of q and k, sliding windows and rotary scaling.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{IoError, Result};

/// Architectures by their Hugging Face class name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Architecture {
    /// Llama 2, 3.x, SmolLM2 and everything that calls itself that.
    LlamaForCausalLM,
    /// Mistral 7B and kin.
    MistralForCausalLM,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2ForCausalLM,
    /// Qwen3: RMSNorm on each head of q and k.
    Qwen3ForCausalLM,
}

impl Architecture {
    /// All of them, for messages and tables.
    pub const ALL: [Self; 4] = [
        Self::LlamaForCausalLM,
        Self::MistralForCausalLM,
        Self::Qwen2ForCausalLM,
        Self::Qwen3ForCausalLM,
    ];

    /// The class name in `config.json`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::LlamaForCausalLM => "LlamaForCausalLM",
            Self::MistralForCausalLM => "MistralForCausalLM",
            Self::Qwen2ForCausalLM => "Qwen2ForCausalLM",
            Self::Qwen3ForCausalLM => "Qwen3ForCausalLM",
        }
    }

    /// `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::LlamaForCausalLM => "llama",
            Self::MistralForCausalLM => "mistral",
            Self::Qwen2ForCausalLM => "qwen2",
            Self::Qwen3ForCausalLM => "qwen3",
        }
    }

    /// The architecture of a class name.
    pub fn from_class_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|a| a.class_name() == name)
    }

    /// "LlamaForCausalLM, MistralForCausalLM, …", for messages.
    pub fn supported() -> String {
        Self::ALL.map(Self::class_name).join(", ")
    }
}

/// Scaling of rotary frequencies for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor.
        factor: f64,
        /// Below `original_context / low` rotations a frequency counts as low.
        low_freq_factor: f64,
        /// Above `original_context / high` it counts as high.
        high_freq_factor: f64,
        /// Context of pre-training.
        original_context: f64,
    },
}

impl RopeScaling {
    /// What a frequency (radians per position) is divided by.
    pub fn divisor(&self, frequency: f64) -> f64 {
        match *self {
            Self::Linear { factor } => factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < original_context / high_freq_factor {
                    1.0
                } else if wavelength > original_context / low_freq_factor {
                    factor
                } else {
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        }
    }
}

/// No decoder is deeper; a file that says so is damaged, and its tensors' names alone would fill
/// the memory.
const MAX_LAYERS: usize = 4096;

/// What a decoder is.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Its family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// ε of RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their scaling.
    pub rope_scaling: Option<RopeScaling>,
    /// Longest context that the model was made for.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tie_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm on each head of q and k.
    pub qk_norm: bool,
    /// Keys that a query sees in layers from `window_from` on; `None` for all.
    pub sliding_window: Option<usize>,
    /// First layer with a sliding window.
    pub window_from: usize,
    /// Start token.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

/// The keys of `config.json` that matter here; others are ignored, since every library adds its
/// own.
#[derive(Deserialize)]
struct RawConfig {
    architectures: Option<Vec<String>>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    /// transformers 5 writes `rope_theta` and the scaling in here.
    rope_parameters: Option<Map<String, Value>>,
    max_position_embeddings: Option<usize>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

impl ModelConfig {
    /// A Llama of `layers` layers of width `hidden` for sequences of `context` tokens, without
    /// grouped keys, tied embeddings or biases.
    pub fn llama(
        layers: usize,
        hidden: usize,
        heads: usize,
        ffn: usize,
        vocab: usize,
        context: usize,
    ) -> Self {
        Self {
            architecture: Architecture::LlamaForCausalLM,
            hidden_size: hidden,
            intermediate_size: ffn,
            num_layers: layers,
            num_heads: heads,
            num_kv_heads: heads,
            head_dim: hidden / heads.max(1),
            vocab_size: vocab,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: None,
            max_positions: context,
            tie_embeddings: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            sliding_window: None,
            window_from: 0,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    /// Parses `config.json`.
    ///
    /// # Errors
    /// Broken JSON, an unsupported architecture, activation or rotary scaling, sizes that do not
    /// fit together; each names the file and what is supported.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let raw: RawConfig = serde_json::from_str(text)
            .map_err(|e| IoError::damaged(path, format!("not a valid config.json ({e})")))?;
        let architecture = architecture_of(&raw, path)?;
        if let Some(act) = raw.hidden_act.as_deref().filter(|a| *a != "silu" && *a != "swish") {
            let what = format!("hidden_act {act:?} is not supported; supported: \"silu\"");
            return Err(IoError::unsupported(path, what));
        }
        let need = |value: Option<usize>, key: &str| {
            value.ok_or_else(|| IoError::damaged(path, format!("{key} is missing")))
        };
        let hidden_size = need(raw.hidden_size, "hidden_size")?;
        let num_heads = need(raw.num_attention_heads, "num_attention_heads")?;
        let is_qwen2 = architecture == Architecture::Qwen2ForCausalLM;
        let is_qwen = is_qwen2 || architecture == Architecture::Qwen3ForCausalLM;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let rope_theta = raw
            .rope_theta
            .or_else(|| rope.and_then(|r| r.get("rope_theta")?.as_f64()))
            .unwrap_or(10_000.0);
        let num_layers = need(raw.num_hidden_layers, "num_hidden_layers")?;
        let window = match is_qwen {
            true => raw.sliding_window.filter(|_| raw.use_sliding_window == Some(true)),
            false if architecture == Architecture::MistralForCausalLM => raw.sliding_window,
            false => None,
        };
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: need(raw.intermediate_size, "intermediate_size")?,
            num_layers,
            num_heads,
            num_kv_heads: raw.num_key_value_heads.unwrap_or(num_heads),
            head_dim: raw.head_dim.unwrap_or(hidden_size / num_heads.max(1)),
            vocab_size: need(raw.vocab_size, "vocab_size")?,
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling: rope.map(|r| rope_scaling(r, path)).transpose()?.flatten(),
            max_positions: raw.max_position_embeddings.unwrap_or(2048),
            tie_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            qkv_bias: is_qwen2 || attention_bias,
            o_bias: attention_bias && !is_qwen2,
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3ForCausalLM,
            sliding_window: window,
            window_from: if is_qwen { raw.max_window_layers.unwrap_or(num_layers) } else { 0 },
            bos_token_id: token_ids(raw.bos_token_id.as_ref()).first().copied(),
            eos_token_ids: token_ids(raw.eos_token_id.as_ref()),
        };
        config.validate(path)?;
        Ok(config)
    }

    /// Takes token ids from `generation_config.json`, which has the last word on what ends a
    /// generation.
    pub fn add_generation_config(&mut self, value: &Value) {
        let eos = token_ids(value.get("eos_token_id"));
        if !eos.is_empty() {
            self.eos_token_ids = eos;
        }
        self.bos_token_id =
            self.bos_token_id.or(token_ids(value.get("bos_token_id")).first().copied());
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`IoError::Damaged`] naming the size that does not.
    pub fn validate(&self, path: &Path) -> Result<()> {
        let fail = |what: String| Err(IoError::damaged(path, what));
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_layers),
            ("num_attention_heads", self.num_heads),
            ("num_key_value_heads", self.num_kv_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
        ];
        for (key, value) in sizes {
            if value == 0 || value > 1 << 24 {
                return fail(format!("{key} is {value}"));
            }
        }
        if self.sliding_window == Some(0) {
            return fail("sliding_window is 0: a token would not even see itself".into());
        }
        if self.num_layers > MAX_LAYERS {
            return fail(format!("num_hidden_layers is {}, at most {MAX_LAYERS}", self.num_layers));
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let (h, kv) = (self.num_heads, self.num_kv_heads);
            return fail(format!(
                "num_attention_heads {h} is no multiple of num_key_value_heads {kv}"
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!(
                "head_dim {} is odd, rotary embedding needs pairs",
                self.head_dim
            ));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return fail(format!("rope_theta is {}", self.rope_theta));
        }
        Ok(())
    }

    /// `config.json` of this model, its tensors in `dtype` ("bfloat16", …).
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut c = json!({
            "architectures": [self.architecture.class_name()],
            "model_type": self.architecture.model_type(),
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": json_f32(self.rms_norm_eps),
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.o_bias || (self.qkv_bias && self.architecture != Architecture::Qwen2ForCausalLM),
            "mlp_bias": self.mlp_bias,
            "hidden_act": "silu",
            "torch_dtype": dtype,
        });
        if let Some(bos) = self.bos_token_id {
            c["bos_token_id"] = json!(bos);
        }
        match self.eos_token_ids[..] {
            [] => {}
            [one] => c["eos_token_id"] = json!(one),
            _ => c["eos_token_id"] = json!(self.eos_token_ids),
        }
        match self.rope_scaling {
            None => {}
            Some(RopeScaling::Linear { factor }) => {
                c["rope_scaling"] = json!({"rope_type": "linear", "factor": factor});
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            }) => {
                c["rope_scaling"] = json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_context as usize,
                });
            }
        }
        let is_qwen = matches!(
            self.architecture,
            Architecture::Qwen2ForCausalLM | Architecture::Qwen3ForCausalLM
        );
        if is_qwen {
            c["use_sliding_window"] = json!(self.sliding_window.is_some());
            c["max_window_layers"] = json!(self.window_from);
        }
        if is_qwen || self.architecture == Architecture::MistralForCausalLM {
            c["sliding_window"] = json!(self.sliding_window);
        }
        c
    }

    /// Keys that a query of `layer` sees, itself included; `None` for all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.sliding_window.filter(|_| layer >= self.window_from)
    }

    /// Radians per position of each rotary pair, with the configuration's scaling.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        (0..self.head_dim / 2)
            .map(|i| {
                let base = self.rope_theta.powf(-(2.0 * i as f64) / self.head_dim as f64);
                base / self.rope_scaling.map_or(1.0, |s| s.divisor(base))
            })
            .collect()
    }

    /// Channels of a row at a site: the width of the linears' input, or of a head.
    pub fn site_size(&self, site: anybit_core::Site) -> usize {
        use anybit_core::Site;
        match site {
            Site::AttnInput | Site::MlpInput => self.hidden_size,
            Site::Query | Site::Key | Site::Value => self.head_dim,
            Site::AttnOutput => self.q_size(),
            Site::DownInput => self.intermediate_size,
        }
    }

    /// Channels of all query heads together.
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Channels of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// The seven linears of a block with `[out, in]`, by their names below `model.layers.N.`.
    pub fn block_linears(&self) -> [(&'static str, usize, usize); 7] {
        let (d, f, q, kv) =
            (self.hidden_size, self.intermediate_size, self.q_size(), self.kv_size());
        [
            ("self_attn.q_proj", q, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, q),
            ("mlp.gate_proj", f, d),
            ("mlp.up_proj", f, d),
            ("mlp.down_proj", d, f),
        ]
    }

    /// Every tensor that a checkpoint of this model has, by Hugging Face name, in canonical order.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let d = self.hidden_size;
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, d])];
        for layer in 0..self.num_layers {
            all.extend(self.block_tensors(layer));
        }
        all.push(("model.norm.weight".into(), vec![d]));
        if !self.tie_embeddings {
            all.push(("lm_head.weight".into(), vec![self.vocab_size, d]));
        }
        all
    }

    /// The tensors of one block.
    pub fn block_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let p = format!("model.layers.{layer}.");
        let mut all = vec![(format!("{p}input_layernorm.weight"), vec![self.hidden_size])];
        for (name, out, inp) in self.block_linears() {
            all.push((format!("{p}{name}.weight"), vec![out, inp]));
            if self.has_bias(name) {
                all.push((format!("{p}{name}.bias"), vec![out]));
            }
        }
        if self.qk_norm {
            all.push((format!("{p}self_attn.q_norm.weight"), vec![self.head_dim]));
            all.push((format!("{p}self_attn.k_norm.weight"), vec![self.head_dim]));
        }
        all.push((format!("{p}post_attention_layernorm.weight"), vec![self.hidden_size]));
        all
    }

    /// Whether a linear (by its name in the block) has a bias.
    pub fn has_bias(&self, linear: &str) -> bool {
        match linear {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => self.qkv_bias,
            "self_attn.o_proj" => self.o_bias,
            _ => self.mlp_bias,
        }
    }
}

/// The shortest decimal that reads back as this f32, so that ε is 1e-5 and not 9.99e-6.
fn json_f32(value: f32) -> Value {
    value.to_string().parse::<f64>().map_or(Value::Null, |v| json!(v))
}

fn architecture_of(raw: &RawConfig, path: &Path) -> Result<Architecture> {
    let name = raw
        .architectures
        .as_ref()
        .and_then(|a| a.first())
        .ok_or_else(|| IoError::damaged(path, "\"architectures\" is missing"))?;
    Architecture::from_class_name(name).ok_or_else(|| {
        let supported = Architecture::supported();
        IoError::unsupported(
            path,
            format!("architecture {name} is not supported; supported: {supported}"),
        )
    })
}

fn rope_scaling(raw: &Map<String, Value>, path: &Path) -> Result<Option<RopeScaling>> {
    let kind = raw.get("rope_type").or_else(|| raw.get("type")).and_then(Value::as_str);
    let number = |key: &str| {
        raw.get(key).and_then(Value::as_f64).filter(|v| v.is_finite() && *v > 0.0).ok_or_else(
            || IoError::damaged(path, format!("rope scaling: {key} is missing or not positive")),
        )
    };
    match kind {
        None | Some("default") => Ok(None),
        Some("linear") => Ok(Some(RopeScaling::Linear { factor: number("factor")? })),
        Some("llama3") => Ok(Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: number("original_max_position_embeddings")?,
        })),
        Some(other) => {
            let what = format!(
                "rope scaling {other:?} is not supported; supported: \"default\", \"linear\", \"llama3\""
            );
            Err(IoError::unsupported(path, what))
        }
    }
}

fn token_ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|v| u32::try_from(v).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(v) => one(v).into_iter().collect(),
        None => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ModelConfig> {
        ModelConfig::from_json(text, Path::new("config.json"))
    }

    const SMOL: &str = r#"{"architectures":["LlamaForCausalLM"],"hidden_size":576,
        "intermediate_size":1536,"num_hidden_layers":30,"num_attention_heads":9,
        "num_key_value_heads":3,"vocab_size":49152,"rms_norm_eps":1e-05,"rope_theta":100000,
        "tie_word_embeddings":true,"eos_token_id":[2,0],"bos_token_id":1,"hidden_act":"silu"}"#;

    #[test]
    fn round_trip() {
        let config = parse(SMOL).unwrap();
        assert_eq!((config.head_dim, config.eos_token_ids.len()), (64, 2));
        let again = parse(&config.to_json("bfloat16").to_string()).unwrap();
        assert_eq!(config, again);
        assert_eq!(config.tensors().len(), 30 * 9 + 2);
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let e = parse(&SMOL.replace("LlamaForCausalLM", "GPT2LMHeadModel")).unwrap_err();
        let text = e.to_string();
        assert!(text.contains("GPT2LMHeadModel") && text.contains("Qwen3ForCausalLM"), "{text}");
        assert!(parse(&SMOL.replace("silu", "gelu")).unwrap_err().to_string().contains("gelu"));
        let yarn = SMOL.replace("\"bos", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"bos");
        assert!(parse(&yarn).unwrap_err().to_string().contains("yarn"));
        let heads = SMOL.replace("\"num_key_value_heads\":3", "\"num_key_value_heads\":4");
        assert!(parse(&heads).is_err());
    }

    #[test]
    fn transformers_five_keeps_rope_in_one_map() {
        let text = SMOL.replace(
            "\"rope_theta\":100000",
            "\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":5e5,\"factor\":8,\
             \"low_freq_factor\":1,\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}",
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.rope_theta, 5e5);
        assert!(matches!(config.rope_scaling, Some(RopeScaling::Llama3 { .. })));
    }
}
