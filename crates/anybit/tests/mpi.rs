//! Training over several processes: the same losses as one, and a job that ends when one of them
//! does, to be resumed. Needs mpirun.
#![cfg(feature = "mpi")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Lab, prose};
use serde_json::Value;

const RECIPE: &str = r#"
out = "run"
seed = 1
[model]
preset = "tiny"
[data]
train = ["text.txt"]
context = 32
validation_share = 0.1
tokenizer = { vocab_size = 300 }
[quantizer]
weights = { type = "quest", bits = 4, hadamard = 32 }
activations = { type = "quest", bits = 4, hadamard = 32 }
[train]
steps = 24
batch = 8
lr = 3e-3
checkpoint_every = 6
"#;

fn lab() -> Lab {
    let lab = Lab::empty();
    fs::write(lab.path("text.txt"), prose(6000, 1)).unwrap();
    fs::write(lab.path("recipe.toml"), RECIPE).unwrap();
    lab
}

fn mpirun(lab: &Lab, ranks: usize, line: &str) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]);
    command.arg(env!("CARGO_BIN_EXE_anybit")).args(["--quiet", "--threads", "1"]);
    command.args(line.split_whitespace()).current_dir(lab.path("")).stdout(Stdio::null());
    command
}

fn losses(folder: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(folder.join("log.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.map(|r| (r["step"].as_u64().unwrap(), r["loss"].as_f64().unwrap())).collect()
}

/// Processes below `parent`, from /proc.
fn descendants(parent: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let after = stat.rsplit(") ").next().unwrap_or_default().to_string();
        if after.split(' ').nth(1) == Some(&parent.to_string()) {
            found.push(pid);
            found.extend(descendants(pid));
        }
    }
    found
}

fn wait_for(child: &mut Child, path: &Path) {
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "{} never came", path.display());
        assert!(child.try_wait().unwrap().is_none(), "the job ended early");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn two_ranks_are_one() {
    let lab = lab();
    // One process that takes the ranks' parts one after another computes the same bits.
    lab.ok("--quiet train recipe.toml --out parts --set train.micro_batch=4");
    assert!(mpirun(&lab, 2, "train recipe.toml --out two").status().unwrap().success());
    let two = losses(&lab.path("two"));
    let steps = |all: Vec<(u64, f64)>| -> Vec<(u64, f64)> {
        // Validation losses are sums of other parts.
        let mut all = all;
        all.dedup_by_key(|r| r.0);
        all
    };
    assert_eq!(steps(losses(&lab.path("parts"))), steps(two.clone()));
    // One that takes them at once rounds sums of gradients otherwise, which quantizers amplify from
    // step to step; the first steps agree.
    lab.ok("--quiet train recipe.toml --out whole");
    for (a, b) in losses(&lab.path("whole")).iter().zip(&two).take(3) {
        assert!((a.1 - b.1).abs() < 1e-5 * a.1, "step {}: {} and {}", a.0, a.1, b.1);
    }
}

#[test]
fn a_dead_rank_ends_the_job_which_goes_on_from_its_checkpoint() {
    let lab = lab();
    assert!(mpirun(&lab, 2, "train recipe.toml --out whole").status().unwrap().success());
    let mut job = mpirun(&lab, 2, "train recipe.toml --out cut").spawn().unwrap();
    wait_for(&mut job, &lab.path("cut/checkpoints/step-00000006/state.json"));
    let last = descendants(job.id()).into_iter().max().unwrap();
    assert!(Command::new("kill").args(["-9", &last.to_string()]).status().unwrap().success());
    assert!(!job.wait().unwrap().success(), "nobody noticed");
    assert!(mpirun(&lab, 2, "train recipe.toml --out cut --resume").status().unwrap().success());
    assert_eq!(losses(&lab.path("whole")), losses(&lab.path("cut")));
}

#[test]
fn a_batch_that_cannot_be_shared_is_refused_by_all() {
    let lab = lab();
    let out =
        mpirun(&lab, 3, "train recipe.toml --out out").stderr(Stdio::piped()).output().unwrap();
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("multiple of 3"), "{text}");
}
