//! The tiny models that the runtime's tests use, and comparisons.
#![allow(dead_code)] // every test uses its own part

use std::path::PathBuf;

use anybit_grad::{Tape, TrainDecoder, Var};
use anybit_io::Checkpoint;
use serde_json::Value;

/// Every family's folder.
pub const FAMILIES: [&str; 8] = [
    "llama",
    "llama_linear",
    "llama_scaled3",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_sharded",
];

fn folder(name: &str) -> PathBuf {
    let data = "../anybit-runtime/tests/data/families";
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(data).join(name)
}

/// A family's checkpoint.
pub fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(&folder(name)).unwrap()
}

/// A family's tokens and the logits that transformers computes for them.
pub fn expected(name: &str) -> (Vec<u32>, Vec<f32>) {
    let text = std::fs::read_to_string(folder(name).join("expected.json")).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let tokens = value["tokens"].as_array().unwrap();
    let tokens = tokens.iter().map(|t| t.as_u64().unwrap() as u32).collect();
    (tokens, floats(&value["logits"]))
}

/// An array of numbers.
pub fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

/// Fails unless every element is within `epsilon · (1 + |want|)`.
pub fn assert_near(got: &[f32], want: &[f32], epsilon: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths differ");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let near = (a - b).abs() <= epsilon * (1.0 + b.abs());
        assert!(near, "{what}[{i}]: {a}, expected {b}");
    }
}

/// Every gradient of the loss of `tokens`, sequences of `seqlen`, with the loss.
pub fn gradients(
    decoder: &TrainDecoder,
    tokens: &[u32],
    seqlen: usize,
) -> (f32, Vec<(String, Vec<f32>)>) {
    let mut tape = Tape::default();
    let vars = decoder.vars(&mut tape, &|_| true);
    let loss = decoder.loss(&mut tape, &vars, tokens, seqlen).unwrap();
    tape.backward(loss);
    let grad = |(name, var): (String, Var)| (name, tape.grad(var).unwrap().to_vec());
    (tape.data(loss)[0], vars.named().into_iter().map(grad).collect())
}
