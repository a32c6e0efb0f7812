//! `V → P₁ᵀ V P₂` of rows seen as `[n₁, n₂]` matrices.
//!
//! Sums stand in registers while they grow, a tile of them at a time. Every element is the sum of
//! its products in order, multiplied and then added, whatever the tile: a caller may compile this for
//! wider vectors and gets the same bits.

use crate::Matrix;
use crate::scratch::with_scratch;

/// Columns of a tile.
const LANES: usize = 8;

/// The factors of a Kronecker product; an absent one is the identity.
#[derive(Debug, Clone, Copy)]
pub struct Factors<'a> {
    /// `n₁` and `n₂`.
    pub sizes: (usize, usize),
    /// `P₁`.
    pub left: Option<&'a Matrix>,
    /// `P₂`.
    pub right: Option<&'a Matrix>,
}

impl Factors<'_> {
    /// Replaces every row of `x` by `P₁ᵀ V P₂`, `V` the row as `[n₁, n₂]`; with `transposed` by
    /// `P₁ V P₂ᵀ`.
    ///
    /// # Panics
    /// When a factor is not as large as its side.
    pub fn apply(&self, x: &mut [f32], transposed: bool) {
        with_scratch(self.scratch(), |scratch| self.apply_in(x, transposed, scratch));
    }

    /// Values of scratch that [`Self::apply_in`] needs.
    pub fn scratch(&self) -> usize {
        let (n1, n2) = self.sizes;
        n1 * n2 + n1 * n1 + n2 * n2
    }

    /// [`Self::apply`] with memory of the caller, and for the instructions that it is compiled for.
    ///
    /// # Panics
    /// As [`Self::apply`], and when `scratch` is not of [`Self::scratch`] values.
    #[inline(always)]
    pub fn apply_in(&self, x: &mut [f32], transposed: bool, scratch: &mut [f32]) {
        let (n1, n2) = self.sizes;
        let (v, rest) = scratch.split_at_mut(n1 * n2);
        let (left_room, right_room) = rest.split_at_mut(n1 * n1);
        // Rows of the matrices that are added up: P₂ as it is, P₁ transposed.
        let left = self.left.map(|m| oriented(m, !transposed, left_room));
        let right = self.right.map(|m| oriented(m, transposed, right_room));
        for row in x.chunks_exact_mut((n1 * n2).max(1)) {
            if let Some(right) = right {
                v.copy_from_slice(row);
                product(v, right, n2, row, n2);
            }
            if let Some(left) = left {
                v.copy_from_slice(row);
                product(left, v, n1, row, n2);
            }
        }
    }
}

/// The elements of a square `m`, or of its transpose, which is written to `room`.
#[inline(always)]
fn oriented<'a>(m: &'a Matrix, transposed: bool, room: &'a mut [f32]) -> &'a [f32] {
    if !transposed {
        return &m.data;
    }
    for (i, row) in m.data.chunks_exact(m.cols).enumerate() {
        row.iter().enumerate().for_each(|(j, value)| room[j * m.rows + i] = *value);
    }
    room
}

/// `out = a b`, `a` of `[rows, inner]`, `b` of `[inner, cols]`.
#[inline(always)]
fn product(a: &[f32], b: &[f32], inner: usize, out: &mut [f32], cols: usize) {
    let rows = out.len() / cols.max(1);
    let mut row = 0;
    while row < rows {
        let (a, out) = (&a[row * inner..], &mut out[row * cols..]);
        row += match rows - row {
            8.. => strip::<8>(a, b, inner, out, cols),
            4.. => strip::<4>(a, b, inner, out, cols),
            2.. => strip::<2>(a, b, inner, out, cols),
            _ => strip::<1>(a, b, inner, out, cols),
        };
    }
}

/// The first `ROWS` rows of a product; returns how many.
#[inline(always)]
fn strip<const ROWS: usize>(
    a: &[f32],
    b: &[f32],
    inner: usize,
    out: &mut [f32],
    cols: usize,
) -> usize {
    let a: [&[f32]; ROWS] = std::array::from_fn(|r| &a[r * inner..][..inner]);
    let whole = cols / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let mut sums = [[0f32; LANES]; ROWS];
        for (i, b) in b.chunks_exact(cols).enumerate().take(inner) {
            let b: &[f32; LANES] = b[start..].first_chunk().expect("a whole tile");
            for (sums, a) in sums.iter_mut().zip(&a) {
                sums.iter_mut().zip(b).for_each(|(sum, b)| *sum += a[i] * b);
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            out[r * cols + start..][..LANES].copy_from_slice(sums);
        }
    }
    for column in whole..cols {
        for (r, a) in a.iter().enumerate() {
            let products = a.iter().zip(b[column..].iter().step_by(cols)).map(|(a, b)| a * b);
            out[r * cols + column] = products.fold(0.0, |sum, product| sum + product);
        }
    }
    ROWS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use proptest::prelude::*;

    proptest! {
        /// Rows and columns beyond whole tiles: the sums in order, bit for bit.
        #[test]
        fn tiles_add_up_in_order(rows in 1usize..20, inner in 1usize..20, cols in 1usize..20,
                                 seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let (a, b) = (normals(rows * inner), normals(inner * cols));
            let mut out = vec![7.0; rows * cols];
            product(&a, &b, inner, &mut out, cols);
            for (at, value) in out.iter().enumerate() {
                let (r, c) = (at / cols, at % cols);
                let sum = (0..inner).fold(0f32, |s, k| s + a[r * inner + k] * b[k * cols + c]);
                prop_assert_eq!(sum.to_bits(), value.to_bits());
            }
        }
    }
}
