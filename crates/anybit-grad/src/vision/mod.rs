//! Small convolutional networks for images: trained in full precision, quantized, distilled with
//! the balancers and losses of [`crate::distill`], and computed in integers.
//!
//! | file | what |
//! |---|---|
//! | `data` | IDX and CIFAR-10 files, subsets, noise in labels |
//! | `ops` | convolutions, batch normalization, pooling |
//! | `model` | shapes of networks by name |
//! | `network` | a network with its parameters; its forward pass |
//! | `quantize` | which estimator rounds which operand |
//! | `train`, `sgd` | one optimizer step after another, with or without a teacher |
//! | `infer` | normalizations folded, products in integers |
//! | `checkpoint` | a network on disk |
//! | `recipe`, `run` | what `anybit distill-vision` reads and does |
//! | `detect` | objects and their boxes instead of one class |

pub mod checkpoint;
pub mod data;
pub mod detect;
mod error;
pub mod infer;
pub mod model;
pub mod network;
pub mod ops;
pub mod quantize;
pub mod recipe;
pub mod run;
mod sgd;
#[cfg(test)]
mod tests;
pub mod train;

pub use error::{Result, VisionError};
pub use infer::IntegerNetwork;
pub use model::{Family, ModelSpec};
pub use network::Network;
pub use quantize::QuantizerSpec;
pub use recipe::VisionRecipe;
pub use run::{Speed, VisionReport, run};
