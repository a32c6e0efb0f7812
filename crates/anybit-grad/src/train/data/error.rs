//! What can be wrong with training texts. Each message says what, where and how to fix it.

use std::path::PathBuf;

use anybit_io::IoError;

/// Errors of reading and tokenizing texts.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A file that is no text.
    #[error("{path}: byte {offset} is no UTF-8; convert the file, or leave it out")]
    Utf8 {
        /// The file.
        path: PathBuf,
        /// Where it stops being text.
        offset: u64,
    },
    /// A line that is no object, or an object without the text.
    #[error("{path}, line {line}: {what}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A parquet file that cannot be used.
    #[error("{path}: {what}")]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do.
        what: String,
    },
    /// A token file that was changed.
    #[error("{path} does not match its recorded hash; delete it, and it is made again")]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Too few tokens.
    #[error(
        "the texts give {tokens} tokens, a sequence needs {needed} (data.context and one more): \
         give more text, or a smaller context"
    )]
    TooShort {
        /// Tokens there are.
        tokens: usize,
        /// Tokens of a sequence.
        needed: usize,
    },
    /// A batch that ranks cannot share.
    #[error(
        "a batch of {batch} sequences cannot be shared evenly by {ranks} ranks: make train.batch a \
         multiple of {ranks}"
    )]
    Batch {
        /// Sequences of a step.
        batch: usize,
        /// Ranks.
        ranks: usize,
    },
}

impl DataError {
    /// [`Self::TooShort`] for sequences of `context` tokens and the one after.
    pub fn too_short(tokens: usize, context: usize) -> Self {
        Self::TooShort { tokens, needed: context + 1 }
    }
}
