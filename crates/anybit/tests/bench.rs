//! `anybit bench`: its figures are there, fit together, and are refused where there can be none.

mod common;

use anybit::runtime::{Decoder, KvCache, PlainType};
use common::{Lab, read_json};
use serde_json::Value;

const USAGE: i32 = 2;
const INPUT: i32 = 3;

/// A figure that has to be there.
fn positive(value: &Value, key: &str) -> f64 {
    let figure = value[key].as_f64().unwrap_or_else(|| panic!("no {key} in {value}"));
    assert!(figure.is_finite() && figure > 0.0, "{key}: {figure}");
    figure
}

fn same(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

/// The median of so many repetitions, whose summary fits them.
fn median(rates: &Value, repeat: usize) -> f64 {
    let samples: Vec<f64> =
        rates["samples"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    assert_eq!(samples.len(), repeat, "{rates}");
    assert!(samples.iter().all(|s| s.is_finite() && *s > 0.0), "{rates}");
    let mean = samples.iter().sum::<f64>() / repeat as f64;
    assert!(same(positive(rates, "mean"), mean), "{rates}");
    let median = positive(rates, "median");
    let below = samples.iter().filter(|s| **s <= median).count();
    let above = samples.iter().filter(|s| **s >= median).count();
    assert!(2 * below >= repeat && 2 * above >= repeat, "{rates}");
    match repeat {
        1 => assert!(rates["sd"].is_null(), "{rates}"),
        _ => assert!(rates["sd"].as_f64().is_some_and(|sd| sd.is_finite() && sd >= 0.0)),
    }
    median
}

#[test]
fn figures_fit_together() {
    let lab = Lab::with_tiny();
    let line = "bench tiny --prompt 12 --gen 6 --repeat 3 --batch 2,3 --threads 2 --json -";
    let report = lab.run(line).json();
    let checkpoint = lab.open("tiny");
    let decoder = Decoder::load(&checkpoint, 12).unwrap();
    let shapes = checkpoint.config.tensors();
    let parameters: usize = shapes.iter().map(|(_, s)| s.iter().product::<usize>()).sum();

    assert_eq!(report["model"]["path"], "tiny");
    assert_eq!(report["model"]["format"], "hugging_face");
    assert_eq!(report["model"]["bits_per_weight_codes"], 16.0);
    assert_eq!(report["model"]["bits_per_weight_total"], 16.0);
    assert_eq!(report["model"]["file_bytes"], checkpoint.weight_file_bytes());
    assert_eq!(report["parameters"], parameters);
    assert_eq!(report["threads"], 2);
    assert!(report["isa"].as_str().is_some_and(|name| !name.is_empty()), "{report}");
    assert_eq!(report["machine"]["threads"], 2);
    for (key, value) in [("prompt", 12), ("gen", 6), ("repeat", 3), ("warmup", 1)] {
        assert_eq!(report[key], value, "{key}");
    }

    let rows = report["batches"].as_array().unwrap();
    let batches: Vec<u64> = rows.iter().map(|r| r["batch"].as_u64().unwrap()).collect();
    assert_eq!(batches, [1, 2, 3]);
    for row in rows {
        assert_eq!(positive(row, "decode_tokens_per_s"), median(&row["decode"], 3));
    }
    assert_eq!(positive(&rows[0], "prefill_tokens_per_s"), median(&rows[0]["prefill"], 3));
    for row in &rows[1..] {
        assert!(row["prefill"].is_null() && row["prefill_tokens_per_s"].is_null(), "{row}");
    }
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert_eq!(positive(&report, key), positive(&rows[0], key));
    }

    assert_eq!(report["bytes_per_token"], decoder.bytes_per_token());
    assert_eq!(report["weight_bytes"], decoder.weight_bytes());
    assert!(positive(&report, "rss_bytes") > positive(&report, "weight_bytes"));
    assert_eq!(report["kv_bytes"], KvCache::new(&decoder, 12, PlainType::F16).bytes());
    let stream = positive(&report, "stream_gb_per_s") * 1e9;
    assert!(same(positive(&report["machine"], "read_bytes_per_s"), stream), "{report}");
    let read = positive(&report, "decode_tokens_per_s") * positive(&report, "bytes_per_token");
    assert!(same(positive(&report, "stream_share"), read / stream), "{report}");
}

#[test]
fn packed_models_read_fewer_bytes() {
    let lab = Lab::with_tiny();
    lab.ok("quantize tiny --method rtn --bits 4 --group-size 16 --report-tokens 0 -o packed");
    let line = "--prompt 4 --gen 2 --repeat 1 --warmup 0 --batch 1,2 --json -";
    let plain = lab.run(&format!("bench tiny {line}")).json();
    let packed = lab.run(&format!("bench packed {line}")).json();
    assert_eq!(packed["model"]["format"], "anybit");
    assert_eq!(packed["model"]["bits_per_weight_codes"], 4.0);
    assert_eq!(packed["parameters"], plain["parameters"]);
    assert!(positive(&packed, "bytes_per_token") < positive(&plain, "bytes_per_token"));
    let row = &packed["batches"][1];
    assert_eq!(positive(row, "decode_tokens_per_s"), median(&row["decode"], 1));
}

#[test]
fn one_test_without_the_other() {
    let lab = Lab::with_tiny();
    let decode = lab.run("bench tiny --prompt 0 --gen 4 --repeat 1 --batch 1 --json -").json();
    assert!(decode["prefill_tokens_per_s"].is_null(), "{decode}");
    positive(&decode, "decode_tokens_per_s");
    positive(&decode, "stream_share");

    let prefill = lab.run("bench tiny --prompt 4 --gen 0 --repeat 1 --json -").json();
    positive(&prefill, "prefill_tokens_per_s");
    assert!(prefill["decode_tokens_per_s"].is_null(), "{prefill}");
    assert!(prefill["stream_share"].is_null(), "{prefill}");
    assert_eq!(prefill["batches"].as_array().unwrap().len(), 1, "{prefill}");
}

#[test]
fn a_table_and_a_file() {
    let lab = Lab::with_tiny();
    let line = "bench tiny --prompt 8 --gen 4 --repeat 2 --batch 1,2 --json figures.json";
    let table = lab.ok(line);
    for words in ["prefill 8", "decode 4", "tokens/s", "±", "16.000 bits per weight", "GB/s"] {
        assert!(table.contains(words), "no {words:?} in {table}");
    }
    assert_eq!(table.lines().filter(|l| l.starts_with("decode 4")).count(), 2, "{table}");
    positive(&read_json(&lab.path("figures.json")), "decode_tokens_per_s");
}

#[test]
fn options_that_cannot_be_timed() {
    let lab = Lab::with_tiny();
    for (options, words) in [
        ("--repeat 0", "--repeat 0"),
        ("--prompt 0 --gen 0", "nothing is left to time"),
        ("--batch 0", "--batch 0"),
        ("--batch 1,0", "--batch 0"),
        ("--batch 2000", "1 to 1024 sequences"),
        ("--prompt 2049", "--prompt 2049: the model has a context of 2048 tokens"),
        ("--gen 2049", "--gen 2049: the model has a context of 2048 tokens"),
    ] {
        lab.refuses(&format!("bench tiny {options} --json out.json"), USAGE, &[words]);
    }
    lab.refuses("bench nowhere --json out.json", INPUT, &["nowhere"]);
}
