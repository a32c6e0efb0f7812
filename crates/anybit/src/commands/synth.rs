//! `anybit synth`.

use std::path::PathBuf;

use anybit::Result;
use anybit::io::synth::{PRESETS, preset, write};

use super::output::Terminal;

/// Write a synthetic model: random weights in a real shape, for measuring memory and speed.
#[derive(clap::Args)]
#[command(after_help = "Example: anybit synth --preset 3b -o synth-3b")]
pub struct Args {
    /// Shape of the model.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(PRESETS))]
    preset: String,

    /// Folder to write.
    #[arg(long, short)]
    out: PathBuf,

    /// Seed of the weights.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// Replace an existing output.
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let unknown = || anybit::Error::Usage(format!("no preset {}", args.preset));
    let config = preset(&args.preset).ok_or_else(unknown)?;
    let bar = terminal.byte_bar("writing", 0);
    write(&config, args.seed, &args.out, args.force, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    terminal.note(&format!("wrote {}", args.out.display()));
    Ok(())
}
