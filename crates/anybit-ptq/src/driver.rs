//! The loop over blocks.

use std::path::PathBuf;
use std::time::Instant;

use anybit_core::{Gram, Matrix, Plane, QuantizedMatrix, RowSource};
use anybit_io::atomic::{PartialFolder, check_absent};
use anybit_io::{Checkpoint, Weight};
use anybit_kernels::rms_norm;
use anybit_runtime::DecoderLayer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::journal::{Identity, Journal, block_name};
use crate::methods::{self, Method};
use crate::plan::{EMBEDDING, HEAD, PlannedMatrix};
use crate::stages::{Rounded, quantize_block, round_matrices};
use crate::streams::{Mover, Stream};
use crate::{Calibration, Plan, PtqError, Recipe, Result, assemble};

/// Rows of an embedding or head that are rounded at a time.
const ROWS: usize = 1 << 13;

/// Where and how to quantize.
#[derive(Debug, Clone)]
pub struct QuantizeOptions {
    /// The folder to write.
    pub out: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Continue an interrupted run.
    pub resume: bool,
    /// Sequences whose hidden states are followed through the original and the quantized blocks:
    /// the error per block, and logits to compare, without ever holding two models.
    pub monitor: Vec<Vec<u32>>,
}

/// What is said while it runs.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// A tensor was checked, written or hashed: bytes done and in all.
    Assembling(u64, u64),
    /// Work on block `.0` of `.1` begins.
    Block(usize, usize),
}

/// What happened to one block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockReport {
    /// Index.
    pub block: usize,
    /// `‖x_q − x‖² / ‖x‖²` of the monitored hidden states after it.
    pub hidden_error: Option<f64>,
    /// Seconds that it took; not part of the output's identity.
    #[serde(skip)]
    pub seconds: f64,
}

/// What came out.
pub struct Quantized {
    /// Per block.
    pub blocks: Vec<BlockReport>,
    /// Normalized hidden states of the monitored sequences: (original model, quantized model),
    /// each `[sequences · seqlen, hidden]`.
    pub monitored: Option<(Vec<f32>, Vec<f32>)>,
    /// Exact size of the weight files.
    pub weight_bytes: u64,
    /// The folder, not yet in its place: reports may be added before [`PartialFolder::finish`].
    pub folder: PartialFolder,
}

/// Quantizes `checkpoint` as `plan` says.
///
/// # Errors
/// A plan with problems, a value that is not finite, and everything that can happen while reading
/// and writing. Finished blocks are kept for `--resume`; without any nothing is left.
pub fn quantize(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    plan: &Plan,
    calibration: &Calibration,
    options: &QuantizeOptions,
    observe: &mut dyn FnMut(Event),
) -> Result<Quantized> {
    check_absent(&options.out, options.force)?;
    if !plan.problems.is_empty() {
        return Err(PtqError::Recipe(plan.problems.join("\n")));
    }
    let method = methods::find(&recipe.method)
        .ok_or_else(|| PtqError::Recipe(format!("unknown method {}", recipe.method)))?;
    checkpoint.check_finite()?;
    let tokens: [&[Vec<u32>]; 2] = [&calibration.sequences, &options.monitor];
    check_tokens(checkpoint, &tokens)?;
    let identity = Identity::new(recipe, checkpoint, &tokens)?;
    let mut folder = PartialFolder::create(&options.out, options.resume, options.force)?;
    let journal = Journal::open(folder.path(), identity, options.resume)?;
    let mut run = Run { checkpoint, plan, method, journal };
    let monitored = run.blocks(calibration, options, &mut folder, observe)?;
    let blocks = run.journal.blocks().to_vec();
    assemble::write(checkpoint, recipe, plan, calibration, run.journal, folder.path(), observe)?;
    folder.discard();
    Ok(Quantized { blocks, monitored, weight_bytes: plan.weight_bytes(), folder })
}

fn check_tokens(checkpoint: &Checkpoint, tokens: &[&[Vec<u32>]]) -> Result<()> {
    let vocab = checkpoint.config.vocab_size;
    match tokens.iter().copied().flatten().flatten().find(|t| **t as usize >= vocab) {
        Some(&token) => Err(anybit_runtime::RuntimeError::Token { token, vocab }.into()),
        None => Ok(()),
    }
}

struct Run<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    method: &'a dyn Method,
    journal: Journal,
}

impl Run<'_> {
    fn blocks(
        &mut self,
        calibration: &Calibration,
        options: &QuantizeOptions,
        folder: &mut PartialFolder,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<(Vec<f32>, Vec<f32>)>> {
        let config = &self.checkpoint.config;
        let embedding = self.checkpoint.weight(EMBEDDING)?;
        let packed = self.embedding(&embedding)?;
        let quantized: &dyn RowSource = match &packed {
            Some(matrix) => matrix,
            None => &embedding,
        };
        let mut stream = Stream::embed(&calibration.sequences, quantized);
        let mut original = Stream::embed(&options.monitor, &embedding);
        let mut followed = Stream::embed(&options.monitor, quantized);
        drop(packed);
        release(&embedding);
        if self.journal.finished() > 0 {
            self.journal.read_inputs(&mut [&mut stream, &mut original, &mut followed])?;
        }
        let longest = stream.seqlen.max(original.seqlen);
        let mut mover = Mover::new(config, longest);
        for index in self.journal.finished()..config.num_layers {
            observe(Event::Block(index, config.num_layers));
            let started = Instant::now();
            let mut layer = DecoderLayer::load(self.checkpoint, index)?;
            mover.advance(&layer, &mut original);
            let rounded =
                quantize_block(self.plan, self.method, index, &mut layer, &mut stream, &mut mover)?;
            mover.advance(&layer, &mut followed);
            for (name, _) in config.block_tensors(index) {
                self.checkpoint.tensor(&name)?.release();
            }
            self.journal.write_matrices(&block_name(index), self.method.name(), &rounded)?;
            let hidden_error = (!original.is_empty()).then(|| followed.relative_error(&original));
            let seconds = started.elapsed().as_secs_f64();
            let report = BlockReport { block: index, hidden_error, seconds };
            self.journal.finish_block(report, &[&stream, &original, &followed])?;
            folder.keep();
        }
        observe(Event::Block(config.num_layers, config.num_layers));
        self.head(&stream)?;
        if original.is_empty() {
            return Ok(None);
        }
        Ok(Some((self.final_norm(&original)?, self.final_norm(&followed)?)))
    }

    fn final_norm(&self, stream: &Stream) -> Result<Vec<f32>> {
        let norm = self.checkpoint.vector("model.norm.weight")?;
        let mut out = vec![0.0; stream.data.len()];
        rms_norm(&stream.data, &norm, self.checkpoint.config.rms_norm_eps, &mut out);
        Ok(out)
    }

    /// Packs the embedding when the plan says so. A lookup has no inputs to observe: to nearest.
    fn embedding(&mut self, embedding: &Weight) -> Result<Option<QuantizedMatrix>> {
        let Some(planned) = self.plan.matrix(EMBEDDING) else { return Ok(None) };
        let rounded = round_in_chunks(&methods::rtn::Rtn, planned, embedding, None)?;
        self.journal.write_matrices("embedding", methods::rtn::Rtn.name(), &[rounded])?;
        let record = &self.journal.records()[EMBEDDING];
        let parts = self.journal.parts("embedding")?;
        Ok(Some(assemble::matrix_from_parts(EMBEDDING, record, &parts)?))
    }

    fn head(&mut self, stream: &Stream) -> Result<()> {
        let Some(planned) = self.plan.matrix(HEAD) else { return Ok(()) };
        let head = self.checkpoint.weight(HEAD)?;
        let gram = match self.method.needs_gram() {
            true => {
                let normed = self.final_norm(stream)?;
                let mut gram = Gram::new(stream.hidden);
                let step = stream.seqlen * stream.hidden;
                normed.chunks_exact(step.max(1)).for_each(|x| gram.add(x));
                Some(gram)
            }
            false => None,
        };
        let rounded = round_in_chunks(self.method, planned, &head, gram.as_ref())?;
        release(&head);
        self.journal.write_matrices("head", self.method.name(), &[rounded])
    }
}

fn release(weight: &Weight) {
    if let Weight::Stored(tensor) = weight {
        tensor.release();
    }
}

/// Rounds a tall matrix a few thousand rows at a time; rows do not depend on each other.
fn round_in_chunks(
    method: &dyn Method,
    planned: &PlannedMatrix,
    weight: &Weight,
    gram: Option<&Gram>,
) -> Result<Rounded> {
    let (rows, cols) = (planned.rows, planned.cols);
    let grid = planned.settings.grid;
    let fail = |source| PtqError::Tensor { tensor: planned.tensor.clone(), source };
    let mut all = Plane::empty(grid, 0, cols).map_err(fail)?;
    let (mut error, mut norm, mut decoded_norm) = (0f64, 0f64, 0f64);
    let (mut output, mut output_norm) = (0f64, 0f64);
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let mut part = Matrix::zeros(count, cols);
        let read = |(i, out): (usize, &mut [f32])| weight.read_rows(first + i..first + i + 1, out);
        part.data.par_chunks_exact_mut(cols).enumerate().for_each(read);
        let chunk = PlannedMatrix { rows: count, ..planned.clone() };
        let originals = std::slice::from_ref(&part);
        for (r, _) in round_matrices(method, &[&chunk], originals, gram)? {
            let weight_norm = anybit_io::native::squared_norm(&part);
            error += r.relative_error * weight_norm;
            norm += weight_norm;
            decoded_norm += r.decoded_norm;
            if let (Some(e), Some(gram)) = (r.output_error, gram) {
                let scale = gram.trace(&part);
                output += e * scale;
                output_norm += scale;
            }
            for plane in r.matrix.planes {
                all.append_rows(plane).map_err(fail)?;
            }
        }
    }
    Ok(Rounded {
        tensor: planned.tensor.clone(),
        matrix: QuantizedMatrix::single(all),
        relative_error: error / norm.max(f64::MIN_POSITIVE),
        output_error: gram.map(|_| output / output_norm.max(f64::MIN_POSITIVE)),
        decoded_norm,
    })
}
