//! Methods that take gradients and allocate rows: what is written meets its goal, is what was
//! planned, decodes to what it computes, and does not depend on threads, interruptions or on what
//! the cache held before.

mod common;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anybit::io::native::{Manifest, verify};
use anybit::io::{Architecture, ModelConfig, synth};
use anybit::ptq::recipe::CalibrationRecipe;
use anybit::ptq::{Count, Recipe};
use anybit::quantize::{self, Options};
use common::{Lab, assert_same, entries, logits_of, prose, read_json, some_tokens};

const INPUT: i32 = 3;

/// Two blocks whose sizes are no multiples of anything, with grouped heads.
fn odd() -> ModelConfig {
    ModelConfig { intermediate_size: 72, vocab_size: 256, ..synth::preset("tiny").unwrap() }
}

fn lab_with(config: &ModelConfig) -> Lab {
    let lab = Lab::empty();
    lab.synth("model", config, 7);
    fs::write(lab.path("calib.txt"), prose(600, 2)).unwrap();
    lab
}

fn recipe(lab: &Lab, method: &str, bits: f64) -> Recipe {
    let data = vec![lab.path("calib.txt").display().to_string()];
    Recipe {
        method: method.into(),
        bits,
        group_size: Some(16),
        calibration: CalibrationRecipe { data, tokens: 256, seqlen: 32, gradient_tokens: 128 },
        ..Recipe::default()
    }
}

fn with_option(mut recipe: Recipe, option: &str) -> Recipe {
    recipe.add_option(option).unwrap();
    recipe
}

/// Quantizes and checks everything that holds for any recipe; returns the size of the weight files.
fn check(lab: &Lab, recipe: &Recipe) -> (Manifest, u64) {
    let (model, out) = (lab.open("model"), lab.path("packed"));
    let options = Options { force: true, report_tokens: 0, ..Options::new(&out) };
    quantize::run(&model, recipe, &options, &mut |_| {})
        .unwrap_or_else(|e| panic!("{recipe:?}: {e}"));
    let packed = lab.open("packed");
    for reference in [None, Some(&model)] {
        let problems = verify(&packed, reference, |_, _| {}).unwrap();
        assert!(problems.is_empty(), "{recipe:?}: {problems:?}");
    }
    let tokens = some_tokens(12, packed.config.vocab_size);
    let (a, b) = (logits_of(&packed, &tokens), logits_of(&model, &tokens));
    assert!(a.iter().all(|z| z.is_finite()) && a != b, "{recipe:?}");
    (packed.manifest().unwrap().clone(), packed.weight_file_bytes())
}

#[test]
fn every_method_on_every_family() {
    let families = [
        odd(),
        ModelConfig { tie_embeddings: false, ..odd() },
        ModelConfig { architecture: Architecture::Qwen2ForCausalLM, qkv_bias: true, ..odd() },
        ModelConfig { architecture: Architecture::Qwen3ForCausalLM, qk_norm: true, ..odd() },
    ];
    for config in families {
        let lab = lab_with(&config);
        for method in ["awq", "squeezellm", "skim", "anybit"] {
            let (manifest, _) = check(&lab, &recipe(&lab, method, 3.0));
            let (codes, total) = manifest.bits_per_weight();
            assert!((codes - 3.0).abs() < 0.02 && total > codes, "{method}: {codes}, {total}");
        }
        let most = 60_000;
        let goal = Recipe { max_bytes: Some(most), ..recipe(&lab, "anybit", 4.0) };
        let (manifest, size) = check(&lab, &goal);
        assert!(size <= most && size > most * 9 / 10, "{size} of {most}");
        let heads = if config.tie_embeddings { 1 } else { 2 };
        assert_eq!(manifest.quantized.len(), 14 + heads);
    }
}

#[test]
fn averages_are_met_and_more_bits_are_better() {
    let lab = lab_with(&odd());
    for method in ["skim", "anybit"] {
        let mut last = f64::INFINITY;
        for bits in [1.5, 2.0, 2.25, 3.2, 4.0, 5.7, 8.0] {
            let (manifest, _) = check(&lab, &recipe(&lab, method, bits));
            let codes = manifest.bits_per_weight().0;
            // A row more or less of the smallest matrix.
            assert!((codes - bits).abs() < 0.05, "{method}: {codes} for {bits}");
            let error: f64 = manifest.quantized.values().map(|r| r.relative_error).sum();
            assert!(error < last, "{method} at {bits}: {error} after {last}");
            last = error;
        }
        for bits in [6.0, 7.0] {
            let goal = Recipe { count: Count::Total, ..recipe(&lab, method, bits) };
            let total = check(&lab, &goal).0.bits_per_weight().1;
            assert!(total <= bits && total > bits - 0.4, "{method}: {total} for {bits}");
        }
    }
}

#[test]
fn sizes_are_never_exceeded() {
    let lab = lab_with(&odd());
    let mut last = 0;
    for most in [50_000, 61_234, 75_001, 99_999] {
        let goal = Recipe { max_bytes: Some(most), ..recipe(&lab, "anybit", 4.0) };
        let (_, size) = check(&lab, &goal);
        assert!(size <= most && size > last, "{size} of {most}, after {last}");
        last = size;
    }
    // SKIM leaves the embedding as it is.
    let goal = Recipe { max_bytes: Some(120_000), ..recipe(&lab, "skim", 4.0) };
    assert!(check(&lab, &goal).1 <= 120_000);
    // More than there can be: every row where its error is least.
    let all = Recipe { max_bytes: Some(1 << 30), ..recipe(&lab, "anybit", 4.0) };
    assert!(check(&lab, &all).1 >= last);
    let run = lab.run(
        "quantize model --method anybit --max-bytes 5kB --calib calib.txt --calib-tokens 256 \
         --seqlen 32 --group-size 16 --report-tokens 0 -o out",
    );
    run.refused(INPUT, &["5000 bytes are too few"]);
    assert!(!lab.path("out").exists());
}

#[test]
fn matched_to_another_model() {
    let lab = lab_with(&odd());
    lab.ok("quantize model --method rtn --bits 5 --group-size 16 --report-tokens 0 -o rtn");
    let flags = "--calib calib.txt --calib-tokens 256 --seqlen 32 --report-tokens 0";
    lab.ok(&format!("quantize model --method anybit --match rtn --group-size 16 {flags} -o out"));
    let (rtn, own) = (lab.open("rtn"), lab.open("out"));
    assert!(own.weight_file_bytes() <= rtn.tensor_bytes());
    assert!(own.weight_file_bytes() > rtn.tensor_bytes() * 9 / 10);
}

#[test]
fn options_change_the_result_and_unknown_ones_are_named() {
    let lab = lab_with(&odd());
    let cases: [(&str, &[&str]); 4] = [
        ("awq", &["grid=1", "clip=false"]),
        ("squeezellm", &["outliers=0.01", "sensitive=0.02"]),
        ("skim", &["scales=false", "fold=false", "init=uniform", "bmax=3", "steps=3"]),
        (
            "anybit",
            &[
                "row_codebooks=0",
                "guided_groups=3",
                "labels=text",
                "whole_model=false",
                "sequential=false",
                "rounds=0",
                "bmin=3",
                "damp=0.2",
            ],
        ),
    ];
    for (method, options) in cases {
        let bits = if method == "skim" { 2.5 } else { 3.0 };
        let plain = check(&lab, &recipe(&lab, method, bits)).0;
        for option in options {
            let other = check(&lab, &with_option(recipe(&lab, method, bits), option)).0;
            assert!(other.quantized != plain.quantized, "{method} with {option}");
        }
        let mistaken = with_option(recipe(&lab, method, bits), &format!("{}x=1", &options[0][..4]));
        let error = mistaken.validate().unwrap_err().to_string();
        assert!(error.contains("unknown field"), "{error}");
    }
    let apart = with_option(recipe(&lab, "anybit", 3.0), "whole_model=false");
    check(&lab, &with_option(apart, "guided_groups=0"));
    let run = "quantize model --report-tokens 0 -o out";
    let refuse = |flags: &str, words: &[&str]| lab.refuses(&format!("{run} {flags}"), INPUT, words);
    refuse("--method gptq --bits 2.5", &["whole bits", "skim or anybit"]);
    refuse("--method rtn --max-bytes 1MB", &["needs a method that allocates"]);
    refuse("--method skim --set bmin=9", &["bmin"]);
    refuse("--method skim --set scale=true", &["unknown field", "did you mean scales?"]);
    refuse("--method skim --layer *.q_proj=bits:3", &["settings of layers do not apply"]);
    refuse("--method anybit --bits 9", &["1 to 8 bits"]);
    refuse("--method anybit --set guided_groups=0", &["without a common unit"]);
    refuse("--method anybit --max-bytes 1MB --embed-bits 4", &["do not apply"]);
}

/// Skipped linears stay as they are, and their norm takes up nothing.
#[test]
fn norms_with_a_skipped_consumer_are_left_alone() {
    let lab = lab_with(&odd());
    for method in ["awq", "skim"] {
        let skip = vec!["model.layers.1.*.k_proj".to_string()];
        let (manifest, _) = check(&lab, &Recipe { skip, ..recipe(&lab, method, 3.0) });
        let folded: Vec<&str> = manifest.folded.keys().map(String::as_str).collect();
        assert!(folded.contains(&"model.layers.0.self_attn.k_proj.weight"), "{folded:?}");
        assert!(!folded.iter().any(|name| name.starts_with("model.layers.1.self_attn")));
        assert!(manifest.quantized["model.layers.1.self_attn.q_proj.weight"].column_scale);
        assert_eq!(manifest.dense["model.layers.0.input_layernorm.weight"].dtype, "F32");
    }
}

fn line(method: &str, goal: &str, out: &str) -> String {
    format!(
        "quantize model --method {method} {goal} --group-size 16 --calib calib.txt \
         --calib-tokens 256 --seqlen 32 --grad-tokens 128 --report-tokens 512 -o {out}"
    )
}

#[test]
fn threads_and_the_cache_do_not_matter() {
    let lab = lab_with(&odd());
    for (method, goal) in [
        ("awq", "--bits 3"),
        ("squeezellm", "--bits 3"),
        ("skim", "--bits 2.5"),
        ("anybit", "--max-bytes 60kB"),
    ] {
        for threads in 1..=3 {
            let cache = format!("cache-{method}-{threads}");
            let out = format!("{method}-{threads}");
            let line = line(method, goal, &out);
            lab.ok(&format!("--threads {threads} {line} --cache {cache}"));
            assert_same(&lab.path(&format!("{method}-1")), &lab.path(&out));
        }
        // From a full cache, and from one that another goal left.
        lab.ok(&format!("{} --cache cache-{method}-1", line(method, goal, "again")));
        assert_same(&lab.path(&format!("{method}-1")), &lab.path("again"));
        fs::remove_dir_all(lab.path("again")).unwrap();
    }
}

/// Killed anywhere, gradients and error tables included, and resumed: the same bytes.
#[cfg(unix)]
#[test]
fn killed_at_any_moment_and_resumed() {
    let lab = lab_with(&ModelConfig { num_layers: 4, hidden_size: 96, head_dim: 24, ..odd() });
    for (method, goal) in [("skim", "--bits 2.5"), ("anybit", "--max-bytes 90kB")] {
        let undisturbed = format!("{method}-whole");
        lab.ok(&format!("{} --cache whole-cache", line(method, goal, &undisturbed)));
        let line = format!("{} --cache {method}-cache --resume", line(method, goal, "out"));
        let (mut kills, mut wait) = (0, Duration::from_millis(10));
        loop {
            let mut child =
                lab.command(&line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            std::thread::sleep(wait);
            wait = wait.mul_f64(1.15);
            let _ = child.kill();
            if child.wait().unwrap().success() {
                break;
            }
            if lab.path("out").exists() {
                break;
            }
            kills += 1;
        }
        assert!(kills > 0, "{method} ended before it could be killed");
        assert_same(&lab.path(&undisturbed), &lab.path("out"));
        fs::remove_dir_all(lab.path("out")).unwrap();
    }
}

fn only(folder: &Path, start: &str) -> std::path::PathBuf {
    let name = entries(folder).into_iter().find(|n| n.starts_with(start)).unwrap();
    folder.join(name)
}

#[test]
fn a_damaged_cache_is_named() {
    let lab = lab_with(&odd());
    let line = line("skim", "--bits 2.5", "out");
    lab.ok(&line);
    fs::rename(lab.path("out"), lab.path("whole")).unwrap();
    let cache = lab.path(".anybit-cache");
    let block = only(&cache, "sensitivity-").join("block-000.safetensors");
    let table = only(&cache, "tables-").join("tables-000.json");
    for path in [&block, &table] {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        lab.refuses(&line, INPUT, &[&name]);
        // A NaN among the gradients: bf16 7f c0 in the place of the last value.
        if path == &block {
            let mut broken = bytes.clone();
            let at = broken.len();
            broken[at - 2..].copy_from_slice(&[0xc0, 0x7f]);
            fs::write(path, broken).unwrap();
            lab.refuses(&line, INPUT, &["sensitivity", "NaN"]);
        }
        fs::write(path, bytes).unwrap();
    }
    lab.ok(&line);
    assert_same(&lab.path("whole"), &lab.path("out"));
}

#[test]
fn frontiers() {
    let lab = lab_with(&odd());
    let flags =
        "--group-size 16 --calib calib.txt --calib-tokens 256 --seqlen 32 --grad-tokens 128";
    for method in ["skim", "anybit"] {
        let line =
            format!("plan model --method {method} {flags} --bits 2:4:0.5 --svg f.svg --json -");
        let found = lab.run(&line).json();
        let points = found["points"].as_array().unwrap();
        assert_eq!(points.len(), 5);
        let errors: Vec<f64> =
            points.iter().map(|p| p["predicted_error"].as_f64().unwrap()).collect();
        assert!(errors.windows(2).all(|e| e[1] < e[0]), "{errors:?}");
        // What is written is what was planned.
        lab.ok(&format!("{} --force", line_at(method, 3.0)));
        let size = lab.open("out").weight_file_bytes();
        assert_eq!(points[2]["weight_file_bytes"].as_u64(), Some(size));
        let report = read_json(&lab.path("out/report.json"));
        assert_eq!(report["predicted_error"], points[2]["predicted_error"]);
        assert!(fs::read_to_string(lab.path("f.svg")).unwrap().starts_with("<svg"));
    }
    let run = lab.run(&format!("plan model --method gptq {flags}"));
    run.refused(2, &["skim, anybit"]);
    lab.run(&format!("plan model --method skim {flags} --bits 4:2:1"))
        .refused(2, &["LOW:HIGH:STEP"]);
}

fn line_at(method: &str, bits: f64) -> String {
    line(method, &format!("--bits {bits}"), "out")
}
