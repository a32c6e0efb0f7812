//! `anybit scaling fit` on the runs published with QuEST gives the constants published with them.

mod common;

use std::fs;
use std::path::PathBuf;

use anybit::eval::scaling::{Fit, FitOptions, Irreducible, fit, read_runs};
use common::Lab;

/// The published runs; the file names its source.
fn published() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../anybit-eval/tests/data/quest_runs.csv"))
}

fn fitted(irreducible: Irreducible, huber: Option<f64>) -> Fit {
    let read = read_runs(&published()).unwrap();
    assert_eq!(read.runs.len(), 104);
    fit(&read.runs, &FitOptions { irreducible, huber, ..FitOptions::default() }).unwrap()
}

/// The two agree to so many significant digits of the second.
fn agrees(found: f64, stored: f64, digits: i32) -> bool {
    let last = 10f64.powi(stored.abs().log10().floor() as i32 + 1 - digits);
    (found - stored).abs() <= last / 2.0
}

fn assert_effs(fit: &Fit, stored: &[(&str, f64)]) {
    for (name, eff) in stored {
        assert!(agrees(fit.law.eff[*name], *eff, 3), "{name}: {}, not {eff}", fit.law.eff[*name]);
    }
}

#[test]
fn the_published_constants_to_three_digits() {
    let found = fitted(Irreducible::NonNegative, None);
    let law = &found.law;
    for (name, value, stored) in [
        ("A", law.a, 8.134),
        ("α", law.alpha, 0.062727),
        ("B", law.b, 86.41),
        ("β", law.beta, 0.241288),
    ] {
        assert!(agrees(value, stored, 3), "{name}: {value}, not {stored}");
    }
    // The optimizer of the paper stopped at 0.00142 on its way to the edge, which is the optimum.
    assert!((law.e - 0.00142).abs() < 0.002, "{}", law.e);
    assert!(agrees(found.rms_residual, 0.0038, 2), "{}", found.rms_residual);
    assert!(agrees(found.max_residual, 0.014, 2), "{}", found.max_residual);
    let stored = [
        ("BF16", 1.0),
        ("QuEST W1A1", 0.0205),
        ("QuEST W2A2", 0.1519),
        ("QuEST W3A3", 0.4331),
        ("QuEST W4A4", 0.6918),
        ("QuEST W8A8", 1.0162),
        ("QuEST FP4", 0.6296),
        ("QuEST INT4-2:4", 0.3812),
        ("no-HT W1A1", 0.0156),
        ("no-HT W2A2", 0.0784),
        ("no-HT W3A3", 0.3221),
        ("no-HT W4A4", 0.6033),
        ("no-HT W8A8", 0.9376),
        ("weight-only W1A16", 0.1384),
        ("weight-only W2A16", 0.4137),
        ("weight-only W3A16", 0.6531),
        ("weight-only W4A16", 0.8404),
    ];
    assert_eq!(law.eff.len(), stored.len());
    assert_effs(&found, &stored);
    for (name, value) in [
        ("QuEST W1A1", 0.328),
        ("QuEST W4A4", 2.767),
        ("QuEST INT4-2:4", 2.440),
        ("weight-only W3A16", 3.483),
    ] {
        let row = found.precisions.iter().find(|p| p.name == name).unwrap();
        assert!(agrees(row.eff_per_bit.unwrap(), value, 3), "{row:?}");
    }
    assert_eq!(found.optima["QuEST"], "QuEST W4A4");
    assert_eq!(found.optima["weight-only"], "weight-only W3A16");
}

#[test]
fn the_optimum_survives_other_losses_and_constraints() {
    let huber = fitted(Irreducible::NonNegative, Some(1e-3));
    assert!(agrees(huber.law.a, 8.21, 3), "{}", huber.law.a);
    // 0.06325, on the edge between two third digits.
    assert!((huber.law.alpha - 0.0633).abs() < 1e-4, "{}", huber.law.alpha);
    assert_effs(
        &huber,
        &[
            ("QuEST W1A1", 0.0197),
            ("QuEST W2A2", 0.156),
            ("QuEST W3A3", 0.4304),
            ("QuEST W4A4", 0.6904),
            ("QuEST W8A8", 1.0022),
            ("QuEST FP4", 0.618),
            ("QuEST INT4-2:4", 0.376),
        ],
    );
    // Chinchilla's E.
    let fixed = fitted(Irreducible::Fixed(1.69), None);
    assert_eq!(fixed.law.e, 1.69);
    assert!(agrees(fixed.rms_residual, 0.0087, 2), "{}", fixed.rms_residual);
    assert_effs(
        &fixed,
        &[
            ("QuEST W2A2", 0.128),
            ("QuEST W3A3", 0.369),
            ("QuEST W4A4", 0.629),
            ("QuEST W8A8", 0.847),
        ],
    );
    // Without the constraint E is negative: no law of nature, but the better fit.
    let free = fitted(Irreducible::Free, None);
    assert!(agrees(free.law.e, -1.907, 3), "{}", free.law.e);
    assert!(agrees(free.rms_residual, 0.003369, 3), "{}", free.rms_residual);
    for found in [huber, fixed, free] {
        assert_eq!(found.optima["QuEST"], "QuEST W4A4");
    }
}

#[test]
fn the_command_prints_draws_and_repeats_itself() {
    let lab = Lab::empty();
    fs::copy(published(), lab.path("runs.csv")).unwrap();
    let line = "scaling fit runs.csv --bootstrap 40 --seed 3 --svg law.svg --json law.json";
    let text = lab.ok(line);
    for word in ["8.134", "86.44", "QuEST W4A4", "best", "104 runs", "do not extrapolate"] {
        assert!(text.contains(word), "nothing of {word:?} in:\n{text}");
    }
    assert_eq!(text, lab.ok(&format!("{line} --threads 1")));
    let svg = fs::read_to_string(lab.path("law.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("QuEST, curves at 97 tokens per parameter"));
    let json = common::read_json(&lab.path("law.json"));
    let [low, high] =
        [0usize, 1].map(|i| json["intervals"]["eff"]["QuEST W4A4"][i].as_f64().unwrap());
    assert!(0.6 < low && low < 0.6918 && 0.6918 < high && high < 0.8, "{low} {high}");
    assert_eq!(json["intervals"]["resamples"], 40);
    assert_eq!(json["runs"].as_array().unwrap().len(), 104);

    // What was written is read again.
    let again = lab.run("scaling fit law.json --bootstrap 0 --json -").json();
    assert_eq!(again["law"], json["law"]);
    assert!(again["intervals"].is_null());
}

#[test]
fn what_cannot_be_used_is_said() {
    let lab = Lab::empty();
    fs::write(lab.path("bad.csv"), "params,tokens,precision,loss\n1e6,1e8,BF16,three\n").unwrap();
    let words = ["bad.csv", "line 2, column loss", "\"three\" is no number"];
    lab.refuses("scaling fit bad.csv --json out", 3, &words);
    fs::write(lab.path("few.csv"), "params,tokens,precision,loss\n1e6,1e8,BF16,3\n").unwrap();
    lab.refuses("scaling fit few.csv --json out", 3, &["1 runs cannot give 5 constants"]);
    lab.refuses("scaling fit none.csv --json out", 3, &["none.csv"]);
    lab.refuses("scaling fit few.csv --free-e --fix-e 1 --json out", 2, &["--fix-e"]);
}
