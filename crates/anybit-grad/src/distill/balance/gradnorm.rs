//! GradNorm (Chen et al., ICML 2018; constants as in LibMTL): weighted gradients of both losses
//! should have the same norm, more for the loss that lags behind.
//!
//! ```text
//! G_i = w_i ‖g_i‖        r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
//! minimize over a:  Σ_i |G_i − mean(G) r_i^α|   with the right side held fixed,  w = 2 softmax(a)
//! ∂/∂a_j = w_j (d_j − Σ_i w_i d_i / 2),   d_i = sign(G_i − mean(G) r_i^α) ‖g_i‖
//! ```
//!
//! `g_i` is the gradient of the unweighted loss with respect to parameters that both share. `L_i(0)`
//! is the mean over the first batches, in which weights are 1. The learning rate is the original
//! paper's, from memory.

use serde::{Deserialize, Serialize};

use super::state::{ScalarAdam, StateReader, push_pair};
use super::{Balancer, Needs, Observed, Pair, both, two_softmax, zip};
use crate::distill::error::{Result, check_setting};

const NAME: &str = "gradnorm";
/// Largest magnitude of `a`: no weight falls below `2 e^{−20}`.
const LARGEST: f64 = 10.0;
/// Least loss that another is divided by.
const LEAST_LOSS: f64 = 1e-12;

/// Settings of GradNorm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GradNormOptions {
    /// How much more a loss that lags behind may pull.
    pub alpha: f64,
    /// Learning rate of `a`.
    pub lr: f64,
    /// Batches whose mean is the first loss.
    pub batches: u64,
}

impl Default for GradNormOptions {
    fn default() -> Self {
        Self { alpha: 1.5, lr: 0.025, batches: 10 }
    }
}

impl GradNormOptions {
    pub(super) fn validate(&self) -> Result<()> {
        let fix = "it must not be negative";
        check_setting(NAME, "alpha", self.alpha, self.alpha >= 0.0, fix)?;
        check_setting(NAME, "lr", self.lr, self.lr >= 0.0, fix)?;
        let batches = self.batches;
        check_setting(NAME, "batches", batches as f64, batches > 0, "at least 1 is needed")
    }
}

/// The balancer of [`GradNormOptions`].
#[derive(Debug, Clone)]
pub(super) struct GradNorm {
    options: GradNormOptions,
    a: Pair,
    adam: ScalarAdam,
    /// Batches in `first`, the mean of the first losses.
    seen: u64,
    first: Pair,
}

impl GradNorm {
    /// One that has seen nothing yet.
    pub fn new(options: GradNormOptions) -> Self {
        let adam = ScalarAdam::new(options.lr);
        Self { options, a: [0.0; 2], adam, seen: 0, first: [0.0; 2] }
    }

    /// The gradient with respect to `a`.
    fn gradient(&self, losses: Pair, norms: Pair) -> Pair {
        let weights = two_softmax(self.a);
        let progress = zip(losses, self.first, |l, first| l.max(0.0) / first.max(LEAST_LOSS));
        let mean = (progress[0] + progress[1]) / 2.0;
        let rate = |p: f64| if mean > 0.0 { (p / mean).powf(self.options.alpha) } else { 1.0 };
        let sizes = zip(weights, norms, |w, n| w * n);
        let target = (sizes[0] + sizes[1]) / 2.0;
        let gaps = zip(sizes, progress, |size, p| size - target * rate(p));
        // The sign of 0 is 0 here: at the target nothing pulls.
        let pull = zip(gaps, norms, |gap, n| if gap == 0.0 { 0.0 } else { gap.signum() * n });
        let inner = (weights[0] * pull[0] + weights[1] * pull[1]) / 2.0;
        zip(weights, pull, |w, d| w * (d - inner))
    }
}

impl Balancer for GradNorm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::ParameterNorms
    }

    fn weights(&self, _observed: &Observed) -> Pair {
        two_softmax(self.a)
    }

    fn step(&mut self, observed: &Observed) -> bool {
        let norms = observed.norms.expect("gradnorm needs the norms of both gradients");
        if !observed.is_finite() {
            return false;
        }
        if self.seen < self.options.batches {
            self.seen += 1;
            let count = self.seen as f64;
            self.first = zip(self.first, observed.losses, |mean, l| mean + (l - mean) / count);
            return true;
        }
        let gradient = self.gradient(observed.losses, norms);
        self.adam.step(&mut self.a, gradient);
        self.a = both(self.a, |a| a.clamp(-LARGEST, LARGEST));
        true
    }

    fn state(&self) -> Vec<(String, f64)> {
        let mut state = vec![("seen".to_string(), self.seen as f64)];
        push_pair(&mut state, "a", self.a);
        push_pair(&mut state, "first_loss", self.first);
        self.adam.save(&mut state);
        state
    }

    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()> {
        let mut reader = StateReader::new(NAME, state);
        let (seen, a) = (reader.count("seen")?, reader.pair("a")?);
        let (first, adam) = (reader.pair("first_loss")?, self.adam.load(&mut reader)?);
        reader.finish()?;
        *self = Self { options: self.options, a, adam, seen, first };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient_is_that_of_the_objective() {
        let first = [2.0, 3.0];
        let make = |a: Pair| GradNorm { a, first, ..GradNorm::new(GradNormOptions::default()) };
        let (losses, norms, a) = ([1.5, 0.7], [0.8, 4.0], [0.3, -0.2]);
        let at = two_softmax(a);
        let target = (at[0] * norms[0] + at[1] * norms[1]) / 2.0;
        let progress = [0.75, 0.7 / 3.0];
        let mean = (progress[0] + progress[1]) / 2.0;
        let objective = |a: Pair| {
            let w = two_softmax(a);
            let gap = |i: usize| w[i] * norms[i] - target * f64::powf(progress[i] / mean, 1.5);
            gap(0).abs() + gap(1).abs()
        };
        let gradient = make(a).gradient(losses, norms);
        for (i, want) in gradient.into_iter().enumerate() {
            let moved = |h: f64| {
                let mut a = a;
                a[i] += h;
                objective(a)
            };
            let numeric = (moved(1e-6) - moved(-1e-6)) / 2e-6;
            approx::assert_relative_eq!(numeric, want, max_relative = 1e-6);
        }
    }

    /// Invariant 11: on two bowls of very different steepness weights sum to 2 and the gap between
    /// the weighted norms shrinks.
    #[test]
    fn invariant_11_gap_shrinks() {
        let mut balancer = GradNorm::new(GradNormOptions { alpha: 0.0, ..Default::default() });
        let (mut x, mut gaps) = (0.0f64, Vec::new());
        for _ in 0..400 {
            let losses = [0.5 * (x - 1.0).powi(2) + 1.0, 20.0 * (0.5 * (x + 1.0).powi(2) + 1.0)];
            let grads = [x - 1.0, 20.0 * (x + 1.0)];
            let observed = Observed { losses, norms: Some(grads.map(f64::abs)) };
            let w = balancer.weights(&observed);
            approx::assert_relative_eq!(w[0] + w[1], 2.0, max_relative = 1e-12);
            gaps.push((w[0] * grads[0].abs() - w[1] * grads[1].abs()).abs());
            assert!(balancer.step(&observed));
            x -= 1e-3 * (w[0] * grads[0] + w[1] * grads[1]);
        }
        let (first, last) = (gaps[0], gaps[gaps.len() - 1]);
        assert!(last < 0.2 * first, "{first} {last}");
    }

    /// Invariants 4 and 10: extreme values leave positive weights, what is no number changes
    /// nothing, and a stored state goes on bit by bit.
    #[test]
    fn invariants_4_and_10_extremes_and_state() {
        for value in [0.0, 1e-30, 1e30] {
            let mut balancer = GradNorm::new(GradNormOptions { batches: 2, ..Default::default() });
            let observed = Observed { losses: [value, 1.0], norms: Some([value, 1.0]) };
            for _ in 0..1000 {
                assert!(balancer.step(&observed));
                let w = balancer.weights(&observed);
                assert!(w.iter().all(|w| *w > 0.0 && w.is_finite()), "{w:?}");
            }
            let mut other = GradNorm::new(balancer.options);
            other.load_state(&balancer.state()).unwrap();
            let next = Observed { losses: [0.5, 0.6], norms: Some([2.0, 1.0]) };
            assert!(balancer.step(&next) && other.step(&next));
            assert_eq!(balancer.state(), other.state());
            let bad = Observed { losses: [1.0; 2], norms: Some([f64::NAN, 1.0]) };
            assert!(!balancer.step(&bad));
            assert_eq!(balancer.state(), other.state());
        }
    }
}
