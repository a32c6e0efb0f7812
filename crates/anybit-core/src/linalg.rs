//! The few dense operations that statistics and rounding need, over `gemm` (f32) and `faer` (f64).
//!
//! Everything runs on the calling thread: callers split work into tiles whose size does not
//! depend on the number of threads, so results do not either.

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, Par, Side};

use crate::{CoreError, Gram, Matrix, Result};

/// A strided read-only f32 matrix.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major rows of `stride` elements, of which the first `cols` count.
    pub fn rows(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        assert!(
            rows == 0 || cols == 0 || data.len() >= (rows - 1) * stride + cols,
            "view too long"
        );
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `dst (+)= alpha · lhs · rhs`, `dst` row-major with `dst_stride` elements per row.
///
/// # Safety
/// `dst` must be valid for writes of `lhs.rows` rows of `rhs.cols` elements at `dst_stride`, and
/// no other thread may touch these elements during the call.
pub unsafe fn matmul_into(
    dst: *mut f32,
    dst_stride: usize,
    accumulate: bool,
    alpha: f32,
    lhs: View<'_>,
    rhs: View<'_>,
) {
    assert_eq!(lhs.cols, rhs.rows, "inner dimensions differ");
    if lhs.rows == 0 || rhs.cols == 0 {
        return;
    }
    // SAFETY: views were bounds-checked on construction; `dst` by the caller's contract.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.cols,
            lhs.cols,
            dst,
            1,
            dst_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `dst (+)= alpha · lhs · rhs` on a slice.
pub fn matmul(
    dst: &mut [f32],
    dst_stride: usize,
    accumulate: bool,
    alpha: f32,
    lhs: View<'_>,
    rhs: View<'_>,
) {
    if lhs.rows > 0 && rhs.cols > 0 {
        assert!(dst.len() >= (lhs.rows - 1) * dst_stride + rhs.cols, "destination too short");
    }
    // SAFETY: the length was just checked and the borrow is exclusive.
    unsafe { matmul_into(dst.as_mut_ptr(), dst_stride, accumulate, alpha, lhs, rhs) }
}

/// The factor that GPTQ steps through: upper triangular `U` with `H⁻¹ = UᵀU`, and the damping
/// (fraction of the mean diagonal) that was needed.
///
/// With `P` the reversal of coordinates and `P H P = L Lᵀ`, `U = P L⁻¹ P`: one Cholesky and one
/// triangular inverse in f64 instead of two Choleskys around a full inverse. Damping starts at
/// `damp` and grows tenfold, three times at most, while `H` is not positive definite.
///
/// # Errors
/// [`CoreError::NotPositiveDefinite`] when the largest damping fails too.
pub fn inverse_cholesky(gram: &Gram, damp: f64) -> Result<(Matrix, f64)> {
    let n = gram.size();
    let mean = (0..n).map(|i| gram.at(i, i) as f64).sum::<f64>() / n.max(1) as f64;
    let mut used = damp;
    for attempt in 0..4 {
        if attempt > 0 {
            used = (used * 10.0).max(1e-6);
        }
        let h = Mat::<f64>::from_fn(n, n, |i, j| {
            let value = gram.at(n - 1 - i, n - 1 - j) as f64;
            if i == j { value + used * mean } else { value }
        });
        let Ok(llt) = h.llt(Side::Lower) else { continue };
        drop(h);
        let mut inverse = Mat::<f64>::zeros(n, n);
        invert_lower_triangular(inverse.as_mut(), llt.L(), Par::Seq);
        let mut u = Matrix::zeros(n, n);
        for i in 0..n {
            for (j, out) in u.row_mut(i).iter_mut().enumerate().skip(i) {
                *out = inverse[(n - 1 - i, n - 1 - j)] as f32;
            }
        }
        if u.data.iter().all(|v| v.is_finite()) {
            return Ok((u, used));
        }
    }
    Err(CoreError::NotPositiveDefinite { n, damp: used })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden values of the GPTQ specification (T10).
    #[test]
    fn inverse_cholesky_golden() {
        let mut gram = Gram::new(3);
        for i in 0..3 {
            for j in 0..3 {
                gram.set(i, j, if i == j { 1.0 } else { 0.8 });
            }
        }
        let (u, damp) = inverse_cholesky(&gram, 0.0).unwrap();
        assert_eq!(damp, 0.0);
        let want =
            [1.86052102, -0.82689823, -0.82689823, 0.0, 1.66666667, -1.33333333, 0.0, 0.0, 1.0];
        for (got, want) in u.data.iter().zip(want) {
            approx::assert_abs_diff_eq!(*got, want as f32, epsilon = 2e-6);
        }
    }

    #[test]
    fn singular_needs_damping_and_zero_is_an_error() {
        let mut gram = Gram::new(2);
        gram.add(&[1.0, 1.0, 2.0, 2.0]);
        let (_, damp) = inverse_cholesky(&gram, 0.01).unwrap();
        assert_eq!(damp, 0.01);
        let zero = Gram::new(2);
        assert!(matches!(
            inverse_cholesky(&zero, 0.01),
            Err(CoreError::NotPositiveDefinite { n: 2, .. })
        ));
    }
}
