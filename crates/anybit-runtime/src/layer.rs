//! One decoder layer, cut at its sites so that calibration can observe and quantize between them:
//!
//! ```text
//! a = attention_input(x)      AttnInput   → q, k, v
//! m = attention_mix(a)        AttnOutput  → o
//! x += attention_output(m)
//! b = mlp_input(x)            MlpInput    → gate, up
//! n = mlp_mix(b)              DownInput   → down
//! x += mlp_output(n)
//! ```
//!
//! What flows into linears has gone through its site's online transform; the quantizer stands
//! directly before the linears, so a shared input is quantized once. Packed affine weights then
//! multiply in integers; all others see the values that the codes stand for.

use std::sync::Arc;

use anybit_core::{BlockSites, RowSource, Site, SiteState};
use anybit_io::{Checkpoint, Weight};
use anybit_kernels::{
    AttentionShape, IntegerWeight, QuantizedRows, RopeTable, attention, fake_rows, linear,
    quantize_rows, rms_norm, swiglu, transform_rows,
};

use crate::{LayerKv, Result};

/// `y = x Wᵀ + b` with a weight in any storage.
#[derive(Clone)]
pub struct Linear {
    /// The weight, `[out, in]`.
    pub weight: Arc<dyn RowSource>,
    /// The bias, `[out]`.
    pub bias: Option<Vec<f32>>,
    /// The weight for products with quantized inputs, where it is packed on affine grids.
    integer: Option<Arc<IntegerWeight>>,
}

impl Linear {
    /// Loads `NAME.weight` and, when the architecture has one, `NAME.bias`.
    ///
    /// # Errors
    /// What the checkpoint reports.
    pub fn load(checkpoint: &Checkpoint, name: &str, bias: bool) -> Result<Self> {
        Self::load_at(checkpoint, name, bias, &SiteState::default())
    }

    /// [`Self::load`] behind a site: with a quantizer there, packed weights multiply in integers.
    fn load_at(checkpoint: &Checkpoint, name: &str, bias: bool, site: &SiteState) -> Result<Self> {
        let weight = checkpoint.weight(&format!("{name}.weight"))?;
        let integer = match (&weight, &site.quantizer) {
            (Weight::Quantized(matrix), Some(quantizer)) => {
                IntegerWeight::new(matrix, &quantizer.widths()).map(Arc::new)
            }
            _ => None,
        };
        let bias = bias.then(|| checkpoint.vector(&format!("{name}.bias"))).transpose()?;
        Ok(Self { weight: Arc::new(weight), bias, integer })
    }

    /// A linear of these parts.
    pub fn new(weight: Arc<dyn RowSource>, bias: Option<Vec<f32>>) -> Self {
        Self { weight, bias, integer: None }
    }

    /// Puts another weight of the same shape in place.
    pub fn set_weight(&mut self, weight: Arc<dyn RowSource>) {
        self.weight = weight;
        self.integer = None;
    }

    /// Whether products with quantized inputs are taken in integers.
    pub fn is_integer(&self) -> bool {
        self.integer.is_some()
    }

    /// Takes products with the values that codes stand for, in f32, from here on.
    pub fn without_integers(&mut self) {
        self.integer = None;
    }

    fn forward_site(&self, input: &SiteInput<'_>, y: &mut [f32]) {
        match (input, &self.integer) {
            (SiteInput::Codes(codes), Some(weight)) => {
                weight.forward(codes, self.bias.as_deref(), y);
            }
            (SiteInput::Values(x), _) => self.forward(x, y),
            (SiteInput::Codes(_), None) => unreachable!("codes are made for integer weights alone"),
        }
    }

    /// Applies it to `x`, `[tokens, in]`.
    pub fn forward(&self, x: &[f32], y: &mut [f32]) {
        linear(x, &*self.weight, self.bias.as_deref(), y);
    }

    /// Rows of the weight.
    pub fn out_size(&self) -> usize {
        self.weight.shape().0
    }
}

/// Intermediate values of one layer for a chunk of tokens; grown once, reused for every layer.
#[derive(Debug, Clone, Default)]
pub struct LayerBuffers {
    input: InputBuffers,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

/// A site's input as its linears take it.
#[derive(Debug, Clone, Default)]
struct InputBuffers {
    values: Vec<f32>,
    codes: QuantizedRows,
}

/// What linears multiply with.
enum SiteInput<'a> {
    Values(&'a [f32]),
    Codes(&'a QuantizedRows),
}

impl InputBuffers {
    /// Quantizes `x` once for all `linears` of a site.
    fn quantize<'a>(
        &'a mut self,
        site: &SiteState,
        linears: &[&Linear],
        x: &'a [f32],
    ) -> SiteInput<'a> {
        let Some(quantizer) = &site.quantizer else { return SiteInput::Values(x) };
        if linears.iter().all(|l| l.integer.is_some()) {
            quantize_rows(quantizer, x, &mut self.codes);
            return SiteInput::Codes(&self.codes);
        }
        let values = sized(&mut self.values, x.len());
        values.copy_from_slice(x);
        fake_rows(quantizer, values);
        SiteInput::Values(values)
    }
}

fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// The weights of one layer.
#[derive(Clone)]
pub struct DecoderLayer {
    /// Norm before attention, `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// Queries.
    pub q: Linear,
    /// Keys.
    pub k: Linear,
    /// Values.
    pub v: Linear,
    /// Attention output.
    pub o: Linear,
    /// Norms of each query and key head, `[head_dim]`.
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// Norm before the MLP, `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// MLP gate.
    pub gate: Linear,
    /// MLP up-projection.
    pub up: Linear,
    /// MLP down-projection.
    pub down: Linear,
    /// Online transforms and quantizers.
    pub sites: BlockSites,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    eps: f32,
    window: Option<usize>,
}

impl DecoderLayer {
    /// Loads layer `index`.
    ///
    /// # Errors
    /// What the checkpoint reports.
    pub fn load(checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        let config = &checkpoint.config;
        let p = format!("model.layers.{index}");
        let sites = checkpoint.block_sites(index)?;
        let linear = |site: Site, name: &str| {
            let full = format!("{p}.{name}");
            Linear::load_at(checkpoint, &full, config.has_bias(name), sites.at(site))
        };
        let norm = |name: &str| checkpoint.vector(&format!("{p}.{name}.weight"));
        let qk_norm = match config.qk_norm {
            true => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
            false => None,
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            q: linear(Site::AttnInput, "self_attn.q_proj")?,
            k: linear(Site::AttnInput, "self_attn.k_proj")?,
            v: linear(Site::AttnInput, "self_attn.v_proj")?,
            o: linear(Site::AttnOutput, "self_attn.o_proj")?,
            qk_norm,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: linear(Site::MlpInput, "mlp.gate_proj")?,
            up: linear(Site::MlpInput, "mlp.up_proj")?,
            down: linear(Site::DownInput, "mlp.down_proj")?,
            sites,
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            window: config.window(index),
        })
    }

    /// A linear by its name below `model.layers.N.`.
    pub fn linear_mut(&mut self, name: &str) -> Option<&mut Linear> {
        match name {
            "self_attn.q_proj" => Some(&mut self.q),
            "self_attn.k_proj" => Some(&mut self.k),
            "self_attn.v_proj" => Some(&mut self.v),
            "self_attn.o_proj" => Some(&mut self.o),
            "mlp.gate_proj" => Some(&mut self.gate),
            "mlp.up_proj" => Some(&mut self.up),
            "mlp.down_proj" => Some(&mut self.down),
            _ => None,
        }
    }

    /// Applies the online transform of `site` to rows of `x`.
    fn transform(&self, site: Site, x: &mut [f32]) {
        if let Some(transform) = self.sites.transform(site) {
            transform_rows(transform, x);
        }
    }

    /// Replaces the input of `site`'s linears by the values that they will see.
    pub fn fake_quantize(&self, site: Site, x: &mut [f32]) {
        if let Some(quantizer) = self.sites.quantizer(site) {
            fake_rows(quantizer, x);
        }
    }

    /// Normalizes the residual stream `x` for q, k and v, and transforms it.
    pub fn attention_input(&self, x: &[f32], out: &mut [f32]) {
        rms_norm(x, &self.attention_norm, self.eps, out);
        self.transform(Site::AttnInput, out);
    }

    /// Projects, rotates, stores keys and values from position `start` on, and attends:
    /// `[tokens, hidden]` to `[tokens, heads · head_dim]`.
    pub fn attention_mix(
        &self,
        input: &[f32],
        start: usize,
        rope: &RopeTable,
        kv: &mut LayerKv,
        buffers: &mut LayerBuffers,
        out: &mut [f32],
    ) {
        let (q_size, kv_size) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let tokens = out.len() / q_size;
        let q = sized(&mut buffers.q, tokens * q_size);
        let k = sized(&mut buffers.k, tokens * kv_size);
        let v = sized(&mut buffers.v, tokens * kv_size);
        let linears = [&self.q, &self.k, &self.v];
        let input = buffers.input.quantize(self.sites.at(Site::AttnInput), &linears, input);
        self.q.forward_site(&input, q);
        self.k.forward_site(&input, k);
        self.v.forward_site(&input, v);
        let heads = q.chunks_exact_mut(q_size).zip(k.chunks_exact_mut(kv_size));
        for (t, (q, k)) in heads.enumerate() {
            if let Some((q_norm, k_norm)) = &self.qk_norm {
                let heads = q.chunks_exact_mut(self.head_dim);
                heads.for_each(|h| anybit_kernels::norm::rms_norm_row(h, q_norm, self.eps));
                let heads = k.chunks_exact_mut(self.head_dim);
                heads.for_each(|h| anybit_kernels::norm::rms_norm_row(h, k_norm, self.eps));
            }
            rope.rotate(q, start + t);
            rope.rotate(k, start + t);
        }
        self.transform(Site::Query, q);
        self.transform(Site::Key, k);
        kv.prepare(&self.sites);
        for (t, (k, v)) in k.chunks_exact(kv_size).zip(v.chunks_exact(kv_size)).enumerate() {
            kv.store(start + t, k, v);
        }
        let shape = AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            capacity: kv.capacity,
            start,
            window: self.window,
        };
        attention(q, &kv.keys, &kv.values, shape, out);
        self.transform(Site::AttnOutput, out);
    }

    /// Adds the attention output to the residual stream.
    pub fn attention_output(&self, mixed: &[f32], buffers: &mut LayerBuffers, x: &mut [f32]) {
        self.add_linear(Site::AttnOutput, &self.o, mixed, buffers, x);
    }

    /// Normalizes the residual stream `x` for gate and up, and transforms it.
    pub fn mlp_input(&self, x: &[f32], out: &mut [f32]) {
        rms_norm(x, &self.mlp_norm, self.eps, out);
        self.transform(Site::MlpInput, out);
    }

    /// `silu(gate(b)) · up(b)`, transformed: `[tokens, hidden]` to `[tokens, intermediate]`.
    pub fn mlp_mix(&self, input: &[f32], buffers: &mut LayerBuffers, out: &mut [f32]) {
        let up = sized(&mut buffers.up, out.len());
        let linears = [&self.gate, &self.up];
        let input = buffers.input.quantize(self.sites.at(Site::MlpInput), &linears, input);
        self.gate.forward_site(&input, out);
        self.up.forward_site(&input, up);
        swiglu(out, up);
        self.transform(Site::DownInput, out);
    }

    /// Adds the MLP output to the residual stream.
    pub fn mlp_output(&self, mixed: &[f32], buffers: &mut LayerBuffers, x: &mut [f32]) {
        self.add_linear(Site::DownInput, &self.down, mixed, buffers, x);
    }

    fn add_linear(
        &self,
        site: Site,
        linear: &Linear,
        input: &[f32],
        buffers: &mut LayerBuffers,
        x: &mut [f32],
    ) {
        let out = sized(&mut buffers.out, x.len());
        linear.forward_site(&buffers.input.quantize(self.sites.at(site), &[linear], input), out);
        x.iter_mut().zip(out).for_each(|(x, o)| *x += *o);
    }
}
