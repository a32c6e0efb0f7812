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

use std::sync::Arc;

use anybit_core::RowSource;
use anybit_io::Checkpoint;
use anybit_kernels::{AttentionShape, RopeTable, attention, linear, rms_norm, swiglu};

use crate::{LayerKv, Result};

/// `y = x Wᵀ + b` with a weight in any storage.
#[derive(Clone)]
pub struct Linear {
    /// The weight, `[out, in]`.
    pub weight: Arc<dyn RowSource>,
    /// The bias, `[out]`.
    pub bias: Option<Vec<f32>>,
}

impl Linear {
    /// Loads `NAME.weight` and, when the architecture has one, `NAME.bias`.
    ///
    /// # Errors
    /// What the checkpoint reports.
    pub fn load(checkpoint: &Checkpoint, name: &str, bias: bool) -> Result<Self> {
        let weight = Arc::new(checkpoint.weight(&format!("{name}.weight"))?);
        let bias = bias.then(|| checkpoint.vector(&format!("{name}.bias"))).transpose()?;
        Ok(Self { weight, bias })
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
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
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
        let linear =
            |name: &str| Linear::load(checkpoint, &format!("{p}.{name}"), config.has_bias(name));
        let norm = |name: &str| checkpoint.vector(&format!("{p}.{name}.weight"));
        let qk_norm = match config.qk_norm {
            true => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
            false => None,
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            q: linear("self_attn.q_proj")?,
            k: linear("self_attn.k_proj")?,
            v: linear("self_attn.v_proj")?,
            o: linear("self_attn.o_proj")?,
            qk_norm,
            mlp_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
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

    /// Normalizes the residual stream `x` for q, k and v.
    pub fn attention_input(&self, x: &[f32], out: &mut [f32]) {
        rms_norm(x, &self.attention_norm, self.eps, out);
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
        self.q.forward(input, q);
        self.k.forward(input, k);
        self.v.forward(input, v);
        for (t, ((q, k), v)) in q
            .chunks_exact_mut(q_size)
            .zip(k.chunks_exact_mut(kv_size))
            .zip(v.chunks_exact(kv_size))
            .enumerate()
        {
            if let Some((q_norm, k_norm)) = &self.qk_norm {
                let heads = q.chunks_exact_mut(self.head_dim);
                heads.for_each(|h| anybit_kernels::norm::rms_norm_row(h, q_norm, self.eps));
                let heads = k.chunks_exact_mut(self.head_dim);
                heads.for_each(|h| anybit_kernels::norm::rms_norm_row(h, k_norm, self.eps));
            }
            rope.rotate(q, start + t);
            rope.rotate(k, start + t);
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
    }

    /// Adds the attention output to the residual stream.
    pub fn attention_output(&self, mixed: &[f32], buffers: &mut LayerBuffers, x: &mut [f32]) {
        add_linear(&self.o, mixed, buffers, x);
    }

    /// Normalizes the residual stream `x` for gate and up.
    pub fn mlp_input(&self, x: &[f32], out: &mut [f32]) {
        rms_norm(x, &self.mlp_norm, self.eps, out);
    }

    /// `silu(gate(b)) · up(b)`: `[tokens, hidden]` to `[tokens, intermediate]`.
    pub fn mlp_mix(&self, input: &[f32], buffers: &mut LayerBuffers, out: &mut [f32]) {
        let up = sized(&mut buffers.up, out.len());
        self.gate.forward(input, out);
        self.up.forward(input, up);
        swiglu(out, up);
    }

    /// Adds the MLP output to the residual stream.
    pub fn mlp_output(&self, mixed: &[f32], buffers: &mut LayerBuffers, x: &mut [f32]) {
        add_linear(&self.down, mixed, buffers, x);
    }
}

fn add_linear(linear: &Linear, input: &[f32], buffers: &mut LayerBuffers, x: &mut [f32]) {
    let out = sized(&mut buffers.out, x.len());
    linear.forward(input, out);
    x.iter_mut().zip(out).for_each(|(x, o)| *x += *o);
}
