//! `anybit distill`.

use anybit::Result;

use super::output::Terminal;
use super::train;

/// Train a quantized model against teachers: `train` with a section `distill` in the recipe.
///
/// The section names teachers (checkpoints with the student's tokenizer), the loss between them and
/// the student, and the balancer that weighs it against the loss of the text; GoR, which learns both
/// weights, is the default. The student is what the section model says: random, a checkpoint, or a
/// quantized one, which with quantizer.weights of type kept keeps its codes and its size while its
/// codebooks, scales and norms are trained. Teachers run beside it, or with distill.cache once:
/// their likeliest tokens are kept on disk for every run with the same teachers and texts.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit distill gor.toml
  anybit distill gor.toml --set distill.balancer.type=fixed --out runs/fixed
  anybit distill gor.toml --set 'distill.loss={ type = \"reverse_kl\" }'
  anybit distill gor.toml --set model.init=skim-2bit --set 'quantizer.weights={ type = \"kept\" }'
  anybit distill gor.toml --set distill.cache.dir=teachers --set distill.cache.max_bytes=2GiB")]
pub struct Args {
    #[command(flatten)]
    train: train::Args,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    train::run_recipe(args.train, terminal, true)
}
