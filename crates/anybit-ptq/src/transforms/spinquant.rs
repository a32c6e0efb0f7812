//! SpinQuant (Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian, Blankevoort, ICLR
//! 2025): QuaRot's places, but the rotation `R₁` of the residual stream and the rotations `R₂` of the
//! values of each block are learned: they minimise the cross-entropy of the model with quantized
//! activations and cache, on the manifold of orthogonal matrices (Cayley SGD, Li, Fuxin, Todorovic,
//! ICLR 2020). For a parameter `X` with gradient `G`:
//!
//! ```text
//! V = μ M − Gᵀ      Ŵ = V X − ½ Xᵀ X V X      W = Ŵ − Ŵᵀ      α = min(lr, 1 / (‖W‖₁ + ε))
//! Y = Xᵀ + α V,  five times  Y ← Xᵀ + α W (Xᵀ + Y) / 2,  then  X ← Yᵀ,  M ← W Xᵀ
//! ```
//!
//! Weights stay unrounded while rotations are learned, as the paper does it where GPTQ follows. Then
//! `Q(h R₁)(W R₁)ᵀ = (Q(h R₁) R₁ᵀ) Wᵀ`, so only activations are rotated, there and back, and no weight
//! needs a gradient: a quarter of the work for the same gradient of `R`.

use anybit_core::rng::SplitMix64;
use anybit_core::{Hadamard, Matrix, ScaleFit, Site, Transform};
use anybit_grad::{
    BlockVars, DecoderVars, FakeQuant, Tape, Tensor, TrainBlock, TrainDecoder, Var,
    block_forward_at, next_tokens,
};
use anybit_io::ModelConfig;
use faer::Mat;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

use super::fuse::{Bases, down_hadamard, head_hadamard, rotate_block};
use super::quarot::random_hadamard;
use super::{ActivationDefaults, Model, TransformMethod, TransformWriter, Transformer, Vocabulary};
use crate::activations::UNQUANTIZED;
use crate::methods::{Citation, options_table, read_transform_options};
use crate::{PtqError, Recipe, Result};

/// SpinQuant.
pub struct SpinQuant;

/// Settings of SpinQuant.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Options {
    /// Steps of one calibration sequence each.
    steps: usize,
    /// Learning rate at the start; it falls to zero along half a cosine.
    lr: f64,
    /// Momentum μ.
    momentum: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self { steps: 100, lr: 1.5, momentum: 0.0 }
    }
}

impl TransformMethod for SpinQuant {
    fn name(&self) -> &'static str {
        "spinquant"
    }

    fn summary(&self) -> &'static str {
        "learned rotations of the residual stream and of values"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "Z. Liu, C. Zhao, I. Fedorov, B. Soran, D. Choudhary, R. Krishnamoorthi, V. \
                        Chandra, Y. Tian, T. Blankevoort. SpinQuant: LLM Quantization with Learned \
                        Rotations. ICLR 2025 (arXiv 2405.16406)",
            link: "https://openreview.net/forum?id=ogO6DGE6FZ",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String> {
        let options: Options = read_transform_options(recipe)?;
        if !(options.lr > 0.0 && options.lr.is_finite()) {
            return Err(format!("lr is {}: it must be above 0", options.lr));
        }
        if !(0.0..1.0).contains(&options.momentum) {
            return Err(format!("momentum is {}: it lies in [0, 1)", options.momentum));
        }
        Ok(Box::new(LearnedRotations(options)))
    }
}

struct LearnedRotations(Options);

impl Transformer for LearnedRotations {
    fn options(&self) -> toml::Table {
        options_table(&self.0)
    }

    fn activations(&self) -> ActivationDefaults {
        ActivationDefaults { symmetric: false, clip: 1.0, kv_clip: 1.0, scale: ScaleFit::Mse }
    }

    fn needs_data(&self) -> bool {
        true
    }

    fn fitted_to(&self, recipe: &Recipe) -> String {
        let bits = (recipe.a_bits, &recipe.sites, recipe.kv_bits);
        format!("{bits:?} {:?}", recipe.a_symmetric)
    }

    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()> {
        let config = &model.checkpoint.config;
        let rotations = match model.cache.read::<Rotations>(LEARNED)? {
            Some(rotations) => rotations,
            None => {
                let rotations = self.learn(model, out)?;
                model.cache.write(LEARNED, &rotations)?;
                rotations
            }
        };
        let residual = rotations.transform(0, config.hidden_size);
        for index in out.finished()..config.num_layers {
            let bases = Bases {
                values: vec![rotations.transform(index + 1, config.head_dim)],
                keys: head_hadamard(config),
                output: None,
                down: down_hadamard(config),
                high: (0, 0),
            };
            let block = TrainBlock::load(model.checkpoint, index)?;
            out.block(index, &rotate_block(config, block, &residual, &bases))?;
        }
        out.vocabulary(&Vocabulary::Rotated(&residual))
    }
}

/// File of the learned rotations.
const LEARNED: &str = "rotations.json";

/// `R₁`, then `R₂` of each block, row-major; and the loss of every step, for whoever looks.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Rotations {
    matrices: Vec<Vec<f32>>,
    losses: Vec<f32>,
}

impl Rotations {
    /// Random Hadamard matrices.
    fn start(config: &ModelConfig, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let mut random = |n: usize| {
            let hadamard = random_hadamard(n, rng.next_u64());
            let mut rows = vec![0f32; n * n];
            (0..n).for_each(|i| rows[i * n + i] = 1.0);
            hadamard.apply(&mut rows);
            rows
        };
        let mut all = vec![random(config.hidden_size)];
        all.extend((0..config.num_layers).map(|_| random(config.head_dim)));
        Self { matrices: all, losses: Vec::new() }
    }

    fn transform(&self, index: usize, n: usize) -> Transform {
        Transform::dense(Matrix { rows: n, cols: n, data: self.matrices[index].clone() })
    }
}

impl LearnedRotations {
    fn learn(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<Rotations> {
        let config = &model.checkpoint.config;
        let mut rotations = Rotations::start(config, model.recipe.seed);
        let quantizes = |(layer, site)| model.recipe.site_bits(layer, site) != UNQUANTIZED;
        let layers = 0..config.num_layers;
        if !layers.flat_map(|l| Site::ALL.map(|site| (l, site))).any(quantizes) {
            let what = "spinquant has nothing to learn: activations and cache have 16 bits; give \
                        --a-bits or --kv-bits, or use quarot";
            return Err(PtqError::Recipe(what.into()));
        }
        let seqlen = model.sequences.first().map_or(2, Vec::len);
        let decoder = TrainDecoder::load(model.checkpoint, seqlen)?;
        let mut momenta: Vec<Option<Mat<f64>>> = vec![None; rotations.matrices.len()];
        let mut tape = Tape::default();
        for step in 0..self.0.steps {
            let tokens = &model.sequences[step % model.sequences.len()];
            let (loss, grads) = gradients(&mut tape, &decoder, &rotations, model.recipe, tokens)?;
            let finite = grads.iter().flatten().all(|g| g.is_finite());
            if !loss.is_finite() || !finite {
                let what =
                    format!("spinquant: the loss is {loss} at step {step}: lower transform.lr");
                return Err(PtqError::Recipe(what));
            }
            rotations.losses.push(loss);
            let at = step as f64 / self.0.steps as f64;
            let lr = self.0.lr / 2.0 * (1.0 + (std::f64::consts::PI * at).cos());
            for ((x, g), m) in rotations.matrices.iter_mut().zip(&grads).zip(&mut momenta) {
                *m = Some(cayley_step(x, g, m.take(), (lr, self.0.momentum)));
            }
            out.progress(step + 1, self.0.steps);
        }
        rotations.matrices.iter_mut().for_each(|x| orthonormalize(x));
        Ok(rotations)
    }
}

/// Loss of one sequence, and its gradient with respect to every rotation.
fn gradients(
    tape: &mut Tape,
    decoder: &TrainDecoder,
    rotations: &Rotations,
    recipe: &Recipe,
    tokens: &[u32],
) -> Result<(f32, Vec<Vec<f32>>)> {
    let config = &decoder.config;
    let (d, hd) = (config.hidden_size, config.head_dim);
    let vars: DecoderVars = decoder.vars(tape, &|_| false);
    let leaf = |tape: &mut Tape, data: &Vec<f32>, n: usize| {
        tape.leaf(Tensor::new([n, n], data.clone()), true)
    };
    let residual = leaf(tape, &rotations.matrices[0], d);
    let values: Vec<Var> = rotations.matrices[1..].iter().map(|r| leaf(tape, r, hd)).collect();
    let down = Arc::new(Transform::Hadamard(Hadamard::largest(config.intermediate_size)));
    let keys = Arc::new(Transform::Hadamard(Hadamard::largest(hd)));
    let mut x = tape.embedding(vars.embedding, tokens);
    for (layer, params) in vars.blocks.iter().enumerate() {
        let value_back = tape.transpose(values[layer]);
        let mut sites = Sites {
            config,
            recipe,
            layer,
            residual,
            value: (values[layer], value_back),
            keys: keys.clone(),
            down: down.clone(),
            norms: Vec::new(),
        };
        let params = sites.without_norms(tape, params);
        let mut at = |tape: &mut Tape, site, x| sites.at(tape, site, x);
        let shape = decoder.block_shape(layer);
        x = block_forward_at(tape, x, &params, &shape, tokens.len(), &mut at).y;
    }
    let hidden = tape.rms_norm(x, vars.norm, config.rms_norm_eps);
    let targets = next_tokens(tokens, tokens.len());
    let loss = tape.linear_cross_entropy(hidden, vars.head, &targets);
    let value = tape.data(loss)[0];
    tape.backward(loss);
    let grads = std::iter::once(residual).chain(values).map(|v| {
        let len = tape.value(v).len();
        tape.take_grad(v).unwrap_or_else(|| vec![0.0; len])
    });
    let grads = grads.collect();
    tape.reset();
    Ok((value, grads))
}

/// What happens at the sites of a block while rotations are learned: into the basis, on the grid,
/// and back.
struct Sites<'a> {
    config: &'a ModelConfig,
    recipe: &'a Recipe,
    layer: usize,
    residual: Var,
    /// `R₂` and its transpose.
    value: (Var, Var),
    keys: Arc<Transform>,
    down: Arc<Transform>,
    /// γ of the norms before attention and MLP, applied behind the rotation.
    norms: Vec<Var>,
}

impl Sites<'_> {
    /// The block's parameters with norms of ones.
    fn without_norms(&mut self, tape: &mut Tape, params: &BlockVars) -> BlockVars {
        let mut params = params.clone();
        for name in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            self.norms.extend(params.get(name));
            let ones = tape.constant(Tensor::new(
                [self.config.hidden_size],
                vec![1.0; self.config.hidden_size],
            ));
            params.set(name, ones);
        }
        params
    }

    fn at(&self, tape: &mut Tape, site: Site, x: Var) -> Var {
        let (heads, kv, hd) =
            (self.config.num_heads, self.config.num_kv_heads, self.config.head_dim);
        let (turn, back) = self.value;
        match site {
            Site::AttnInput | Site::MlpInput => {
                let turned = tape.matmul(x, self.residual);
                let cols = vec![self.config.hidden_size];
                let rounded = self.on_grid(tape, site, turned, cols);
                let back = tape.linear(rounded, self.residual, None);
                let gamma = self.norms[usize::from(site == Site::MlpInput)];
                tape.scale_columns(back, gamma, false)
            }
            Site::Query => x,
            Site::Key => self.fixed(tape, site, &self.keys, x, vec![hd; kv]),
            Site::Value => {
                let turned = tape.kronecker(x, None, Some(turn), (kv, hd));
                let rounded = self.on_grid(tape, site, turned, vec![hd; kv]);
                tape.kronecker(rounded, None, Some(back), (kv, hd))
            }
            Site::AttnOutput => {
                let turned = tape.kronecker(x, None, Some(turn), (heads, hd));
                let rounded = self.on_grid(tape, site, turned, vec![heads * hd]);
                tape.kronecker(rounded, None, Some(back), (heads, hd))
            }
            Site::DownInput => {
                self.fixed(tape, site, &self.down, x, vec![self.config.intermediate_size])
            }
        }
    }

    /// Through a fixed orthogonal map, on the grid, and back.
    fn fixed(
        &self,
        tape: &mut Tape,
        site: Site,
        map: &Arc<Transform>,
        x: Var,
        cols: Vec<usize>,
    ) -> Var {
        let turned = tape.transform(x, map);
        let rounded = self.on_grid(tape, site, turned, cols);
        tape.transform_back(rounded, map)
    }

    fn on_grid(&self, tape: &mut Tape, site: Site, x: Var, cols: Vec<usize>) -> Var {
        let bits = self.recipe.site_bits(self.layer, site);
        if bits == UNQUANTIZED {
            return x;
        }
        let cache = matches!(site, Site::Key | Site::Value);
        let symmetric = !cache && self.recipe.a_symmetric.unwrap_or(true);
        let segments = cols.into_iter().map(|cols| (cols, bits)).collect();
        tape.fake_quant(x, None, &FakeQuant { segments, symmetric, weight: false })
    }
}

/// One step of Cayley SGD on the orthogonal matrix `x` with gradient `g`; returns the momentum.
fn cayley_step(
    x: &mut [f32],
    g: &[f32],
    momentum: Option<Mat<f64>>,
    (lr, mu): (f64, f64),
) -> Mat<f64> {
    let n = x.len().isqrt();
    let matrix = |data: &[f32]| Mat::<f64>::from_fn(n, n, |i, j| data[i * n + j] as f64);
    let (current, gradient) = (matrix(x), matrix(g));
    let transposed = current.transpose().to_owned();
    let mut v = -gradient.transpose().to_owned();
    if let Some(m) = momentum {
        v += faer::Scale(mu) * &m;
    }
    let vx = &v * &current;
    let w = &vx - faer::Scale(0.5) * (&transposed * (&current * &vx));
    let w = &w - w.transpose();
    let norm = (0..n).map(|j| (0..n).map(|i| w[(i, j)].abs()).sum::<f64>()).fold(0.0, f64::max);
    let alpha = lr.min(1.0 / (norm + 1e-8));
    let mut y = &transposed + faer::Scale(alpha) * &v;
    for _ in 0..5 {
        y = &transposed + faer::Scale(0.5 * alpha) * (&w * (&transposed + &y));
    }
    for i in 0..n {
        for j in 0..n {
            x[i * n + j] = y[(j, i)] as f32;
        }
    }
    &w * &transposed
}

/// The nearest orthonormal rows by QR: what the steps leave of rounding.
fn orthonormalize(x: &mut [f32]) {
    let n = x.len().isqrt();
    let qr = Mat::<f64>::from_fn(n, n, |i, j| x[i * n + j] as f64).qr();
    let q = qr.compute_thin_Q();
    for j in 0..n {
        let sign = if qr.R()[(j, j)] < 0.0 { -1.0 } else { 1.0 };
        (0..n).for_each(|i| x[i * n + j] = (sign * q[(i, j)]) as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T18 of ResQ's specification: maximise ⟨X, A⟩ for an orthogonal A (n = 64, μ = 0.9, lr 1.5).
    #[test]
    fn cayley_finds_an_orthogonal_target() {
        let n = 64;
        let mut rng = SplitMix64::new(5);
        let orthogonal = |rng: &mut SplitMix64| {
            let q = super::super::resq::random_orthogonal(n, rng);
            (0..n * n).map(|at| q[(at / n, at % n)] as f32).collect::<Vec<f32>>()
        };
        let (mut x, mut target) = (orthogonal(&mut rng), orthogonal(&mut rng));
        // The manifold has two parts: the target must lie in the same one.
        let determinant =
            |x: &[f32]| Mat::<f64>::from_fn(n, n, |i, j| x[i * n + j] as f64).determinant();
        if determinant(&x) * determinant(&target) < 0.0 {
            target[..n].iter_mut().for_each(|v| *v = -*v);
        }
        let g: Vec<f32> = target.iter().map(|v| -v).collect();
        let mut momentum = None;
        for _ in 0..100 {
            momentum = Some(cayley_step(&mut x, &g, momentum, (1.5, 0.9)));
        }
        let agreement: f64 = x.iter().zip(&target).map(|(a, b)| (a * b) as f64).sum();
        assert!(agreement / n as f64 > 0.95, "{agreement}");
        orthonormalize(&mut x);
        for i in 0..n {
            for j in 0..n {
                let dot: f32 = (0..n).map(|k| x[i * n + k] * x[j * n + k]).sum();
                let want = if i == j { 1.0 } else { 0.0 };
                approx::assert_abs_diff_eq!(dot, want, epsilon = 1e-5);
            }
        }
    }
}
