//! `anybit train`: a recipe file to a trained model, with its loss plot; and how fast training is.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use anybit_core::rng::SplitMix64;
use anybit_eval::report::training::{Curve, loss_plot};
use anybit_grad::train::distributed::{Alone, Communicator, launched};
use anybit_grad::train::log::{JsonLines, Kind};
use anybit_grad::train::model::initialize;
use anybit_grad::train::trainer::{NotFinite, Sequences, cross_entropy};
use anybit_grad::train::{
    Event, Precision, QuantizedDecoder, QuantizerRecipe, RunOptions, TrainRecipe, TrainReport,
    TrainSettings, Trainer,
};
use anybit_io::atomic::write_bytes;
use anybit_io::{IoError, ModelConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads a recipe; `sets` are `KEY=VALUE` with dotted keys and TOML values, which win over the file.
///
/// # Errors
/// A file that cannot be read, TOML that is none, unknown keys, values of another type.
pub fn read_recipe(path: &Path, sets: &[String]) -> Result<TrainRecipe> {
    read_toml(path, sets)
}

/// [`read_recipe`] of any kind of recipe.
///
/// # Errors
/// As there.
pub fn read_toml<T: DeserializeOwned>(path: &Path, sets: &[String]) -> Result<T> {
    let text = std::fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
    let fail = |e: toml::de::Error| Error::Usage(format!("{}: {e}", path.display()));
    if sets.is_empty() {
        return toml::from_str(&text).map_err(fail);
    }
    let mut table: toml::Table = toml::from_str(&text).map_err(fail)?;
    for set in sets {
        let (key, value) = set
            .split_once('=')
            .ok_or_else(|| Error::Usage(format!("--set {set}: KEY=VALUE is needed")))?;
        let value = value.parse().unwrap_or_else(|_| toml::Value::String(value.into()));
        set_key(&mut table, key, value)
            .map_err(|what| Error::Usage(format!("--set {set}: {what}")))?;
    }
    table.try_into().map_err(fail)
}

fn set_key(
    table: &mut toml::Table,
    key: &str,
    value: toml::Value,
) -> std::result::Result<(), String> {
    let Some((section, rest)) = key.split_once('.') else {
        table.insert(key.into(), value);
        return Ok(());
    };
    let entry = table.entry(section).or_insert_with(|| toml::Value::Table(toml::Table::new()));
    match entry.as_table_mut() {
        Some(table) => set_key(table, rest, value),
        None => Err(format!("{section} is no section")),
    }
}

/// The processes that train together: those that an MPI launcher started, or this one alone.
///
/// # Errors
/// When a launcher started this program, which was built without MPI.
fn communicator() -> Result<Box<dyn Communicator>> {
    #[cfg(feature = "mpi")]
    if launched() {
        return Ok(Box::new(anybit_grad::train::distributed::Mpi::start().map_err(train_error)?));
    }
    #[cfg(not(feature = "mpi"))]
    if launched() {
        let what = "started by an MPI launcher, but built without MPI: build with --features mpi";
        return Err(Error::Usage(what.into()));
    }
    Ok(Box::new(Alone))
}

#[cfg(feature = "mpi")]
fn train_error(e: impl Into<anybit_grad::train::TrainError>) -> Error {
    Error::Train(e.into())
}

/// Trains as `recipe` says and draws the losses into `loss.svg` of its folder.
///
/// # Errors
/// As [`anybit_grad::train::run`].
pub fn run(
    recipe: &TrainRecipe,
    options: RunOptions,
    watch: &mut dyn FnMut(Event<'_>),
) -> Result<TrainReport> {
    let mut comm = communicator()?;
    let rank = comm.rank();
    let report = anybit_grad::train::run(recipe, options, &mut *comm, watch);
    #[cfg(feature = "mpi")]
    if let Err(error) = &report
        && launched()
    {
        comm.abort(&error.to_string());
    }
    let report = report?;
    if rank == 0 {
        draw(&recipe.out)?;
    }
    Ok(report)
}

fn draw(out: &Path) -> Result<()> {
    let records =
        JsonLines::read(&out.join("log.jsonl")).map_err(anybit_grad::train::TrainError::from)?;
    let curve = |name: &str, kind: Kind, markers: bool| Curve {
        name: name.into(),
        points: records
            .iter()
            .filter(|r| r.kind == kind)
            .map(|r| (r.tokens as f64, r.loss))
            .collect(),
        markers,
    };
    let curves =
        [curve("training", Kind::Step, false), curve("validation", Kind::Validation, true)];
    let drawn: Vec<Curve> = curves.into_iter().filter(|c| !c.points.is_empty()).collect();
    if !drawn.is_empty() {
        write_bytes(&out.join("loss.svg"), loss_plot(&drawn)?.as_bytes())?;
    }
    Ok(())
}

/// A model to time, on random tokens.
#[derive(Debug, Clone)]
pub struct SpeedTest {
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
    /// Tokens of a sequence.
    pub context: usize,
    /// Sequences of a step.
    pub batch: usize,
    /// Steps that are timed, after three that are not.
    pub steps: usize,
    /// Estimators.
    pub quantizer: QuantizerRecipe,
}

/// How fast it trained.
#[derive(Debug, Clone, Serialize)]
pub struct SpeedReport {
    /// Tokens per second of a step: the median.
    pub tokens_per_s: f64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last.
    pub last_loss: f64,
    /// Parameters in all.
    pub parameters: usize,
    /// Threads.
    pub threads: usize,
}

/// Sequences without meaning.
struct RandomTokens {
    rng: SplitMix64,
    vocab: usize,
    context: usize,
}

impl Sequences for RandomTokens {
    fn batch(&mut self, positions: Range<u64>) -> (Vec<u32>, Vec<u32>) {
        let tokens = positions.count() * self.context;
        let mut draw = || (0..tokens).map(|_| self.rng.below(self.vocab) as u32).collect();
        (draw(), draw())
    }
}

/// Times whole optimizer steps.
///
/// # Errors
/// Estimators that do not fit.
pub fn speed(test: &SpeedTest) -> Result<SpeedReport> {
    const UNTIMED: usize = 3;
    let SpeedTest { layers, hidden, heads, ffn, vocab, context, batch, .. } = *test;
    let config = ModelConfig::llama(layers, hidden, heads, ffn, vocab, context);
    config.validate(Path::new("the shape"))?;
    let decoder = initialize(&config, 0, context);
    let mut student = QuantizedDecoder::new(decoder, test.quantizer.clone(), Precision::F32)?;
    let mut sequences = RandomTokens { rng: SplitMix64::new(0), vocab, context };
    student.initialize_activations(&sequences.batch(0..1).0, context)?;
    let steps = (test.steps + UNTIMED) as u64;
    let constant = TrainSettings::new(steps, batch, 1e-3);
    let settings = TrainSettings { warmup: 0.0, lr_first: 1.0, lr_last: 1.0, ..constant };
    let mut trainer = Trainer::new(student, &settings, steps, context);
    let (mut speeds, mut losses) = (Vec::new(), Vec::new());
    for step in 0..test.steps + UNTIMED {
        let start = Instant::now();
        let report = trainer.step(&mut sequences, &mut Alone, &mut cross_entropy)?;
        let report = report.map_err(|NotFinite { what, place }| {
            Error::Usage(format!("step {step}: {what} ({place})"))
        })?;
        losses.push(report.loss);
        if step >= UNTIMED {
            speeds.push((batch * context) as f64 / start.elapsed().as_secs_f64());
        }
    }
    speeds.sort_by(f64::total_cmp);
    Ok(SpeedReport {
        tokens_per_s: speeds[speeds.len() / 2],
        first_loss: losses[0],
        last_loss: losses[losses.len() - 1],
        parameters: trainer.student.parameters().iter().map(|p| p.1.len()).sum(),
        threads: rayon::current_num_threads(),
    })
}
