//! What is wrong with an estimator's settings. Each message says what, where and how to fix it.

/// Errors of an estimator's settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EstimatorError {
    /// A number of bits without a grid.
    #[error("{estimator} has no grid of {bits} bits; use {min} to {max}")]
    Bits {
        /// The estimator.
        estimator: &'static str,
        /// The bits given.
        bits: u8,
        /// Fewest possible.
        min: u8,
        /// Most possible.
        max: u8,
    },
    /// A rotation that no power of two gives.
    #[error("a Hadamard block of {block} columns; use a power of two, or 0 for no rotation")]
    Block {
        /// Columns of a block.
        block: usize,
    },
    /// Rows that the estimator cannot take.
    #[error("rows of K = {cols} columns are not whole {what} of {unit}; {fix}")]
    Cols {
        /// Columns of a row.
        cols: usize,
        /// What they do not divide into.
        what: &'static str,
        /// Columns of one of them.
        unit: usize,
        /// What to do.
        fix: &'static str,
    },
    /// Kept codes in a place where there are none.
    #[error(
        "kept has no grid of its own, only that of a packed checkpoint: write it as \
         quantizer.weights of a language model whose model.init is one"
    )]
    Kept,
    /// A mask that would let nothing, or nothing sensible, pass.
    #[error("a clip_scale of {value}; use a positive number")]
    ClipScale {
        /// The one given.
        value: f64,
    },
}
