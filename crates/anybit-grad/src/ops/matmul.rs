//! `C = A B` of two matrices; for transforms of weights and activations while they are learned.

use crate::tape::Pass;
use crate::tiles::{Operand, product};
use crate::{Tape, Tensor, Var};

/// `C = A B`, sizes `[m, inner, n]`.
fn forward(a: &[f32], b: &[f32], c: &mut [f32], [m, inner, n]: [usize; 3]) {
    product(c, false, Operand::new(a, m, inner), Operand::new(b, inner, n));
}

/// `dA = dC Bᵀ`, `dB = Aᵀ dC`.
fn backward(pass: &mut Pass<'_>, a: Var, b: Var, [m, inner, n]: [usize; 3]) {
    let dc = Operand::new(pass.grad(), m, n);
    if pass.wants(a) {
        let mut da = pass.take(a);
        let b = Operand::new(pass.value(b), inner, n);
        product(&mut da.data, da.accumulate, dc, b.t());
        pass.put(a, da);
    }
    if pass.wants(b) {
        let mut db = pass.take(b);
        let a = Operand::new(pass.value(a), m, inner);
        product(&mut db.data, db.accumulate, a.t(), dc);
        pass.put(b, db);
    }
}

impl Tape {
    /// `A B` for `a: [m, inner]` and `b: [inner, n]`.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    pub fn matmul(&mut self, a: Var, b: Var) -> Var {
        let ((m, inner), (b_rows, n)) = (self.dims(a), self.dims(b));
        assert_eq!(inner, b_rows, "inner dimensions differ");
        let sizes = [m, inner, n];
        let mut c = self.buffer(m * n);
        forward(self.data(a), self.data(b), &mut c, sizes);
        self.custom(&[a, b], Tensor::new([m, n], c), move |pass| backward(pass, a, b, sizes))
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let (a, b) = (random(1, [7, 5]), random(2, [5, 6]));
        check_gradients(&[a, b], |t, v| t.matmul(v[0], v[1]));
        // A matrix times itself: both gradients meet in one buffer.
        check_gradients(&[random(3, [4, 4])], |t, v| t.matmul(v[0], v[0]));
    }
}
