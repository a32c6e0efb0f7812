//! One command, one result: an interrupted run that is resumed ends in the same bytes as an
//! undisturbed one, whatever interrupted it, and so does a run on any number of threads.
#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::Duration;

use anybit::io::atomic::PartialFolder;
use anybit::io::{ModelConfig, synth};
use common::{Lab, QUICK, Run, assert_same, contents, prose, read_json};

const INPUT: i32 = 3;
const OUTPUT: i32 = 4;

/// Blocks that take long enough to be interrupted among them.
fn blocks(layers: usize) -> Lab {
    let config = ModelConfig {
        hidden_size: 128,
        intermediate_size: 256,
        num_layers: layers,
        head_dim: 32,
        vocab_size: 256,
        ..synth::preset("tiny").unwrap()
    };
    let lab = Lab::empty();
    lab.synth("model", &config, 5);
    fs::write(lab.path("calib.txt"), prose(3000, 4)).unwrap();
    lab
}

/// The command for [`blocks`], everything on that a run can write.
fn quantize(tokens: usize, out: &str) -> String {
    format!(
        "quantize model --method gptq --bits 3 --group-size 32 --embed-bits 4 --calib calib.txt \
         --calib-tokens {tokens} --seqlen 128 --report-tokens 512 -o {out}"
    )
}

/// Blocks that the journal of an unfinished output counts.
fn finished(partial: &Path) -> Option<u64> {
    let text = fs::read_to_string(partial.join("journal.json")).ok()?;
    let journal: serde_json::Value = serde_json::from_str(&text).unwrap();
    journal["finished"].as_u64()
}

/// Runs the command and kills it once so many blocks are finished; false when it was faster.
fn killed_after(blocks: u64, lab: &Lab, line: &str, partial: &Path) -> bool {
    let mut command = lab.command(line);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while finished(partial).is_none_or(|n| n < blocks) {
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "{line}: {status}");
            return false;
        }
        sleep(Duration::from_micros(500));
    }
    // SIGKILL: nothing of the program runs after it.
    let _ = child.kill();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{line}: {status}");
    !status.success()
}

#[test]
fn killed_twice_and_resumed() {
    let lab = blocks(8);
    lab.ok(&quantize(2048, "undisturbed"));
    for attempt in 0..20 {
        let out = format!("run-{attempt}");
        let (line, partial) = (quantize(2048, &out), lab.path(&format!("{out}.partial")));
        let killed = killed_after(2, &lab, &line, &partial)
            && killed_after(5, &lab, &format!("{line} --resume"), &partial);
        // An output in its place is a whole one, even if the kill came right behind it.
        if lab.path(&out).exists() {
            assert_same(&lab.path("undisturbed"), &lab.path(&out));
            continue;
        }
        assert!(killed, "no output, and nothing that kept it from being written");
        let Some(blocks) = finished(&partial) else { continue };
        assert!(blocks >= 5, "finished blocks were lost: {blocks} are left");
        lab.ok(&format!("{line} --resume"));
        assert!(!partial.exists());
        assert_same(&lab.path("undisturbed"), &lab.path(&out));
        return;
    }
    panic!("every run ended before it could be killed");
}

#[test]
fn threads_do_not_matter() {
    let lab = blocks(2);
    for threads in 1..=3 {
        lab.ok(&format!("--threads {threads} {}", quantize(512, &format!("gptq-{threads}"))));
        let rtn = "quantize model --method rtn --bits 2 --asym --scale mse --group-size -1 \
                   --report-tokens 512";
        lab.ok(&format!("--threads {threads} {rtn} -o rtn-{threads}"));
        lab.ok(&format!("--threads {threads} convert model off-{threads} --off-grid 0.1"));
    }
    for threads in 2..=3 {
        for kind in ["gptq", "rtn", "off"] {
            let other = lab.path(&format!("{kind}-{threads}"));
            assert_same(&lab.path(&format!("{kind}-1")), &other);
        }
    }
}

#[test]
fn threads_do_not_matter_for_scores() {
    let lab = blocks(2);
    lab.ok(&quantize(256, "packed"));
    let line = "eval model packed --reference model --text calib.txt --ctx 128 \
                --limit-tokens 512 --json -";
    let scores = |threads: usize| {
        let mut scores = lab.run(&format!("--threads {threads} {line}")).json();
        for score in scores["models"].as_array_mut().unwrap() {
            for measured in ["prefill_tokens_per_s", "peak_rss_bytes"] {
                assert!(score.as_object_mut().unwrap().remove(measured).is_some());
            }
        }
        scores
    };
    assert_eq!(scores(1), scores(2));
    assert_eq!(scores(1), scores(3));
}

#[test]
fn an_output_that_another_process_is_writing() {
    let lab = Lab::with_tiny();
    let held = PartialFolder::create(&lab.path("out"), false, false).unwrap();
    fs::write(held.path().join("block-000.safetensors"), "theirs").unwrap();
    let lines = [
        format!("quantize tiny {QUICK} -o out"),
        format!("quantize tiny {QUICK} -o out --resume"),
        format!("quantize tiny {QUICK} -o out --force"),
        "convert tiny out".to_string(),
        "synth --preset tiny -o out".to_string(),
    ];
    for line in &lines {
        lab.run(line).refused(OUTPUT, &["out.partial", "another process"]);
        let theirs = fs::read(held.path().join("block-000.safetensors")).unwrap();
        assert_eq!(theirs, b"theirs", "{line}");
    }
    drop(held);
    lab.ok(&lines[0]);
}

/// The same with a real run: whenever the second comes, the first ends undisturbed.
#[test]
fn a_second_run_does_not_disturb_the_first() {
    let lab = blocks(4);
    lab.ok(&quantize(2048, "alone"));
    let line = quantize(2048, "out");
    let mut command = lab.command(&line);
    let mut first = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let there = || lab.path("out.partial/lock").exists() || lab.path("out").exists();
    while !there() {
        sleep(Duration::from_micros(500));
    }
    let second = lab.run(&line);
    second.refused(OUTPUT, &["out"]);
    let reasons = ["another process", "exists already"];
    assert!(reasons.iter().any(|r| second.stderr.contains(r)), "{second:?}");
    assert!(first.wait().unwrap().success());
    assert_same(&lab.path("alone"), &lab.path("out"));
}

/// The command for `tiny` whose blocks fit into 100 kB and whose result does not.
fn large(method: &str, out: &str) -> String {
    format!("quantize tiny --method {method} --bits 8 {QUICK} -o {out}")
}

/// A lab in which the disk was full when `out` was put together.
fn interrupted(method: &str) -> Lab {
    let lab = Lab::with_tiny();
    let line = large(method, "out");
    let run = Run::of(&line, lab.limited("-f 200", &line));
    run.refused(OUTPUT, &["cannot write", "model.safetensors"]);
    assert!(!lab.path("out").exists());
    assert_eq!(finished(&lab.path("out.partial")), Some(2), "finished blocks are kept");
    lab
}

#[test]
fn a_full_disk_loses_no_finished_block() {
    for method in ["rtn", "gptq"] {
        let lab = interrupted(method);
        lab.ok(&large(method, "undisturbed"));
        // Again in vain: what there is stays.
        let again = format!("{} --resume", large(method, "out"));
        Run::of(&again, lab.limited("-f 200", &again)).refused(OUTPUT, &["cannot write"]);
        assert_eq!(finished(&lab.path("out.partial")), Some(2));
        lab.ok(&again);
        assert!(!lab.path("out.partial").exists());
        assert_same(&lab.path("undisturbed"), &lab.path("out"));
    }
}

/// What fails behind the last block costs no block.
#[test]
fn a_report_that_cannot_be_written_loses_no_block() {
    let lab = interrupted("gptq");
    lab.ok(&large("gptq", "undisturbed"));
    let again = format!("{} --resume", large("gptq", "out"));
    let place = lab.path("out.partial/report.json");
    fs::create_dir_all(place.join("taken")).unwrap();
    lab.run(&again).refused(OUTPUT, &["report.json"]);
    assert_eq!(finished(&lab.path("out.partial")), Some(2));
    fs::remove_dir_all(place).unwrap();
    lab.ok(&again);
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
}

#[test]
fn without_resume_everything_begins_afresh() {
    let lab = interrupted("gptq");
    fs::write(lab.path("out.partial/stray"), "left by someone").unwrap();
    lab.ok(&large("gptq", "undisturbed"));
    lab.ok(&large("gptq", "out"));
    assert!(!lab.path("out.partial").exists());
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
}

#[test]
fn nothing_to_resume_is_a_beginning() {
    let lab = Lab::with_tiny();
    lab.ok(&large("gptq", "undisturbed"));
    lab.ok(&format!("{} --resume", large("gptq", "out")));
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
    // And what is finished is not resumed.
    let again = lab.run(&format!("{} --resume", large("gptq", "out")));
    again.refused(OUTPUT, &["out exists already", "--force"]);
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
}

/// A run is resumed by the same command on the same files alone; a refusal keeps what there is.
#[test]
fn another_run_is_not_resumed() {
    let lab = interrupted("gptq");
    lab.ok(&large("gptq", "undisturbed"));
    let partial = lab.path("out.partial");
    let before = contents(&partial);
    let resume = format!("{} --resume", large("gptq", "out"));
    let refuse = |line: &str, what: &str| {
        let what = format!("begun with another {what}");
        let run = lab.run(line);
        run.refused(INPUT, &["out.partial/journal.json", &what, "without --resume"]);
        assert!(!lab.path("out").exists());
        assert!(contents(&partial) == before, "{line} changed the journal");
    };
    refuse(&format!("{resume} --damp 0.02"), "recipe");
    refuse(&resume.replace("--bits 8", "--bits 7"), "recipe");
    refuse(&resume.replace("--report-tokens 0", "--report-tokens 512"), "text");

    let text = fs::read(lab.path("calib.txt")).unwrap();
    fs::write(lab.path("calib.txt"), prose(600, 9)).unwrap();
    refuse(&resume, "text");
    fs::write(lab.path("calib.txt"), text).unwrap();

    fs::rename(lab.path("tiny"), lab.path("kept")).unwrap();
    lab.synth("tiny", &synth::preset("tiny").unwrap(), 1);
    refuse(&resume, "model");
    fs::remove_dir_all(lab.path("tiny")).unwrap();
    fs::rename(lab.path("kept"), lab.path("tiny")).unwrap();

    lab.ok(&resume);
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
}

#[test]
fn a_damaged_journal_is_named() {
    let lab = interrupted("gptq");
    lab.ok(&large("gptq", "undisturbed"));
    let resume = format!("{} --resume", large("gptq", "out"));
    let partial = lab.path("out.partial");
    let restore = |name: &str, bytes: &[u8]| fs::write(partial.join(name), bytes).unwrap();
    let files = contents(&partial);
    for name in ["journal.json", "journal/inputs-002.bin", "journal/block-001.safetensors"] {
        let bytes = &files[name];
        restore(name, &bytes[..bytes.len() / 2]);
        lab.run(&resume).refused(INPUT, &[&format!("out.partial/{name}")]);
        restore(name, bytes);
    }
    let mut flipped = files["journal/inputs-002.bin"].clone();
    flipped[100] ^= 1;
    restore("journal/inputs-002.bin", &flipped);
    lab.run(&resume).refused(INPUT, &["out.partial/journal/inputs-002.bin"]);
    restore("journal/inputs-002.bin", &files["journal/inputs-002.bin"]);
    for name in ["journal/inputs-002.bin", "journal/block-000.safetensors"] {
        fs::remove_file(partial.join(name)).unwrap();
        lab.run(&resume).refused(INPUT, &[&format!("out.partial/{name}")]);
        restore(name, &files[name]);
    }
    lab.ok(&resume);
    assert_same(&lab.path("undisturbed"), &lab.path("out"));
    assert_eq!(read_json(&lab.path("out/anybit.json"))["quantized"].as_object().unwrap().len(), 14);
}
