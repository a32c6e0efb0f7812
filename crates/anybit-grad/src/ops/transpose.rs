//! `y = xᵀ`; for matrices that transforms are made of.

use rayon::prelude::*;

use crate::{Tape, Tensor, Var};

/// Rows of the result that one task writes: the columns it reads share cache lines.
const ROWS: usize = 16;

/// `y (+)= xᵀ` for `x: [rows, cols]`.
fn transpose(x: &[f32], (rows, cols): (usize, usize), y: &mut [f32], accumulate: bool) {
    if y.is_empty() {
        return;
    }
    y.par_chunks_mut(ROWS * rows).enumerate().for_each(|(tile, y)| {
        let width = y.len() / rows;
        for (i, x) in x.chunks_exact(cols).enumerate() {
            for (j, x) in x[tile * ROWS..][..width].iter().enumerate() {
                let y = &mut y[j * rows + i];
                *y = if accumulate { *y + *x } else { *x };
            }
        }
    });
}

impl Tape {
    /// `xᵀ`, `[cols, rows]` for `x: [rows, cols]`: `dx = dyᵀ`.
    ///
    /// # Panics
    /// When `x` is no matrix.
    pub fn transpose(&mut self, x: Var) -> Var {
        let (rows, cols) = self.dims(x);
        let mut y = self.buffer(rows * cols);
        transpose(self.data(x), (rows, cols), &mut y, false);
        self.custom(&[x], Tensor::new([cols, rows], y), move |pass| {
            if pass.wants(x) {
                let mut dx = pass.take(x);
                transpose(pass.grad(), (cols, rows), &mut dx.data, dx.accumulate);
                pass.put(x, dx);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn swaps_rows_and_columns() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 3], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let y = tape.transpose(x);
        assert_eq!(tape.dims(y), (3, 2));
        assert_eq!(tape.data(y), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        // More rows than a task writes, and a last task with fewer.
        let x = tape.constant(random(1, [7, 37]));
        let y = tape.transpose(x);
        let again = tape.transpose(y);
        assert_eq!(tape.value(again), tape.value(x));
    }

    #[test]
    fn gradients() {
        check_gradients(&[random(2, [5, 19])], |t, v| t.transpose(v[0]));
        // The gradient of the product is there before the transpose adds its own.
        check_gradients(&[random(3, [20, 4])], |t, v| {
            let transposed = t.transpose(v[0]);
            t.matmul(v[0], transposed)
        });
    }
}
