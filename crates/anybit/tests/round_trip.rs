//! What is planned is what is written, what is written is what was simulated, and whatever is
//! changed afterwards is found.

mod common;

use std::fs;
use std::sync::Arc;

use anybit::core::{Matrix, ScaleFit};
use anybit::io::convert::{FolderOptions, to_folder, to_gguf};
use anybit::io::native::{Manifest, QuantizedRecord, verify};
use anybit::io::{Checkpoint, Dtype, Format, ModelConfig, synth};
use anybit::kernels::gemv::most_tokens;
use anybit::ptq::recipe::CalibrationRecipe;
use anybit::ptq::{Plan, Recipe};
use anybit::quantize::{self, Options};
use anybit::runtime::Decoder;
use common::{Lab, QUICK, Tensors, edit_json, entries, logits, logits_of, prose, read_json};
use serde_json::{Value, json};

const VERIFICATION: i32 = 5;

/// One block, and a word for every byte.
fn small() -> ModelConfig {
    let tiny = synth::preset("tiny").unwrap();
    ModelConfig { intermediate_size: 80, num_layers: 1, vocab_size: 256, ..tiny }
}

/// A lab with a model `model` and a text.
fn lab_with(config: &ModelConfig) -> Lab {
    let lab = Lab::empty();
    lab.synth("model", config, 3);
    fs::write(lab.path("calib.txt"), prose(200, 2)).unwrap();
    lab
}

/// A recipe that takes milliseconds.
fn recipe(lab: &Lab, method: &str, bits: u8) -> Recipe {
    let data = vec![lab.path("calib.txt").display().to_string()];
    Recipe {
        method: method.into(),
        bits: bits.into(),
        group_size: Some(16),
        calibration: CalibrationRecipe { data, tokens: 128, seqlen: 32, gradient_tokens: 96 },
        ..Recipe::default()
    }
}

/// Quantizes `model` of the lab to `packed` and checks everything that holds for any recipe.
fn check(lab: &Lab, recipe: &Recipe) -> Manifest {
    let model = lab.open("model");
    let out = lab.path("packed");
    let plan = Plan::new(&model, recipe, Some(&out)).unwrap();
    assert_eq!(plan.problems, Vec::<String>::new(), "{recipe:?}");
    let options = Options { force: true, report_tokens: 0, ..Options::new(&out) };
    quantize::run(&model, recipe, &options, &mut |_| {})
        .unwrap_or_else(|e| panic!("{recipe:?}: {e}"));

    let packed = lab.open("packed");
    assert_eq!(packed.format(), Format::Native);
    let manifest = packed.manifest().unwrap();
    for file in &plan.files {
        let written = fs::metadata(out.join(&file.file_name)).unwrap().len();
        assert_eq!(written, file.file_bytes(), "{recipe:?}: {}", file.file_name);
    }
    assert_eq!(packed.weight_file_bytes(), plan.weight_bytes(), "{recipe:?}");
    assert_eq!(manifest.bits_per_weight(), plan.bits_per_weight(), "{recipe:?}");
    assert_eq!(manifest.quantized.len(), plan.matrices.len(), "{recipe:?}");

    for reference in [None, Some(&model)] {
        let problems = verify(&packed, reference, |_, _| {}).unwrap();
        assert!(problems.is_empty(), "{recipe:?}: {problems:?}");
    }
    same_as_decoded(&packed, &model, &format!("{recipe:?}"));
    manifest.clone()
}

/// Packed weights compute what their decoded values compute, up to the rounding of activations where
/// products come straight from codes and bit for bit where they do not, and not what the original
/// computes.
fn same_as_decoded(packed: &Checkpoint, model: &Checkpoint, what: &str) {
    // More than products from packed codes take with 256 bits.
    let tokens = common::some_tokens(40, packed.config.vocab_size);
    let through_codes = logits_of(packed, &tokens);
    let mut decoder = Decoder::load(packed, tokens.len()).unwrap();
    decode(&mut decoder);
    let decoded = logits(&decoder, &tokens);
    let prompt = through_codes.len() / 2;
    if tokens.len() > most_tokens() {
        assert!(same_bits(&through_codes[..prompt], &decoded[..prompt]), "{what}");
    }
    let largest = through_codes.iter().fold(0f32, |m, v| m.max(v.abs()));
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-3 * largest;
    assert!(through_codes.iter().zip(&decoded).all(near), "{what}");
    assert!(!same_bits(&through_codes, &logits_of(model, &tokens)), "{what}: nothing changed");
}

/// Replaces every matrix by a dense one of its decoded values.
fn decode(decoder: &mut Decoder) {
    let linears = decoder.config.block_linears();
    for layer in &mut decoder.layers {
        for (name, _, _) in linears {
            let linear = layer.linear_mut(name).unwrap();
            linear.set_weight(Arc::new(Matrix::from_rows(&*linear.weight)));
        }
    }
    decoder.embedding = Arc::new(Matrix::from_rows(&*decoder.embedding));
    decoder.head.set_weight(Arc::new(Matrix::from_rows(&*decoder.head.weight)));
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Bits per weight of one packed matrix: codes, and everything stored.
fn bits(manifest: &Manifest, tensor: &str) -> Option<(f64, f64)> {
    let record = manifest.quantized.get(tensor)?;
    let weights = (record.rows * record.cols) as f64;
    Some((record.code_bits as f64 / weights, record.bytes as f64 * 8.0 / weights))
}

/// Mean of the matrices' relative errors.
fn error(manifest: &Manifest) -> f64 {
    let errors = manifest.quantized.values().map(|r| r.relative_error);
    errors.sum::<f64>() / manifest.quantized.len() as f64
}

/// Every width; a bit more is always closer.
fn every_width(method: &str, symmetric: bool) {
    let lab = lab_with(&small());
    let mut last = f64::INFINITY;
    for bits in 1..=8 {
        let manifest = check(&lab, &Recipe { symmetric, ..recipe(&lab, method, bits) });
        assert_eq!(manifest.bits_per_weight().0, bits as f64);
        let error = error(&manifest);
        assert!(error > 0.0 && error < last, "{bits} bits: {error} after {last}");
        last = error;
    }
}

#[test]
fn rtn_at_every_width() {
    every_width("rtn", true);
}

#[test]
fn rtn_at_every_width_with_zero_points() {
    every_width("rtn", false);
}

#[test]
fn gptq_at_every_width() {
    every_width("gptq", true);
}

#[test]
fn gptq_at_every_width_with_zero_points() {
    every_width("gptq", false);
}

#[test]
fn group_sizes() {
    let lab = lab_with(&small());
    for method in ["rtn", "gptq"] {
        // 48 leaves a shorter last group of both 64 and 80 columns.
        for (group_size, overhead) in [(-1, None), (16, Some(1.0)), (48, None)] {
            for symmetric in [true, false] {
                let base = recipe(&lab, method, 3);
                let manifest =
                    check(&lab, &Recipe { group_size: Some(group_size), symmetric, ..base });
                let (codes, total) = manifest.bits_per_weight();
                assert!(codes == 3.0 && total > 3.0);
                // Rows of 64 columns and 3 bits fill whole words, rows of 80 do not.
                let q = bits(&manifest, "model.layers.0.self_attn.q_proj.weight").unwrap();
                if let (Some(overhead), true) = (overhead, symmetric) {
                    assert_eq!(q, (3.0, 3.0 + overhead));
                }
            }
        }
    }
}

#[test]
fn embedding_and_head() {
    let tied = lab_with(&small());
    let untied = lab_with(&ModelConfig { tie_embeddings: false, ..small() });
    for method in ["rtn", "gptq"] {
        let embedding = "model.embed_tokens.weight";
        let plain = Recipe { embed_bits: Some(5), ..recipe(&tied, method, 4) };
        let manifest = check(&tied, &plain);
        assert_eq!(bits(&manifest, embedding).unwrap().0, 5.0);
        // A lookup has no inputs to observe.
        assert_eq!(manifest.quantized[embedding].method, "rtn");

        let both = Recipe { embed_bits: Some(8), head_bits: Some(3), ..recipe(&untied, method, 2) };
        let manifest = check(&untied, &both);
        assert_eq!(bits(&manifest, embedding).unwrap().0, 8.0);
        assert_eq!(bits(&manifest, "lm_head.weight").unwrap().0, 3.0);
        assert_eq!(manifest.quantized["lm_head.weight"].method, method);
        assert_eq!(manifest.bits_per_weight().0, 2.0, "of the blocks alone");
    }
}

#[test]
fn every_option_changes_something_and_still_holds() {
    let lab = lab_with(&small());
    let base = || recipe(&lab, "gptq", 3);
    let plain = check(&lab, &Recipe { act_order: false, ..base() });
    let others = [
        Recipe { act_order: true, ..base() },
        Recipe { act_order: false, scale: Some(ScaleFit::Mse), ..base() },
        Recipe { act_order: false, damp: 0.5, ..base() },
        Recipe { act_order: false, seed: 1, ..base() },
    ];
    for other in others {
        let manifest = check(&lab, &other);
        assert_ne!(manifest.quantized, plain.quantized, "{other:?}");
    }
    assert_eq!(check(&lab, &Recipe { act_order: false, ..base() }), plain, "not the same again");
}

#[test]
fn a_mixture_of_settings() {
    let lab = lab_with(&ModelConfig { num_layers: 2, ..small() });
    let mut mixed = Recipe { skip: vec!["*.1.*.o_proj".into()], ..recipe(&lab, "gptq", 3) };
    mixed.add_layer("*.down_proj=bits:8,symmetric:false").unwrap();
    mixed.add_layer("model.layers.0.*.q_proj=bits:1,group_size:-1").unwrap();
    let manifest = check(&lab, &mixed);
    let bits = |name: &str| bits(&manifest, &format!("model.layers.{name}.weight"));
    assert_eq!(bits("1.self_attn.o_proj"), None);
    assert!(manifest.dense.contains_key("model.layers.1.self_attn.o_proj.weight"));
    assert_eq!(bits("0.self_attn.o_proj").unwrap().0, 3.0);
    assert_eq!(bits("1.mlp.down_proj").unwrap().0, 8.0);
    // 64 codes of one bit and one scale.
    assert_eq!(bits("0.self_attn.q_proj").unwrap(), (1.0, 1.25));
    assert_eq!(bits("1.self_attn.q_proj").unwrap(), (3.0, 4.0));
}

#[test]
fn biases_and_head_norms_stay_as_they_are() {
    for config in [
        ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..small() },
        ModelConfig {
            architecture: anybit::io::Architecture::Qwen2ForCausalLM,
            qkv_bias: true,
            ..small()
        },
        ModelConfig {
            architecture: anybit::io::Architecture::Qwen3ForCausalLM,
            qk_norm: true,
            ..small()
        },
    ] {
        let lab = lab_with(&config);
        let manifest = check(&lab, &recipe(&lab, "gptq", 4));
        assert_eq!(manifest.quantized.len(), 7);
        assert_eq!(manifest.dense.len(), config.tensors().len() - 7);
        for (name, record) in &manifest.dense {
            let (source, packed) = (lab.open("model"), lab.open("packed"));
            let (a, b) = (source.raw(name).unwrap(), packed.raw(name).unwrap());
            assert_eq!((a.bytes(), a.dtype), (b.bytes(), b.dtype), "{name}");
            assert_eq!(record.bytes as usize, a.bytes().len());
        }
    }
}

#[test]
fn packed_weights_decode_into_any_format() {
    let lab = lab_with(&small());
    check(&lab, &Recipe { embed_bits: Some(6), ..recipe(&lab, "gptq", 3) });
    let packed = lab.open("packed");
    let tokens = common::some_tokens(9, 256);
    let want = logits_of(&packed, &tokens);
    let options = FolderOptions { dtype: Dtype::F32, off_grid: None, force: false };
    to_folder(&packed, &lab.path("dense"), options, &mut |_, _| {}).unwrap();
    to_gguf(&packed, &lab.path("dense.gguf"), Dtype::F32, false).unwrap();
    for name in ["dense", "dense.gguf"] {
        let dense = lab.open(name);
        assert_ne!(dense.format(), Format::Native);
        assert!(same_bits(&logits_of(&dense, &tokens), &want), "{name}");
    }
}

#[test]
fn a_gguf_file_is_packed_like_the_folder_that_it_came_from() {
    let lab = lab_with(&small());
    let folder = check(&lab, &recipe(&lab, "gptq", 4));
    to_gguf(&lab.open("model"), &lab.path("model.gguf"), Dtype::F32, false).unwrap();
    let out = lab.path("from-gguf");
    let options = Options { report_tokens: 0, ..Options::new(&out) };
    let source = lab.open("model.gguf");
    quantize::run(&source, &recipe(&lab, "gptq", 4), &options, &mut |_| {}).unwrap();
    let packed = lab.open("from-gguf");
    assert_eq!(packed.manifest().unwrap().quantized, folder.quantized);
    let problems = verify(&packed, Some(&source), |_, _| {}).unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    let tokens = common::some_tokens(9, 256);
    assert!(same_bits(&logits_of(&packed, &tokens), &logits_of(&lab.open("packed"), &tokens)));
}

// The command.

#[test]
fn a_dry_run_knows_every_byte_and_writes_none() {
    let lab = Lab::with_tiny();
    let flags = format!("{QUICK} --bits 3 --asym --embed-bits 6 --layer *.v_proj=bits:8");
    let plan = lab.run(&format!("quantize tiny {flags} --dry-run --json - -o packed")).json();
    assert_eq!(entries(&lab.path("")), ["calib.txt", "tiny"]);
    let text = lab.ok(&format!("quantize tiny {flags} --dry-run -o packed"));
    assert!(text.contains(&format!("{} bytes", plan["weight_bytes"])), "{text}");

    lab.ok(&format!("quantize tiny {flags} -o packed"));
    let mut sum = 0;
    for file in plan["files"].as_array().unwrap() {
        let path = lab.path("packed").join(file["name"].as_str().unwrap());
        let written = fs::metadata(path).unwrap().len();
        assert_eq!(file["bytes"], written, "{file}");
        sum += written;
    }
    assert_eq!(plan["weight_bytes"], sum);
    let config = read_json(&lab.path("packed/config.json"));
    for key in ["bits_per_weight_codes", "bits_per_weight_total"] {
        assert_eq!(config["quantization_config"][key], plan[key], "{key}");
    }
    let manifest = read_json(&lab.path("packed/anybit.json"));
    assert_eq!(manifest["recipe"], plan["recipe"]);
}

#[test]
fn reports_stand_in_the_folder() {
    let lab = Lab::with_tiny();
    let flags = QUICK.replace("--report-tokens 0", "--report-tokens 512");
    let line = format!("quantize tiny {flags} --bits 3 --json report-copy.json -o packed");
    lab.ok(&line);
    let folder = lab.path("packed");
    let report = read_json(&folder.join("report.json"));
    assert_eq!(report, read_json(&lab.path("report-copy.json")));
    let bytes = fs::metadata(folder.join("model.safetensors")).unwrap().len();
    assert_eq!(report["weight_file_bytes"], bytes);
    let original = fs::metadata(lab.path("tiny/model.safetensors")).unwrap().len();
    assert_eq!(report["original_file_bytes"], original);
    assert_eq!(report["matrices"].as_array().unwrap().len(), 14);
    assert_eq!(report["blocks"].as_array().unwrap().len(), 2);
    for block in report["blocks"].as_array().unwrap() {
        assert!(block["hidden_error"].as_f64().unwrap() > 0.0, "{block}");
    }
    assert_eq!(report["quality"]["tokens"], 511);
    assert!(report["quality"]["kl_mean"].as_f64().unwrap() > 0.0);
    let page = fs::read_to_string(folder.join("report.html")).unwrap();
    assert!(page.contains("<svg") && !page.contains("<script"), "self-contained, no code");
    let card = fs::read_to_string(folder.join("README.md")).unwrap();
    assert!(card.starts_with("---\n") && card.contains("2210.17323"), "the method is cited");
    // Names, never paths: the folder may be published.
    let place = lab.path("").display().to_string();
    for name in entries(&folder) {
        let text = String::from_utf8_lossy(&fs::read(folder.join(&name)).unwrap()).into_owned();
        assert!(!text.contains(place.trim_end_matches('/')), "{name} holds {place}");
    }
}

#[test]
fn inspect_adds_up() {
    let lab = Lab::with_tiny();
    lab.ok(&format!("quantize tiny {QUICK} --bits 3 --asym --embed-bits 8 -o packed"));
    for model in ["tiny", "packed"] {
        let table = lab.run(&format!("inspect {model} --json -")).json();
        let tensors = table["tensors"].as_array().unwrap();
        let sum = |key: &str, of: &dyn Fn(&Value) -> bool| -> f64 {
            tensors.iter().filter(|t| of(t)).map(|t| t[key].as_f64().unwrap()).sum()
        };
        let file = fs::read(lab.path(model).join("model.safetensors")).unwrap();
        let header = u64::from_le_bytes(file[..8].try_into().unwrap());
        assert_eq!(table["file_bytes"], file.len() as u64);
        assert_eq!(sum("bytes", &|_| true) as u64 + 8 + header, file.len() as u64, "{model}");
        let linear = |t: &Value| t["name"].as_str().unwrap().ends_with("_proj.weight");
        let weights: u64 = tensors.iter().filter(|t| linear(t)).map(elements).sum();
        let total = sum("bytes", &linear) * 8.0 / weights as f64;
        assert_eq!(table["bits_per_weight_total"], total, "{model}");
        let errors = tensors.iter().filter(|t| t["relative_error"].is_f64()).count();
        assert_eq!(errors, if model == "packed" { 15 } else { 0 });
    }
    assert!(lab.ok("inspect packed").contains("model.layers.1.mlp.down_proj.weight"));
}

/// Elements of a row of `inspect`.
fn elements(row: &Value) -> u64 {
    row["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).product()
}

/// The control of every measurement: a model does not differ from itself.
#[test]
fn a_model_compared_with_itself() {
    let lab = Lab::with_tiny();
    lab.ok(&format!("quantize tiny {QUICK} --bits 3 -o packed"));
    for (convention, reference) in
        [("hf", "tiny"), ("llamacpp", "tiny"), ("hf", "packed"), ("llamacpp", "packed")]
    {
        let line = format!(
            "eval tiny packed --reference {reference} --text calib.txt --ctx 64 \
             --convention {convention} --limit-tokens 320 --json -"
        );
        let scores = lab.run(&line).json();
        for score in scores["models"].as_array().unwrap() {
            assert_eq!(score["convention"], convention);
            assert!(score["perplexity"].as_f64().unwrap() > 1.0);
            let exact = score["path"] == reference;
            for key in ["kl_mean", "kl_median", "kl_p99", "delta_p_mean", "delta_p_rms"] {
                assert_eq!(score[key] == 0.0, exact, "{line}: {key} of {score}");
            }
            assert_eq!(score["top1_agreement"] == 1.0, exact, "{line}: {score}");
            if exact {
                assert_eq!(score["kl_ci95"], json!([0.0, 0.0]));
            }
        }
    }
}

#[test]
fn scores_have_the_keys_that_others_read() {
    const KEYS: [&str; 15] = [
        "path",
        "perplexity",
        "perplexity_se",
        "convention",
        "ctx",
        "tokens",
        "kl_mean",
        "kl_median",
        "kl_p99",
        "kl_ci95",
        "top1_agreement",
        "bits_per_weight_codes",
        "bits_per_weight_total",
        "file_bytes",
        "prefill_tokens_per_s",
    ];
    let lab = Lab::with_tiny();
    let line = "eval tiny --reference tiny --text calib.txt --ctx 64 --limit-tokens 128 --json -";
    let scores = lab.run(line).json();
    let score = &scores["models"][0];
    for key in KEYS {
        assert!(!score[key].is_null(), "{key} of {score}");
    }
    assert_eq!((&score["ctx"], &score["tokens"]), (&json!(64), &json!(126)));
    assert_eq!(score["bits_per_weight_total"], 16.0);
}

// Damage that `verify` has to find.

/// `verify` ends with its code and names this tensor and this reason alone.
fn found(lab: &Lab, folder: &str, reference: Option<&str>, tensor: &str, reason: &str) {
    let mut line = format!("verify {folder}");
    if let Some(reference) = reference {
        line.push_str(&format!(" --reference {reference}"));
    }
    let run = lab.run(&line);
    run.refused(VERIFICATION, &["1 of its tensors"]);
    let told = run.stdout.starts_with(&format!("{tensor}: ")) && run.stdout.contains(reason);
    assert!(told, "{tensor}, {reason}: {run:?}");
    let run = lab.run(&format!("{line} --json -"));
    assert_eq!(run.code, Some(VERIFICATION));
    let problems: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(problems["ok"], false);
    assert_eq!(problems["problems"][0]["tensor"], tensor);
}

const UP: &str = "model.layers.0.mlp.up_proj";

/// A lab with `packed`, all of whose parts can be damaged.
fn packed() -> Lab {
    let lab = Lab::with_tiny();
    lab.ok(&format!("quantize tiny {QUICK} --bits 3 --asym -o packed"));
    lab.ok("verify packed");
    lab.ok("verify packed --reference tiny");
    lab
}

/// The same after a change of the weight file in a copy, `bad`.
fn tampered(lab: &Lab, damage: impl FnOnce(&mut Tensors)) {
    let _ = fs::remove_dir_all(lab.path("bad"));
    lab.copy("packed", "bad");
    let mut tensors = Tensors::read(&lab.path("bad/model.safetensors"));
    damage(&mut tensors);
    tensors.write();
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let lab = packed();
    let up = format!("{UP}.weight");
    let parts = [
        (format!("{UP}.codes.0.0"), up.as_str()),
        (format!("{UP}.scales.0.0"), up.as_str()),
        (format!("{UP}.zeros.0.0"), up.as_str()),
        ("model.norm.weight".into(), "model.norm.weight"),
        ("model.embed_tokens.weight".into(), "model.embed_tokens.weight"),
    ];
    for (part, tensor) in parts {
        for at_end in [false, true] {
            tampered(&lab, |t| {
                let bytes = t.bytes_mut(&part);
                // The lowest bit of the first element's mantissa or first code, or of the last.
                let at = if at_end { bytes.len() - 2 } else { 0 };
                bytes[at] ^= 1;
            });
            // The last zero points of a row leave padding, which is checked before the hash.
            let padding = at_end && part.contains(".zeros.");
            let reason = if padding { "out of range" } else { "recorded hash" };
            found(&lab, "bad", None, tensor, reason);
        }
    }
}

#[test]
fn what_a_hash_does_not_say_is_found() {
    let lab = packed();
    let up = format!("{UP}.weight");
    tampered(&lab, |t| {
        t.bytes_mut(&format!("{UP}.scales.0.0"))[..2].copy_from_slice(&0x7e00u16.to_le_bytes());
    });
    found(&lab, "bad", None, &up, "not finite");

    // 176 codes of 3 bits leave 16 bits of a row's last word, which have to be zero.
    tampered(&lab, |t| t.bytes_mut("model.layers.0.mlp.down_proj.codes.0.0")[17 * 4 - 1] |= 0x80);
    found(&lab, "bad", None, "model.layers.0.mlp.down_proj.weight", "out of range");

    // Codes changed together with their hash.
    let mut hash = String::new();
    tampered(&lab, |t| {
        t.bytes_mut(&format!("{UP}.codes.0.0"))[5] ^= 0x10;
        let part = |kind: &str| &t.data[t.range(&format!("{UP}.{kind}.0.0"))];
        hash = QuantizedRecord::hash(["codes", "scales", "zeros"].into_iter().map(part));
    });
    edit_json(&lab.path("bad/anybit.json"), |m| m["quantized"][&up]["blake3"] = json!(hash));
    found(&lab, "bad", None, &up, "decodes to");
}

#[test]
fn manifests_that_lie_are_found() {
    let lab = packed();
    let up = format!("{UP}.weight");
    let lie = |key: &str, value: Value| {
        tampered(&lab, |_| {});
        edit_json(&lab.path("bad/anybit.json"), |m| m["quantized"][&up][key] = value);
    };
    let record = &read_json(&lab.path("packed/anybit.json"))["quantized"][&up];
    lie("decoded_norm", json!(record["decoded_norm"].as_f64().unwrap() * 1.001));
    found(&lab, "bad", None, &up, "decodes to");
    lie("bytes", json!(record["bytes"].as_u64().unwrap() - 1));
    found(&lab, "bad", None, &up, "size is not as recorded");
    lie("code_bits", json!(1));
    found(&lab, "bad", None, &up, "size is not as recorded");
    lie("column_groups", json!(0));
    found(&lab, "bad", None, &up, "column groups");
    lie("planes", json!([]));
    found(&lab, "bad", None, &up, "planes");
    lie("relative_error", json!(record["relative_error"].as_f64().unwrap() / 2.0));
    lab.ok("verify bad");
    found(&lab, "bad", Some("tiny"), &up, "recorded was");
}

/// Sizes that no machine can hold, in the manifest and in a configuration to match: an error, not
/// an overflow.
#[test]
fn manifests_of_absurd_sizes_are_found() {
    let lab = packed();
    let up = format!("{UP}.weight");
    for (rows, cols) in [(1u64 << 62, 64u64), (176, 1 << 62), (1 << 63, 1 << 63), (u64::MAX, 64)] {
        tampered(&lab, |_| {});
        edit_json(&lab.path("bad/anybit.json"), |m| {
            let plane = &mut m["quantized"][&up]["planes"][0];
            (plane["rows"], plane["cols"]) = (json!(rows), json!(cols));
        });
        found(&lab, "bad", None, &up, "");
    }
    // Rows whose stored bytes wrap around to none at all, in a matrix that the model does not have.
    tampered(&lab, |t| {
        let end = t.data.len();
        for (part, dtype) in [("codes", "U32"), ("scales", "F16")] {
            let entry =
                json!({"dtype": dtype, "shape": [1u64 << 62, 0], "data_offsets": [end, end]});
            t.header.insert(format!("ghost.{part}.0.0"), entry);
        }
    });
    edit_json(&lab.path("bad/anybit.json"), |m| {
        let mut ghost = m["quantized"][&up].clone();
        let grid = json!({"type": "uniform", "bits": 4, "symmetric": true, "group_size": 16});
        let rows = 1u64 << 62;
        ghost["rows"] = json!(rows);
        ghost["planes"] = json!([{"rows": rows, "cols": 64, "grid": grid}]);
        ghost["blake3"] = json!(QuantizedRecord::hash(std::iter::empty()));
        (ghost["bytes"], ghost["code_bits"], ghost["decoded_norm"]) =
            (json!(0), json!(0), json!(0.0));
        m["quantized"]["ghost.weight"] = ghost;
    });
    found(&lab, "bad", None, "ghost.weight", "");
}

#[test]
fn another_original_is_noticed() {
    let lab = packed();
    let tiny = synth::preset("tiny").unwrap();
    lab.synth("other", &tiny, 1);
    lab.synth("wider", &ModelConfig { intermediate_size: 192, ..tiny }, 0);
    for (reference, reason) in [("other", "recorded was"), ("wider", "another shape")] {
        let run = lab.run(&format!("verify packed --reference {reference}"));
        assert_eq!(run.code, Some(VERIFICATION), "{run:?}");
        assert!(run.stdout.contains(reason), "{run:?}");
    }
}
