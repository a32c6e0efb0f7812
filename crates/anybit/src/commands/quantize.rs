//! `anybit quantize`.

use std::path::PathBuf;
use std::time::Instant;

use anybit::io::Checkpoint;
use anybit::io::size::parse_size;
use anybit::ptq::{Count, Event, Plan, Recipe};
use anybit::quantize::{Options, Outcome};
use anybit::{Error, Result, machine};
use clap::ValueEnum;
use serde_json::json;

use super::output::{Terminal, bytes_text, or_dash, print_table, write_json, written};
use super::recipe::RecipeArgs;

/// Quantize a model and write it packed, with a report.
///
/// Flags win over --recipe. The recipe with every default filled in is stored in the output, and can
/// be given again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit quantize model --bits 4 -o model-4bit
  anybit quantize model --method rtn --bits 8 --group-size -1 -o model-8bit
  anybit quantize model --bits 3 --layer '*.down_proj=bits:4' --skip '*.layers.0.*' -o mixed
  anybit quantize model --recipe my.toml --dry-run -o out
  anybit quantize model --method skim --bits 3.2 -o model-3.2bit
  anybit quantize model --method anybit --max-bytes 60MiB -o model-60mib
  anybit quantize model --method anybit --match model-Q3_K_M.gguf -o model-as-small
  anybit quantize model --method resq -o model-w4a4kv4
  anybit quantize model --transform quarot --method rtn --preset w4a8kv8 -o model-w4a8kv8
  anybit quantize model --transform quarot --preset kv4 -o model-kv4
  anybit quantize model --bits 4 --calib my-text.txt --resume -o model-4bit")]
pub struct Args {
    /// The model: a Hugging Face folder or a .gguf file.
    model: PathBuf,

    /// Folder to write.
    #[arg(long, short, value_name = "DIR")]
    out: PathBuf,

    #[command(flatten)]
    recipe: RecipeArgs,

    /// Bits of a weight, 1 to 8, or 16 for none; a fraction for skim and anybit [default: 4].
    #[arg(long, short, alias = "w-bits", conflicts_with_all = ["max_bytes", "match_file"])]
    bits: Option<f64>,

    /// Bits of weights, activations and cache together; the flags of each win.
    #[arg(long, value_enum, conflicts_with_all = ["max_bytes", "match_file"])]
    preset: Option<Preset>,

    /// What --bits counts: codes alone, as papers do, or everything that is stored [default:
    /// codes].
    #[arg(long, value_enum, conflicts_with_all = ["max_bytes", "match_file"])]
    count: Option<CountArg>,

    /// Most bytes of the weight files, everything in them counted, such as 60MiB or 90MB; for
    /// skim and anybit, which fill them.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_bytes: Option<u64>,

    /// Most bytes: those that the tensors of this model take.
    #[arg(long = "match", value_name = "MODEL", conflicts_with = "max_bytes")]
    match_file: Option<PathBuf>,

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
enum Preset {
    W4a4kv4,
    W4a8kv8,
    W4a16,
    Kv4,
}

impl Preset {
    /// Bits of weights, activations and cache.
    fn bits(self) -> (f64, u8, u8) {
        match self {
            Self::W4a4kv4 => (4.0, 4, 4),
            Self::W4a8kv8 => (4.0, 8, 8),
            Self::W4a16 => (4.0, 16, 16),
            Self::Kv4 => (16.0, 16, 4),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum CountArg {
    Codes,
    Total,
}

impl Args {
    fn recipe(&self) -> Result<Recipe> {
        let mut r = self.recipe.read()?;
        if self.bits.is_some() || self.count.is_some() || self.preset.is_some() {
            // One goal: a flag takes the place of the recipe's size.
            r.max_bytes = None;
        }
        if let Some(preset) = self.preset {
            let (bits, a_bits, kv_bits) = preset.bits();
            r.bits = bits;
            r.a_bits = self.recipe.a_bits.or(Some(a_bits));
            r.kv_bits = self.recipe.kv_bits.or(Some(kv_bits));
        }
        r.bits = self.bits.unwrap_or(r.bits);
        match self.count {
            None => {}
            Some(CountArg::Codes) => r.count = Count::Codes,
            Some(CountArg::Total) => r.count = Count::Total,
        }
        r.max_bytes = self.max_bytes.or(r.max_bytes);
        if let Some(path) = &self.match_file {
            r.max_bytes = Some(Checkpoint::tensor_bytes_at(path)?);
        }
        if self.max_bytes.is_some() || self.match_file.is_some() {
            r.count = Count::Codes;
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
        cache: args.recipe.cache.clone(),
    };
    let started = Instant::now();
    let transforms = terminal.bar("transform", 0);
    let gradients = terminal.bar("gradients", 0);
    let measured = terminal.bar("error tables", 0);
    let blocks = terminal.bar("blocks", checkpoint.config.num_layers as u64);
    let files = terminal.byte_bar("writing", 0);
    let outcome =
        anybit::quantize::run(&checkpoint, &recipe, &options, &mut |event| match event {
            Event::Transforming(done, total) => {
                transforms.set_length(total as u64);
                transforms.set_position(done as u64);
            }
            Event::Gradients(done, total) => {
                gradients.set_length(total);
                gradients.set_position(done);
            }
            Event::Measuring(index, layers) => {
                measured.set_length(layers as u64);
                measured.set_position(index as u64);
            }
            Event::Block(index, _) => blocks.set_position(index as u64),
            Event::Assembling(done, total) => {
                files.set_length(total);
                files.set_position(done);
            }
        })?;
    [transforms, gradients, measured, blocks].iter().for_each(|bar| bar.finish_and_clear());
    files.finish_and_clear();
    if written(args.json.as_deref(), &outcome.report)? {
        return Ok(());
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
    if let (Some(name), Some(divergence)) = (&r.transform, r.transform_divergence) {
        let text = format!("{name}; before rounding KL {divergence:.1e}");
        rows.push(row("transform", text));
    }
    if let Some(predicted) = r.predicted_error {
        rows.push(row("predicted error", format!("{predicted:.5}")));
    }
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
                "provisional": plan.provisional,
                "bits_per_weight_codes": codes, "bits_per_weight_total": total,
                "estimated_ram_bytes": plan.ram_bytes, "estimated_seconds": seconds,
                "recipe": recipe.resolved()?,
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
        if recipe.transformer()?.is_some() {
            let what = "fitted first; what it stores, and a head that it unties, come on top";
            rows.push(row("transform", what.into()));
        }
        if recipe.rounding()?.allocation().is_some() {
            let goal = match recipe.max_bytes {
                Some(bytes) => format!("at most {bytes} bytes"),
                None => format!("{} bits per weight", recipe.bits),
            };
            let what = "the figures above are the least; `anybit plan` measures, then knows more";
            rows.push(row("rows", format!("allocated to meet {goal}: {what}")));
        }
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
