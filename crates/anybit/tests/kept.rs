//! Packed models that are distilled with their codes kept: same codes and sizes, less divergence,
//! and a file that computes what training simulated.

mod common;

use std::fs;

use anybit::core::QuantizedMatrix;
use anybit::grad::Tape;
use anybit::grad::train::{Precision, QuantizerRecipe, checkpoint, kept};
use anybit::io::{Checkpoint, Weight};
use anybit::runtime::Decoder;
use common::training::{self, losses, recipe, wait_for};
use common::{Lab, assert_same, logits, prose, read_json};

const USAGE: i32 = 2;
const INPUT: i32 = 3;

const KEPT: &str = "weights = { type = \"kept\", column_scale = true }";
const TEACHER_ALONE: &str = "balancer = { type = \"fixed\", task = 0.0, teacher = 1.0 }";
const CALIBRATION: &str =
    "--calib calib.txt --calib-tokens 256 --seqlen 32 --grad-tokens 128 --report-tokens 0";

/// Names, and how models are quantized: codebooks of rows and row groups, shared ones, scales with
/// and without zero points, factors of columns that a norm took up or not, sparse parts, online
/// transforms.
const PACKED: [(&str, &str); 7] = [
    ("skim", "--method skim --bits 2.25"),
    ("gptq", "--method gptq --bits 3 --group-size 24"),
    ("anybit", "--method anybit --bits 2.25 --group-size 16"),
    ("awq", "--method awq --bits 2 --group-size 16 --asym"),
    ("columns", "--method skim --bits 2.6 --set fold=false"),
    ("squeezellm", "--method squeezellm --bits 2 --set outliers=0.01"),
    ("quarot", "--transform quarot --method rtn --bits 3 --group-size 32"),
];

/// A folder with a trained teacher, and the same in numbers of two bytes.
fn lab() -> Lab {
    let lab = training::lab(&recipe("", "steps = 60"));
    lab.ok("train recipe.toml --out teacher");
    lab.ok("convert teacher/model reference --dtype bf16");
    fs::write(lab.path("calib.txt"), prose(600, 3)).unwrap();
    lab
}

fn quantize(lab: &Lab, name: &str) {
    let options = PACKED.iter().find(|(n, _)| *n == name).unwrap().1;
    lab.ok(&format!("quantize reference {options} {CALIBRATION} --out {name}"));
}

/// Writes `distill.toml` for a packed model of the folder.
fn write(lab: &Lab, init: &str) {
    let text = training::distilled(KEPT, "\"teacher/model\"", TEACHER_ALONE)
        .replace("preset = \"tiny\"", &format!("init = \"{init}\""))
        .replace("lr = 3e-3", "lr = 1e-2\nmicro_batch = 4");
    fs::write(lab.path("distill.toml"), text).unwrap();
}

/// Packed matrices by name.
fn matrices(checkpoint: &Checkpoint) -> Vec<(String, QuantizedMatrix)> {
    let names = checkpoint.manifest().unwrap().quantized.keys();
    let matrix = |name: &String| match checkpoint.weight(name).unwrap() {
        Weight::Quantized(matrix) => (name.clone(), (*matrix).clone()),
        Weight::Stored(_) => panic!("{name} is not packed"),
    };
    names.map(matrix).collect()
}

/// All but scales and codebooks is the same; some of those are not.
fn check_codes(before: &Checkpoint, after: &Checkpoint) {
    assert_eq!(before.weight_file_bytes(), after.weight_file_bytes());
    let (old, new) = (matrices(before), matrices(after));
    assert_eq!(old.len(), new.len());
    for ((name, old), (_, new)) in old.iter().zip(&new) {
        assert_eq!((&old.row_perm, &old.sparse), (&new.row_perm, &new.sparse), "{name}");
        assert_eq!(old.column_scale.is_some(), new.column_scale.is_some(), "{name}");
        for (old, new) in old.planes.iter().zip(&new.planes) {
            assert_eq!((old.grid, &old.codes, &old.zeros), (new.grid, &new.codes, &new.zeros));
        }
        assert_ne!(old, new, "{name} did not move");
    }
    let (old, new) = (before.manifest().unwrap(), after.manifest().unwrap());
    assert_eq!((&old.transform, &old.sites), (&new.transform, &new.sites));
    for (name, record) in &old.dense {
        let kept = &new.dense[name];
        assert_eq!((&record.dtype, record.bytes), (&kept.dtype, kept.bytes), "{name}");
        let stay = ["embed_tokens", "lm_head", ".transform."];
        let frozen = stay.iter().any(|part| name.contains(part));
        assert_eq!(record.blake3 == kept.blake3, frozen, "{name}");
    }
}

/// Logits of the training graph with the values of the last checkpoint.
fn trained_logits(lab: &Lab, init: &str, tokens: &[u32]) -> Vec<f32> {
    let report = read_json(&lab.path(&format!("{init}-run/report.json")));
    assert_eq!(report["format"], "packed");
    let quantizer: QuantizerRecipe = serde_json::from_value(report["quantizer"].clone()).unwrap();
    let packed = lab.open(init);
    let mut student = kept::student(&packed, &quantizer, Precision::F32, tokens.len()).unwrap();
    let step = lab.path(&format!("{init}-run/checkpoints/step-00000024"));
    checkpoint::load(&step, &mut student).unwrap();
    let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
    let weights = student.weights(&mut weights_tape, false);
    let leaves = student.leaves(&weights, &weights_tape, &mut tape, false);
    let hidden = student.forward(&mut tape, &leaves, tokens, tokens.len()).unwrap().hidden;
    let logits = student.decoder.logits(&mut tape, &leaves.vars, hidden);
    tape.data(logits).to_vec()
}

/// KL divergence from the teacher on the text of training.
fn divergence(lab: &Lab, model: &str) -> f64 {
    let line = format!(
        "eval {model} --reference teacher/model --text text.txt --ctx 32 --limit-tokens 2048 \
         --json -"
    );
    lab.run(&line).json()["models"][0]["kl_mean"].as_f64().unwrap()
}

#[test]
fn codes_stay_and_the_model_gets_nearer_to_its_teacher() {
    let lab = lab();
    for (name, _) in PACKED {
        quantize(&lab, name);
        write(&lab, name);
        lab.ok(&format!("distill distill.toml --out {name}-run"));
        let model = format!("{name}-run/model");
        check_codes(&lab.open(name), &lab.open(&model));
        lab.ok(&format!("verify {model}"));
        lab.ok(&format!("verify {model} --reference {name}"));
        let (before, after) = (divergence(&lab, name), divergence(&lab, &model));
        assert!(after < 0.9 * before, "{name}: {before} to {after}");

        let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 290).collect();
        let simulated = trained_logits(&lab, name, &tokens);
        let computed = logits(&Decoder::load(&lab.open(&model), 32).unwrap(), &tokens);
        let largest = simulated.iter().fold(0f32, |m, v| m.max(v.abs()));
        // All tokens at once, and one after another.
        assert_eq!(2 * simulated.len(), computed.len());
        for (a, b) in simulated.iter().cycle().zip(&computed) {
            assert!((a - b).abs() < 2e-4 * largest, "{name}: {a} and {b} of {largest}");
        }

        let own = lab.open(name).manifest().unwrap().recipe["method"].clone();
        let opened = lab.open(&model);
        let manifest = opened.manifest().unwrap();
        assert_eq!((manifest.base_model.as_str(), &manifest.recipe["method"]), (name, &own));
        assert_eq!(manifest.recipe["trained"][0]["weights"]["type"], "kept");
        lab.ok(&format!("inspect {model}"));
    }
    lab.ok("generate skim-run/model --raw --prompt the --max-tokens 4");
    // What was trained is packed: it may be trained again.
    write(&lab, "skim-run/model");
    lab.ok("distill distill.toml --out again --set train.steps=2");
    let again = lab.open("again/model");
    let notes = &again.manifest().unwrap().recipe["trained"];
    assert_eq!(notes.as_array().unwrap().len(), 2);
}

#[test]
fn cut_anywhere_it_ends_in_the_same_bytes() {
    let lab = lab();
    quantize(&lab, "skim");
    write(&lab, "skim");
    let line = |out: &str, threads: usize| {
        format!(
            "distill distill.toml --out {out}/run --threads {threads} \
             --set train.checkpoint_every=6"
        )
    };
    lab.ok(&line("whole", 1));
    let mut child = lab.command(&line("cut", 2)).spawn().unwrap();
    wait_for(&mut child, &lab.path("cut/run/checkpoints/step-00000006/state.json"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.ok(&format!("{} --resume", line("cut", 2)));
    assert_eq!(losses(&lab.path("whole/run")), losses(&lab.path("cut/run")));
    assert_same(&lab.path("whole/run/model"), &lab.path("cut/run/model"));

    // Values learned for other codes are not these.
    fs::remove_dir_all(lab.path("skim")).unwrap();
    lab.ok(&format!("quantize reference --method skim --bits 3 {CALIBRATION} --out skim"));
    lab.run(&format!("{} --resume", line("cut", 2)))
        .refused(INPUT, &["step-00000024", "model.init"]);
}

#[test]
fn what_has_no_codes_to_keep_is_refused_at_once() {
    let lab = lab();
    write(&lab, "teacher/model");
    let refuse = |set: &str, code: i32, words: &[&str]| {
        lab.refuses(&format!("distill distill.toml --out out {set}"), code, words);
    };
    refuse("", INPUT, &["model.init", "teacher/model", "not packed"]);
    refuse("--set quantizer.weights.bits=3", USAGE, &["bits"]);
    let activations = "--set quantizer.activations={type=\"quest\",bits=4}";
    refuse(activations, INPUT, &["quantizer.activations", "kept"]);
    let rounded = "--method rtn --bits 4 --group-size 32 --kv-bits 4";
    lab.ok(&format!("quantize reference {rounded} {CALIBRATION} --out rounded"));
    refuse("--set model.init='rounded'", INPUT, &["model.init", "rounded", "quantized"]);
    refuse("--set model.init='nowhere'", INPUT, &["nowhere"]);
    let random = training::distilled(KEPT, "\"teacher/model\"", "");
    fs::write(lab.path("distill.toml"), random).unwrap();
    refuse("", INPUT, &["quantizer.weights", "model.init"]);
}

/// Without a teacher the text alone trains values, and linears that are not packed stay.
#[test]
fn the_text_alone_trains_what_is_packed() {
    let lab = lab();
    let skip = "model.layers.0.self_attn.q_proj";
    lab.ok(&format!(
        "quantize reference --method rtn --bits 2 --group-size 16 --embed-bits 4 --skip {skip} \
         --report-tokens 0 --out packed"
    ));
    let text = training::from_packed(&recipe("weights = { type = \"kept\" }", "steps = 20"))
        .replace("lr = 3e-3", "lr = 1e-2");
    fs::write(lab.path("text.toml"), text).unwrap();
    lab.ok("train text.toml --out run");
    let losses = losses(&lab.path("run"));
    let (first, last) = (losses[0].1, losses[losses.len() - 1].1);
    assert!(last < first, "{first} to {last}");
    lab.ok("verify run/model --reference packed");
    let (before, after) = (lab.open("packed"), lab.open("run/model"));
    let (old, new) = (before.manifest().unwrap(), after.manifest().unwrap());
    let embedding = "model.embed_tokens.weight";
    assert_eq!(old.quantized[embedding].blake3, new.quantized[embedding].blake3);
    let linear = format!("{skip}.weight");
    assert_eq!(old.dense[&linear].blake3, new.dense[&linear].blake3);
    assert_eq!(before.weight_file_bytes(), after.weight_file_bytes());
}
