//! Dynamic weight average (Liu et al., CVPR 2019; constants as in LibMTL): a loss that falls more
//! slowly weighs more.
//!
//! ```text
//! r_i = L_i(e − 1) / L_i(e − 2)           w = 2 softmax(r / T)
//! ```
//!
//! `L_i(e)` is the mean of an epoch, weights are 1 in the first two. Training on tokens has no
//! epochs: here one is `interval` steps, by default a twentieth of the training (INFERRED).

use serde::{Deserialize, Serialize};

use super::state::{StateReader, push_pair};
use super::{Balancer, Needs, Observed, Pair, both, two_softmax, zip};
use crate::distill::error::{Result, check_setting};

const NAME: &str = "dwa";
/// Least loss that another is divided by.
const LEAST_LOSS: f64 = 1e-12;
/// Largest ratio: the weight of the other loss must not become 0.
const LARGEST_RATIO: f64 = 100.0;

/// Settings of dynamic weight average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DwaOptions {
    /// Larger is closer to equal weights.
    pub temperature: f64,
    /// Steps whose mean loss is compared; by default a twentieth of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<u64>,
}

impl Default for DwaOptions {
    fn default() -> Self {
        Self { temperature: 2.0, interval: None }
    }
}

impl DwaOptions {
    pub(super) fn validate(&self) -> Result<()> {
        let temperature = self.temperature;
        check_setting(NAME, "temperature", temperature, temperature >= 0.2, "use at least 0.2")?;
        let interval = self.interval.unwrap_or(1);
        check_setting(NAME, "interval", interval as f64, interval > 0, "use at least 1 step")
    }
}

/// The balancer of [`DwaOptions`].
#[derive(Debug, Clone)]
pub(super) struct Dwa {
    temperature: f64,
    interval: u64,
    /// Steps of the current epoch and the sums of their losses.
    count: u64,
    sum: Pair,
    /// Means of the epoch before and of that before it.
    last: Option<Pair>,
    before: Option<Pair>,
}

impl Dwa {
    /// One that has seen nothing, for a training of `steps`.
    pub fn new(options: DwaOptions, steps: u64) -> Self {
        let interval = options.interval.unwrap_or((steps / 20).max(1));
        let temperature = options.temperature;
        Self { temperature, interval, count: 0, sum: [0.0; 2], last: None, before: None }
    }
}

impl Balancer for Dwa {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Losses
    }

    fn weights(&self, _observed: &Observed) -> Pair {
        let (Some(last), Some(before)) = (self.last, self.before) else { return [1.0; 2] };
        let ratio = |last: f64, before: f64| last.max(0.0) / before.max(LEAST_LOSS);
        let ratios = zip(last, before, ratio);
        two_softmax(both(ratios, |r| r.min(LARGEST_RATIO) / self.temperature))
    }

    fn step(&mut self, observed: &Observed) -> bool {
        if !observed.is_finite() {
            return false;
        }
        self.sum = zip(self.sum, observed.losses, |sum, loss| sum + loss);
        self.count += 1;
        if self.count == self.interval {
            self.before = self.last;
            self.last = Some(both(self.sum, |sum| sum / self.count as f64));
            (self.count, self.sum) = (0, [0.0; 2]);
        }
        true
    }

    fn state(&self) -> Vec<(String, f64)> {
        let mut state = vec![("count".to_string(), self.count as f64)];
        push_pair(&mut state, "sum", self.sum);
        for (name, means) in [("last", self.last), ("before", self.before)] {
            if let Some(means) = means {
                push_pair(&mut state, name, means);
            }
        }
        state
    }

    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()> {
        let mut reader = StateReader::new(NAME, state);
        let (count, sum) = (reader.count("count")?, reader.pair("sum")?);
        let (last, before) = (reader.optional_pair("last")?, reader.optional_pair("before")?);
        reader.finish()?;
        *self = Self { count, sum, last, before, ..*self };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dwa() -> Dwa {
        Dwa::new(DwaOptions { interval: Some(3), ..Default::default() }, 100)
    }

    fn weights(dwa: &Dwa) -> Pair {
        dwa.weights(&Observed::losses([1.0; 2]))
    }

    /// Invariant 11: weights are 1 in the first two epochs and sum to 2 after them.
    #[test]
    fn invariant_11_two_epochs_of_ones() {
        let mut dwa = dwa();
        for epoch in 0..6 {
            for step in 0..3 {
                let falling = 4.0 * 0.5f64.powi(epoch) + 0.01 * step as f64;
                let w = weights(&dwa);
                if epoch < 2 {
                    assert_eq!(w, [1.0; 2]);
                } else {
                    approx::assert_relative_eq!(w[0] + w[1], 2.0, max_relative = 1e-12);
                    assert!(w[0] < w[1], "the loss that stays must weigh more: {w:?}");
                }
                assert!(dwa.step(&Observed::losses([falling, 1.0])));
            }
        }
    }

    #[test]
    fn ratios_by_hand() {
        let mut dwa = dwa();
        for losses in [[4.0, 1.0], [4.0, 1.0], [4.0, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]] {
            dwa.step(&Observed::losses(losses));
        }
        let (a, b) = ((0.5f64 / 2.0).exp(), (1.0f64 / 2.0).exp());
        let [task, teacher] = weights(&dwa);
        approx::assert_relative_eq!(task, 2.0 * a / (a + b), max_relative = 1e-12);
        approx::assert_relative_eq!(teacher, 2.0 * b / (a + b), max_relative = 1e-12);
    }

    /// Invariant 4: weights stay positive, and what is no number changes nothing.
    #[test]
    fn invariant_4_extreme_losses() {
        for loss in [0.0, 1e-30, 1e30] {
            let mut dwa = dwa();
            for i in 0..12 {
                dwa.step(&Observed::losses([if i < 3 { 1.0 } else { loss }, 1.0]));
                assert!(weights(&dwa).iter().all(|w| *w > 0.0 && w.is_finite()));
            }
        }
        let (mut dwa, before) = (dwa(), dwa().state());
        assert!(!dwa.step(&Observed::losses([f64::NAN, 1.0])));
        assert_eq!(dwa.state(), before);
    }

    /// Invariant 10: a stored state goes on bit by bit.
    #[test]
    fn invariant_10_state_round_trip() {
        let observed = |i: usize| Observed::losses([3.0 / (i + 1) as f64, 1.0 + 0.1 * i as f64]);
        for at in 0..12 {
            let mut whole = dwa();
            (0..at).for_each(|i| assert!(whole.step(&observed(i))));
            let mut other = dwa();
            other.load_state(&whole.state()).unwrap();
            for i in at..20 {
                assert_eq!(weights(&whole), weights(&other));
                whole.step(&observed(i));
                other.step(&observed(i));
            }
        }
    }
}
