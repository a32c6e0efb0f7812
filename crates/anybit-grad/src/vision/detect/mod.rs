//! Detection: a small anchor-free detector, trained in full precision, quantized, and distilled with
//! the balancers and losses of [`crate::distill`].
//!
//! The network is that of [`super::network`] with its head on every pixel of the last value instead
//! of their mean; each is a cell that says what it sees and where. Quantizers, the trainer, files and
//! integer inference are the same.
//!
//! | file | what |
//! |---|---|
//! | `boxes` | rectangles, their overlap, non-maximum suppression |
//! | `grid` | cells: which answers for a box, and in which numbers |
//! | `loss` | the losses of task and teacher |
//! | `metric` | mAP@0.5 |
//! | `scenes` | images with boxes on disk |
//! | `shapes` | a set of such images made from a seed |
//! | `recipe`, `run` | what `anybit distill-detector` reads and does |
//!
//! INFERRED: GoR's paper (arXiv 2509.20854) names detection in its abstract, which is all of it that
//! was at hand. Its detector, data, losses and numbers for this task are unknown; everything here is
//! our own choice.

pub mod boxes;
pub mod grid;
pub mod loss;
pub mod metric;
pub mod recipe;
pub mod run;
pub mod scenes;
pub mod shapes;
#[cfg(test)]
mod tests;

pub use boxes::{Detection, Object, Rect};
pub use recipe::DetectorRecipe;
pub use run::{DetectorReport, Map50, run};
pub use scenes::Scenes;
pub use shapes::ShapesSpec;
