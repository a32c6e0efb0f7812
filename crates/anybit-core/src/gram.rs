//! The Gram matrix `H = XᵀX` of a site's inputs, accumulated in f32 tile by tile.

use rayon::prelude::*;

use crate::Matrix;
use crate::linalg::{View, matmul, matmul_into};

/// Rows and columns of a tile: fixed, so that sums do not depend on the number of threads.
const TILE: usize = 192;

/// `H = Σ xᵀx` over calibration tokens, `[n, n]`; only the upper triangle is kept up to date.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    n: usize,
    upper: Vec<f32>,
    tokens: usize,
}

/// Pointer to the destination of disjoint tiles.
struct TilePtr(*mut f32);
// SAFETY: every task writes its own tile and nothing else reads the matrix meanwhile.
unsafe impl Sync for TilePtr {}

impl Gram {
    /// An empty sum for inputs of `n` channels.
    pub fn new(n: usize) -> Self {
        Self { n, upper: vec![0.0; n * n], tokens: 0 }
    }

    /// Number of channels.
    pub fn size(&self) -> usize {
        self.n
    }

    /// Number of tokens added.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Adds `x`, `[tokens, n]` row-major.
    pub fn add(&mut self, x: &[f32]) {
        let n = self.n;
        let tokens = x.len() / n.max(1);
        assert_eq!(x.len(), tokens * n, "activations are not a multiple of the channels");
        self.tokens += tokens;
        let tiles = n.div_ceil(TILE);
        let pairs: Vec<(usize, usize)> =
            (0..tiles).flat_map(|i| (i..tiles).map(move |j| (i, j))).collect();
        let dst = TilePtr(self.upper.as_mut_ptr());
        let dst = &dst;
        pairs.into_par_iter().for_each(move |(ti, tj)| {
            let (i, j) = (ti * TILE, tj * TILE);
            let (rows, cols) = (TILE.min(n - i), TILE.min(n - j));
            let lhs = View::rows(&x[i..], tokens, rows, n).t();
            let rhs = View::rows(&x[j..], tokens, cols, n);
            // SAFETY: tile (ti, tj) is inside the n×n buffer and belongs to this task alone.
            unsafe { matmul_into(dst.0.add(i * n + j), n, true, 1.0, lhs, rhs) };
        });
    }

    /// Adds `Σ_t s_t x_tᵀ x_t` for `x`, `[tokens, n]`, and one weight `s ≥ 0` per token.
    ///
    /// # Panics
    /// When there are not as many weights as tokens.
    pub fn add_weighted(&mut self, x: &[f32], weights: &[f32]) {
        assert_eq!(x.len(), weights.len() * self.n, "one weight per token is needed");
        let mut scaled = vec![0f32; x.len()];
        let rows =
            scaled.par_chunks_exact_mut(self.n.max(1)).zip(x.par_chunks_exact(self.n.max(1)));
        rows.zip(weights.par_iter()).for_each(|((out, x), weight)| {
            let root = weight.sqrt();
            out.iter_mut().zip(x).for_each(|(out, x)| *out = root * x);
        });
        self.add(&scaled);
    }

    /// `H[i, j]`.
    #[inline]
    pub fn at(&self, i: usize, j: usize) -> f32 {
        self.upper[i.min(j) * self.n + i.max(j)]
    }

    /// Sets `H[i, j]` and `H[j, i]`.
    pub fn set(&mut self, i: usize, j: usize, value: f32) {
        self.upper[i.min(j) * self.n + i.max(j)] = value;
    }

    /// The diagonal.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.n).map(|i| self.at(i, i)).collect()
    }

    /// Channels that were zero for every token.
    pub fn dead(&self) -> Vec<bool> {
        self.diagonal().iter().map(|d| *d == 0.0).collect()
    }

    /// `H` with rows and columns reordered: entry `(i, j)` is the old `(order[i], order[j])`.
    pub fn permuted(&self, order: &[usize]) -> Self {
        let mut out = Self { n: self.n, upper: vec![0.0; self.n * self.n], tokens: self.tokens };
        for (i, &oi) in order.iter().enumerate() {
            for (j, &oj) in order.iter().enumerate().skip(i) {
                out.upper[i * self.n + j] = self.at(oi, oj);
            }
        }
        out
    }

    /// `tr(R H Rᵀ)`: the summed output error of the weight error `r`, `[rows, n]`.
    pub fn trace(&self, r: &Matrix) -> f64 {
        self.row_errors(r).iter().sum()
    }

    /// `r_i H r_iᵀ` of each row of `r`, `[rows, n]`.
    pub fn row_errors(&self, r: &Matrix) -> Vec<f64> {
        let n = self.n;
        // R H Rᵀ = 2 R U Rᵀ − R D Rᵀ with the upper triangle U of H and its diagonal D: the lower
        // half of diagonal tiles is filled too and has to go.
        let mut upper = self.upper.clone();
        for i in 0..n {
            upper[i * n..i * n + i].fill(0.0);
            upper[i * n + i] *= 0.5;
        }
        let chunks: Vec<Vec<f64>> = r
            .data
            .par_chunks(TILE * n.max(1))
            .map(|r| {
                let rows = r.len() / n;
                let mut product = vec![0f32; r.len()];
                let (lhs, rhs) = (View::rows(r, rows, n, n), View::rows(&upper, n, n, n));
                matmul(&mut product, n, false, 2.0, lhs, rhs);
                let rows = product.chunks_exact(n).zip(r.chunks_exact(n));
                rows.map(|(p, r)| p.iter().zip(r).map(|(p, r)| *p as f64 * *r as f64).sum())
                    .collect()
            })
            .collect();
        chunks.concat()
    }

    /// Adds `values` to the diagonal.
    pub fn add_diagonal(&mut self, values: &[f32]) {
        values.iter().enumerate().for_each(|(i, v)| self.upper[i * self.n + i] += v);
    }

    /// `Σ_ij r_i H_ij r_j` in f64: the squared output error of a row's weight error `r`, summed
    /// over tokens.
    pub fn quad(&self, r: &[f32]) -> f64 {
        self.quad_at(0, r)
    }

    /// [`Self::quad`] of an error in the channels from `start` on, and none elsewhere.
    pub fn quad_at(&self, start: usize, r: &[f32]) -> f64 {
        let mut total = 0f64;
        for (i, &ri) in r.iter().enumerate() {
            let at = (start + i) * self.n + start + i;
            let row = &self.upper[at..at + r.len() - i];
            let mut cross = 0f64;
            for (h, rj) in row[1..].iter().zip(&r[i + 1..]) {
                cross += *h as f64 * *rj as f64;
            }
            total += ri as f64 * (row[0] as f64 * ri as f64 + 2.0 * cross);
        }
        total
    }

    /// `H` with both halves filled in, for products.
    pub fn to_full(&self) -> Matrix {
        let n = self.n;
        let mut full = Matrix::zeros(n, n);
        full.data.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            row.iter_mut().enumerate().for_each(|(j, h)| *h = self.at(i, j));
        });
        full
    }

    /// All entries of the upper triangle, row after row: what [`Self::from_upper`] takes.
    pub fn to_upper(&self) -> Vec<f32> {
        let rows = (0..self.n).map(|i| &self.upper[i * self.n + i..(i + 1) * self.n]);
        rows.collect::<Vec<_>>().concat()
    }

    /// The matrix of an upper triangle, `n (n + 1) / 2` entries.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn from_upper(n: usize, entries: &[f32], tokens: usize) -> Self {
        assert_eq!(entries.len(), n * (n + 1) / 2, "not an upper triangle");
        let mut gram = Self { n, upper: vec![0.0; n * n], tokens };
        let mut rest = entries;
        for i in 0..n {
            let (row, after) = rest.split_at(n - i);
            gram.upper[i * n + i..(i + 1) * n].copy_from_slice(row);
            rest = after;
        }
        gram
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    #[test]
    fn equals_the_naive_sum_on_odd_sizes() {
        let mut rng = SplitMix64::new(3);
        for (n, tokens) in [(1, 1), (7, 5), (200, 33), (400, 17)] {
            let x: Vec<f32> = (0..n * tokens).map(|_| rng.normal() as f32).collect();
            let mut gram = Gram::new(n);
            let half = tokens / 2 * n;
            gram.add(&x[..half]);
            gram.add(&x[half..]);
            assert_eq!(gram.tokens(), tokens);
            let r: Vec<f32> = (0..n).map(|_| rng.normal() as f32).collect();
            let mut want = 0f64;
            for row in x.chunks(n) {
                let y: f64 = row.iter().zip(&r).map(|(a, b)| *a as f64 * *b as f64).sum();
                want += y * y;
            }
            approx::assert_relative_eq!(gram.quad(&r), want, max_relative = 1e-4);
            let twice = Matrix::from_vec(2, n, [r.clone(), r].concat()).unwrap();
            approx::assert_relative_eq!(gram.trace(&twice), 2.0 * want, max_relative = 1e-4);
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads() {
        let mut rng = SplitMix64::new(4);
        let x: Vec<f32> = (0..500 * 60).map(|_| rng.normal() as f32).collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut gram = Gram::new(500);
            pool.install(|| gram.add(&x));
            gram
        };
        assert!(run(1) == run(4));
    }
}
