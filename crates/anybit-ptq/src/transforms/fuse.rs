//! Rotations folded into the weights of a block, in the order of ResQ's specification (1.5), which
//! QuaRot and SpinQuant share. With `U` the basis of the residual stream, `V_j` that of the values of
//! key–value head `j`, `K` that of rotated keys, `D` that of the input of down (all orthogonal), and
//! row vectors:
//!
//! ```text
//! norms      γ goes into the weights behind them, then γ = 1: RMSNorm commutes with U only so
//! q k v g u  W ← W diag(γ) U            o, down   W ← Uᵀ W, b ← b U
//! v          W_v[j] ← V_jᵀ W_v[j], b_v[j] ← b_v[j] V_j
//! o          W_o[:, h] ← W_o[:, h] V_j(h), then rows ← rows · O, O online on the attention output
//! down       rows ← rows · D, D online            q, k   K online after the rotary embedding
//! ```

use std::collections::BTreeMap;

use anybit_core::transform::transpose;
use anybit_core::{Hadamard, Matrix, Site, Transform};
use anybit_grad::{Tensor, TrainBlock};
use anybit_io::ModelConfig;
use anybit_kernels::transform_rows;

use super::{FittedSite, TransformedBlock};

/// The bases of one block.
pub struct Bases {
    /// Of the values of each key–value head, `[head_dim, head_dim]`; the same for all when one.
    pub values: Vec<Transform>,
    /// Of keys and queries.
    pub keys: Transform,
    /// Online at the attention's output, after the values' bases.
    pub output: Option<Transform>,
    /// Online at the input of down.
    pub down: Transform,
    /// Last channels that want more bits: of the residual stream, of a head.
    pub high: (usize, usize),
}

/// The Hadamard map of a head, or of the largest blocks of it.
pub fn head_hadamard(config: &ModelConfig) -> Transform {
    Transform::Hadamard(Hadamard::largest(config.head_dim))
}

/// The Hadamard map at the input of down.
pub fn down_hadamard(config: &ModelConfig) -> Transform {
    Transform::Hadamard(Hadamard::largest(config.intermediate_size))
}

/// Rotates a block; `residual` is the basis of the residual stream.
pub fn rotate_block(
    config: &ModelConfig,
    block: TrainBlock,
    residual: &Transform,
    bases: &Bases,
) -> TransformedBlock {
    let mut tensors = block.params;
    fold_norm(&mut tensors, "input_layernorm.weight", Site::AttnInput);
    fold_norm(&mut tensors, "post_attention_layernorm.weight", Site::MlpInput);
    for site in [Site::AttnInput, Site::MlpInput] {
        for linear in site.linears() {
            change_rows(&mut tensors, linear, residual);
        }
    }
    for linear in ["self_attn.o_proj", "mlp.down_proj"] {
        change_outputs(&mut tensors, linear, std::slice::from_ref(residual));
    }
    let (heads, kv_heads, head_dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
    let of_kv = |j: usize| &bases.values[j.min(bases.values.len() - 1)];
    let values: Vec<Transform> = (0..kv_heads).map(|j| of_kv(j).clone()).collect();
    change_outputs(&mut tensors, "self_attn.v_proj", &values);
    if let Some(weight) = tensors.get_mut("self_attn.o_proj.weight") {
        for row in weight.data_mut().chunks_exact_mut(heads * head_dim) {
            for (h, part) in row.chunks_exact_mut(head_dim).enumerate() {
                of_kv(h / (heads / kv_heads)).apply(part);
            }
        }
    }
    if let Some(output) = &bases.output {
        change_rows(&mut tensors, "self_attn.o_proj", output);
    }
    change_rows(&mut tensors, "mlp.down_proj", &bases.down);
    let online = |transform: &Transform, high: usize| FittedSite {
        transform: Some(transform.clone()),
        clip: None,
        high,
    };
    let (high, head_high) = bases.high;
    let folded = |high: usize| FittedSite { high, ..Default::default() };
    let output = bases.output.clone();
    let sites = BTreeMap::from([
        (Site::AttnInput, folded(high)),
        (Site::Query, online(&bases.keys, 0)),
        (Site::Key, online(&bases.keys, head_high)),
        (Site::Value, folded(head_high)),
        (Site::AttnOutput, FittedSite { transform: output, clip: None, high: heads * head_high }),
        (Site::MlpInput, folded(high)),
        (Site::DownInput, online(&bases.down, 0)),
    ]);
    TransformedBlock { tensors, sites, clips: BTreeMap::new() }
}

type Tensors = BTreeMap<String, Tensor>;

/// Folds a norm into the linears behind it.
fn fold_norm(tensors: &mut Tensors, norm: &str, site: Site) {
    let Some(gamma) = tensors.get_mut(norm) else { return };
    let factors = Transform::Diagonal(gamma.data().to_vec());
    gamma.data_mut().fill(1.0);
    for linear in site.linears() {
        change_rows(tensors, linear, &factors);
    }
}

/// Puts the inputs of a linear into another basis: every row `w ← w P`.
pub fn change_rows(tensors: &mut Tensors, linear: &str, transform: &Transform) {
    if let Some(weight) = tensors.get_mut(&format!("{linear}.weight")) {
        transform_rows(transform, weight.data_mut());
    }
}

/// Puts the outputs of a linear into another basis, one transform for each of equal parts:
/// `W ← Pᵀ W`, `b ← b P`.
pub fn change_outputs(tensors: &mut Tensors, linear: &str, transforms: &[Transform]) {
    if let Some(weight) = tensors.get_mut(&format!("{linear}.weight")) {
        let (rows, cols) = (weight.shape()[0], weight.shape()[1]);
        let data = weight.data().to_vec();
        let mut columns = transpose(&Matrix { rows, cols, data });
        for column in columns.data.chunks_exact_mut(rows) {
            let parts = column.chunks_exact_mut(rows / transforms.len());
            parts.zip(transforms).for_each(|(part, transform)| transform.apply(part));
        }
        *weight = Tensor::from(transpose(&columns));
    }
    if let Some(bias) = tensors.get_mut(&format!("{linear}.bias")) {
        let size = bias.len() / transforms.len();
        let parts = bias.data_mut().chunks_exact_mut(size);
        parts.zip(transforms).for_each(|(part, transform)| transform.apply(part));
    }
}
