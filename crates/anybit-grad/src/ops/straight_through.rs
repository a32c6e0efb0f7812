//! `y = f(x)` with the gradient of the identity: how a rounding is trained through.

use crate::{Tape, Tensor, Var};

impl Tape {
    /// `y = f(x)`, where `f(x, y)` fills `y`; `dx = dy`.
    pub fn straight_through(&mut self, x: Var, f: impl FnOnce(&[f32], &mut [f32])) -> Var {
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(self.value(x).len());
        f(self.data(x), &mut y);
        self.custom(&[x], Tensor::new(shape, y), move |pass| {
            let dy = pass.grad();
            pass.accumulate(x, dy, |g| g);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_forward_and_not_backward() {
        let mut tape = Tape::default();
        let x = tape.leaf(Tensor::new([3], vec![0.4, 1.6, -2.5]), true);
        let y = tape.straight_through(x, |x, y| {
            y.iter_mut().zip(x).for_each(|(y, x)| *y = x.round_ties_even());
        });
        let z = tape.mul(y, y);
        tape.backward_from(z, &[1.0; 3]);
        assert_eq!(tape.data(y), [0.0, 2.0, -2.0]);
        assert_eq!(tape.grad(x).unwrap(), [0.0, 4.0, -4.0]);
    }
}
