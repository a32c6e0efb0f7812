//! The loop over blocks.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anybit_core::{Gram, Matrix, Plane, QuantizedMatrix, RowSource};
use anybit_io::atomic::{PartialFolder, check_absent};
use anybit_io::{Checkpoint, Weight};
use anybit_kernels::rms_norm;
use anybit_runtime::DecoderLayer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::journal::{Identity, Journal, block_name};
use crate::methods::Rounding;
use crate::methods::rtn::Nearest;
use crate::plan::{EMBEDDING, HEAD, PlannedMatrix};
use crate::rounded::{Rounded, RoundedSite, measure, round_site};
use crate::sensitivity::Sensitivity;
use crate::site::{Inputs, Site, SiteKind, SiteLinear, Statistics};
use crate::stages::walk_block;
use crate::streams::{Mover, Stream};
use crate::tables::{tabulate, with_vocabulary_site};
use crate::{Calibration, MatrixTable, Plan, PtqError, Recipe, Result, assemble};

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
    /// Folder for what other goals can use again; none for `.anybit-cache` beside the output.
    pub cache: Option<PathBuf>,
}

/// The folder of the cache: the one that is asked for, or `.anybit-cache` beside `out`.
pub fn cache_folder(asked: Option<&Path>, out: &Path) -> PathBuf {
    match asked {
        Some(folder) => folder.to_owned(),
        None => out.parent().unwrap_or(Path::new("")).join(".anybit-cache"),
    }
}

/// What is said while it runs.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// A tensor was checked, written or hashed: bytes done and in all.
    Assembling(u64, u64),
    /// Work on block `.0` of `.1` begins.
    Block(usize, usize),
    /// Gradients: steps done and in all.
    Gradients(u64, u64),
    /// Error tables of block `.0` of `.1` are taken.
    Measuring(usize, usize),
    /// A transform is fitted: steps done and in all.
    Transforming(usize, usize),
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
    /// Sum of the errors that the tables predicted for the grids that were chosen, where rows are
    /// allocated.
    pub predicted: Option<f64>,
    folder: PartialFolder,
    journal: Journal,
}

impl Quantized {
    /// The folder, not yet in its place: reports may be added before [`Self::finish`].
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Puts the folder in its place. Until then the run can be resumed.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn finish(self) -> Result<()> {
        self.folder.check_free()?;
        self.journal.remove();
        Ok(self.folder.finish()?)
    }
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
    let recipe = recipe.resolved()?;
    let rounding = recipe.rounding()?;
    checkpoint.check_finite()?;
    let tokens: [&[Vec<u32>]; 2] = [&calibration.sequences, &options.monitor];
    check_tokens(checkpoint, &tokens)?;
    let mut folder = PartialFolder::create(&options.out, options.resume, options.force)?;
    let source = crate::journal::hash_source(checkpoint)?;
    let root = cache_folder(options.cache.as_deref(), &options.out);
    let mut plan = plan.clone();
    let measured =
        Measured::take(checkpoint, &plan, (&source, &recipe), calibration, &root, observe)?;
    let predicted = match rounding.allocation() {
        Some(_) => {
            let error = crate::goal::allocate(&mut plan, &recipe, &*rounding, &measured.tables)?;
            anybit_io::atomic::check_space(&options.out, 2 * plan.weight_bytes())?;
            Some(error)
        }
        None => None,
    };
    let identity = Identity::new((&recipe, source), &plan, &tokens);
    let journal = Journal::open(folder.path(), identity, options.resume)?;
    let sensitivity = measured.sensitivity.as_ref();
    let mut run = Run {
        checkpoint,
        plan: &plan,
        rounding: &*rounding,
        method: recipe.method.clone(),
        gradient_tokens: recipe.calibration.gradient_tokens,
        sensitivity,
        journal,
    };
    let monitored = run.blocks(calibration, options, &mut folder, observe)?;
    let blocks = run.journal.blocks().to_vec();
    let journal = run.journal;
    assemble::write(checkpoint, &recipe, &plan, calibration, &journal, folder.path(), observe)?;
    let weight_bytes = plan.weight_bytes();
    Ok(Quantized { blocks, monitored, weight_bytes, predicted, folder, journal })
}

/// What is measured on the original model before rows are allocated.
pub struct Measured {
    /// Gradients, where the method needs them.
    pub sensitivity: Option<Sensitivity>,
    /// Error tables, where the method allocates.
    pub tables: Vec<MatrixTable>,
}

impl Measured {
    /// Measures, or reads what the cache below `root` holds; `source` is the hash of the model.
    ///
    /// # Errors
    /// What gradients, rounding, reading and writing report.
    pub fn take(
        checkpoint: &Checkpoint,
        plan: &Plan,
        (source, recipe): (&str, &Recipe),
        calibration: &Calibration,
        root: &Path,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Self> {
        if !plan.problems.is_empty() {
            return Err(PtqError::Recipe(plan.problems.join("\n")));
        }
        check_tokens(checkpoint, &[&calibration.sequences])?;
        let rounding = recipe.rounding()?;
        let needs = rounding.needs();
        if needs.fisher.is_none() && rounding.allocation().is_none() {
            return Ok(Self { sensitivity: None, tables: Vec::new() });
        }
        let asked = (source, recipe, needs);
        let sensitivity = Sensitivity::open(checkpoint, asked, calibration, root, observe)?;
        if let Some(sensitivity) = sensitivity.as_ref().filter(|s| s.wants_grams()) {
            let sequences = calibration.gradient_sequences(recipe.calibration.gradient_tokens);
            let (normed, hidden) = final_states(checkpoint, sequences)?;
            sensitivity.write_grams(&normed, hidden)?;
        }
        if rounding.allocation().is_none() {
            return Ok(Self { sensitivity, tables: Vec::new() });
        }
        let options = rounding.options().to_string();
        let observed = calibration.observed(needs, recipe.calibration.gradient_tokens);
        let tokens = crate::journal::hash_tokens(&[observed]);
        let gradients = sensitivity.as_ref().map_or(String::new(), |s| {
            s.folder().file_name().unwrap_or_default().to_string_lossy().into_owned()
        });
        // Embedding and head have a file of their own, so goals with and without them share a folder.
        let linears = plan.matrices.iter().filter(|m| m.tensor.contains(".layers."));
        let matrices: Vec<&str> = linears.map(|m| m.tensor.as_str()).collect();
        let grids = format!("{} {}", recipe.group(), matrices.join(" "));
        let parts = [source, &recipe.method, &options, &tokens, &gradients, &grids];
        let cache = Cache::open(root, "tables", &parts)?;
        let sensitive = sensitivity.as_ref();
        let tables = tabulate(checkpoint, plan, &*rounding, observed, sensitive, &cache, observe)?;
        Ok(Self { sensitivity, tables })
    }
}

/// Final hidden states of a model for some sequences of equal length, normalized, and their width.
///
/// # Errors
/// What reading reports.
pub fn final_states(checkpoint: &Checkpoint, sequences: &[Vec<u32>]) -> Result<(Vec<f32>, usize)> {
    let config = &checkpoint.config;
    let mut stream = Stream::embed(sequences, &checkpoint.weight(EMBEDDING)?);
    let mut mover = Mover::new(config, stream.seqlen);
    for index in 0..config.num_layers {
        mover.advance(&DecoderLayer::load(checkpoint, index)?, &mut stream);
    }
    Ok((final_norm(checkpoint, &stream)?, stream.hidden))
}

fn final_norm(checkpoint: &Checkpoint, stream: &Stream) -> Result<Vec<f32>> {
    let norm = checkpoint.vector("model.norm.weight")?;
    let mut out = vec![0.0; stream.data.len()];
    rms_norm(&stream.data, &norm, checkpoint.config.rms_norm_eps, &mut out);
    Ok(out)
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
    rounding: &'a dyn Rounding,
    method: String,
    gradient_tokens: usize,
    sensitivity: Option<&'a Sensitivity>,
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
        let observed: &dyn RowSource = match self.rounding.needs().inputs {
            Inputs::Quantized => quantized,
            Inputs::Original => &embedding,
        };
        let sequences = calibration.observed(self.rounding.needs(), self.gradient_tokens);
        let mut stream = Stream::embed(sequences, observed);
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
            self.equip(index, &mut layer)?;
            let sites = self.block(index, &mut layer, &mut stream, &mut mover)?;
            mover.advance(&layer, &mut followed);
            for (name, _) in config.block_tensors(index) {
                self.checkpoint.tensor(&name)?.release();
            }
            let (mut rounded, mut norms) = (Vec::new(), Vec::new());
            for site in sites {
                rounded.extend(site.rounded);
                norms.extend(site.norm);
            }
            self.journal.write_matrices(&block_name(index), &self.method, &rounded, &norms)?;
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
        let norm = |stream: &Stream| final_norm(self.checkpoint, stream);
        Ok(Some((norm(&original)?, norm(&followed)?)))
    }

    /// Puts the quantizers of activations and cache in place.
    fn equip(&self, index: usize, layer: &mut DecoderLayer) -> Result<()> {
        for site in anybit_core::Site::ALL {
            let record = self.plan.sites.get(&site.full_name(index));
            layer.sites.at_mut(site).quantizer = record.and_then(|r| r.quantizer.clone());
        }
        Ok(())
    }

    /// Rounds the linears of one block; on return `layer` holds the decoded weights.
    fn block(
        &self,
        index: usize,
        layer: &mut DecoderLayer,
        stream: &mut Stream,
        mover: &mut Mover,
    ) -> Result<Vec<RoundedSite>> {
        let needs = self.rounding.needs();
        let sensitivity = self.sensitivity.map(|s| s.block(index)).transpose()?;
        let tokens = sensitivity.as_ref().and_then(|s| s.tokens.as_ref());
        let clips = crate::transforms::read_clips(self.checkpoint, index)?;
        let mut sites = Vec::new();
        let mut on_site = |layer: &mut DecoderLayer, kind: SiteKind, seen: Statistics| {
            let place = (self.plan, index, kind);
            let known = (sensitivity.as_ref(), &clips);
            let mut site = round_site(self.rounding, place, layer, &seen, known)?;
            if needs.inputs == Inputs::Quantized {
                site.install(layer)?;
            }
            sites.push(site);
            Ok(())
        };
        walk_block(layer, stream, mover, (needs, tokens), &mut on_site)?;
        if needs.inputs == Inputs::Original {
            sites.iter_mut().try_for_each(|site| site.install(layer))?;
        }
        Ok(sites)
    }

    /// Packs the embedding when the plan says so. Methods that know what each of its rows is worth
    /// do it themselves; otherwise a lookup has no inputs to observe: to nearest.
    fn embedding(&mut self, embedding: &Weight) -> Result<Option<QuantizedMatrix>> {
        let Some(planned) = self.plan.matrix(EMBEDDING) else { return Ok(None) };
        let (rounded, method) = match self.vocabulary(planned, SiteKind::Embedding)? {
            Some(rounded) => (rounded, self.method.clone()),
            None => (round_in_chunks(&Nearest, planned, embedding, None)?, "rtn".to_string()),
        };
        self.journal.write_matrices("embedding", &method, &[rounded], &[])?;
        let record = &self.journal.records()[EMBEDDING];
        let parts = self.journal.parts("embedding")?;
        Ok(Some(assemble::matrix_from_parts(EMBEDDING, record, &parts)?))
    }

    /// Embedding or head rounded by the method itself, where it can.
    fn vocabulary(&self, planned: &PlannedMatrix, kind: SiteKind) -> Result<Option<Rounded>> {
        let own = self.sensitivity.filter(|_| self.rounding.needs().vocabulary);
        let Some(vocabulary) = own.map(Sensitivity::vocabulary).transpose()?.flatten() else {
            return Ok(None);
        };
        let tied = self.checkpoint.config.tie_embeddings;
        let round = |site: &Site<'_>| {
            let done = self.rounding.round(site)?;
            let original = site.linears[0].weights;
            let matrices = done.matrices.into_iter();
            Ok(matrices.map(|m| measure(&planned.tensor, original, m, None, None).0).next())
        };
        with_vocabulary_site(self.checkpoint, planned, (kind, tied), &vocabulary, round)
    }

    fn head(&mut self, stream: &Stream) -> Result<()> {
        let Some(planned) = self.plan.matrix(HEAD) else { return Ok(()) };
        let plain = if self.method == "gptq" { "gptq" } else { "rtn" };
        let (rounded, method) = match self.vocabulary(planned, SiteKind::Head)? {
            Some(rounded) => (rounded, self.method.clone()),
            None => (self.plain_head(planned, stream)?, plain.to_string()),
        };
        self.journal.write_matrices("head", &method, &[rounded], &[])
    }

    /// An untied head on the grid of `head_bits`, by GPTQ where it is the method.
    fn plain_head(&self, planned: &PlannedMatrix, stream: &Stream) -> Result<Rounded> {
        let head = self.checkpoint.weight(HEAD)?;
        let gram = match self.method == "gptq" {
            true => {
                let normed = final_norm(self.checkpoint, stream)?;
                let mut gram = Gram::new(stream.hidden);
                let step = stream.seqlen * stream.hidden;
                normed.chunks_exact(step.max(1)).for_each(|x| gram.add(x));
                Some(gram)
            }
            false => None,
        };
        let rounding: &dyn Rounding = if gram.is_some() { self.rounding } else { &Nearest };
        let rounded = round_in_chunks(rounding, planned, &head, gram.as_ref());
        release(&head);
        rounded
    }
}

fn release(weight: &Weight) {
    if let Weight::Stored(tensor) = weight {
        tensor.release();
    }
}

/// Rounds a tall matrix a few thousand rows at a time; rows do not depend on each other.
fn round_in_chunks(
    rounding: &dyn Rounding,
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
    let statistics = Statistics { gram: gram.cloned(), ..Default::default() };
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let mut part = Matrix::zeros(count, cols);
        let read = |(i, out): (usize, &mut [f32])| weight.read_rows(first + i..first + i + 1, out);
        part.data.par_chunks_exact_mut(cols).enumerate().for_each(read);
        let linear = SiteLinear {
            name: &planned.tensor,
            weights: &part,
            settings: planned.settings,
            layout: &planned.layout,
            fisher: None,
            row_factors: None,
        };
        let (kind, linears) = (SiteKind::Head, vec![linear]);
        let site = Site { kind, folds: false, linears, statistics: &statistics };
        let matrices = rounding.round(&site).map_err(|(_, e)| fail(e))?.matrices;
        for matrix in matrices {
            let (r, _) = measure(&planned.tensor, &part, matrix, gram, None);
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
