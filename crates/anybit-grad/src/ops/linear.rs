//! `y = x Wᵀ + b`, every weight of a decoder; three GEMMs of the same size forward and backward.

use crate::tape::Pass;
use crate::tiles::{Operand, product, sum_rows};
use crate::{Tape, Tensor, Var};

/// `y = x Wᵀ + b` for `x` of any shape with `in` values per row; `y` is `[rows, out]`.
fn forward(x: &[f32], weight: &[f32], bias: Option<&[f32]>, y: &mut [f32], sizes: [usize; 3]) {
    let [rows, inp, out] = sizes;
    if let Some(bias) = bias {
        y.chunks_exact_mut(out).for_each(|y| y.copy_from_slice(bias));
    }
    let (x, weight) = (Operand::new(x, rows, inp), Operand::new(weight, out, inp));
    product(y, bias.is_some(), x, weight.t());
}

/// `dx = dy W`, `dW = dyᵀ x`, `db = Σ_rows dy`.
fn backward(pass: &mut Pass<'_>, x: Var, weight: Var, bias: Option<Var>, sizes: [usize; 3]) {
    let [rows, inp, out] = sizes;
    let dy = pass.grad();
    let dy_matrix = Operand::new(dy, rows, out);
    if pass.wants(x) {
        let mut dx = pass.take(x);
        let weight = Operand::new(pass.value(weight), out, inp);
        product(&mut dx.data, dx.accumulate, dy_matrix, weight);
        pass.put(x, dx);
    }
    if pass.wants(weight) {
        let mut dw = pass.take(weight);
        let x = Operand::new(pass.value(x), rows, inp);
        product(&mut dw.data, dw.accumulate, dy_matrix.t(), x);
        pass.put(weight, dw);
    }
    if let Some(bias) = bias.filter(|b| pass.wants(*b)) {
        let mut db = pass.take(bias);
        sum_rows(&mut db.data, db.accumulate, rows, |row, sum| {
            sum.iter_mut().zip(&dy[row * out..]).for_each(|(s, g)| *s += g);
        });
        pass.put(bias, db);
    }
}

impl Tape {
    /// `y = x Wᵀ + b`: `x` holds `rows · in` values, `weight` is `[out, in]`, `bias` holds `out`,
    /// `y` is `[rows, out]`.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    pub fn linear(&mut self, x: Var, weight: Var, bias: Option<Var>) -> Var {
        let (out, inp) = self.dims(weight);
        let rows = self.value(x).len() / inp;
        let sizes = [rows, inp, out];
        let mut y = self.buffer(rows * out);
        forward(self.data(x), self.data(weight), bias.map(|b| self.data(b)), &mut y, sizes);
        let inputs: Vec<Var> = [x, weight].into_iter().chain(bias).collect();
        self.custom(&inputs, Tensor::new([rows, out], y), move |pass| {
            backward(pass, x, weight, bias, sizes);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let (x, w, b) = (random(1, [7, 5]), random(2, [6, 5]), random(3, [6]));
        check_gradients(&[x.clone(), w.clone(), b], |t, v| t.linear(v[0], v[1], Some(v[2])));
        check_gradients(&[x, w], |t, v| t.linear(v[0], v[1], None));
        // More rows than one task of the bias sums up.
        let (x, w, b) = (random(4, [150, 3]), random(5, [2, 3]), random(6, [2]));
        check_gradients(&[x, w, b], |t, v| t.linear(v[0], v[1], Some(v[2])));
    }
}
