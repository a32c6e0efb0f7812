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
//! | `calibration` | the token sequences that are observed |
//! | `methods/NAME` | one folder per method |
//! | `driver` | the loop over blocks |
//! | `stages` | observing and rounding inside a block |
//! | `journal` | finished blocks, for `--resume` |
//! | `assemble` | the final folder |

pub mod assemble;
pub mod calibration;
pub mod driver;
pub mod error;
pub mod journal;
pub mod methods;
pub mod plan;
pub mod recipe;
pub mod stages;
pub mod streams;

pub use calibration::{Calibration, CalibrationText};
pub use driver::{BlockReport, Event, QuantizeOptions, Quantized, quantize};
pub use error::{PtqError, Result};
pub use plan::{Plan, PlannedMatrix};
pub use recipe::{LinearSettings, Recipe};
