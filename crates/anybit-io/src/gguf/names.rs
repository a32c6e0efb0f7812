//! Tensor names: GGUF's short ones and the Hugging Face ones that the rest of the crate uses.
//!
//! One table for all supported architectures (llama, qwen2, qwen3), read in both directions.
//! Source: llama.cpp `gguf-py/gguf/tensor_mapping.py`.

/// Divisors of the rotary frequencies (Llama 3 scaling): a tensor that only GGUF has.
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// Tensors outside the blocks, `(GGUF, Hugging Face)`.
const GLOBAL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Modules of block N: `blk.N.` + GGUF, `model.layers.N.` + Hugging Face; `.weight` or `.bias`
/// follows.
const BLOCK: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

const GGUF_PREFIX: &str = "blk.";
const HF_PREFIX: &str = "model.layers.";

/// The Hugging Face name of a GGUF tensor.
pub fn to_hf(gguf: &str) -> Option<String> {
    if let Some((_, hf)) = GLOBAL.iter().find(|(g, _)| *g == gguf) {
        return Some((*hf).to_string());
    }
    let (layer, module, kind) = block_parts(gguf, GGUF_PREFIX)?;
    let (_, hf) = BLOCK.iter().find(|(g, _)| *g == module)?;
    Some(format!("{HF_PREFIX}{layer}.{hf}.{kind}"))
}

/// The GGUF name of a Hugging Face tensor.
pub fn to_gguf(hf: &str) -> Option<String> {
    if let Some((gguf, _)) = GLOBAL.iter().find(|(_, h)| *h == hf) {
        return Some((*gguf).to_string());
    }
    let (layer, module, kind) = block_parts(hf, HF_PREFIX)?;
    let (gguf, _) = BLOCK.iter().find(|(_, h)| *h == module)?;
    Some(format!("{GGUF_PREFIX}{layer}.{gguf}.{kind}"))
}

/// Whether a GGUF tensor is one whose rows the llama architecture stores in rotary pairs.
pub fn is_rotary(gguf: &str) -> bool {
    let module = block_parts(gguf, GGUF_PREFIX).map(|(_, module, _)| module);
    matches!(module, Some("attn_q" | "attn_k"))
}

/// Layer, module and "weight" or "bias" of a block's tensor.
fn block_parts<'a>(name: &'a str, prefix: &str) -> Option<(&'a str, &'a str, &'a str)> {
    let (layer, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    // Leading zeros and signs would give two names to one tensor.
    let canonical = layer.parse::<u32>().is_ok_and(|n| n.to_string() == layer);
    (canonical && matches!(kind, "weight" | "bias")).then_some((layer, module, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_round_trips() {
        for (gguf, hf) in GLOBAL {
            assert_eq!(to_hf(gguf).as_deref(), Some(hf));
            assert_eq!(to_gguf(hf).as_deref(), Some(gguf));
        }
        for (gguf, hf) in BLOCK {
            for (layer, kind) in [(0, "weight"), (7, "bias"), (126, "weight")] {
                let (gguf, hf) = (
                    format!("blk.{layer}.{gguf}.{kind}"),
                    format!("model.layers.{layer}.{hf}.{kind}"),
                );
                assert_eq!(to_hf(&gguf).as_deref(), Some(hf.as_str()));
                assert_eq!(to_gguf(&hf).as_deref(), Some(gguf.as_str()));
            }
        }
    }

    #[test]
    fn other_names_have_no_counterpart() {
        let strangers = [
            "",
            "blk.",
            "blk.0",
            "blk.0.attn_q",
            "blk.00.attn_q.weight",
            "blk.+1.attn_q.weight",
            "blk.x.attn_q.weight",
            "blk.0.ffn_gate_exps.weight",
            "blk.0.attn_q.scale",
            ROPE_FREQS,
        ];
        for name in strangers {
            assert_eq!(to_hf(name), None, "{name}");
        }
        assert_eq!(to_gguf("model.layers.0.self_attn.rotary_emb.inv_freq"), None);
    }

    #[test]
    fn only_q_and_k_are_rotary() {
        assert!(is_rotary("blk.0.attn_q.weight") && is_rotary("blk.11.attn_k.bias"));
        for name in ["blk.0.attn_v.weight", "blk.0.attn_q_norm.weight", "output.weight"] {
            assert!(!is_rotary(name), "{name}");
        }
    }
}
