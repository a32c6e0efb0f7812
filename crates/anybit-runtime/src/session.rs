//! The state of one sequence: its cache, its buffers, its last logits.

use crate::decoder::Buffers;
use crate::{Decoder, KvCache, Result, RuntimeError};

/// One sequence being read and continued.
pub struct Session<'a> {
    decoder: &'a Decoder,
    kv: KvCache,
    buffers: Buffers,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> Session<'a> {
    /// A session that can hold `capacity` tokens. Everything that grows with it is allocated here.
    pub fn new(decoder: &'a Decoder, capacity: usize) -> Self {
        Self {
            decoder,
            kv: KvCache::new(decoder, capacity),
            buffers: Buffers::default(),
            hidden: Vec::new(),
            logits: vec![0.0; decoder.config.vocab_size],
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.kv.len
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.kv.len == 0
    }

    /// Tokens that fit.
    pub fn capacity(&self) -> usize {
        self.kv.capacity
    }

    /// Forgets the sequence, keeps the memory.
    pub fn clear(&mut self) {
        self.kv.clear();
    }

    /// Reads `tokens` and returns the final hidden states, `[tokens, hidden]`.
    ///
    /// # Errors
    /// The context is full, or a token is outside the vocabulary.
    pub fn hidden(&mut self, tokens: &[u32]) -> Result<&[f32]> {
        self.decoder.forward(tokens, &mut self.kv, &mut self.buffers, &mut self.hidden)?;
        Ok(&self.hidden)
    }

    /// Reads `tokens` and returns the logits that follow the last of them, `[vocab]`.
    ///
    /// # Errors
    /// As [`Self::hidden`]; also when the logits are not finite.
    pub fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        self.hidden(tokens)?;
        let d = self.decoder.config.hidden_size;
        let last = self.hidden.len().checked_sub(d).ok_or(RuntimeError::EmptyPrompt)?;
        self.decoder.logits(&self.hidden[last..], &mut self.logits);
        if self.logits.iter().any(|l| l.is_nan()) {
            return Err(RuntimeError::NotFinite { position: self.kv.len - 1 });
        }
        Ok(&mut self.logits)
    }
}
