//! What the tests of training share: a recipe that takes a second, its folder, its log.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Lab, prose};

/// A model of two layers on a text of few words; `quantizer` is that section's body.
pub fn recipe(quantizer: &str, train: &str) -> String {
    format!(
        r#"
out = "run"
seed = 1
[model]
preset = "tiny"
[data]
train = ["text.txt"]
context = 32
validation_share = 0.1
tokenizer = {{ vocab_size = 300 }}
[quantizer]
{quantizer}
[train]
batch = 8
lr = 3e-3
{train}
"#
    )
}

/// Four bits for weights and activations.
pub const QUEST: &str = r#"
weights = { type = "quest", bits = 4, hadamard = 32 }
activations = { type = "quest", bits = 4, hadamard = 32 }
"#;

/// A recipe of 24 steps with teachers; `quantizer` is that section's body, `more` stands in the
/// section distill.
pub fn distilled(quantizer: &str, teachers: &str, more: &str) -> String {
    format!("{}\n[distill]\nteachers = [{teachers}]\n{more}", recipe(quantizer, "steps = 24"))
        .replace("tokenizer = { vocab_size = 300 }", "tokenizer = \"teacher/model\"")
}

/// The recipe with the model of the folder `packed`, and its tokenizer.
pub fn from_packed(recipe: &str) -> String {
    recipe
        .replace("preset = \"tiny\"", "init = \"packed\"")
        .replace("tokenizer = { vocab_size = 300 }", "")
}

/// A folder with the text and `recipe.toml`.
pub fn lab(recipe: &str) -> Lab {
    let lab = Lab::empty();
    fs::write(lab.path("text.txt"), prose(6000, 1)).unwrap();
    fs::write(lab.path("recipe.toml"), recipe).unwrap();
    lab
}

/// The records of a run's log.
pub fn log(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("log.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Step and loss of records.
pub fn step_and_loss<'a>(records: impl Iterator<Item = &'a Value>) -> Vec<(u64, f64)> {
    records.map(|r| (r["step"].as_u64().unwrap(), r["loss"].as_f64().unwrap())).collect()
}

/// Losses of the steps of a run's log.
pub fn losses(folder: &Path) -> Vec<(u64, f64)> {
    step_and_loss(log(folder).iter().filter(|r| r["kind"] == "step"))
}

/// Waits until `path` is there; `child` must be at work until then.
pub fn wait_for(child: &mut Child, path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} never came", path.display());
        assert!(child.try_wait().unwrap().is_none(), "it ended early");
        std::thread::sleep(Duration::from_millis(2));
    }
}
