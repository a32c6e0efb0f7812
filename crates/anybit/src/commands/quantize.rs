//! `anybit quantize`.

use std::path::PathBuf;
use std::time::Instant;

use anybit::io::Checkpoint;
use anybit::ptq::{Event, Plan, Recipe};
use anybit::quantize::{Options, Outcome};
use anybit::{Error, Result, machine};
use clap::ValueEnum;
use serde_json::json;

use super::output::{Terminal, bytes_text, or_dash, print_table, write_json};

/// Quantize a model and write it packed, with a report.
///
/// Every flag is a key of the recipe of the same name; flags win over --recipe. The resolved
/// recipe is stored in the output.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit quantize model --bits 4 -o model-4bit
  anybit quantize model --method rtn --bits 8 --group-size -1 -o model-8bit
  anybit quantize model --bits 3 --layer '*.down_proj=bits:4' --skip '*.layers.0.*' -o mixed
  anybit quantize model --recipe my.toml --dry-run -o out
  anybit quantize model --bits 4 --calib my-text.txt --resume -o model-4bit")]
pub struct Args {
    /// The model: a Hugging Face folder or a .gguf file.
    model: PathBuf,

    /// Folder to write.
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,

    /// Recipe file (TOML).
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// How weights are rounded [default: gptq].
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(anybit::ptq::methods::names()))]
    method: Option<String>,

    /// Bits of a weight's code, 1 to 8 [default: 4].
    #[arg(long, short)]
    bits: Option<u8>,

    /// Columns that share a scale, a multiple of 8; -1 for the whole row [default: 128].
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    group_size: Option<i64>,

    /// Asymmetric grids, with a zero point per group.
    #[arg(long)]
    asym: bool,

    /// How a group's scale is fitted [default: min-max].
    #[arg(long, value_enum)]
    scale: Option<ScaleArg>,

    /// GPTQ: round columns in order of falling activation energy; groups are static, so it costs
    /// nothing at run time [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    act_order: Option<bool>,

    /// GPTQ: damping as a fraction of the mean diagonal [default: 0.01].
    #[arg(long)]
    damp: Option<f64>,

    /// Quantize the embedding to this many bits (to nearest).
    #[arg(long, value_name = "B")]
    embed_bits: Option<u8>,

    /// Quantize an untied head to this many bits.
    #[arg(long, value_name = "B")]
    head_bits: Option<u8>,

    /// Leave linears that match the pattern unquantized; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,

    /// Settings of linears that match: PATTERN=bits:N[,group_size:N][,symmetric:BOOL]; may be
    /// repeated.
    #[arg(long, value_name = "PATTERN=…")]
    layer: Vec<String>,

    /// Calibration text: a file (.txt, .jsonl), "builtin", or the name of a data set below the
    /// folder ANYBIT_DATA; may be repeated [default: builtin].
    #[arg(long, value_name = "TEXT")]
    calib: Vec<String>,

    /// Calibration tokens [default: 65536].
    #[arg(long, value_name = "N")]
    calib_tokens: Option<usize>,

    /// Tokens of a calibration sequence [default: 512].
    #[arg(long, value_name = "N")]
    seqlen: Option<usize>,

    /// Seed of everything random [default: 0].
    #[arg(long)]
    seed: Option<u64>,

    /// Text for the report's figures before and after; a built-in public-domain text by default.
    #[arg(long, value_name = "FILE")]
    report_text: Option<PathBuf>,

    /// Tokens of it, in whole windows of 512; 0 for a report without these figures.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    report_tokens: usize,

    /// Print what would be written, to the byte, with estimates of memory and time; write nothing.
    #[arg(long)]
    dry_run: bool,

    /// Continue an interrupted run of the same command.
    #[arg(long)]
    resume: bool,

    /// Replace an existing output.
    #[arg(long)]
    force: bool,

    /// Write the report (or the plan of --dry-run) as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScaleArg {
    MinMax,
    Mse,
}

impl Args {
    fn recipe(&self) -> Result<Recipe> {
        let mut r = match &self.recipe {
            Some(path) => Recipe::read(path)?,
            None => Recipe::default(),
        };
        r.method = self.method.clone().unwrap_or(r.method);
        r.bits = self.bits.unwrap_or(r.bits);
        r.group_size = self.group_size.unwrap_or(r.group_size);
        r.symmetric &= !self.asym;
        r.act_order = self.act_order.unwrap_or(r.act_order);
        r.damp = self.damp.unwrap_or(r.damp);
        r.embed_bits = self.embed_bits.or(r.embed_bits);
        r.head_bits = self.head_bits.or(r.head_bits);
        r.seed = self.seed.unwrap_or(r.seed);
        r.skip.extend(self.skip.iter().cloned());
        if let Some(scale) = self.scale {
            r.scale = match scale {
                ScaleArg::MinMax => anybit::core::ScaleFit::MinMax,
                ScaleArg::Mse => anybit::core::ScaleFit::Mse,
            };
        }
        if !self.calib.is_empty() {
            r.calibration.data = self.calib.clone();
        }
        r.calibration.tokens = self.calib_tokens.unwrap_or(r.calibration.tokens);
        r.calibration.seqlen = self.seqlen.unwrap_or(r.calibration.seqlen);
        for layer in &self.layer {
            r.add_layer(layer)?;
        }
        r.validate()?;
        Ok(r)
    }
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let recipe = args.recipe()?;
    let checkpoint = Checkpoint::open(&args.model)?;
    if args.dry_run {
        return dry_run(&args, &recipe, &checkpoint);
    }
    let options = Options {
        out: args.out.clone(),
        force: args.force,
        resume: args.resume,
        report_text: args.report_text.clone(),
        report_tokens: args.report_tokens,
    };
    let started = Instant::now();
    let blocks = terminal.bar("blocks", checkpoint.config.num_layers as u64);
    let files = terminal.byte_bar("writing", 0);
    let outcome =
        anybit::quantize::run(&checkpoint, &recipe, &options, &mut |event| match event {
            Event::Block(index, _) => blocks.set_position(index as u64),
            Event::Assembling(done, total) => {
                files.set_length(total);
                files.set_position(done);
            }
        })?;
    blocks.finish_and_clear();
    files.finish_and_clear();
    if let Some(path) = &args.json {
        write_json(path, &outcome.report)?;
        if path.as_os_str() == "-" {
            return Ok(());
        }
    }
    print_outcome(&args, &outcome, started.elapsed().as_secs_f64());
    Ok(())
}

fn print_outcome(args: &Args, outcome: &Outcome, seconds: f64) {
    let r = &outcome.report;
    let row = |name: &str, value: String| vec![name.to_string(), value];
    let mut rows = vec![
        row(
            "weights",
            format!("{} → {}", bytes_text(r.original_file_bytes), bytes_text(r.weight_file_bytes)),
        ),
        row(
            "bits per weight",
            format!("{:.3} codes, {:.3} total", r.bits_per_weight_codes, r.bits_per_weight_total),
        ),
    ];
    if let Some(q) = &r.quality {
        let interval = q.kl_ci95.map(|[low, high]| (high - low) / 2.0);
        rows.push(row(
            "perplexity",
            format!(
                "{:.3} → {:.3} ({}, windows of {}, {} tokens of {})",
                q.original_perplexity,
                q.quantized_perplexity,
                q.convention,
                q.ctx,
                q.tokens,
                q.text
            ),
        ));
        rows.push(row(
            "KL divergence",
            format!("{:.5} ± {} nats per token", q.kl_mean, or_dash(interval, 5)),
        ));
        rows.push(row("top-1 agreement", format!("{:.2}%", q.top1_agreement * 100.0)));
    }
    // Blocks of an earlier, interrupted run have no time.
    let times: Vec<f64> = outcome.block_seconds.iter().copied().filter(|t| *t > 0.0).collect();
    let sum: f64 = times.iter().sum();
    let slowest = times.iter().copied().fold(0.0, f64::max);
    rows.push(row(
        "time",
        format!(
            "{seconds:.1} s; per block {:.2} s on average, {slowest:.2} s at most",
            sum / times.len().max(1) as f64
        ),
    ));
    rows.push(row("peak memory", machine::peak_rss_bytes().map_or("unknown".into(), bytes_text)));
    rows.push(row("written", args.out.display().to_string()));
    print_table(&rows);
}

fn dry_run(args: &Args, recipe: &Recipe, checkpoint: &Checkpoint) -> Result<()> {
    let plan = Plan::new(checkpoint, recipe, Some(&args.out))?;
    anybit::io::atomic::check_absent(&args.out, args.force)?;
    let (codes, total) = plan.bits_per_weight();
    let seconds = plan.flops / machine::gemm_flops();
    if !plan.problems.is_empty() {
        return Err(Error::Ptq(anybit::ptq::PtqError::Recipe(plan.problems.join("\n"))));
    }
    if let Some(path) = &args.json {
        let files: Vec<_> = plan
            .files
            .iter()
            .map(|f| json!({"name": f.file_name, "bytes": f.file_bytes()}))
            .collect();
        write_json(
            path,
            &json!({
                "weight_bytes": plan.weight_bytes(), "files": files,
                "bits_per_weight_codes": codes, "bits_per_weight_total": total,
                "estimated_ram_bytes": plan.ram_bytes, "estimated_seconds": seconds,
                "recipe": recipe,
            }),
        )?;
    } else {
        let row = |name: &str, value: String| vec![name.to_string(), value];
        let mut rows = vec![row(
            "weight files",
            format!("{} bytes ({})", plan.weight_bytes(), bytes_text(plan.weight_bytes())),
        )];
        rows.extend(
            plan.files
                .iter()
                .map(|f| row(&format!("  {}", f.file_name), format!("{} bytes", f.file_bytes()))),
        );
        rows.push(row("bits per weight", format!("{codes:.3} codes, {total:.3} total")));
        rows.push(row(
            "packed",
            format!(
                "{} matrices, {} tensors stay as they are",
                plan.matrices.len(),
                plan.dense.len()
            ),
        ));
        rows.push(row("memory", format!("about {}", bytes_text(plan.ram_bytes))));
        rows.push(row("time", format!("about {seconds:.0} s on this machine")));
        print_table(&rows);
    }
    Ok(())
}
