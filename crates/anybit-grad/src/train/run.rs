//! [`run`]: a recipe from texts to a report.
//!
//! | in `out/` | what |
//! |---|---|
//! | `recipe.json` | the recipe with everything that was left out |
//! | `tokenizer/`, `data/` | the tokenizer, the tokenized texts |
//! | `checkpoints/step-NNNNNNNN/` | see [`super::checkpoint`] |
//! | `log.jsonl`, `events/` | losses, one JSON object a line; the same for TensorBoard |
//! | `model/` | the result, see [`super::export`] |
//! | `report.json` | what was reached |
//!
//! Rank 0 writes; the others read what it wrote.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anybit_core::Site;
use anybit_io::atomic::write_bytes;
use anybit_io::tokenizer::Tokenizer;
use anybit_io::{Checkpoint, IoError, ModelConfig};
use serde::{Deserialize, Serialize};

use super::checkpoint::{self, Best, State};
use super::corpus::{Corpus, tokenizer};
use super::distributed::{Communicator, same_everywhere};
use super::log::{JsonLines, Kind, Record, TensorBoard};
use super::model::{block_parameters, initialize, preset, preset_names};
use super::trainer::{Batch, NotFinite, Sequences, StepReport, Trainer, cross_entropy};
use super::{QuantizedDecoder, QuantizerRecipe, Result, TrainError, TrainRecipe, export, kept};
use crate::distill::{CachePlan, Distiller};
use crate::{DecoderOutput, DecoderVars, Tape, TrainDecoder};

/// A loss this many times that of guessing evenly means that training ran away.
const RAN_AWAY: f64 = 3.0;

/// What happens while a run goes on.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    /// Bytes of text tokenized, and in all.
    Tokenizing(u64, u64),
    /// Sequences whose teachers' outputs were computed for a cache, and in all; none when the cache
    /// was there.
    Teaching(u64, u64),
    /// About to take the first step: steps taken before, and in all; tokens of a step; parameters.
    Start {
        /// Steps taken before.
        step: u64,
        /// Steps in all.
        steps: u64,
        /// Tokens of a step.
        tokens: usize,
        /// Parameters in all.
        parameters: usize,
    },
    /// A step or validation was logged.
    Logged(&'a Record),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// What a run reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// Cross-entropy over all validation tokens with the final weights, quantized as in training,
    /// in nats per token; `None` without validation tokens.
    pub validation_loss: Option<f64>,
    /// Tokens that it is the mean of.
    pub validation_tokens: usize,
    /// The least validation loss between steps.
    pub best: Option<Best>,
    /// Loss of the last step's batch.
    pub train_loss: f64,
    /// Steps taken.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Parameters in all.
    pub parameters: usize,
    /// Parameters without embedding and head.
    pub block_parameters: usize,
    /// Seconds of this session, validation and checkpoints included.
    pub seconds: f64,
    /// Tokens per second of this session's steps: the median.
    pub tokens_per_s: f64,
    /// Processes that trained together.
    pub ranks: usize,
    /// Share of the entries of each operand that passes gradient at the end.
    pub trusted: BTreeMap<String, f64>,
    /// The estimators.
    pub quantizer: QuantizerRecipe,
    /// Folder of the model.
    pub model: PathBuf,
    /// What the model's files hold.
    pub format: export::Format,
}

/// How to start.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunOptions {
    /// Go on from the newest checkpoint, if there is one.
    pub resume: bool,
    /// Begin anew where a run exists.
    pub force: bool,
}

/// Trains as `recipe` says.
///
/// # Errors
/// A recipe that cannot be used; texts, tokenizer or checkpoint that cannot be read; an output that
/// exists; a loss or gradient that is no number.
pub fn run(
    recipe: &TrainRecipe,
    options: RunOptions,
    comm: &mut dyn Communicator,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<TrainReport> {
    recipe.check()?;
    if recipe.quantizer.keeps_codes() {
        // Before texts are tokenized, not after.
        kept::open(recipe)?;
    }
    let out = recipe.out.as_path();
    let lock = prepare_folder(recipe, options, comm)?;
    let (tokenizer, corpus) = texts(recipe, comm, watch)?;
    let plan = cache_plan(recipe, &corpus)?;
    let student = student(recipe, &tokenizer, &corpus)?;
    let steps = recipe.train.total_steps(recipe.data.context);
    let trainer = Trainer::new(student, &recipe.train, steps, recipe.data.context);
    let vocab = trainer.student.decoder.config.vocab_size;
    let distiller = distiller(recipe, plan, vocab, comm, watch)?;
    let (best, speeds) = (None, Vec::new());
    let mut session = Session { recipe, out, corpus, trainer, distiller, steps, best, speeds };
    session.begin(options, comm)?;
    let report = session.train(comm, watch)?;
    drop(lock);
    Ok(report)
}

/// Makes or checks the run's folder; the file is its lock, on rank 0.
fn prepare_folder(
    recipe: &TrainRecipe,
    options: RunOptions,
    comm: &mut dyn Communicator,
) -> Result<Option<File>> {
    let lock = match comm.rank() {
        0 => Some(claim_folder(recipe, options)?),
        _ => None,
    };
    comm.barrier()?;
    let hash = blake3::hash(json(recipe)?.as_bytes());
    same_everywhere(comm, "the recipe", *hash.as_bytes())?;
    Ok(lock)
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value)
        .map_err(|e| TrainError::recipe("recipe", format!("cannot be written as JSON: {e}")))
}

fn claim_folder(recipe: &TrainRecipe, options: RunOptions) -> Result<File> {
    let out = &recipe.out;
    let begun = out.join("recipe.json");
    let empty = fs::read_dir(out)
        .map_or(true, |entries| entries.flatten().all(|entry| entry.file_name() == "lock"));
    if !empty && !begun.exists() {
        // Beginning anew would remove what is not ours.
        let what = "is no folder of a training run and not empty; choose another out";
        return Err(IoError::unsupported(out, what).into());
    }
    let lossless = checkpoint::list(out)?.is_empty();
    if begun.exists() && !lossless && !options.resume && !options.force {
        return Err(IoError::Exists { path: out.clone() }.into());
    }
    fs::create_dir_all(out).map_err(|e| IoError::file("create", out, e))?;
    let path = out.join("lock");
    let lock = File::create(&path).map_err(|e| IoError::file("create", &path, e))?;
    if lock.try_lock().is_err() {
        return Err(IoError::Busy { path: out.clone() }.into());
    }
    if begun.exists() && options.resume {
        check_same(recipe, &begun)?;
    } else {
        for name in ["checkpoints", "events", "tokenizer", "data", "model", "log.jsonl"] {
            let path = out.join(name);
            let gone = match path.is_dir() {
                true => fs::remove_dir_all(&path),
                false if path.exists() => fs::remove_file(&path),
                false => Ok(()),
            };
            gone.map_err(|e| IoError::file("remove", &path, e))?;
        }
    }
    write_bytes(&begun, json(recipe)?.as_bytes())?;
    Ok(lock)
}

/// Whether the run in a folder was begun with the same recipe.
fn check_same(recipe: &TrainRecipe, path: &Path) -> Result<()> {
    let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
    let before: TrainRecipe =
        serde_json::from_str(&text).map_err(|e| IoError::damaged(path, e.to_string()))?;
    let differs = [
        ("seed", before.seed != recipe.seed),
        ("model", before.model != recipe.model),
        ("data", before.data != recipe.data),
        ("quantizer", before.quantizer != recipe.quantizer),
        ("train", before.train != recipe.train),
        ("distill", before.distill != recipe.distill),
    ];
    match differs.into_iter().find(|(_, differs)| *differs) {
        None => Ok(()),
        Some((what, _)) => Err(TrainError::OtherRecipe { path: recipe.out.clone(), what }),
    }
}

/// The tokenizer and the tokenized texts; rank 0 makes them.
fn texts(
    recipe: &TrainRecipe,
    comm: &mut dyn Communicator,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<(Tokenizer, Corpus)> {
    if comm.rank() > 0 {
        comm.barrier()?;
    }
    let init = recipe.model.init.as_deref();
    let tokenizer = tokenizer(&recipe.data, init, &recipe.out.join("tokenizer"))?;
    // What the tokenizer puts before a text, if anything, is what documents begin with.
    let bos = tokenizer.encode("", true)?.first().copied();
    let folder = recipe.out.join("data");
    let mut progress = |done, total| watch(Event::Tokenizing(done, total));
    let corpus =
        Corpus::prepare(&recipe.data, &tokenizer, bos, recipe.seed, &folder, &mut progress)?;
    if comm.rank() == 0 {
        comm.barrier()?;
    }
    same_everywhere(comm, "the tokenized texts", corpus.key())?;
    Ok((tokenizer, corpus))
}

/// Fails for a checkpoint whose activations are quantized: training does not know their grids.
pub(crate) fn refuse_rounded(checkpoint: &Checkpoint, key: &'static str) -> Result<()> {
    for layer in 0..checkpoint.config.num_layers {
        let sites = checkpoint.block_sites(layer)?;
        if let Some(site) = Site::ALL.into_iter().find(|s| sites.quantizer(*s).is_some()) {
            let what = format!(
                "the activations of {} are quantized (at {}), by grids that are not trained \
                 through: give the model from before, or a transformed one from the cache",
                checkpoint.path.display(),
                site.name()
            );
            return Err(TrainError::recipe(key, what));
        }
    }
    Ok(())
}

/// The model before the first step, with what its linears multiply.
fn student(
    recipe: &TrainRecipe,
    tokenizer: &Tokenizer,
    corpus: &Corpus,
) -> Result<QuantizedDecoder> {
    let (quantizer, precision) = (&recipe.quantizer, recipe.train.precision);
    if !quantizer.keeps_codes() {
        let decoder = decoder(recipe, tokenizer, corpus)?;
        return QuantizedDecoder::new(decoder, quantizer.clone(), precision);
    }
    let checkpoint = kept::open(recipe)?;
    check_vocabulary(&checkpoint, corpus)?;
    kept::student(&checkpoint, quantizer, precision, recipe.data.context)
}

/// Whether the model of `model.init` knows every token of the texts.
fn check_vocabulary(checkpoint: &Checkpoint, corpus: &Corpus) -> Result<()> {
    let (vocab, known) = (corpus.vocab_size(), checkpoint.config.vocab_size);
    if vocab > known {
        let what = format!("has {vocab} tokens, but the model of model.init only {known}");
        return Err(TrainError::recipe("data.tokenizer", what));
    }
    Ok(())
}

/// The decoder before the first step.
fn decoder(recipe: &TrainRecipe, tokenizer: &Tokenizer, corpus: &Corpus) -> Result<TrainDecoder> {
    let (context, vocab) = (recipe.data.context, corpus.vocab_size());
    if let Some(path) = &recipe.model.init {
        let checkpoint = Checkpoint::open(path)?;
        refuse_rounded(&checkpoint, "model.init")?;
        check_vocabulary(&checkpoint, corpus)?;
        return Ok(TrainDecoder::load(&checkpoint, context)?);
    }
    let mut config = match (&recipe.model.preset, &recipe.model.config) {
        (Some(name), _) => preset(name, vocab, context).ok_or_else(|| {
            TrainError::recipe("model.preset", format!("{name} is none of {}", preset_names()))
        })?,
        (None, Some(path)) => {
            let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
            let mut config = ModelConfig::from_json(&text, path)?;
            config.vocab_size = vocab;
            config.max_positions = config.max_positions.max(context);
            config
        }
        (None, None) => return Err(TrainError::recipe("model", "is empty")),
    };
    if let Some(tied) = recipe.model.tie_embeddings {
        config.tie_embeddings = tied;
    }
    config.bos_token_id = tokenizer.encode("", true)?.first().copied();
    config.eos_token_ids = tokenizer.id_of("</s>").into_iter().collect();
    config.validate(&recipe.out)?;
    Ok(initialize(&config, recipe.seed, context))
}

/// What is needed of a cache of teachers' outputs; fails at once when that is too large.
fn cache_plan<'a>(recipe: &'a TrainRecipe, corpus: &'a Corpus) -> Result<Option<CachePlan<'a>>> {
    let Some(distill) = &recipe.distill else { return Ok(None) };
    let context = recipe.data.context;
    let positions = recipe.train.total_steps(context).saturating_mul(recipe.train.batch as u64);
    CachePlan::new(distill, corpus, positions, context)
}

/// Teachers and balancer, for a student of `vocab` tokens.
fn distiller(
    recipe: &TrainRecipe,
    plan: Option<CachePlan<'_>>,
    vocab: usize,
    comm: &mut dyn Communicator,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<Option<Distiller>> {
    let Some(distill) = &recipe.distill else { return Ok(None) };
    let context = recipe.data.context;
    let steps = recipe.train.total_steps(context);
    let Some(plan) = plan else {
        return Distiller::new(distill, vocab, context, steps).map(Some);
    };
    let mut progress = |done, total| watch(Event::Teaching(done, total));
    let teacher = plan.prepare(vocab, comm, &mut progress)?;
    Distiller::cached(distill, teacher, context, steps).map(Some)
}

/// A run between its first and its last step.
struct Session<'a> {
    recipe: &'a TrainRecipe,
    out: &'a Path,
    corpus: Corpus,
    trainer: Trainer,
    distiller: Option<Distiller>,
    steps: u64,
    best: Option<Best>,
    /// Tokens per second of each step.
    speeds: Vec<f64>,
}

/// Where losses go, on rank 0.
struct Logs {
    lines: JsonLines,
    board: TensorBoard,
}

fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

impl Logs {
    fn open(out: &Path, resumed: Option<u64>) -> Result<Self> {
        let events = out.join("events");
        fs::create_dir_all(&events).map_err(|e| IoError::file("create", &events, e))?;
        let lines = JsonLines::open(&out.join("log.jsonl"), resumed)?;
        Ok(Self { lines, board: TensorBoard::create(&events, wall_time(), resumed)? })
    }

    fn write(&mut self, record: &Record) -> Result<()> {
        self.lines.write(record)?;
        Ok(self.board.record(record, wall_time())?)
    }
}

impl Session<'_> {
    /// Initializes what is found on data, and takes up the newest checkpoint.
    fn begin(&mut self, options: RunOptions, comm: &mut dyn Communicator) -> Result<()> {
        let context = self.recipe.data.context;
        let (first, _) = self.corpus.batch(0..1);
        self.trainer.student.initialize_activations(&first, context)?;
        if options.resume
            && let Some(step) = checkpoint::list(self.out)?.pop()
        {
            let folder = checkpoint::folder(self.out, step);
            let (state, adam) = checkpoint::load(&folder, &mut self.trainer.student)?;
            (self.trainer.adam, self.trainer.step, self.best) = (adam, state.step, state.best);
            if let Some(distiller) = &mut self.distiller {
                distiller.balancer.load_state(&state.balancer)?;
            }
        }
        if comm.size() == 1 {
            return Ok(());
        }
        let mut hash = blake3::Hasher::new();
        for (name, tensor, _) in self.trainer.student.parameters() {
            hash.update(name.as_bytes());
            hash.update(bytemuck::cast_slice(tensor.data()));
        }
        Ok(same_everywhere(comm, "the parameters", *hash.finalize().as_bytes())?)
    }

    fn train(
        &mut self,
        comm: &mut dyn Communicator,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<TrainReport> {
        let started = Instant::now();
        let settings = &self.recipe.train;
        let tokens = settings.batch * self.recipe.data.context;
        let validate_every = settings.validate_every.unwrap_or(self.steps.div_ceil(20));
        let checkpoint_every = settings.checkpoint_every.unwrap_or(self.steps.div_ceil(10));
        let resumed = (self.trainer.step > 0).then_some(self.trainer.step);
        let mut logs = match comm.rank() {
            0 => Some(Logs::open(self.out, resumed)?),
            _ => None,
        };
        let parameters = self.trainer.student.parameters().iter().map(|p| p.1.len()).sum();
        let step = self.trainer.step;
        watch(Event::Start { step, steps: self.steps, tokens, parameters });
        let mut train_loss = f64::NAN;
        while self.trainer.step < self.steps {
            let (report, extra) = self.step(comm)?;
            train_loss = report.loss;
            let speed = self.speeds.last().copied();
            let at = (self.trainer.step, self.trainer.step * tokens as u64);
            let record = Record { extra, ..step_record(report, at, speed, started) };
            self.log(logs.as_mut(), &record, watch)?;
            let (done, last) = (self.trainer.step, self.trainer.step == self.steps);
            let save = last || done.is_multiple_of(checkpoint_every);
            if save || done.is_multiple_of(validate_every) {
                let record = self.validation(at, settings.validation_sequences, comm)?;
                if let Some(record) = record {
                    self.log(logs.as_mut(), &record, watch)?;
                }
            }
            if save && comm.rank() == 0 {
                self.save(watch)?;
            }
        }
        self.report(train_loss, started, comm)
    }

    /// One step that ends well, with the figures of its distillation, or the reason why not. The
    /// loss of a distillation is that of the task.
    fn step(&mut self, comm: &mut dyn Communicator) -> Result<(StepReport, BTreeMap<String, f64>)> {
        let started = Instant::now();
        let tokens = (self.recipe.train.batch * self.recipe.data.context) as f64;
        let mut extra = BTreeMap::new();
        let mut found = match &mut self.distiller {
            None => self.trainer.step(&mut self.corpus, comm, &mut cross_entropy)?,
            Some(distiller) => {
                let mut objective = |tape: &mut Tape,
                                     output: &DecoderOutput,
                                     vars: &DecoderVars,
                                     batch: &Batch<'_>| {
                    distiller.objective(tape, output, vars, batch)
                };
                let found = self.trainer.step(&mut self.corpus, comm, &mut objective)?;
                extra = distiller.finish_step(comm)?;
                found
            }
        };
        if let (Ok(report), Some(task)) = (&mut found, extra.get("task_loss")) {
            report.loss = *task;
        }
        let limit = RAN_AWAY * (self.corpus.vocab_size() as f64).ln();
        let found = found.and_then(|report| match report.loss > limit {
            false => Ok(report),
            true => Err(NotFinite {
                what: format!("the loss is {}, {RAN_AWAY} times that of guessing", report.loss),
                place: "the loss".into(),
            }),
        });
        self.speeds.push(tokens / started.elapsed().as_secs_f64());
        let step = self.trainer.step;
        found.map(|report| (report, extra)).or_else(|NotFinite { what, place }| {
            let newest = checkpoint::list(self.out)?.pop();
            let folder = |step| checkpoint::folder(self.out, step).display().to_string();
            let checkpoint = newest.map_or("none yet".into(), folder);
            Err(TrainError::Diverged { step, what, place, checkpoint })
        })
    }

    fn log(
        &self,
        logs: Option<&mut Logs>,
        record: &Record,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<()> {
        if let Some(logs) = logs {
            logs.write(record)?;
        }
        watch(Event::Logged(record));
        Ok(())
    }

    /// Validates on at most `most` sequences.
    fn validation(
        &mut self,
        (step, tokens): (u64, u64),
        most: usize,
        comm: &mut dyn Communicator,
    ) -> Result<Option<Record>> {
        let windows = self.corpus.validation_windows().min(most);
        if windows == 0 {
            return Ok(None);
        }
        let loss = self.trainer.validate(&self.corpus, 0..windows, comm)?;
        if self.best.is_none_or(|best| loss < best.loss) {
            self.best = Some(Best { step, loss });
        }
        let trusted = self.trainer.trusted_shares(&self.corpus)?;
        Ok(Some(Record { trusted, ..Record::new(Kind::Validation, step, tokens, loss) }))
    }

    fn save(&mut self, watch: &mut dyn FnMut(Event<'_>)) -> Result<()> {
        let state = State {
            step: self.trainer.step,
            best: self.best,
            recipe: self.recipe.clone(),
            kept: None,
            balancer: self.distiller.as_ref().map_or(Vec::new(), |d| d.balancer.state()),
            files: BTreeMap::new(),
        };
        let Trainer { student, adam, .. } = &mut self.trainer;
        checkpoint::save(self.out, student, adam, state, &self.out.join("tokenizer"))?;
        checkpoint::prune(self.out, self.recipe.train.keep, self.best.map(|best| best.step))?;
        watch(Event::Saved(&checkpoint::folder(self.out, self.trainer.step)));
        Ok(())
    }

    /// The last validation, the model, the report.
    fn report(
        &mut self,
        train_loss: f64,
        started: Instant,
        comm: &mut dyn Communicator,
    ) -> Result<TrainReport> {
        let windows = self.corpus.validation_windows();
        let validation_loss = match windows {
            0 => None,
            n => Some(self.trainer.validate(&self.corpus, 0..n, comm)?),
        };
        let trusted = self.trainer.trusted_shares(&self.corpus)?;
        let model = self.out.join("model");
        let format = export::format(&self.trainer.student);
        if comm.rank() == 0 {
            export::write(&self.trainer.student, self.recipe, &model)?;
        }
        self.speeds.sort_by(f64::total_cmp);
        let context = self.recipe.data.context;
        let parameters = self.trainer.student.parameters().iter().map(|p| p.1.len()).sum();
        let report = TrainReport {
            validation_loss,
            validation_tokens: windows * context,
            best: self.best,
            train_loss,
            steps: self.steps,
            tokens: self.steps * (self.recipe.train.batch * context) as u64,
            parameters,
            block_parameters: block_parameters(&self.trainer.student.decoder.config),
            seconds: started.elapsed().as_secs_f64(),
            tokens_per_s: self.speeds.get(self.speeds.len() / 2).copied().unwrap_or(0.0),
            ranks: comm.size(),
            trusted,
            quantizer: self.recipe.quantizer.clone(),
            model,
            format,
        };
        if comm.rank() == 0 {
            write_bytes(&self.out.join("report.json"), json(&report)?.as_bytes())?;
        }
        comm.barrier()?;
        Ok(report)
    }
}

fn step_record(
    report: StepReport,
    (step, tokens): (u64, u64),
    speed: Option<f64>,
    started: Instant,
) -> Record {
    Record {
        lr: Some(report.lr),
        grad_norm: Some(report.grad_norm),
        tokens_per_s: speed,
        seconds: Some(started.elapsed().as_secs_f64()),
        ..Record::new(Kind::Step, step, tokens, report.loss)
    }
}
