//! `anybit convert`.

use std::path::PathBuf;

use anybit::io::convert::{FolderOptions, to_folder, to_gguf};
use anybit::io::{Checkpoint, Dtype};
use anybit::{Error, Result};
use clap::ValueEnum;

use super::output::Terminal;

/// Convert between GGUF files and Hugging Face folders.
///
/// An output that ends in .gguf becomes a GGUF file, any other a folder that transformers loads.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit convert model.gguf model/                        decode a GGUF file to a bf16 folder
  anybit convert model.gguf ref/ --off-grid 0.1 --seed 0  the same, taken off its grid
  anybit convert model/ model.gguf --dtype f16            a GGUF file that llama.cpp loads")]
pub struct Args {
    /// The model: a folder or a .gguf file.
    model: PathBuf,

    /// The output: a folder, or a file that ends in .gguf.
    out: PathBuf,

    /// Element type of the output.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: DtypeArg,

    /// Multiply channels by lognormal factors of this spread that cancel exactly, so that weights
    /// leave the grid they were quantized on. Folders only.
    #[arg(long, value_name = "SIGMA")]
    off_grid: Option<f64>,

    /// Seed of the factors.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Replace an existing output.
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum DtypeArg {
    F32,
    F16,
    Bf16,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let dtype = match args.dtype {
        DtypeArg::F32 => Dtype::F32,
        DtypeArg::F16 => Dtype::F16,
        DtypeArg::Bf16 => Dtype::BF16,
    };
    if args.off_grid.is_some_and(|s| !(s.is_finite() && (0.0..=1.0).contains(&s))) {
        return Err(Error::Usage("--off-grid takes a spread from 0 to 1".into()));
    }
    let checkpoint = Checkpoint::open(&args.model)?;
    anybit::quantize::refuse_self(&args.model, &args.out)?;
    if args.out.extension().is_some_and(|e| e == "gguf") {
        if args.off_grid.is_some() {
            let what = "--off-grid writes folders; convert to one first, then to .gguf";
            return Err(Error::Usage(what.into()));
        }
        to_gguf(&checkpoint, &args.out, dtype, args.force)?;
    } else {
        let off_grid = args.off_grid.map(|sigma| (sigma, args.seed));
        let options = FolderOptions { dtype, off_grid, force: args.force };
        let bar = terminal.byte_bar("converting", 0);
        to_folder(&checkpoint, &args.out, options, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
    }
    terminal.note(&format!("wrote {}", args.out.display()));
    Ok(())
}
