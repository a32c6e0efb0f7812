//! What can go wrong while measuring.

use std::path::PathBuf;

/// Result with [`EvalError`].
pub type Result<T> = std::result::Result<T, EvalError>;

/// Errors of evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// A model cannot be run.
    #[error(transparent)]
    Runtime(#[from] anybit_runtime::RuntimeError),
    /// The text cannot be read.
    #[error("cannot read text {path}: {what}")]
    Text {
        /// The file.
        path: PathBuf,
        /// The reason.
        what: String,
    },
    /// Too few tokens for one window.
    #[error(
        "the text gives {tokens} tokens, one window needs {ctx}: use a longer text, a smaller \
         --ctx or a larger --limit-tokens"
    )]
    TooShort {
        /// Tokens there are.
        tokens: usize,
        /// Tokens of a window.
        ctx: usize,
    },
    /// Windows of an impossible length.
    #[error("--ctx {ctx} is too short for the {convention} convention; use at least {min}")]
    Context {
        /// Requested length.
        ctx: usize,
        /// Name of the convention.
        convention: &'static str,
        /// Shortest possible.
        min: usize,
    },
    /// Model and reference read the text differently.
    #[error(
        "{model} and {reference} do not have the same tokenizer or vocabulary: their outputs \
         cannot be compared"
    )]
    Vocabulary {
        /// The model.
        model: String,
        /// The reference.
        reference: String,
    },
    /// A file of training runs cannot be used.
    #[error("cannot use the runs of {path}: {what}")]
    Runs {
        /// The file.
        path: PathBuf,
        /// Where, and the reason.
        what: String,
    },
    /// A scaling law cannot be fitted.
    #[error("cannot fit the scaling law: {what}")]
    Scaling {
        /// The reason.
        what: String,
    },
    /// A report cannot be drawn or laid out.
    #[error("cannot render the report: {what}")]
    Report {
        /// The reason.
        what: String,
    },
}
