//! `y = x (L ⊗ R)`: per row, read as a matrix `V` of `[n₁, n₂]`, `Lᵀ V R`. How a transform of many
//! channels is applied with two small matrices (FlatQuant, section 1.2), to activations and to the
//! rows of weights.
//!
//! A task takes as many rows as keep it busy: one GEMM multiplies all of them on the right, one
//! small GEMM per row multiplies on the left.

use anybit_core::linalg::{View, matmul};
use anybit_kernels::with_scratch;
use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::CHUNK;
use crate::{Tape, Tensor, Var};

/// Values of the rows that one task handles. At least eight times as many as the gradients of both
/// matrices have, because every task makes partial sums of these.
fn task_len((n1, n2): (usize, usize)) -> usize {
    let n = n1 * n2;
    CHUNK.max(8 * (n1 * n1 + n2 * n2)).div_ceil(n) * n
}

fn square(data: &[f32], n: usize) -> View<'_> {
    View::rows(data, n, n, n)
}

/// `dst (+)= M · V` for every row.
fn left_products(
    dst: &mut [f32],
    accumulate: bool,
    m: View<'_>,
    v: &[f32],
    (n1, n2): (usize, usize),
) {
    for (dst, v) in dst.chunks_exact_mut(n1 * n2).zip(v.chunks_exact(n1 * n2)) {
        matmul(dst, n2, accumulate, 1.0, m, View::rows(v, n1, n2, n2));
    }
}

/// `dst (+)= V · M` for all rows at once.
fn right_products(dst: &mut [f32], accumulate: bool, v: &[f32], m: View<'_>, n2: usize) {
    matmul(dst, n2, accumulate, 1.0, View::rows(v, v.len() / n2, n2, n2), m);
}

/// `y = Lᵀ V R`; a missing matrix is the identity.
fn forward(
    x: &[f32],
    left: Option<&[f32]>,
    right: Option<&[f32]>,
    sizes: (usize, usize),
    y: &mut [f32],
) {
    let (n1, n2) = sizes;
    let len = task_len(sizes);
    y.par_chunks_mut(len).zip(x.par_chunks(len)).for_each(|(y, x)| match (left, right) {
        (None, None) => y.copy_from_slice(x),
        (Some(left), None) => left_products(y, false, square(left, n1).t(), x, sizes),
        (None, Some(right)) => right_products(y, false, x, square(right, n2), n2),
        (Some(left), Some(right)) => with_scratch(x.len(), |t| {
            right_products(t, false, x, square(right, n2), n2);
            left_products(y, false, square(left, n1).t(), t, sizes);
        }),
    });
}

/// With `S = L dY`: `dV = S Rᵀ`, `dL = Σ_rows (V R) dYᵀ`, `dR = Σ_rows Vᵀ S`.
fn backward(
    pass: &mut Pass<'_>,
    x: Var,
    left: Option<Var>,
    right: Option<Var>,
    sizes: (usize, usize),
) {
    let (n1, n2) = sizes;
    let len = task_len(sizes);
    let (values, dy) = (pass.value(x), pass.grad());
    let (l, r) = (left.map(|v| pass.value(v)), right.map(|v| pass.value(v)));
    let wants_x = pass.wants(x);
    let (left, right) = (left.filter(|v| pass.wants(*v)), right.filter(|v| pass.wants(*v)));
    let left_len = if left.is_some() { n1 * n1 } else { 0 };
    let right_len = if right.is_some() { n2 * n2 } else { 0 };

    let mut dx = pass.take(x);
    let accumulate = dx.accumulate;
    // Writes `dV` of some rows, returns their sums for `dL` and `dR`.
    let one_task = |dx: &mut [f32], v: &[f32], dy: &[f32], scratch: &mut [f32]| -> Vec<f32> {
        let mut sums = vec![0f32; left_len + right_len];
        let (dl, dr) = sums.split_at_mut(left_len);
        let (s, t) = scratch.split_at_mut(v.len());
        let s = match l {
            Some(l) if wants_x || right.is_some() => {
                left_products(s, false, square(l, n1), dy, sizes);
                &*s
            }
            _ => dy,
        };
        if wants_x {
            match r {
                Some(r) => right_products(dx, accumulate, s, square(r, n2).t(), n2),
                None if accumulate => dx.iter_mut().zip(s).for_each(|(d, s)| *d += *s),
                None => dx.copy_from_slice(s),
            }
        }
        if right.is_some() {
            let rows = v.len() / n2;
            let (v, s) = (View::rows(v, rows, n2, n2), View::rows(s, rows, n2, n2));
            matmul(dr, n2, false, 1.0, v.t(), s);
        }
        if left.is_some() {
            let t = match r {
                Some(r) => {
                    right_products(t, false, v, square(r, n2), n2);
                    &*t
                }
                None => v,
            };
            for (t, dy) in t.chunks_exact(n1 * n2).zip(dy.chunks_exact(n1 * n2)) {
                let (t, dy) = (View::rows(t, n1, n2, n2), View::rows(dy, n1, n2, n2));
                matmul(dl, n1, true, 1.0, t, dy.t());
            }
        }
        sums
    };
    let inputs = values.par_chunks(len).zip(dy.par_chunks(len));
    let partials: Vec<Vec<f32>> = dx
        .data
        .par_chunks_mut(len)
        .zip(inputs)
        .map(|(dx, (v, dy))| with_scratch(2 * v.len(), |scratch| one_task(dx, v, dy, scratch)))
        .collect();
    pass.put(x, dx);

    let mut add = |v: Var, part: std::ops::Range<usize>| {
        let mut slot = pass.take(v);
        let sum = slot.ready();
        for partial in &partials {
            sum.iter_mut().zip(&partial[part.clone()]).for_each(|(s, p)| *s += *p);
        }
        pass.put(v, slot);
    };
    if let Some(left) = left {
        add(left, 0..left_len);
    }
    if let Some(right) = right {
        add(right, left_len..left_len + right_len);
    }
}

impl Tape {
    /// `x (L ⊗ R)` for every row of `n₁·n₂` values: the row, read row-major as `V` of `[n₁, n₂]`,
    /// becomes `Lᵀ V R`. `left` is `[n₁, n₁]`, `right` is `[n₂, n₂]`, a missing one is the identity;
    /// `sizes` is `(n₁, n₂)`. `x` is of any shape made of such rows, which the result keeps.
    ///
    /// # Panics
    /// When `x` is not made of whole rows, a matrix is of another size, or a size is zero.
    pub fn kronecker(
        &mut self,
        x: Var,
        left: Option<Var>,
        right: Option<Var>,
        sizes: (usize, usize),
    ) -> Var {
        let (n1, n2) = sizes;
        let len = self.value(x).len();
        assert!(n1 * n2 > 0 && len.is_multiple_of(n1 * n2), "not made of rows of {n1}·{n2}");
        if let Some(left) = left {
            assert_eq!(self.dims(left), (n1, n1), "left matrix");
        }
        if let Some(right) = right {
            assert_eq!(self.dims(right), (n2, n2), "right matrix");
        }
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(len);
        let (l, r) = (left.map(|v| self.data(v)), right.map(|v| self.data(v)));
        forward(self.data(x), l, r, sizes, &mut y);
        let inputs: Vec<Var> = [x].into_iter().chain(left).chain(right).collect();
        self.custom(&inputs, Tensor::new(shape, y), move |pass| {
            backward(pass, x, left, right, sizes);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    /// `x (L ⊗ R)`, the product written out.
    fn naive(
        x: &[f32],
        l: Option<&[f32]>,
        r: Option<&[f32]>,
        (n1, n2): (usize, usize),
    ) -> Vec<f64> {
        let at = |m: Option<&[f32]>, n: usize, i: usize, j: usize| match m {
            Some(m) => m[i * n + j] as f64,
            None => (i == j) as u8 as f64,
        };
        let n = n1 * n2;
        let one = |x: &[f32], j: usize| -> f64 {
            let term =
                |i: usize| x[i] as f64 * at(l, n1, i / n2, j / n2) * at(r, n2, i % n2, j % n2);
            (0..n).map(term).sum()
        };
        x.chunks(n).flat_map(|x| (0..n).map(move |j| one(x, j))).collect()
    }

    #[test]
    fn equals_the_product_written_out() {
        for (n1, n2, rows) in [(1, 1, 3), (2, 3, 5), (24, 24, 40), (5, 1, 2), (1, 7, 4), (9, 64, 3)]
        {
            let x = random(1, [rows, n1 * n2]);
            let (l, r) = (random(2, [n1, n1]), random(3, [n2, n2]));
            for (has_l, has_r) in [(true, true), (true, false), (false, true), (false, false)] {
                let mut tape = Tape::default();
                let v = tape.constant(x.clone());
                let left = has_l.then(|| tape.constant(l.clone()));
                let right = has_r.then(|| tape.constant(r.clone()));
                let y = tape.kronecker(v, left, right, (n1, n2));
                assert_eq!(tape.value(y).shape(), x.shape());
                let (l, r) = (has_l.then_some(l.data()), has_r.then_some(r.data()));
                let want = naive(x.data(), l, r, (n1, n2));
                for (got, want) in tape.data(y).iter().zip(want) {
                    approx::assert_abs_diff_eq!(
                        *got as f64,
                        want,
                        epsilon = 1e-4 * want.abs().max(1.0)
                    );
                }
            }
        }
    }

    #[test]
    fn gradients() {
        // The second has more rows than a task, the last ones few rows and sizes of real models.
        for (n1, n2, rows) in [(2, 3, 5), (2, 3, 3000), (4, 4, 3), (24, 24, 3), (9, 64, 2)] {
            let x = random(1, [rows, n1 * n2]);
            let (l, r) = (random(2, [n1, n1]), random(3, [n2, n2]));
            let sizes = (n1, n2);
            check_gradients(&[x.clone(), l.clone(), r.clone()], |t, v| {
                t.kronecker(v[0], Some(v[1]), Some(v[2]), sizes)
            });
            check_gradients(&[x.clone(), l], |t, v| t.kronecker(v[0], Some(v[1]), None, sizes));
            check_gradients(&[x.clone(), r], |t, v| t.kronecker(v[0], None, Some(v[1]), sizes));
            check_gradients(&[x], |t, v| t.kronecker(v[0], None, None, sizes));
        }
    }

    #[test]
    fn gradients_add_to_what_is_there() {
        // Both sides are one matrix, and `x` is used again, with and without a right side.
        check_gradients(&[random(4, [6, 9]), random(5, [3, 3])], |t, v| {
            let y = t.kronecker(v[0], Some(v[1]), Some(v[1]), (3, 3));
            let z = t.kronecker(v[0], Some(v[1]), None, (3, 3));
            let sum = t.add(y, z);
            t.mul(sum, v[0])
        });
    }

    #[test]
    fn a_constant_input_leaves_the_gradients_of_the_matrices() {
        let (x, dy) = (random(6, [7, 12]), random(7, [7, 12]));
        let run = |wants: [bool; 3]| {
            let mut tape = Tape::default();
            let x = tape.leaf(x.clone(), wants[0]);
            let l = tape.leaf(random(8, [3, 3]), wants[1]);
            let r = tape.leaf(random(9, [4, 4]), wants[2]);
            let y = tape.kronecker(x, Some(l), Some(r), (3, 4));
            tape.backward_from(y, dy.data());
            [x, l, r].map(|v| tape.grad(v).map(<[f32]>::to_vec))
        };
        let all = run([true; 3]);
        for wanted in 0..3 {
            let mut wants = [false; 3];
            wants[wanted] = true;
            let got = run(wants);
            for (index, got) in got.iter().enumerate() {
                match index == wanted {
                    true => assert_eq!(*got, all[index]),
                    false => assert!(got.is_none()),
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing() {
        let (x, dy) = (random(10, [200, 576]), random(11, [200, 576]));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut tape = Tape::default();
                let x = tape.leaf(x.clone(), true);
                let l = tape.leaf(random(12, [24, 24]), true);
                let r = tape.leaf(random(13, [24, 24]), true);
                let y = tape.kronecker(x, Some(l), Some(r), (24, 24));
                tape.backward_from(y, dy.data());
                [x, l, r].map(|v| tape.grad(v).unwrap().to_vec())
            })
        };
        assert_eq!(run(1), run(3));
    }
}
