//! `anybit train`: a recipe file to a trained model, with its loss plot; and how fast training is.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anybit_eval::report::training::{Curve, loss_plot};
use anybit_grad::train::distributed::{Alone, Communicator, launched};
use anybit_grad::train::log::{JsonLines, Kind};
use anybit_grad::train::model::{initialize, llama};
use anybit_grad::train::quantized::LeafGradients;
use anybit_grad::train::{
    Event, Precision, QuantizedDecoder, QuantizerRecipe, RunOptions, TrainRecipe, TrainReport,
    TrainSettings,
};
use anybit_grad::{AdamW, Tape, Update, clip_factor, global_norm};
use anybit_io::IoError;
use anybit_io::atomic::write_bytes;
use serde::Serialize;

use crate::{Error, Result};

/// Reads a recipe; `sets` are `KEY=VALUE` with dotted keys and TOML values, which win over the file.
///
/// # Errors
/// A file that cannot be read, TOML that is none, unknown keys, values of another type.
pub fn read_recipe(path: &Path, sets: &[String]) -> Result<TrainRecipe> {
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
        set_key(&mut table, key, parse_value(value))
            .map_err(|what| Error::Usage(format!("--set {set}: {what}")))?;
    }
    table.try_into().map_err(fail)
}

/// A TOML value, or text as it is.
fn parse_value(text: &str) -> toml::Value {
    let parsed = toml::from_str::<toml::Table>(&format!("value = {text}"));
    let value = parsed.ok().and_then(|mut table| table.remove("value"));
    value.unwrap_or_else(|| toml::Value::String(text.into()))
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

/// Times whole optimizer steps.
///
/// # Errors
/// Estimators that do not fit.
pub fn speed(test: &SpeedTest) -> Result<SpeedReport> {
    let SpeedTest { layers, hidden, heads, ffn, vocab, context, batch, .. } = *test;
    let config = llama(layers, hidden, heads, ffn, vocab, context);
    config.validate(&PathBuf::from("the shape"))?;
    let decoder = initialize(&config, 0, context);
    let mut student = QuantizedDecoder::new(decoder, test.quantizer.clone(), Precision::F32)?;
    let settings = TrainSettings::new(test.steps as u64, batch, 1e-3);
    let mut adam = AdamW::new(settings.adamw());
    let mut rng = anybit_core::rng::SplitMix64::new(0);
    let mut tokens = || (0..batch * context).map(|_| rng.below(vocab) as u32).collect::<Vec<u32>>();
    student.initialize_activations(&tokens()[..context], context)?;
    let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
    let (mut speeds, mut losses) = (Vec::new(), Vec::new());
    for step in 0..test.steps + 3 {
        let (inputs, targets) = (tokens(), tokens());
        let start = Instant::now();
        let weights = student.weights(&mut weights_tape, true);
        let leaves = student.leaves(&weights, &weights_tape, &mut tape, true);
        let output = student.forward(&mut tape, &leaves, &inputs, context)?;
        let loss = tape.linear_cross_entropy(output.hidden, leaves.vars.head, &targets);
        losses.push(tape.data(loss)[0] as f64);
        tape.backward(loss);
        let mut sum = LeafGradients::default();
        student.collect(&mut tape, &leaves, &mut sum);
        tape.reset();
        let grads = student.finish(&weights, &mut weights_tape, sum);
        weights_tape.reset();
        let factor = clip_factor(global_norm(grads.iter().map(|g| &g[..])), settings.clip);
        let mut parameters = student.parameters();
        let mut updates: Vec<Update<'_>> = parameters
            .iter_mut()
            .zip(&grads)
            .map(|((_, t, decay), grad)| Update {
                value: t.data_mut(),
                grad,
                lr: settings.lr,
                decay: *decay,
            })
            .collect();
        adam.step(&mut updates, factor);
        grads.into_iter().for_each(|g| weights_tape.recycle(g));
        if step >= 3 {
            speeds.push((batch * context) as f64 / start.elapsed().as_secs_f64());
        }
    }
    speeds.sort_by(f64::total_cmp);
    Ok(SpeedReport {
        tokens_per_s: speeds[speeds.len() / 2],
        first_loss: losses[0],
        last_loss: losses[losses.len() - 1],
        parameters: student.parameters().iter().map(|p| p.1.len()).sum(),
        threads: rayon::current_num_threads(),
    })
}
