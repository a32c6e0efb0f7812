//! The real model: SmolLM2-135M-Instruct, off its grid, as `scripts/demo` makes it.
//!
//! Needs `ANYBIT_REAL_GGUF` (the file that `scripts/get-model` fetches) and `ANYBIT_REAL_MODEL`
//! (the reference folder that `scripts/demo` converts it to).

use std::path::PathBuf;

use anybit::io::convert::{FolderOptions, to_folder};
use anybit::io::{Checkpoint, Dtype};
use anybit::runtime::{Buffers, Decoder, Session};
use serde_json::Value;

fn path(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable);
    PathBuf::from(value.unwrap_or_else(|| panic!("{variable} is not set: see this file's head")))
}

fn fixture() -> Value {
    let file =
        concat!(env!("CARGO_MANIFEST_DIR"), "/../anybit-runtime/tests/data/real_logits.json");
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn tokens(fixture: &Value) -> Vec<u32> {
    fixture["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

/// All logits of `tokens`, `[tokens, vocab]`.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    let decoder = Decoder::load(checkpoint, tokens.len()).unwrap();
    let mut session = Session::new(&decoder, tokens.len());
    let hidden = session.hidden(tokens).unwrap().to_vec();
    let mut logits = vec![0.0; tokens.len() * decoder.config.vocab_size];
    decoder.logits(&hidden, &mut Buffers::default(), &mut logits);
    logits
}

#[test]
#[ignore = "needs the real model, see the head of this file"]
fn logits_equal_those_of_transformers() {
    let fixture = fixture();
    let tokens = tokens(&fixture);
    let checkpoint = Checkpoint::open(&path("ANYBIT_REAL_MODEL")).unwrap();
    let text = fixture["text"].as_str().unwrap();
    let encoded = checkpoint.tokenizer().unwrap().encode(text, false).unwrap();
    assert_eq!(&encoded[..tokens.len()], &tokens[..], "tokenizer");
    let logits = logits(&checkpoint, &tokens);
    let vocab = checkpoint.config.vocab_size;
    let mut largest = 0f32;
    for position in fixture["positions"].as_array().unwrap() {
        let row = position["position"].as_u64().unwrap() as usize * vocab;
        for kind in ["top", "even"] {
            let ids = position[format!("{kind}_ids")].as_array().unwrap();
            let values = position[format!("{kind}_logits")].as_array().unwrap();
            for (id, value) in ids.iter().zip(values) {
                let ours = logits[row + id.as_u64().unwrap() as usize];
                largest = largest.max((ours - value.as_f64().unwrap() as f32).abs());
            }
        }
    }
    println!("largest difference to transformers: {largest:e}");
    assert!(largest <= 2e-3, "{largest}");
}

#[test]
#[ignore = "needs the real model, see the head of this file"]
fn off_grid_factors_cancel() {
    let tokens = tokens(&fixture());
    let original = Checkpoint::open(&path("ANYBIT_REAL_GGUF")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("off-grid");
    let options = FolderOptions { dtype: Dtype::F32, off_grid: Some((0.1, 0)), force: false };
    to_folder(&original, &out, options, &mut |_, _| {}).unwrap();
    let moved = Checkpoint::open(&out).unwrap();
    let (a, b) = (logits(&original, &tokens), logits(&moved, &tokens));
    let largest = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    println!("largest logit: moved by {largest:e}");
    assert!(largest < 1e-4, "{largest}");
    let name = "model.layers.3.mlp.up_proj.weight";
    let (w, v) = (original.tensor(name).unwrap().to_vec(), moved.tensor(name).unwrap().to_vec());
    assert!(w.iter().zip(&v).any(|(w, v)| (w - v).abs() > 0.05 * w.abs() && w.abs() > 0.01));
}
