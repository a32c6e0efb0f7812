//! `anybit attribute`.

use std::path::PathBuf;

use anybit::Result;
use anybit::attribute::{Options, run as attribute};
use anybit::eval::{BUILTIN_TEXT, read_text};

use super::output::{Terminal, print_table, written};

/// Say which cause in which block a quantized model loses by.
///
/// Measured is the divergence from the unquantized model when only that is quantized: the weights
/// of a block, the inputs of its linears, its keys and values, or the clips of both. Effects do not
/// add up. With nothing quantized the divergence is exactly 0, or something is wrong.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit attribute model-w4a4kv4 --svg heat-map.svg
  anybit attribute model-4bit --reference model --json attribution.json")]
pub struct Args {
    /// The quantized model.
    model: PathBuf,

    /// The model that it was quantized from; needed where no transform came before.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,

    /// Folder of the cache that holds the transformed model [default: .anybit-cache beside the
    /// model].
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,

    /// Text to measure on; a short public-domain text by default.
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,

    /// Tokens of a window.
    #[arg(long, default_value_t = 512)]
    ctx: usize,

    /// Tokens to score at most; one window at least.
    #[arg(long, value_name = "N", default_value_t = 512)]
    limit_tokens: usize,

    /// Write the figures as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the heat map into this SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let text = match &args.text {
        Some(path) => read_text(path)?,
        None => BUILTIN_TEXT.to_string(),
    };
    let options = Options {
        model: args.model,
        reference: args.reference,
        cache: args.cache,
        ctx: args.ctx,
        limit_tokens: args.limit_tokens,
    };
    let bar = terminal.bar("measuring", 0);
    let found = attribute(&options, &text, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.svg {
        anybit::io::atomic::write_bytes(path, found.to_svg()?.as_bytes())?;
    }
    if written(args.json.as_deref(), &found)? {
        return Ok(());
    }
    let header = std::iter::once("block".to_string()).chain(found.causes.iter().cloned());
    let mut rows = vec![header.collect::<Vec<_>>()];
    for block in 0..found.kl.first().map_or(0, Vec::len) {
        let cells = found.kl.iter().map(|row| format!("{:.5}", row[block]));
        rows.push(std::iter::once(block.to_string()).chain(cells).collect());
    }
    let sums = found.kl.iter().map(|row| format!("{:.5}", row.iter().sum::<f64>()));
    rows.push(std::iter::once("sum".to_string()).chain(sums).collect());
    print_table(&rows);
    println!(
        "\nall together {:.5}, nothing {:.5} nats per token, over {} tokens; causes do not add up",
        found.all, found.control, found.tokens
    );
    Ok(())
}
