//! `anybit scaling`.

use std::path::PathBuf;

use anybit::Result;
use anybit::eval::scaling::{Fit, FitOptions, Irreducible, fit, read_runs};
use clap::Subcommand;

use super::output::{Terminal, print_table, written};

/// Fit scaling laws of training at low precision.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: ScalingCommand,
}

#[derive(Subcommand)]
enum ScalingCommand {
    Fit(FitArgs),
}

/// Fit L(N, D, P) = A / (N·eff(P))^α + B / D^β + E to training runs.
///
/// eff(P) is what a parameter of precision P is worth beside one of the reference precision. Runs
/// are a CSV file with a header row, or JSON: a list of objects. Both have params (without
/// embeddings), tokens, precision and loss, and may have bits, where the precision's name does not
/// tell them as W4A8, int4 and 4 do. Precisions are compared within a family: what is before the
/// last space of the name. Intervals are 95%, from resampled runs.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit scaling fit runs.csv
  anybit scaling fit runs.csv --free-e --bootstrap 0
  anybit scaling fit runs.json --fix-e 1.69 --svg law.svg --json law.json")]
struct FitArgs {
    /// The runs: a CSV or JSON file.
    #[arg(value_name = "RUNS")]
    runs: PathBuf,

    /// Let E be negative; by default it is 0 at least.
    #[arg(long)]
    free_e: bool,

    /// Hold E at this value.
    #[arg(long, value_name = "E", conflicts_with = "free_e", allow_negative_numbers = true)]
    fix_e: Option<f64>,

    /// Let residuals of ln L count linearly from this size on (Huber's loss; 0.001 is usual); by
    /// default all count squared.
    #[arg(long, value_name = "DELTA")]
    huber: Option<f64>,

    /// The precision of which eff is 1 [default: the one with 16 bits or more].
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,

    /// Resamples for the intervals; 0 for none.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1000,
        value_parser = clap::value_parser!(u32).range(0..=100_000)
    )]
    bootstrap: u32,

    /// Seed of the resamples.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Write the fit as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw runs and curves into this SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    match args.command {
        ScalingCommand::Fit(args) => run_fit(args, terminal),
    }
}

fn run_fit(args: FitArgs, terminal: &Terminal) -> Result<()> {
    let read = read_runs(&args.runs)?;
    if !read.unused.is_empty() {
        terminal.note(&format!("columns that are not used: {}", read.unused.join(", ")));
    }
    let options = FitOptions {
        irreducible: match (args.free_e, args.fix_e) {
            (_, Some(e)) => Irreducible::Fixed(e),
            (true, None) => Irreducible::Free,
            (false, None) => Irreducible::NonNegative,
        },
        huber: args.huber,
        reference: args.reference,
        bootstrap: args.bootstrap as usize,
        seed: args.seed,
    };
    let found = fit(&read.runs, &options)?;
    if let Some(path) = &args.svg {
        anybit::io::atomic::write_bytes(path, found.to_svg()?.as_bytes())?;
    }
    if written(args.json.as_deref(), &found)? {
        return Ok(());
    }
    print_fit(&found);
    Ok(())
}

fn print_fit(found: &Fit) {
    let (law, intervals) = (&found.law, found.intervals.as_ref());
    let constants = [
        ("A", law.a, intervals.map(|i| i.a)),
        ("α", law.alpha, intervals.map(|i| i.alpha)),
        ("B", law.b, intervals.map(|i| i.b)),
        ("β", law.beta, intervals.map(|i| i.beta)),
        ("E", law.e, intervals.map(|i| i.e)),
    ];
    let mut rows = vec![["constant", "value", "95% interval"].map(String::from).to_vec()];
    rows.extend(constants.map(|(name, value, interval)| {
        vec![name.to_string(), digits(value), interval_text(interval)]
    }));
    print_table(&rows);
    println!();
    let full = "eff/P, reference 1";
    let mut rows = vec![["precision", "runs", "eff", "95% interval", full, ""].map(String::from)];
    rows.extend(found.precisions.iter().map(|p| {
        let best = found.optima.get(&p.family).is_some_and(|name| *name == p.name);
        [
            p.name.clone(),
            p.runs.to_string(),
            digits(p.eff),
            interval_text(intervals.and_then(|i| i.eff.get(&p.name)).copied()),
            p.eff_per_bit.map_or("-".into(), digits),
            if best { "best".into() } else { String::new() },
        ]
    }));
    print_table(&rows.into_iter().map(Vec::from).collect::<Vec<_>>());
    println!(
        "\n{} runs; residuals of ln L: rms {:.4}, at most {:.4}",
        found.runs.len(),
        found.rms_residual,
        found.max_residual
    );
    for (family, name) in &found.optima {
        let of = if family.is_empty() { String::new() } else { format!(" of {family}") };
        println!("most eff(P)/P{of}: {name}, the best use of bits where data is plenty");
    }
    if law.e <= 0.0 {
        println!(
            "E is {}: these runs do not tell what loss remains at any size; do not extrapolate",
            digits(law.e)
        );
    }
}

/// Four significant digits.
fn digits(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    match value.abs().log10().floor() as i32 {
        at @ -5..=3 => {
            let places = (3 - at).unsigned_abs() as usize;
            format!("{value:.places$}")
        }
        _ => format!("{value:.3e}"),
    }
}

fn interval_text(interval: Option<[f64; 2]>) -> String {
    interval.map_or("-".into(), |[low, high]| format!("{} to {}", digits(low), digits(high)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let texts = [86.4397, 0.0156, -1.90678, 0.0, 0.9999, 12_346.0, 1e-7].map(digits);
        assert_eq!(texts, ["86.44", "0.01560", "-1.907", "0", "0.9999", "1.235e4", "1.000e-7"]);
        assert_eq!(interval_text(Some([0.5, 1.0])), "0.5000 to 1.000");
        assert_eq!(interval_text(None), "-");
    }
}
