//! `anybit synth`.

use std::path::{Path, PathBuf};

use anybit::Result;
use anybit::grad::vision::detect::ShapesSpec;
use anybit::io::synth::{PRESETS, preset, write};

use super::output::Terminal;

/// Write a synthetic model: random weights in a real shape, for measuring memory and speed.
///
/// The subcommand shapes writes images with boxes instead.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  anybit synth --preset 3b -o synth-3b
  anybit synth shapes -o .cache/shapes"
)]
pub struct Args {
    #[command(subcommand)]
    other: Option<Other>,

    // These two are options for the sake of subcommands, which do without them.
    /// Shape of the model.
    #[arg(long, required = true, value_parser = clap::builder::PossibleValuesParser::new(PRESETS))]
    preset: Option<String>,

    /// Folder to write.
    #[arg(long, short, required = true)]
    out: Option<PathBuf>,

    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Replace an existing output.
    #[arg(long)]
    force: bool,
}

/// What else is made from a seed.
#[derive(clap::Subcommand)]
enum Other {
    Shapes(ShapesArgs),
}

/// Write images of circles, squares and triangles with their boxes, for training detectors.
///
/// The same seed gives the same bytes on every machine.
#[derive(clap::Args)]
struct ShapesArgs {
    /// Folder to write.
    #[arg(long, short)]
    out: PathBuf,

    /// Training images.
    #[arg(long, default_value_t = 2000, value_name = "N")]
    train: usize,

    /// Test images.
    #[arg(long, default_value_t = 500, value_name = "N")]
    test: usize,

    /// Pixels of a side.
    #[arg(long, default_value_t = 48, value_name = "PIXELS")]
    size: usize,

    /// Seed of everything.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Replace an existing output.
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    match (args.other, args.preset, args.out) {
        (Some(Other::Shapes(shapes)), _, _) => {
            let ShapesArgs { out, train, test, size, seed, force } = shapes;
            anybit::detect::shapes(&ShapesSpec { train, test, size, seed }, &out, force)?;
            terminal.note(&format!("wrote {}", out.display()));
            Ok(())
        }
        (None, Some(name), Some(out)) => model(&name, args.seed, &out, args.force, terminal),
        // The parser asks for both already.
        (None, ..) => Err(anybit::Error::Usage("--preset and --out are needed".into())),
    }
}

fn model(name: &str, seed: u64, out: &Path, force: bool, terminal: &Terminal) -> Result<()> {
    let unknown = || anybit::Error::Usage(format!("no preset {name}"));
    let config = preset(name).ok_or_else(unknown)?;
    let bar = terminal.byte_bar("writing", 0);
    write(&config, seed, out, force, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    terminal.note(&format!("wrote {}", out.display()));
    Ok(())
}
