//! `anybit distill-vision`.

use anybit::Result;
use anybit::grad::vision::{Speed, VisionReport};
use anybit::vision::{Mean, SweepReport, read_recipe, run as train, sweep};
use indicatif::ProgressBar;

use super::output::{Terminal, print_table, written};
use super::run_args::RunArgs;

/// Train a quantized network for images, with or without teachers.
///
/// The recipe is a TOML file with data (IDX or CIFAR-10 files), model, quantizer, train and
/// full_precision: how teachers and the student before it is quantized are trained. With a section
/// distill the student learns from teachers too, weighed by a balancer. The result is computed in
/// integers as well, and timed. With --sweep every balancer of the section sweep is run at every
/// scale of the teacher's loss with every seed; an interrupted sweep goes on where it was.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit distill-vision runs/gor-fashion.toml
  anybit distill-vision runs/gor-fashion.toml --set distill.scale=0.01 --out runs/small-unit
  anybit distill-vision runs/gor-fashion.toml --sweep --json docs/results/gor-fashion.json")]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,

    /// Go through balancers, scales and seeds.
    #[arg(long)]
    sweep: bool,
}

pub fn run(Args { run: args, sweep: all }: Args, terminal: &Terminal) -> Result<()> {
    let mut recipe = read_recipe(&args.recipe, &args.set)?;
    if let Some(out) = &args.out {
        recipe.out.clone_from(out);
    }
    let bar = terminal.bar("training", 0);
    let mut watch = |name: &str, done: u64, of: u64| show(&bar, name, done, of);
    if all {
        let report = sweep(&recipe, args.force, &mut watch, &mut |cell, done, of| {
            bar.suspend(|| {
                terminal.note(&format!(
                    "{done}/{of}: {} at {}, seed {}: {:.2}%",
                    cell.balancer,
                    cell.scale,
                    cell.seed,
                    100.0 * cell.accuracy
                ));
            });
        })?;
        bar.finish_and_clear();
        if written(args.json.as_deref(), &report)? {
            return Ok(());
        }
        print_sweep(&report);
    } else {
        let (report, speed) = train(&recipe, args.force, &mut watch)?;
        bar.finish_and_clear();
        if written(args.json.as_deref(), &report)? {
            return Ok(());
        }
        print_report(&report, speed);
    }
    Ok(())
}

pub(super) fn show(bar: &ProgressBar, name: &str, done: u64, of: u64) {
    bar.set_length(of);
    bar.set_position(done);
    bar.set_message(name.to_string());
}

pub(super) fn percent(value: f64) -> String {
    format!("{:.2}%", 100.0 * value)
}

fn mean(value: &Mean) -> String {
    let error = value.error.map_or(String::new(), |e| format!(" ± {:.2}", 100.0 * e));
    format!("{:.2}{error}", 100.0 * value.mean)
}

fn print_report(report: &VisionReport, speed: Option<Speed>) {
    let mut rows = vec![
        ("training images", report.train_images.to_string()),
        ("test images", report.test_images.to_string()),
        ("parameters", report.parameters.to_string()),
        ("student in full precision", percent(report.full_precision)),
    ];
    for accuracy in &report.teachers {
        rows.push(("teacher", percent(*accuracy)));
    }
    if let Some(accuracy) = report.ensemble.filter(|_| report.teachers.len() > 1) {
        rows.push(("teachers as one", percent(accuracy)));
    }
    rows.push(("student, rounded and not trained", percent(report.student.rounded)));
    rows.push(("student", percent(report.student.accuracy)));
    if let Some(integers) = report.integers {
        rows.push(("student in integers", percent(integers.accuracy)));
        rows.push(("classes as in training", percent(integers.agreement)));
    }
    if let Some(speed) = speed {
        rows.push(("ms per image, full precision", format!("{:.4}", speed.full_precision)));
        rows.push(("ms per image, integers", format!("{:.4}", speed.integers)));
    }
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
    print_table(&rows);
}

fn print_sweep(report: &SweepReport) {
    println!("accuracy in %, mean ± standard error over seeds");
    println!("student in full precision: {}", mean(&report.full_precision));
    if let Some(ensemble) = &report.ensemble {
        println!("teachers as one: {}", mean(ensemble));
    }
    let mut rows = vec![["balancer", "scale", "accuracy", "over fixed"].map(String::from).to_vec()];
    for row in &report.rows {
        let over = row.over_fixed.as_ref().map_or("-".into(), mean);
        rows.push(vec![row.balancer.clone(), row.scale.to_string(), mean(&row.accuracy), over]);
    }
    print_table(&rows);
    for (balancer, spread) in &report.spread {
        println!("spread of {balancer} over the scales: {:.2}", 100.0 * spread);
    }
}
