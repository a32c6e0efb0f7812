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
//! | `live` | what a training step asks of all of these |
//! | `teachers` | teachers in memory, run beside the student or before it |
//! | `cached` | their outputs for a whole training, made once |
//! | [`teacher_cache`] | the file of these |
//!
//! Sources: "Punching Above Precision: Small Quantized Model Distillation with Learnable
//! Regularizer" (arXiv 2509.20854), of which only the abstract was at hand, and the papers that
//! each file names. What is INFERRED is marked so. Called by the trainer.

pub mod balance;
mod cached;
pub mod ensemble;
pub mod error;
mod live;
pub mod losses;
pub mod teacher_cache;
mod teachers;

pub use balance::{Balancer, BalancerSpec, Needs, Observed, Pair};
pub(crate) use cached::CachePlan;
pub use cached::CacheRecipe;
pub use ensemble::{Mixture, TeacherWeights, mix, row_weights};
pub use error::{DistillError, Result};
pub use live::{DistillRecipe, Distiller};
pub use losses::{DistillLoss, Distillation, Gamma, Joint, JsdForm, Teacher, TopK};
pub use teacher_cache::{CacheSpec, StoredAs, TeacherCache};
