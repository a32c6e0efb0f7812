//! Pre-tokenizers of byte-level BPE by their GGUF name, `tokenizer.ggml.pre`.
//!
//! GGUF stores the name alone; its meaning is code, in llama.cpp's `llama-vocab.cpp`. Each is a
//! list of steps, and every step cuts the pieces that the one before left. Where the family's own
//! `tokenizer.json` is known, the regex is spelled as there, so that a model taken to GGUF and
//! back keeps its file; llama.cpp spells the same sets without `(?i:…)`.

use serde_json::{Value, json};

/// One cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step<'a> {
    /// Matches of a regex, and what lies between them.
    Split(&'a str),
    /// Every digit alone.
    Digits,
    /// GPT-2's regex, then bytes as characters; always last.
    Gpt2,
    /// Bytes as characters, no cut; always last.
    Bytes,
}

/// What a name stands for.
#[derive(Debug)]
pub(super) struct Pre {
    /// Its names; the first is the one that we write.
    pub names: &'static [&'static str],
    steps: &'static [Step<'static>],
    /// A piece that is a token is taken whole, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// Text is brought to Unicode's composed form first. llama.cpp leaves that out, so ids differ
    /// from its ids for decomposed text; the model was trained with it.
    pub nfc: bool,
    /// Texts start with BOS unless the file says otherwise.
    pub add_bos: bool,
}

const PLAIN: Pre = Pre { names: &[], steps: &[], ignore_merges: false, nfc: false, add_bos: false };

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";

const TABLE: &[Pre] = &[
    Pre {
        names: &["gpt-2", "mpt", "olmo", "phi-2", "jais", "trillion", "exaone4", "gigachat"],
        steps: &[Step::Gpt2],
        ..PLAIN
    },
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        steps: &[Step::Digits, Step::Gpt2],
        ..PLAIN
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"],
        steps: &[Step::Split(LLAMA3), Step::Bytes],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Pre {
        names: &["dbrx", "smaug-bpe", "chatglm-bpe"],
        steps: &[Step::Split(LLAMA3), Step::Bytes],
        ..PLAIN
    },
    Pre { names: &["qwen2"], steps: &[Step::Split(QWEN2), Step::Bytes], nfc: true, ..PLAIN },
    Pre {
        names: &["deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"],
        steps: &[Step::Split(QWEN2), Step::Bytes],
        ..PLAIN
    },
    Pre {
        names: &["tekken"],
        steps: &[Step::Split(TEKKEN), Step::Bytes],
        ignore_merges: true,
        add_bos: true,
        ..PLAIN
    },
    Pre { names: &["seed-coder"], steps: &[Step::Split(SEED_CODER), Step::Bytes], ..PLAIN },
    Pre {
        names: &["deepseek-llm"],
        steps: &[
            Step::Split("[\r\n]"),
            Step::Split(DEEPSEEK_LETTERS),
            Step::Split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            Step::Split(r"\s+$"),
            Step::Split(r"[一-龥ࠀ-一가-퟿]+"),
            Step::Split(r"\p{N}+"),
            Step::Bytes,
        ],
        ..PLAIN
    },
    Pre {
        names: &["deepseek-coder"],
        steps: &[
            Step::Split("[\r\n]"),
            Step::Split(r"\s?\p{L}+"),
            Step::Split(r"\s?\p{P}+"),
            Step::Split(r"[一-龥ࠀ-一가-퟿]+"),
            Step::Split(r"\p{N}"),
            Step::Bytes,
        ],
        ..PLAIN
    },
    Pre {
        names: &["falcon"],
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|`]+"),
            Step::Split(GPT2),
            Step::Split("[0-9][0-9][0-9]"),
            Step::Bytes,
        ],
        ..PLAIN
    },
    // What llama.cpp does for files older than the key.
    Pre {
        names: &["default", ""],
        steps: &[
            Step::Split(r"[\p{P}\$\+<=>\^~\|]+"),
            Step::Split(GPT2),
            Step::Split(r"\p{N}+"),
            Step::Split("[0-9][0-9][0-9]"),
            Step::Bytes,
        ],
        ..PLAIN
    },
];

/// The pre-tokenizer called `name` in GGUF files.
pub(super) fn by_name(name: &str) -> Option<&'static Pre> {
    TABLE.iter().find(|pre| pre.names.contains(&name))
}

/// The pre-tokenizer that does what the stages of a `tokenizer.json` say.
pub(super) fn recognise(stage: &Value, ignore_merges: bool, nfc: bool) -> Option<&'static Pre> {
    let steps = steps_of(stage)?;
    TABLE
        .iter()
        .find(|pre| pre.steps == steps && pre.ignore_merges == ignore_merges && pre.nfc == nfc)
}

/// All names, for messages.
pub(super) fn supported() -> String {
    let names = TABLE.iter().flat_map(|pre| pre.names).filter(|name| !name.is_empty());
    names.copied().collect::<Vec<_>>().join(", ")
}

impl Pre {
    /// `pre_tokenizer` of `tokenizer.json`.
    pub fn json(&self) -> Value {
        let mut steps: Vec<Value> = self.steps.iter().map(step_json).collect();
        match steps.len() {
            1 => steps.remove(0),
            _ => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }
}

fn step_json(step: &Step) -> Value {
    let byte_level = |use_regex: bool| {
        json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": use_regex,
        })
    };
    match step {
        Step::Split(regex) => json!({
            "type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false,
        }),
        Step::Digits => json!({"type": "Digits", "individual_digits": true}),
        Step::Gpt2 => byte_level(true),
        Step::Bytes => byte_level(false),
    }
}

/// The steps of `pre_tokenizer`; `None` for a stage that no step stands for.
fn steps_of(stage: &Value) -> Option<Vec<Step<'_>>> {
    let step = match stage["type"].as_str()? {
        "Sequence" => {
            let parts = stage["pretokenizers"].as_array()?.iter().map(steps_of);
            return Some(parts.collect::<Option<Vec<_>>>()?.concat());
        }
        "Split" if stage["behavior"] == "Isolated" && stage["invert"] != true => {
            Step::Split(stage["pattern"]["Regex"].as_str()?)
        }
        "Digits" if stage["individual_digits"] == true => Step::Digits,
        // Files older than the key mean the regex.
        "ByteLevel" if stage["add_prefix_space"] == false => match stage["use_regex"] != false {
            true => Step::Gpt2,
            false => Step::Bytes,
        },
        _ => return None,
    };
    Some(vec![step])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_recognised_from_its_own_json() {
        for pre in TABLE {
            let stage = pre.json();
            let found = recognise(&stage, pre.ignore_merges, pre.nfc).unwrap();
            assert_eq!(found.names, pre.names);
            for name in pre.names {
                assert_eq!(by_name(name).unwrap().names, pre.names);
            }
        }
        assert!(by_name("Qwen2").is_none());
        assert!(recognise(&by_name("qwen2").unwrap().json(), true, true).is_none());
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = TABLE.iter().flat_map(|pre| pre.names).collect();
        let all = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all);
        assert!(supported().starts_with("gpt-2, mpt"));
    }

    #[test]
    fn other_stages_are_not_mistaken() {
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false});
        assert_eq!(recognise(&byte_level, false, false).unwrap().names[0], "gpt-2");
        for other in [
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            json!({"type": "Metaspace", "replacement": "▁"}),
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, byte_level]}),
            Value::Null,
        ] {
            assert!(recognise(&other, false, false).is_none(), "{other}");
        }
    }

    #[test]
    fn the_cuts_compile_and_are_right() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let cut = |name: &str, text: &str| -> Vec<String> {
            let json = by_name(name).unwrap().json().to_string();
            let stage: tokenizers::PreTokenizerWrapper = serde_json::from_str(&json).unwrap();
            let mut pieces = PreTokenizedString::from(text);
            stage.pre_tokenize(&mut pieces).unwrap();
            let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits.iter().map(|(_, (start, end), _)| text[*start..*end].to_owned()).collect()
        };
        for pre in TABLE {
            assert_eq!(cut(pre.names[0], "a b").concat(), "a b", "{}", pre.names[0]);
        }
        let text = "I'LL pay 1234 now  \n";
        assert_eq!(cut("gpt-2", text), ["I", "'", "LL", " pay", " 1234", " now", "  \n"]);
        assert_eq!(
            cut("smollm", text),
            ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", " now", "  \n"]
        );
        let llama3 = ["I", "'LL", " pay", " ", "123", "4", " now", "  \n"];
        assert_eq!(cut("llama-bpe", text), llama3);
        let qwen2 = ["I", "'LL", " pay", " ", "1", "2", "3", "4", " now", "  \n"];
        assert_eq!(cut("qwen2", text), qwen2);
        assert_eq!(cut("tekken", "CamelCase"), ["Camel", "Case"]);
    }
}
