//! [`Learned`]: weights `w_i(φ_i)` of two trained scalars, `L = Σ_i w_i(φ_i) L_i + R(φ_i)`.
//!
//! The losses are plain numbers in `∂L/∂φ_i`, so that the update needs no backward pass. Adam with a
//! constant learning rate, by default `max(1e-3, 20 / steps)`: it moves a scalar by about that much
//! per step, and equilibria lie several units from 1. Weights stay within bounds, because a loss
//! that reaches 0 (labels learned by heart, a student equal to its teacher) would drive its own
//! weight to infinity. Called by `gor` and `uncertainty`, which differ in [`Rule`] alone.

use std::fmt::Debug;
use std::marker::PhantomData;

use serde::{Deserialize, Serialize};

use super::state::{ScalarAdam, StateReader, push_pair};
use super::{Balancer, Needs, Observed, Pair, both, sum_to_two, zip};
use crate::distill::error::{Result, check_setting};

/// Least first loss by which losses are divided.
const LEAST_UNIT: f64 = 1e-6;

/// First values of the scalars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum First {
    /// Those of the method's reference code.
    #[default]
    Reference,
    /// The equilibrium of the mean losses of the first batches.
    Equilibrium,
}

/// Settings of learned weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LearnedOptions {
    /// Learning rate of the scalars; by default `max(1e-3, 20 / steps)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// First values of the scalars.
    pub first: First,
    /// Batches over which `first = "equilibrium"` takes the mean.
    pub batches: u64,
    /// Whether weights are scaled to sum to 2, so that the learning rate of the student keeps its
    /// meaning. Adam removes a common factor anyway, SGD does not.
    pub normalise: bool,
    /// Whether losses are divided by their first values, which removes their units.
    pub per_first_loss: bool,
    /// Least weight.
    pub w_min: f64,
    /// Largest weight.
    pub w_max: f64,
}

impl Default for LearnedOptions {
    fn default() -> Self {
        Self {
            lr: None,
            first: First::Reference,
            batches: 10,
            normalise: false,
            per_first_loss: false,
            w_min: 1e-8,
            w_max: 20.0,
        }
    }
}

impl LearnedOptions {
    /// Checks every setting of the balancer `place`.
    pub(super) fn validate(&self, place: &'static str) -> Result<()> {
        if let Some(lr) = self.lr {
            check_setting(place, "lr", lr, lr >= 0.0, "it must not be negative")?;
        }
        let batches = self.batches as f64;
        check_setting(place, "batches", batches, self.batches > 0, "at least 1 is needed")?;
        check_setting(place, "w_min", self.w_min, self.w_min > 0.0, "it must be above 0")?;
        let above = self.w_max > self.w_min;
        check_setting(place, "w_max", self.w_max, above, "it must be above w_min")
    }
}

/// What a method says of one scalar `φ`.
pub(super) trait Rule: Debug + Send {
    /// The method in recipes.
    const NAME: &'static str;
    /// The scalar's name.
    const SYMBOL: &'static str;
    /// Its first value.
    const FIRST: f64;
    /// `w(φ)`, falling in `φ`.
    fn weight(phi: f64) -> f64;
    /// `φ` of a weight.
    fn of_weight(weight: f64) -> f64;
    /// `∂(w L + R)/∂φ`.
    fn gradient(phi: f64, loss: f64) -> f64;
    /// Where that is 0.
    fn equilibrium(loss: f64) -> f64;
}

/// Two scalars in training.
#[derive(Debug, Clone)]
pub(super) struct Learned<R> {
    options: LearnedOptions,
    phi: Pair,
    adam: ScalarAdam,
    /// Batches in `mean`.
    seen: u64,
    mean: Pair,
    /// First losses.
    units: Option<Pair>,
    rule: PhantomData<R>,
}

impl<R: Rule> Learned<R> {
    /// Scalars at their first values, for a training of `steps`.
    pub fn new(options: LearnedOptions, steps: u64) -> Self {
        let lr = options.lr.unwrap_or((20.0 / steps.max(1) as f64).max(1e-3));
        let adam = ScalarAdam::new(lr);
        let (mean, units, rule) = ([0.0; 2], None, PhantomData);
        let mut new = Self { options, phi: [R::FIRST; 2], adam, seen: 0, mean, units, rule };
        new.phi = both(new.phi, |phi| new.bounded(phi));
        new
    }

    /// `φ` such that its weight is within bounds.
    fn bounded(&self, phi: f64) -> f64 {
        phi.clamp(R::of_weight(self.options.w_max), R::of_weight(self.options.w_min))
    }

    /// What losses are divided by.
    fn units(&self, observed: &Observed) -> Pair {
        if !self.options.per_first_loss {
            return [1.0; 2];
        }
        match self.units {
            Some(units) => units,
            None if observed.is_finite() => both(observed.losses, |l| l.max(LEAST_UNIT)),
            None => [1.0; 2],
        }
    }

    /// The equilibrium of losses that may be slightly negative by rounding.
    fn equilibrium(&self, losses: Pair) -> Pair {
        both(losses, |loss| self.bounded(R::equilibrium(loss.max(0.0))))
    }

    /// Whether the scalars still follow the mean of the first batches.
    fn starting(&self) -> bool {
        self.options.first == First::Equilibrium && self.seen < self.options.batches
    }
}

impl<R: Rule> Balancer for Learned<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }

    fn needs(&self) -> Needs {
        Needs::Losses
    }

    fn weights(&self, observed: &Observed) -> Pair {
        let units = self.units(observed);
        let phi = match self.starting() && self.seen == 0 && observed.is_finite() {
            true => self.equilibrium(zip(observed.losses, units, |loss, unit| loss / unit)),
            false => self.phi,
        };
        let weights = zip(phi, units, |phi, unit| R::weight(phi) / unit);
        if self.options.normalise { sum_to_two(weights) } else { weights }
    }

    fn step(&mut self, observed: &Observed) -> bool {
        if !observed.is_finite() {
            return false;
        }
        let units = self.units(observed);
        if self.options.per_first_loss {
            self.units = Some(units);
        }
        let losses = zip(observed.losses, units, |loss, unit| loss / unit);
        if self.starting() {
            self.seen += 1;
            let count = self.seen as f64;
            self.mean = zip(self.mean, losses, |mean, loss| mean + (loss - mean) / count);
            self.phi = self.equilibrium(self.mean);
            return true;
        }
        let grads = zip(self.phi, losses, R::gradient);
        self.adam.step(&mut self.phi, grads);
        self.phi = both(self.phi, |phi| self.bounded(phi));
        true
    }

    fn state(&self) -> Vec<(String, f64)> {
        let mut state = vec![("seen".to_string(), self.seen as f64)];
        push_pair(&mut state, R::SYMBOL, self.phi);
        push_pair(&mut state, "mean", self.mean);
        if let Some(units) = self.units {
            push_pair(&mut state, "first_loss", units);
        }
        self.adam.save(&mut state);
        state
    }

    fn load_state(&mut self, state: &[(String, f64)]) -> Result<()> {
        let mut reader = StateReader::new(R::NAME, state);
        let (seen, phi) = (reader.count("seen")?, reader.pair(R::SYMBOL)?);
        let (mean, units) = (reader.pair("mean")?, reader.optional_pair("first_loss")?);
        let adam = self.adam.load(&mut reader)?;
        reader.finish()?;
        let (options, rule) = (self.options, PhantomData);
        *self = Self { options, phi, adam, seen, mean, units, rule };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::gor::LiebelKoerner;
    use super::super::uncertainty::Kendall;
    use super::*;

    fn options() -> LearnedOptions {
        LearnedOptions { lr: Some(1e-2), ..Default::default() }
    }

    /// Runs `losses` one after another.
    fn run<R: Rule>(
        balancer: &mut Learned<R>,
        losses: impl IntoIterator<Item = Pair>,
    ) -> Vec<Pair> {
        let one = |losses| {
            let observed = Observed::losses(losses);
            let weights = balancer.weights(&observed);
            balancer.step(&observed);
            weights
        };
        losses.into_iter().map(one).collect()
    }

    fn stream(n: usize) -> Vec<Pair> {
        let noise = crate::testing::normals(3, 2 * n);
        let loss = |i: usize, scale: f64| scale * (1.0 + 0.3 * noise[i].tanh() as f64);
        (0..n).map(|i| [loss(2 * i, 3.0), loss(2 * i + 1, 0.4)]).collect()
    }

    /// Invariant 4: weights are positive and finite, and what is no number changes nothing.
    fn survives<R: Rule>() {
        for options in [
            options(),
            LearnedOptions { normalise: true, ..options() },
            LearnedOptions { first: First::Equilibrium, ..options() },
            LearnedOptions { per_first_loss: true, first: First::Equilibrium, ..options() },
        ] {
            for loss in [0.0, 1e-30, 1e30] {
                let mut balancer = Learned::<R>::new(options, 100);
                for weights in run(&mut balancer, vec![[loss, 1.0]; 200]) {
                    assert!(weights.iter().all(|w| *w > 0.0 && w.is_finite()), "{weights:?}");
                }
            }
            for bad in [f64::NAN, f64::INFINITY] {
                let mut balancer = Learned::<R>::new(options, 100);
                let observed = Observed::losses([bad, 1.0]);
                let before = balancer.state();
                assert!(!balancer.step(&observed));
                assert_eq!(before, balancer.state());
                assert!(balancer.weights(&observed).iter().all(|w| *w > 0.0 && w.is_finite()));
            }
        }
    }

    #[test]
    fn invariant_4_extreme_losses() {
        survives::<LiebelKoerner>();
        survives::<Kendall>();
    }

    /// Invariant 6: swapped losses, swapped weights; equal losses, equal weights.
    #[test]
    fn invariant_6_symmetry() {
        let mut a = Learned::<LiebelKoerner>::new(options(), 100);
        let mut b = a.clone();
        let swapped = stream(50).into_iter().map(|[task, teacher]| [teacher, task]);
        let (a, b) = (run(&mut a, stream(50)), run(&mut b, swapped));
        assert!(a.iter().zip(&b).all(|(a, b)| *a == [b[1], b[0]]));
        let mut equal = Learned::<Kendall>::new(options(), 100);
        assert!(run(&mut equal, vec![[1.7; 2]; 50]).iter().all(|w| w[0] == w[1]));
    }

    /// Invariant 8: at a learning rate of 0, σ = 1 and normalized, weights are those of 1:1.
    #[test]
    fn invariant_8_nothing_learned_is_one_to_one() {
        let options = LearnedOptions { lr: Some(0.0), normalise: true, ..Default::default() };
        let mut balancer = Learned::<LiebelKoerner>::new(options, 100);
        assert!(run(&mut balancer, stream(20)).iter().all(|w| *w == [1.0, 1.0]));
    }

    /// Invariant 9: normalized weights sum to 2.
    #[test]
    fn invariant_9_weights_sum_to_two() {
        for per_first_loss in [false, true] {
            let options = LearnedOptions { normalise: true, per_first_loss, ..options() };
            let mut balancer = Learned::<LiebelKoerner>::new(options, 100);
            for weights in run(&mut balancer, stream(100)) {
                approx::assert_relative_eq!(weights[0] + weights[1], 2.0, max_relative = 1e-12);
            }
        }
    }

    /// Invariant 10: what goes on from a stored state goes on bit by bit.
    #[test]
    fn invariant_10_state_round_trip() {
        for first in [First::Reference, First::Equilibrium] {
            for at in [0, 3, 10, 40] {
                let options = LearnedOptions { first, per_first_loss: true, ..options() };
                let losses = stream(60);
                let mut whole = Learned::<Kendall>::new(options, 60);
                let want = run(&mut whole, losses.clone());
                let mut head = Learned::<Kendall>::new(options, 60);
                run(&mut head, losses[..at].to_vec());
                let text = serde_json::to_string(&head.state()).unwrap();
                let state: Vec<(String, f64)> = serde_json::from_str(&text).unwrap();
                let mut tail = Learned::<Kendall>::new(options, 60);
                tail.load_state(&state).unwrap();
                assert_eq!(run(&mut tail, losses[at..].to_vec()), want[at..]);
                assert_eq!(tail.state(), whole.state());
            }
        }
    }

    #[test]
    fn a_state_of_another_balancer_is_refused() {
        let state = Learned::<Kendall>::new(options(), 60).state();
        let mut gor = Learned::<LiebelKoerner>::new(options(), 60);
        let before = gor.state();
        let error = gor.load_state(&state).unwrap_err().to_string();
        assert!(error.contains("gor") && error.contains("sigma.task is missing"), "{error}");
        let mut more = before.clone();
        more.push(("more".into(), 1.0));
        assert!(gor.load_state(&more).unwrap_err().to_string().contains("more is not known"));
        let mut bad = before.clone();
        bad[1].1 = f64::NAN;
        assert!(gor.load_state(&bad).unwrap_err().to_string().contains("sigma.task is NaN"));
        assert_eq!(gor.state(), before);
    }

    #[test]
    fn dividing_by_first_losses_removes_their_units() {
        let run_scaled = |scale: f64| {
            let options = LearnedOptions { per_first_loss: true, ..options() };
            let mut balancer = Learned::<LiebelKoerner>::new(options, 100);
            let losses = stream(50).into_iter().map(|[task, teacher]| [task, scale * teacher]);
            run(&mut balancer, losses)
        };
        for (a, b) in run_scaled(1.0).iter().zip(run_scaled(1024.0)) {
            approx::assert_relative_eq!(a[0], b[0], max_relative = 1e-12);
            approx::assert_relative_eq!(a[1], b[1] * 1024.0, max_relative = 1e-12);
        }
    }

    #[test]
    fn adam_reaches_the_equilibrium() {
        let options = LearnedOptions { lr: Some(1e-2), ..Default::default() };
        let mut balancer = Learned::<LiebelKoerner>::new(options, 100);
        let weights = run(&mut balancer, vec![[5.0, 0.1]; 4000]);
        let last = weights[weights.len() - 1];
        approx::assert_relative_eq!(last[0], 0.1531, max_relative = 0.02);
        approx::assert_relative_eq!(last[1], 2.0, max_relative = 0.02);
    }
}
