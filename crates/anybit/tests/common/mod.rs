//! What the integration tests share: a folder to work in with the command run inside it, tiny
//! models, and editing of their files.

// Every test binary has its own copy and uses a part of it.
#![allow(dead_code)]

pub mod training;

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anybit::core::rng::SplitMix64;
use anybit::io::{Checkpoint, ModelConfig, synth};
use anybit::runtime::{Buffers, Decoder, Session};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// Flags of a quantization of `tiny` that takes milliseconds, without bits and output.
pub const QUICK: &str =
    "--group-size 16 --calib calib.txt --calib-tokens 128 --seqlen 32 --report-tokens 0";

/// A temporary folder. Commands run inside it, so that their arguments are plain relative names.
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    /// An empty one.
    pub fn empty() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// One with the preset model `tiny` and a text `calib.txt`.
    pub fn with_tiny() -> Self {
        let lab = Self::empty();
        lab.synth("tiny", &synth::preset("tiny").unwrap(), 0);
        fs::write(lab.path("calib.txt"), prose(600, 1)).unwrap();
        lab
    }

    /// A name in the folder as a path from anywhere.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a model of random weights.
    pub fn synth(&self, name: &str, config: &ModelConfig, seed: u64) {
        synth::write(config, seed, &self.path(name), false, &mut |_, _| {}).unwrap();
    }

    /// The command with the words of `line` as its arguments.
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_anybit"));
        command.args(line.split_whitespace());
        self.inside(command)
    }

    /// The same through a shell that first sets a limit, such as `-f 16`. Writes beyond a file
    /// size limit fail, as those to a full disk do; `-f` counts half kilobytes.
    #[cfg(unix)]
    pub fn limited(&self, limit: &str, line: &str) -> Command {
        let mut command = Command::new("sh");
        let script = format!("trap '' XFSZ; ulimit {limit} && exec \"$0\" \"$@\"");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_anybit")]);
        command.args(line.split_whitespace());
        self.inside(command)
    }

    fn inside(&self, mut command: Command) -> Command {
        command.current_dir(self.dir.path()).env_remove("ANYBIT_DATA").env("LC_ALL", "C");
        command
    }

    /// Runs the command, whatever comes of it.
    pub fn run(&self, line: &str) -> Run {
        Run::of(line, self.command(line))
    }

    /// Runs the command, which has to succeed; its standard output.
    pub fn ok(&self, line: &str) -> String {
        let run = self.run(line);
        assert_eq!(run.code, Some(0), "{run:?}");
        run.stdout
    }

    /// Runs the command, which has to fail with this exit code and these words on standard error,
    /// and leave nothing at `out`.
    pub fn refuses(&self, line: &str, code: i32, words: &[&str]) {
        self.run(line).refused(code, words);
        self.has_no_output(line);
    }

    /// Nothing stands at `out` or beside it.
    pub fn has_no_output(&self, line: &str) {
        let names = entries(self.dir.path());
        let left: Vec<&String> = names.iter().filter(|n| n.starts_with("out")).collect();
        assert!(left.is_empty(), "{line}: left {left:?}");
    }

    /// Opens a model of the folder.
    pub fn open(&self, name: &str) -> Checkpoint {
        Checkpoint::open(&self.path(name)).unwrap()
    }

    /// Copies a folder.
    pub fn copy(&self, from: &str, to: &str) {
        copy_folder(&self.path(from), &self.path(to));
    }
}

/// What a command came to.
#[derive(Debug)]
pub struct Run {
    /// The arguments.
    pub line: String,
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it said.
    pub stderr: String,
}

impl Run {
    /// Runs `command` to its end.
    pub fn of(line: &str, mut command: Command) -> Self {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (stdout, stderr) = (text(stdout), text(stderr));
        Self { line: line.to_string(), code: status.code(), stdout, stderr }
    }

    /// It failed with this exit code and says each of these words.
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "nothing of {word:?} in {self:?}");
        }
    }

    /// Standard output as JSON.
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:?}");
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Names in a folder, sorted.
pub fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name());
    let mut names: Vec<String> = names.map(|n| n.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Copies a folder to a new one.
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for name in entries(from) {
        match from.join(&name).is_dir() {
            true => copy_folder(&from.join(&name), &to.join(&name)),
            false => drop(fs::copy(from.join(&name), to.join(&name)).unwrap()),
        }
    }
}

/// The bytes of all files of a folder and of those in it, by path.
pub fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for name in entries(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            files.extend(contents(&path).into_iter().map(|(n, b)| (format!("{name}/{n}"), b)));
        } else {
            files.insert(name, fs::read(path).unwrap());
        }
    }
    files
}

/// Two folders hold the same files with the same bytes.
pub fn assert_same(a: &Path, b: &Path) {
    let (left, right) = (contents(a), contents(b));
    let names = |c: &BTreeMap<String, Vec<u8>>| c.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&left), names(&right), "files of {} and {}", a.display(), b.display());
    for (name, bytes) in &left {
        let other = &right[name];
        if bytes == other {
            continue;
        }
        let at = bytes.iter().zip(other).take_while(|(x, y)| x == y).count();
        let around = |b: &[u8]| {
            let part = &b[at.saturating_sub(40).min(b.len())..(at + 40).min(b.len())];
            String::from_utf8_lossy(part).into_owned()
        };
        let (x, y) = (around(bytes), around(other));
        panic!("{name} differs from byte {at} on:\n  {x:?}\n  {y:?}");
    }
}

/// English-looking text of so many words.
pub fn prose(words: usize, seed: u64) -> String {
    const WORDS: [&str; 16] = [
        "the", "a", "rain", "river", "of", "stone", "and", "light", "falls", "on", "quiet", "old",
        "houses", "we", "saw", "it",
    ];
    let mut rng = SplitMix64::new(seed);
    let mut text = String::new();
    for i in 0..words {
        text.push_str(WORDS[rng.below(WORDS.len())]);
        text.push_str(if i % 12 == 11 { ".\n" } else { " " });
    }
    text
}

/// Changes a JSON file in place.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(path);
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// A JSON file.
pub fn read_json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// Header and data of a safetensors file.
pub struct Tensors {
    path: PathBuf,
    /// Tensors by name, and `__metadata__`.
    pub header: Map<String, Value>,
    /// What stands behind the header.
    pub data: Vec<u8>,
}

impl Tensors {
    /// Reads a file.
    pub fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let (header, data) = split_safetensors(&bytes).unwrap();
        let header = serde_json::from_slice(header).unwrap();
        Self { path: path.to_owned(), header, data: data.to_vec() }
    }

    /// Where a tensor lies in the data.
    pub fn range(&self, name: &str) -> Range<usize> {
        let offsets = &self.header[name]["data_offsets"];
        let at = |i: usize| offsets[i].as_u64().unwrap() as usize;
        at(0)..at(1)
    }

    /// The bytes of a tensor.
    pub fn bytes_mut(&mut self, name: &str) -> &mut [u8] {
        let range = self.range(name);
        &mut self.data[range]
    }

    /// Writes it back.
    pub fn write(&self) {
        let header = Value::Object(self.header.clone()).to_string();
        fs::write(&self.path, join_safetensors(header.as_bytes(), &self.data)).unwrap();
    }
}

/// Header and data, where the length in front leads to any.
pub fn split_safetensors(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)
}

/// The file of a header and data.
pub fn join_safetensors(header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut header = header.to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, data].concat()
}

/// Logits of every position: all tokens at once, then again one by one through the cache.
pub fn logits(decoder: &Decoder, tokens: &[u32]) -> Vec<f32> {
    let vocab = decoder.config.vocab_size;
    let mut session = Session::new(decoder, tokens.len());
    let hidden = session.hidden(tokens).unwrap().to_vec();
    let mut all = vec![0.0; tokens.len() * vocab];
    decoder.logits(&hidden, &mut Buffers::default(), &mut all);
    session.clear();
    for token in tokens {
        all.extend_from_slice(session.step(&[*token]).unwrap());
    }
    all
}

/// [`logits`] of a model on disk.
pub fn logits_of(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<f32> {
    logits(&Decoder::load(checkpoint, tokens.len()).unwrap(), tokens)
}

/// Tokens that any vocabulary of at least `vocab` has.
pub fn some_tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut rng = SplitMix64::new(7);
    (0..count).map(|_| rng.below(vocab) as u32).collect()
}
