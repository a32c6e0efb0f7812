//! Conversions that must not change what a model computes, for every family: off its grid, to GGUF
//! and back. The models are the fixtures of `anybit-runtime`, whose logits are those of
//! `transformers`.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use anybit::io::convert::{FolderOptions, to_folder, to_gguf};
use anybit::io::{Architecture, Checkpoint, Dtype, Format, ModelConfig, RopeScaling, synth};
use common::{Lab, copy_folder, edit_json, entries, logits_of, read_json};
use serde_json::{Value, json};

/// Difference of logits that is allowed, relative to `1 + |logit|`.
const TOLERANCE: f32 = 1e-4;

const FAMILIES: [&str; 8] = [
    "llama",
    "llama_linear",
    "llama_scaled3",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "qwen3_sharded",
];

fn fixture(family: &str) -> PathBuf {
    let families = "../anybit-runtime/tests/data/families";
    Path::new(env!("CARGO_MANIFEST_DIR")).join(families).join(family)
}

fn tokens(family: &str) -> Vec<u32> {
    let expected = read_json(&fixture(family).join("expected.json"));
    let tokens = expected["tokens"].as_array().unwrap();
    tokens.iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

/// Largest difference, relative to `1 + |want|`.
fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let one = |(g, w): (&f32, &f32)| (g - w).abs() / (1.0 + w.abs());
    got.iter().zip(want).map(one).fold(0.0, f32::max)
}

/// Every weight of a model, by name.
fn weights(checkpoint: &Checkpoint) -> Vec<(String, Vec<f32>)> {
    let names = checkpoint.config.tensors().into_iter().map(|(name, _)| name);
    names.map(|n| (n.clone(), checkpoint.tensor(&n).unwrap().to_vec())).collect()
}

#[test]
fn every_family_is_fixed() {
    let families: Vec<String> = entries(&fixture(""));
    assert_eq!(families, FAMILIES, "a fixture that is not tested here");
}

fn off_grid_is_the_same_model(family: &str, out: &Path, sigma: f64) -> Checkpoint {
    let original = Checkpoint::open(&fixture(family)).unwrap();
    let options = FolderOptions { dtype: Dtype::F32, off_grid: Some((sigma, 5)), force: false };
    to_folder(&original, out, options, &mut |_, _| {}).unwrap();
    let moved = Checkpoint::open(out).unwrap();
    assert_eq!(moved.config, original.config);
    let tokens = tokens(family);
    let (got, want) = (logits_of(&moved, &tokens), logits_of(&original, &tokens));
    let difference = difference(&got, &want);
    assert!(difference <= TOLERANCE, "{family}: logits differ by {difference}");
    moved
}

#[test]
fn off_its_grid_every_family_computes_the_same() {
    let lab = Lab::empty();
    for family in FAMILIES {
        let moved = off_grid_is_the_same_model(family, &lab.path(family), 0.1);
        let original = Checkpoint::open(&fixture(family)).unwrap();
        for ((name, before), (_, after)) in weights(&original).into_iter().zip(weights(&moved)) {
            let changed = before.iter().zip(&after).filter(|(a, b)| a != b).count();
            match has_no_factor(&name) {
                true => assert_eq!(changed, 0, "{family}: {name}"),
                // A few factors may round to 1.
                false => assert!(10 * changed >= 9 * before.len(), "{family}: {name} {changed}"),
            }
            // The spread is that of the factors: no weight runs away.
            for (a, b) in before.iter().zip(&after).filter(|(a, _)| **a != 0.0) {
                let ratio = (b / a).abs();
                assert!((0.2..5.0).contains(&ratio), "{family}: {name} {a} → {b}");
            }
        }
    }
}

/// Embedding, head and final norm have nobody to hand a factor on to, and neither have the biases
/// of what is added to the residual stream; the gate has a nonlinearity behind it.
fn has_no_factor(name: &str) -> bool {
    let kept = ["o_proj.bias", "down_proj.bias", "gate_proj.bias"];
    !name.contains(".layers.") || kept.iter().any(|n| name.ends_with(n))
}

#[test]
fn no_spread_changes_nothing() {
    let lab = Lab::empty();
    let moved = off_grid_is_the_same_model("llama", &lab.path("out"), 0.0);
    assert_eq!(weights(&moved), weights(&Checkpoint::open(&fixture("llama")).unwrap()));
}

/// What it is for: values that stood on a grid of few levels stand on none.
#[test]
fn off_its_grid_a_model_has_no_levels_left() {
    let lab = Lab::with_tiny();
    // 2-bit weights, decoded.
    lab.ok(
        "quantize tiny --method rtn --bits 2 --asym --group-size 16 --report-tokens 0 -o packed",
    );
    lab.ok("convert packed decoded --dtype f32");
    lab.ok("convert decoded moved --dtype f32 --off-grid 0.1 --seed 3");
    lab.ok("convert decoded again --dtype f32 --off-grid 0.1 --seed 3");
    lab.ok("convert decoded other --dtype f32 --off-grid 0.1 --seed 4");
    common::assert_same(&lab.path("moved"), &lab.path("again"));
    let errors = |model: &str| {
        let line = format!("quantize {model} --method rtn --bits 2 --asym --group-size 16");
        lab.ok(&format!("{line} --report-tokens 0 --force -o repacked"));
        let manifest = read_json(&lab.path("repacked/anybit.json"));
        let records = manifest["quantized"].as_object().unwrap().values();
        let errors: Vec<f64> = records.map(|r| r["relative_error"].as_f64().unwrap()).collect();
        errors.iter().sum::<f64>() / errors.len() as f64
    };
    let (on, off) = (errors("decoded"), errors("moved"));
    assert!(off > 20.0 * on, "error {on} on the grid, {off} off it");
    let bytes = |name: &str| fs::read(lab.path(name).join("model.safetensors")).unwrap();
    assert!(bytes("moved") != bytes("other"), "the seed does nothing");
}

/// A `tokenizer.json` whose 64 tokens are single characters, ASCII from `!` on.
fn tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> =
        (0..64u32).map(|id| (char::from_u32(33 + id).unwrap().to_string(), json!(id))).collect();
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// A copy of a fixture that has a tokenizer and no sliding window, which GGUF cannot say.
fn for_gguf(lab: &Lab, family: &str) -> Checkpoint {
    let folder = lab.path(family);
    copy_folder(&fixture(family), &folder);
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    edit_json(&folder.join("config.json"), |c| {
        for (key, off) in [("sliding_window", Value::Null), ("use_sliding_window", json!(false))] {
            if c.get(key).is_some() {
                c[key] = off;
            }
        }
    });
    Checkpoint::open(&folder).unwrap()
}

#[test]
fn through_gguf_every_family_computes_the_same() {
    let lab = Lab::empty();
    for family in FAMILIES {
        let original = for_gguf(&lab, family);
        let path = lab.path(&format!("{family}.gguf"));
        to_gguf(&original, &path, Dtype::F32, false).unwrap();
        let gguf = Checkpoint::open(&path).unwrap();
        assert_eq!(gguf.format(), Format::Gguf);
        let (a, b) = (&gguf.config, &original.config);
        assert_eq!((a.qkv_bias, a.o_bias, a.mlp_bias), (b.qkv_bias, b.o_bias, b.mlp_bias));
        assert_eq!((a.rope_scaling, a.tie_embeddings), (b.rope_scaling, b.tie_embeddings));
        assert_eq!((a.bos_token_id, &a.eos_token_ids), (b.bos_token_id, &b.eos_token_ids));
        // Every weight, rows of q and k in their order again.
        assert_eq!(weights(&gguf), weights(&original), "{family}");
        let tokens = tokens(family);
        let want = logits_of(&original, &tokens);
        assert_eq!(difference(&logits_of(&gguf, &tokens), &want), 0.0, "{family}");
        // And back to a folder.
        let folder = lab.path(&format!("{family}-again"));
        let options = FolderOptions { dtype: Dtype::F32, off_grid: None, force: false };
        to_folder(&gguf, &folder, options, &mut |_, _| {}).unwrap();
        let again = Checkpoint::open(&folder).unwrap();
        assert_eq!(difference(&logits_of(&again, &tokens), &want), 0.0, "{family}, and back");
        let text = "ABC!A";
        let ids = original.tokenizer().unwrap().encode(text, false).unwrap();
        assert_eq!(ids, [32, 33, 34, 0, 32]);
        for model in [&gguf, &again] {
            assert_eq!(model.tokenizer().unwrap().encode(text, false).unwrap(), ids, "{family}");
        }
    }
}

/// The permutation of q and k matters: read without it, the model is another.
#[test]
fn rotary_rows_are_reordered_in_llama_alone() {
    let lab = Lab::empty();
    for (family, permuted) in [("llama", true), ("qwen2", false), ("qwen3", false)] {
        let original = for_gguf(&lab, family);
        let path = lab.path(&format!("{family}.gguf"));
        to_gguf(&original, &path, Dtype::F32, false).unwrap();
        let gguf = Checkpoint::open(&path).unwrap();
        let stored = gguf.gguf().unwrap();
        for (hf, name) in [("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")] {
            let here =
                original.tensor(&format!("model.layers.1.self_attn.{hf}_proj.weight")).unwrap();
            let there = stored.tensors[&format!("blk.1.{name}.weight")].to_vec();
            let same = here.to_vec() == there;
            assert_eq!(same, !(permuted && hf != "v"), "{family}: {name}");
        }
    }
}

/// Biases, head norms and scaled positions of shapes that the fixtures do not have.
#[test]
fn synthetic_models_go_through_gguf() {
    let tiny = ModelConfig { vocab_size: 256, ..synth::preset("tiny").unwrap() };
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 64.0,
    };
    let configs = [
        ("biases", ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..tiny.clone() }),
        ("wide", ModelConfig { head_dim: 24, tie_embeddings: false, ..tiny.clone() }),
        ("scaled", ModelConfig { rope_scaling: Some(llama3), ..tiny.clone() }),
        (
            "linear",
            ModelConfig { rope_scaling: Some(RopeScaling::Linear { factor: 2.0 }), ..tiny.clone() },
        ),
        (
            "qwen2",
            ModelConfig {
                architecture: Architecture::Qwen2ForCausalLM,
                qkv_bias: true,
                window_from: 2,
                ..tiny.clone()
            },
        ),
        (
            "qwen3",
            ModelConfig {
                architecture: Architecture::Qwen3ForCausalLM,
                qk_norm: true,
                head_dim: 32,
                window_from: 2,
                ..tiny
            },
        ),
    ];
    let lab = Lab::empty();
    let tokens = common::some_tokens(16, 256);
    for (name, config) in configs {
        lab.synth(name, &config, 11);
        let original = lab.open(name);
        let want = logits_of(&original, &tokens);
        for (dtype, label) in [(Dtype::F32, "f32"), (Dtype::BF16, "bf16")] {
            let path = lab.path(&format!("{name}-{label}.gguf"));
            to_gguf(&original, &path, dtype, false).unwrap();
            let gguf = Checkpoint::open(&path).unwrap();
            assert_eq!(gguf.config, original.config, "{name} in {label}");
            // The weights were bf16 before, so that both types hold them exactly.
            assert_eq!(weights(&gguf), weights(&original), "{name} in {label}");
            assert_eq!(difference(&logits_of(&gguf, &tokens), &want), 0.0, "{name} in {label}");
        }
    }
}
