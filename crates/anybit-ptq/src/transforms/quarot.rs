//! QuaRot (Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, NeurIPS
//! 2024): the residual stream in a random Hadamard basis `U = diag(±1) H`, values and the attention's
//! output in Hadamard bases, keys, queries and the input of down through online Hadamard maps. No
//! data: a Hadamard basis spreads whatever outliers there are over all channels.
//!
//! Activations are symmetric per token with clip 0.9, keys and values asymmetric with 0.95, as the
//! paper has them. Where the number of heads has no Hadamard matrix the map across heads is left
//! out; where a width has none, blocks take its place.

use anybit_core::rng::SplitMix64;
use anybit_core::{Hadamard, Matrix, ScaleFit, Transform, hadamard};
use anybit_grad::TrainBlock;
use anybit_io::ModelConfig;

use super::fuse::{Bases, down_hadamard, head_hadamard, rotate_block};
use super::{ActivationDefaults, Model, TransformMethod, TransformWriter, Transformer, Vocabulary};
use crate::methods::{Citation, NoOptions, read_transform_options};
use crate::{Recipe, Result};

/// QuaRot.
pub struct QuaRot;

impl TransformMethod for QuaRot {
    fn name(&self) -> &'static str {
        "quarot"
    }

    fn summary(&self) -> &'static str {
        "random Hadamard rotations; no data"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "S. Ashkboos, A. Mohtashami, M. L. Croci, B. Li, P. Cameron, M. Jaggi, D. \
                        Alistarh, T. Hoefler, J. Hensman. QuaRot: Outlier-Free 4-Bit Inference in \
                        Rotated LLMs. NeurIPS 2024 (arXiv 2404.00456)",
            link: "https://openreview.net/forum?id=dfqsW38v1X",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String> {
        read_transform_options::<NoOptions>(recipe)?;
        Ok(Box::new(Rotations))
    }
}

struct Rotations;

impl Transformer for Rotations {
    fn options(&self) -> toml::Table {
        toml::Table::new()
    }

    fn activations(&self) -> ActivationDefaults {
        ActivationDefaults { symmetric: true, clip: 0.9, kv_clip: 0.95, scale: ScaleFit::Mse }
    }

    fn needs_data(&self) -> bool {
        false
    }

    fn fitted_to(&self, _: &Recipe) -> String {
        String::new()
    }

    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()> {
        let config = &model.checkpoint.config;
        let residual = random_hadamard(config.hidden_size, model.recipe.seed);
        let bases = Bases {
            values: vec![head_hadamard(config)],
            keys: head_hadamard(config),
            output: across_heads(config),
            down: down_hadamard(config),
            high: (0, 0),
        };
        for index in out.finished()..config.num_layers {
            let block = TrainBlock::load(model.checkpoint, index)?;
            out.block(index, &rotate_block(config, block, &residual, &bases))?;
        }
        out.vocabulary(&Vocabulary::Rotated(&residual))
    }
}

/// `x → (x ∘ ±1) H`.
pub fn random_hadamard(n: usize, seed: u64) -> Transform {
    let mut rng = SplitMix64::new(seed);
    let signs = (0..n).map(|_| if rng.next_u64() & 1 == 0 { 1.0 } else { -1.0 }).collect();
    Transform::Compose(vec![Transform::Diagonal(signs), Transform::Hadamard(Hadamard::largest(n))])
}

/// The Hadamard map across heads, `H ⊗ I`; with the one inside each head, that is in the values
/// already, it makes a map of the whole attention output. None where there is none.
fn across_heads(config: &ModelConfig) -> Option<Transform> {
    let heads = config.num_heads;
    let signs = hadamard::signs(heads).filter(|_| heads > 1)?;
    let root = (heads as f32).sqrt();
    // x Hᵀ in every channel: H itself stands transposed as the left factor.
    let data = signs.iter().map(|s| *s as f32 / root).collect();
    let left = anybit_core::transform::transpose(&Matrix { rows: heads, cols: heads, data });
    let sizes = (heads, config.head_dim);
    Some(Transform::Kronecker { sizes, left: Some(left), right: None })
}
