//! What can go wrong with images and their networks. Each message says what, where and how to fix
//! it.

use std::path::{Path, PathBuf};

use crate::EstimatorError;
use crate::distill::DistillError;

/// Result with [`VisionError`].
pub type Result<T> = std::result::Result<T, VisionError>;

/// Errors of reading images, and of training and running their networks.
#[derive(Debug, thiserror::Error)]
pub enum VisionError {
    /// A file cannot be read or written, or a stored network is damaged.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// A balancer, loss or ensemble that cannot be used.
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// A data set that is not what its format says.
    #[error("{path}: {what}")]
    Data {
        /// The file.
        path: PathBuf,
        /// What is wrong and where, and what to do.
        what: String,
    },
    /// An estimator that does not exist, or does not fit a layer.
    #[error("{place}: {source}")]
    Estimator {
        /// The key of the recipe, and the layer.
        place: String,
        /// The reason.
        source: EstimatorError,
    },
    /// A recipe that contradicts itself or is out of range.
    #[error("{key}: {what}")]
    Recipe {
        /// The key, such as `train.batch`.
        key: &'static str,
        /// What is wrong, and what to write instead.
        what: String,
    },
    /// A loss, gradient or output that is no number.
    #[error("{place}: {what}; lower lr, raise the bits, or give other teachers")]
    NotFinite {
        /// The step or the network.
        place: String,
        /// What was found.
        what: String,
    },
    /// A network whose grids integers cannot compute with.
    #[error("{layer}: {what}")]
    NoIntegers {
        /// The layer.
        layer: String,
        /// What is in the way, and what to take instead.
        what: String,
    },
    /// A weight that cannot be packed.
    #[error("{layer}: {source}")]
    Pack {
        /// The layer.
        layer: String,
        /// The reason.
        source: anybit_core::CoreError,
    },
}

impl VisionError {
    /// [`Self::Data`].
    pub(super) fn data(path: &Path, what: impl Into<String>) -> Self {
        Self::Data { path: path.to_owned(), what: what.into() }
    }

    /// [`Self::Recipe`].
    pub(super) fn recipe(key: &'static str, what: impl Into<String>) -> Self {
        Self::Recipe { key, what: what.into() }
    }
}
