//! What can go wrong while differentiating a model. Each message says what, where and how to fix
//! it. Operations of the tape panic on shapes that do not fit: that is a bug in the caller.

/// Result with [`GradError`].
pub type Result<T> = std::result::Result<T, GradError>;

/// Errors of loading and differentiating a decoder.
#[derive(Debug, thiserror::Error)]
pub enum GradError {
    /// The checkpoint or the spill file cannot be read or written.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
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
    /// Tokens that are no whole sequences, or sequences beyond the decoder's positions.
    #[error(
        "{tokens} tokens in sequences of {seqlen}: give whole sequences of at most {positions} \
         tokens, the length that the decoder was loaded for"
    )]
    Sequences {
        /// Tokens given.
        tokens: usize,
        /// Tokens of a sequence.
        seqlen: usize,
        /// Positions that the decoder was loaded for.
        positions: usize,
    },
    /// Nothing to take sensitivities on.
    #[error("there are no calibration sequences; give a longer text or shorter sequences")]
    NoSequences,
    /// A sequence too short to have a next token.
    #[error("calibration sequence {sequence} has {tokens} tokens; at least 2 are needed")]
    ShortSequence {
        /// Index of the sequence.
        sequence: usize,
        /// Its tokens.
        tokens: usize,
    },
    /// The loss became NaN or infinite.
    #[error("the loss of calibration sequence {sequence} is {value}; the weights are damaged")]
    Loss {
        /// Index of the sequence.
        sequence: usize,
        /// The loss.
        value: f32,
    },
    /// A sensitivity that is not a finite number from zero up.
    #[error(
        "layer {layer}, {linear}: the {quantity} holds {value} at row {row}, column {col}; \
         the weights are damaged or a calibration sequence overflows"
    )]
    Sensitivity {
        /// Index of the layer.
        layer: usize,
        /// The linear, by its name in the block.
        linear: &'static str,
        /// Which of its statistics.
        quantity: &'static str,
        /// Row of the first such value.
        row: usize,
        /// Column of the first such value.
        col: usize,
        /// The value.
        value: f32,
    },
    /// More row groups than rows, or none.
    #[error("{groups} row groups for {linear} with {rows} rows; use 1 to {rows}")]
    RowGroups {
        /// Groups asked for.
        groups: usize,
        /// The linear, by its name in the block.
        linear: &'static str,
        /// Its rows.
        rows: usize,
    },
}
