//! The grid of one row, `q_j = s_{g(j)} c[u_j]`: a codebook of its own with all scales at one, or a
//! shared codebook with a scale per group. Its parameters `θ`, centroids or scales, enter linearly,
//! `q = P θ`, so that for fixed codes the optimum solves `(PᵀHP + ρ) δ = PᵀH r` (GuidedQuant, arXiv
//! 2505.07004, section 4, for codebooks). Systems are small and f64.

use std::sync::Arc;

use half::f16;

/// Borders that are counted one by one.
const COUNTED: usize = 16;

/// Ascending values, found by counting borders.
#[derive(Debug, Clone, PartialEq)]
pub struct Table {
    values: Vec<f32>,
    /// Borders between neighbours: the code of a value is the number of borders below it.
    middles: Vec<f32>,
}

impl Table {
    /// Sorts `values`; also returns the place in `values` of each entry.
    pub fn sorted(values: &[f32]) -> (Self, Vec<u8>) {
        let mut order: Vec<u8> = (0..values.len()).map(|i| i as u8).collect();
        order.sort_by(|&a, &b| values[a as usize].total_cmp(&values[b as usize]));
        let values: Vec<f32> = order.iter().map(|i| values[*i as usize]).collect();
        let middles = values.windows(2).map(|pair| 0.5 * pair[0] + 0.5 * pair[1]).collect();
        (Self { values, middles }, order)
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Code of the entry nearest to `value`, the lower one in a tie: the number of borders below
    /// it. Long tables are halved first, since counting is only fast where it is short.
    #[inline]
    pub fn nearest(&self, value: f32) -> u8 {
        let (mut first, mut len) = (0, self.middles.len());
        while len > COUNTED {
            let half = len / 2;
            let below = self.middles[first + half] < value;
            first += if below { half + 1 } else { 0 };
            len = if below { len - half - 1 } else { half };
        }
        let rest = &self.middles[first..first + len];
        let count = rest.iter().map(|middle| u32::from(*middle < value)).sum::<u32>();
        (first as u32 + count) as u8
    }
}

/// The grid of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct RowGrid {
    table: Arc<Table>,
    /// Scale of each group and its inverse, zero for a scale of zero; empty for a row with a
    /// codebook of its own.
    scales: Vec<(f32, f32)>,
    group_len: usize,
}

impl RowGrid {
    /// A codebook of the row's own.
    pub fn own(table: Table) -> Self {
        Self { table: Arc::new(table), scales: Vec::new(), group_len: 1 }
    }

    /// A shared codebook with a scale for every `group_len` columns.
    pub fn scaled(table: &Arc<Table>, scales: &[f32], group_len: usize) -> Self {
        let inverse = |s: f32| if s == 0.0 { 0.0 } else { 1.0 / s };
        let scales = scales.iter().map(|s| (*s, inverse(*s))).collect();
        Self { table: table.clone(), scales, group_len: group_len.max(1) }
    }

    /// The codebook.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// The scales of the groups; none for a row with a codebook of its own.
    pub fn scales(&self) -> impl Iterator<Item = f32> {
        self.scales.iter().map(|(scale, _)| *scale)
    }

    /// Value of a code.
    #[inline]
    pub fn value(&self, column: usize, code: u8) -> f32 {
        let value = self.table.values[code as usize];
        match self.scales.get(column / self.group_len) {
            Some((scale, _)) => value * scale,
            None => value,
        }
    }

    /// The code whose value is nearest to `target`.
    #[inline]
    pub fn nearest(&self, column: usize, target: f32) -> u8 {
        match self.scales.get(column / self.group_len) {
            Some((_, inverse)) => self.table.nearest(target * inverse),
            None => self.table.nearest(target),
        }
    }

    /// Number of parameters: centroids, or scales.
    pub(super) fn parameters(&self) -> usize {
        if self.scales.is_empty() { self.table.values.len() } else { self.scales.len() }
    }

    /// The one non-zero entry of row `column` of `P`: its parameter and its coefficient.
    #[inline]
    pub(super) fn feature(&self, column: usize, code: u8) -> (usize, f32) {
        match self.scales.is_empty() {
            true => (code as usize, 1.0),
            false => (column / self.group_len, self.table.values[code as usize]),
        }
    }

    /// The grid with its parameters moved by `shift` and, if `half`, rounded to f16, with `codes`
    /// brought into its order. `None` when a parameter exceeds its type.
    pub(super) fn moved(&self, shift: &[f64], codes: &mut [u8], half: bool) -> Option<Self> {
        let round = |(old, shift): (f32, &f64)| match half {
            true => f16::from_f64(old as f64 + shift).to_f32(),
            false => (old as f64 + shift) as f32,
        };
        if !self.scales.is_empty() {
            let scales: Vec<f32> = self.scales().zip(shift).map(round).collect();
            let finite = scales.iter().all(|s| s.is_finite());
            return finite.then(|| Self::scaled(&self.table, &scales, self.group_len));
        }
        let values: Vec<f32> = self.table.values.iter().copied().zip(shift).map(round).collect();
        if values.iter().any(|v| !v.is_finite()) {
            return None;
        }
        let (table, order) = Table::sorted(&values);
        relabel(&order, codes);
        Some(Self::own(table))
    }
}

/// Turns codes of unsorted values into codes of the sorted ones.
pub(super) fn relabel(order: &[u8], codes: &mut [u8]) {
    let mut rank = [0u8; 256];
    for (i, from) in order.iter().enumerate() {
        rank[*from as usize] = i as u8;
    }
    codes.iter_mut().for_each(|code| *code = rank[*code as usize]);
}

/// Solves `(A + ρ) x = b` for a symmetric `A`, `[k, k]`, with `ρ = ridge · mean diagonal` of the
/// entries in use; `x` is zero for the others. The ridge grows a hundredfold, three times at most,
/// while `A + ρ` is not positive definite.
pub(super) fn least_squares(a: &[f64], b: &[f64], ridge: f64) -> Option<Vec<f64>> {
    let k = b.len();
    let used: Vec<usize> = (0..k).filter(|q| a[q * k + q] > 0.0).collect();
    let n = used.len();
    let mean = used.iter().map(|q| a[q * k + q]).sum::<f64>() / n.max(1) as f64;
    let mut ridge = ridge;
    for _ in 0..4 {
        let mut lower = vec![0f64; n * n];
        for (i, p) in used.iter().enumerate() {
            for (j, q) in used[..=i].iter().enumerate() {
                lower[i * n + j] = a[p * k + q] + if i == j { ridge * mean } else { 0.0 };
            }
        }
        if cholesky(&mut lower, n) {
            let mut x: Vec<f64> = used.iter().map(|q| b[*q]).collect();
            substitute(&lower, &mut x);
            let mut full = vec![0f64; k];
            used.iter().zip(x).for_each(|(q, x)| full[*q] = x);
            return Some(full);
        }
        ridge = (ridge * 100.0).max(1e-9);
    }
    None
}

/// Replaces the lower half of a symmetric matrix by its Cholesky factor; false when it is not
/// positive definite.
fn cholesky(a: &mut [f64], n: usize) -> bool {
    for i in 0..n {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|t| a[i * n + t] * a[j * n + t]).sum();
            let rest = a[i * n + j] - dot;
            if i > j {
                a[i * n + j] = rest / a[j * n + j];
            } else if rest > 0.0 {
                a[i * n + i] = rest.sqrt();
            } else {
                return false;
            }
        }
    }
    true
}

/// Solves `L Lᵀ x = b` in place.
fn substitute(lower: &[f64], x: &mut [f64]) {
    let n = x.len();
    for i in 0..n {
        let dot: f64 = (0..i).map(|t| lower[i * n + t] * x[t]).sum();
        x[i] = (x[i] - dot) / lower[i * n + i];
    }
    for i in (0..n).rev() {
        let dot: f64 = (i + 1..n).map(|t| lower[t * n + i] * x[t]).sum();
        x[i] = (x[i] - dot) / lower[i * n + i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    const H: [[f64; 4]; 4] =
        [[2.0, 0.5, 0.0, 0.0], [0.5, 1.0, 0.25, 0.0], [0.0, 0.25, 3.0, 1.0], [0.0, 0.0, 1.0, 4.0]];

    /// T7 of the SKIM specification: codebooks for fixed labels, from weighted means.
    #[test]
    fn t7_codebooks_in_closed_form() {
        let golden = [
            (
                [1.0, 2.0, 3.0, 5.0],
                [0usize, 0, 1, 1],
                [1.5, 4.0],
                5.25,
                [1.3043478261, 4.1304347826],
                4.9565217391,
            ),
            (
                [-1.0, 0.5, 2.0, 4.0],
                [0, 1, 1, 0],
                [3.0, 1.4],
                42.42,
                [2.3106060606, 1.5909090909],
                39.7992424242,
            ),
        ];
        for (w, labels, start, before, codebook, after) in golden {
            let quad = |c: [f64; 2]| {
                let r = [0, 1, 2, 3].map(|j: usize| w[j] - c[labels[j]]);
                let product = H.map(|row| row.iter().zip(r).map(|(h, r)| h * r).sum::<f64>());
                let loss: f64 = r.iter().zip(product).map(|(r, p)| r * p).sum();
                (product, loss)
            };
            let (product, loss) = quad(start);
            assert_relative_eq!(loss, before, max_relative = 1e-9);
            let (mut a, mut b) = ([0f64; 4], [0f64; 2]);
            for i in 0..4 {
                b[labels[i]] += product[i];
                for j in 0..4 {
                    a[labels[i] * 2 + labels[j]] += H[i][j];
                }
            }
            let shift = least_squares(&a, &b, 0.0).unwrap();
            let found = [start[0] + shift[0], start[1] + shift[1]];
            for (c, want) in found.iter().zip(codebook) {
                assert_relative_eq!(*c, want, max_relative = 1e-9);
            }
            assert_relative_eq!(quad(found).1, after, max_relative = 1e-9);
        }
    }

    #[test]
    fn unused_centroids_stay_and_singular_systems_are_damped() {
        let shift = least_squares(&[0.0, 0.0, 0.0, 4.0], &[0.0, 2.0], 0.0).unwrap();
        assert_eq!(shift, [0.0, 0.5]);
        let shift = least_squares(&[1.0; 4], &[1.0, 1.0], 0.0).unwrap();
        assert_relative_eq!(shift[0] + shift[1], 1.0, max_relative = 1e-5);
        assert_eq!(least_squares(&[], &[], 0.1), Some(vec![]));
        assert!(least_squares(&[1.0, 5.0, 5.0, 1.0], &[1.0, 1.0], 1e-7).is_none());
    }

    #[test]
    fn lookup_and_relabelling() {
        let (table, order) = Table::sorted(&[3.0, -1.0, 1.0]);
        assert_eq!(table.values(), [-1.0, 1.0, 3.0]);
        let found = [-9.0, 0.0, 0.1, 2.0, 2.1, f32::NAN].map(|v| table.nearest(v));
        assert_eq!(found, [0, 0, 1, 1, 2, 0]);
        let mut codes = [0, 1, 2, 0];
        relabel(&order, &mut codes);
        assert_eq!(codes, [2, 0, 1, 2]);
        assert_eq!(Table::sorted(&[7.0]).0.nearest(-1.0), 0);
        // Long tables are halved; the count is the same.
        for entries in [17, 18, 40, 255, 256] {
            let values: Vec<f32> = (0..entries).map(|i| (i * i) as f32).collect();
            let table = Table::sorted(&values).0;
            for value in (-1..entries * entries).step_by(7).map(|v| v as f32 + 0.25) {
                let want = table.middles.iter().filter(|m| **m < value).count();
                assert_eq!(table.nearest(value) as usize, want, "{entries} entries, {value}");
            }
        }
    }

    #[test]
    fn scaled_rows_find_the_nearest_value_and_move_by_their_scales() {
        let table = Arc::new(Table::sorted(&[-1.0, 0.5, 2.0]).0);
        // The second group mirrors the codebook, the third is empty.
        let grid = RowGrid::scaled(&table, &[2.0, -1.0, 0.0], 2);
        for (column, target, value) in [(0, 3.6, 4.0), (1, -0.4, 1.0), (2, 0.9, 1.0), (5, 9.0, 0.0)]
        {
            assert_eq!(grid.value(column, grid.nearest(column, target)), value, "{column}");
        }
        assert_eq!(grid.feature(3, 2), (1, 2.0));
        let moved = grid.moved(&[0.0, 0.25, 1.0], &mut [], true).unwrap();
        assert!(moved.scales().eq([2.0, -0.75, 1.0]));
        assert!(grid.moved(&[0.0, 1e9, 0.0], &mut [], true).is_none());
    }
}
