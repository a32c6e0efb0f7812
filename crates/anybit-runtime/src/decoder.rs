//! The whole decoder: embedding, layers, final norm, head.

use std::sync::Arc;

use anybit_core::RowSource;
use anybit_io::{Checkpoint, ModelConfig};
use anybit_kernels::{RopeTable, rms_norm};

use crate::layer::Places;
use crate::{DecoderLayer, KvCache, LayerBuffers, Linear, Result, RuntimeError};

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
        let tied = Linear::of(checkpoint.weight("model.embed_tokens.weight")?);
        let embedding = tied.weight.clone();
        let head = match config.tie_embeddings {
            true => tied,
            false => Linear::load(checkpoint, "lm_head", false)?,
        };
        let rope = RopeTable::new(config.rope_frequencies(), positions);
        let norm = checkpoint.vector("model.norm.weight")?;
        Ok(Self { config, embedding, layers, norm, head, rope })
    }

    /// Bytes of weights that one decoded token reads, as kernels hold them: every layer and the
    /// head.
    pub fn bytes_per_token(&self) -> usize {
        self.linears().map(Linear::pass_bytes).sum()
    }

    /// Bytes of all weights in memory: those of linears and the embedding.
    pub fn weight_bytes(&self) -> usize {
        let tied = Arc::ptr_eq(&self.embedding, &self.head.weight);
        let embedding = if tied { 0 } else { self.embedding.stored_bytes() };
        self.linears().map(Linear::held_bytes).sum::<usize>() + embedding
    }

    fn linears(&self) -> impl Iterator<Item = &Linear> {
        let of_layers = self.layers.iter();
        of_layers
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down])
            .chain([&self.head])
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
    /// The cache or the context that the decoder was loaded for is full, or a token is outside the
    /// vocabulary.
    pub fn forward(
        &self,
        tokens: &[u32],
        kv: &mut KvCache,
        buffers: &mut Buffers,
        hidden: &mut Vec<f32>,
    ) -> Result<()> {
        let d = self.config.hidden_size;
        let needed = kv.len + tokens.len();
        let capacity = kv.capacity.min(self.rope.positions());
        if needed > capacity {
            return Err(RuntimeError::ContextFull { needed, capacity });
        }
        hidden.resize(tokens.len() * d, 0.0);
        let mut len = kv.len;
        for (tokens, x) in tokens.chunks(BLOCK_CHUNK).zip(hidden.chunks_mut(BLOCK_CHUNK * d)) {
            self.embed(tokens, x)?;
            for (layer, kv) in self.layers.iter().zip(&mut kv.layers) {
                let mut places = Places::Sequence { kv, start: len };
                self.layer_forward(layer, x, &mut places, buffers);
            }
            len += tokens.len();
            self.finish(x, buffers);
        }
        kv.len = len;
        Ok(())
    }

    /// Runs the next token of each sequence, which stands behind what its cache holds, and leaves
    /// the final hidden states in `hidden`, `[sequences, hidden]`. All share one pass over the
    /// weights.
    ///
    /// # Errors
    /// The context of a sequence is full, or a token is outside the vocabulary.
    ///
    /// # Panics
    /// When there is not one token for each cache.
    pub fn forward_each(
        &self,
        tokens: &[u32],
        caches: &mut [KvCache],
        buffers: &mut Buffers,
        hidden: &mut Vec<f32>,
    ) -> Result<()> {
        assert_eq!(tokens.len(), caches.len(), "a token for each sequence");
        let capacity = |cache: &KvCache| cache.capacity.min(self.rope.positions());
        if let Some(full) = caches.iter().find(|cache| cache.len >= capacity(cache)) {
            let (needed, capacity) = (full.len + 1, capacity(full));
            return Err(RuntimeError::ContextFull { needed, capacity });
        }
        hidden.resize(tokens.len() * self.config.hidden_size, 0.0);
        self.embed(tokens, hidden)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut places = Places::Each { caches, layer: index };
            self.layer_forward(layer, hidden, &mut places, buffers);
        }
        caches.iter_mut().for_each(|cache| cache.len += 1);
        self.finish(hidden, buffers);
        Ok(())
    }

    /// The final norm, in place.
    fn finish(&self, x: &mut [f32], buffers: &mut Buffers) {
        let normed = &mut buffers.normed;
        normed.resize(x.len().max(normed.len()), 0.0);
        rms_norm(x, &self.norm, self.config.rms_norm_eps, &mut normed[..x.len()]);
        x.copy_from_slice(&normed[..x.len()]);
    }

    fn layer_forward(
        &self,
        layer: &DecoderLayer,
        x: &mut [f32],
        places: &mut Places<'_>,
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
        layer.attention_mix_at(normed, places, &self.rope, inner, attended);
        layer.attention_output(attended, inner, x);
        layer.mlp_input(x, normed);
        let activated = &mut mixed[..tokens * self.config.intermediate_size];
        layer.mlp_mix(normed, inner, activated);
        layer.mlp_output(activated, inner, x);
    }

    /// Logits of hidden states: `[tokens, hidden]` to `[tokens, vocab]`.
    pub fn logits(&self, hidden: &[f32], buffers: &mut Buffers, logits: &mut [f32]) {
        self.head.forward(hidden, &mut buffers.layer.input.scratch, logits);
    }
}
