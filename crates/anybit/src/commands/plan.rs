//! `anybit plan`.

use std::path::PathBuf;

use anybit::Result;
use anybit::frontier::{frontier, parse_range};
use anybit::io::Checkpoint;
use anybit::ptq::{Count, Event, cache_folder};

use super::output::{Terminal, bytes_text, print_table, written};
use super::recipe::RecipeArgs;

/// Draw what a method would lose at every size, without writing a model.
///
/// Errors are what the method's own tables predict: for anybit, nats per token. Gradients and tables
/// are kept in the cache (beside the model unless --cache says otherwise); `quantize` with the same
/// --cache finds them there.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit plan model --method skim --bits 2:4:0.25
  anybit plan model --method anybit --bits 2:4:0.25 --svg frontier.svg --json frontier.json")]
pub struct Args {
    /// The model: a Hugging Face folder or a .gguf file.
    model: PathBuf,

    #[command(flatten)]
    recipe: RecipeArgs,

    /// Bits of a weight: LOW:HIGH:STEP.
    #[arg(long, short, default_value = "2:4:0.25")]
    bits: String,

    /// Let --bits count everything that is stored, not codes alone.
    #[arg(long)]
    total: bool,

    /// Write the points as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the curve into this SVG file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let bits = parse_range(&args.bits).map_err(anybit::Error::Usage)?;
    let mut recipe = args.recipe.read()?;
    recipe.bits = bits[0];
    if args.total {
        recipe.count = Count::Total;
    }
    recipe.validate()?;
    let checkpoint = Checkpoint::open(&args.model)?;
    // Beside the model, as a quantized one would most likely be.
    let cache = cache_folder(args.recipe.cache.as_deref(), &args.model);
    let bar = terminal.bar("measuring", 0);
    let found = frontier(&checkpoint, &recipe, &bits, &cache, &mut |event| match event {
        Event::Gradients(done, total) => {
            bar.set_message("gradients");
            bar.set_length(total);
            bar.set_position(done);
        }
        Event::Measuring(index, layers) => {
            bar.set_message("error tables");
            bar.set_length(layers as u64);
            bar.set_position(index as u64);
        }
        Event::Block(..) | Event::Assembling(..) | Event::Transforming(..) => {}
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.svg {
        anybit::io::atomic::write_bytes(path, found.to_svg()?.as_bytes())?;
    }
    if written(args.json.as_deref(), &found)? {
        return Ok(());
    }
    let header = ["bits", "codes", "total", "file", "predicted error"];
    let mut rows = vec![header.map(String::from).to_vec()];
    rows.extend(found.points.iter().map(|p| {
        vec![
            format!("{:.3}", p.bits),
            format!("{:.3}", p.bits_per_weight_codes),
            format!("{:.3}", p.bits_per_weight_total),
            bytes_text(p.weight_file_bytes),
            format!("{:.5}", p.predicted_error),
        ]
    }));
    print_table(&rows);
    Ok(())
}
