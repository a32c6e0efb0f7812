//! Token ids against llama.cpp's own: its repository ships vocabularies as GGUF files without
//! weights, each with texts (`.inp`) and the ids that the model's original tokenizer gives them
//! (`.out`).

use std::path::{Path, PathBuf};
use std::{env, fs};

use anybit_io::tokenizer::{StreamDecoder, Tokenizer};

/// What stands between two texts.
const SEPARATOR: &str = "\n__ggml_vocab_test__\n";

#[test]
#[ignore = "needs the vocabularies that scripts/get-vocabularies fetches, their folder in ANYBIT_VOCABS"]
fn ids_are_those_of_llama_cpp() {
    let folder = env::var_os("ANYBIT_VOCABS")
        .expect("ANYBIT_VOCABS should name the folder that scripts/get-vocabularies prints");
    let files = vocabularies(Path::new(&folder));
    assert!(!files.is_empty(), "no *.gguf with *.gguf.inp in {folder:?}");
    for file in files {
        check(&file);
    }
}

/// The vocabularies of a folder that come with texts.
fn vocabularies(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("ANYBIT_VOCABS should be a folder");
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "gguf"))
        .filter(|path| beside(path, ".inp").exists())
        .collect();
    files.sort();
    files
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

/// Every text of one vocabulary, there and back.
fn check(path: &Path) {
    let name = path.file_name().unwrap().to_string_lossy();
    let tokenizer = Tokenizer::from_gguf_file(path).unwrap();
    let texts = fs::read_to_string(beside(path, ".inp")).unwrap();
    let expected = fs::read_to_string(beside(path, ".out")).unwrap();
    // The last text has one behind it, too.
    let texts = texts.strip_suffix(SEPARATOR).unwrap_or(&texts);
    let texts: Vec<&str> = texts.split(SEPARATOR).collect();
    let expected: Vec<&str> = expected.lines().collect();
    assert_eq!(texts.len(), expected.len(), "{name}: texts and lines of ids");
    for (text, line) in texts.into_iter().zip(expected) {
        let want: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(ids, want, "{name}: {text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{name}");
        let mut stream = StreamDecoder::new(&tokenizer);
        let mut streamed: String = ids.iter().filter_map(|id| stream.push(*id).unwrap()).collect();
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, text, "{name}, streamed");
    }
}
