//! `anybit quantize`: a plan, the run, and a report of what it did to the model.

use std::path::{Path, PathBuf};

use anybit_core::{Site, TransformSpec};
use anybit_eval::report::{ActivationRow, BlockRow, CitationRow, MatrixRow, Quality, Report};
use anybit_eval::{BUILTIN_TEXT, Convention, HiddenStates, compare_hidden, read_text};
use anybit_io::atomic::write_bytes;
use anybit_io::native::{Manifest, SiteRecord};
use anybit_io::{Checkpoint, Weight};
use anybit_ptq::methods::{self, Citation};
use anybit_ptq::{
    Calibration, Event, Plan, QuantizeOptions, Quantized, Recipe, cache_folder, final_states,
    transforms,
};

use crate::{Error, Result};

/// Tokens of a window of the report's evaluation.
const REPORT_CTX: usize = 512;

/// Where to write, and what to measure on the way.
#[derive(Debug, Clone)]
pub struct Options {
    /// The folder to write.
    pub out: PathBuf,
    /// Replace an existing output.
    pub force: bool,
    /// Continue an interrupted run.
    pub resume: bool,
    /// Text for the report's before-and-after figures; the built-in one by default. Never the one
    /// that is calibrated on.
    pub report_text: Option<PathBuf>,
    /// Tokens of it; 0 for a report without these figures.
    pub report_tokens: usize,
    /// Folder of what other goals can use again; none for `.anybit-cache` beside the output.
    pub cache: Option<PathBuf>,
}

impl Options {
    /// The defaults for an output folder.
    pub fn new(out: impl Into<PathBuf>) -> Self {
        Self {
            out: out.into(),
            force: false,
            resume: false,
            report_text: None,
            report_tokens: 4096,
            cache: None,
        }
    }
}

/// What came out, for printing.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The report that was written.
    pub report: Report,
    /// Seconds per block.
    pub block_seconds: Vec<f64>,
}

/// Quantizes `checkpoint` and writes the packed folder with its report.
///
/// # Errors
/// A recipe or plan that cannot be carried out, a text that cannot be used, and everything that
/// reading and writing can meet.
pub fn run(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    options: &Options,
    observe: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    refuse_self(&checkpoint.path, &options.out)?;
    anybit_io::atomic::check_absent(&options.out, options.force)?;
    let early = Plan::new(checkpoint, recipe, Some(&options.out))?;
    if !early.problems.is_empty() {
        return Err(anybit_ptq::PtqError::Recipe(early.problems.join("\n")).into());
    }
    let calibration = calibrate(checkpoint, recipe)?;
    let (text_name, monitor) = monitor_windows(checkpoint, options)?;
    let root = cache_folder(options.cache.as_deref(), &options.out);
    let transformed = transforms::prepare(checkpoint, recipe, &calibration, &root, &mut *observe)?;
    let (model, plan, preserved) = match &transformed {
        None => (checkpoint, early, None),
        Some(t) => {
            let divergence = check_preserved(checkpoint, &t.checkpoint, &monitor)?;
            let plan = Plan::new(&t.checkpoint, recipe, Some(&options.out))?;
            (&t.checkpoint, plan, Some(divergence))
        }
    };
    let run_options = QuantizeOptions {
        out: options.out.clone(),
        force: options.force,
        resume: options.resume,
        monitor,
        cache: options.cache.clone(),
    };
    let done = anybit_ptq::quantize(model, recipe, &plan, &calibration, &run_options, observe)?;
    let manifest = Manifest::read(done.folder())?;
    let quality = quality(model, &manifest, &done, &run_options.monitor, text_name)?;
    let resolved = recipe.resolved()?;
    let report = Report {
        transform_divergence: preserved,
        ..report(checkpoint, &resolved, &manifest, &done, quality)
    };
    write_report(done.folder(), &report)?;
    let block_seconds = done.blocks.iter().map(|b| b.seconds).collect();
    done.finish()?;
    Ok(Outcome { report, block_seconds })
}

/// Most that a transformed model may diverge from the original, in nats per token, computed in f32.
const PRESERVED: f64 = 1e-6;
/// Tokens that this is measured on when there is no text for it.
const PROBE: usize = 256;

/// Divergence of the transformed model from the original before anything is rounded.
///
/// # Errors
/// It is more than rounding of f32 explains: the transform is not what it should be.
fn check_preserved(
    original: &Checkpoint,
    transformed: &Checkpoint,
    monitor: &[Vec<u32>],
) -> Result<f64> {
    let vocab = original.config.vocab_size as u32;
    let probe: Vec<u32> =
        (0..PROBE as u32).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
    let windows = match monitor.first() {
        Some(first) => vec![first.clone()],
        None => vec![probe],
    };
    let (before, _) = final_states(original, &windows)?;
    let (after, _) = final_states(transformed, &windows)?;
    let (head, new_head) =
        (original.weight(head_name(original))?, transformed.weight(head_name(transformed))?);
    let reference = HiddenStates { states: &before, head: &head };
    let model = HiddenStates { states: &after, head: &new_head };
    let (_, scores) = compare_hidden(&reference, &model, &windows, Convention::Hf)?;
    let divergence = scores.kl_mean.unwrap_or_default();
    if divergence <= PRESERVED {
        return Ok(divergence);
    }
    Err(Error::Usage(format!(
        "before any rounding the transformed model diverges from the original by {divergence:e} \
         nats per token, more than {PRESERVED:e}: the transform does not preserve the function; \
         nothing was written"
    )))
}

/// The sequences that a recipe calibrates on; none for a method that needs no data.
///
/// # Errors
/// A text that cannot be read, or too few tokens.
pub fn calibrate(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Calibration> {
    let transforms = recipe.transformer()?.is_some_and(|t| t.needs_data());
    if !recipe.rounding()?.needs().data() && !transforms {
        return Ok(Calibration::none());
    }
    let tokenizer = checkpoint.tokenizer()?;
    Ok(Calibration::sample(&recipe.calibration, recipe.seed, &tokenizer)?)
}

/// Refuses an output in the place of its own source, which would destroy the source.
///
/// # Errors
/// Both are the same folder or file.
pub fn refuse_self(source: &Path, out: &Path) -> Result<()> {
    let (source, place) = (source.canonicalize().ok(), out.canonicalize().ok());
    match source.zip(place).is_some_and(|(source, place)| source.starts_with(place)) {
        true => Err(Error::Usage(format!(
            "{} is the model itself or holds it; choose another output",
            out.display()
        ))),
        false => Ok(()),
    }
}

/// Windows of the report's text. A model without a tokenizer gets none.
fn monitor_windows(checkpoint: &Checkpoint, options: &Options) -> Result<(String, Vec<Vec<u32>>)> {
    let (name, text) = match &options.report_text {
        Some(path) => {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (name, read_text(path)?)
        }
        None => ("built-in (public domain)".to_string(), BUILTIN_TEXT.to_string()),
    };
    if options.report_tokens == 0 {
        return Ok((name, Vec::new()));
    }
    let tokens = checkpoint.tokenizer()?.encode(&text, true)?;
    let limit = Some(options.report_tokens.max(REPORT_CTX));
    let windows = Convention::Hf.windows(&tokens, REPORT_CTX, limit, None)?;
    Ok((name, windows))
}

/// The head of the quantized model, from the folder that was just written.
fn packed_head(checkpoint: &Checkpoint, manifest: &Manifest, folder: &Path) -> Result<Weight> {
    let name = head_name(checkpoint);
    if !manifest.quantized.contains_key(name) {
        return Ok(checkpoint.weight(name)?);
    }
    Ok(Checkpoint::open(folder)?.weight(name)?)
}

fn head_name(checkpoint: &Checkpoint) -> &'static str {
    match checkpoint.config.tie_embeddings {
        true => anybit_ptq::plan::EMBEDDING,
        false => anybit_ptq::plan::HEAD,
    }
}

fn quality(
    checkpoint: &Checkpoint,
    manifest: &Manifest,
    done: &Quantized,
    windows: &[Vec<u32>],
    text: String,
) -> Result<Option<Quality>> {
    let Some((original, quantized)) = &done.monitored else { return Ok(None) };
    let head = checkpoint.weight(head_name(checkpoint))?;
    let packed = packed_head(checkpoint, manifest, done.folder())?;
    let reference = HiddenStates { states: original, head: &head };
    let model = HiddenStates { states: quantized, head: &packed };
    let (before, after) = compare_hidden(&reference, &model, windows, Convention::Hf)?;
    Ok(Some(Quality {
        text,
        convention: after.convention.to_string(),
        ctx: after.ctx,
        tokens: after.tokens,
        original_perplexity: before.perplexity,
        quantized_perplexity: after.perplexity,
        kl_mean: after.kl_mean.unwrap_or_default(),
        kl_ci95: after.kl_ci95,
        kl_median: after.kl_median.unwrap_or_default(),
        kl_p99: after.kl_p99.unwrap_or_default(),
        top1_agreement: after.top1_agreement.unwrap_or_default(),
    }))
}

fn report(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    manifest: &Manifest,
    done: &Quantized,
    quality: Option<Quality>,
) -> Report {
    let method = methods::find(&recipe.method);
    let transform = transforms::find(&recipe.transform);
    let named = method.and_then(|m| Some((m.name(), m.citation()?)));
    let of_transform = transform.and_then(|t| Some((t.name(), t.citation()?)));
    let citations = of_transform.into_iter().chain(named).map(citation).collect();
    let (codes, total) = manifest.bits_per_weight();
    let matrices = manifest.quantized.iter().map(|(tensor, r)| {
        let weights = (r.rows * r.cols) as f64;
        MatrixRow {
            tensor: tensor.clone(),
            rows: r.rows,
            cols: r.cols,
            bits: r.code_bits as f64 / weights,
            total_bits: r.bytes as f64 * 8.0 / weights,
            bytes: r.bytes,
            relative_error: r.relative_error,
            output_error: r.output_error,
        }
    });
    let blocks =
        done.blocks.iter().map(|b| BlockRow { block: b.block, hidden_error: b.hidden_error });
    Report {
        base_model: manifest.base_model.clone(),
        method: recipe.method.clone(),
        method_summary: method.map_or(String::new(), |m| m.summary().to_string()),
        recipe_toml: toml::to_string(&recipe.published()).unwrap_or_default(),
        command: None,
        calibration: manifest.calibration.clone(),
        bits_per_weight_codes: codes,
        bits_per_weight_total: total,
        weight_file_bytes: done.weight_bytes,
        predicted_error: done.predicted,
        original_file_bytes: checkpoint.weight_file_bytes(),
        license: license(checkpoint),
        matrices: matrices.collect(),
        blocks: blocks.collect(),
        quality,
        transform: (recipe.transform != transforms::NONE).then(|| recipe.transform.clone()),
        transform_summary: transform.map_or(String::new(), |t| t.summary().to_string()),
        transform_divergence: None,
        activations: activation_rows(manifest, checkpoint.config.num_layers),
        citations,
        anybit_version: manifest.anybit_version.clone(),
    }
}

fn citation((method, c): (&str, Citation)) -> CitationRow {
    let (reference, link) = (c.reference.to_string(), c.link.to_string());
    CitationRow { method: method.to_string(), reference, link }
}

/// One row for each kind of site.
fn activation_rows(manifest: &Manifest, blocks: usize) -> Vec<ActivationRow> {
    let mut rows = Vec::new();
    for site in Site::ALL {
        let suffix = format!(".{}", site.name());
        let something = |r: &&SiteRecord| r.transform.is_some() || r.quantizer.is_some();
        let of_kind = || manifest.sites.iter().filter(|(n, _)| n.ends_with(&suffix));
        let own = || of_kind().map(|(_, r)| r).filter(something);
        if own().next().is_none() {
            continue;
        }
        let quantizer = own().find_map(|r| r.quantizer.as_ref());
        rows.push(ActivationRow {
            site: site.name().into(),
            transform: own().find_map(|r| r.transform.as_ref()).map(describe_transform),
            transformed_blocks: own().filter(|r| r.transform.is_some()).count(),
            blocks,
            bits: quantizer.map(|q| q.mean_bits()),
            symmetric: quantizer.map(|q| q.symmetric),
        });
    }
    rows
}

/// A transform in a few words; block Hadamard maps are named as such.
fn describe_transform(spec: &TransformSpec) -> String {
    match spec {
        TransformSpec::Diagonal { size } => format!("{size} factors"),
        TransformSpec::Hadamard { size, block } if size == block => format!("Hadamard {size}"),
        TransformSpec::Hadamard { size, block } => {
            format!("Hadamard in blocks of {block} ({size} has no Hadamard matrix)")
        }
        TransformSpec::Kronecker { sizes: (1, n), .. } => format!("dense {n}×{n}"),
        TransformSpec::Kronecker { sizes: (a, b), .. } => format!("Kronecker {a}⊗{b}"),
        TransformSpec::HeadSplit { high, head_dim, .. } => {
            format!("last {high} of {head_dim} channels of each head to the end")
        }
        TransformSpec::Compose { steps } => {
            steps.iter().map(describe_transform).collect::<Vec<_>>().join(", then ")
        }
    }
}

/// Licence of the base model, as its own files name it.
fn license(checkpoint: &Checkpoint) -> Option<String> {
    if let Some(gguf) = checkpoint.gguf() {
        return gguf.metadata.get_str("general.license").map(str::to_owned);
    }
    let card = std::fs::read_to_string(checkpoint.path.join("README.md")).ok()?;
    let front = card.strip_prefix("---")?.split("\n---").next()?;
    let line = front.lines().find_map(|l| l.strip_prefix("license:"))?;
    Some(line.trim().to_string()).filter(|l| !l.is_empty())
}

fn write_report(folder: &Path, report: &Report) -> Result<()> {
    write_bytes(&folder.join("report.json"), report.to_json().as_bytes())?;
    write_bytes(&folder.join("report.html"), report.to_html()?.as_bytes())?;
    write_bytes(&folder.join("README.md"), report.to_model_card().as_bytes())?;
    Ok(())
}
