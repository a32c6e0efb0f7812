//! Hidden states on their way through the decoder: one stream per set of token sequences.

use std::io::{Read, Write};
use std::path::Path;

use anybit_core::{BlockSites, RowSource};
use anybit_io::{IoError, ModelConfig};
use anybit_kernels::RopeTable;
use anybit_runtime::{DecoderLayer, LayerBuffers, LayerKv, PlainType};

use crate::Result;

/// Inputs of the next block for some sequences of equal length, `[sequences, seqlen, hidden]`.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stream {
    /// Tokens of a sequence.
    pub seqlen: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// The states.
    pub data: Vec<f32>,
}

impl Stream {
    /// Embeds `sequences`.
    pub fn embed(sequences: &[Vec<u32>], embedding: &dyn RowSource) -> Self {
        let (_, hidden) = embedding.shape();
        let seqlen = sequences.first().map_or(1, Vec::len);
        let mut data = vec![0.0; sequences.len() * seqlen * hidden];
        let tokens = sequences.iter().flatten();
        for (&token, out) in tokens.zip(data.chunks_exact_mut(hidden)) {
            embedding.read_rows(token as usize..token as usize + 1, out);
        }
        Self { seqlen, hidden, data }
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The sequences, each `[seqlen, hidden]`.
    pub fn sequences(&self) -> impl Iterator<Item = &[f32]> {
        self.data.chunks_exact((self.seqlen * self.hidden).max(1))
    }

    /// The sequences, mutable.
    pub fn sequences_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.data.chunks_exact_mut((self.seqlen * self.hidden).max(1))
    }

    /// `‖self − other‖² / ‖other‖²`.
    pub fn relative_error(&self, other: &Self) -> f64 {
        let (mut error, mut norm) = (0f64, 0f64);
        for (a, b) in self.data.iter().zip(&other.data) {
            error += (*a as f64 - *b as f64).powi(2);
            norm += (*b as f64).powi(2);
        }
        error / norm.max(f64::MIN_POSITIVE)
    }

    /// Appends the states to `out`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&self, out: &mut dyn Write, path: &Path) -> Result<()> {
        for chunk in self.data.chunks(1 << 18) {
            let bytes: &[u8] = bytemuck::cast_slice(chunk);
            out.write_all(bytes).map_err(|e| IoError::file("write", path, e))?;
        }
        Ok(())
    }

    /// Reads states of the same shape from `input`.
    ///
    /// # Errors
    /// Fewer bytes than needed.
    pub fn read(&mut self, input: &mut dyn Read, path: &Path) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.data);
        input.read_exact(bytes).map_err(|e| IoError::file("read", path, e))?;
        Ok(())
    }
}

/// What moves streams through layers: rotary table, one layer's cache, buffers.
pub struct Mover {
    /// The rotary table.
    pub rope: RopeTable,
    /// Keys and values of the sequence at hand.
    pub kv: LayerKv,
    /// Buffers of the layer.
    pub buffers: LayerBuffers,
    /// A norm's output, `[seqlen, hidden]`.
    pub normed: Vec<f32>,
    /// An activation, `[seqlen, widest]`.
    pub mixed: Vec<f32>,
    config: ModelConfig,
}

impl Mover {
    /// A mover for sequences of up to `seqlen` tokens.
    pub fn new(config: &ModelConfig, seqlen: usize) -> Self {
        Self {
            rope: RopeTable::new(config.rope_frequencies(), seqlen),
            kv: LayerKv::new(config, seqlen, &BlockSites::default(), PlainType::F32),
            buffers: LayerBuffers::default(),
            normed: vec![0.0; seqlen * config.hidden_size],
            mixed: vec![0.0; seqlen * config.q_size().max(config.intermediate_size)],
            config: config.clone(),
        }
    }

    /// Moves all of `stream` through `layer`.
    pub fn advance(&mut self, layer: &DecoderLayer, stream: &mut Stream) {
        let (q, f) = (self.config.q_size(), self.config.intermediate_size);
        let seqlen = stream.seqlen;
        for x in stream.sequences_mut() {
            let Self { rope, kv, buffers, normed, mixed, .. } = self;
            let normed = &mut normed[..x.len()];
            layer.attention_input(x, normed);
            let attended = &mut mixed[..seqlen * q];
            layer.attention_mix(normed, 0, rope, kv, buffers, attended);
            layer.attention_output(attended, buffers, x);
            layer.mlp_input(x, normed);
            let activated = &mut mixed[..seqlen * f];
            layer.mlp_mix(normed, buffers, activated);
            layer.mlp_output(activated, buffers, x);
        }
    }
}
