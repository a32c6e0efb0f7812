//! GPTQ's error feedback (Frantar et al., ICLR 2023) onto codebooks. With upper triangular `U`,
//! `H⁻¹ = UᵀU`, for columns `j` in rounding order:
//!
//! ```text
//! q_j = nearest_c(w_j)      e_j = (w_j − q_j) / U_jj      w_{j+1..} −= e_j · U_{j, j+1..}
//! ```

use rayon::prelude::*;

use super::codebook::Book;
use super::{BLOCK, ROWS};
use crate::linalg::{View, inverse_cholesky, matmul};
use crate::{Gram, Matrix, Result};

/// What error feedback needs of a Gram matrix.
pub(super) struct Feedback {
    /// Column that is rounded at each step.
    order: Vec<usize>,
    /// Inputs that never fire; they keep no weight.
    dead: Vec<bool>,
    u: Matrix,
}

impl Feedback {
    pub(super) fn new(gram: &Gram, damp: f64, act_order: bool) -> Result<Self> {
        let (diagonal, dead) = (gram.diagonal(), gram.dead());
        let mut order: Vec<usize> = (0..gram.size()).collect();
        if act_order {
            order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
        }
        let mut damped = gram.permuted(&order);
        for (j, &column) in order.iter().enumerate() {
            if dead[column] {
                damped.set(j, j, 1.0);
            }
        }
        let (u, _) = inverse_cholesky(&damped, damp)?;
        Ok(Self { order, dead, u })
    }

    pub(super) fn round(&self, weights: &Matrix, books: &[Book]) -> Vec<u8> {
        let m = weights.cols;
        let mut labels = vec![0u8; weights.data.len()];
        labels.par_chunks_mut(ROWS * m.max(1)).enumerate().for_each(|(chunk, labels)| {
            let first = chunk * ROWS;
            self.round_rows(weights, &books[first..], first, labels);
        });
        labels
    }

    /// Labels of the rows from `first`, as many as `labels` holds.
    fn round_rows(&self, weights: &Matrix, books: &[Book], first: usize, labels: &mut [u8]) {
        let m = weights.cols;
        let count = labels.len() / m;
        let mut w = vec![0f32; labels.len()];
        for (r, w) in w.chunks_exact_mut(m).enumerate() {
            let source = weights.row(first + r);
            for (w, &column) in w.iter_mut().zip(&self.order) {
                *w = if self.dead[column] { 0.0 } else { source[column] };
            }
        }
        let mut errors = vec![0f32; count * BLOCK];
        for start in (0..m).step_by(BLOCK) {
            let len = BLOCK.min(m - start);
            let rows = w.chunks_exact_mut(m).zip(labels.chunks_exact_mut(m)).zip(books);
            for (((w, labels), book), errors) in rows.zip(errors.chunks_exact_mut(BLOCK)) {
                self.round_block(book, w, labels, start, &mut errors[..len]);
            }
            let rest = start + len;
            if rest < m {
                let lhs = View::rows(&errors, count, len, BLOCK);
                let rhs = View::rows(&self.u.data[start * m + rest..], len, m - rest, m);
                matmul(&mut w[rest..], m, true, -1.0, lhs, rhs);
            }
        }
    }

    fn round_block(
        &self,
        book: &Book,
        w: &mut [f32],
        labels: &mut [u8],
        start: usize,
        errors: &mut [f32],
    ) {
        let end = start + errors.len();
        for j in start..end {
            let label = book.nearest(w[j]);
            labels[self.order[j]] = label;
            let u = &self.u.row(j)[j..end];
            let error = (w[j] - book.values[label as usize]) / u[0];
            w[j + 1..end].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= error * u);
            errors[j - start] = error;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::lnq::feedback_labels;
    use crate::rng::SplitMix64;
    use crate::rounding::{GptqOptions, gptq};
    use crate::{Gram, GridSpec, GroupGrid, Matrix, QuantizedMatrix, ScaleFit};

    /// With the values of an affine grid as codebook, feedback is GPTQ itself.
    #[test]
    fn affine_codebooks_give_gptq() {
        let mut rng = SplitMix64::new(23);
        let (n, m) = (40, 200);
        let w = (0..n * m).map(|_| rng.normal() as f32).collect();
        let w = Matrix::from_vec(n, m, w).unwrap();
        let mut x: Vec<f32> = (0..3 * m * m).map(|_| rng.normal() as f32).collect();
        for token in x.chunks_mut(m) {
            let shared = rng.normal() as f32;
            token.iter_mut().enumerate().for_each(|(j, x)| *x += shared * (j % 5) as f32);
            token[9] = 0.0;
        }
        let mut gram = Gram::new(m);
        gram.add(&x);
        let spec = GridSpec::affine(3, false, None);
        let options = GptqOptions { damp: 0.01, act_order: true, fit: ScaleFit::MinMax };
        let plane = gptq(&w, &gram, spec, options).unwrap().plane;
        let want = QuantizedMatrix::single(plane).dequantize();
        // In falling order, to see that labels refer to the codebook as it was given.
        let codebooks: Vec<Vec<f32>> = (0..n)
            .map(|i| {
                let grid = GroupGrid::fit(spec, w.row(i), ScaleFit::MinMax).unwrap();
                (0..8).rev().map(|code| grid.decode(code)).collect()
            })
            .collect();
        let labels = feedback_labels(&w, &codebooks, &gram, 0.01, true).unwrap();
        let differ = (0..n)
            .filter(|&i| {
                let labels = labels[i * m..(i + 1) * m].iter();
                labels.zip(want.row(i)).any(|(l, q)| codebooks[i][*l as usize] != *q)
            })
            .count();
        // A value that is on a border up to rounding may fall to either side.
        assert!(differ <= 1, "{differ} rows differ");
    }
}
