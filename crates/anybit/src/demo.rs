//! `anybit demo`: a small model that comes with the program, quantized by every method at several
//! widths, and each compared with the original on a text that none of them has seen.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Instant;

use anybit_eval::report::training::table_plot;
use anybit_eval::{BUILTIN_TEXT, Convention, ModelScores};
use anybit_io::Checkpoint;
use anybit_io::atomic::{PartialFolder, write_bytes};
use anybit_ptq::recipe::CalibrationRecipe;
use anybit_ptq::{Recipe, methods, transforms};
use serde::Serialize;

use crate::{Result, measure, quantize};

/// The model's files by name: a Llama of 1.3 million parameters, trained by `anybit train` on novels
/// in the public domain; recipe and licence are beside them in the source.
const MODEL: [(&str, &[u8]); 4] = [
    ("config.json", include_bytes!("../demo/config.json")),
    ("model.safetensors", include_bytes!("../demo/model.safetensors")),
    ("tokenizer.json", include_bytes!("../demo/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("../demo/tokenizer_config.json")),
];

/// Tokens of a window, for calibration and evaluation: what the model was trained on.
const CTX: usize = 128;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Folder for the models, the plot and the table.
    pub out: PathBuf,
    /// Replace an existing folder.
    pub force: bool,
    /// Widths, in bits.
    pub bits: Vec<u8>,
    /// Tokens to calibrate on.
    pub calibration_tokens: usize,
    /// Tokens to compare on.
    pub tokens: usize,
}

impl Options {
    /// The defaults for an output folder.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        let (calibration_tokens, tokens) = (3072, 2048);
        Self { out: out.into(), force: false, bits: vec![2, 3, 4], calibration_tokens, tokens }
    }
}

/// One quantized model.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its method; a transform stands for itself with weights rounded by GPTQ.
    pub method: String,
    /// Bits of a weight, and of activations and cache where a transform is named.
    pub bits: u8,
    /// Whether activations and cache are quantized too.
    pub activations: bool,
    /// Everything stored for the linears, in bits per weight.
    pub total_bits: Option<f64>,
    /// Bytes of the weight file.
    pub bytes: u64,
    /// KL divergence from the original, in nats per token.
    pub kl: Option<f64>,
    /// Perplexity.
    pub perplexity: f64,
    /// Seconds that quantizing took, with another method beside it.
    pub seconds: f64,
}

/// All of them.
#[derive(Debug, Clone, Serialize)]
pub struct DemoReport {
    /// Perplexity of the original.
    pub perplexity: f64,
    /// Bytes of its weight file.
    pub bytes: u64,
    /// The quantized models, by method.
    pub rows: Vec<Row>,
}

/// Writes the model's files into `folder`.
///
/// # Errors
/// The folder exists, or cannot be written.
pub fn write_model(folder: &Path, force: bool) -> Result<()> {
    let partial = PartialFolder::create(folder, false, force)?;
    for (name, bytes) in MODEL {
        write_bytes(&partial.path().join(name), bytes)?;
    }
    Ok(partial.finish()?)
}

/// Everything that is tried at `bits`: a name, and its recipe. Weights alone by every method, and
/// weights, activations and cache behind every transform.
fn recipes(bits: u8, tokens: usize) -> Vec<(String, Recipe)> {
    let calibration =
        CalibrationRecipe { tokens, seqlen: CTX, gradient_tokens: tokens, ..Default::default() };
    let base = Recipe { bits: f64::from(bits), calibration, ..Recipe::default() };
    let weights = methods::names().into_iter().map(|name| {
        let group_size = (!methods::allocating().contains(&name)).then_some(64);
        (name.to_string(), Recipe { method: name.into(), group_size, ..base.clone() })
    });
    let behind = transforms::names().into_iter().filter(|name| *name != transforms::NONE);
    let transformed = behind.map(|name| {
        let mut recipe = Recipe { method: "gptq".into(), transform: name.into(), ..base.clone() };
        (recipe.a_bits, recipe.kv_bits) = (Some(bits), Some(bits));
        // Little is learned, so that the demo takes a minute.
        let mut set = |key: &str, value: toml::Value| {
            recipe.transform_options.insert(key.into(), value);
        };
        match name {
            "flatquant" => {
                set("effort", "fast".into());
                set("seqlen", (CTX as i64).into());
                set("samples", 16.into());
            }
            "spinquant" => set("steps", 30.into()),
            _ => {}
        }
        (format!("{name} W{bits}A{bits}KV{bits}"), recipe)
    });
    weights.chain(transformed).collect()
}

/// A width, a name, and what is done.
type Job = (u8, String, Recipe);

/// Quantizes `jobs` into `folders`; the seconds that each took. Such small models leave threads
/// idle, so two go on beside each other: those that take gradients, whose cache one run at a time
/// can use, and the others.
fn quantize_all(
    checkpoint: &Checkpoint,
    jobs: &[Job],
    folders: &[PathBuf],
    force: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<f64>> {
    let mut lanes = [Vec::new(), Vec::new()];
    for (at, (_, _, recipe)) in jobs.iter().enumerate() {
        lanes[usize::from(recipe.rounding()?.needs().fisher.is_some())].push(at);
    }
    let (sender, done) = mpsc::channel::<Result<(usize, f64)>>();
    std::thread::scope(|scope| {
        for lane in lanes {
            let sender = sender.clone();
            scope.spawn(move || {
                for at in lane {
                    let (_, _, recipe) = &jobs[at];
                    let mut run = quantize::Options::new(&folders[at]);
                    (run.force, run.report_tokens) = (force, 0);
                    let start = Instant::now();
                    let result = quantize::run(checkpoint, recipe, &run, &mut |_| {});
                    let seconds = result.map(|_| (at, start.elapsed().as_secs_f64()));
                    // Nobody listens any more when the other lane failed.
                    if sender.send(seconds).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut seconds = vec![0.0; jobs.len()];
        progress(0, jobs.len() + 1);
        for (count, result) in done.into_iter().enumerate() {
            let (at, taken) = result?;
            seconds[at] = taken;
            progress(count + 1, jobs.len() + 1);
        }
        Ok(seconds)
    })
}

/// Runs the demo; `progress` hears models done and in all.
///
/// # Errors
/// The folder exists, or cannot be written.
pub fn run(options: &Options, progress: &mut dyn FnMut(usize, usize)) -> Result<DemoReport> {
    anybit_io::atomic::check_absent(&options.out, options.force)?;
    let reference = options.out.join("original");
    write_model(&reference, options.force)?;
    let checkpoint = Checkpoint::open(&reference)?;
    let jobs: Vec<Job> = options
        .bits
        .iter()
        .flat_map(|bits| {
            let all = recipes(*bits, options.calibration_tokens);
            all.into_iter().map(|(name, recipe)| (*bits, name, recipe))
        })
        .collect();
    let folders: Vec<PathBuf> = jobs
        .iter()
        .map(|(bits, name, _)| options.out.join(format!("{}-{bits}", name.replace(' ', "-"))))
        .collect();
    let seconds = quantize_all(&checkpoint, &jobs, &folders, options.force, progress)?;
    let models = std::iter::once(reference).chain(folders).collect();
    let scores = score(options, models)?;
    let found = jobs.into_iter().zip(seconds).zip(&scores[1..]);
    let rows = found.map(|(((bits, method, recipe), seconds), score)| Row {
        method,
        bits,
        activations: recipe.a_bits.is_some(),
        total_bits: score.bits_per_weight_total,
        bytes: score.file_bytes,
        kl: score.kl_mean,
        perplexity: score.perplexity,
        seconds,
    });
    let (perplexity, bytes) = (scores[0].perplexity, scores[0].file_bytes);
    let report = DemoReport { perplexity, bytes, rows: rows.collect() };
    write_bytes(&options.out.join("demo.svg"), plot(&options.bits, &report)?.as_bytes())?;
    Ok(report)
}

/// Compares all with the first, the original.
fn score(options: &Options, folders: Vec<PathBuf>) -> Result<Vec<ModelScores>> {
    let compare = measure::Options {
        reference: folders.first().cloned(),
        models: folders,
        ctx: CTX,
        convention: Convention::Hf,
        limit_tokens: Some(options.tokens),
    };
    measure::run(&compare, BUILTIN_TEXT, &mut |_, _| {})
}

/// KL divergence over bits, a line per method.
fn plot(bits: &[u8], report: &DemoReport) -> Result<String> {
    let short = |row: &Row| row.method.split(' ').next().unwrap_or_default().to_string();
    let mut names: Vec<String> = Vec::new();
    for row in &report.rows {
        if !names.contains(&short(row)) {
            names.push(short(row));
        }
    }
    let value = |name: &String, bits: u8| {
        let row = report.rows.iter().find(|row| short(row) == *name && row.bits == bits);
        row.and_then(|row| row.kl)
    };
    let values: Vec<Vec<Option<f64>>> =
        names.iter().map(|name| bits.iter().map(|b| value(name, *b)).collect()).collect();
    let columns: Vec<String> = bits.iter().map(|b| format!("{b} bits")).collect();
    Ok(table_plot(&names, &columns, &values, "KL divergence, nats per token")?)
}
