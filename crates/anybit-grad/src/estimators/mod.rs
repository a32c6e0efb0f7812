//! Estimators: quantizers of the operands of a linear with the gradients that are trained through
//! them. QuEST (Panferov et al., ICML 2025, arXiv 2502.05003) and what it is compared with.
//!
//! An operand `A` is a weight `[out, K]` or an activation `[tokens, K]`. It may be rotated,
//! `A_h = A H`, where `H = blockdiag(H_B, …)` is the normalized Walsh–Hadamard matrix:
//! `H = Hᵀ = H⁻¹`.
//! What is recorded is `Â_h` or `Â_h H` ([`Form`]). With both operands of a linear on their grids,
//! `Y = X̂_h Ŵ_hᵀ = X̂ Ŵᵀ`.
//!
//! | estimator | values, in units of the scale | scale | `∂Â/∂A` before the rotation |
//! |---|---|---|---|
//! | `quest` | `2^b` equal steps, no zero | `α*·RMS` of the row | 1 up to half a step beyond the grid |
//! | `ternary` | `−1, 0, 1` | `α*·RMS` of the row | as `quest` |
//! | `fp4` | E2M1 | RMS of the row | as `quest`, or as the released code has it |
//! | `sparse_pairs` | as `quest`, half of the pairs zero | `α*·RMS` of the row | 1 where the error is at most half a step |
//! | `ste` | as `quest` | `α*·RMS` of the row | 1 |
//! | `clip` | as `quest` | `α*·RMS` of the row | 1 on the grid's range |
//! | `absmax` | as `quest` | largest magnitude of the row | 1 |
//! | `gaussian` | Lloyd and Max, for N(0, 1) | RMS of the row | as `ste`, `clip` or `quest` |
//! | `lsq`, `lsq_plus_weight` | as `quest`, or with a zero | learned step of the tensor | 1 on the range |
//! | `lsq_plus_activation` | `2^b` equal steps | learned step and offset of the tensor | 1 on the range |
//! | `pact` | as `quest` | learned clip of the tensor | 1 below the clip |
//! | `dorefa_weight` | `2^b` equal steps on `[−1, 1]` | of `tanh` of the tensor | of `tanh` |
//! | `dorefa_activation` | `2^b` equal steps on `[0, 1]` or `[−1, 1]` | none | 1 on the range |
//!
//! Scales that are not learned, grids and masks are constants for differentiation. Masks live
//! where the rounding happened: with `M` the entries that pass, `dA = ((dÂ H) ⊙ M) H`, so that with
//! a rotation every entry of `A` keeps some gradient. Called by training loops; settings for
//! recipes are [`EstimatorSpec`].

mod codes;
mod dorefa;
mod error;
mod fp4;
mod gaussian;
mod levels;
mod lsq;
mod pact;
mod rotation;
mod rows;
mod sparse_pairs;
mod spec;
mod ternary;
mod uniform;

pub use codes::half_integer_codes;
pub use error::EstimatorError;
pub use fp4::Fp4Trust;
pub use gaussian::GaussianGradient;
pub use rotation::Form;
pub use spec::EstimatorSpec;
pub use uniform::ALPHA;

use std::ops::Range;

// What keeps scales above zero: the released code's `1e-8`, and the least learned step or clip.
use anybit_core::half_integer::EPSILON;

use crate::tape::Pass;
use crate::tiles::total;
use crate::{Tape, Tensor, Var};

/// One operand of a linear on its grid, recorded with the gradient that trains through it.
///
/// ```
/// use anybit_grad::{EstimatorSpec, Tape, Tensor};
///
/// let quest: EstimatorSpec = serde_json::from_str(r#"{"type": "quest", "bits": 4}"#).unwrap();
/// quest.validate(256).unwrap();
/// let quest = quest.build().unwrap();
/// let mut tape = Tape::default();
/// let values = |n: usize| (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
/// let x = tape.leaf(Tensor::new([3, 256], values(3 * 256)), true);
/// let w = tape.leaf(Tensor::new([5, 256], values(5 * 256)), true);
/// let (x_q, w_q) = (quest.record(&mut tape, x, &[]), quest.record(&mut tape, w, &[]));
/// let y = tape.linear(x_q, w_q, None);
/// tape.backward_from(y, &[1.0; 15]);
/// assert_eq!(tape.grad(w).unwrap().len(), 5 * 256);
/// ```
pub trait Estimator: Send + Sync + std::fmt::Debug {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// Whether rows of `cols` can be quantized.
    ///
    /// # Errors
    /// When they are not made of whole blocks of the rotation, or of whole groups.
    fn check(&self, cols: usize) -> Result<(), EstimatorError> {
        let _ = cols;
        Ok(())
    }

    /// What is learned beside the operand, in the order in which [`Self::record`] takes it: the
    /// end of the name, and the initial value for an operand that starts as `first`, rows of
    /// `cols`.
    fn parameters(&self, first: &[f32], cols: usize) -> Vec<(&'static str, Tensor)> {
        let _ = (first, cols);
        Vec::new()
    }

    /// Records the quantized operand: `x` is `[rows, K]`, and so is what is returned.
    ///
    /// # Panics
    /// When `x` is no matrix, [`Self::check`] refuses its `K`, or the number of learned
    /// values is not that of [`Self::parameters`].
    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var;

    /// Share of the entries of `x`, rows of `cols`, through which gradient passes in the domain of
    /// the rounding; `learned` are the values of [`Self::parameters`].
    fn trusted_share(&self, x: &[f32], cols: usize, learned: &[&[f32]]) -> f64;
}

/// Adds to the gradient of a learned scalar.
fn add_to_scalar(pass: &mut Pass<'_>, v: Var, gradient: f64) {
    if pass.wants(v) {
        let mut slot = pass.take(v);
        slot.ready()[0] += gradient as f32;
        pass.put(v, slot);
    }
}

/// Share of the values for which `f` holds.
fn share(x: &[f32], f: impl Fn(f32) -> bool + Send + Sync) -> f64 {
    let count = |range: Range<usize>| x[range].iter().filter(|x| f(**x)).count() as f64;
    total(x.len(), count) / x.len().max(1) as f64
}

/// Number of levels of a grid of `bits`.
fn level_count(bits: u8) -> f32 {
    (1u32 << bits) as f32
}

#[cfg(test)]
mod invariants;
#[cfg(test)]
mod tests;
