//! Distillation: what a quantized student learns from teachers of full precision, and how that is
//! weighed against the task.
//!
//! ```text
//! L = w_task · cross-entropy + w_teacher · divergence(teacher, student)
//! ```
//!
//! | file | what |
//! |---|---|
//! | [`balance`] | the two weights: GoR and its baselines |
//! | [`losses`] | divergences of logits and distances of hidden states, as operations of the tape |
//! | [`ensemble`] | several teachers as one |
//! | `live` | teachers that run beside the student |
//! | [`teacher_cache`] | the likeliest tokens of a teacher, stored once |
//!
//! Sources: "Punching Above Precision: Small Quantized Model Distillation with Learnable
//! Regularizer" (arXiv 2509.20854), of which only the abstract was at hand, and the papers that
//! each file names. What is INFERRED is marked so. Called by the trainer.

pub mod balance;
pub mod ensemble;
pub mod error;
mod live;
pub mod losses;
pub mod teacher_cache;

pub use balance::{Balancer, BalancerSpec, Needs, Observed, Pair};
pub use ensemble::{Mixture, TeacherWeights, mix, row_weights};
pub use error::{DistillError, Result};
pub use live::{DistillRecipe, Distiller};
pub use losses::{DistillLoss, Distillation, Gamma, Joint, JsdForm, Teacher, TopK};
pub use teacher_cache::{CacheSpec, StoredAs, TeacherCache};
