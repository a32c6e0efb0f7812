//! Measuring models: perplexity, and divergence from a reference model, on text.
//!
//! Everything is computed on the fly, a tile of positions at a time: no logits are ever kept.
//! The controls that must be exact are tests: a model compared with itself has a divergence of
//! exactly 0 and an agreement of exactly 1.

pub mod convention;
pub mod divergence;
pub mod error;
pub mod evaluate;
pub mod report;
pub mod scaling;
pub mod statistics;
pub mod text;

pub use convention::Convention;
pub use error::{EvalError, Result};
pub use evaluate::{EvalOptions, HiddenStates, ModelScores, Progress, compare_hidden, evaluate};
pub use text::{BUILTIN_TEXT, read_text};
