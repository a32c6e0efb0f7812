//! `anybit bench`.

use std::path::PathBuf;

use anybit::Result;
use anybit::bench::{Model, Options, Report, run as time};
use anybit::io::Checkpoint;
use anybit::runtime::Decoder;

use super::KvType;
use super::output::{Terminal, bytes_text, or_dash, print_table, written};

/// Time a model: how fast it reads a prompt and how fast it generates.
///
/// Measured as llama.cpp's llama-bench does. Prefill (pp there) reads --prompt tokens at once and
/// computes the logits behind the last. Decode (tg there) starts from an empty cache and reads
/// --gen tokens one at a time, so that the first step has a context of one token. Tokens are random
/// with a fixed seed, nothing is sampled, and every repetition starts from an empty cache. Rates
/// are medians over the repetitions; those of several sequences count the tokens of all.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit bench model-4bit
  anybit bench model-4bit --threads 2 --batch 1,4,16 --json figures.json
  anybit bench model.gguf --prompt 0 --gen 256 --repeat 10")]
pub struct Args {
    /// The model: a folder or a .gguf file.
    model: PathBuf,

    /// Tokens of the prompt; 0 leaves prefill out.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,

    /// Tokens to generate in each sequence; 0 leaves decoding out.
    #[arg(long = "gen", value_name = "N", default_value_t = 128)]
    generate: usize,

    /// Sequences decoded together, each number a test of its own, separated by commas; 1 is always
    /// among them.
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_values_t = [1usize, 8])]
    batch: Vec<usize>,

    /// How keys and values are cached where the model does not say it.
    #[arg(long, value_enum, default_value_t = KvType::F16)]
    kv_type: KvType,

    /// Repetitions that are timed.
    #[arg(long, value_name = "N", default_value_t = 5)]
    repeat: u16,

    /// Repetitions before them, which bring the weights into memory.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u16,

    /// Write the figures as JSON to this file (- for standard output, in place of the table).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let options = Options {
        prompt: args.prompt,
        generate: args.generate,
        batches: args.batch,
        warmup: args.warmup.into(),
        repeat: args.repeat.into(),
        kv: args.kv_type.into(),
    };
    let checkpoint = Checkpoint::open(&args.model)?;
    let context = options.context(&checkpoint.config)?;
    let decoder = Decoder::load(&checkpoint, context)?;
    let bar = terminal.bar("timing", 0);
    let mut report = time(&decoder, &options, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    report.model = Some(Model::of(&checkpoint)?);
    if written(args.json.as_deref(), &report)? {
        return Ok(());
    }
    print_report(&report);
    Ok(())
}

fn print_report(report: &Report) {
    let header = ["test", "sequences", "tokens/s", "mean ± sd"];
    let mut rows = vec![header.map(String::from).to_vec()];
    for row in &report.batches {
        let prefill = (format!("prefill {}", report.prompt), &row.prefill);
        let decode = (format!("decode {}", report.generate), &row.decode);
        for (test, rates) in [prefill, decode] {
            let Some(rates) = rates else { continue };
            rows.push(vec![
                test,
                row.batch.to_string(),
                format!("{:.2}", rates.median),
                format!("{:.2} ± {}", rates.mean, or_dash(rates.sd, 2)),
            ]);
        }
    }
    print_table(&rows);
    println!();
    if let Some(model) = &report.model {
        println!(
            "{} ({}), {:.1} M parameters, {} in weight files, {:.3} bits per weight in the blocks",
            model.path.display(),
            model.format,
            report.parameters as f64 / 1e6,
            bytes_text(model.file_bytes),
            model.bits_per_weight_total,
        );
    }
    println!(
        "{} threads, {} kernels; medians of {} repetitions",
        report.threads, report.isa, report.repeat
    );
    let share = report.stream_share.map(|s| format!("; decoding takes {:.0}% of it", s * 100.0));
    println!(
        "a token reads {} of weights; memory gives {:.1} GB/s to these threads{}",
        bytes_text(report.bytes_per_token as u64),
        report.stream_gb_per_s,
        share.unwrap_or_default(),
    );
    let (weights, cache) = (report.weight_bytes as u64, report.kv_bytes as u64);
    if let Some(rss) = report.rss_bytes {
        println!(
            "{} of memory: {} of weights, {} of cache, {} of scratch, vocabulary and program",
            bytes_text(rss),
            bytes_text(weights),
            bytes_text(cache),
            bytes_text(rss.saturating_sub(weights + cache)),
        );
    }
}
