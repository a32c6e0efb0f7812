//! What balancers have in common: Adam on two scalars in f64, without weight decay, and their state
//! as a flat list of named numbers.

use super::Pair;
use crate::distill::error::{DistillError, Result};

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// Names of the two losses in a state.
const LOSSES: [&str; 2] = ["task", "teacher"];

/// Adam (Kingma and Ba, 2015) on two scalars. Decay would pull them to 0, where weights have their
/// pole, so there is none.
#[derive(Debug, Clone)]
pub(super) struct ScalarAdam {
    lr: f64,
    steps: u64,
    mean: Pair,
    square: Pair,
}

impl ScalarAdam {
    /// One that has seen nothing yet.
    pub fn new(lr: f64) -> Self {
        Self { lr, steps: 0, mean: [0.0; 2], square: [0.0; 2] }
    }

    /// Moves `values` one step.
    pub fn step(&mut self, values: &mut Pair, grads: Pair) {
        self.steps += 1;
        let bias = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let (bias1, bias2) = (bias(BETA1), bias(BETA2));
        for (i, grad) in grads.into_iter().enumerate() {
            self.mean[i] += (1.0 - BETA1) * (grad - self.mean[i]);
            self.square[i] += (1.0 - BETA2) * (grad * grad - self.square[i]);
            let size = (self.square[i] / bias2).sqrt() + EPS;
            values[i] -= self.lr * (self.mean[i] / bias1) / size;
        }
    }

    /// Adds its state.
    pub fn save(&self, state: &mut Vec<(String, f64)>) {
        state.push(("adam.steps".into(), self.steps as f64));
        push_pair(state, "adam.m", self.mean);
        push_pair(state, "adam.v", self.square);
    }

    /// One with the learning rate of `self` and the state that [`Self::save`] gave.
    pub fn load(&self, reader: &mut StateReader<'_>) -> Result<Self> {
        Ok(Self {
            lr: self.lr,
            steps: reader.count("adam.steps")?,
            mean: reader.pair("adam.m")?,
            square: reader.pair("adam.v")?,
        })
    }
}

/// Adds `name.task` and `name.teacher`.
pub(super) fn push_pair(state: &mut Vec<(String, f64)>, name: &str, pair: Pair) {
    state.extend(LOSSES.iter().zip(pair).map(|(loss, value)| (format!("{name}.{loss}"), value)));
}

/// Takes named numbers out of a stored state.
pub(super) struct StateReader<'a> {
    balancer: &'static str,
    left: Vec<(&'a str, f64)>,
}

impl<'a> StateReader<'a> {
    /// A reader for `balancer`.
    pub fn new(balancer: &'static str, state: &'a [(String, f64)]) -> Self {
        Self { balancer, left: state.iter().map(|(name, value)| (name.as_str(), *value)).collect() }
    }

    fn fail<T>(&self, what: String) -> Result<T> {
        Err(DistillError::State { balancer: self.balancer, what })
    }

    /// Whether `name` is there.
    pub fn has(&self, name: &str) -> bool {
        self.left.iter().any(|(other, _)| *other == name)
    }

    /// The number `name`.
    pub fn take(&mut self, name: &str) -> Result<f64> {
        let Some(at) = self.left.iter().position(|(other, _)| *other == name) else {
            return self.fail(format!("{name} is missing"));
        };
        let (_, value) = self.left.swap_remove(at);
        match value.is_finite() {
            true => Ok(value),
            false => self.fail(format!("{name} is {value}")),
        }
    }

    /// The natural number `name`.
    pub fn count(&mut self, name: &str) -> Result<u64> {
        let value = self.take(name)?;
        match value >= 0.0 && value.fract() == 0.0 {
            true => Ok(value as u64),
            false => self.fail(format!("{name} = {value} is no count")),
        }
    }

    /// `name.task` and `name.teacher`.
    pub fn pair(&mut self, name: &str) -> Result<Pair> {
        let mut pair = [0.0; 2];
        for (value, loss) in pair.iter_mut().zip(LOSSES) {
            *value = self.take(&format!("{name}.{loss}"))?;
        }
        Ok(pair)
    }

    /// [`Self::pair`], or `None` when there is none.
    pub fn optional_pair(&mut self, name: &str) -> Result<Option<Pair>> {
        match self.has(&format!("{name}.{}", LOSSES[0])) {
            true => self.pair(name).map(Some),
            false => Ok(None),
        }
    }

    /// Fails when something is left.
    pub fn finish(self) -> Result<()> {
        match self.left.first() {
            Some((name, _)) => self.fail(format!("{name} is not known")),
            None => Ok(()),
        }
    }
}
