//! `anybit demo`.

use std::path::PathBuf;

use anybit::Result;
use anybit::demo::{DemoReport, Options, run as demo};

use super::output::{Terminal, print_table, written};

/// Quantize the small model that comes with the program by every method, and compare.
///
/// Needs no download. Methods of weights are compared at 2, 3 and 4 bits; behind the transforms
/// weights, activations and cache have as many. KL divergence from the original (nats per token,
/// lower is better) is taken on a text that no method has seen.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit demo
  anybit demo --bits 3 --out try")]
pub struct Args {
    /// Folder for the models and the plot.
    #[arg(long, short, value_name = "DIR", default_value = "anybit-demo")]
    out: PathBuf,

    /// Replace an existing folder.
    #[arg(long)]
    force: bool,

    /// Widths, separated by commas.
    #[arg(long, value_name = "B,B,…", value_delimiter = ',', default_values_t = [2, 3, 4],
        value_parser = clap::value_parser!(u8).range(2..=8))]
    bits: Vec<u8>,

    /// Write the table as JSON to this file too (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let mut options = Options::new(&args.out);
    (options.force, options.bits) = (args.force, args.bits);
    let bar = terminal.bar("models", 1);
    let report = demo(&options, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if written(args.json.as_deref(), &report)? {
        return Ok(());
    }
    print_report(&report);
    println!("\nplot: {}", args.out.join("demo.svg").display());
    Ok(())
}

fn print_report(report: &DemoReport) {
    let kilobytes = |bytes: u64| format!("{:.0}", bytes as f64 / 1e3);
    let headers = ["method", "bits", "stored bits", "kB", "KL divergence", "perplexity", "seconds"];
    let mut rows = vec![headers.map(String::from).to_vec()];
    let original = ["original", "16", "", &kilobytes(report.bytes), "0"].map(String::from);
    let mut first = original.to_vec();
    first.extend([format!("{:.2}", report.perplexity), String::new()]);
    rows.push(first);
    for row in &report.rows {
        rows.push(vec![
            row.method.clone(),
            row.bits.to_string(),
            row.total_bits.map_or(String::new(), |bits| format!("{bits:.2}")),
            kilobytes(row.bytes),
            row.kl.map_or(String::new(), |kl| format!("{kl:.4}")),
            format!("{:.2}", row.perplexity),
            format!("{:.1}", row.seconds),
        ]);
    }
    print_table(&rows);
}
