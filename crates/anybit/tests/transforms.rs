//! Transforms and quantized activations: a transformed model is the same function, what is written
//! computes what was simulated, a killed fit goes on, and nothing depends on threads.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use anybit::core::Site;
use anybit::io::native::verify;
use anybit::io::{Architecture, Checkpoint, ModelConfig, synth};
use anybit::ptq::recipe::CalibrationRecipe;
use anybit::ptq::transforms::{self, prepare};
use anybit::ptq::{Calibration, Recipe};
use anybit::quantize::{self, Options};
use anybit::runtime::Decoder;
use common::{Lab, assert_same, entries, logits, logits_of, prose, some_tokens};

const INPUT: i32 = 3;

/// Two blocks whose sizes are no multiples of anything, with grouped heads.
fn odd() -> ModelConfig {
    ModelConfig { intermediate_size: 72, vocab_size: 256, ..synth::preset("tiny").unwrap() }
}

fn families() -> Vec<ModelConfig> {
    vec![
        odd(),
        ModelConfig { tie_embeddings: false, ..odd() },
        // Heads that are not a share of the hidden size, and have no Hadamard matrix of their own.
        ModelConfig { head_dim: 10, num_heads: 6, num_kv_heads: 3, ..odd() },
        ModelConfig { architecture: Architecture::Qwen2ForCausalLM, qkv_bias: true, ..odd() },
        ModelConfig { architecture: Architecture::Qwen3ForCausalLM, qk_norm: true, ..odd() },
    ]
}

fn lab_with(config: &ModelConfig) -> Lab {
    let lab = Lab::empty();
    lab.synth("model", config, 7);
    fs::write(lab.path("calib.txt"), prose(900, 2)).unwrap();
    lab
}

/// Weights, activations and cache at 4 bits, with little work for what is trained.
fn recipe(lab: &Lab, transform: &str, method: &str) -> Recipe {
    let data = vec![lab.path("calib.txt").display().to_string()];
    let mut recipe = Recipe {
        method: method.into(),
        transform: transform.into(),
        bits: 4.0,
        a_bits: Some(4),
        kv_bits: Some(4),
        calibration: CalibrationRecipe { data, tokens: 512, seqlen: 32, gradient_tokens: 128 },
        ..Recipe::default()
    };
    let options: &[&str] = match transform {
        "flatquant" => &["steps=6", "samples=8", "seqlen=32", "batch=2"],
        "spinquant" => &["steps=3"],
        _ => &[],
    };
    for option in options {
        recipe.add_option(&format!("transform.{option}")).unwrap();
    }
    recipe
}

fn transformed(lab: &Lab, recipe: &Recipe, cache: &str) -> PathBuf {
    let model = lab.open("model");
    let calibration = quantize::calibrate(&model, recipe).unwrap();
    let done = prepare(&model, recipe, &calibration, &lab.path(cache), &mut |_| {}).unwrap();
    done.unwrap().checkpoint.path.clone()
}

fn pack(lab: &Lab, recipe: &Recipe) -> Checkpoint {
    let options = Options { force: true, report_tokens: 0, ..Options::new(lab.path("packed")) };
    quantize::run(&lab.open("model"), recipe, &options, &mut |_| {})
        .unwrap_or_else(|e| panic!("{recipe:?}: {e}"));
    lab.open("packed")
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_transformed_model_is_the_same_function() {
    for config in families() {
        let lab = lab_with(&config);
        let tokens = some_tokens(24, config.vocab_size);
        let before = logits_of(&lab.open("model"), &tokens);
        let most = before.iter().fold(0f32, |m, z| m.max(z.abs()));
        for transform in transforms::names() {
            let folder = transformed(&lab, &recipe(&lab, transform, "rtn"), "cache");
            let model = Checkpoint::open(&folder).unwrap();
            assert!(verify(&model, None, |_, _| {}).unwrap().is_empty());
            let after = logits_of(&model, &tokens);
            let difference = largest_difference(&before, &after);
            assert!(difference < 2e-5 * most, "{transform}: {difference} of {most}, {config:?}");
        }
    }
}

/// Negative controls: the test above would see a transform that is left out on one side.
#[test]
fn leaving_out_one_side_changes_the_function() {
    let lab = lab_with(&odd());
    let tokens = some_tokens(24, 256);
    let before = logits_of(&lab.open("model"), &tokens);
    for (transform, site) in [
        ("quarot", Site::DownInput),
        ("quarot", Site::AttnOutput),
        ("resq", Site::AttnOutput),
        ("resq", Site::Key),
        ("flatquant", Site::AttnInput),
        ("flatquant", Site::Query),
    ] {
        let folder = transformed(&lab, &recipe(&lab, transform, "rtn"), "cache");
        let model = Checkpoint::open(&folder).unwrap();
        let mut decoder = Decoder::load(&model, tokens.len()).unwrap();
        let state = decoder.layers[0].sites.at_mut(site);
        assert!(state.transform.take().is_some(), "{transform} {site:?}");
        let difference = largest_difference(&before, &logits(&decoder, &tokens));
        assert!(difference > 1e-3, "{transform} without {site:?}: {difference}");
    }
}

#[test]
fn every_transform_with_every_method_is_written_and_read() {
    let lab = lab_with(&odd());
    for transform in transforms::names() {
        for method in ["rtn", "gptq", "awq", "squeezellm", "skim", "anybit"] {
            if method != "rtn" && method != "gptq" && transform != "flatquant" {
                continue;
            }
            let packed = pack(&lab, &recipe(&lab, transform, method));
            let problems = verify(&packed, None, |_, _| {}).unwrap();
            assert!(problems.is_empty(), "{transform} {method}: {problems:?}");
            let z = logits_of(&packed, &some_tokens(12, 256));
            assert!(z.iter().all(|z| z.is_finite()), "{transform} {method}");
            let manifest = packed.manifest().unwrap();
            assert_eq!(manifest.transform.as_deref(), Some(transform));
            assert_eq!(manifest.base_model, "model");
            let (codes, total) = manifest.bits_per_weight();
            assert!(codes >= 3.9 && total > codes, "{codes} {total}");
        }
    }
}

/// Integers compute what the fake-quantized graph computes: in every linear of the first block, on
/// the same input.
#[test]
fn integers_equal_the_fake_quantized_graph() {
    for (transform, bits) in
        [("none", 4), ("quarot", 4), ("resq", 4), ("resq", 8), ("flatquant", 4)]
    {
        for config in families() {
            let lab = lab_with(&config);
            let same = recipe(&lab, transform, "gptq");
            let packed = pack(&lab, &Recipe { bits: bits.into(), a_bits: Some(bits), ..same });
            let tokens = some_tokens(9, config.vocab_size);
            let fast = Decoder::load(&packed, tokens.len()).unwrap();
            let mut slow = Decoder::load(&packed, tokens.len()).unwrap();
            for layer in &mut slow.layers {
                assert!(layer.q.is_integer() && layer.down.is_integer(), "{transform}");
                for linear in Site::ALL.iter().flat_map(|s| s.linears()) {
                    layer.linear_mut(linear).unwrap().without_integers();
                }
            }
            let hidden = config.hidden_size;
            let mut x = vec![0.0; tokens.len() * hidden];
            fast.embed(&tokens, &mut x).unwrap();
            let first = |decoder: &Decoder| {
                let layer = &decoder.layers[0];
                let mut buffers = Default::default();
                let mut normed = vec![0.0; x.len()];
                layer.mlp_input(&x, &mut normed);
                let mut mixed = vec![0.0; tokens.len() * config.intermediate_size];
                layer.mlp_mix(&normed, &mut buffers, &mut mixed);
                mixed
            };
            let (a, b) = (first(&fast), first(&slow));
            let most = b.iter().fold(0f32, |m, v| m.max(v.abs()));
            let difference = largest_difference(&a, &b);
            assert!(difference < 1e-4 * most, "{transform}: {difference} of {most}");
        }
    }
}

#[test]
fn more_bits_are_better_and_a_rotation_helps() {
    let lab = lab_with(&odd());
    let tokens = some_tokens(32, 256);
    let before = logits_of(&lab.open("model"), &tokens);
    let error = |recipe: &Recipe| {
        let after = logits_of(&pack(&lab, recipe), &tokens);
        before.iter().zip(&after).map(|(a, b)| (a - b).powi(2) as f64).sum::<f64>()
    };
    for transform in ["none", "resq"] {
        let mut last = f64::INFINITY;
        for bits in [2, 3, 4, 8] {
            let one = Recipe {
                bits: bits as f64,
                a_bits: Some(bits),
                kv_bits: Some(bits),
                ..recipe(&lab, transform, "rtn")
            };
            let found = error(&one);
            assert!(found < last, "{transform} at {bits} bits: {found} after {last}");
            last = found;
        }
        let cache = Recipe { bits: 16.0, a_bits: Some(16), ..recipe(&lab, transform, "rtn") };
        assert!(error(&cache) < error(&recipe(&lab, transform, "rtn")));
    }
}

#[test]
fn a_killed_fit_goes_on_and_ends_in_the_same_bytes() {
    let lab = lab_with(&odd());
    for transform in ["resq", "spinquant", "flatquant"] {
        let recipe = recipe(&lab, transform, "rtn");
        let whole = transformed(&lab, &recipe, &format!("whole-{transform}"));
        let cut = transformed(&lab, &recipe, &format!("cut-{transform}"));
        // What a kill in the second block leaves.
        for name in ["done.json", "sites-001.json", "config.json"] {
            fs::remove_file(cut.join(name)).unwrap();
        }
        fs::write(cut.join("block-001.safetensors"), b"half a fi").unwrap();
        let again = transformed(&lab, &recipe, &format!("cut-{transform}"));
        assert_eq!(again, cut);
        assert_same(&whole, &again);
    }
}

#[test]
fn the_same_bytes_on_any_number_of_threads() {
    let lab = lab_with(&odd());
    for transform in ["resq", "spinquant", "flatquant"] {
        let recipe = recipe(&lab, transform, "gptq");
        let on = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| transformed(&lab, &recipe, &format!("threads-{transform}-{threads}")))
        };
        assert_same(&on(1), &on(3));
    }
}

#[test]
fn impossible_recipes_are_refused_at_once() {
    let lab = Lab::with_tiny();
    let quick = "--calib calib.txt --calib-tokens 128 --seqlen 32 --report-tokens 0 -o out";
    let refused = |flags: &str, words: &[&str]| {
        lab.refuses(&format!("quantize tiny {flags} {quick}"), INPUT, words);
    };
    refused("--a-bits 1", &["2 to 8"]);
    refused("--kv-bits 9", &["2 to 8"]);
    refused("--method resq --set transform.rank=0.9", &["rank is 0.9"]);
    refused("--method resq --set transform.rank=0.01", &["no channel"]);
    refused("--method flatquant --set transform.step=4", &["did you mean steps?"]);
    refused("--method flatquant --set transform.seqlen=64", &["--seqlen 64"]);
    refused("--method quarot --transform resq", &["two transforms"]);
    refused("--transform flatquant --bits 16", &["nothing to fit"]);
    refused("--transform spinquant --group-size 16", &["nothing to learn"]);
    refused("--a-clip 1.5", &["(0, 1]"]);
    refused("--method anybit --bits 16", &["nothing to allocate"]);
    lab.ok(&format!("quantize tiny --method quarot {quick}"));
    let again = "-o again --calib calib.txt --calib-tokens 128 --seqlen 32";
    lab.run(&format!("quantize out --method quarot {again}")).refused(INPUT, &["packed already"]);
    lab.run("convert out out.gguf").refused(INPUT, &["convert the original model"]);
    lab.run("convert out folder").refused(INPUT, &["convert the original model"]);
    lab.run("verify out --reference tiny").refused(INPUT, &["basis of the transform quarot"]);
}

#[test]
fn damaged_transforms_are_found() {
    let lab = lab_with(&odd());
    let packed = pack(&lab, &recipe(&lab, "flatquant", "rtn"));
    let name = "model.layers.0.attn_input.transform.left";
    let file = packed.path.join("model.safetensors");
    drop(packed);
    let mut tensors = common::Tensors::read(&file);
    tensors.bytes_mut(name)[..4].copy_from_slice(&1.5f32.to_le_bytes());
    tensors.write();
    let problems = verify(&lab.open("packed"), None, |_, _| {}).unwrap();
    assert!(problems.iter().any(|p| p.what.contains("transform")), "{problems:?}");
    tensors.bytes_mut(name)[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    tensors.write();
    let error = Decoder::load(&lab.open("packed"), 8).err().unwrap().to_string();
    assert!(error.contains("not finite"), "{error}");
    let edit = |path: &Path, what: &str, value: serde_json::Value| {
        common::edit_json(path, |json| {
            json["sites"]["model.layers.0.attn_input"]["transform"][what] = value;
        });
    };
    let manifest = lab.path("packed").join("anybit.json");
    edit(&manifest, "sizes", serde_json::json!([4_000_000_000u64, 4_000_000_000u64]));
    assert!(Decoder::load(&lab.open("packed"), 8).is_err());
    edit(&manifest, "sizes", serde_json::json!([3, 3]));
    assert!(Decoder::load(&lab.open("packed"), 8).is_err());
}

#[test]
fn a_fit_serves_the_recipes_that_agree_in_it() {
    let lab = lab_with(&odd());
    let first = transformed(&lab, &recipe(&lab, "resq", "rtn"), "cache");
    let other = Recipe { bits: 3.0, a_bits: Some(8), ..recipe(&lab, "resq", "gptq") };
    assert_eq!(transformed(&lab, &other, "cache"), first);
    let seeded = Recipe { seed: 1, ..recipe(&lab, "resq", "rtn") };
    assert_ne!(transformed(&lab, &seeded, "cache"), first);
    assert_eq!(entries(&lab.path("cache")).len(), 2);
    // Where bits are part of the fit, so are those of single sites and linears.
    for name in ["flatquant", "spinquant"] {
        let cache = format!("cache-{name}");
        let plain = recipe(&lab, name, "rtn");
        let mut own = plain.clone();
        own.sites.insert("*.down_input".into(), 8);
        assert_ne!(transformed(&lab, &plain, &cache), transformed(&lab, &own, &cache));
    }
    assert!(Calibration::none().sequences.is_empty());
}
