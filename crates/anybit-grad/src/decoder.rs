//! The decoder, differentiable: the same definition as `anybit-runtime`'s, on a tape.
//!
//! ```text
//! a = rms_norm(x)            q, k, v = linear(a)      q, k = rope(norm(q), norm(k))
//! x = x + o(attention(q, k, v))
//! b = rms_norm(x)            x = x + down(swiglu(gate(b), up(b)))
//! ```
//!
//! At every [`Site`] a function of the caller's may change what flows there; [`block_forward`]
//! applies the model's own online transforms.
//!
//! [`TrainBlock`] holds one layer's parameters by name, [`block_forward`] records one layer,
//! [`TrainDecoder`] is the whole. Parameters become leaves of a tape as [`BlockVars`]; a method
//! that trains quantized weights replaces handles there before the forward pass.

use std::collections::BTreeMap;
use std::sync::Arc;

use anybit_core::{BlockSites, Matrix, Site};
use anybit_io::{Checkpoint, IoError, ModelConfig, Weight};

use crate::{AttentionSpec, GradError, IGNORE, Result, Rope, Tape, Tensor, Var};

/// Sizes of one layer, and what all layers share.
#[derive(Debug, Clone)]
pub struct BlockShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// ε of RMSNorm.
    pub eps: f32,
    /// Keys that a query sees; `None` for all.
    pub window: Option<usize>,
    /// Rotary tables.
    pub rope: Arc<Rope>,
}

impl BlockShape {
    /// The shape of layer `layer`.
    pub fn new(config: &ModelConfig, layer: usize, rope: &Arc<Rope>) -> Self {
        Self {
            heads: config.num_heads,
            kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            eps: config.rms_norm_eps,
            window: config.window(layer),
            rope: rope.clone(),
        }
    }

    fn attention(&self, seqlen: usize) -> AttentionSpec {
        let Self { heads, kv_heads, head_dim, window, .. } = *self;
        AttentionSpec { heads, kv_heads, head_dim, seqlen, window }
    }
}

/// The parameters of one layer, decoded to f32.
#[derive(Debug, Clone)]
pub struct TrainBlock {
    /// Its index.
    pub layer: usize,
    /// Parameters by their names below `model.layers.N.`, such as `self_attn.q_proj.weight`.
    pub params: BTreeMap<String, Tensor>,
    /// Its online transforms; quantizers that stand there are not differentiated.
    pub sites: BlockSites,
}

impl TrainBlock {
    /// Decodes layer `layer`.
    ///
    /// # Errors
    /// What the checkpoint reports; values that are not finite.
    pub fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self> {
        Self::load_without(checkpoint, layer, &|_| false)
    }

    /// [`Self::load`] without the parameters that `skip` names, by Hugging Face name.
    fn load_without(
        checkpoint: &Checkpoint,
        layer: usize,
        skip: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{layer}.");
        let mut params = BTreeMap::new();
        let tensors = checkpoint.config.block_tensors(layer).into_iter();
        for (name, shape) in tensors.filter(|(name, _)| !skip(name)) {
            let tensor = load_tensor(checkpoint, &name, &shape)?;
            params.insert(name.strip_prefix(&prefix).unwrap_or(&name).to_string(), tensor);
        }
        Ok(Self { layer, params, sites: checkpoint.block_sites(layer)? })
    }

    /// Puts the parameters on `tape`; `wants` picks those that get a gradient, by name.
    pub fn vars(&self, tape: &mut Tape, wants: &dyn Fn(&str) -> bool) -> BlockVars {
        let leaf = |(name, tensor): (&String, &Tensor)| {
            (name.clone(), tape.leaf(tensor.clone(), wants(name)))
        };
        BlockVars { vars: self.params.iter().map(leaf).collect(), sites: self.sites.clone() }
    }
}

/// The parameters of one layer on a tape.
#[derive(Debug, Clone, Default)]
pub struct BlockVars {
    /// Handles by the names of [`TrainBlock::params`].
    pub vars: BTreeMap<String, Var>,
    /// Online transforms.
    pub sites: BlockSites,
}

impl BlockVars {
    /// The handle of a parameter, if the layer has it.
    pub fn get(&self, name: &str) -> Option<Var> {
        self.vars.get(name).copied()
    }

    /// Puts `var` in the place of a parameter: its quantized version, say.
    pub fn set(&mut self, name: &str, var: Var) {
        self.vars.insert(name.to_string(), var);
    }

    fn need(&self, name: &str) -> Var {
        self.get(name).unwrap_or_else(|| panic!("the block has no parameter {name}"))
    }
}

/// Where a linear stands on the tape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearSite {
    /// Its name below `model.layers.N.`, such as `mlp.down_proj`.
    pub name: &'static str,
    /// Its input, `[rows, in]`.
    pub input: Var,
    /// Its output, `[rows, out]`, bias included.
    pub output: Var,
}

/// What [`block_forward`] recorded.
#[derive(Debug, Clone)]
pub struct BlockOutput {
    /// The residual stream after the layer, `[rows, hidden]`.
    pub y: Var,
    /// The seven linears, in the order of their computation.
    pub linears: Vec<LinearSite>,
}

/// Records one layer on `x: [rows, hidden]`, sequences of `seqlen` rows.
///
/// # Panics
/// When `params` lacks a parameter or shapes do not fit.
pub fn block_forward(
    tape: &mut Tape,
    x: Var,
    params: &BlockVars,
    shape: &BlockShape,
    seqlen: usize,
) -> BlockOutput {
    let mut transform = |tape: &mut Tape, site: Site, x: Var| {
        let transform = params.sites.at(site).transform.as_ref();
        transform.map_or(x, |transform| tape.transform(x, transform))
    };
    block_forward_at(tape, x, params, shape, seqlen, &mut transform)
}

/// What becomes of the values that flow at a site: `(tape, site, x)` to what takes the place of `x`.
pub type AtSite<'a> = &'a mut dyn FnMut(&mut Tape, Site, Var) -> Var;

/// [`AtSite`] with the index of the layer.
pub type AtLayerSite<'a> = &'a mut dyn FnMut(&mut Tape, usize, Site, Var) -> Var;

/// [`block_forward`] with `at` called at every site in the place of the online transforms.
///
/// # Panics
/// As [`block_forward`].
pub fn block_forward_at(
    tape: &mut Tape,
    x: Var,
    params: &BlockVars,
    shape: &BlockShape,
    seqlen: usize,
    at: AtSite<'_>,
) -> BlockOutput {
    let mut linears = Vec::with_capacity(7);
    let mut linear = |tape: &mut Tape, name: &'static str, input: Var| {
        let bias = params.get(&format!("{name}.bias"));
        let output = tape.linear(input, params.need(&format!("{name}.weight")), bias);
        linears.push(LinearSite { name, input, output });
        output
    };
    let a = tape.rms_norm(x, params.need("input_layernorm.weight"), shape.eps);
    let a = at(tape, Site::AttnInput, a);
    let mut q = linear(tape, "self_attn.q_proj", a);
    let mut k = linear(tape, "self_attn.k_proj", a);
    let v = linear(tape, "self_attn.v_proj", a);
    if let Some(norm) = params.get("self_attn.q_norm.weight") {
        q = tape.rms_norm(q, norm, shape.eps);
    }
    if let Some(norm) = params.get("self_attn.k_norm.weight") {
        k = tape.rms_norm(k, norm, shape.eps);
    }
    let q = tape.rope(q, &shape.rope, seqlen);
    let k = tape.rope(k, &shape.rope, seqlen);
    let (q, k) = (at(tape, Site::Query, q), at(tape, Site::Key, k));
    let v = at(tape, Site::Value, v);
    let mixed = tape.attention(q, k, v, shape.attention(seqlen));
    let mixed = at(tape, Site::AttnOutput, mixed);
    let attended = linear(tape, "self_attn.o_proj", mixed);
    let x = tape.add(x, attended);
    let b = tape.rms_norm(x, params.need("post_attention_layernorm.weight"), shape.eps);
    let b = at(tape, Site::MlpInput, b);
    let gate = linear(tape, "mlp.gate_proj", b);
    let up = linear(tape, "mlp.up_proj", b);
    let activated = tape.swiglu(gate, up);
    let activated = at(tape, Site::DownInput, activated);
    let down = linear(tape, "mlp.down_proj", activated);
    BlockOutput { y: tape.add(x, down), linears }
}

/// A whole decoder, decoded to f32.
#[derive(Debug, Clone)]
pub struct TrainDecoder {
    /// What it is.
    pub config: ModelConfig,
    /// Embedding, `[vocab, hidden]`.
    pub embedding: Tensor,
    /// The layers.
    pub blocks: Vec<TrainBlock>,
    /// Final norm, `[hidden]`.
    pub norm: Tensor,
    /// Head, `[vocab, hidden]`; `None` when it is the embedding.
    pub head: Option<Tensor>,
    rope: Arc<Rope>,
}

/// The parameters of a decoder on a tape.
#[derive(Debug, Clone)]
pub struct DecoderVars {
    /// Embedding.
    pub embedding: Var,
    /// The layers.
    pub blocks: Vec<BlockVars>,
    /// Final norm.
    pub norm: Var,
    /// Head; the embedding's handle when tied.
    pub head: Var,
}

impl DecoderVars {
    /// All handles with their Hugging Face names, in the order of
    /// [`TrainDecoder::parameters_mut`].
    pub fn named(&self) -> Vec<(String, Var)> {
        let mut all = vec![("model.embed_tokens.weight".to_string(), self.embedding)];
        for (layer, block) in self.blocks.iter().enumerate() {
            let full = |(name, v): (&String, &Var)| (format!("model.layers.{layer}.{name}"), *v);
            all.extend(block.vars.iter().map(full));
        }
        all.push(("model.norm.weight".to_string(), self.norm));
        if self.head != self.embedding {
            all.push(("lm_head.weight".to_string(), self.head));
        }
        all
    }
}

/// What [`TrainDecoder::forward`] recorded.
#[derive(Debug, Clone)]
pub struct DecoderOutput {
    /// Final hidden states, normalized, `[rows, hidden]`.
    pub hidden: Var,
    /// The layers.
    pub blocks: Vec<BlockOutput>,
}

impl TrainDecoder {
    /// Decodes every weight; `positions` is the longest sequence that will be used.
    ///
    /// # Errors
    /// What the checkpoint reports; values that are not finite.
    pub fn load(checkpoint: &Checkpoint, positions: usize) -> Result<Self> {
        Self::load_without(checkpoint, positions, &|_| false)
    }

    /// [`Self::load`] without the weights of blocks that `skip` names, by Hugging Face name: those
    /// that somebody else puts among the [`BlockVars`] before the forward pass.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_without(
        checkpoint: &Checkpoint,
        positions: usize,
        skip: &dyn Fn(&str) -> bool,
    ) -> Result<Self> {
        let config = checkpoint.config.clone();
        let blocks = (0..config.num_layers)
            .map(|layer| TrainBlock::load_without(checkpoint, layer, skip))
            .collect::<Result<_>>()?;
        let table = [config.vocab_size, config.hidden_size];
        let embedding = load_tensor(checkpoint, "model.embed_tokens.weight", &table)?;
        let head = match config.tie_embeddings {
            true => None,
            false => Some(load_tensor(checkpoint, "lm_head.weight", &table)?),
        };
        let norm = load_tensor(checkpoint, "model.norm.weight", &[config.hidden_size])?;
        let rope = Arc::new(Rope::new(config.rope_frequencies(), positions));
        Ok(Self { config, embedding, blocks, norm, head, rope })
    }

    /// A decoder of `tensors` by their Hugging Face names; `positions` is the longest sequence that
    /// will be used.
    ///
    /// # Panics
    /// When a tensor of `config` is missing or of another shape.
    pub fn from_tensors(
        config: ModelConfig,
        mut tensors: BTreeMap<String, Tensor>,
        positions: usize,
    ) -> Self {
        let shapes: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
        let mut take = |name: &str| {
            let tensor = tensors.remove(name).unwrap_or_else(|| panic!("{name} is missing"));
            assert_eq!(Some(tensor.shape()), shapes.get(name).map(Vec::as_slice), "{name}");
            tensor
        };
        let block = |layer: usize, take: &mut dyn FnMut(&str) -> Tensor| {
            let prefix = format!("model.layers.{layer}.");
            let params = config.block_tensors(layer).into_iter().map(|(name, _)| {
                let short = name.strip_prefix(&prefix).unwrap_or(&name).to_string();
                (short, take(&name))
            });
            TrainBlock { layer, params: params.collect(), sites: BlockSites::default() }
        };
        let blocks = (0..config.num_layers).map(|layer| block(layer, &mut take)).collect();
        let embedding = take("model.embed_tokens.weight");
        let head = (!config.tie_embeddings).then(|| take("lm_head.weight"));
        let norm = take("model.norm.weight");
        let rope = Arc::new(Rope::new(config.rope_frequencies(), positions));
        Self { config, embedding, blocks, norm, head, rope }
    }

    /// The shape of layer `layer`.
    pub fn block_shape(&self, layer: usize) -> BlockShape {
        BlockShape::new(&self.config, layer, &self.rope)
    }

    /// Puts the parameters on `tape`; `wants` picks those that get a gradient, by Hugging Face
    /// name.
    pub fn vars(&self, tape: &mut Tape, wants: &dyn Fn(&str) -> bool) -> DecoderVars {
        let name = "model.embed_tokens.weight";
        let embedding = tape.leaf(self.embedding.clone(), wants(name));
        let blocks = self.blocks.iter().map(|block| {
            let layer = block.layer;
            block.vars(tape, &|name| wants(&format!("model.layers.{layer}.{name}")))
        });
        let blocks = blocks.collect();
        let norm = tape.leaf(self.norm.clone(), wants("model.norm.weight"));
        let head = match &self.head {
            None => embedding,
            Some(head) => tape.leaf(head.clone(), wants("lm_head.weight")),
        };
        DecoderVars { embedding, blocks, norm, head }
    }

    /// All parameters with their Hugging Face names, in the order of [`DecoderVars::named`].
    pub fn parameters_mut(&mut self) -> Vec<(String, &mut Tensor)> {
        let mut all = vec![("model.embed_tokens.weight".to_string(), &mut self.embedding)];
        for block in &mut self.blocks {
            let layer = block.layer;
            let params = block.params.iter_mut();
            all.extend(params.map(|(name, t)| (format!("model.layers.{layer}.{name}"), t)));
        }
        all.push(("model.norm.weight".to_string(), &mut self.norm));
        if let Some(head) = &mut self.head {
            all.push(("lm_head.weight".to_string(), head));
        }
        all
    }

    /// Records the forward pass of `tokens`, sequences of `seqlen` tokens one after another.
    ///
    /// # Errors
    /// A token outside the vocabulary, sequences that are not whole or too long.
    pub fn forward(
        &self,
        tape: &mut Tape,
        vars: &DecoderVars,
        tokens: &[u32],
        seqlen: usize,
    ) -> Result<DecoderOutput> {
        self.forward_at(tape, vars, tokens, seqlen, &mut |_, _, _, x| x)
    }

    /// [`Self::forward`] with `at` called at every site, after the model's own online transform:
    /// `(tape, layer, site, x)` to what takes the place of `x`.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn forward_at(
        &self,
        tape: &mut Tape,
        vars: &DecoderVars,
        tokens: &[u32],
        seqlen: usize,
        at: AtLayerSite<'_>,
    ) -> Result<DecoderOutput> {
        check_tokens(tokens, self.config.vocab_size)?;
        let positions = self.rope.positions();
        let whole = seqlen > 0 && seqlen <= positions && tokens.len().is_multiple_of(seqlen);
        if !whole {
            return Err(GradError::Sequences { tokens: tokens.len(), seqlen, positions });
        }
        let mut x = tape.embedding(vars.embedding, tokens);
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (layer, params) in vars.blocks.iter().enumerate() {
            let mut here = |tape: &mut Tape, site: Site, x: Var| {
                let transform = params.sites.at(site).transform.as_ref();
                let x = transform.map_or(x, |transform| tape.transform(x, transform));
                at(tape, layer, site, x)
            };
            let shape = self.block_shape(layer);
            let block = block_forward_at(tape, x, params, &shape, seqlen, &mut here);
            x = block.y;
            blocks.push(block);
        }
        let hidden = tape.rms_norm(x, vars.norm, self.config.rms_norm_eps);
        Ok(DecoderOutput { hidden, blocks })
    }

    /// Logits of hidden states, `[rows, vocab]`.
    pub fn logits(&self, tape: &mut Tape, vars: &DecoderVars, hidden: Var) -> Var {
        tape.linear(hidden, vars.head, None)
    }

    /// Records the mean cross-entropy of every next token within its sequence: a scalar.
    ///
    /// # Errors
    /// As [`Self::forward`].
    pub fn loss(
        &self,
        tape: &mut Tape,
        vars: &DecoderVars,
        tokens: &[u32],
        seqlen: usize,
    ) -> Result<Var> {
        let hidden = self.forward(tape, vars, tokens, seqlen)?.hidden;
        Ok(tape.linear_cross_entropy(hidden, vars.head, &next_tokens(tokens, seqlen)))
    }
}

/// The token after each, within sequences of `seqlen`; [`IGNORE`] at their ends.
pub fn next_tokens(tokens: &[u32], seqlen: usize) -> Vec<u32> {
    let sequences = tokens.chunks(seqlen.max(1));
    sequences.flat_map(|s| s[1..].iter().copied().chain([IGNORE])).collect()
}

/// Fails at the first token outside the vocabulary.
pub(crate) fn check_tokens(tokens: &[u32], vocab: usize) -> Result<()> {
    match tokens.iter().find(|t| **t as usize >= vocab) {
        None => Ok(()),
        Some(&token) => Err(GradError::Token { token, vocab }),
    }
}

/// Decodes one tensor and checks that it is finite.
pub(crate) fn load_tensor(checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<Tensor> {
    if shape.len() == 1 {
        return Ok(Tensor::new(shape, checkpoint.vector(name)?));
    }
    let weight = checkpoint.weight(name)?;
    let matrix = Matrix::from_rows(&weight);
    if let Weight::Stored(stored) = &weight {
        stored.release();
    }
    let named = |source| IoError::Matrix { name: name.to_string(), source };
    matrix.check_finite("the weight").map_err(named)?;
    Ok(Tensor::from(matrix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_tokens_stay_in_their_sequence() {
        assert_eq!(next_tokens(&[5, 6, 7, 8], 2), [6, IGNORE, 8, IGNORE]);
        assert_eq!(next_tokens(&[5, 6, 7], 3), [6, 7, IGNORE]);
        assert!(next_tokens(&[], 4).is_empty());
    }

    #[test]
    fn tokens_outside_the_vocabulary_are_named() {
        let error = check_tokens(&[1, 9, 3], 9).unwrap_err();
        assert!(error.to_string().contains("token 9"), "{error}");
    }
}
