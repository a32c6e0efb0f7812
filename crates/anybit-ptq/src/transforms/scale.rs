//! Per-channel scales in the way of SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth, Han, ICML 2023):
//! `X ← X / s`, `W ← W diag(s)` with
//!
//! ```text
//! s_j = max|X_j|^α / max|W_j|^(1−α)
//! ```
//!
//! over the weights of all linears of a site. Everything is folded: at the inputs of attention and
//! MLP into the norm, at the output of attention into the rows of v (one scale for the query heads
//! that share a key–value head), at the input of down into the rows of up. The original stops at
//! the first two; the others are folded as later work does.

use std::collections::BTreeMap;

use anybit_core::{Site, Transform};
use anybit_grad::{Tensor, TrainBlock};
use anybit_runtime::DecoderLayer;
use serde::{Deserialize, Serialize};

use super::fuse::{change_outputs, change_rows};
use super::{
    ActivationDefaults, Model, TransformMethod, TransformWriter, TransformedBlock, Transformer,
    Vocabulary,
};
use crate::methods::{Citation, options_table, read_transform_options};
use crate::plan::EMBEDDING;
use crate::streams::{Mover, Stream};
use crate::{Recipe, Result};

/// Scales.
pub struct Scale;

/// Settings of scales.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// How much of the difficulty moves from activations to weights.
    alpha: f32,
    /// Calibration tokens for the maxima.
    tokens: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { alpha: 0.5, tokens: 1 << 14 }
    }
}

impl TransformMethod for Scale {
    fn name(&self) -> &'static str {
        "scale"
    }

    fn summary(&self) -> &'static str {
        "per-channel scales as SmoothQuant's, folded"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth, S. Han. SmoothQuant: \
                        Accurate and Efficient Post-Training Quantization for Large Language \
                        Models. ICML 2023, PMLR 202 (arXiv 2211.10438)",
            link: "https://proceedings.mlr.press/v202/xiao23c.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String> {
        let options: Options = read_transform_options(recipe)?;
        if !(0.0..=1.0).contains(&options.alpha) {
            return Err(format!("alpha is {}: it lies between 0 and 1", options.alpha));
        }
        Ok(Box::new(Scales(options)))
    }
}

struct Scales(Options);

impl Transformer for Scales {
    fn options(&self) -> toml::Table {
        options_table(&self.0)
    }

    fn activations(&self) -> ActivationDefaults {
        ActivationDefaults::default()
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn fitted_to(&self, _: &Recipe) -> String {
        String::new()
    }

    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()> {
        let config = &model.checkpoint.config;
        let seqlen = model.sequences.first().map_or(1, Vec::len);
        let count = self.0.tokens.div_ceil(seqlen).min(model.sequences.len());
        let embedding = model.checkpoint.weight(EMBEDDING)?;
        let mut stream = Stream::embed(&model.sequences[..count], &embedding);
        let mut mover = Mover::new(config, seqlen);
        for index in 0..config.num_layers {
            let layer = DecoderLayer::load(model.checkpoint, index)?;
            let maxima = InputMaxima::observe(&layer, &mut stream, &mut mover);
            if index < out.finished() {
                continue;
            }
            let block = TrainBlock::load(model.checkpoint, index)?;
            out.block(index, &self.scale_block(config, block.params, &maxima))?;
        }
        out.vocabulary(&Vocabulary::Kept)
    }
}

/// Largest magnitude of each input channel, by site.
pub struct InputMaxima {
    /// The maxima; at least 1e-5, so that a dead channel has a scale too.
    pub of: BTreeMap<Site, Vec<f32>>,
}

impl InputMaxima {
    /// Moves `stream` through `layer` and looks at the inputs of its linears.
    pub fn observe(layer: &DecoderLayer, stream: &mut Stream, mover: &mut Mover) -> Self {
        let (q_size, ffn) = (layer.q.out_size(), layer.gate.out_size());
        let (seqlen, hidden) = (stream.seqlen, stream.hidden);
        let sizes = [
            (Site::AttnInput, hidden),
            (Site::AttnOutput, q_size),
            (Site::MlpInput, hidden),
            (Site::DownInput, ffn),
        ];
        let mut of: BTreeMap<Site, Vec<f32>> =
            sizes.into_iter().map(|(site, n)| (site, vec![1e-5; n])).collect();
        let mut look = |site: Site, x: &[f32]| {
            let Some(most) = of.get_mut(&site) else { return };
            for row in x.chunks_exact(most.len()) {
                most.iter_mut().zip(row).for_each(|(m, x)| *m = m.max(x.abs()));
            }
        };
        let Mover { rope, kv, buffers, normed, mixed, .. } = mover;
        for x in stream.sequences_mut() {
            let normed = &mut normed[..x.len()];
            layer.attention_input(x, normed);
            look(Site::AttnInput, normed);
            let attended = &mut mixed[..seqlen * q_size];
            layer.attention_mix(normed, 0, rope, kv, buffers, attended);
            look(Site::AttnOutput, attended);
            layer.attention_output(attended, buffers, x);
            layer.mlp_input(x, normed);
            look(Site::MlpInput, normed);
            let activated = &mut mixed[..seqlen * ffn];
            layer.mlp_mix(normed, buffers, activated);
            look(Site::DownInput, activated);
            layer.mlp_output(activated, buffers, x);
        }
        Self { of }
    }
}

/// Largest magnitude of each input channel over the weights of a site.
pub fn weight_maxima(tensors: &BTreeMap<String, Tensor>, site: Site) -> Vec<f32> {
    let mut most: Vec<f32> = Vec::new();
    for linear in site.linears() {
        let Some(weight) = tensors.get(&format!("{linear}.weight")) else { continue };
        most.resize(weight.shape()[1], 1e-5);
        for row in weight.data().chunks_exact(most.len()) {
            most.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
        }
    }
    most
}

impl Scales {
    fn scale_block(
        &self,
        config: &anybit_io::ModelConfig,
        mut tensors: BTreeMap<String, Tensor>,
        maxima: &InputMaxima,
    ) -> TransformedBlock {
        let alpha = self.0.alpha;
        for (site, most) in &maxima.of {
            let weights = weight_maxima(&tensors, *site);
            let scale = |(x, w): (&f32, &f32)| x.powf(alpha) / w.powf(1.0 - alpha);
            let mut scales: Vec<f32> = most.iter().zip(&weights).map(scale).collect();
            if *site == Site::AttnOutput {
                share_heads(config, &mut scales);
            }
            let inverse: Vec<f32> = scales.iter().map(|s| 1.0 / s).collect();
            for linear in site.linears() {
                change_rows(&mut tensors, linear, &Transform::Diagonal(scales.clone()));
            }
            match site {
                Site::AttnInput => scale_vector(&mut tensors, "input_layernorm.weight", &inverse),
                Site::MlpInput => {
                    scale_vector(&mut tensors, "post_attention_layernorm.weight", &inverse);
                }
                Site::AttnOutput => {
                    // The first query head of each group stands for its key–value head.
                    let (hd, group) = (config.head_dim, config.num_heads / config.num_kv_heads);
                    let own: Vec<f32> =
                        inverse.chunks_exact(hd).step_by(group).flatten().copied().collect();
                    let factors = [Transform::Diagonal(own)];
                    change_outputs(&mut tensors, "self_attn.v_proj", &factors);
                }
                _ => change_outputs(&mut tensors, "mlp.up_proj", &[Transform::Diagonal(inverse)]),
            }
        }
        TransformedBlock { tensors, ..Default::default() }
    }
}

/// Gives query heads that share values one scale: the largest.
fn share_heads(config: &anybit_io::ModelConfig, scales: &mut [f32]) {
    let (hd, group) = (config.head_dim, config.num_heads / config.num_kv_heads);
    for shared in scales.chunks_exact_mut(hd * group) {
        for channel in 0..hd {
            let most = (0..group).map(|g| shared[g * hd + channel]).fold(0.0, f32::max);
            (0..group).for_each(|g| shared[g * hd + channel] = most);
        }
    }
}

fn scale_vector(tensors: &mut BTreeMap<String, Tensor>, name: &str, factors: &[f32]) {
    if let Some(vector) = tensors.get_mut(name) {
        vector.data_mut().iter_mut().zip(factors).for_each(|(v, f)| *v *= f);
    }
}
