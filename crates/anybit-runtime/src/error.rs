//! What can go wrong while running a model.

/// Result with [`RuntimeError`].
pub type Result<T> = std::result::Result<T, RuntimeError>;

/// Errors of loading and running a decoder.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// More tokens than the session was made for.
    #[error("{needed} tokens do not fit a context of {capacity}; shorten the text or raise --ctx")]
    ContextFull {
        /// Tokens that were to be held.
        needed: usize,
        /// Tokens that the session can hold.
        capacity: usize,
    },
    /// A token id outside the vocabulary.
    #[error(
        "token {token} is outside the model's vocabulary of {vocab}: tokenizer and model do not \
         belong together"
    )]
    Token {
        /// The token.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// Nothing to start from.
    #[error("the prompt is empty and the model has no start token; give it some text")]
    EmptyPrompt,
    /// Logits became NaN.
    #[error("the model's output is not a number at position {position}; its weights are damaged")]
    NotFinite {
        /// Position in the sequence.
        position: usize,
    },
    /// A sampling option out of its range.
    #[error("{option} is {value}: {range}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
}
