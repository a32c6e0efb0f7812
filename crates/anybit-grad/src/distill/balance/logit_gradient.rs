//! Inverse norms of the gradients at the logits: both losses pull equally hard there.
//!
//! ```text
//! n_i = β n_i + (1 − β) ‖∂L_i/∂z‖,  corrected for its start      w_i = 2 n_i⁻¹ / Σ_j n_j⁻¹
//! ```
//!
//! The balancer without trained parameters that follows the abstract of GoR most directly
//! ("heterogeneous gradient magnitudes"); it is ours (INFERRED). A gradient that vanishes would take
//! all the weight from the other: norms are not counted below a share of the larger one, and weights
//! are 1 when both vanish.

use serde::{Deserialize, Serialize};

use super::state::{StateReader, push_pair};
use super::{Balancer, Needs, Observed, Pair, both, sum_to_two, zip};
use crate::distill::error::{Result, check_setting};

const NAME: &str = "logit_gradient";
/// Norms count as at least this share of the larger one.
const LEAST_SHARE: f64 = 1e-4;

/// Settings of the balancer by gradient norms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogitGradientOptions {
    /// Decay `β` of the mean norms.
    pub decay: f64,
}

impl Default for LogitGradientOptions {
    fn default() -> Self {
        Self { decay: 0.9 }
    }
}

impl LogitGradientOptions {
    pub(super) fn validate(&self) -> Result<()> {
        let ok = (0.0..1.0).contains(&self.decay);
        check_setting(NAME, "decay", self.decay, ok, "it must be in [0, 1)")
    }
}

/// The balancer of [`LogitGradientOptions`].
#[derive(Debug, Clone)]
pub(super) struct LogitGradient {
    options: LogitGradientOptions,
    /// Decayed sum of the norms, and of ones.
    norms: Pair,
    count: f64,
}

impl LogitGradient {
    /// One that has seen nothing yet.
    pub fn new(options: LogitGradientOptions) -> Self {
        Self { options, norms: [0.0; 2], count: 0.0 }
    }

    /// The decayed sums with what was observed.
    fn with(&self, norms: Pair) -> (Pair, f64) {
        let decay = self.options.decay;
        let mean = |old: f64, new: f64| decay * old + (1.0 - decay) * new;
        (zip(self.norms, norms, mean), mean(self.count, 1.0))
    }
}

fn norms(observed: &Observed) -> Pair {
    observed.norms.expect("logit_gradient needs the norms of both gradients")
}

impl Balancer for LogitGradient {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::LogitNorms
    }

    fn weights(&self, observed: &Observed) -> Pair {
        let (sums, count) = match (norms(observed), observed.is_finite()) {
            (norms, true) => self.with(norms),
            (_, false) => (self.norms, self.count),
        };
        let largest = sums[0].max(sums[1]);
        if count == 0.0 || largest == 0.0 {
            return [1.0; 2];
        }
        sum_to_two(both(sums, |n| 1.0 / (n / largest).max(LEAST_SHARE)))
    }

    fn step(&mut self, observed: &Observed) -> bool {
        let norms = norms(observed);
        if !observed.is_finite() {
            return false;
        }
        (self.norms, self.count) = self.with(norms);
        true
    }

    fn state(&self) -> Vec<(String, f64)> {
        let mut state = vec![("count".to_string(), self.count)];
        push_pair(&mut state, "norm", self.norms);
        state
    }

    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()> {
        let mut reader = StateReader::new(NAME, state);
        let (count, norms) = (reader.take("count")?, reader.pair("norm")?);
        reader.finish()?;
        *self = Self { options: self.options, norms, count };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(norms: Pair) -> Observed {
        Observed { losses: [1.0; 2], norms: Some(norms) }
    }

    #[test]
    fn both_pull_equally() {
        let mut balancer = LogitGradient::new(LogitGradientOptions::default());
        for _ in 0..5 {
            let w = balancer.weights(&observed([0.3, 6.0]));
            approx::assert_relative_eq!(w[0] * 0.3, w[1] * 6.0, max_relative = 1e-12);
            approx::assert_relative_eq!(w[0] + w[1], 2.0, max_relative = 1e-12);
            assert!(balancer.step(&observed([0.3, 6.0])));
        }
        // Invariant 6: swapped norms, swapped weights.
        let fresh = LogitGradient::new(LogitGradientOptions::default());
        let (a, b) = (fresh.weights(&observed([0.3, 6.0])), fresh.weights(&observed([6.0, 0.3])));
        assert_eq!(a, [b[1], b[0]]);
    }

    /// Invariants 4 and 10: extreme norms leave positive weights, what is no number changes nothing,
    /// and a stored state goes on bit by bit.
    #[test]
    fn invariants_4_and_10_extremes_and_state() {
        for norms in [[0.0, 0.0], [0.0, 1.0], [1e-30, 1e30]] {
            let mut balancer = LogitGradient::new(LogitGradientOptions::default());
            for _ in 0..50 {
                let w = balancer.weights(&observed(norms));
                assert!(w.iter().all(|w| *w > 0.0 && w.is_finite()), "{w:?}");
                assert!(balancer.step(&observed(norms)));
            }
            let mut other = LogitGradient::new(LogitGradientOptions::default());
            other.load_state(&balancer.state()).unwrap();
            assert!(!balancer.step(&observed([f64::NAN, 1.0])));
            let next = observed([2.0, 1.0]);
            assert_eq!(balancer.weights(&next), other.weights(&next));
        }
        let fresh = LogitGradient::new(LogitGradientOptions::default());
        assert_eq!(fresh.weights(&observed([f64::NAN, 1.0])), [1.0; 2]);
    }
}
