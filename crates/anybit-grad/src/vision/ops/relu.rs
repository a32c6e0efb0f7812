//! `y = max(x, 0)`: `dx = dy` where `x > 0`.

use crate::tiles::map;
use crate::{Tape, Tensor, Var};

impl Tape {
    /// `max(x, 0)`, elementwise; NaN stays NaN.
    pub fn relu(&mut self, x: Var) -> Var {
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(self.value(x).len());
        map(&mut y, false, self.data(x), |x| if x < 0.0 { 0.0 } else { x });
        self.custom(&[x], Tensor::new(shape, y), move |pass| {
            let (dy, values) = (pass.grad(), pass.value(x));
            pass.accumulate2(x, dy, values, |g, x| if x > 0.0 { g } else { 0.0 });
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        // Away from the kink, which a finite difference must not cross.
        let mut x = random(1, [6, 5]);
        x.data_mut().iter_mut().for_each(|x| *x += 0.1 * x.signum());
        check_gradients(&[x], |t, v| t.relu(v[0]));
    }
}
