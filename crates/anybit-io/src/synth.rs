//! Synthetic checkpoints: random weights in a real architecture, sharded as large models are, for
//! measuring memory and speed at sizes that no test could download.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::rng::{SplitMix64, stream};
use rayon::prelude::*;
use serde_json::{Value, json};

use crate::atomic::{PartialFolder, check_absent, check_space, write_bytes};
use crate::convert::encode;
use crate::safetensors_file::{FileDtype, PlannedTensor, index_json, layout_in_shards};
use crate::{Dtype, IoError, ModelConfig, Result};

/// Bytes of a shard: small enough that a 3B model has several.
const SHARD_BYTES: u64 = 1_000_000_000;

/// Shapes by name: parameters as the name says, layers and widths of well-known models.
pub fn preset(name: &str) -> Option<ModelConfig> {
    let (hidden, ffn, layers, heads, kv_heads, vocab, tied) = match name {
        "tiny" => (64, 176, 2, 4, 2, 512, true),
        "135m" => (576, 1536, 30, 9, 3, 49152, true),
        "1.1b" => (2048, 5632, 22, 32, 4, 32000, false),
        "3b" => (3072, 8192, 28, 24, 8, 128256, true),
        _ => return None,
    };
    let llama = ModelConfig::llama(layers, hidden, heads, ffn, vocab, 2048);
    Some(ModelConfig { num_kv_heads: kv_heads, tie_embeddings: tied, ..llama })
}

/// Names that [`preset`] knows.
pub const PRESETS: [&str; 4] = ["tiny", "135m", "1.1b", "3b"];

/// Writes a random bf16 model of shape `config` with a byte-level tokenizer.
///
/// # Errors
/// The output exists, the disk is too small, or the system refuses.
pub fn write(
    config: &ModelConfig,
    seed: u64,
    out: &Path,
    force: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let planned: Vec<PlannedTensor> = config
        .tensors()
        .into_iter()
        .map(|(name, shape)| PlannedTensor::new(name, FileDtype::BF16, shape))
        .collect();
    let layouts = layout_in_shards(planned, SHARD_BYTES);
    let total = layouts.iter().map(|l| l.file_bytes()).sum();
    check_absent(out, force)?;
    check_space(out, total)?;
    let folder = PartialFolder::create(out, false, force)?;
    let mut done = 0;
    for file in &layouts {
        file.write(folder.path(), |tensor, out| {
            random_tensor(config, seed, tensor, out)?;
            done += tensor.bytes();
            progress(done, total);
            Ok(())
        })?;
    }
    if let Some(index) = index_json(&layouts) {
        write_bytes(&folder.path().join("model.safetensors.index.json"), index.as_bytes())?;
    }
    let json_file = |name: &str, value: Value| {
        write_bytes(&folder.path().join(name), format!("{value:#}\n").as_bytes())
    };
    json_file("config.json", config.to_json("bfloat16"))?;
    json_file("tokenizer.json", byte_tokenizer())?;
    folder.finish()
}

fn random_tensor(
    config: &ModelConfig,
    seed: u64,
    tensor: &PlannedTensor,
    out: &mut dyn std::io::Write,
) -> Result<()> {
    let fail = |e| IoError::file("write", Path::new(&tensor.name), e);
    let len: usize = tensor.shape.iter().product();
    let mut bytes = Vec::new();
    if tensor.shape.len() == 1 {
        encode(Dtype::BF16, &vec![1.0; len], &mut bytes);
        return out.write_all(&bytes).map_err(fail);
    }
    // Variance 1/in keeps activations at their scale; the two writers into the residual stream
    // are damped by its depth.
    let writes_residual = tensor.name.contains("o_proj") || tensor.name.contains("down_proj");
    let depth = if writes_residual { (2 * config.num_layers) as f32 } else { 1.0 };
    let std = 1.0 / (tensor.shape[1] as f32 * depth).sqrt();
    let stream = stream(seed, &tensor.name);
    const CHUNK: usize = 1 << 16;
    for group in (0..len.div_ceil(CHUNK)).collect::<Vec<_>>().chunks(64) {
        let parts: Vec<Vec<u8>> = group
            .par_iter()
            .map(|&chunk| {
                let count = CHUNK.min(len - chunk * CHUNK);
                let mut rng = SplitMix64::new(stream.wrapping_add(chunk as u64));
                let values: Vec<f32> = (0..count).map(|_| near_normal(&mut rng) * std).collect();
                let mut bytes = Vec::new();
                encode(Dtype::BF16, &values, &mut bytes);
                bytes
            })
            .collect();
        for part in parts {
            out.write_all(&part).map_err(fail)?;
        }
    }
    Ok(())
}

/// Sum of four 16-bit uniforms, variance 1: near enough to normal, and one draw per weight.
fn near_normal(rng: &mut SplitMix64) -> f32 {
    let bits = rng.next_u64();
    let sum: u64 = (0..4).map(|i| bits >> (16 * i) & 0xffff).sum();
    (sum as f32 / 65536.0 - 2.0) * 3f32.sqrt()
}

/// A tokenizer whose 256 tokens are the bytes.
fn byte_tokenizer() -> Value {
    // The byte-level alphabet of GPT-2: printable bytes stand for themselves, others are moved
    // up to U+0100 and beyond.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut moved = 0;
    let vocab: BTreeMap<String, u32> = (0..256u32)
        .map(|b| {
            let code = if printable(b) {
                b
            } else {
                moved += 1;
                255 + moved
            };
            (char::from_u32(code).unwrap_or('\u{fffd}').to_string(), b)
        })
        .collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": vocab, "merges": []
        }
    })
}
