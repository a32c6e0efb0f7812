//! GPTQ's error feedback (Frantar et al., ICLR 2023) onto codebooks. With upper triangular `U`,
//! `H⁻¹ = UᵀU`, for columns `j` in rounding order:
//!
//! ```text
//! q_j = nearest_c(w_j)      e_j = (w_j − q_j) / U_jj      w_{j+1..} −= e_j · U_{j, j+1..}
//! ```

use rayon::prelude::*;

use super::{BLOCK, ROWS, RowGrid};
use crate::Matrix;
use crate::linalg::{View, matmul};
use crate::rounding::GptqFactor;

/// Codes of one pass of error feedback, `[n, m]`, and `Σ_j e_j²` of each row, which is its output
/// error under the damped `H` (SKIM's specification, 4.5, step 6).
pub fn feedback(weights: &Matrix, grids: &[RowGrid], factor: &GptqFactor) -> (Vec<u8>, Vec<f64>) {
    let m = weights.cols;
    let mut codes = vec![0u8; weights.data.len()];
    let losses: Vec<Vec<f64>> = codes
        .par_chunks_mut(ROWS * m.max(1))
        .enumerate()
        .map(|(chunk, codes)| {
            let first = chunk * ROWS;
            round_rows(factor, weights, &grids[first..], first, codes)
        })
        .collect();
    (codes, losses.concat())
}

/// Rounds the rows from `first`, as many as `codes` holds; returns their losses.
fn round_rows(
    factor: &GptqFactor,
    weights: &Matrix,
    grids: &[RowGrid],
    first: usize,
    codes: &mut [u8],
) -> Vec<f64> {
    let m = weights.cols;
    let count = codes.len() / m;
    let mut w = vec![0f32; codes.len()];
    for (r, w) in w.chunks_exact_mut(m).enumerate() {
        let source = weights.row(first + r);
        for (w, &column) in w.iter_mut().zip(&factor.order) {
            *w = if factor.dead[column] { 0.0 } else { source[column] };
        }
    }
    let mut errors = vec![0f32; count * BLOCK];
    let mut losses = vec![0f64; count];
    for start in (0..m).step_by(BLOCK) {
        let len = BLOCK.min(m - start);
        let rows = w.chunks_exact_mut(m).zip(codes.chunks_exact_mut(m)).zip(grids);
        let outs = errors.chunks_exact_mut(BLOCK).zip(&mut losses);
        for (((w, codes), grid), (errors, loss)) in rows.zip(outs) {
            *loss += round_block(factor, grid, w, codes, start, &mut errors[..len]);
        }
        let rest = start + len;
        if rest < m {
            let lhs = View::rows(&errors, count, len, BLOCK);
            let rhs = View::rows(&factor.u.data[start * m + rest..], len, m - rest, m);
            matmul(&mut w[rest..], m, true, -1.0, lhs, rhs);
        }
    }
    losses
}

fn round_block(
    factor: &GptqFactor,
    grid: &RowGrid,
    w: &mut [f32],
    codes: &mut [u8],
    start: usize,
    errors: &mut [f32],
) -> f64 {
    let end = start + errors.len();
    let mut loss = 0f64;
    for j in start..end {
        let column = factor.order[j];
        let code = grid.nearest(column, w[j]);
        codes[column] = code;
        let u = &factor.u.row(j)[j..end];
        let error = (w[j] - grid.value(column, code)) / u[0];
        w[j + 1..end].iter_mut().zip(&u[1..]).for_each(|(w, u)| *w -= error * u);
        errors[j - start] = error;
        // What stands in a dead channel costs nothing.
        loss += if factor.dead[column] { 0.0 } else { error as f64 * error as f64 };
    }
    loss
}

#[cfg(test)]
mod tests {
    use super::feedback;
    use crate::lnq::{RowGrid, Table};
    use crate::rng::SplitMix64;
    use crate::rounding::gptq::{GptqFactor, GptqOptions, GptqResult, gptq};
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
        let GptqResult { plane, loss, .. } = gptq(&w, &gram, spec, options).unwrap();
        let want = QuantizedMatrix::single(plane).dequantize();
        let grids: Vec<RowGrid> = (0..n)
            .map(|i| {
                let grid = GroupGrid::fit(spec, w.row(i), ScaleFit::MinMax).unwrap();
                let values: Vec<f32> = (0..8).map(|code| grid.decode(code)).collect();
                RowGrid::own(Table::sorted(&values).0)
            })
            .collect();
        let factor = GptqFactor::new(&gram, options).unwrap();
        let (labels, losses) = feedback(&w, &grids, &factor);
        approx::assert_relative_eq!(losses.iter().sum::<f64>(), loss, max_relative = 1e-3);
        let differ = (0..n)
            .filter(|&i| {
                let labels = labels[i * m..(i + 1) * m].iter();
                labels.zip(want.row(i)).any(|(l, q)| grids[i].value(0, *l) != *q)
            })
            .count();
        // A value that is on a border up to rounding may fall to either side.
        assert!(differ <= 1, "{differ} rows differ");
    }
}
