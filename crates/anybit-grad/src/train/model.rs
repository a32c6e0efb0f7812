//! Shapes by name, and the weights that training starts from: normal with standard deviation 0.02,
//! those that write into the residual stream damped by its depth, `0.02/√(2L)` (section 3 of
//! QuEST's specification). Called by the trainer.

use std::collections::BTreeMap;

use anybit_core::rng::SplitMix64;
use anybit_io::ModelConfig;

use crate::{Tensor, TrainDecoder};

/// `(name, layers, hidden, heads, ffn)`; parameters of the blocks as the name says. Those from 30m
/// on are the paper's. Widths are whole blocks of 128 columns, but for `tiny`, which takes 32.
pub const PRESETS: [(&str, usize, usize, usize, usize); 12] = [
    ("tiny", 2, 64, 2, 192),
    ("0.5m", 2, 128, 2, 384),
    ("1m", 5, 128, 2, 384),
    ("3m", 4, 256, 4, 768),
    ("10m", 6, 384, 6, 1024),
    ("30m", 6, 640, 5, 1792),
    ("50m", 7, 768, 6, 2048),
    ("100m", 8, 1024, 8, 2816),
    ("200m", 10, 1280, 10, 3584),
    ("430m", 13, 1664, 13, 4608),
    ("800m", 16, 2048, 16, 5632),
    ("1.6b", 20, 2560, 20, 6912),
];

/// "tiny, 0.5m, …", for messages.
pub fn preset_names() -> String {
    PRESETS.map(|(name, ..)| name).join(", ")
}

/// The shape of a name.
pub fn preset(name: &str, vocab: usize, context: usize) -> Option<ModelConfig> {
    let (_, layers, hidden, heads, ffn) = PRESETS.into_iter().find(|p| p.0 == name)?;
    Some(ModelConfig::llama(layers, hidden, heads, ffn, vocab, context))
}

/// Parameters of the blocks and the final norm: `N` of scaling laws.
pub fn block_parameters(config: &ModelConfig) -> usize {
    let outside = |name: &str| name.contains("embed_tokens") || name.contains("lm_head");
    let blocks = config.tensors().into_iter().filter(|(name, _)| !outside(name));
    blocks.map(|(_, shape)| shape.iter().product::<usize>()).sum()
}

/// A decoder with random weights for sequences of up to `positions` tokens. Each tensor has a
/// stream of its own, so that its values depend on the seed, its name and its shape alone.
pub fn initialize(config: &ModelConfig, seed: u64, positions: usize) -> TrainDecoder {
    let damped = 0.02 / (2.0 * config.num_layers.max(1) as f64).sqrt();
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let len = shape.iter().product();
        let writes_residual = name.contains("o_proj") || name.contains("down_proj");
        let std = if writes_residual { damped } else { 0.02 };
        let mut rng = SplitMix64::new(anybit_core::rng::stream(seed, &name));
        let values = match (shape.len(), name.ends_with(".bias")) {
            (_, true) => vec![0.0; len],
            (1, _) => vec![1.0; len],
            _ => (0..len).map(|_| (rng.normal() * std) as f32).collect(),
        };
        (name, Tensor::new(shape, values))
    };
    let tensors: BTreeMap<_, _> = config.tensors().into_iter().map(tensor).collect();
    TrainDecoder::from_tensors(config.clone(), tensors, positions)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Section 3 of the specification.
    #[test]
    fn presets_have_the_papers_parameters() {
        for (name, want) in [
            ("30m", 30_482_560),
            ("50m", 49_556_736),
            ("100m", 102_777_856),
            ("200m", 203_188_480),
            ("430m", 443_068_288),
            ("800m", 822_151_168),
            ("1.6b", 1_586_076_160),
        ] {
            assert_eq!(block_parameters(&preset(name, 32000, 512).unwrap()), want, "{name}");
        }
        assert_eq!(block_parameters(&preset("1m", 1024, 128).unwrap()), 1_066_368);
        assert!(preset("2m", 10, 10).is_none());
    }

    #[test]
    fn weights_depend_on_the_seed_and_the_name() {
        let config = preset("tiny", 300, 32).unwrap();
        let (a, b, c) =
            (initialize(&config, 1, 32), initialize(&config, 1, 32), initialize(&config, 2, 32));
        assert_eq!(a.embedding, b.embedding);
        assert_ne!(a.embedding, c.embedding);
        let (q, k) = ("self_attn.q_proj.weight", "self_attn.k_proj.weight");
        assert_ne!(a.blocks[0].params[q], a.blocks[0].params[k]);
        let std = |t: &Tensor| {
            (t.data().iter().map(|v| (*v as f64).powi(2)).sum::<f64>() / t.len() as f64).sqrt()
        };
        approx::assert_relative_eq!(std(&a.blocks[1].params[q]), 0.02, max_relative = 0.05);
        let o = &a.blocks[1].params["self_attn.o_proj.weight"];
        approx::assert_relative_eq!(std(o), 0.01, max_relative = 0.05);
    }
}
