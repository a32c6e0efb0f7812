//! Training from the command line: it learns, goes on where it was cut bit by bit, depends on no
//! number of threads, and refuses what it cannot do with a reason.

mod common;

use std::fs;
use std::path::Path;

use anybit::grad::train::{Precision, QuantizedDecoder, QuantizerRecipe};
use anybit::grad::{Tape, TrainDecoder};
use anybit::io::Checkpoint;
use anybit::runtime::Decoder;
use common::training::{self, QUEST, lab, log, losses, recipe, wait_for};
use common::{Lab, Run, assert_same, contents, entries, logits, prose};
use serde_json::Value;

const USAGE: i32 = 2;
const INPUT: i32 = 3;
const OUTPUT: i32 = 4;

const LEARNED: &str = r#"
weights = { type = "lsq", bits = 4 }
activations = { type = "lsq_plus_activation", bits = 4 }
"#;

/// All that a run leaves but what holds times.
fn lasting(lab: &Lab, run: &str) -> (Vec<(u64, f64)>, Vec<Vec<u8>>) {
    let folder = lab.path(run);
    let mut files = contents(&folder.join("model")).into_values().collect::<Vec<_>>();
    for step in entries(&folder.join("checkpoints")) {
        let checkpoint = contents(&folder.join("checkpoints").join(step));
        files.extend(checkpoint.into_iter().filter(|(n, _)| n != "state.json").map(|(_, f)| f));
    }
    (losses(&folder), files)
}

#[test]
fn it_learns_and_says_what_it_did() {
    let lab = lab(&recipe(QUEST, "steps = 60"));
    let report = lab.command("train recipe.toml --json -");
    let report = Run::of("train", report).json();
    let loss = report["validation_loss"].as_f64().unwrap();
    // Words drawn evenly from sixteen: about 2.8 nats a word, and tokens are about words.
    let first = losses(&lab.path("run"))[0].1;
    assert!(first > 5.0 && loss < 0.6 * first, "{first} to {loss}");
    assert!(report["trusted"]["model.layers.0.attn_input"].as_f64().unwrap() > 0.9);
    assert_eq!(report["steps"], 60);
    let names = entries(&lab.path("run"));
    for name in ["checkpoints", "events", "log.jsonl", "loss.svg", "model", "report.json"] {
        assert!(names.iter().any(|n| n == name), "{name} is missing: {names:?}");
    }
    // Two newest checkpoints, and the best if it is another.
    assert!((2..=3).contains(&entries(&lab.path("run/checkpoints")).len()));
    lab.ok("inspect run/model");
    lab.ok("verify run/model");
    lab.ok("generate run/model --raw --prompt the --max-tokens 4");
}

/// Logits of the training graph with the weights of a checkpoint, `[tokens, vocab]`.
fn trained_logits(folder: &Path, recipe: &QuantizerRecipe, tokens: &[u32]) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let decoder = TrainDecoder::load(&checkpoint, tokens.len()).unwrap();
    let student = QuantizedDecoder::new(decoder, recipe.clone(), Precision::F32).unwrap();
    let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
    let weights = student.weights(&mut weights_tape, false);
    let leaves = student.leaves(&weights, &weights_tape, &mut tape, false);
    let hidden = student.forward(&mut tape, &leaves, tokens, tokens.len()).unwrap().hidden;
    let logits = student.decoder.logits(&mut tape, &leaves.vars, hidden);
    tape.data(logits).to_vec()
}

/// What training simulated is what the runtime computes from the packed codes.
#[test]
fn the_packed_model_computes_what_training_simulated() {
    for (bits, kind) in [(1, "quest"), (2, "quest"), (4, "quest"), (8, "quest"), (4, "absmax")] {
        let both = format!("{{ type = \"{kind}\", bits = {bits}, hadamard = 32 }}");
        let lab = lab(&recipe(&format!("weights = {both}\nactivations = {both}"), "steps = 6"));
        lab.ok("train recipe.toml");
        lab.ok("verify run/model");
        let report = common::read_json(&lab.path("run/report.json"));
        assert_eq!(report["format"], "packed");
        let quantizer: QuantizerRecipe =
            serde_json::from_value(report["quantizer"].clone()).unwrap();
        let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 290).collect();
        let step = lab.path("run/checkpoints/step-00000006");
        let simulated = trained_logits(&step, &quantizer, &tokens);
        let decoder = Decoder::load(&lab.open("run/model"), 32).unwrap();
        let computed = logits(&decoder, &tokens);
        let largest = simulated.iter().fold(0f32, |m, v| m.max(v.abs()));
        // All tokens at once, and one after another.
        assert_eq!(2 * simulated.len(), computed.len());
        for (a, b) in simulated.iter().cycle().zip(&computed) {
            assert!((a - b).abs() < 2e-4 * largest, "{kind} {bits}: {a} and {b} of {largest}");
        }
    }
}

/// Estimators that the format has no codes for become ordinary weights on their grid.
#[test]
fn weights_without_codes_are_written_as_numbers() {
    let ternary = "weights = { type = \"ternary\", hadamard = 32, form = \"full\" }";
    let lab = lab(&recipe(ternary, "steps = 4"));
    let report = Run::of("train", lab.command("train recipe.toml --json -")).json();
    assert_eq!(report["format"], "dense");
    let loss = report["validation_loss"].as_f64().unwrap();
    let quantizer: QuantizerRecipe = serde_json::from_value(report["quantizer"].clone()).unwrap();
    assert!(loss.is_finite());
    let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 290).collect();
    let step = lab.path("run/checkpoints/step-00000004");
    let simulated = trained_logits(&step, &quantizer, &tokens);
    let computed = logits(&Decoder::load(&lab.open("run/model"), 32).unwrap(), &tokens);
    for (a, b) in simulated.iter().cycle().zip(&computed) {
        assert!((a - b).abs() < 1e-4, "{a} and {b}");
    }
}

#[test]
fn cut_anywhere_it_ends_in_the_same_bytes() {
    for quantizer in [QUEST, LEARNED] {
        let lab = lab(&recipe(quantizer, "steps = 24\ncheckpoint_every = 6\nmicro_batch = 4"));
        lab.ok("train recipe.toml --out whole/run --threads 1");
        let mut child =
            lab.command("--quiet train recipe.toml --out cut/run --threads 2").spawn().unwrap();
        wait_for(&mut child, &lab.path("cut/run/checkpoints/step-00000006/state.json"));
        child.kill().unwrap();
        child.wait().unwrap();
        lab.ok("train recipe.toml --out cut/run --threads 2 --resume");
        let (whole, cut) = (lasting(&lab, "whole/run"), lasting(&lab, "cut/run"));
        assert_eq!(whole.0, cut.0);
        assert!(whole.1 == cut.1, "files differ");
    }
}

#[test]
fn accumulated_gradients_are_those_of_the_batch() {
    let lab = lab(&recipe(QUEST, "steps = 10"));
    lab.ok("train recipe.toml --out whole");
    lab.ok("train recipe.toml --out parts --set train.micro_batch=2");
    for (a, b) in losses(&lab.path("whole")).iter().zip(losses(&lab.path("parts"))) {
        assert!((a.1 - b.1).abs() < 2e-3, "step {}: {} and {}", a.0, a.1, b.1);
    }
}

#[test]
fn training_goes_on_from_a_quantized_model() {
    let lab = lab(&recipe("", "steps = 30"));
    lab.ok("train recipe.toml --out dense");
    fs::write(lab.path("calib.txt"), prose(600, 3)).unwrap();
    lab.ok("quantize dense/model --method rtn --bits 2 --group-size 32 --calib calib.txt \
         --calib-tokens 128 --seqlen 32 --report-tokens 0 --out packed");
    let tuned = training::from_packed(&recipe(QUEST, "steps = 15"));
    fs::write(lab.path("tuned.toml"), tuned).unwrap();
    lab.ok("train tuned.toml --out tuned");
    let losses = losses(&lab.path("tuned"));
    let (first, last) = (losses[0].1, losses[losses.len() - 1].1);
    assert!(last < first, "{first} to {last}");
}

#[test]
fn what_cannot_be_done_is_said_before_anything_is_written() {
    let lab = lab(&recipe(QUEST, "steps = 4"));
    let refuse = |set: &str, code: i32, words: &[&str]| {
        lab.refuses(&format!("train recipe.toml --out out --set {set}"), code, words);
    };
    refuse("quantizer.weights.bits=9", INPUT, &["quantizer.weights", "9"]);
    refuse("quantizer.weights.hadamard=128", INPUT, &["hadamard"]);
    refuse("quantizer.weights.kind='quest'", USAGE, &["kind"]);
    refuse("train.lr=-1", INPUT, &["train.lr"]);
    refuse("train.spets=4", USAGE, &["spets"]);
    refuse("train.batch=0", INPUT, &["train.batch"]);
    lab.run("train none.toml --out out").refused(INPUT, &["none.toml"]);
    // A folder of something else.
    fs::create_dir_all(lab.path("mine/data")).unwrap();
    fs::write(lab.path("mine/data/a.txt"), "mine").unwrap();
    lab.run("train recipe.toml --out mine --force").refused(INPUT, &["mine", "not empty"]);
    assert!(lab.path("mine/data/a.txt").exists());
}

#[test]
fn what_is_found_on_the_way_names_the_place() {
    let lab = lab(&recipe(QUEST, "steps = 4\ncheckpoint_every = 2"));
    let mut other = recipe(QUEST, "steps = 4").replace("text.txt", "short.txt");
    fs::write(lab.path("short.txt"), "a b c").unwrap();
    fs::write(lab.path("short.toml"), &other).unwrap();
    lab.run("train short.toml --out out").refused(INPUT, &["context"]);
    other = other.replace("short.txt", "missing.txt");
    fs::write(lab.path("missing.toml"), other).unwrap();
    lab.run("train missing.toml --out out2").refused(INPUT, &["missing.txt"]);
    // Every block of the tiny model is 64 or 192 wide.
    let wide = "quantizer.weights.hadamard=128 --set quantizer.activations.hadamard=128";
    lab.run(&format!("train recipe.toml --out out3 --set {wide}"))
        .refused(INPUT, &["q_proj", "K = 64", "128"]);
    lab.run("train recipe.toml --out out4 --set train.lr=1e9 --set train.steps=40")
        .refused(1, &["step", "checkpoint"]);

    lab.ok("train recipe.toml");
    lab.run("train recipe.toml").refused(OUTPUT, &["run exists", "--force"]);
    lab.run("train recipe.toml --resume --set train.lr=1e-4").refused(INPUT, &["train differs"]);
    // A byte of the newest checkpoint changes.
    let path = lab.path("run/checkpoints/step-00000004/training.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 5;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    lab.run("train recipe.toml --resume")
        .refused(INPUT, &["step-00000004", "training.safetensors", "hash"]);
    fs::remove_dir_all(lab.path("run/checkpoints/step-00000004")).unwrap();
    lab.ok("train recipe.toml --resume");
}

#[cfg(unix)]
#[test]
fn a_full_disk_keeps_the_checkpoint_before() {
    let lab = lab(&recipe(QUEST, "steps = 8\ncheckpoint_every = 4"));
    lab.ok("train recipe.toml --out whole");
    // Room for the tokens, not for the moments.
    let limited = lab.limited("-f 600", "train recipe.toml --out cut");
    Run::of("train", limited).refused(OUTPUT, &["write"]);
    assert!(entries(&lab.path("cut/checkpoints")).iter().all(|n| !n.ends_with("00000004")));
    lab.ok("train recipe.toml --out cut --resume");
    assert_eq!(lasting(&lab, "whole").0, lasting(&lab, "cut").0);
}

/// A recipe with teachers for a student of two bits.
fn distilled(teachers: &str, more: &str) -> String {
    training::distilled(&QUEST.replace("bits = 4", "bits = 2"), teachers, more)
}

#[test]
fn a_student_learns_from_its_teachers_and_goes_on_where_it_was_cut() {
    let lab = lab(&recipe("", "steps = 60"));
    lab.ok("train recipe.toml --out teacher");
    let folder = lab.path("teacher/model");
    for (name, more) in [
        ("gor", ""),
        ("fixed", "balancer = { type = \"fixed\", task = 0.0, teacher = 1.0 }"),
        ("logits", "balancer = { type = \"logit_gradient\" }\nloss = { type = \"jsd\" }"),
        ("dwa", "balancer = { type = \"dwa\" }\nloss = { type = \"reverse_kl\" }"),
        ("kendall", "balancer = { type = \"uncertainty\" }\nloss = { type = \"cakld\" }"),
        ("gradnorm", "balancer = { type = \"gradnorm\", batches = 2 }"),
    ] {
        let text = distilled("\"teacher/model\"", more);
        fs::write(lab.path("distill.toml"), text).unwrap();
        lab.ok(&format!("distill distill.toml --out {name}/run"));
        let records = log(&lab.path(&format!("{name}/run")));
        let steps: Vec<&Value> = records.iter().filter(|r| r["kind"] == "step").collect();
        let teacher = |r: &Value| r["extra"]["teacher_loss"].as_f64().unwrap();
        let (first, last) = (teacher(steps[0]), teacher(steps[steps.len() - 1]));
        assert!(last < first, "{name}: {first} to {last}");
        if name == "gradnorm" {
            for record in &steps {
                let of = |key: &str| record["extra"][key].as_f64().unwrap();
                let sum = of("task_weight") + of("teacher_weight");
                assert!((sum - 2.0).abs() < 1e-9 && of("task_block_norm") > 0.0, "{record}");
            }
            assert_ne!(steps[steps.len() - 1]["extra"]["task_weight"], 1.0);
        }
    }
    fs::write(lab.path("distill.toml"), distilled("\"teacher/model\"", "")).unwrap();
    let cut = "distill distill.toml --out cut/run --set train.checkpoint_every=6";
    let mut child = lab.command(cut).spawn().unwrap();
    wait_for(&mut child, &lab.path("cut/run/checkpoints/step-00000006/state.json"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.ok(&format!("{cut} --resume"));
    assert_eq!(losses(&lab.path("gor/run")), losses(&lab.path("cut/run")));
    assert_same(&lab.path("gor/run/model"), &lab.path("cut/run/model"));

    // Two teachers; one that is no number; one with another vocabulary; none.
    let both = distilled("\"teacher/model\", \"gor/run/model\"", "");
    fs::write(lab.path("two.toml"), &both).unwrap();
    // A packed student as a teacher rounds activations, which a teacher does not.
    lab.run("distill two.toml --out two").refused(INPUT, &["gor/run/model", "activations"]);
    fs::write(lab.path("two.toml"), both.replace("gor/run", "teacher")).unwrap();
    lab.ok("distill two.toml --out two");
    lab.run("train distill.toml --out out").refused(USAGE, &["anybit distill"]);
    lab.run("distill recipe.toml --out out").refused(USAGE, &["teachers"]);
    lab.synth("stranger", &anybit::io::synth::preset("tiny").unwrap(), 1);
    fs::write(lab.path("other.toml"), distilled("\"stranger\"", "")).unwrap();
    lab.run("distill other.toml --out other").refused(INPUT, &["vocabulary", "512"]);
    let weights = folder.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    lab.run("distill distill.toml --out nan").refused(INPUT, &["teacher/model", "NaN"]);
}
