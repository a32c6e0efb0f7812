//! Training over several processes: the same losses as one, and a job that ends when one of them
//! does, to be resumed. Needs mpirun.
#![cfg(feature = "mpi")]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::Lab;
use common::training::{self, QUEST, log, losses, recipe, step_and_loss, wait_for};

fn lab() -> Lab {
    training::lab(&recipe(QUEST, "steps = 24\ncheckpoint_every = 6"))
}

fn mpirun(lab: &Lab, ranks: usize, line: &str) -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "-n", &ranks.to_string()]);
    command.arg(env!("CARGO_BIN_EXE_anybit")).args(["--quiet", "--threads", "1"]);
    command.args(line.split_whitespace()).current_dir(lab.path("")).stdout(Stdio::null());
    command
}

/// Losses of steps and validations.
fn all_losses(lab: &Lab, run: &str) -> Vec<(u64, f64)> {
    step_and_loss(log(&lab.path(run)).iter())
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

#[test]
fn two_ranks_are_one() {
    let lab = lab();
    // One process that takes the ranks' parts one after another computes the same bits.
    lab.ok("--quiet train recipe.toml --out parts --set train.micro_batch=4");
    assert!(mpirun(&lab, 2, "train recipe.toml --out two").status().unwrap().success());
    // Validation losses are sums of other parts.
    assert_eq!(losses(&lab.path("parts")), losses(&lab.path("two")));
    // One that takes them at once rounds sums of gradients otherwise, which quantizers amplify from
    // step to step; the first steps agree.
    lab.ok("--quiet train recipe.toml --out whole");
    for (a, b) in all_losses(&lab, "whole").iter().zip(&all_losses(&lab, "two")).take(3) {
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
    assert_eq!(all_losses(&lab, "whole"), all_losses(&lab, "cut"));
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
