//! One block, in true sequential order: the inputs of each site come from the linears that were
//! rounded before it.
//!
//! | stage | observes | rounds | then |
//! |---|---|---|---|
//! | 1 | attention input | q, k, v | attention with them |
//! | 2 | attention output | o | `x += o(…)` |
//! | 3 | MLP input | gate, up | |
//! | 4 | their product | down | `x += down(…)` |
//!
//! The product of gate and up is computed twice, once to observe it and once to pass it on:
//! storing it would take more memory than everything else together.

use std::sync::Arc;

use anybit_core::{Gram, Matrix, QuantizedMatrix};
use anybit_io::native::{relative_error, squared_norm};
use anybit_runtime::DecoderLayer;

use crate::methods::{Method, SiteLinear};
use crate::plan::PlannedMatrix;
use crate::streams::{Mover, Stream};
use crate::{Plan, PtqError, Result};

/// A packed matrix with what was measured of it.
pub struct Rounded {
    /// Name of its tensor.
    pub tensor: String,
    /// The codes.
    pub matrix: QuantizedMatrix,
    /// `‖W − Q‖² / ‖W‖²`.
    pub relative_error: f64,
    /// The same in the metric of the inputs.
    pub output_error: Option<f64>,
    /// `‖Q‖²`.
    pub decoded_norm: f64,
}

/// Rounds every planned linear of block `index` of which `layer` holds the originals, and moves
/// `stream` through the rounded block. On return `layer` holds the decoded weights.
///
/// # Errors
/// A linear that cannot be rounded, by its name.
pub fn quantize_block(
    plan: &Plan,
    method: &dyn Method,
    index: usize,
    layer: &mut DecoderLayer,
    stream: &mut Stream,
    mover: &mut Mover,
) -> Result<Vec<Rounded>> {
    let planned: Vec<&PlannedMatrix> = plan.block(index).collect();
    let mut block = BlockRounding { method, planned, layer, done: Vec::new() };
    if stream.is_empty() {
        block.round(&["q_proj", "k_proj", "v_proj", "o_proj"], None)?;
        block.round(&["gate_proj", "up_proj", "down_proj"], None)?;
        return Ok(block.done);
    }
    let Mover { rope, kv, buffers, normed, mixed, .. } = mover;
    let (seqlen, hidden) = (stream.seqlen, stream.hidden);
    let q_size = block.layer.q.out_size();
    let observes = method.needs_gram();

    let mut gram = Gram::new(hidden);
    if observes {
        for x in stream.sequences() {
            let normed = &mut normed[..x.len()];
            block.layer.attention_input(x, normed);
            gram.add(normed);
        }
    }
    block.round(&["q_proj", "k_proj", "v_proj"], observes.then_some(&gram))?;

    let mut gram = Gram::new(q_size);
    let mut attended = vec![0f32; stream.data.len() / hidden * q_size];
    for (x, attended) in stream.sequences().zip(attended.chunks_exact_mut(seqlen * q_size)) {
        let normed = &mut normed[..x.len()];
        block.layer.attention_input(x, normed);
        block.layer.attention_mix(normed, 0, rope, kv, buffers, attended);
        if observes {
            gram.add(attended);
        }
    }
    block.round(&["o_proj"], observes.then_some(&gram))?;

    let mut gram = Gram::new(hidden);
    for (x, attended) in stream.sequences_mut().zip(attended.chunks_exact(seqlen * q_size)) {
        block.layer.attention_output(attended, buffers, x);
        if observes {
            let normed = &mut normed[..x.len()];
            block.layer.mlp_input(x, normed);
            gram.add(normed);
        }
    }
    drop(attended);
    block.round(&["gate_proj", "up_proj"], observes.then_some(&gram))?;

    let ffn = block.layer.gate.out_size();
    let mut gram = Gram::new(ffn);
    let product = &mut mixed[..seqlen * ffn];
    if observes {
        for x in stream.sequences() {
            let normed = &mut normed[..x.len()];
            block.layer.mlp_input(x, normed);
            block.layer.mlp_mix(normed, buffers, product);
            gram.add(product);
        }
    }
    block.round(&["down_proj"], observes.then_some(&gram))?;

    for x in stream.sequences_mut() {
        let normed = &mut normed[..x.len()];
        block.layer.mlp_input(x, normed);
        block.layer.mlp_mix(normed, buffers, product);
        block.layer.mlp_output(product, buffers, x);
    }
    Ok(block.done)
}

struct BlockRounding<'a> {
    method: &'a dyn Method,
    planned: Vec<&'a PlannedMatrix>,
    layer: &'a mut DecoderLayer,
    done: Vec<Rounded>,
}

impl BlockRounding<'_> {
    /// Rounds those of the linears `names` that are planned, and puts the decoded weights in
    /// their place.
    fn round(&mut self, names: &[&str], gram: Option<&Gram>) -> Result<()> {
        let ends =
            |m: &&&PlannedMatrix| names.iter().any(|n| m.tensor.ends_with(&format!(".{n}.weight")));
        let site: Vec<&PlannedMatrix> = self.planned.iter().filter(ends).copied().collect();
        let mut originals = Vec::new();
        for m in &site {
            let linear = linear_of(self.layer, &m.tensor)?;
            originals.push(Matrix::from_rows(&*linear.weight));
        }
        let rounded = round_matrices(self.method, &site, &originals, gram)?;
        for r in rounded {
            let (tensor, decoded) = (r.0.tensor.clone(), r.1);
            linear_of(self.layer, &tensor)?.weight = Arc::new(decoded);
            self.done.push(r.0);
        }
        Ok(())
    }
}

fn linear_of<'a>(
    layer: &'a mut DecoderLayer,
    tensor: &str,
) -> Result<&'a mut anybit_runtime::Linear> {
    let name = tensor.splitn(4, '.').nth(3).and_then(|n| n.strip_suffix(".weight"));
    name.and_then(|n| layer.linear_mut(n))
        .ok_or_else(|| PtqError::Recipe(format!("{tensor} is no linear of a block")))
}

/// Rounds matrices that share their inputs; returns each with its decoded weights.
///
/// # Errors
/// The matrix that cannot be rounded, by its name.
pub fn round_matrices(
    method: &dyn Method,
    planned: &[&PlannedMatrix],
    originals: &[Matrix],
    gram: Option<&Gram>,
) -> Result<Vec<(Rounded, Matrix)>> {
    let linears: Vec<SiteLinear<'_>> = planned
        .iter()
        .zip(originals)
        .map(|(p, weights)| SiteLinear { weights, settings: p.settings })
        .collect();
    let matrices = method.round(&linears, gram).map_err(|(i, source)| {
        let tensor = planned.get(i).map_or(String::new(), |p| p.tensor.clone());
        PtqError::Tensor { tensor, source }
    })?;
    let measured = planned.iter().zip(originals).zip(matrices);
    Ok(measured.map(|((p, w), q)| measure(p, w, q, gram)).collect())
}

fn measure(
    planned: &PlannedMatrix,
    original: &Matrix,
    matrix: QuantizedMatrix,
    gram: Option<&Gram>,
) -> (Rounded, Matrix) {
    let decoded = matrix.dequantize();
    let output_error = gram.map(|gram| {
        let mut difference = original.clone();
        difference.data.iter_mut().zip(&decoded.data).for_each(|(w, q)| *w -= q);
        gram.trace(&difference) / gram.trace(original).max(f64::MIN_POSITIVE)
    });
    let rounded = Rounded {
        tensor: planned.tensor.clone(),
        relative_error: relative_error(original, &decoded),
        output_error,
        decoded_norm: squared_norm(&decoded),
        matrix,
    };
    (rounded, decoded)
}
