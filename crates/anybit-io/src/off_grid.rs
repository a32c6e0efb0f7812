//! Takes a model off the grid that it was quantized on, without changing what it computes.
//!
//! A checkpoint that was decoded from, say, Q4_1 has at most 16 values per 32 weights, and a
//! quantizer that hits the same grid reports an error of zero, which means nothing. Multiplying
//! channels by lognormal factors `e^(σn)` that cancel exactly gives an equivalent model without
//! that structure:
//!
//! | factor | multiplies | divides |
//! |---|---|---|
//! | `a`, per hidden channel | input norm | columns of q, k, v |
//! | `b`, per hidden channel | post-attention norm | columns of gate, up |
//! | `u`, per MLP channel | rows of up | columns of down |
//! | `v`, per value channel | rows of v | columns of o |
//! | `r`, per rotary pair | rows of k (or the norm of k) | rows of q (or the norm of q) |

use anybit_core::rng::SplitMix64;

use crate::ModelConfig;

/// The factors of one model: a function of σ and seed alone.
#[derive(Debug, Clone)]
pub struct OffGrid<'a> {
    config: &'a ModelConfig,
    sigma: f64,
    seed: u64,
}

/// Kinds of factors, each with its own random stream per layer.
#[derive(Clone, Copy)]
enum Kind {
    InputNorm = 1,
    MlpNorm,
    Up,
    Value,
    Rotary,
}

/// Factors of the rows and columns of one tensor.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Factors {
    /// Factor of each row (of each element, for a vector).
    pub rows: Option<Vec<f32>>,
    /// Factor of each column.
    pub cols: Option<Vec<f32>>,
}

impl Factors {
    /// Applies the factors to `values`, rows from `first` on of a tensor with `cols` columns.
    pub fn apply(&self, first: usize, cols: usize, values: &mut [f32]) {
        for (i, row) in values.chunks_mut(cols.max(1)).enumerate() {
            if let Some(rows) = &self.rows {
                row.iter_mut().for_each(|v| *v *= rows[first + i]);
            }
            if let Some(cols) = &self.cols {
                row.iter_mut().zip(cols).for_each(|(v, c)| *v *= c);
            }
        }
    }
}

impl<'a> OffGrid<'a> {
    /// Factors of spread `sigma` drawn from `seed`.
    pub fn new(config: &'a ModelConfig, sigma: f64, seed: u64) -> Self {
        Self { config, sigma, seed }
    }

    fn draw(&self, layer: usize, kind: Kind, count: usize) -> Vec<f64> {
        let stream = SplitMix64::new(self.seed).next_u64() ^ ((layer as u64) << 8 | kind as u64);
        let mut rng = SplitMix64::new(stream);
        (0..count).map(|_| (self.sigma * rng.normal()).exp()).collect()
    }

    /// The factors of a tensor, by its Hugging Face name.
    pub fn factors(&self, name: &str) -> Factors {
        let Some((layer, rest)) = name
            .strip_prefix("model.layers.")
            .and_then(|n| n.split_once('.'))
            .and_then(|(layer, rest)| Some((layer.parse::<usize>().ok()?, rest)))
        else {
            return Factors::default();
        };
        let c = self.config;
        let (d, f) = (c.hidden_size, c.intermediate_size);
        let times = |v: Vec<f64>| Some(v.into_iter().map(|v| v as f32).collect::<Vec<f32>>());
        let over = |v: Vec<f64>| Some(v.into_iter().map(|v| (1.0 / v) as f32).collect());
        let input = || over(self.draw(layer, Kind::InputNorm, d));
        let mlp = || over(self.draw(layer, Kind::MlpNorm, d));
        let (rows, cols) = match rest {
            "input_layernorm.weight" => (times(self.draw(layer, Kind::InputNorm, d)), None),
            "post_attention_layernorm.weight" => (times(self.draw(layer, Kind::MlpNorm, d)), None),
            "self_attn.q_proj.weight" => (self.query_rows(layer), input()),
            "self_attn.q_proj.bias" => (self.query_rows(layer), None),
            "self_attn.k_proj.weight" => (self.key_rows(layer), input()),
            "self_attn.k_proj.bias" => (self.key_rows(layer), None),
            "self_attn.q_norm.weight" => (over(self.rotary(layer, 1, 1)), None),
            "self_attn.k_norm.weight" => (times(self.rotary(layer, 1, 1)), None),
            "self_attn.v_proj.weight" => {
                (times(self.draw(layer, Kind::Value, c.kv_size())), input())
            }
            "self_attn.v_proj.bias" => (times(self.draw(layer, Kind::Value, c.kv_size())), None),
            "self_attn.o_proj.weight" => (None, over(self.value_columns(layer))),
            "mlp.gate_proj.weight" => (None, mlp()),
            "mlp.up_proj.weight" => (times(self.draw(layer, Kind::Up, f)), mlp()),
            "mlp.up_proj.bias" => (times(self.draw(layer, Kind::Up, f)), None),
            "mlp.down_proj.weight" => (None, over(self.draw(layer, Kind::Up, f))),
            _ => (None, None),
        };
        Factors { rows, cols }
    }

    /// Norms on heads make q and k blind to the scale of their rows: the norm weights take it.
    fn query_rows(&self, layer: usize) -> Option<Vec<f32>> {
        let c = self.config;
        let factors = || self.rotary(layer, c.num_kv_heads, c.num_heads / c.num_kv_heads);
        (!c.qk_norm).then(|| factors().into_iter().map(|v| (1.0 / v) as f32).collect())
    }

    fn key_rows(&self, layer: usize) -> Option<Vec<f32>> {
        let c = self.config;
        let factors = || self.rotary(layer, c.num_kv_heads, 1);
        (!c.qk_norm).then(|| factors().into_iter().map(|v| v as f32).collect())
    }

    /// One factor per rotary pair and key head, repeated for both halves and for the `repeat`
    /// query heads that share the key head.
    fn rotary(&self, layer: usize, heads: usize, repeat: usize) -> Vec<f64> {
        let half = self.config.head_dim / 2;
        let pairs = self.draw(layer, Kind::Rotary, heads * half);
        pairs.chunks(half).flat_map(|p| [p, p].concat().repeat(repeat)).collect()
    }

    fn value_columns(&self, layer: usize) -> Vec<f64> {
        let c = self.config;
        let values = self.draw(layer, Kind::Value, c.kv_size());
        values.chunks(c.head_dim).flat_map(|v| v.repeat(c.num_heads / c.num_kv_heads)).collect()
    }
}
