//! Sensitivities of the weights: Fisher diagonals and token weights of every linear of every
//! block, one block at a time.
//!
//! For each calibration sequence `d` the mean next-token loss `L_d` is differentiated:
//!
//! ```text
//! F_ij = 1/N Σ_d (∂L_d/∂W_ij)²                     SKIM's and SqueezeLLM's weights of k-means
//! s_kt = mean over rows i of group k of (∂L_d/∂y_ti)²
//! H_k  = Σ_d Σ_t s_kt x_t x_tᵀ                     GuidedQuant's Hessian of row group k
//! ```
//!
//! `s` is kept and `H` is left to whoever has the inputs `x` at hand
//! ([`anybit_core::Gram::add_weighted`]): it is small, and serves inputs of the quantized model
//! too. The sum over a sequence's tokens is inside the square of `F` and outside that of `H`. The
//! next token is that of the text, or one that the model draws: see [`Labels`]. First the
//! sequences go up through the blocks and leave every block's input in a store; then the gradient
//! of the loss comes down: each block is recomputed from its inputs on a tape, and the gradient
//! with respect to a block's input takes that input's place. Memory is one block, its gradients
//! and its statistics, whatever the number of layers. Called by the methods of `anybit-ptq`.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anybit_core::{Matrix, RowSource};
use anybit_io::{Checkpoint, IoError, ModelConfig};

use crate::decoder::{check_tokens, load_tensor};
use crate::head::{HeadPass, HeadRows};
use crate::store::HiddenStore;
use crate::tiles::map;
use crate::{
    BlockOutput, BlockShape, BlockVars, GradError, Result, Rope, Tape, Tensor, TrainBlock, Var,
    block_forward,
};

/// Losses are multiplied by this before they are differentiated, so that squares of small
/// gradients keep their digits: `F` and `H` come out larger by its square.
pub const GRADIENT_SCALE: f32 = 1e3;

/// Which next tokens the loss is taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Labels {
    /// Those of the text: the empirical Fisher information.
    #[default]
    Text,
    /// Drawn from the model's own distribution: the true Fisher information, whose quadratic form
    /// is the KL divergence that a small change of the weights causes.
    Model {
        /// Seed of the draws.
        seed: u64,
    },
}

/// What is computed, and where.
#[derive(Debug, Clone, Copy, Default)]
pub struct SensitivityOptions<'a> {
    /// Which next tokens the loss is taken for.
    pub labels: Labels,
    /// Row groups of the token weights; `None` to leave them out.
    pub guided_groups: Option<usize>,
    /// Row groups of the head's token weights; `None` to leave embedding and head out.
    pub vocab_groups: Option<usize>,
    /// Folder for the hidden states of all sequences and layers (4 bytes · tokens · hidden size ·
    /// (layers + 1)), and for the place that the way down has reached: a run that is killed goes on
    /// from its last finished block. `None` to hold everything in memory.
    pub spill: Option<&'a Path>,
}

/// Sensitivities of one block's seven linears, by their names below `model.layers.N.`, larger by
/// the square of [`GRADIENT_SCALE`].
#[derive(Debug, Clone)]
pub struct BlockSensitivity {
    /// `F`, of each weight's shape.
    pub fisher: BTreeMap<String, Matrix>,
    /// `s`, `[groups of consecutive rows, tokens of all sequences]`.
    pub tokens: Option<BTreeMap<String, Matrix>>,
}

/// What is known at the head, before the way down.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSensitivity {
    /// Mean loss on the text, in nats per token.
    pub loss: f64,
    /// The head's rows, when they were asked for.
    pub rows: Option<HeadRows>,
}

/// Who takes up sensitivities, in the order of computation. What was taken up is not handed out
/// again by a run that goes on from a spill folder.
pub trait Receiver {
    /// Why it can fail.
    type Error: From<GradError>;

    /// What is known at the head.
    ///
    /// # Errors
    /// Ends the run.
    fn head(&mut self, head: HeadSensitivity) -> std::result::Result<(), Self::Error>;

    /// One block, from the last layer to the first.
    ///
    /// # Errors
    /// Ends the run.
    fn block(
        &mut self,
        layer: usize,
        block: BlockSensitivity,
    ) -> std::result::Result<(), Self::Error>;

    /// Fisher diagonal of the embedding as a table that is looked up, `[vocab, hidden]`; only when
    /// the head's rows were asked for.
    ///
    /// # Errors
    /// Ends the run.
    fn lookups(&mut self, fisher: Matrix) -> std::result::Result<(), Self::Error>;

    /// Steps done, and in all.
    fn step(&mut self, done: u64, total: u64);
}

/// Computes the sensitivities of every block on `sequences` and hands them to `receiver`.
///
/// # Errors
/// Sequences that cannot be used, what the checkpoint or the spill folder reports, losses or
/// sensitivities that are not finite, and what `receiver` returns.
pub fn sensitivities<R: Receiver>(
    checkpoint: &Checkpoint,
    sequences: &[Vec<u32>],
    options: SensitivityOptions<'_>,
    receiver: &mut R,
) -> std::result::Result<(), R::Error> {
    let layers = checkpoint.config.num_layers;
    let total = ((2 * layers + 1) * sequences.len()) as u64;
    let mut walk = Walk::new(checkpoint, sequences, options)?;
    let place = match options.spill {
        Some(folder) => Place::find(folder, walk.slot_bytes())?,
        None => None,
    };
    let reached = place.as_ref().map_or(layers, |place| place.layer);
    // Blocks that are done already need neither inputs nor steps.
    let mut done = total - ((2 * reached + usize::from(place.is_none())) * sequences.len()) as u64;
    walk.embed()?;
    for layer in 0..reached.min(layers) {
        // The output of the last block that is missing is replaced by its gradient.
        walk.forward_block(layer, &mut || {
            done += 1;
            receiver.step(done, total);
        })?;
    }
    match place {
        Some(place) => walk.restore(&place)?,
        None => {
            let head = walk.head(&mut || {
                done += 1;
                receiver.step(done, total);
            })?;
            receiver.head(head)?;
            walk.keep_place(layers)?;
        }
    }
    for layer in (0..reached).rev() {
        let sensitivity = walk.backward_block(layer, &mut || {
            done += 1;
            receiver.step(done, total);
        })?;
        receiver.block(layer, sensitivity)?;
        walk.keep_place(layer)?;
    }
    if options.vocab_groups.is_some() {
        let lookups = walk.lookups()?;
        receiver.lookups(lookups)?;
    }
    Ok(())
}

/// The gradient that arrived between two blocks, in a file of the spill folder: where the way down
/// goes on. Slot `layer` is the input of block `layer`.
struct Place {
    layer: usize,
    path: PathBuf,
}

impl Place {
    fn name(layer: usize) -> String {
        format!("gradient-{layer:04}.bin")
    }

    /// The lowest place that a run has reached in `folder`. A file of another length than
    /// `bytes`, which a crash of the machine may leave, is no place.
    fn find(folder: &Path, bytes: u64) -> Result<Option<Self>> {
        let fail = |e| IoError::file("read", folder, e);
        let mut lowest: Option<Self> = None;
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            if std::fs::metadata(&path).is_ok_and(|m| m.len() != bytes) {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let layer = name.strip_prefix("gradient-").and_then(|n| n.strip_suffix(".bin"));
            let Some(layer) = layer.and_then(|l| l.parse().ok()) else { continue };
            if lowest.as_ref().is_none_or(|place| layer < place.layer) {
                lowest = Some(Self { layer, path });
            }
        }
        Ok(lowest)
    }
}

/// The way up and down through the blocks.
struct Walk<'a> {
    checkpoint: &'a Checkpoint,
    sequences: &'a [Vec<u32>],
    options: SensitivityOptions<'a>,
    rope: Arc<Rope>,
    /// Slot `l`: input of block `l`, then its gradient; the last slot is the head's input.
    store: HiddenStore,
    tape: Tape,
}

impl<'a> Walk<'a> {
    fn new(
        checkpoint: &'a Checkpoint,
        sequences: &'a [Vec<u32>],
        options: SensitivityOptions<'a>,
    ) -> Result<Self> {
        let config = &checkpoint.config;
        for (sequence, tokens) in sequences.iter().enumerate() {
            if tokens.len() < 2 {
                return Err(GradError::ShortSequence { sequence, tokens: tokens.len() });
            }
            check_tokens(tokens, config.vocab_size)?;
        }
        let Some(longest) = sequences.iter().map(Vec::len).max() else {
            return Err(GradError::NoSequences);
        };
        check_groups(config, options.guided_groups)?;
        if let Some(groups) = options.vocab_groups.filter(|g| !(1..=config.vocab_size).contains(g))
        {
            let (linear, rows) = ("the vocabulary", config.vocab_size);
            return Err(GradError::RowGroups { groups, linear, rows });
        }
        let lengths = sequences.iter().map(|tokens| tokens.len() * config.hidden_size).collect();
        Ok(Self {
            checkpoint,
            sequences,
            options,
            rope: Arc::new(Rope::new(config.rope_frequencies(), longest)),
            store: HiddenStore::new(config.num_layers + 1, lengths, options.spill)?,
            tape: Tape::default(),
        })
    }

    /// Bytes of one slot.
    fn slot_bytes(&self) -> u64 {
        let tokens: usize = self.sequences.iter().map(Vec::len).sum();
        4 * (tokens * self.checkpoint.config.hidden_size) as u64
    }

    /// Stores the embeddings of all sequences.
    fn embed(&mut self) -> Result<()> {
        let weight = self.checkpoint.weight("model.embed_tokens.weight")?;
        let hidden = self.checkpoint.config.hidden_size;
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let mut x = vec![0.0; tokens.len() * hidden];
            for (token, x) in tokens.iter().zip(x.chunks_exact_mut(hidden)) {
                weight.read_rows(*token as usize..*token as usize + 1, x);
            }
            self.store.write(0, sequence, &x)?;
        }
        Ok(())
    }

    /// What `slot` holds for `sequence`, in a buffer of the tape.
    fn hidden(&mut self, slot: usize, sequence: usize) -> Result<Vec<f32>> {
        let len = self.sequences[sequence].len() * self.checkpoint.config.hidden_size;
        let mut data = self.tape.buffer(len);
        self.store.read(slot, sequence, &mut data)?;
        Ok(data)
    }

    /// The same as a leaf.
    fn hidden_leaf(&mut self, slot: usize, sequence: usize, wanted: bool) -> Result<Var> {
        let shape = [self.sequences[sequence].len(), self.checkpoint.config.hidden_size];
        let data = self.hidden(slot, sequence)?;
        Ok(self.tape.leaf(Tensor::new(shape, data), wanted))
    }

    /// Stores the gradient of `x` in `slot` and forgets the recording.
    fn finish_sequence(&mut self, slot: usize, sequence: usize, x: Var) -> Result<()> {
        if let Some(grad) = self.tape.grad(x) {
            self.store.write(slot, sequence, grad)?;
        }
        self.tape.reset();
        Ok(())
    }

    /// Moves all sequences through block `layer`.
    fn forward_block(&mut self, layer: usize, step: &mut dyn FnMut()) -> Result<()> {
        let block = TrainBlock::load(self.checkpoint, layer)?;
        let shape = BlockShape::new(&self.checkpoint.config, layer, &self.rope);
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let x = self.hidden_leaf(layer, sequence, false)?;
            let vars = block.vars(&mut self.tape, &|_| false);
            let out = block_forward(&mut self.tape, x, &vars, &shape, tokens.len());
            self.store.write(layer + 1, sequence, self.tape.data(out.y))?;
            self.tape.reset();
            step();
        }
        Ok(())
    }

    /// Replaces the final hidden states by the gradients of the scaled losses; returns the mean
    /// loss, and what the head's rows are worth.
    fn head(&mut self, step: &mut dyn FnMut()) -> Result<HeadSensitivity> {
        let config = &self.checkpoint.config;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let norm = load_tensor(self.checkpoint, "model.norm.weight", &[hidden])?;
        let name = match config.tie_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        let head = load_tensor(self.checkpoint, name, &[vocab, hidden])?;
        let (eps, slot) = (config.rms_norm_eps, config.num_layers);
        let all_tokens = self.sequences.iter().map(Vec::len).sum();
        let mut rows = self.options.vocab_groups.map(|groups| HeadRows {
            rows: vec![0.0; vocab],
            tokens: Matrix::zeros(groups, all_tokens),
        });
        let (mut sum, mut first) = (0.0, 0);
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let x = self.hidden_leaf(slot, sequence, true)?;
            let norm = self.tape.constant(norm.clone());
            let normed = self.tape.rms_norm(x, norm, eps);
            let pass = HeadPass {
                x: self.tape.data(normed),
                head: head.data(),
                targets: &tokens[1..],
                hidden,
                labels: self.options.labels,
                sequence,
            };
            let (value, dx) = pass.run(rows.as_mut().map(|rows| (rows, first)));
            if !value.is_finite() {
                return Err(GradError::Loss { sequence, value });
            }
            sum += value as f64;
            first += tokens.len();
            self.tape.backward_from(normed, &dx);
            self.finish_sequence(slot, sequence, x)?;
            step();
        }
        let count = self.sequences.len();
        if let Some(HeadRows { rows, tokens }) = &mut rows {
            rows.iter_mut().for_each(|row| *row /= count as f32);
            check_values(rows, (slot, "head", "row weight"), |row| (row, 0))?;
            let what = (slot, "head", "token weight");
            check_values(&tokens.data, what, |at| (at / all_tokens, at % all_tokens))?;
        }
        Ok(HeadSensitivity { loss: sum / count as f64, rows })
    }

    /// Writes the gradients in slot `layer` into the spill folder, as the place to go on from.
    fn keep_place(&mut self, layer: usize) -> Result<()> {
        let Some(folder) = self.options.spill else { return Ok(()) };
        let path = folder.join(Place::name(layer));
        let partial = folder.join(format!("{}.partial", Place::name(layer)));
        let fail = |e| IoError::file("write", &partial, e);
        let mut file = std::fs::File::create(&partial).map_err(fail)?;
        for sequence in 0..self.sequences.len() {
            let data = self.hidden(layer, sequence)?;
            file.write_all(bytemuck::cast_slice(&data)).map_err(fail)?;
            self.tape.recycle(data);
        }
        file.sync_data().map_err(fail)?;
        std::fs::rename(&partial, &path).map_err(|e| IoError::file("rename", &partial, e))?;
        let _ = std::fs::remove_file(folder.join(Place::name(layer + 1)));
        Ok(())
    }

    /// Puts the gradients of a place into their slot.
    fn restore(&mut self, place: &Place) -> Result<()> {
        let fail = |e| IoError::file("read", &place.path, e);
        let mut file = std::fs::File::open(&place.path).map_err(fail)?;
        for sequence in 0..self.sequences.len() {
            let len = self.sequences[sequence].len() * self.checkpoint.config.hidden_size;
            let mut data = vec![0f32; len];
            file.read_exact(bytemuck::cast_slice_mut(&mut data)).map_err(fail)?;
            self.store.write(place.layer, sequence, &data)?;
        }
        Ok(())
    }

    /// Fisher diagonal of the embedding as a lookup, from the gradients that arrived at the input
    /// of block 0: all places of a token in a sequence add up before they are squared.
    fn lookups(&mut self) -> Result<Matrix> {
        let config = &self.checkpoint.config;
        let hidden = config.hidden_size;
        let mut fisher = Matrix::zeros(config.vocab_size, hidden);
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let gradient = self.hidden(0, sequence)?;
            let mut sums: BTreeMap<u32, Vec<f32>> = BTreeMap::new();
            for (token, g) in tokens.iter().zip(gradient.chunks_exact(hidden)) {
                let sum = sums.entry(*token).or_insert_with(|| vec![0.0; hidden]);
                sum.iter_mut().zip(g).for_each(|(sum, g)| *sum += g);
            }
            self.tape.recycle(gradient);
            let count = self.sequences.len() as f32;
            for (token, sum) in sums {
                let row = fisher.row_mut(token as usize);
                row.iter_mut().zip(sum).for_each(|(f, g)| *f += g * g / count);
            }
        }
        let place = |at| (at / hidden, at % hidden);
        check_values(&fisher.data, (0, "embedding", "Fisher diagonal"), place)?;
        Ok(fisher)
    }

    /// Takes the gradients with respect to block `layer`'s outputs back to its inputs, and gathers
    /// its sensitivities on the way.
    fn backward_block(&mut self, layer: usize, step: &mut dyn FnMut()) -> Result<BlockSensitivity> {
        let block = TrainBlock::load(self.checkpoint, layer)?;
        let shape = BlockShape::new(&self.checkpoint.config, layer, &self.rope);
        let all_tokens = self.sequences.iter().map(Vec::len).sum();
        let groups = self.options.guided_groups;
        let mut sums = Sums::new(&self.checkpoint.config, groups, all_tokens);
        let mut first = 0;
        for (sequence, tokens) in self.sequences.iter().enumerate() {
            let x = self.hidden_leaf(layer, sequence, true)?;
            let dy = self.hidden(layer + 1, sequence)?;
            let tape = &mut self.tape;
            let vars = block.vars(tape, &|name| name.ends_with("_proj.weight"));
            let out = block_forward(tape, x, &vars, &shape, tokens.len());
            if groups.is_some() {
                out.linears.iter().for_each(|site| tape.keep_grad(site.output));
            }
            tape.backward_from(out.y, &dy);
            tape.recycle(dy);
            sums.add(tape, &vars, &out, first);
            first += tokens.len();
            self.finish_sequence(layer, sequence, x)?;
            step();
        }
        sums.finish(layer, self.sequences.len())
    }
}

/// Every linear must have at least as many rows as there are groups.
fn check_groups(config: &ModelConfig, groups: Option<usize>) -> Result<()> {
    let Some(groups) = groups else { return Ok(()) };
    match config.block_linears().into_iter().find(|(_, rows, _)| groups == 0 || groups > *rows) {
        None => Ok(()),
        Some((linear, rows, _)) => Err(GradError::RowGroups { groups, linear, rows }),
    }
}

/// Statistics of one linear while they are summed.
struct LinearSums {
    name: &'static str,
    fisher: Matrix,
    /// `s`, `[groups, tokens]`; no groups when they are not wanted.
    tokens: Matrix,
}

/// Statistics of one block while they are summed.
struct Sums {
    linears: Vec<LinearSums>,
    guided: bool,
}

impl Sums {
    fn new(config: &ModelConfig, groups: Option<usize>, tokens: usize) -> Self {
        let linears = config.block_linears().into_iter().map(|(name, rows, cols)| LinearSums {
            name,
            fisher: Matrix::zeros(rows, cols),
            tokens: Matrix::zeros(groups.unwrap_or(0), tokens),
        });
        Self { linears: linears.collect(), guided: groups.is_some() }
    }

    /// Adds the gradients of the sequence whose tokens begin at `first`.
    fn add(&mut self, tape: &Tape, vars: &BlockVars, out: &BlockOutput, first: usize) {
        for sums in &mut self.linears {
            let weight = vars.get(&format!("{}.weight", sums.name));
            if let Some(dw) = weight.and_then(|w| tape.grad(w)) {
                map(&mut sums.fisher.data, true, dw, |g| g * g);
            }
            let Some(site) = out.linears.iter().find(|site| site.name == sums.name) else {
                continue;
            };
            if let Some(dy) = tape.grad(site.output).filter(|_| self.guided) {
                token_weights(&mut sums.tokens, first, sums.fisher.rows, dy);
            }
        }
    }

    /// Divides by the number of sequences and checks every value.
    fn finish(self, layer: usize, sequences: usize) -> Result<BlockSensitivity> {
        let (mut fisher, mut all_tokens) = (BTreeMap::new(), BTreeMap::new());
        for LinearSums { name, fisher: mut squares, tokens } in self.linears {
            squares.data.iter_mut().for_each(|f| *f /= sequences as f32);
            let place = |cols: usize| move |at: usize| (at / cols, at % cols);
            let what = (layer, name, "Fisher diagonal");
            check_values(&squares.data, what, place(squares.cols))?;
            check_values(&tokens.data, (layer, name, "token weight"), place(tokens.cols))?;
            fisher.insert(name.to_string(), squares);
            all_tokens.insert(name.to_string(), tokens);
        }
        Ok(BlockSensitivity { fisher, tokens: self.guided.then_some(all_tokens) })
    }
}

/// Fails at the first value that is no finite number from zero up; `place` tells its row and
/// column.
fn check_values(
    values: &[f32],
    (layer, linear, quantity): (usize, &'static str, &'static str),
    place: impl Fn(usize) -> (usize, usize),
) -> Result<()> {
    let Some(at) = values.iter().position(|v| !v.is_finite() || *v < 0.0) else { return Ok(()) };
    let ((row, col), value) = (place(at), values[at]);
    Err(GradError::Sensitivity { layer, linear, quantity, row, col, value })
}

/// `s_kt` of the tokens from `first` on, from the gradients `dy`, `[tokens, rows]`.
fn token_weights(weights: &mut Matrix, first: usize, rows: usize, dy: &[f32]) {
    let groups = weights.rows;
    for k in 0..groups {
        let range = k * rows / groups..(k + 1) * rows / groups;
        let out = &mut weights.row_mut(k)[first..];
        for (out, dy) in out.iter_mut().zip(dy.chunks_exact(rows)) {
            let squares: f32 = dy[range.clone()].iter().map(|g| g * g).sum();
            *out = squares / range.len() as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::Gram;

    /// The two forms differ in where the square stands: tokens x = (1, 2), dy = (3, −1) give
    /// `F = (3 − 2)² = 1` and `H = 9·1 + 1·4 = 13` (SKIM's specification, 1.2).
    #[test]
    fn fisher_squares_the_sum_and_guided_sums_the_squares() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 1], vec![1.0, 2.0]));
        let w = tape.leaf(Tensor::new([1, 1], vec![0.5]), true);
        let y = tape.linear(x, w, None);
        let dy = [3.0, -1.0];
        tape.backward_from(y, &dy);
        assert_eq!(tape.grad(w).unwrap()[0].powi(2), 1.0);
        let mut weights = Matrix::zeros(1, 2);
        token_weights(&mut weights, 0, 1, &dy);
        let mut gram = Gram::new(1);
        gram.add_weighted(tape.data(x), weights.row(0));
        approx::assert_relative_eq!(gram.at(0, 0), 13.0, max_relative = 1e-6);
    }

    #[test]
    fn values_that_cannot_be_are_named() {
        let what = (3, "mlp.up_proj", "Fisher diagonal");
        let check = |values: &[f32]| check_values(values, what, |at| (at / 2, at % 2));
        assert!(check(&[0.0, 1.0, 2.0, 3.0]).is_ok());
        for bad in [f32::NAN, f32::INFINITY, -1e-9] {
            let error = check(&[0.0, 1.0, bad, 3.0]).unwrap_err().to_string();
            assert!(error.contains("layer 3, mlp.up_proj: the Fisher diagonal"), "{error}");
            assert!(error.contains("row 1, column 0"), "{error}");
        }
    }

    #[test]
    fn row_groups_split_the_outputs() {
        let mut weights = Matrix::zeros(2, 3);
        token_weights(&mut weights, 1, 3, &[2.0, 0.0, 3.0, 1.0, 1.0, 1.0]);
        // Group 0 is row 0, group 1 rows 1 and 2.
        assert_eq!(weights.data, [0.0, 4.0, 1.0, 0.0, 4.5, 1.0]);
    }
}
