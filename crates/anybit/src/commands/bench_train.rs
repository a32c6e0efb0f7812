//! `anybit bench-train`.

use std::path::PathBuf;

use anybit::Result;
use anybit::grad::train::QuantizerRecipe;
use anybit::grad::{EstimatorSpec, Form};
use anybit::train::{SpeedTest, speed};
use clap::ValueEnum;

use super::output::{Terminal, print_table, write_json};

/// Time optimizer steps of a model of any shape, on random tokens.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit bench-train --layers 4 --hidden 256 --heads 4 --ffn 768 --vocab 4096
  anybit bench-train --layers 4 --hidden 256 --heads 4 --ffn 768 --quantizer quest --bits 4")]
pub struct Args {
    /// Layers.
    #[arg(long, default_value_t = 4)]
    layers: usize,

    /// Width of the residual stream.
    #[arg(long, default_value_t = 256)]
    hidden: usize,

    /// Heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,

    /// Width of the MLP.
    #[arg(long, default_value_t = 768)]
    ffn: usize,

    /// Tokens of the vocabulary.
    #[arg(long, default_value_t = 4096)]
    vocab: usize,

    /// Tokens of a sequence.
    #[arg(long, default_value_t = 256)]
    context: usize,

    /// Sequences of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,

    /// Steps that are timed, after three that are not.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,

    /// Estimator of weights and activations.
    #[arg(long, value_enum, default_value_t = QuantizerArg::None)]
    quantizer: QuantizerArg,

    /// Its bits.
    #[arg(long, default_value_t = 4)]
    bits: u8,

    /// Columns of its Hadamard blocks.
    #[arg(long, default_value_t = 128)]
    hadamard: usize,

    /// Write the figures as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum QuantizerArg {
    None,
    Quest,
}

pub fn run(args: Args, _terminal: &Terminal) -> Result<()> {
    let Args { bits, hadamard, .. } = args;
    let estimator = match args.quantizer {
        QuantizerArg::None => None,
        QuantizerArg::Quest => {
            Some(EstimatorSpec::Quest { bits, hadamard, form: Form::Half, clip_scale: None })
        }
    };
    let report = speed(&SpeedTest {
        layers: args.layers,
        hidden: args.hidden,
        heads: args.heads,
        ffn: args.ffn,
        vocab: args.vocab,
        context: args.context,
        batch: args.batch,
        steps: args.steps as usize,
        quantizer: QuantizerRecipe { weights: estimator, activations: estimator },
    })?;
    if let Some(path) = &args.json {
        return write_json(path, &report);
    }
    print_table(&[
        vec!["parameters".into(), "tokens/s".into(), "threads".into(), "loss".into()],
        vec![
            report.parameters.to_string(),
            format!("{:.0}", report.tokens_per_s),
            report.threads.to_string(),
            format!("{:.3} to {:.3}", report.first_loss, report.last_loss),
        ],
    ]);
    Ok(())
}
