//! Fixed weights `(w_task, w_teacher)`: the baseline of every balancer.
//!
//! (1, 1) is the sum of both losses, (1 − a, a) Hinton's mixture (arXiv 1503.02531), (0, 1) the
//! teacher alone as LLM-QAT, BitDistiller and SQAKD train, (1, 0) training without a teacher. A loss
//! of weight 0 need not be computed.

use serde::{Deserialize, Serialize};

use super::state::StateReader;
use super::{Balancer, Needs, Observed, Pair};
use crate::distill::error::{Result, check_setting};

const NAME: &str = "fixed";

/// Weights that stay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FixedOptions {
    /// Of the task's loss.
    pub task: f64,
    /// Of the teacher's.
    pub teacher: f64,
}

impl Default for FixedOptions {
    fn default() -> Self {
        Self { task: 1.0, teacher: 1.0 }
    }
}

impl FixedOptions {
    pub(super) fn validate(&self) -> Result<()> {
        let fix = "it must not be negative";
        check_setting(NAME, "task", self.task, self.task >= 0.0, fix)?;
        check_setting(NAME, "teacher", self.teacher, self.teacher >= 0.0, fix)?;
        let sum = self.task + self.teacher;
        check_setting(NAME, "task + teacher", sum, sum > 0.0, "one of them must be above 0")
    }
}

/// The balancer of [`FixedOptions`].
#[derive(Debug, Clone)]
pub(super) struct Fixed(pub FixedOptions);

impl Balancer for Fixed {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        Needs::Losses
    }

    fn weights(&self, _observed: &Observed) -> Pair {
        [self.0.task, self.0.teacher]
    }

    fn step(&mut self, observed: &Observed) -> bool {
        observed.is_finite()
    }

    fn state(&self) -> Vec<(String, f64)> {
        Vec::new()
    }

    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()> {
        StateReader::new(NAME, state).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 8, the weights' part: a mixture of 0 is the task alone, of 1 the teacher alone.
    #[test]
    fn invariant_8_one_loss_alone() {
        for (options, want) in [
            (FixedOptions { task: 1.0, teacher: 0.0 }, [1.0, 0.0]),
            (FixedOptions { task: 0.0, teacher: 1.0 }, [0.0, 1.0]),
        ] {
            options.validate().unwrap();
            let mut fixed = Fixed(options);
            let observed = Observed::losses([2.0, 3.0]);
            assert!(fixed.step(&observed) && fixed.state().is_empty());
            assert_eq!(fixed.weights(&observed), want);
            fixed.load_state(&[]).unwrap();
            assert!(!fixed.step(&Observed::losses([f64::NAN, 1.0])));
        }
        for (task, teacher) in [(-1.0, 1.0), (0.0, 0.0), (f64::NAN, 1.0)] {
            assert!(FixedOptions { task, teacher }.validate().is_err());
        }
    }
}
