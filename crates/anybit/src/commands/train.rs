//! `anybit train`.

use anybit::Result;
use anybit::grad::train::log::Kind;
use anybit::grad::train::{Event, RunOptions, TrainReport};
use anybit::train::{read_recipe, run as train};
use indicatif::ProgressBar;

use super::output::{Terminal, print_table, written};
use super::run_args::RunArgs;

/// Train a model with quantized weights and activations, from scratch or from a checkpoint.
///
/// The recipe is a TOML file with the sections model, data, quantizer and train; paths in it are
/// relative to the current folder. Its folder `out` gets checkpoints, logs (log.jsonl, and events/
/// for TensorBoard), the loss plot, report.json, and the trained model. Started by mpirun (in a
/// build with --features mpi), all ranks train one model together.
#[derive(clap::Args)]
#[group(id = "recipe_of_training")]
#[command(after_help = "\
Examples:
  anybit train quest.toml
  anybit train quest.toml --set quantizer.weights.bits=2 --set out='runs/w2'
  anybit train quest.toml --resume
  mpirun -n 2 anybit train quest.toml")]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,

    /// Go on from the newest checkpoint of an interrupted run.
    #[arg(long, conflicts_with = "force")]
    resume: bool,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    run_recipe(args, terminal, false)
}

/// Runs a recipe, which has teachers or has none.
pub fn run_recipe(args: Args, terminal: &Terminal, teachers: bool) -> Result<()> {
    let Args { run: args, resume } = args;
    let mut recipe = read_recipe(&args.recipe, &args.set)?;
    if recipe.distill.is_some() != teachers {
        let what = match teachers {
            true => "has no section distill: name the teachers there, or use anybit train",
            false => "has a section distill: use anybit distill",
        };
        return Err(anybit::Error::Usage(format!("{} {what}", args.recipe.display())));
    }
    if let Some(out) = args.out {
        recipe.out = out;
    }
    let options = RunOptions { resume, force: args.force };
    let mut view = View { terminal, bar: None, teaching: None };
    let report = train(&recipe, options, &mut |event| view.show(event))?;
    if written(args.json.as_deref(), &report)? {
        return Ok(());
    }
    print_report(&report);
    Ok(())
}

/// What is seen while it runs.
struct View<'a> {
    terminal: &'a Terminal,
    bar: Option<ProgressBar>,
    /// While teachers' outputs are computed for a cache.
    teaching: Option<ProgressBar>,
}

impl View<'_> {
    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Tokenizing(done, total) => {
                let bar =
                    self.bar.get_or_insert_with(|| self.terminal.byte_bar("tokenizing", total));
                bar.set_position(done);
            }
            Event::Teaching(done, total) => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                let bar = self.teaching.get_or_insert_with(|| self.terminal.bar("teaching", total));
                bar.set_position(done);
                if done == total {
                    bar.finish_and_clear();
                }
            }
            Event::Start { step, steps, tokens, parameters } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                let megas = parameters as f64 / 1e6;
                self.terminal.note(&format!(
                    "{megas:.2} M parameters, {tokens} tokens a step, steps {step} to {steps}"
                ));
                let bar = self.terminal.bar("training", steps);
                bar.set_position(step);
                self.bar = Some(bar);
            }
            Event::Logged(record) => {
                let Some(bar) = &self.bar else { return };
                match record.kind {
                    Kind::Step => {
                        let speed = record.tokens_per_s.unwrap_or(0.0);
                        bar.set_position(record.step);
                        bar.set_message(format!("loss {:.3}, {speed:.0} tok/s", record.loss));
                    }
                    Kind::Validation => bar.suspend(|| {
                        let least = record.trusted.iter().min_by(|a, b| a.1.total_cmp(b.1));
                        let trust = least.map_or(String::new(), |(name, share)| {
                            format!(", least trusted {:.1}% ({name})", 100.0 * share)
                        });
                        self.terminal.note(&format!(
                            "step {}: validation loss {:.4}{trust}",
                            record.step, record.loss
                        ));
                    }),
                }
            }
            Event::Saved(path) => {
                if let Some(bar) = &self.bar {
                    bar.suspend(|| self.terminal.note(&format!("saved {}", path.display())));
                }
            }
        }
    }
}

fn print_report(report: &TrainReport) {
    let loss = |loss: Option<f64>| loss.map_or("-".into(), |l| format!("{l:.4} nats per token"));
    let rows = [
        ("validation loss", loss(report.validation_loss)),
        ("validation tokens", report.validation_tokens.to_string()),
        (
            "best between steps",
            report.best.map_or("-".into(), |b| format!("{:.4} at step {}", b.loss, b.step)),
        ),
        ("steps, tokens", format!("{}, {}", report.steps, report.tokens)),
        ("parameters", format!("{} ({} in blocks)", report.parameters, report.block_parameters)),
        ("speed", format!("{:.0} tokens/s, {:.1} s", report.tokens_per_s, report.seconds)),
        ("model", report.model.display().to_string()),
    ];
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
    print_table(&rows);
}
