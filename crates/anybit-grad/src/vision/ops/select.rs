//! Some columns of a matrix: `y_rk = x_{r, first + k}`, `dx` is `dy` there and 0 elsewhere.

use std::ops::Range;

use crate::{Tape, Tensor, Var};

impl Tape {
    /// The columns `range` of `x: [rows, cols]`.
    ///
    /// # Panics
    /// When `x` is no matrix or has no such columns.
    pub fn select_columns(&mut self, x: Var, range: Range<usize>) -> Var {
        let ((rows, cols), width) = (self.dims(x), range.len());
        assert!(width > 0 && range.end <= cols, "there are no columns {range:?} of {cols}");
        let mut y = self.buffer(rows * width);
        for (y, x) in y.chunks_exact_mut(width).zip(self.data(x).chunks_exact(cols)) {
            y.copy_from_slice(&x[range.clone()]);
        }
        self.custom(&[x], Tensor::new([rows, width], y), move |pass| {
            let dy = pass.grad();
            let mut dx = pass.take(x);
            for (dx, dy) in dx.ready().chunks_exact_mut(cols).zip(dy.chunks_exact(width)) {
                dx[range.clone()].iter_mut().zip(dy).for_each(|(d, g)| *d += g);
            }
            pass.put(x, dx);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn parts_of_rows() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let y = tape.select_columns(x, 1..3);
        assert_eq!((tape.dims(y), tape.data(y)), ((2, 2), &[2.0, 3.0, 5.0, 6.0][..]));
        // Columns that are used twice collect both gradients.
        check_gradients(&[random(1, [4, 5])], |t, v| {
            let (a, b) = (t.select_columns(v[0], 0..3), t.select_columns(v[0], 2..5));
            t.mul(a, b)
        });
    }
}
