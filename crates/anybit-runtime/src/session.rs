//! The state of one sequence, or of several that advance together: caches, buffers, last logits.

use crate::decoder::Buffers;
use crate::{Decoder, KvCache, PlainType, Result, RuntimeError};

/// One sequence being read and continued.
pub struct Session<'a> {
    decoder: &'a Decoder,
    kv: KvCache,
    buffers: Buffers,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> Session<'a> {
    /// A session that can hold `capacity` tokens, keys and values without a quantizer in f32.
    /// Everything that grows with it is allocated here.
    pub fn new(decoder: &'a Decoder, capacity: usize) -> Self {
        Self::with_cache(decoder, capacity, PlainType::F32)
    }

    /// [`Self::new`] with keys and values without a quantizer as `plain`.
    pub fn with_cache(decoder: &'a Decoder, capacity: usize, plain: PlainType) -> Self {
        Self {
            decoder,
            kv: KvCache::new(decoder, capacity, plain),
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
    /// As [`Self::hidden`]; also when a logit is NaN.
    pub fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        self.hidden(tokens)?;
        let d = self.decoder.config.hidden_size;
        let last = self.hidden.len().checked_sub(d).ok_or(RuntimeError::EmptyPrompt)?;
        self.decoder.logits(&self.hidden[last..], &mut self.buffers, &mut self.logits);
        if self.logits.iter().any(|l| l.is_nan()) {
            return Err(RuntimeError::NotFinite { position: self.kv.len - 1 });
        }
        Ok(&mut self.logits)
    }
}

/// Sequences that advance together, one token each per step, in one pass over the weights.
pub struct BatchSession<'a> {
    decoder: &'a Decoder,
    caches: Vec<KvCache>,
    buffers: Buffers,
    hidden: Vec<f32>,
    logits: Vec<f32>,
}

impl<'a> BatchSession<'a> {
    /// `sequences` sequences that can hold `capacity` tokens each, keys and values without a
    /// quantizer as `plain`.
    pub fn new(decoder: &'a Decoder, sequences: usize, capacity: usize, plain: PlainType) -> Self {
        Self {
            decoder,
            caches: (0..sequences).map(|_| KvCache::new(decoder, capacity, plain)).collect(),
            buffers: Buffers::default(),
            hidden: Vec::new(),
            logits: vec![0.0; sequences * decoder.config.vocab_size],
        }
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.caches.len()
    }

    /// Tokens that sequence `index` holds.
    pub fn len(&self, index: usize) -> usize {
        self.caches[index].len
    }

    /// Whether no sequence was begun.
    pub fn is_empty(&self) -> bool {
        self.caches.iter().all(|cache| cache.len == 0)
    }

    /// Forgets all sequences, keeps the memory.
    pub fn clear(&mut self) {
        self.caches.iter_mut().for_each(KvCache::clear);
    }

    /// Reads `tokens` into sequence `index` alone: its prompt. The logits that follow come from
    /// the next [`Self::step`].
    ///
    /// # Errors
    /// The context is full, or a token is outside the vocabulary.
    pub fn read(&mut self, index: usize, tokens: &[u32]) -> Result<()> {
        let cache = &mut self.caches[index];
        self.decoder.forward(tokens, cache, &mut self.buffers, &mut self.hidden)
    }

    /// Reads the next token of each sequence and returns the logits that follow them,
    /// `[sequences, vocab]`: for each sequence the same bits as a [`Session`] of its own, as long as
    /// kernels take tokens one by one (packed weights up to 32 sequences or with AVX-512 any number,
    /// dense ones up to 4 or 24); GEMM adds in another order.
    ///
    /// # Errors
    /// The context of a sequence is full, a token is outside the vocabulary, logits are NaN.
    ///
    /// # Panics
    /// When there is not one token for each sequence.
    pub fn step(&mut self, tokens: &[u32]) -> Result<&mut [f32]> {
        let Self { decoder, caches, buffers, hidden, logits } = self;
        decoder.forward_each(tokens, caches, buffers, hidden)?;
        decoder.logits(hidden, buffers, logits);
        match logits.iter().position(|l| l.is_nan()) {
            None => Ok(logits),
            Some(at) => {
                let sequence = at / decoder.config.vocab_size;
                Err(RuntimeError::NotFinite { position: caches[sequence].len - 1 })
            }
        }
    }
}
