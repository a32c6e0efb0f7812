//! `anybit eval`.

use std::path::{Path, PathBuf};

use anybit::Result;
use anybit::eval::{BUILTIN_TEXT, Convention, ModelScores, read_text};
use anybit::io::Checkpoint;
use anybit::measure::{Options, run as measure};
use anybit::stages::unquantized;
use clap::ValueEnum;
use serde_json::json;

use super::output::{Terminal, bytes_text, or_dash, print_table, written};

/// Measure models on a text: perplexity, and divergence from a reference model.
///
/// Perplexities of different conventions or window lengths are not comparable. The divergence
/// KL(reference ‖ model), in nats per token, is the figure to judge a quantization by.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit eval model --text book.txt
  anybit eval model-4bit model-3bit --text book.txt --reference model --limit-tokens 32768
  anybit eval model-w4a4kv4 --stages --reference model
  anybit eval model.gguf --text wiki.raw --convention llamacpp --ctx 512 --json scores.json")]
pub struct Args {
    /// Models: folders or .gguf files.
    #[arg(required = true)]
    models: Vec<PathBuf>,

    /// Text to measure on; a short public-domain text by default.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Model to compare with.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,

    /// Score the stages of each quantized model in one run: the reference, the model as its
    /// transform left it, and the quantized one.
    #[arg(long, requires = "reference")]
    stages: bool,

    /// Folder of the cache that holds transformed models [default: .anybit-cache beside each
    /// model].
    #[arg(long, value_name = "DIR", requires = "stages")]
    cache: Option<PathBuf>,

    /// Tokens of a window.
    #[arg(long, default_value_t = 2048)]
    ctx: usize,

    /// Which positions are scored: all of disjoint windows (hf), or the second half of each
    /// (llamacpp).
    #[arg(long, value_enum, default_value = "hf")]
    convention: ConventionArg,

    /// Tokens to read at most.
    #[arg(long, value_name = "N")]
    limit_tokens: Option<usize>,

    /// Write the scores as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ConventionArg {
    Hf,
    Llamacpp,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let text = match &args.text {
        Some(path) => read_text(path)?,
        None => BUILTIN_TEXT.to_string(),
    };
    let convention = match args.convention {
        ConventionArg::Hf => Convention::Hf,
        ConventionArg::Llamacpp => Convention::LlamaCpp,
    };
    let mut models = args.models;
    if args.stages {
        models = with_stages(models, args.reference.as_deref(), args.cache.as_deref())?;
    }
    let options = Options {
        models,
        reference: args.reference,
        ctx: args.ctx,
        convention,
        limit_tokens: args.limit_tokens,
    };
    let bar = terminal.bar("measuring", 0);
    let scores = measure(&options, &text, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if written(args.json.as_deref(), &json!({"models": scores}))? {
        return Ok(());
    }
    print_scores(&scores, options.reference.is_some());
    Ok(())
}

/// The reference, then every model behind what its transform made of the reference.
fn with_stages(
    models: Vec<PathBuf>,
    reference: Option<&Path>,
    cache: Option<&Path>,
) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = reference.map(Path::to_owned).into_iter().collect();
    for model in models {
        let packed = Checkpoint::open(&model)?;
        let stage = unquantized(&packed, reference, cache)?.path;
        if !all.contains(&stage) {
            all.push(stage);
        }
        all.push(model);
    }
    Ok(all)
}

fn print_scores(scores: &[ModelScores], compared: bool) {
    let mut header = vec!["model", "size", "bits", "perplexity"];
    if compared {
        header.extend(["KL mean", "KL median", "KL p99", "top-1", "Δp mean"]);
    }
    header.push("tok/s");
    let mut rows = vec![header.into_iter().map(String::from).collect::<Vec<_>>()];
    for s in scores {
        let mut row = vec![
            s.path.display().to_string(),
            bytes_text(s.file_bytes),
            or_dash(s.bits_per_weight_total, 3),
            format!("{:.3} ± {}", s.perplexity, or_dash(s.perplexity_se, 3)),
        ];
        if compared {
            let half = |ci: Option<[f64; 2]>| ci.map(|[low, high]| (high - low) / 2.0);
            let kl = format!("{} ± {}", or_dash(s.kl_mean, 5), or_dash(half(s.kl_ci95), 5));
            let top = format!(
                "{} ± {}%",
                or_dash(s.top1_agreement.map(|t| t * 100.0), 2),
                or_dash(half(s.top1_ci95).map(|t| t * 100.0), 2)
            );
            let delta = format!(
                "{} ± {}%",
                or_dash(s.delta_p_mean.map(|d| d * 100.0), 3),
                or_dash(half(s.delta_p_ci95).map(|d| d * 100.0), 3)
            );
            row.extend([kl, or_dash(s.kl_median, 5), or_dash(s.kl_p99, 4), top, delta]);
        }
        row.push(format!("{:.0}", s.prefill_tokens_per_s));
        rows.push(row);
    }
    print_table(&rows);
    if let Some(s) = scores.first() {
        println!(
            "\nconvention {}, windows of {}, {} tokens scored; ± is one standard error for \
             perplexity, 95% over windows for the rest; bits per weight count everything stored \
             for the linears of the blocks",
            s.convention, s.ctx, s.tokens
        );
    }
}
