//! Scalars: sum, mean, mean squared error. Sums run in f64 over chunks of fixed size.

use crate::tiles::total;
use crate::{Tape, Tensor, Var};

/// `Σ a`.
fn sum_of(a: &[f32]) -> f64 {
    total(a.len(), |range| a[range].iter().map(|v| *v as f64).sum())
}

/// `Σ (a − b)²`.
fn squared_distance(a: &[f32], b: &[f32]) -> f64 {
    total(a.len(), |range| {
        let pairs = a[range.clone()].iter().zip(&b[range]);
        pairs.map(|(a, b)| (*a as f64 - *b as f64).powi(2)).sum()
    })
}

impl Tape {
    /// `factor · Σ a`, a scalar: every element's gradient is `factor · dy`.
    fn scaled_sum(&mut self, a: Var, factor: f64) -> Var {
        let value = Tensor::scalar((sum_of(self.data(a)) * factor) as f32);
        self.custom(&[a], value, move |pass| {
            let step = pass.grad()[0] * factor as f32;
            let mut da = pass.take(a);
            da.ready().iter_mut().for_each(|d| *d += step);
            pass.put(a, da);
        })
    }

    /// `Σ a`, a scalar: `da = dy`.
    pub fn sum(&mut self, a: Var) -> Var {
        self.scaled_sum(a, 1.0)
    }

    /// `1/n Σ a`, a scalar: `da = dy / n`.
    pub fn mean(&mut self, a: Var) -> Var {
        let n = self.value(a).len().max(1);
        self.scaled_sum(a, 1.0 / n as f64)
    }

    /// `1/n Σ (a − b)²`, a scalar: `da = 2 (a − b) dy / n`, `db = −da`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn mse(&mut self, a: Var, b: Var) -> Var {
        assert_eq!(self.value(a).shape(), self.value(b).shape(), "shapes differ");
        let n = self.value(a).len().max(1) as f64;
        let loss = squared_distance(self.data(a), self.data(b)) / n;
        self.custom(&[a, b], Tensor::scalar(loss as f32), move |pass| {
            let factor = pass.grad()[0] * (2.0 / n) as f32;
            let (a_values, b_values) = (pass.value(a), pass.value(b));
            pass.accumulate2(a, a_values, b_values, |a, b| factor * (a - b));
            pass.accumulate2(b, a_values, b_values, |a, b| factor * (b - a));
        })
    }

    /// `Σ_i factor_i · scalar_i`, a scalar: how losses are mixed.
    ///
    /// # Panics
    /// When a term is no scalar.
    pub fn weighted_sum(&mut self, terms: &[(f32, Var)]) -> Var {
        let mut value = 0f64;
        for (factor, term) in terms {
            assert_eq!(self.value(*term).len(), 1, "a term is no scalar");
            value += *factor as f64 * self.data(*term)[0] as f64;
        }
        let inputs: Vec<Var> = terms.iter().map(|(_, term)| *term).collect();
        let terms = terms.to_vec();
        self.custom(&inputs, Tensor::scalar(value as f32), move |pass| {
            let dy = pass.grad();
            for (factor, term) in &terms {
                pass.accumulate(*term, dy, |g| factor * g);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let inputs = [random(1, [5, 4]), random(2, [5, 4])];
        check_gradients(&inputs[..1], |t, v| t.sum(v[0]));
        check_gradients(&inputs[..1], |t, v| t.mean(v[0]));
        check_gradients(&inputs, |t, v| t.mse(v[0], v[1]));
        check_gradients(&inputs, |t, v| {
            let (mse, mean) = (t.mse(v[0], v[1]), t.mean(v[0]));
            t.weighted_sum(&[(0.5, mse), (-2.0, mean)])
        });
    }

    #[test]
    fn sums_keep_their_digits() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([1 << 18], vec![0.1; 1 << 18]));
        let mean = tape.mean(x);
        assert_eq!(tape.data(mean), [0.1]);
    }
}
