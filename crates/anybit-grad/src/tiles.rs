//! Parallel loops in tiles of fixed size, so that no result depends on the number of threads:
//! products of matrices, elementwise maps, sums over rows and over everything, softmax of a row.
//! Called by every operation; [`product`] is where training spends its time. What fits one tile
//! runs on the calling thread.

use std::ops::Range;

use anybit_core::linalg::{View, matmul_into};
use anybit_kernels::DisjointMut;
use anybit_kernels::activation::exp;
use rayon::prelude::*;

/// Elements that one task of an elementwise loop handles.
pub(crate) const CHUNK: usize = 1 << 14;
/// Rows whose contributions one task of [`sum_rows`] adds up.
const SUM_ROWS: usize = 64;

/// A whole row-major matrix as one side of a product, possibly read as its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    data: &'a [f32],
    /// Rows and columns as stored.
    stored: (usize, usize),
    transposed: bool,
}

impl<'a> Operand<'a> {
    /// `data` as `[rows, cols]`.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "operand is not {rows}×{cols}");
        Self { data, stored: (rows, cols), transposed: false }
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    /// Rows and columns as read.
    fn shape(self) -> (usize, usize) {
        let (rows, cols) = self.stored;
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }

    /// Some of the rows as read.
    fn rows(self, range: Range<usize>) -> View<'a> {
        if self.transposed { self.stored_cols(range).t() } else { self.stored_rows(range) }
    }

    /// Some of the columns as read.
    fn cols(self, range: Range<usize>) -> View<'a> {
        if self.transposed { self.stored_rows(range).t() } else { self.stored_cols(range) }
    }

    fn stored_rows(self, range: Range<usize>) -> View<'a> {
        let cols = self.stored.1;
        View::rows(&self.data[range.start * cols..], range.len(), cols, cols)
    }

    fn stored_cols(self, range: Range<usize>) -> View<'a> {
        let (rows, cols) = self.stored;
        View::rows(&self.data[range.start..], rows, range.len(), cols)
    }
}

/// `dst (+)= lhs · rhs`, `dst` row-major.
///
/// A tile of `dst` is one GEMM over the whole inner dimension. Large tiles amortize GEMM's packing
/// of its operands, small results are cut finer so that every thread has something to do.
pub(crate) fn product(dst: &mut [f32], accumulate: bool, lhs: Operand<'_>, rhs: Operand<'_>) {
    let ((m, inner), (rhs_inner, n)) = (lhs.shape(), rhs.shape());
    assert_eq!(inner, rhs_inner, "inner dimensions differ");
    assert_eq!(dst.len(), m * n, "destination is not {m}×{n}");
    if dst.is_empty() {
        return;
    }
    let (most_rows, most_cols) = if m * n <= 1 << 18 { (128, 192) } else { (256, 384) };
    let (rows, cols) = (even_tile(m, most_rows), even_tile(n, most_cols));
    let across = n.div_ceil(cols);
    let dst = DisjointMut::new(dst);
    let one_tile = |tile: usize| {
        let (i, j) = (tile / across * rows, tile % across * cols);
        let (lhs, rhs) = (lhs.rows(i..(i + rows).min(m)), rhs.cols(j..(j + cols).min(n)));
        // SAFETY: this tile is inside the m×n destination and belongs to this task alone.
        unsafe { matmul_into(dst.at(i * n + j), n, accumulate, 1.0, lhs, rhs) };
    };
    match m.div_ceil(rows) * across {
        1 => one_tile(0),
        tiles => (0..tiles).into_par_iter().for_each(one_tile),
    }
}

/// Length of a tile, at most about `most`, such that tiles of `len` are nearly even.
fn even_tile(len: usize, most: usize) -> usize {
    len.div_ceil(len.div_ceil(most)).next_multiple_of(16)
}

/// `dst (+)= f(a)`, elementwise.
pub(crate) fn map(
    dst: &mut [f32],
    accumulate: bool,
    a: &[f32],
    f: impl Fn(f32) -> f32 + Send + Sync,
) {
    assert_eq!(dst.len(), a.len(), "lengths differ");
    let one_chunk = |dst: &mut [f32], a: &[f32]| {
        if accumulate {
            dst.iter_mut().zip(a).for_each(|(d, a)| *d += f(*a));
        } else {
            dst.iter_mut().zip(a).for_each(|(d, a)| *d = f(*a));
        }
    };
    if dst.len() <= CHUNK {
        return one_chunk(dst, a);
    }
    let chunks = dst.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK));
    chunks.for_each(|(dst, a)| one_chunk(dst, a));
}

/// `dst (+)= f(a, b)`, elementwise.
pub(crate) fn map2(
    dst: &mut [f32],
    accumulate: bool,
    a: &[f32],
    b: &[f32],
    f: impl Fn(f32, f32) -> f32 + Send + Sync,
) {
    assert!(dst.len() == a.len() && dst.len() == b.len(), "lengths differ");
    let one_chunk = |dst: &mut [f32], a: &[f32], b: &[f32]| {
        let inputs = a.iter().zip(b);
        if accumulate {
            dst.iter_mut().zip(inputs).for_each(|(d, (a, b))| *d += f(*a, *b));
        } else {
            dst.iter_mut().zip(inputs).for_each(|(d, (a, b))| *d = f(*a, *b));
        }
    };
    if dst.len() <= CHUNK {
        return one_chunk(dst, a, b);
    }
    let inputs = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK));
    dst.par_chunks_mut(CHUNK).zip(inputs).for_each(|(dst, (a, b))| one_chunk(dst, a, b));
}

/// `dst (+)= Σ_row f(row)`, where `f(row, sum)` adds one row's contribution to `sum`.
pub(crate) fn sum_rows(
    dst: &mut [f32],
    accumulate: bool,
    rows: usize,
    f: impl Fn(usize, &mut [f32]) + Send + Sync,
) {
    let len = dst.len();
    let partial = |chunk: usize| {
        let mut sum = vec![0f32; len];
        for row in chunk * SUM_ROWS..((chunk + 1) * SUM_ROWS).min(rows) {
            f(row, &mut sum);
        }
        sum
    };
    let partials: Vec<Vec<f32>> =
        (0..rows.div_ceil(SUM_ROWS)).into_par_iter().map(partial).collect();
    if !accumulate {
        dst.fill(0.0);
    }
    for partial in &partials {
        dst.iter_mut().zip(partial).for_each(|(d, p)| *d += *p);
    }
}

/// `Σ f(range)` over ranges that cover `0..len`, added in order.
pub(crate) fn total(len: usize, f: impl Fn(Range<usize>) -> f64 + Send + Sync) -> f64 {
    if len <= CHUNK {
        return f(0..len);
    }
    let partials: Vec<f64> = (0..len.div_ceil(CHUNK))
        .into_par_iter()
        .map(|chunk| f(chunk * CHUNK..((chunk + 1) * CHUNK).min(len)))
        .collect();
    partials.iter().sum()
}

/// Softmax of a row in place; returns `ln Σ e^x`.
pub(crate) fn softmax_lse(row: &mut [f32]) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let tail = chunks.remainder().iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = lane.max(*v));
    }
    let max = lanes.iter().fold(tail, |m, v| m.max(*v));
    let mut lanes = [0f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (v, lane) in chunk.iter_mut().zip(&mut lanes) {
            *v = exp(*v - max);
            *lane += *v;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for v in chunks.into_remainder() {
        *v = exp(*v - max);
        sum += *v;
    }
    let factor = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= factor);
    max + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;
    use proptest::prelude::*;

    /// `[rows, cols]` as read, stored either way.
    fn operand(data: &[f32], rows: usize, cols: usize, transposed: bool) -> Operand<'_> {
        match transposed {
            true => Operand::new(data, cols, rows).t(),
            false => Operand::new(data, rows, cols),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn product_equals_the_scalar_twin(m in 1usize..300, n in 1usize..420, inner in 1usize..40,
                                          lhs_t in any::<bool>(), rhs_t in any::<bool>(),
                                          accumulate in any::<bool>(), seed in any::<u64>()) {
            let (a, b) = (normals(seed, m * inner), normals(seed ^ 1, inner * n));
            let (lhs, rhs) = (operand(&a, m, inner, lhs_t), operand(&b, inner, n, rhs_t));
            let mut dst = vec![if accumulate { 2.0 } else { f32::NAN }; m * n];
            product(&mut dst, accumulate, lhs, rhs);
            let at = |t: bool, i: usize, j: usize, rows: usize, cols: usize| {
                if t { j * rows + i } else { i * cols + j }
            };
            for (index, got) in dst.iter().enumerate() {
                let (i, j) = (index / n, index % n);
                let want: f64 = (0..inner)
                    .map(|k| {
                        let (a, b) = (a[at(lhs_t, i, k, m, inner)], b[at(rhs_t, k, j, inner, n)]);
                        a as f64 * b as f64
                    })
                    .sum();
                let want = want + if accumulate { 2.0 } else { 0.0 };
                prop_assert!((*got as f64 - want).abs() < 1e-4, "{got} {want}");
            }
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_number_of_threads() {
        let x = normals(5, 300 * 40);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut sum = vec![1.0; 40];
                sum_rows(&mut sum, true, 300, |row, sum| {
                    sum.iter_mut().zip(&x[row * 40..]).for_each(|(s, x)| *s += x);
                });
                (sum, total(x.len(), |r| x[r].iter().map(|v| *v as f64).sum()))
            })
        };
        let (rows, all) = run(1);
        assert_eq!((rows.clone(), all), run(3));
        let columns: f64 = rows.iter().map(|v| *v as f64).sum();
        approx::assert_abs_diff_eq!(columns - 40.0, all, epsilon = 1e-2);
    }

    #[test]
    fn softmax_and_its_normalizer() {
        for n in [1, 15, 16, 50] {
            let x = normals(n as u64, n);
            let mut p = x.clone();
            let lse = softmax_lse(&mut p);
            let want: f64 = x.iter().map(|v| (*v as f64).exp()).sum::<f64>().ln();
            approx::assert_abs_diff_eq!(lse as f64, want, epsilon = 1e-5);
            for (p, x) in p.iter().zip(&x) {
                approx::assert_abs_diff_eq!(*p as f64, (*x as f64 - want).exp(), epsilon = 1e-6);
            }
        }
    }
}
