//! `a + b`, `a − b`, `a · b` of equal shapes, and `factor · a`.

use crate::tiles::{map, map2};
use crate::{Tape, Tensor, Var};

impl Tape {
    /// `f(a, b)`, elementwise, not yet recorded.
    fn zipped(&mut self, a: Var, b: Var, f: impl Fn(f32, f32) -> f32 + Send + Sync) -> Tensor {
        let shape = self.value(a).shape().to_vec();
        assert_eq!(shape, self.value(b).shape(), "shapes differ");
        let mut y = self.buffer(self.value(a).len());
        map2(&mut y, false, self.data(a), self.data(b), f);
        Tensor::new(shape, y)
    }

    /// `a + b`: `da = dy`, `db = dy`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn add(&mut self, a: Var, b: Var) -> Var {
        let y = self.zipped(a, b, |a, b| a + b);
        self.custom(&[a, b], y, move |pass| {
            let dy = pass.grad();
            pass.accumulate(a, dy, |g| g);
            pass.accumulate(b, dy, |g| g);
        })
    }

    /// `a − b`: `da = dy`, `db = −dy`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn sub(&mut self, a: Var, b: Var) -> Var {
        let y = self.zipped(a, b, |a, b| a - b);
        self.custom(&[a, b], y, move |pass| {
            let dy = pass.grad();
            pass.accumulate(a, dy, |g| g);
            pass.accumulate(b, dy, |g| -g);
        })
    }

    /// `a · b`, elementwise: `da = b · dy`, `db = a · dy`.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn mul(&mut self, a: Var, b: Var) -> Var {
        let y = self.zipped(a, b, |a, b| a * b);
        self.custom(&[a, b], y, move |pass| {
            let (dy, a_values, b_values) = (pass.grad(), pass.value(a), pass.value(b));
            pass.accumulate2(a, dy, b_values, |g, b| g * b);
            pass.accumulate2(b, dy, a_values, |g, a| g * a);
        })
    }

    /// `factor · a`: `da = factor · dy`.
    pub fn scale(&mut self, a: Var, factor: f32) -> Var {
        let shape = self.value(a).shape().to_vec();
        let mut y = self.buffer(self.value(a).len());
        map(&mut y, false, self.data(a), |v| factor * v);
        self.custom(&[a], Tensor::new(shape, y), move |pass| {
            let dy = pass.grad();
            pass.accumulate(a, dy, |g| factor * g);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let inputs = [random(1, [5, 4]), random(2, [5, 4])];
        check_gradients(&inputs, |t, v| t.add(v[0], v[1]));
        check_gradients(&inputs, |t, v| t.sub(v[0], v[1]));
        check_gradients(&inputs, |t, v| t.mul(v[0], v[1]));
        check_gradients(&inputs[..1], |t, v| t.mul(v[0], v[0]));
        check_gradients(&inputs[..1], |t, v| t.scale(v[0], -1.5));
    }
}
