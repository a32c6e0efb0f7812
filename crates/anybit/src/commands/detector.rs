//! `anybit distill-detector`.

use anybit::Result;
use anybit::detect::{read_recipe, run as train};
use anybit::grad::vision::detect::DetectorReport;

use super::output::{Terminal, print_table, written};
use super::run_args::RunArgs;
use super::vision::{percent, show};

/// Train a quantized detector of objects in images, with or without a teacher.
///
/// The recipe is a TOML file with data (a folder of images and boxes, such as `anybit synth shapes`
/// writes), model, quantizer, train and full_precision: how the teacher and the student before it is
/// quantized are trained. With a section distill the student learns from a teacher too, weighed by a
/// balancer. What is reported is the mean average precision at an overlap of one half (mAP@0.5).
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit synth shapes -o .cache/shapes
  anybit distill-detector runs/gor-shapes.toml
  anybit distill-detector runs/gor-shapes.toml --set distill.balancer.type=fixed --out runs/fixed")]
pub struct Args {
    #[command(flatten)]
    run: RunArgs,
}

pub fn run(Args { run: args }: Args, terminal: &Terminal) -> Result<()> {
    let mut recipe = read_recipe(&args.recipe, &args.set)?;
    if let Some(out) = &args.out {
        recipe.out.clone_from(out);
    }
    let bar = terminal.bar("training", 0);
    let mut watch = |name: &str, done: u64, of: u64| show(&bar, name, done, of);
    let report = train(&recipe, args.force, &mut watch)?;
    bar.finish_and_clear();
    if written(args.json.as_deref(), &report)? {
        return Ok(());
    }
    print_report(&report);
    Ok(())
}

fn print_report(report: &DetectorReport) {
    let map50 = &report.map50;
    let mut rows = vec![
        ("training images", report.train_images.to_string()),
        ("test images", report.test_images.to_string()),
        ("objects in them", report.test_objects.to_string()),
        ("parameters", report.parameters.to_string()),
        ("mAP@0.5 of the student in full precision", percent(map50.full_precision)),
    ];
    let mut push = |name: &'static str, value: Option<f64>| {
        rows.extend(value.map(|value| (name, percent(value))));
    };
    push("of the teacher", map50.teacher);
    push("of the student, rounded and not trained", Some(map50.rounded));
    push("of the student", Some(map50.trained));
    push("of the student in integers", map50.integers);
    let rows: Vec<Vec<String>> =
        rows.into_iter().map(|(name, value)| vec![name.to_string(), value]).collect();
    print_table(&rows);
}
