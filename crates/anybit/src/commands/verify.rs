//! `anybit verify`.

use std::path::PathBuf;

use anybit::io::Checkpoint;
use anybit::io::native::verify;
use anybit::{Error, Result};
use serde_json::json;

use super::output::{Terminal, write_json};

/// Check a packed checkpoint: hashes, shapes, code ranges, finite scales, decoded values.
///
/// With the model that was rounded (the original, or behind a transform the transformed one in the
/// cache), also that each recorded error is the real one.
#[derive(clap::Args)]
#[command(after_help = "Example: anybit verify model-4bit --reference model")]
pub struct Args {
    /// The packed folder.
    dir: PathBuf,

    /// The original model.
    #[arg(long, value_name = "MODEL")]
    reference: Option<PathBuf>,

    /// Write what was found as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let original = args.reference.as_deref().map(Checkpoint::open).transpose()?;
    let bar = terminal.bar("verifying", 0);
    let problems = verify(&checkpoint, original.as_ref(), |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if let Some(path) = &args.json {
        write_json(path, &json!({"ok": problems.is_empty(), "problems": problems}))?;
    } else {
        for p in &problems {
            println!("{}: {}", p.tensor, p.what);
        }
    }
    match problems.len() {
        0 => {
            let errors = if original.is_some() { ", errors as recorded" } else { "" };
            terminal
                .note(&format!("{}: all tensors as the manifest says{errors}", args.dir.display()));
            Ok(())
        }
        n => Err(Error::Verification(n)),
    }
}
