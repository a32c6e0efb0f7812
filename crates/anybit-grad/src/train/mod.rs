//! Training with quantized weights and activations, from scratch or from a checkpoint (QuEST,
//! Panferov et al., ICML 2025, arXiv 2502.05003).
//!
//! | file | what |
//! |---|---|
//! | `recipe` | what `anybit train` reads |
//! | `data`, `corpus` | texts to token files to sequences |
//! | `model` | shapes by name and their first weights |
//! | `quantized` | the decoder with estimators at its linears' operands |
//! | `kept` | packed weights whose codes stay and whose values are trained |
//! | `trainer` | one optimizer step; validation |
//! | `distributed` | several processes, one batch |
//! | `checkpoint` | state on disk, to go on from |
//! | `log` | losses as JSON lines and for TensorBoard |
//! | `export` | the trained model as a checkpoint |
//! | `run` | all of it, in order |

pub mod checkpoint;
pub mod corpus;
pub mod data;
pub mod distributed;
mod error;
pub mod export;
pub mod kept;
pub mod log;
pub mod model;
pub mod quantized;
pub mod recipe;
mod run;
pub mod trainer;

pub use error::TrainError;
pub use quantized::QuantizedDecoder;
pub use recipe::{DataRecipe, ModelRecipe, Precision, QuantizerRecipe, TrainRecipe, TrainSettings};
pub(crate) use run::refuse_rounded;
pub use run::{Event, RunOptions, TrainReport, run};
pub use trainer::{StepReport, Trainer};

/// Result with [`TrainError`].
pub type Result<T> = std::result::Result<T, TrainError>;
