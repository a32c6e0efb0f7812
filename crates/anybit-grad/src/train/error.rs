//! What can go wrong while training. Each message says what, where and how to fix it.

use std::path::PathBuf;

use super::data::DataError;
use super::distributed::CommunicationError;
use crate::distill::DistillError;
use crate::{EstimatorError, GradError};

/// Errors of training.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A checkpoint, log or report cannot be read or written.
    #[error(transparent)]
    Io(#[from] anybit_io::IoError),
    /// The decoder refused.
    #[error(transparent)]
    Grad(#[from] GradError),
    /// The training data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Teachers or balancers that cannot be used.
    #[error(transparent)]
    Distill(#[from] DistillError),
    /// Ranks lost each other.
    #[error(transparent)]
    Communication(#[from] CommunicationError),
    /// An estimator that does not exist, or does not fit a linear.
    #[error("{place}: {source}")]
    Estimator {
        /// The key of the recipe, and the linear if it is about one.
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
    /// A loss or gradient that is no number, or a loss that ran away.
    #[error(
        "step {step}: {what}; first seen in {place}. The last good state is {checkpoint}; lower \
         train.lr or raise the bits, and go on from there with --resume"
    )]
    Diverged {
        /// The step, counted from 0.
        step: u64,
        /// What was found.
        what: String,
        /// The layer or parameter.
        place: String,
        /// Folder of the last good checkpoint, or "none yet".
        checkpoint: String,
    },
    /// A training checkpoint that does not hold what it should.
    #[error(
        "{path}: {what}; delete this folder to go on from the checkpoint before it, or train anew \
         without --resume"
    )]
    Checkpoint {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Resuming with another recipe.
    #[error(
        "{path} was trained with another recipe ({what} differs); use that recipe, or another out"
    )]
    OtherRecipe {
        /// The run's folder.
        path: PathBuf,
        /// The section that differs.
        what: &'static str,
    },
}

impl TrainError {
    /// [`Self::Recipe`].
    pub fn recipe(key: &'static str, what: impl Into<String>) -> Self {
        Self::Recipe { key, what: what.into() }
    }
}
