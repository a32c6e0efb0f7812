//! Bad input, one test each: the command ends with the documented exit code and a message that
//! names what is wrong, where, and what to do; and it leaves nothing behind.
//!
//! Exit codes (`Error::exit_code`): 2 usage, 3 input that cannot be used, 4 output that cannot be
//! written, 5 failed verification. A panic would be 101.

mod common;

use std::fs;
use std::path::Path;

use anybit::io::convert::to_gguf;
use anybit::io::{Dtype, ModelConfig, synth};
use common::{Lab, QUICK, Run, Tensors, assert_same, edit_json, entries, read_json};
use serde_json::{Value, json};

const USAGE: i32 = 2;
const INPUT: i32 = 3;
const OUTPUT: i32 = 4;

/// A matrix in the middle of `tiny`.
const MATRIX: &str = "model.layers.1.mlp.up_proj.weight";

/// The command that quantizes a model to `out` without any text.
fn quantize(model: &str) -> String {
    format!("quantize {model} --method rtn --bits 4 --group-size 16 --report-tokens 0 -o out")
}

/// A lab with `tiny` and `bad`, a copy of it after `damage`.
fn damaged(damage: impl FnOnce(&Path)) -> Lab {
    let lab = Lab::with_tiny();
    lab.copy("tiny", "bad");
    damage(&lab.path("bad"));
    lab
}

/// The same with another header or data of its weight file.
fn damaged_weights(damage: impl FnOnce(&mut Tensors)) -> Lab {
    damaged(|folder| {
        let mut tensors = Tensors::read(&folder.join("model.safetensors"));
        damage(&mut tensors);
        tensors.write();
    })
}

/// The same with another `config.json`.
fn damaged_config(damage: impl FnOnce(&mut Value)) -> Lab {
    damaged(|folder| edit_json(&folder.join("config.json"), damage))
}

/// A lab with `tiny` and `tiny.gguf`.
fn with_gguf() -> Lab {
    let lab = Lab::with_tiny();
    to_gguf(&lab.open("tiny"), &lab.path("tiny.gguf"), Dtype::F16, false).unwrap();
    lab
}

/// Position right behind the first `needle`.
fn behind(bytes: &[u8], needle: &str) -> usize {
    let at = bytes.windows(needle.len()).position(|w| w == needle.as_bytes());
    at.unwrap() + needle.len()
}

// Weight files.

#[test]
fn truncated_safetensors() {
    let lab = damaged(|_| {});
    let path = lab.path("bad/model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 4, 8, 500, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).unwrap();
        let words = ["bad/model.safetensors is damaged", "copy it again"];
        lab.refuses(&quantize("bad"), INPUT, &words);
    }
}

#[test]
fn truncated_gguf() {
    let lab = with_gguf();
    let whole = fs::read(lab.path("tiny.gguf")).unwrap();
    for length in [0, 3, 20, 300, whole.len() / 2, whole.len() - 1] {
        fs::write(lab.path("bad.gguf"), &whole[..length]).unwrap();
        let words = ["bad.gguf is damaged", "truncated", "copy it again"];
        lab.refuses(&quantize("bad.gguf"), INPUT, &words);
        lab.refuses("convert bad.gguf out", INPUT, &words);
    }
}

#[test]
fn header_of_two_to_the_sixty_bytes() {
    let lab = with_gguf();
    lab.copy("tiny", "bad");
    let overwrite = |name: &str, at: usize| {
        let mut bytes = fs::read(lab.path(name)).unwrap();
        bytes[at..at + 8].copy_from_slice(&(1u64 << 60).to_le_bytes());
        fs::write(lab.path(name), bytes).unwrap();
    };
    overwrite("bad/model.safetensors", 0);
    let words = ["bad/model.safetensors is damaged", "header too large"];
    lab.refuses(&quantize("bad"), INPUT, &words);
    // The number of tensors, then of keys.
    for at in [8, 16] {
        to_gguf(&lab.open("tiny"), &lab.path("bad.gguf"), Dtype::F16, true).unwrap();
        overwrite("bad.gguf", at);
        let words = ["bad.gguf is damaged", "claims 1152921504606846976"];
        lab.refuses(&quantize("bad.gguf"), INPUT, &words);
    }
}

#[test]
fn overlapping_offsets() {
    let lab = damaged_weights(|t| {
        let range = t.range(MATRIX);
        t.header[MATRIX]["data_offsets"] = json!([range.start - 2, range.end - 2]);
    });
    let words = ["bad/model.safetensors is damaged", "invalid offset", MATRIX];
    lab.refuses(&quantize("bad"), INPUT, &words);

    let lab = with_gguf();
    let mut bytes = fs::read(lab.path("tiny.gguf")).unwrap();
    // Behind a name: number of dimensions, two dimensions, type, offset.
    let at = behind(&bytes, "blk.1.ffn_up.weight") + 4 + 16 + 4;
    let offset = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    bytes[at..at + 8].copy_from_slice(&(offset - 32).to_le_bytes());
    fs::write(lab.path("bad.gguf"), bytes).unwrap();
    let words = ["bad.gguf is damaged", "blk.1.ffn_up.weight", "overlap"];
    lab.refuses(&quantize("bad.gguf"), INPUT, &words);
}

#[test]
fn bytes_that_no_tensor_covers() {
    let lab = damaged_weights(|t| t.data.extend([0; 64]));
    lab.refuses(&quantize("bad"), INPUT, &["bad/model.safetensors is damaged"]);
}

#[test]
fn nan_and_infinite_weights() {
    for (bits, shown) in [(0x7fc0u16, "NaN"), (0x7f80, "inf"), (0xff80, "-inf")] {
        let lab = damaged_weights(|t| {
            t.bytes_mut(MATRIX)[10..12].copy_from_slice(&bits.to_le_bytes());
        });
        let holds = format!("tensor {MATRIX} holds {shown} at element 5");
        let words = [holds.as_str(), "unusable"];
        lab.refuses(&quantize("bad"), INPUT, &words);
        lab.refuses("convert bad out", INPUT, &words);
        lab.refuses("convert bad out.gguf", INPUT, &words);
    }
}

#[test]
fn nan_in_a_norm() {
    let name = "model.layers.0.input_layernorm.weight";
    let lab = damaged_weights(|t| {
        t.bytes_mut(name)[2..4].copy_from_slice(&0x7fc0u16.to_le_bytes());
    });
    let words = [name, "NaN at element 1"];
    lab.refuses(&quantize("bad"), INPUT, &words);
    lab.refuses("eval bad --text calib.txt --ctx 32 --json out.json", INPUT, &words);
}

#[test]
fn missing_tensor() {
    let near = "model.layers.1.mlp.up_projection.weight";
    let lab = damaged_weights(|t| {
        let entry = t.header.remove(MATRIX).unwrap();
        t.header.insert(near.into(), entry);
    });
    let (what, hint) = (format!("bad has no tensor {MATRIX}"), format!("did you mean {near}?"));
    lab.refuses(&quantize("bad"), INPUT, &[&what, &hint]);
}

#[test]
fn wrong_shape() {
    let lab = damaged_config(|c| c["intermediate_size"] = json!(192));
    let words = ["model.layers.0.mlp.gate_proj.weight", "[176, 64]", "[192, 64]", "config.json"];
    lab.refuses(&quantize("bad"), INPUT, &words);
}

#[test]
fn unknown_dtype() {
    let lab = damaged_weights(|t| {
        t.header[MATRIX]["dtype"] = json!("I8");
        t.header[MATRIX]["shape"] = json!([176, 128]);
    });
    let words = [MATRIX, "element type I8", "supported: F32, F16, BF16"];
    lab.refuses(&quantize("bad"), INPUT, &words);
}

#[test]
fn index_that_leaves_the_folder() {
    let lab = damaged(|folder| {
        let index = json!({"weight_map": {MATRIX: "../tiny/model.safetensors"}});
        fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    });
    let words = ["bad/model.safetensors.index.json is damaged", MATRIX, "not a plain file name"];
    lab.refuses(&quantize("bad"), INPUT, &words);
}

// Configurations, tokenizers, folders.

#[test]
fn unknown_architecture() {
    let lab = damaged_config(|c| c["architectures"] = json!(["GPT2LMHeadModel"]));
    let words = ["bad/config.json", "GPT2LMHeadModel", "supported: LlamaForCausalLM"];
    lab.refuses(&quantize("bad"), INPUT, &words);
}

/// A claim of layers costs nothing; listing their tensors would take tens of gigabytes.
#[test]
#[cfg(target_os = "linux")]
fn sixteen_million_layers() {
    let lab = damaged_config(|c| c["num_hidden_layers"] = json!(1 << 24));
    let line = quantize("bad");
    let command = lab.limited("-v 4194304", &line);
    Run::of(&line, command).refused(INPUT, &["bad", "layers"]);
    lab.has_no_output(&line);
}

#[test]
fn a_window_that_sees_nothing() {
    let lab = damaged_config(|c| {
        c["architectures"] = json!(["MistralForCausalLM"]);
        c["sliding_window"] = json!(0);
    });
    lab.refuses(&quantize("bad"), INPUT, &["bad/config.json", "sliding_window"]);
    lab.refuses("generate bad --prompt a", INPUT, &["bad/config.json", "sliding_window"]);
}

#[test]
fn weights_that_another_program_packed() {
    let lab = damaged_config(|c| c["quantization_config"] = json!({"quant_method": "awq"}));
    let words = ["bad/config.json", "\"awq\" cannot be read", "supported:"];
    lab.refuses(&quantize("bad"), INPUT, &words);
}

#[test]
fn missing_tokenizer() {
    let lab = damaged(|folder| fs::remove_file(folder.join("tokenizer.json")).unwrap());
    let words = ["bad/tokenizer.json", "check the path"];
    lab.refuses(&format!("quantize bad {QUICK} -o out"), INPUT, &words);
    lab.refuses("convert bad out.gguf", INPUT, &words);
    lab.refuses("eval bad --text calib.txt --ctx 32 --json out.json", INPUT, &words);
}

#[test]
fn tokens_beyond_the_vocabulary() {
    let config = ModelConfig { vocab_size: 100, ..synth::preset("tiny").unwrap() };
    let lab = Lab::with_tiny();
    lab.synth("bad", &config, 0);
    let words = ["outside the model's vocabulary of 100"];
    lab.refuses(&format!("quantize bad {QUICK} -o out"), INPUT, &words);
    lab.refuses("eval bad --text calib.txt --ctx 32 --json out.json", INPUT, &words);
}

/// The tokenizers crate panics on each of these.
#[test]
fn tokenizers_that_would_panic() {
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="});
    let cases = [
        ("pre_tokenizer", json!({"type": "FixedLength", "length": 0})),
        ("normalizer", precompiled.clone()),
        ("normalizer", json!({"type": "Sequence", "normalizers": [precompiled]})),
    ];
    for (stage, value) in cases {
        let lab = damaged(|folder| {
            edit_json(&folder.join("tokenizer.json"), |t| t[stage] = value.clone());
        });
        let line = format!("quantize bad {QUICK} -o out");
        lab.refuses(&line, INPUT, &["bad/tokenizer.json"]);
    }
}

#[test]
fn no_model_there() {
    let lab = Lab::empty();
    fs::create_dir(lab.path("empty")).unwrap();
    fs::write(lab.path("text.gguf"), "not a model at all").unwrap();
    lab.refuses(&quantize("nowhere"), INPUT, &["nowhere", "check the path"]);
    lab.refuses(&quantize("empty"), INPUT, &["empty is no checkpoint", "config.json"]);
    lab.refuses(&quantize("text.gguf"), INPUT, &["text.gguf", "\"GGUF\""]);
}

#[test]
fn no_weights_in_the_folder() {
    let lab = damaged(|folder| fs::remove_file(folder.join("model.safetensors")).unwrap());
    lab.refuses(&quantize("bad"), INPUT, &["bad is no checkpoint", "*.safetensors"]);
}

#[test]
fn packed_already() {
    let lab = Lab::with_tiny();
    lab.ok(&quantize("tiny").replace("-o out", "-o packed"));
    let words = ["packed is packed already", "quantize the original"];
    lab.refuses(&quantize("packed"), INPUT, &words);
}

#[test]
fn a_newer_major_version() {
    let lab = Lab::with_tiny();
    lab.ok(&quantize("tiny").replace("-o out", "-o packed"));
    let manifest = lab.path("packed/anybit.json");
    // A newer minor version is read.
    edit_json(&manifest, |m| m["format_minor"] = json!(99));
    lab.ok("verify packed");
    edit_json(&manifest, |m| m["format_version"] = json!(3));
    let words = ["packed/anybit.json", "format version 3 is newer", "update anybit"];
    for line in ["verify packed", "inspect packed", "convert packed out"] {
        lab.refuses(line, INPUT, &words);
    }
    edit_json(&manifest, |m| {
        m.as_object_mut().unwrap().remove("format_version");
    });
    lab.refuses("verify packed", INPUT, &["packed/anybit.json is damaged", "format_version"]);
}

#[test]
fn verifying_what_is_not_packed() {
    let lab = Lab::with_tiny();
    lab.refuses("verify tiny", INPUT, &["tiny", "nothing to verify"]);
}

// Recipes and flags.

#[test]
fn unknown_recipe_keys() {
    let lab = Lab::with_tiny();
    let refuse = |recipe: &str, words: &[&str]| {
        fs::write(lab.path("recipe.toml"), recipe).unwrap();
        let words = [words, &["recipe.toml"]].concat();
        lab.refuses("quantize tiny --recipe recipe.toml -o out", INPUT, &words);
    };
    let near = ["line 2", "`group_sise`", "did you mean group_size?"];
    refuse("bits = 4\ngroup_sise = 16\n", &near);
    let near = ["line 2", "`seqlength`", "did you mean seqlen?"];
    refuse("[calibration]\nseqlength = 16\n", &near);
    refuse("[layers.\"*\"]\nbit = 3\n", &["line 2", "`bit`", "did you mean bits?"]);
    refuse("bits = \n", &["line 1"]);
    lab.refuses("quantize tiny --recipe nowhere.toml -o out", INPUT, &["nowhere.toml"]);
}

#[test]
fn unknown_methods() {
    let lab = Lab::with_tiny();
    fs::write(lab.path("recipe.toml"), "method = \"gptk\"\n").unwrap();
    let words = ["\"gptk\"", "did you mean gptq?", "rtn"];
    lab.refuses("quantize tiny --recipe recipe.toml -o out", INPUT, &words);
    lab.refuses("quantize tiny --method gptk -o out", USAGE, &["gptk", "gptq"]);
}

#[test]
fn group_sizes_that_no_layout_has() {
    let lab = Lab::with_tiny();
    for size in ["12", "0", "-2", "4", "9223372036854775807"] {
        let line = format!("quantize tiny --method rtn --group-size {size} -o out");
        lab.refuses(&line, INPUT, &[&format!("group size {size}"), "multiple of 8"]);
    }
}

#[test]
fn group_longer_than_the_row() {
    let lab = Lab::with_tiny();
    let rows = "group size 72 for rows of 64 columns";
    // Rows of 176 hold such groups, the other twelve do not.
    let line = "quantize tiny --method rtn --group-size 72 --report-tokens 0 -o out";
    let words = ["model.layers.0.self_attn.q_proj.weight and 11 more", rows, "at most", "-1"];
    lab.refuses(line, INPUT, &words);
    let line = "quantize tiny --method rtn --group-size 16 --layer *.1.*.q_proj=group_size:72 \
                --report-tokens 0 -o out";
    lab.refuses(line, INPUT, &["model.layers.1.self_attn.q_proj.weight:", rows]);
}

#[test]
fn a_shorter_last_group_is_allowed() {
    let lab = Lab::with_tiny();
    // 64 = 48 + 16 and 176 = 3·48 + 32.
    lab.ok("quantize tiny --method rtn --group-size 48 --report-tokens 0 -o packed");
    lab.ok("verify packed --reference tiny");
    let record = &read_json(&lab.path("packed/anybit.json"))["quantized"][MATRIX];
    assert_eq!(record["planes"][0]["grid"]["group_size"], 48);
    // 4 bits of 64 columns and two scales.
    assert_eq!(record["bytes"], 176 * (32 + 4));
}

#[test]
fn bits_out_of_range() {
    let lab = Lab::with_tiny();
    for bits in ["0", "9"] {
        let what = format!("{bits} bits");
        let words = [what.as_str(), "1 to 8"];
        let line = quantize("tiny").replace("--bits 4", &format!("--bits {bits}"));
        lab.refuses(&line, INPUT, &words);
        lab.refuses(&format!("{} --embed-bits {bits}", quantize("tiny")), INPUT, &words);
        lab.refuses(&format!("{} --layer *=bits:{bits}", quantize("tiny")), INPUT, &words);
    }
    lab.refuses("quantize tiny --bits 256 -o out", INPUT, &["256 bits", "1 to 8"]);
    lab.refuses("quantize tiny --bits NaN -o out", INPUT, &["NaN bits", "1 to 8"]);
    lab.refuses("quantize tiny --bits many -o out", USAGE, &["many", "--bits"]);
    lab.refuses("quantize tiny --embed-bits 256 -o out", USAGE, &["256", "--embed-bits"]);
}

#[test]
fn patterns_that_match_nothing() {
    let lab = Lab::with_tiny();
    let words = ["pattern \"*.w1\" matches no linear", "model.layers.0.self_attn.q_proj"];
    lab.refuses(&format!("{} --layer *.w1=bits:3", quantize("tiny")), INPUT, &words);
    lab.refuses(&format!("{} --skip *.w1", quantize("tiny")), INPUT, &words);
    let words = ["--layer *=bit:3", "did you mean bits?", "expected PATTERN="];
    lab.refuses(&format!("{} --layer *=bit:3", quantize("tiny")), INPUT, &words);
}

#[test]
fn a_head_that_is_the_embedding() {
    let lab = Lab::with_tiny();
    let line = format!("{} --head-bits 4", quantize("tiny"));
    lab.refuses(&line, INPUT, &["head_bits", "use embed_bits"]);
}

#[test]
fn problems_are_known_from_a_dry_run() {
    let lab = Lab::with_tiny();
    let line = "quantize tiny --method rtn --group-size 72 --skip *.w1 --dry-run -o out";
    let words = ["group size 72 for rows of 64", "\"*.w1\" matches no linear"];
    lab.refuses(line, INPUT, &words);
    fs::create_dir(lab.path("there")).unwrap();
    let line = quantize("tiny").replace("-o out", "--dry-run -o there");
    lab.refuses(&line, OUTPUT, &["there exists already", "--force"]);
    assert!(entries(&lab.path("there")).is_empty());
}

#[test]
fn a_system_message_without_a_template() {
    let lab = Lab::with_tiny();
    lab.refuses("generate tiny --prompt hi --system x", USAGE, &["--system", "chat template"]);
}

#[test]
fn more_tokens_than_fit_are_no_reason_to_fail() {
    let lab = Lab::with_tiny();
    let all = u64::MAX;
    lab.ok(&format!("generate tiny --prompt hi --ctx 16 --max-tokens {all}"));
}

/// Templates come with models; what they may take is bounded.
#[test]
#[cfg(target_os = "linux")]
fn templates_without_bounds() {
    let cases = [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 100000000000 }}",
        "{{ messages | tojson | indent(100000000000) }}",
        "{{ messages | tojson(indent=100000000000) }}",
    ];
    for template in cases {
        let lab = damaged(|folder| {
            fs::write(folder.join("chat_template.jinja"), template).unwrap();
        });
        let line = "generate bad --prompt a --max-tokens 1";
        let run = Run::of(line, lab.limited("-v 4194304", line));
        assert_eq!(run.code, Some(INPUT), "{template}: {run:?}");
        assert!(run.stderr.contains("chat template"), "{template}: {run:?}");
    }
}

#[test]
fn off_grid_without_sense() {
    let lab = Lab::with_tiny();
    lab.refuses("convert tiny out --off-grid 1.5", USAGE, &["--off-grid", "0 to 1"]);
    lab.refuses("convert tiny out --off-grid NaN", USAGE, &["--off-grid", "0 to 1"]);
    lab.refuses("convert tiny out.gguf --off-grid 0.1", USAGE, &["--off-grid", "folder"]);
}

// Texts.

#[test]
fn calibration_texts() {
    let lab = Lab::with_tiny();
    let cases: [(&str, &[u8], &str); 6] = [
        ("latin1.txt", b"caf\xe9 and more", "byte 3 is not UTF-8; convert it"),
        ("empty.txt", b"", "it is empty"),
        ("blank.txt", b" \n\n ", "it is empty"),
        ("short.txt", b"two words", "fewer tokens than one sequence of 32"),
        ("bare.jsonl", b"{\"text\": \"fine\"}\n{\"body\": 1}\n", "line 2 has no \"text\""),
        ("broken.jsonl", b"{\"text\"\n", "line 1"),
    ];
    for (name, bytes, what) in cases {
        fs::write(lab.path(name), bytes).unwrap();
        let line = format!("quantize tiny {QUICK} -o out").replace("calib.txt", name);
        lab.refuses(&line, INPUT, &[&format!("calibration text {name}"), what]);
    }
    let line = format!("quantize tiny {QUICK} -o out").replace("calib.txt", "wikitext9");
    lab.refuses(&line, INPUT, &["calibration text wikitext9", "no such file", "ANYBIT_DATA"]);
}

#[test]
fn evaluation_texts() {
    let lab = Lab::with_tiny();
    let cases: [(&str, &[u8], &[&str]); 4] = [
        ("latin1.txt", b"caf\xe9", &["latin1.txt", "byte 3 is not UTF-8", "convert"]),
        ("empty.txt", b"", &["empty.txt", "it is empty"]),
        ("blank.txt", b" \n\n ", &["blank.txt", "it is empty"]),
        ("short.txt", b"two words", &["9 tokens", "one window needs", "longer text"]),
    ];
    for (name, bytes, words) in cases {
        fs::write(lab.path(name), bytes).unwrap();
        let line = format!("eval tiny --text {name} --ctx 64 --json out.json");
        lab.refuses(&line, INPUT, words);
        let line = quantize("tiny").replace("--report-tokens 0", &format!("--report-text {name}"));
        lab.refuses(&line, INPUT, words);
    }
    let line = "eval tiny --text nowhere.txt --json out.json";
    lab.refuses(line, INPUT, &["nowhere.txt"]);
    let line = "eval tiny --text calib.txt --ctx 1 --json out.json";
    lab.refuses(line, INPUT, &["--ctx 1 is too short", "at least 2"]);
}

#[test]
fn a_reference_with_another_vocabulary() {
    let lab = Lab::with_tiny();
    let tiny = synth::preset("tiny").unwrap();
    lab.synth("other", &ModelConfig { vocab_size: 300, ..tiny }, 0);
    let line = "eval tiny --text calib.txt --ctx 32 --reference other --json out.json";
    lab.refuses(line, INPUT, &["tiny", "other", "vocabulary"]);
}

// Outputs.

#[test]
fn an_output_that_exists() {
    let lab = Lab::with_tiny();
    fs::create_dir(lab.path("there")).unwrap();
    fs::write(lab.path("there/mine"), "old").unwrap();
    fs::write(lab.path("there.gguf"), "old").unwrap();
    let to_there = quantize("tiny").replace("-o out", "-o there");
    let lines = [
        to_there.as_str(),
        "convert tiny there",
        "convert tiny there.gguf",
        "synth --preset tiny -o there",
    ];
    for line in lines {
        lab.run(line).refused(OUTPUT, &["there", "exists already", "--force"]);
        assert_eq!(entries(&lab.path("there")), ["mine"], "{line}");
        assert_eq!(fs::read(lab.path("there.gguf")).unwrap(), b"old", "{line}");
    }
    lab.ok(&format!("{to_there} --force"));
    lab.ok("verify there");
    lab.ok("convert tiny there.gguf --force");
    lab.ok("inspect there.gguf");
    let all = ["calib.txt", "there", "there.gguf", "tiny"];
    assert_eq!(entries(&lab.path("")), all, "nothing beside them");
    assert!(!lab.path("there/mine").exists(), "replaced, not mixed");
}

#[test]
fn a_forced_run_that_fails_leaves_the_old_output() {
    let lab = damaged_weights(|t| t.bytes_mut(MATRIX)[..2].copy_from_slice(&[0xc0, 0x7f]));
    fs::create_dir(lab.path("there")).unwrap();
    fs::write(lab.path("there/mine"), "old").unwrap();
    let line = quantize("bad").replace("-o out", "-o there --force");
    lab.run(&line).refused(INPUT, &["NaN"]);
    lab.run("convert bad there --force").refused(INPUT, &["NaN"]);
    assert_eq!(fs::read(lab.path("there/mine")).unwrap(), b"old");
    assert_eq!(entries(&lab.path("")), ["bad", "calib.txt", "there", "tiny"]);
}

/// What is replaced is the output, never what happens to stand beside it.
#[test]
fn force_touches_no_neighbour() {
    const NEIGHBOURS: [&str; 4] =
        ["there.replaced", "there.v1.replaced", "there.v2", "there.v1.partial-replaced"];
    let lab = Lab::with_tiny();
    for neighbour in NEIGHBOURS {
        fs::create_dir(lab.path(neighbour)).unwrap();
        fs::write(lab.path(neighbour).join("mine"), "precious").unwrap();
    }
    for out in ["there", "there.v1"] {
        let line = quantize("tiny").replace("-o out", &format!("-o {out}"));
        lab.ok(&line);
        let run = lab.run(&format!("{line} --force"));
        assert!(matches!(run.code, Some(0 | OUTPUT)), "{run:?}");
        lab.ok(&format!("verify {out} --reference tiny"));
        for neighbour in NEIGHBOURS {
            assert!(lab.path(neighbour).join("mine").exists(), "{line} took {neighbour}");
        }
    }
    // Nor does a name that could be mistaken for one of ours matter.
    lab.ok(&quantize("tiny").replace("-o out", "-o there.replaced --force"));
    lab.ok("verify there.replaced --reference tiny");
}

/// An output in the place of its source, or of a folder around it, would destroy the source.
#[test]
fn an_output_in_the_place_of_the_model() {
    let lab = Lab::with_tiny();
    lab.copy("tiny", "copy");
    for line in [
        quantize("tiny").replace("-o out", "-o tiny --force"),
        quantize("tiny").replace("-o out", "-o ./copy/../tiny/ --force"),
        "convert tiny tiny --force".to_string(),
    ] {
        lab.refuses(&line, USAGE, &["tiny", "is the model itself", "another output"]);
        assert_same(&lab.path("tiny"), &lab.path("copy"));
    }
}

/// A forced output replaces a folder by its name; one without a name is no output, and neither is
/// one that the model lies in.
#[test]
fn force_never_empties_the_working_folder() {
    for out in [".", "..", "inner/..", "../work", "../../outer"] {
        let lab = Lab::empty();
        for folder in ["outer", "outer/work", "outer/work/inner"] {
            fs::create_dir(lab.path(folder)).unwrap();
            fs::write(lab.path(folder).join("mine"), "precious").unwrap();
        }
        lab.synth("outer/work/tiny", &synth::preset("tiny").unwrap(), 0);
        let line = quantize("tiny").replace("-o out", &format!("-o {out} --force"));
        let mut command = lab.command(&line);
        command.current_dir(lab.path("outer/work"));
        let run = Run::of(&line, command);
        assert!(matches!(run.code, Some(USAGE..=OUTPUT)), "{run:?}");
        for folder in ["outer", "outer/work", "outer/work/inner"] {
            let kept = fs::read(lab.path(folder).join("mine")).ok();
            assert_eq!(kept.as_deref(), Some(&b"precious"[..]), "-o {out} emptied {folder}");
        }
        assert_eq!(entries(&lab.path("outer/work")), ["inner", "mine", "tiny"], "-o {out}");
        assert_eq!(entries(&lab.path("outer")), ["mine", "work"], "-o {out}");
    }
}

#[test]
fn unwritable_outputs() {
    let lab = Lab::with_tiny();
    fs::write(lab.path("file"), "in the way").unwrap();
    let lines = [
        quantize("tiny").replace("-o out", "-o file/out"),
        "convert tiny file/out".to_string(),
        "convert tiny file/out.gguf".to_string(),
        "synth --preset tiny -o file/out".to_string(),
    ];
    for line in lines {
        lab.refuses(&line, OUTPUT, &["cannot create", "file/out"]);
        assert_eq!(fs::read(lab.path("file")).unwrap(), b"in the way");
    }
}

#[test]
#[cfg(unix)]
fn a_full_disk() {
    let lab = Lab::with_tiny();
    let lines = [
        quantize("tiny"),
        format!("quantize tiny --bits 8 {QUICK} -o out"),
        "convert tiny out".to_string(),
        "convert tiny out.gguf".to_string(),
        "synth --preset tiny -o out".to_string(),
    ];
    for line in lines {
        // 8 KiB: no weight file fits.
        let run = Run::of(&line, lab.limited("-f 16", &line));
        run.refused(OUTPUT, &["cannot write", "out"]);
        lab.has_no_output(&line);
    }
}

/// What the disk cannot hold is refused before anything is written.
#[test]
#[cfg(target_os = "linux")]
fn more_than_the_disk_has() {
    let lab = Lab::with_tiny();
    // A file system with no room at all.
    let lines = [
        quantize("tiny").replace("-o out", "-o /proc/anybit"),
        "convert tiny /proc/anybit".to_string(),
        "convert tiny /proc/anybit.gguf".to_string(),
        "synth --preset tiny -o /proc/anybit".to_string(),
    ];
    for line in lines {
        let words = ["/proc/anybit", "bytes needed, 0 free", "free some space"];
        lab.refuses(&line, OUTPUT, &words);
    }
}
