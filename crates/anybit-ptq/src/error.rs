//! What can go wrong while quantizing.

use std::path::PathBuf;

/// Result with [`PtqError`].
pub type Result<T, E = PtqError> = std::result::Result<T, E>;

/// Errors of recipes, plans and the quantization itself.
#[derive(Debug, thiserror::Error)]
pub enum PtqError {
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// A model cannot be run.
    #[error(transparent)]
    Runtime(#[from] anybit_runtime::RuntimeError),
    /// Gradients cannot be taken.
    #[error(transparent)]
    Grad(#[from] anybit_grad::GradError),
    /// A goal that no choice of grids meets.
    #[error("{0}")]
    Goal(String),
    /// A tensor cannot be rounded.
    #[error("{tensor}: {source}")]
    Tensor {
        /// The tensor.
        tensor: String,
        /// The reason.
        #[source]
        source: anybit_core::CoreError,
    },
    /// A recipe that cannot be read.
    #[error("recipe {path}: {what}")]
    RecipeFile {
        /// The file.
        path: PathBuf,
        /// The reason, with its line and the nearest name of an unknown key.
        what: String,
    },
    /// A recipe that asks for something impossible.
    #[error("{0}")]
    Recipe(String),
    /// A calibration text that cannot be used.
    #[error("calibration text {name}: {what}")]
    Calibration {
        /// The file or name.
        name: String,
        /// The reason.
        what: String,
    },
    /// `--resume` with another recipe, model or text than the run that was interrupted.
    #[error(
        "{path} was begun with another {what}; repeat the original command, or start afresh \
         without --resume"
    )]
    Resume {
        /// The journal.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
}
