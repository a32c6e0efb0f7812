//! Post-training quantization: a recipe, a checkpoint and some text in, a packed checkpoint out.
//!
//! One block of the decoder at a time: load it, observe its inputs, round its linears, write it,
//! compute the inputs of the next, forget it. Memory is one block and its statistics, whatever
//! the model's size, and each finished block is a point to resume from.
//!
//! | file | holds |
//! |---|---|
//! | `recipe` | what is wanted, as flags or TOML |
//! | `plan` | what that means for each tensor of a model, to the byte |
//! | `layout` | how a matrix will be stored |
//! | `calibration` | the token sequences that are observed |
//! | `site` | the linears that share an input, and what was observed of it |
//! | `methods/NAME` | one folder per method |
//! | `transforms/NAME` | one file or folder per transform |
//! | `activations` | which quantizers stand at the sites |
//! | `sensitivity` | gradients, once per model and text |
//! | `tables`, `goal` | errors of rows on grids, and the choice of grids under a goal |
//! | `cache` | where both are kept for the next goal |
//! | `driver` | the loop over blocks |
//! | `stages` | the way of hidden states through a block, site by site |
//! | `rounded` | a site rounded and measured |
//! | `journal` | finished blocks, for `--resume` |
//! | `assemble` | the final folder |

pub mod activations;
pub mod assemble;
pub mod cache;
pub mod calibration;
pub mod driver;
pub mod error;
pub mod goal;
pub mod journal;
pub mod layout;
pub mod methods;
pub mod plan;
pub mod recipe;
pub mod rounded;
pub mod sensitivity;
pub mod site;
pub mod stages;
pub mod streams;
pub mod tables;
pub mod transforms;

pub use calibration::{Calibration, CalibrationText};
pub use driver::{
    BlockReport, Event, Measured, QuantizeOptions, Quantized, cache_folder, final_states, quantize,
};
pub use error::{PtqError, Result};
pub use layout::MatrixLayout;
pub use plan::{Plan, PlannedMatrix};
pub use recipe::{Count, LinearSettings, Recipe};
pub use tables::{Goal, MatrixTable};
