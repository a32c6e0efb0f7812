//! ResQ (Saxena, Sharify, Roy, Wang, ICML 2025): each activation in an orthogonal basis
//! `U = P R` whose last `r` columns span the principal subspace of the calibration inputs, and
//! random rotations `R = blockdiag(R_l, R_h)` inside both parts. The `r` coefficients that carry most
//! of the energy keep 8 bits, the others get the bits asked for:
//!
//! ```text
//! X_q = [Q_L(X U_l) | Q_H(X U_h)]    W_q = [Q_L(W U_l) | Q_H(W U_h)]
//! Y   = Q_L(X U_l) Q_L(W U_l)ᵀ + Q_H(X U_h) Q_H(W U_h)ᵀ
//! ```
//!
//! One basis `U_A` serves the residual stream of the whole model, from the sum over all blocks of
//! the second moments of the normalized inputs (without γ); `U_B` the values of each key–value head,
//! `U_C` the rotated keys of a block; the input of down gets a Hadamard map and no high part.
//! Eigenvectors ascend, so the high part is the last `r` columns; moments are not centred.
//!
//! Differences from the reference code, on purpose: `U_C` is not itself rounded to 8 bits; the
//! attention output has one grid per token for the low and one for the high parts of all heads
//! instead of two per head, which one integer product can express; queries are not rounded.

use anybit_core::rng::SplitMix64;
use anybit_core::{Gram, Matrix, ScaleFit, Transform};
use anybit_grad::TrainBlock;
use anybit_io::ModelConfig;
use anybit_kernels::{KvRows, rms_norm};
use anybit_runtime::DecoderLayer;
use faer::{Mat, Side};
use serde::{Deserialize, Serialize};

use super::fuse::{Bases, down_hadamard, rotate_block};
use super::{ActivationDefaults, Model, TransformMethod, TransformWriter, Transformer, Vocabulary};
use crate::methods::{Citation, options_table, read_transform_options};
use crate::plan::EMBEDDING;
use crate::streams::{Mover, Stream};
use crate::{PtqError, Recipe, Result};

/// ResQ.
pub struct ResQ;

/// Settings of ResQ.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Share of the channels that keep `high_bits`.
    rank: f64,
    /// Calibration tokens for the bases.
    tokens: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { rank: 0.125, tokens: 1 << 15 }
    }
}

impl TransformMethod for ResQ {
    fn name(&self) -> &'static str {
        "resq"
    }

    fn summary(&self) -> &'static str {
        "PCA bases: the high-variance subspace keeps 8 bits"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "U. Saxena, S. Sharify, K. Roy, X. Wang. ResQ: Mixed-Precision Quantization \
                        of Large Language Models with Low-Rank Residuals. ICML 2025, PMLR 267 \
                        (arXiv 2412.14363)",
            link: "https://proceedings.mlr.press/v267/saxena25b.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String> {
        let options: Options = read_transform_options(recipe)?;
        if !(options.rank > 0.0 && options.rank <= 0.5) {
            return Err(format!("rank is {}: it lies in (0, 0.5]", options.rank));
        }
        if options.tokens == 0 {
            return Err("tokens is 0: the bases need calibration text".into());
        }
        Ok(Box::new(Principal(options)))
    }
}

struct Principal(Options);

impl Transformer for Principal {
    fn options(&self) -> toml::Table {
        options_table(&self.0)
    }

    fn activations(&self) -> ActivationDefaults {
        ActivationDefaults { symmetric: false, clip: 1.0, kv_clip: 1.0, scale: ScaleFit::Mse }
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn fitted_to(&self, _: &Recipe) -> String {
        String::new()
    }

    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()> {
        let config = &model.checkpoint.config;
        let part = |n: usize| (self.0.rank * n as f64) as usize;
        let (high, head_high) = (part(config.hidden_size), part(config.head_dim));
        if head_high == 0 {
            let (rank, n) = (self.0.rank, config.head_dim);
            let what = format!("resq: rank {rank} of {n} channels of a head is no channel at all");
            return Err(PtqError::Recipe(what));
        }
        let moments = Moments::gather(model, self.0.tokens, out)?;
        let mut rng = SplitMix64::new(model.recipe.seed);
        let residual = basis(&moments.residual, high, &mut rng)?;
        let split = Transform::HeadSplit {
            heads: config.num_heads,
            head_dim: config.head_dim,
            high: head_high,
        };
        // The random parts are the same in every head and block, as in the paper.
        let head_rotation = random_parts(config.head_dim, head_high, &mut rng);
        let in_head = |gram: &Gram| rotated(gram, &head_rotation);
        for index in out.finished()..config.num_layers {
            let (keys, values) = &moments.heads[index];
            let bases = Bases {
                values: values.iter().map(&in_head).collect::<Result<_>>()?,
                keys: in_head(keys)?,
                output: Some(split.clone()),
                down: down_hadamard(config),
                high: (high, head_high),
            };
            let block = TrainBlock::load(model.checkpoint, index)?;
            out.block(index, &rotate_block(config, block, &residual, &bases))?;
        }
        out.vocabulary(&Vocabulary::Rotated(&residual))
    }
}

/// Second moments of calibration inputs, not centred.
struct Moments {
    /// Sum over blocks of the normalized inputs of attention and MLP, without γ.
    residual: Gram,
    /// Of each block: rotated keys over all heads, values of each head.
    heads: Vec<(Gram, Vec<Gram>)>,
}

impl Moments {
    fn gather(model: &Model<'_>, tokens: usize, out: &mut TransformWriter<'_>) -> Result<Self> {
        let config = &model.checkpoint.config;
        let seqlen = model.sequences.first().map_or(1, Vec::len);
        let count = tokens.div_ceil(seqlen).min(model.sequences.len());
        let embedding = model.checkpoint.weight(EMBEDDING)?;
        let mut stream = Stream::embed(&model.sequences[..count], &embedding);
        let mut mover = Mover::new(config, seqlen);
        let mut residual = Gram::new(config.hidden_size);
        let mut heads = Vec::with_capacity(config.num_layers);
        for index in 0..config.num_layers {
            let layer = DecoderLayer::load(model.checkpoint, index)?;
            heads.push(observe(config, &layer, &mut stream, &mut mover, &mut residual));
            out.progress(index, 2 * config.num_layers);
        }
        Ok(Self { residual, heads })
    }
}

/// Moves `stream` through a block and returns the moments of its keys and values.
fn observe(
    config: &ModelConfig,
    layer: &DecoderLayer,
    stream: &mut Stream,
    mover: &mut Mover,
    residual: &mut Gram,
) -> (Gram, Vec<Gram>) {
    let ones = vec![1.0; config.hidden_size];
    let (head_dim, seqlen) = (config.head_dim, stream.seqlen);
    let mut keys = Gram::new(head_dim);
    let mut values = vec![Gram::new(head_dim); config.num_kv_heads];
    let Mover { rope, kv, buffers, normed, mixed, .. } = mover;
    for x in stream.sequences_mut() {
        let normed = &mut normed[..x.len()];
        rms_norm(x, &ones, config.rms_norm_eps, normed);
        residual.add(normed);
        layer.attention_input(x, normed);
        let attended = &mut mixed[..seqlen * config.q_size()];
        layer.attention_mix(normed, 0, rope, kv, buffers, attended);
        for (head, value) in values.iter_mut().enumerate() {
            let start = head * kv.capacity;
            let rows = |rows: &KvRows| rows.read(start..start + seqlen, head_dim, &mut []).to_vec();
            keys.add(&rows(&kv.keys));
            value.add(&rows(&kv.values));
        }
        layer.attention_output(attended, buffers, x);
        rms_norm(x, &ones, config.rms_norm_eps, normed);
        residual.add(normed);
        layer.mlp_input(x, normed);
        let activated = &mut mixed[..seqlen * config.intermediate_size];
        layer.mlp_mix(normed, buffers, activated);
        layer.mlp_output(activated, buffers, x);
    }
    (keys, values)
}

/// `P blockdiag(R_l, R_h)` of a second moment.
fn basis(gram: &Gram, high: usize, rng: &mut SplitMix64) -> Result<Transform> {
    rotated(gram, &random_parts(gram.size(), high, rng))
}

/// Random orthogonal matrices of the low and the high part.
fn random_parts(n: usize, high: usize, rng: &mut SplitMix64) -> (Mat<f64>, Mat<f64>) {
    (random_orthogonal(n - high, rng), random_orthogonal(high, rng))
}

fn rotated(gram: &Gram, (low, high): &(Mat<f64>, Mat<f64>)) -> Result<Transform> {
    let n = gram.size();
    let p = eigenvectors(gram)?;
    let split = low.nrows();
    let mut u = Mat::<f64>::zeros(n, n);
    u.get_mut(.., ..split).copy_from(p.get(.., ..split) * low);
    u.get_mut(.., split..).copy_from(p.get(.., split..) * high);
    let mut out = Matrix::zeros(n, n);
    for i in 0..n {
        out.row_mut(i).iter_mut().enumerate().for_each(|(j, v)| *v = u[(i, j)] as f32);
    }
    Ok(Transform::dense(out))
}

/// Eigenvectors as columns, eigenvalues ascending.
fn eigenvectors(gram: &Gram) -> Result<Mat<f64>> {
    let n = gram.size();
    let moment = Mat::<f64>::from_fn(n, n, |i, j| gram.at(i, j) as f64);
    match moment.self_adjoint_eigen(Side::Lower) {
        Ok(eigen) => Ok(eigen.U().to_owned()),
        Err(e) => Err(PtqError::Recipe(format!(
            "resq: the second moment of {n} channels has no eigenvectors ({e:?}): are the \
             activations finite?"
        ))),
    }
}

/// Haar-distributed: QR of a Gaussian matrix, signs from the diagonal of R.
pub fn random_orthogonal(n: usize, rng: &mut SplitMix64) -> Mat<f64> {
    let gaussian: Vec<f64> = (0..n * n).map(|_| rng.normal()).collect();
    let qr = Mat::<f64>::from_fn(n, n, |i, j| gaussian[i * n + j]).qr();
    let mut q = qr.compute_thin_Q();
    for j in 0..n {
        if qr.R()[(j, j)] < 0.0 {
            (0..n).for_each(|i| q[(i, j)] = -q[(i, j)]);
        }
    }
    q
}
