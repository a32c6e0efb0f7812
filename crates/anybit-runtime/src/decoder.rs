//! The whole decoder: embedding, layers, final norm, head.

use std::sync::Arc;

use anybit_core::RowSource;
use anybit_io::{Checkpoint, ModelConfig};
use anybit_kernels::{RopeTable, rms_norm};

use crate::{DecoderLayer, KvCache, LayerBuffers, LayerKv, Linear, Result, RuntimeError};

/// Tokens that pass through the layers together: enough for GEMM, few enough for the caches.
pub const BLOCK_CHUNK: usize = 512;

/// A decoder ready to run.
pub struct Decoder {
    /// What it is.
    pub config: ModelConfig,
    /// Embedding, `[vocab, hidden]`.
    pub embedding: Arc<dyn RowSource>,
    /// The layers.
    pub layers: Vec<DecoderLayer>,
    /// Final norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// Head, `[vocab, hidden]`; the embedding itself when tied.
    pub head: Linear,
    rope: RopeTable,
}

/// Buffers of a forward pass; grown once.
#[derive(Default)]
pub struct Buffers {
    normed: Vec<f32>,
    mixed: Vec<f32>,
    layer: LayerBuffers,
}

impl Decoder {
    /// Loads every weight that has to be in memory (packed codes, norms, biases) and maps the
    /// rest. `positions` is the longest context that will be used.
    ///
    /// # Errors
    /// What the checkpoint reports.
    pub fn load(checkpoint: &Checkpoint, positions: usize) -> Result<Self> {
        let config = checkpoint.config.clone();
        let layers = (0..config.num_layers)
            .map(|i| DecoderLayer::load(checkpoint, i))
            .collect::<Result<_>>()?;
        let embedding: Arc<dyn RowSource> =
            Arc::new(checkpoint.weight("model.embed_tokens.weight")?);
        let head = match config.tie_embeddings {
            true => Linear::new(embedding.clone(), None),
            false => Linear::load(checkpoint, "lm_head", false)?,
        };
        let rope = RopeTable::new(config.rope_frequencies(), positions);
        let norm = checkpoint.vector("model.norm.weight")?;
        Ok(Self { config, embedding, layers, norm, head, rope })
    }

    /// Bytes of weights that one decoded token reads: every layer and the head, and one row of
    /// the embedding.
    pub fn bytes_per_token(&self) -> usize {
        let linears = |l: &DecoderLayer| {
            [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]
                .iter()
                .map(|l| l.weight.stored_bytes())
                .sum::<usize>()
        };
        self.layers.iter().map(linears).sum::<usize>() + self.head.weight.stored_bytes()
    }

    /// Embeds `tokens` into `x`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// A token outside the vocabulary.
    pub fn embed(&self, tokens: &[u32], x: &mut [f32]) -> Result<()> {
        let (vocab, hidden) = self.embedding.shape();
        for (&token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
            let row = token as usize;
            if row >= vocab {
                return Err(RuntimeError::Token { token, vocab });
            }
            self.embedding.read_rows(row..row + 1, x);
        }
        Ok(())
    }

    /// Runs `tokens` after what `kv` holds and leaves their final hidden states (normalized, ready
    /// for the head) in `hidden`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// The context is full, or a token is outside the vocabulary.
    pub fn forward(
        &self,
        tokens: &[u32],
        kv: &mut KvCache,
        buffers: &mut Buffers,
        hidden: &mut Vec<f32>,
    ) -> Result<()> {
        let d = self.config.hidden_size;
        let needed = kv.len + tokens.len();
        if needed > kv.capacity {
            return Err(RuntimeError::ContextFull { needed, capacity: kv.capacity });
        }
        hidden.resize(tokens.len() * d, 0.0);
        for (tokens, x) in tokens.chunks(BLOCK_CHUNK).zip(hidden.chunks_mut(BLOCK_CHUNK * d)) {
            self.embed(tokens, x)?;
            for (layer, kv_layer) in self.layers.iter().zip(&mut kv.layers) {
                self.layer_forward(layer, x, kv.len, kv_layer, buffers);
            }
            kv.len += tokens.len();
            let normed = &mut buffers.normed;
            normed.resize(x.len().max(normed.len()), 0.0);
            rms_norm(x, &self.norm, self.config.rms_norm_eps, &mut normed[..x.len()]);
            x.copy_from_slice(&normed[..x.len()]);
        }
        Ok(())
    }

    fn layer_forward(
        &self,
        layer: &DecoderLayer,
        x: &mut [f32],
        start: usize,
        kv: &mut LayerKv,
        buffers: &mut Buffers,
    ) {
        let tokens = x.len() / self.config.hidden_size;
        let Buffers { normed, mixed, layer: inner } = buffers;
        let widest = self.config.q_size().max(self.config.intermediate_size);
        normed.resize(normed.len().max(x.len()), 0.0);
        mixed.resize(mixed.len().max(tokens * widest), 0.0);
        let normed = &mut normed[..x.len()];
        layer.attention_input(x, normed);
        let attended = &mut mixed[..tokens * self.config.q_size()];
        layer.attention_mix(normed, start, &self.rope, kv, inner, attended);
        layer.attention_output(attended, inner, x);
        layer.mlp_input(x, normed);
        let activated = &mut mixed[..tokens * self.config.intermediate_size];
        layer.mlp_mix(normed, inner, activated);
        layer.mlp_output(activated, inner, x);
    }

    /// Logits of hidden states: `[tokens, hidden]` to `[tokens, vocab]`.
    pub fn logits(&self, hidden: &[f32], logits: &mut [f32]) {
        self.head.forward(hidden, logits);
    }
}
