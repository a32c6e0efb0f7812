//! What can go wrong with one matrix. Each message says what, where and how to fix it.

/// Result with [`CoreError`].
pub type Result<T> = std::result::Result<T, CoreError>;

/// Errors of grids, rounding, packing and factorization.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CoreError {
    /// A bit-width that no grid has.
    #[error("{bits} bits: the {grid} grid takes {min} to {max} bits")]
    Bits {
        /// Requested width.
        bits: u8,
        /// Name of the grid.
        grid: &'static str,
        /// Smallest width.
        min: u8,
        /// Largest width.
        max: u8,
    },
    /// A group size that the packed format cannot hold.
    #[error(
        "group size {group_size} for rows of {cols} columns: use a multiple of 8 that is at most \
         the row length, or -1 for one group per row"
    )]
    GroupSize {
        /// Requested group size.
        group_size: usize,
        /// Length of a row.
        cols: usize,
    },
    /// NaN or infinity where a finite number is needed.
    #[error("{what} holds a value that is not finite ({value}) at row {row}, column {col}")]
    NotFinite {
        /// The matrix.
        what: &'static str,
        /// Row of the first such value.
        row: usize,
        /// Column of the first such value.
        col: usize,
        /// The value, as printed.
        value: String,
    },
    /// A magnitude above what an f16 scale can express.
    #[error(
        "row {row}, group {group}: magnitude {magnitude} needs a scale above the f16 maximum; \
         rescale the model or leave this tensor unquantized with --skip"
    )]
    ScaleOverflow {
        /// Row.
        row: usize,
        /// Group within the row.
        group: usize,
        /// Largest magnitude in the group.
        magnitude: f32,
    },
    /// Two shapes that should agree do not.
    #[error("{what}: expected {expected}, found {found}")]
    Shape {
        /// What was compared.
        what: &'static str,
        /// Expected shape or length.
        expected: String,
        /// Shape or length found.
        found: String,
    },
    /// A size for which no Hadamard matrix is known here.
    #[error(
        "no Hadamard matrix of {n} channels is known: use a block Hadamard, or a Kronecker \
         transform"
    )]
    NoHadamard {
        /// Channels.
        n: usize,
    },
    /// A factor without an inverse.
    #[error(
        "{what} (number or size {index}) has no usable inverse ({found}): fit with a lower \
         learning rate or more data"
    )]
    Singular {
        /// What has no inverse.
        what: &'static str,
        /// Its channel, or its size.
        index: usize,
        /// What was found.
        found: String,
    },
    /// Cholesky failed at every damping tried.
    #[error(
        "the Gram matrix ({n}×{n}) is not positive definite even with damping {damp}: \
         use more calibration tokens, or raise --damp"
    )]
    NotPositiveDefinite {
        /// Order of the matrix.
        n: usize,
        /// Largest damping tried, as a fraction of the mean diagonal.
        damp: f64,
    },
    /// A code above the grid's largest.
    #[error("a code at row {row} is out of range for the grid")]
    CodeRange {
        /// Row of the first such code.
        row: usize,
    },
    /// A sensitivity below zero: a sum of squares cannot be.
    #[error(
        "{what} holds a negative value ({value}) at row {row}, column {col}: sensitivities are \
         sums of squares, so these are gradients or another matrix's"
    )]
    NegativeWeight {
        /// The list or matrix.
        what: &'static str,
        /// Row of the first such value.
        row: usize,
        /// Column of the first such value.
        col: usize,
        /// The value, as printed.
        value: String,
    },
    /// A budget that does not even pay for the cheapest choices.
    #[error(
        "a budget of {given} bits is below the minimum of {minimum}: raise the average, or allow \
         narrower grids"
    )]
    Budget {
        /// Budget asked for.
        given: u64,
        /// Least possible cost.
        minimum: u64,
    },
}

/// Fails unless a list has the length that is expected of it.
pub(crate) fn check_len(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(CoreError::Shape { what, expected: expected.to_string(), found: found.to_string() })
}
