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
//! What flows into linears has gone through its site's online transform; how it reaches them is
//! the matter of [`crate::linear`].

use anybit_core::{BlockSites, Site};
use anybit_io::Checkpoint;
use anybit_kernels::attention::{Query, attention_decode};
use anybit_kernels::{
    AttentionShape, RopeTable, SpinPool, add, attention, fake_rows, rms_norm, swiglu,
    transform_rows,
};

use crate::linear::InputBuffers;
use crate::{KvCache, LayerKv, Linear, Result};

/// Tokens whose queries or keys one task turns.
const ROTATED: usize = 16;

/// Intermediate values of one layer for a chunk of tokens; grown once, reused for every layer.
#[derive(Debug, Clone, Default)]
pub struct LayerBuffers {
    pub(crate) input: InputBuffers,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

/// Where tokens stand, and the caches of their layer.
pub(crate) enum Places<'a> {
    /// Tokens of one sequence, from a position on.
    Sequence { kv: &'a mut LayerKv, start: usize },
    /// The next token of each sequence; layer `layer` of their caches.
    Each { caches: &'a mut [KvCache], layer: usize },
}

impl Places<'_> {
    fn position(&self, token: usize) -> usize {
        match self {
            Self::Sequence { start, .. } => start + token,
            Self::Each { caches, .. } => caches[token].len,
        }
    }

    fn cache(&self, token: usize) -> &LayerKv {
        match self {
            Self::Sequence { kv, .. } => kv,
            Self::Each { caches, layer } => &caches[token].layers[*layer],
        }
    }

    fn cache_mut(&mut self, token: usize) -> &mut LayerKv {
        match self {
            Self::Sequence { kv, .. } => kv,
            Self::Each { caches, layer } => &mut caches[token].layers[*layer],
        }
    }

    /// Makes all caches hold what a block with these sites stores.
    fn prepare(&mut self, sites: &BlockSites) {
        match self {
            Self::Sequence { kv, .. } => kv.prepare(sites),
            Self::Each { caches, layer } => {
                caches.iter_mut().for_each(|cache| cache.layers[*layer].prepare(sites));
            }
        }
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
        self.attention_mix_at(input, &mut Places::Sequence { kv, start }, rope, buffers, out);
    }

    /// [`Self::attention_mix`] of tokens that stand at `places`.
    pub(crate) fn attention_mix_at(
        &self,
        input: &[f32],
        places: &mut Places<'_>,
        rope: &RopeTable,
        buffers: &mut LayerBuffers,
        out: &mut [f32],
    ) {
        let (q_size, kv_size) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let tokens = out.len() / q_size;
        let q = sized(&mut buffers.q, tokens * q_size);
        let k = sized(&mut buffers.k, tokens * kv_size);
        let v = sized(&mut buffers.v, tokens * kv_size);
        let (site, linears) = (self.sites.at(Site::AttnInput), [&self.q, &self.k, &self.v]);
        buffers.input.project(site, linears, input, [&mut *q, &mut *k, &mut *v]);
        let norms = self.qk_norm.as_ref();
        for (x, size, norm) in
            [(&mut *q, q_size, norms.map(|n| &n.0)), (&mut *k, kv_size, norms.map(|n| &n.1))]
        {
            SpinPool::global().chunks(x, ROTATED * size, |at, x| {
                for (t, x) in (at * ROTATED..).zip(x.chunks_exact_mut(size)) {
                    if let Some(norm) = norm {
                        let heads = x.chunks_exact_mut(self.head_dim);
                        heads.for_each(|h| anybit_kernels::norm::rms_norm_row(h, norm, self.eps));
                    }
                    rope.rotate(x, places.position(t));
                }
            });
        }
        self.transform(Site::Query, q);
        self.transform(Site::Key, k);
        places.prepare(&self.sites);
        for (t, (k, v)) in k.chunks_exact(kv_size).zip(v.chunks_exact(kv_size)).enumerate() {
            let position = places.position(t);
            places.cache_mut(t).store(position, k, v);
        }
        self.attend(places, q, out);
        self.transform(Site::AttnOutput, out);
    }

    /// Attention of queries `q` over what the caches hold, their own tokens included.
    fn attend(&self, places: &Places<'_>, q: &[f32], out: &mut [f32]) {
        let shape = |capacity: usize, start: usize| AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            capacity,
            start,
            window: self.window,
        };
        let q_size = self.heads * self.head_dim;
        let tokens = out.len() / q_size;
        if let Places::Sequence { kv, start } = places
            && tokens != 1
        {
            let shape = shape(kv.capacity, *start);
            return attention(q, &kv.keys, &kv.values, shape, out);
        }
        let query = |t: usize| {
            let kv = places.cache(t);
            let q = &q[t * q_size..(t + 1) * q_size];
            let shape = shape(kv.capacity, places.position(t));
            Query { q, keys: &kv.keys, values: &kv.values, shape }
        };
        attention_decode(tokens, query, out);
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
        let site = self.sites.at(Site::MlpInput);
        buffers.input.project(site, [&self.gate, &self.up], input, [&mut *out, &mut *up]);
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
        buffers.input.project(self.sites.at(site), [linear], input, [&mut *out]);
        add(x, out);
    }
}
