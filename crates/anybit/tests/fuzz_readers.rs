//! Every reader on mutated files: whatever stands in a file, the answer is a value or an error,
//! never a panic.
//!
//! Each test mutates small valid files for `ANYBIT_FUZZ_SECONDS` (2 by default), the same way every
//! time unless `ANYBIT_FUZZ_SEED` says otherwise, reads all that still parses, and says how many
//! inputs it saw (`--nocapture` shows it). An input that panics is kept in the build's temporary
//! folder; the panic's message stands above the failure. `fuzz/` has the same readers for
//! cargo-fuzz, which knows which inputs reach new code.

mod common;

use std::env;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anybit::core::Matrix;
use anybit::core::rng::SplitMix64;
use anybit::io::convert::to_gguf;
use anybit::io::gguf::write::{TensorPlan, write_gguf};
use anybit::io::gguf::{GgufFile, Value as Field};
use anybit::io::native::verify;
use anybit::io::tokenizer::chat::{ChatTemplate, Message};
use anybit::io::tokenizer::{StreamDecoder, Tokenizer, gguf as vocab};
use anybit::io::{Checkpoint, Dtype, IoError, ModelConfig, synth};
use anybit::measure::bits_per_weight;
use anybit::ptq::{Plan, Recipe};
use anybit::runtime::{Decoder, Session};
use common::{Lab, edit_json, join_safetensors, prose, split_safetensors};
use serde_json::{Value, json};

// The mutator.

/// Where headers are: half of all changes fall in there.
const FOCUS: usize = 2048;

/// What a number in a text is replaced by.
const EXTREMES: [&str; 18] = [
    "0",
    "-1",
    "1",
    "2",
    "7",
    "9",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-1e-320",
    "null",
    "true",
    "\"\"",
    "[]",
    "{}",
];

/// What a byte is replaced by: ends of ranges, and what texts are structured with.
const BYTES: [u8; 16] = *b"\0\x01\x7f\x80\xff\"\\{}[],:. \n";

/// What four or eight bytes are replaced by.
const INTEGERS: [u64; 8] =
    [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 60, i64::MAX as u64, u64::MAX];

struct Mutator {
    rng: SplitMix64,
}

impl Mutator {
    /// One to four changes of `bytes`; `other` is a file to take parts from.
    fn mutate(&mut self, bytes: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..1 + self.rng.below(4) {
            self.change(&mut bytes, other);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = self.place(bytes.len());
        match self.rng.below(10) {
            0 if at < bytes.len() => bytes[at] ^= 1 << self.rng.below(8),
            1 if at < bytes.len() => bytes[at] = BYTES[self.rng.below(BYTES.len())],
            2 => {
                let new: Vec<u8> = (0..1 + self.rng.below(8)).map(|_| self.byte()).collect();
                drop(bytes.splice(at..at, new));
            }
            3 => {
                let end = (at + 1 + self.rng.below(16)).min(bytes.len());
                bytes.drain(at..end);
            }
            4 if self.rng.below(4) == 0 => bytes.truncate(at),
            5 => {
                let from = self.place(other.len());
                let part = &other[from..(from + 1 + self.rng.below(64)).min(other.len())];
                let replaced = self.rng.below(2) * part.len();
                drop(bytes.splice(at..(at + replaced).min(bytes.len()), part.iter().copied()));
            }
            6 | 7 => self.number(bytes, at),
            _ => self.integer(bytes, at),
        }
    }

    /// A position up to `len`.
    fn place(&mut self, len: usize) -> usize {
        let end = if self.rng.below(2) == 0 { len.min(FOCUS) } else { len };
        self.rng.below(end + 1)
    }

    fn byte(&mut self) -> u8 {
        self.rng.next_u64() as u8
    }

    /// Replaces the next number of a text.
    fn number(&mut self, bytes: &mut Vec<u8>, at: usize) {
        let Some(distance) = bytes[at..].iter().position(u8::is_ascii_digit) else { return };
        let start = at + distance;
        let digits = bytes[start..].iter().take_while(|b| b.is_ascii_digit() || **b == b'.');
        let end = start + digits.count();
        drop(bytes.splice(start..end, EXTREMES[self.rng.below(EXTREMES.len())].bytes()));
    }

    /// Overwrites a little-endian integer.
    fn integer(&mut self, bytes: &mut [u8], at: usize) {
        let value = INTEGERS[self.rng.below(INTEGERS.len())].to_le_bytes();
        let width = [4, 8][self.rng.below(2)];
        if let Some(place) = bytes.get_mut(at..at + width) {
            place.copy_from_slice(&value[..width]);
        }
    }
}

/// A change to a safetensors file that half of the time leaves the header's length right.
fn mutate_safetensors(mutator: &mut Mutator, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    match (split_safetensors(bytes), split_safetensors(other)) {
        (Some((header, data)), Some((other, _))) if mutator.rng.below(2) == 0 => {
            join_safetensors(&mutator.mutate(header, other), data)
        }
        _ => mutator.mutate(bytes, other),
    }
}

// The loop.

fn setting(name: &str, default: u64) -> u64 {
    env::var(name).ok().map_or(default, |v| v.parse().expect("a whole number"))
}

/// Reads mutations of `seeds` until the time is up. `read` says whether it could make sense of an
/// input, as it has to of every seed.
fn fuzz(
    name: &str,
    seeds: &[Vec<u8>],
    mutate: impl Fn(&mut Mutator, &[u8], &[u8]) -> Vec<u8>,
    read: impl Fn(&[u8]) -> bool,
) {
    for (i, seed) in seeds.iter().enumerate() {
        assert!(read(seed), "{name}: seed {i} is not valid");
    }
    let limit = Duration::from_secs(setting("ANYBIT_FUZZ_SECONDS", 2));
    let mut mutator = Mutator { rng: SplitMix64::new(setting("ANYBIT_FUZZ_SEED", 1)) };
    let (started, mut inputs, mut accepted) = (Instant::now(), 0u64, 0u64);
    while started.elapsed() < limit {
        let [seed, other] = [(); 2].map(|()| &seeds[mutator.rng.below(seeds.len())]);
        let input = mutate(&mut mutator, seed, other);
        match catch_unwind(AssertUnwindSafe(|| read(&input))) {
            Ok(valid) => accepted += u64::from(valid),
            Err(_) => {
                let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}"));
                fs::write(&kept, &input).unwrap();
                panic!("{name}: a panic on input {inputs}, which is kept in {}", kept.display());
            }
        }
        inputs += 1;
    }
    println!("{name}: {inputs} inputs, {accepted} of them valid");
    assert!(inputs > 0, "{name}: not one input within {limit:?}");
}

/// [`fuzz`] of the file `file`, read as a part of the model `model`.
fn fuzz_file(
    lab: &Lab,
    (file, model): (&str, &str),
    seeds: &[Vec<u8>],
    mutate: impl Fn(&mut Mutator, &[u8], &[u8]) -> Vec<u8>,
) {
    let (path, model) = (lab.path(file), lab.path(model));
    fuzz(&file.replace('/', "-"), seeds, mutate, |input| {
        fs::write(&path, input).unwrap();
        read_model(&model)
    });
}

fn plain(mutator: &mut Mutator, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    mutator.mutate(bytes, other)
}

// What is read.

/// Opens a model and, when that works, reads, verifies, measures and runs all of it.
fn read_model(path: &Path) -> bool {
    let Ok(checkpoint) = Checkpoint::open(path) else { return false };
    for (name, _) in checkpoint.config.tensors() {
        if let Ok(weight) = checkpoint.weight(&name) {
            Matrix::from_rows(&weight);
        }
    }
    let _ = checkpoint.check_finite();
    let _ = checkpoint.weight_file_bytes();
    let _ = bits_per_weight(&checkpoint);
    if let Some(manifest) = checkpoint.manifest() {
        let _ = verify(&checkpoint, None, |_, _| {});
        manifest.bits_per_weight();
        manifest.to_json();
    }
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        use_tokenizer(&tokenizer);
        if let Ok(Some(template)) = checkpoint.chat_template(&tokenizer) {
            let _ = template.render(&conversation(), true);
        }
    }
    let _ = checkpoint.adds_bos();
    if let Ok(decoder) = Decoder::load(&checkpoint, 4) {
        let mut session = Session::new(&decoder, 4);
        let _ = session.step(&[0, 1, 2]);
        session.clear();
        let _ = session.step(&[0]);
    }
    true
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "Hello,  wörld 123!\n\n", "<s>a b</s>🦙\0 ab aab"] {
        for special in [false, true] {
            let Ok(ids) = tokenizer.encode(text, special) else { continue };
            let _ = tokenizer.decode(&ids, special);
            let mut stream = StreamDecoder::new(tokenizer);
            for id in ids {
                let _ = stream.push(id);
            }
            let _ = stream.finish();
        }
    }
    for id in [0, 1, 255, 256, u32::MAX] {
        let _ = tokenizer.decode(&[id, 0, id], false);
        let _ = tokenizer.token(id).and_then(|token| tokenizer.id_of(&token));
        tokenizer.is_skipped(id);
    }
    tokenizer.vocab_size();
}

fn conversation() -> Vec<Message> {
    let system = Message::new("system", "Be brief.");
    vec![system, Message::new("user", " a {{ b }} \"c\" "), Message::new("assistant", "ok\n")]
}

// Valid files.

/// A model of a few kilobytes, `model` of the lab.
fn lab() -> Lab {
    let config = ModelConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: 256,
        bos_token_id: Some(1),
        eos_token_ids: vec![2, 3],
        ..synth::preset("tiny").unwrap()
    };
    let lab = Lab::empty();
    lab.synth("model", &config, 1);
    let template = json!({"chat_template": TEMPLATES[0]}).to_string();
    fs::write(lab.path("model/tokenizer_config.json"), template).unwrap();
    fs::write(lab.path("model/generation_config.json"), "{\"eos_token_id\": [2, 3]}").unwrap();
    lab
}

/// The same with `packed`.
fn lab_with_packed() -> Lab {
    let lab = lab();
    fs::write(lab.path("calib.txt"), prose(50, 1)).unwrap();
    lab.ok(
        "quantize model --bits 3 --asym --group-size 8 --embed-bits 2 --layer *.up_proj=bits:1 \
         --skip *.o_proj --calib calib.txt --calib-tokens 64 --seqlen 16 --report-tokens 0 \
         -o packed",
    );
    lab
}

fn file(lab: &Lab, name: &str) -> Vec<u8> {
    fs::read(lab.path(name)).unwrap()
}

fn special(id: u32, content: &str) -> Value {
    json!({
        "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    })
}

/// A GGUF file with a tensor of every type that is read.
fn every_block_type() -> Vec<u8> {
    let types = [
        Dtype::F32,
        Dtype::F16,
        Dtype::BF16,
        Dtype::Q4_0,
        Dtype::Q4_1,
        Dtype::Q5_0,
        Dtype::Q5_1,
        Dtype::Q8_0,
        Dtype::Q2_K,
        Dtype::Q3_K,
        Dtype::Q4_K,
        Dtype::Q5_K,
        Dtype::Q6_K,
        Dtype::IQ4_NL,
    ];
    let plans = types.map(|dtype| TensorPlan {
        name: format!("blk.0.{dtype:?}.weight"),
        dtype,
        shape: vec![2, 256],
    });
    let fields = [
        ("general.architecture", Field::String("llama".into())),
        ("list", Field::Array(vec![Field::Array(vec![Field::U8(1)]), Field::Array(vec![])])),
        ("small", Field::I16(-2)),
        ("large", Field::F64(0.5)),
    ];
    let fields = fields.map(|(name, value)| (name.to_string(), value));
    let mut rng = SplitMix64::new(6);
    let (mut bytes, path) = (Vec::new(), Path::new("every.gguf"));
    write_gguf(&mut bytes, path, &fields, &plans, |plan, out| {
        let data: Vec<u8> = (0..plan.bytes()).map(|_| rng.next_u64() as u8).collect();
        out.write_all(&data).map_err(|e| IoError::file("write", path, e))
    })
    .unwrap();
    bytes
}

// The readers.

#[test]
fn safetensors() {
    let lab = lab();
    let seeds = [file(&lab, "model/model.safetensors")];
    fuzz_file(&lab, ("model/model.safetensors", "model"), &seeds, mutate_safetensors);
}

#[test]
fn config() {
    let lab = lab();
    let mut seeds = vec![file(&lab, "model/config.json")];
    let scalings = [
        json!({"rope_type": "linear", "factor": 2.0}),
        json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }),
    ];
    for scaling in scalings {
        edit_json(&lab.path("model/config.json"), |c| {
            c["rope_scaling"] = scaling;
            c["architectures"] = json!(["MistralForCausalLM"]);
            c["sliding_window"] = json!(3);
        });
        seeds.push(file(&lab, "model/config.json"));
    }
    fuzz_file(&lab, ("model/config.json", "model"), &seeds, plain);
}

#[test]
fn index() {
    let lab = lab();
    let name = "model.safetensors";
    let weights = common::Tensors::read(&lab.path("model/model.safetensors"));
    let names = weights.header.keys().filter(|k| *k != "__metadata__");
    let map: serde_json::Map<String, Value> =
        names.map(|tensor| (tensor.clone(), json!(name))).collect();
    let index = json!({"metadata": {"total_size": weights.data.len()}, "weight_map": map});
    let seeds = [index.to_string().into_bytes()];
    fuzz_file(&lab, ("model/model.safetensors.index.json", "model"), &seeds, plain);
}

#[test]
fn gguf() {
    let lab = lab();
    let path = lab.path("model.gguf");
    to_gguf(&lab.open("model"), &path, Dtype::F16, false).unwrap();
    let seeds = [file(&lab, "model.gguf"), every_block_type()];
    fuzz("gguf", &seeds, plain, |input| {
        fs::write(&path, input).unwrap();
        let Ok(gguf) = GgufFile::open(&path) else { return false };
        for tensor in gguf.tensors.values() {
            tensor.to_vec();
        }
        read_model(&path);
        true
    });
}

#[test]
fn packed_manifest() {
    let lab = lab_with_packed();
    let seeds = [file(&lab, "packed/anybit.json")];
    fuzz_file(&lab, ("packed/anybit.json", "packed"), &seeds, plain);
}

#[test]
fn packed_weights() {
    let lab = lab_with_packed();
    let seeds = [file(&lab, "packed/model.safetensors")];
    fuzz_file(&lab, ("packed/model.safetensors", "packed"), &seeds, mutate_safetensors);
}

#[test]
fn tokenizer() {
    let lab = lab();
    let path = lab.path("tokenizer.json");
    let seeds = tokenizers(&lab).map(|json| json.to_string().into_bytes());
    fuzz("tokenizer.json", &seeds, plain, |input| {
        fs::write(&path, input).unwrap();
        if let Ok(json) = serde_json::from_slice::<Value>(input)
            && let Ok(vocab) = vocab::to_gguf(&json, 300, None, Some(2), &path)
        {
            vocab.keys();
            if let Ok(tokenizer) = Tokenizer::from_vocab(&vocab, &path) {
                use_tokenizer(&tokenizer);
            }
        }
        let Ok(tokenizer) = Tokenizer::from_file(&path) else { return false };
        use_tokenizer(&tokenizer);
        let _ = tokenizer.save(&lab.path("saved.json"));
        true
    });
}

/// One of every kind of model, and most kinds of stages.
fn tokenizers(lab: &Lab) -> [Value; 5] {
    let mut bytes = common::read_json(&lab.path("model/tokenizer.json"));
    bytes["model"]["vocab"]["ab"] = json!(256);
    bytes["model"]["vocab"]["aab"] = json!(257);
    bytes["model"]["merges"] = json!([["a", "b"], ["a", "ab"]]);
    bytes["added_tokens"] = json!([special(258, "<s>"), special(259, "</s>")]);
    bytes["normalizer"] = json!({"type": "NFC"});
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let token = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
    bytes["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [piece("<s>"), text("A"), piece("</s>")],
        "pair": [text("A"), text("B")],
        "special_tokens": {"<s>": token("<s>", 258), "</s>": token("</s>", 259)},
    });
    let sentence_piece = vocab::GgufVocab {
        model: "llama".into(),
        tokens: ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab"].map(String::from).to_vec(),
        token_types: vec![2, 3, 3, 1, 1, 1, 1, 1],
        scores: vec![0.0, 0.0, 0.0, -5.0, -4.0, -3.0, -2.0, -1.0],
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        add_bos: true,
        add_space_prefix: true,
        ..vocab::GgufVocab::default()
    };
    let path = lab.path("sentence-piece.json");
    Tokenizer::from_vocab(&sentence_piece, &path).unwrap().save(&path).unwrap();
    let base =
        || json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": []});
    let with = |stages: Value| {
        let mut all = base();
        all.as_object_mut().unwrap().extend(stages.as_object().unwrap().clone());
        all
    };
    let unigram = with(json!({
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "StripAccents"},
            {"type": "Strip", "strip_left": true, "strip_right": true},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
            "split": true},
        "post_processor": null,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
            "split": true},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
            "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.5], ["b", -3.0], ["▁a", -1.5]]},
    }));
    let word_piece = with(json!({
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 1], "cls": ["[CLS]", 2]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "[SEP]": 1, "[CLS]": 2, "a": 3, "##b": 4, "hello": 5}},
    }));
    let word_level = with(json!({
        "normalizer": {"type": "Prepend", "prepend": "x"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Whitespace"}, {"type": "Digits", "individual_digits": true},
            {"type": "Punctuation", "behavior": "Isolated"}, {"type": "UnicodeScripts"},
            {"type": "CharDelimiterSplit", "delimiter": "l"},
            {"type": "Split", "pattern": {"String": "o"}, "behavior": "MergedWithNext",
                "invert": false},
            {"type": "FixedLength", "length": 3}]},
        "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 2],
            "trim_offsets": true, "add_prefix_space": true},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": true},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "WordLevel", "unk_token": "<unk>",
            "vocab": {"<unk>": 0, "</s>": 1, "<s>": 2, "he": 3, "a": 4}},
    }));
    [bytes, common::read_json(&path), unigram, word_piece, word_level]
}

#[test]
fn recipe() {
    let lab = lab();
    let model = lab.open("model");
    let path = lab.path("recipe.toml");
    let full = "method = \"gptq\"\nbits = 4\ngroup_size = 16\nsymmetric = true\n\
                scale = \"mse\"\nact_order = true\ndamp = 0.01\nembed_bits = 8\n\
                skip = [\"*.o_proj\", \"model.layers.0.*.q_proj\"]\nseed = 7\n\n\
                [calibration]\ndata = [\"builtin\", \"a.txt\"]\ntokens = 4096\nseqlen = 512\n\n\
                [layers.\"*.down_proj\"]\nbits = 6\ngroup_size = -1\nsymmetric = false\n\n\
                [layers.\"*\"]\nbits = 3\n";
    let seeds = [full.as_bytes().to_vec(), b"bits = 3\n".to_vec()];
    fuzz("recipe.toml", &seeds, plain, |input| {
        fs::write(&path, input).unwrap();
        let mut flags = Recipe::default();
        for line in String::from_utf8_lossy(input).lines() {
            let _ = flags.add_layer(line);
            let _ = flags.add_layer(&line.replace(" = ", ":").replacen(':', "=bits:", 1));
        }
        let Ok(recipe) = Recipe::read(&path) else { return false };
        let text = toml::to_string(&recipe).unwrap();
        assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe, "{text}");
        recipe.settings("model.layers.0.mlp.down_proj");
        if let Ok(plan) = Plan::new(&model, &recipe, None) {
            plan.bits_per_weight();
            plan.weight_bytes();
        }
        true
    });
}

const TEMPLATES: [&str; 3] = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] \
     + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' \
     }}{% endif %}",
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = \
     messages[0]['content']|trim %}{%- set messages = messages[1:] %}{%- endif %}{%- for message in \
     messages %}{%- if not (message.role == 'tool' or 'x' in message) %}{{- message.content.split('a')\
     [-1].strip('\\n') + strftime_now('%d %b %Y') }}{%- elif loop.index0 % 2 == 1 %}{{- \
     message.content | tojson }}{%- endif %}{%- endfor %}",
    "{%- set ns = namespace(last=messages|length - 1, found=false) %}{%- for message in \
     messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- if \
     message.content.startswith('o') %}{%- set ns.found = true %}{%- set ns.last = index %}{%- endif \
     %}{%- endfor %}{% generation %}{{ ns.last ~ eos_token }}{% endgeneration %}{% if ns.last > 7 \
     %}{{ raise_exception('too many') }}{% endif %}",
];

#[test]
fn chat_template() {
    let seeds = TEMPLATES.map(|t| t.as_bytes().to_vec());
    fuzz("chat_template", &seeds, plain, |input| {
        let source = String::from_utf8_lossy(input);
        let Ok(template) = ChatTemplate::new(&source, Some("<s>"), None) else { return false };
        let whole = template.render(&conversation(), true).is_ok();
        let _ = template.render(&conversation()[1..], false);
        let _ = template.render(&[], true);
        whole
    });
}
