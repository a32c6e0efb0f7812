//! What can go wrong with files. Each message says what, where and how to fix it.

use std::path::{Path, PathBuf};

/// Result with [`IoError`].
pub type Result<T> = std::result::Result<T, IoError>;

/// Errors of reading and writing checkpoints, tokenizers and templates.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// The operating system refused.
    #[error("cannot {action} {path}: {source}{hint}")]
    File {
        /// What was tried, as a verb ("read", "create").
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
        /// What to do about it, empty or starting with "; ".
        hint: &'static str,
    },
    /// The file's structure is broken: truncated, overlapping, absurd lengths.
    #[error("{path} is damaged: {what}; download or copy it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong and where.
        what: String,
    },
    /// A well-formed file that says something we cannot use.
    #[error("{path}: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it asks for, and what is supported.
        what: String,
    },
    /// The folder or file is no checkpoint.
    #[error(
        "{path} is no checkpoint: {what}; expected a folder with config.json and *.safetensors, \
         or a .gguf file"
    )]
    NoCheckpoint {
        /// What was given.
        path: PathBuf,
        /// What is missing.
        what: String,
    },
    /// A tensor that the configuration calls for is absent.
    #[error("{path} has no tensor {name}{near}")]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name.
        name: String,
        /// The nearest name that is there, as a phrase.
        near: String,
    },
    /// A tensor has another shape than the configuration calls for.
    #[error("{path}: tensor {name} has shape {found:?}, but config.json implies {expected:?}")]
    Shape {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape that the configuration implies.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// NaN or infinity in a weight.
    #[error("{path}: tensor {name} holds {value} at element {index}; the checkpoint is unusable")]
    NotFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Index of the first such element.
        index: usize,
        /// The value.
        value: f32,
    },
    /// The output is there already.
    #[error("{path} exists already; choose another output or pass --force")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// Another process is at work on the output.
    #[error("{path}: another process is writing this output; wait for it or stop it")]
    Busy {
        /// The folder under construction.
        path: PathBuf,
    },
    /// The disk cannot hold the output.
    #[error("{path}: {needed} bytes needed, {free} free; free some space or write elsewhere")]
    NoSpace {
        /// The output.
        path: PathBuf,
        /// Bytes that will be written.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A stored hash differs.
    #[error(
        "{path}: tensor {name} does not match its recorded hash; the file was changed or damaged"
    )]
    Hash {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// The tokenizer refused.
    #[error("tokenizer of {path}: {what}")]
    Tokenizer {
        /// The checkpoint.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// The chat template failed.
    #[error("chat template: {what}")]
    Template {
        /// The reason, with the template's line.
        what: String,
    },
    /// A matrix did not fit its declared layout.
    #[error("{name}: {source}")]
    Matrix {
        /// The tensor.
        name: String,
        /// The reason.
        #[source]
        source: anybit_core::CoreError,
    },
}

impl IoError {
    /// Wraps an operating-system error, adding a hint for the common ones.
    pub fn file(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        let hint = match source.kind() {
            std::io::ErrorKind::NotFound => "; check the path",
            std::io::ErrorKind::PermissionDenied => "; check the permissions",
            std::io::ErrorKind::StorageFull => "; free some space or write elsewhere",
            _ => "",
        };
        Self::File { action, path: path.to_owned(), source, hint }
    }

    /// A broken file.
    pub fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }

    /// A file that asks for something unsupported.
    pub fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into() }
    }
}

/// The candidate nearest to `name`, as a phrase for a message; empty when none is near.
pub fn nearest_name<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> String {
    candidates
        .map(|c| (strsim::jaro_winkler(name, c), c))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, c)| format!("; did you mean {c}?"))
}
