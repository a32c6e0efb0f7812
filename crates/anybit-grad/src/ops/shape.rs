//! The same values in another shape; the buffer is shared.

use crate::{Tape, Var};

impl Tape {
    /// `a` as `shape`: `da = dy`.
    ///
    /// # Panics
    /// When the number of values differs.
    pub fn reshape(&mut self, a: Var, shape: impl Into<Vec<usize>>) -> Var {
        let y = self.value(a).reshaped(shape);
        self.custom(&[a], y, move |pass| {
            let dy = pass.grad();
            pass.accumulate(a, dy, |g| g);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        check_gradients(&[random(1, [4, 6]), random(2, [3, 8])], |t, v| {
            let a = t.reshape(v[0], [8, 3]);
            t.matmul(a, v[1])
        });
    }
}
