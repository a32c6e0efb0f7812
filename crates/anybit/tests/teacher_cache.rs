//! Teachers' outputs on disk: the same losses as with the teachers beside, no teacher in the second
//! run, the same bytes after an interruption and on several ranks, and refusals that name the file.

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anybit::grad::train::distributed::{Alone, Communicator, ThreadGroup};
use anybit::grad::train::{Event, RunOptions, run};
use anybit::train::read_recipe;
use common::training::{self, QUEST, losses, recipe, wait_for};
use common::{Lab, assert_same, contents, entries};

const INPUT: i32 = 3;

/// A cache that keeps every token.
const ALL: &str = "cache = { dir = \"cache\", top_k = 100000, stored_as = \"f32\" }";
/// One of eight tokens.
const FEW: &str = "cache = { dir = \"cache\", max_bytes = \"20MiB\", top_k = 8 }";

/// A folder with a trained teacher.
fn lab() -> Lab {
    let lab = training::lab(&recipe("", "steps = 40"));
    lab.ok("train recipe.toml --out teacher");
    lab
}

/// Writes `NAME.toml`; `quantizer` is that section's body.
fn write(lab: &Lab, name: &str, quantizer: &str, more: &str) {
    let text = training::distilled(quantizer, "\"teacher/model\"", more);
    fs::write(lab.path(&format!("{name}.toml")), text).unwrap();
}

/// Losses of a run's steps: of the text and from the teacher.
fn both_losses(folder: &Path) -> Vec<[f64; 2]> {
    let records = training::log(folder);
    let steps = records.iter().filter(|r| r["kind"] == "step");
    let of = |r: &serde_json::Value, key: &str| r["extra"][key].as_f64().unwrap();
    steps.map(|r| [of(r, "task_loss"), of(r, "teacher_loss")]).collect()
}

/// The caches of the folder.
fn caches(lab: &Lab) -> Vec<String> {
    let mut names = entries(&lab.path("cache"));
    names.retain(|name| name.ends_with(".teacher"));
    names
}

#[test]
fn every_token_kept_is_the_teacher_beside() {
    let lab = lab();
    write(&lab, "live", "", "");
    write(&lab, "all", "", ALL);
    write(&lab, "few", "", FEW);
    for name in ["live", "all", "few"] {
        lab.ok(&format!("distill {name}.toml --out {name}/run"));
    }
    let [live, all, few] = ["live", "all", "few"].map(|n| both_losses(&lab.path(n).join("run")));
    assert_eq!((live.len(), all.len()), (24, 24));
    for (step, (live, all)) in live.iter().zip(&all).enumerate() {
        for (a, b) in live.iter().zip(all) {
            assert!((a - b).abs() < 1e-3 * a.max(0.1), "step {step}: {a} and {b}");
        }
    }
    // Coarser outcomes have less divergence; the student is the same before the first step.
    assert!(few[0][1] > 0.0 && few[0][1] < live[0][1], "{:?} {:?}", few[0], live[0]);
    assert_eq!(caches(&lab).len(), 2);
    // What the balancer learned stays with the checkpoints.
    for (name, bytes) in contents(&lab.path("all/run/model")) {
        let learned = bytes.windows(10).any(|part| part == b"sigma.task");
        assert!(!learned || name == "report.json", "{name}");
    }
}

/// Runs a recipe of the lab in this process; how often teachers were run.
fn taught(lab: &Lab, name: &str, out: &str, comm: &mut dyn Communicator) -> usize {
    // Paths of recipes are relative to the folder that a process runs in.
    let text = fs::read_to_string(lab.path(&format!("{name}.toml"))).unwrap();
    let mut absolute = text;
    for relative in ["text.txt", "teacher/model", "cache"] {
        let path = lab.path(relative).display().to_string();
        absolute = absolute.replace(&format!("\"{relative}\""), &format!("{path:?}"));
    }
    let file = lab.path(&format!("{name}-{}-{}.toml", out.replace('/', "-"), comm.rank()));
    fs::write(&file, absolute).unwrap();
    let mut recipe = read_recipe(&file, &["train.micro_batch=4".into()]).unwrap();
    recipe.out = lab.path(out);
    let mut count = 0;
    let mut watch = |event: Event<'_>| count += usize::from(matches!(event, Event::Teaching(..)));
    run(&recipe, RunOptions::default(), comm, &mut watch).unwrap();
    count
}

#[test]
fn a_second_run_never_runs_the_teacher() {
    let lab = lab();
    write(&lab, "few", QUEST, FEW);
    assert!(taught(&lab, "few", "first/run", &mut Alone) > 0);
    let made = contents(&lab.path("cache"));
    assert_eq!(taught(&lab, "few", "second/run", &mut Alone), 0);
    assert_eq!(losses(&lab.path("first/run")), losses(&lab.path("second/run")));
    assert_same(&lab.path("first/run/model"), &lab.path("second/run/model"));
    assert!(made == contents(&lab.path("cache")), "the cache was written again");
    // Another teacher, though in the same place, is another cache.
    lab.ok("train recipe.toml --out teacher --force --set seed=5");
    assert!(taught(&lab, "few", "third/run", &mut Alone) > 0);
    assert_eq!(caches(&lab).len(), 2);
}

#[test]
fn ranks_read_what_they_made_together() {
    let lab = lab();
    write(&lab, "few", QUEST, FEW);
    let mut ranks = ThreadGroup::ranks(2);
    let counts: Vec<usize> = std::thread::scope(|scope| {
        let lab = &lab;
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|rank| scope.spawn(move || taught(lab, "few", "two/run", rank)))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(counts[0] > 0 && counts[0] == counts[1], "{counts:?}");
    // One process takes the parts of both, one after another, and finds their cache.
    assert_eq!(taught(&lab, "few", "one/run", &mut Alone), 0);
    assert_eq!(losses(&lab.path("one/run")), losses(&lab.path("two/run")));
}

#[test]
fn cut_anywhere_it_goes_on_from_the_cache() {
    let lab = lab();
    write(&lab, "few", QUEST, FEW);
    let line =
        |out: &str| format!("distill few.toml --out {out}/run --set train.checkpoint_every=6");
    lab.ok(&line("whole"));
    let mut child = lab.command(&line("cut")).spawn().unwrap();
    wait_for(&mut child, &lab.path("cut/run/checkpoints/step-00000006/state.json"));
    child.kill().unwrap();
    child.wait().unwrap();
    lab.ok(&format!("{} --resume", line("cut")));
    assert_eq!(losses(&lab.path("whole/run")), losses(&lab.path("cut/run")));
    assert_same(&lab.path("whole/run/model"), &lab.path("cut/run/model"));
    assert_eq!(caches(&lab).len(), 1);
}

#[test]
fn what_cannot_be_used_is_named() {
    let lab = lab();
    write(&lab, "few", QUEST, FEW);
    let distill = |set: &str| lab.run(&format!("distill few.toml --out refused {set} --force"));
    let started = Instant::now();
    let small = "--set distill.cache.max_bytes=10kB";
    distill(small).refused(INPUT, &["limit of 10000", "top_k", "max_bytes"]);
    assert!(started.elapsed() < Duration::from_secs(20));
    assert!(!lab.path("cache").exists());
    distill("--set distill.cache.top_k=0").refused(INPUT, &["distill.cache.top_k"]);
    distill("--set distill.cache.max_bytes=2cups").refused(2, &["unknown unit"]);
    distill("--set distill.cache.size=1").refused(2, &["size"]);

    lab.ok("distill few.toml --out few/run");
    lab.ok("distill few.toml --out more/run --set distill.cache.top_k=9");
    let names = caches(&lab);
    let [few, more] = &names[..] else { panic!("{names:?}") };
    let [few, more] = [few, more].map(|name| lab.path("cache").join(name));
    let (good, other) = (fs::read(&few).unwrap(), fs::read(&more).unwrap());
    let both = |bytes: &[u8], other: &[u8], words: &[&str]| {
        fs::write(&few, bytes).unwrap();
        fs::write(&more, other).unwrap();
        distill("").refused(INPUT, words);
    };
    both(&other, &good, &["its k is", "another teacher, text or setting", "distill.cache.dir"]);
    both(&good[..good.len() / 2], &other[..other.len() / 2], &[".teacher", "delete this file"]);
    fs::write(&few, &good).unwrap();
    fs::write(&more, &other).unwrap();
    lab.ok("distill few.toml --out again/run");
}
