//! The Cayley map `U = (I − A/2)⁻¹ (I + A/2)` of a skew matrix `A`: orthogonal matrices as a
//! function of free parameters, the identity at zero. Computed in f64 by an LU decomposition; the
//! matrices are factors of Kronecker products and thus small. (FlatQuant, sections 1.3 and 7.4.)

use faer::Mat;
use faer::linalg::solvers::{PartialPivLu, Solve};

use crate::{Tape, Tensor, Var};

/// `I + factor · A` with `A = tril(X, −1) − tril(X, −1)ᵀ`.
fn shifted(x: &[f32], s: usize, factor: f64) -> Mat<f64> {
    Mat::from_fn(s, s, |i, j| match i.cmp(&j) {
        std::cmp::Ordering::Greater => factor * x[i * s + j] as f64,
        std::cmp::Ordering::Equal => 1.0,
        std::cmp::Ordering::Less => -factor * x[j * s + i] as f64,
    })
}

/// Decomposition of `I − A/2`, which a skew `A` never makes singular. faer is built without its
/// threads (`Par::Seq` is all it has), so the result does not depend on them.
fn decomposed(x: &[f32], s: usize) -> PartialPivLu<f64> {
    shifted(x, s, -0.5).partial_piv_lu()
}

/// `U = (I − A/2)⁻¹ (I + A/2)`.
fn forward(x: &[f32], s: usize, y: &mut [f32]) {
    let mut u = shifted(x, s, 0.5);
    decomposed(x, s).solve_in_place(&mut u);
    for (i, row) in y.chunks_exact_mut(s).enumerate() {
        row.iter_mut().enumerate().for_each(|(j, y)| *y = u[(i, j)] as f32);
    }
}

/// `dX = tril(dA − dAᵀ, −1)` with `dA = ½ (I − A/2)⁻ᵀ dU (I + U)ᵀ`; added to `dx`.
///
/// From `dU = (I − A/2)⁻¹ ½dA (I + U)`, the differential of `(I − A/2) U = I + A/2`.
fn backward(x: &[f32], u: &[f32], du: &[f32], s: usize, dx: &mut [f32]) {
    let gradient = Mat::<f64>::from_fn(s, s, |i, j| 0.5 * du[i * s + j] as f64);
    let one_plus_u_t = Mat::<f64>::from_fn(s, s, |i, j| {
        let value = u[j * s + i] as f64;
        if i == j { 1.0 + value } else { value }
    });
    let mut da = &gradient * &one_plus_u_t;
    decomposed(x, s).solve_transpose_in_place(&mut da);
    for (i, row) in dx.chunks_exact_mut(s).enumerate() {
        for (j, d) in row[..i].iter_mut().enumerate() {
            *d += (da[(i, j)] - da[(j, i)]) as f32;
        }
    }
}

impl Tape {
    /// `U = (I − A/2)⁻¹ (I + A/2)` with `A = tril(X, −1) − tril(X, −1)ᵀ`: an orthogonal matrix
    /// without the eigenvalue −1. `X` and `U` are `[s, s]`; only the part of `X` strictly below
    /// its diagonal counts and has a gradient other than zero.
    ///
    /// # Panics
    /// When `x` is no square matrix.
    pub fn cayley(&mut self, x: Var) -> Var {
        let (s, cols) = self.dims(x);
        assert!(s == cols && s > 0, "{s}×{cols} is not square");
        let mut y = self.buffer(s * s);
        forward(self.data(x), s, &mut y);
        self.custom(&[x], Tensor::new([s, s], y), move |pass| {
            if pass.wants(x) {
                let mut dx = pass.take(x);
                backward(pass.value(x), pass.output(), pass.grad(), s, dx.ready());
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
    fn is_orthogonal_and_the_identity_at_zero() {
        for s in [1, 2, 9, 24, 64] {
            let mut tape = Tape::default();
            let x = tape.constant(random(s as u64, [s, s]));
            let u = tape.cayley(x);
            let u = tape.data(u);
            for i in 0..s {
                for j in 0..s {
                    let dot: f64 = (0..s).map(|k| u[i * s + k] as f64 * u[j * s + k] as f64).sum();
                    let want = if i == j { 1.0 } else { 0.0 };
                    approx::assert_abs_diff_eq!(dot, want, epsilon = 1e-5);
                }
            }
            // The diagonal and what lies above it do not count.
            let mut upper = random(1, [s, s]);
            for i in 0..s {
                upper.data_mut()[i * s..i * s + i].fill(0.0);
            }
            let x = tape.constant(upper);
            let u = tape.cayley(x);
            for (index, u) in tape.data(u).iter().enumerate() {
                assert_eq!(*u, if index / s == index % s { 1.0 } else { 0.0 });
            }
        }
    }

    /// A rotation of the plane: the angle is `2 atan(a/2)`.
    #[test]
    fn of_two_dimensions() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 2], vec![0.0, 0.0, 0.7, 0.0]));
        let u = tape.cayley(x);
        let (sin, cos) = (2.0 * 0.35f32.atan()).sin_cos();
        for (got, want) in tape.data(u).iter().zip([cos, -sin, sin, cos]) {
            approx::assert_abs_diff_eq!(*got, want, epsilon = 1e-6);
        }
    }

    #[test]
    fn gradients() {
        for s in [2, 3, 8, 24] {
            check_gradients(&[random(s as u64, [s, s])], |t, v| t.cayley(v[0]));
        }
        // As factors are made: the gradient adds to what is there.
        check_gradients(&[random(5, [6, 6])], |t, v| {
            let u = t.cayley(v[0]);
            let u_t = t.transpose(u);
            let product = t.matmul(u_t, v[0]);
            t.mul(product, v[0])
        });
    }

    #[test]
    fn only_the_lower_triangle_has_a_gradient() {
        let mut tape = Tape::default();
        let x = tape.leaf(random(7, [5, 5]), true);
        let u = tape.cayley(x);
        tape.backward_from(u, random(8, [5, 5]).data());
        for (index, d) in tape.grad(x).unwrap().iter().enumerate() {
            assert_eq!(*d == 0.0, index / 5 <= index % 5, "{index}");
        }
    }
}
