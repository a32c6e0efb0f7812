//! Balancers: the weights of the task's loss and the teacher's.
//!
//! ```text
//! L(θ) = w_task L_task + w_teacher L_teacher
//! ```
//!
//! Weights are plain numbers when the student's gradient is computed: one backward pass per step.
//! What a balancer learns is updated in closed form from the same losses, by an Adam of its own
//! without weight decay; it belongs in checkpoints and not in the trained model. All is f64. Call
//! [`Balancer::step`] once per optimizer step, with means over micro-batches and ranks.
//!
//! | file | weights | needs |
//! |---|---|---|
//! | `gor` | learned, regularized: the default | losses |
//! | `fixed` | given; (1, 0) is the task alone, (0, 1) the teacher alone | – |
//! | `uncertainty` | learned log-variances | losses |
//! | `dwa` | by how fast each loss falls | losses |
//! | `gradnorm` | learned, equal gradient norms | norms at shared parameters |
//! | `logit_gradient` | inverse gradient norms | norms at the logits |

pub mod dwa;
pub mod fixed;
pub mod gor;
pub mod gradnorm;
#[cfg(test)]
mod invariants;
mod learned;
pub mod logit_gradient;
mod spec;
mod state;
pub mod uncertainty;

use std::fmt::Debug;

use super::error::Result;

pub use learned::{First, LearnedOptions};
pub use spec::BalancerSpec;

/// One number for the task and one for the teacher.
pub type Pair = [f64; 2];

/// What the trainer must supply beside the losses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Losses,
    /// Norms of the gradients of both unweighted losses with respect to the student's logits.
    LogitNorms,
    /// Norms of the gradients of both unweighted losses with respect to parameters that both
    /// depend on: two backward passes.
    ParameterNorms,
}

/// What a step saw, before any weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    /// The losses, in nats per token where they are divergences.
    pub losses: Pair,
    /// Norms of the gradients that [`Balancer::needs`] asks for.
    pub norms: Option<Pair>,
}

impl Observed {
    /// Losses without norms.
    pub fn losses(losses: Pair) -> Self {
        Self { losses, norms: None }
    }

    /// Whether everything in it is a finite number.
    pub fn is_finite(&self) -> bool {
        self.losses.iter().chain(self.norms.iter().flatten()).all(|v| v.is_finite())
    }
}

/// A way to weigh two losses.
pub trait Balancer: Debug + Send {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// What [`Self::weights`] and [`Self::step`] need to be told.
    fn needs(&self) -> Needs;

    /// The weights for this step; not negative and finite whatever was observed.
    ///
    /// # Panics
    /// When [`Self::needs`] asks for norms and there are none.
    fn weights(&self, observed: &Observed) -> Pair;

    /// Updates what is learned. Changes nothing and returns `false` when a value is no number.
    ///
    /// # Panics
    /// When [`Self::needs`] asks for norms and there are none.
    fn step(&mut self, observed: &Observed) -> bool;

    /// Everything that [`Self::weights`] and [`Self::step`] depend on beside the settings, as finite
    /// numbers by name.
    fn state(&self) -> Vec<(String, f64)>;

    /// Continues from what [`Self::state`] gave; changes nothing on an error.
    ///
    /// # Errors
    /// Names that are missing or not known, values that cannot be.
    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()>;
}

/// `f` of both.
fn both(a: Pair, f: impl Fn(f64) -> f64) -> Pair {
    a.map(f)
}

/// `f` of both pairs.
fn zip(a: Pair, b: Pair, f: impl Fn(f64, f64) -> f64) -> Pair {
    [f(a[0], b[0]), f(a[1], b[1])]
}

/// Weights of the same ratio whose sum is 2.
fn sum_to_two(weights: Pair) -> Pair {
    // Divided by the larger first: the sum of two huge ones must not overflow.
    let largest = weights[0].max(weights[1]);
    let scaled = both(weights, |w| w / largest);
    both(scaled, |w| 2.0 * w / (scaled[0] + scaled[1]))
}

/// `2 · softmax(x)`.
fn two_softmax(x: Pair) -> Pair {
    let largest = x[0].max(x[1]);
    sum_to_two(both(x, |x| (x - largest).exp()))
}
