//! The command line: one file per command.

mod attribute;
mod bench;
mod bench_train;
mod completions;
mod convert;
mod demo;
mod detector;
mod distill;
mod doctor;
mod eval;
mod generate;
mod inspect;
mod output;
mod plan;
mod quantize;
mod recipe;
mod run_args;
mod scaling;
mod synth;
mod train;
mod verify;
mod vision;

use anybit::Result;
use clap::{Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes: 0 success; 1 any other failure; 2 wrong usage; 3 input that cannot be used (model, \
recipe, text); 4 output that cannot be written; 5 verification failed.";

/// Any model, any bits: quantize language models, keep them good, small and fast.
#[derive(Parser)]
#[command(name = "anybit", version, after_help = EXIT_CODES, propagate_version = true)]
pub struct Cli {
    /// Threads to use; all cores by default. Results do not depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Print results only: no progress bars, no remarks.
    #[arg(long, short, global = true)]
    quiet: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(demo::Args),
    Quantize(Box<quantize::Args>),
    Plan(Box<plan::Args>),
    Eval(eval::Args),
    Attribute(attribute::Args),
    Generate(generate::Args),
    Bench(bench::Args),
    Convert(convert::Args),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Train(train::Args),
    Distill(distill::Args),
    DistillVision(vision::Args),
    DistillDetector(detector::Args),
    BenchTrain(bench_train::Args),
    Scaling(scaling::Args),
    Doctor(doctor::Args),
    Synth(synth::Args),
    Completions(completions::Args),
}

/// How keys and values without a quantizer are cached.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum KvType {
    F16,
    F32,
}

impl From<KvType> for anybit::runtime::PlainType {
    fn from(kv: KvType) -> Self {
        match kv {
            KvType::F16 => Self::F16,
            KvType::F32 => Self::F32,
        }
    }
}

/// Runs a parsed command line.
pub fn run(cli: Cli) -> Result<()> {
    anybit_kernels::isa::requested().map_err(anybit::Error::Usage)?;
    if let Some(threads) = cli.threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
        // The pool was not used yet, so this cannot fail.
        let _ = pool.build_global();
    }
    let terminal = output::Terminal::new(cli.quiet);
    match cli.command {
        Command::Demo(args) => demo::run(args, &terminal),
        Command::Quantize(args) => quantize::run(*args, &terminal),
        Command::Plan(args) => plan::run(*args, &terminal),
        Command::Eval(args) => eval::run(args, &terminal),
        Command::Attribute(args) => attribute::run(args, &terminal),
        Command::Generate(args) => generate::run(args, &terminal),
        Command::Bench(args) => bench::run(args, &terminal),
        Command::Convert(args) => convert::run(args, &terminal),
        Command::Inspect(args) => inspect::run(args, &terminal),
        Command::Verify(args) => verify::run(args, &terminal),
        Command::Train(args) => train::run(args, &terminal),
        Command::Distill(args) => distill::run(args, &terminal),
        Command::DistillVision(args) => vision::run(args, &terminal),
        Command::DistillDetector(args) => detector::run(args, &terminal),
        Command::BenchTrain(args) => bench_train::run(args, &terminal),
        Command::Scaling(args) => scaling::run(args, &terminal),
        Command::Doctor(args) => doctor::run(args, &terminal),
        Command::Synth(args) => synth::run(args, &terminal),
        Command::Completions(args) => completions::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn models_and_shapes_are_made_by_one_command() {
        let parses = |args: &str| Cli::try_parse_from(args.split(' ')).is_ok();
        assert!(parses("anybit synth --preset tiny -o x --seed 3"));
        assert!(parses("anybit synth shapes -o x --train 20 --test 5 --size 32 --seed 3"));
        for args in [
            "anybit synth",
            "anybit synth --preset tiny",
            "anybit synth -o x",
            "anybit synth shapes",
            "anybit synth --preset tiny -o x shapes -o y",
        ] {
            assert!(!parses(args), "{args}");
        }
    }
}
