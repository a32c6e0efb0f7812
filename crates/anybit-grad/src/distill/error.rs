//! What can go wrong in distillation. Each message says what, where and how to fix it.

use std::path::PathBuf;

use anybit_io::IoError;

use crate::GradError;
use crate::train::distributed::CommunicationError;

/// Result with [`DistillError`].
pub type Result<T> = std::result::Result<T, DistillError>;

/// Errors of balancers, losses, ensembles and teacher caches.
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// A file cannot be read or written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A teacher refused.
    #[error(transparent)]
    Grad(#[from] GradError),
    /// Ranks lost each other.
    #[error(transparent)]
    Communication(#[from] CommunicationError),
    /// A setting out of its range.
    #[error("{place}: {key} = {value}; {fix}")]
    Setting {
        /// The balancer, loss or ensemble, by its name in recipes.
        place: &'static str,
        /// The key.
        key: &'static str,
        /// What was given.
        value: f64,
        /// What to write instead.
        fix: &'static str,
    },
    /// The stored state of a balancer does not fit it.
    #[error("state of the balancer {balancer}: {what}; resume with the balancer that saved it")]
    State {
        /// The balancer that was to continue.
        balancer: &'static str,
        /// The name and what is wrong with it.
        what: String,
    },
    /// Two vocabularies differ in size.
    #[error(
        "{what} has a vocabulary of {found} tokens, {other} has {expected}; use teachers with the \
         tokenizer of the student"
    )]
    Vocabulary {
        /// Whose vocabulary it is.
        what: String,
        /// Its size.
        found: usize,
        /// What it was compared with.
        other: &'static str,
        /// The size of that.
        expected: usize,
    },
    /// Two numbers of rows differ.
    #[error("{what} has {found} rows, {other} has {expected}; give both the same tokens")]
    Rows {
        /// Whose rows they are.
        what: String,
        /// How many there are.
        found: usize,
        /// What they were compared with.
        other: &'static str,
        /// How many there should be.
        expected: usize,
    },
    /// Inputs that do not fit together in another way.
    #[error("{place}: {what}")]
    Input {
        /// The loss, ensemble or teacher.
        place: &'static str,
        /// What is wrong and what is needed.
        what: String,
    },
    /// A cache of teacher outputs that is not what was written.
    #[error(
        "{path}: {what}; the teacher cache is truncated or was changed: delete this file to have \
         it made again"
    )]
    Cache {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the chunk if it is about one.
        what: String,
    },
    /// A cache of other outputs than those that are needed.
    #[error(
        "{path}: {what}; the teacher cache is of another teacher, text or setting: delete this \
         file to have it made again, or give another distill.cache.dir"
    )]
    CacheForeign {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// A cache that would grow beyond its limit.
    #[error(
        "{path}: a teacher cache of {needed} bytes is over the limit of {limit}; lower \
         distill.cache.top_k, take stored_as = \"f16\", train on fewer sequences, or raise \
         distill.cache.max_bytes"
    )]
    CacheSize {
        /// The file.
        path: PathBuf,
        /// Bytes that it would take.
        needed: u64,
        /// Most bytes allowed.
        limit: u64,
    },
}

impl DistillError {
    /// [`Self::Input`].
    pub(crate) fn input(place: &'static str, what: impl Into<String>) -> Self {
        Self::Input { place, what: what.into() }
    }
}

/// Fails unless `value` is finite and `ok`.
pub(crate) fn check_setting(
    place: &'static str,
    key: &'static str,
    value: f64,
    ok: bool,
    fix: &'static str,
) -> Result<()> {
    match ok && value.is_finite() {
        true => Ok(()),
        false => Err(DistillError::Setting { place, key, value, fix }),
    }
}
