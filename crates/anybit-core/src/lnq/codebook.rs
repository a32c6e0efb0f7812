//! One row's codebook: lookup by counting borders, and the linear system that moves it to the
//! optimum for fixed labels, `(PᵀHP + ρ) δ = PᵀH r` (GuidedQuant, arXiv 2505.07004, section 4).
//! Systems are small (`2^bits` unknowns) and f64.

/// An ascending codebook.
#[derive(Debug, Clone)]
pub(super) struct Book {
    pub(super) values: Vec<f32>,
    /// Borders between neighbours: the code of a value is the number of borders below it.
    middles: Vec<f32>,
    /// Place of each value in the codebook from which this one was sorted.
    pub(super) order: Vec<u8>,
}

impl Book {
    pub(super) fn new(unsorted: &[f32]) -> Self {
        let mut order: Vec<u8> = (0..unsorted.len()).map(|i| i as u8).collect();
        order.sort_by(|&a, &b| unsorted[a as usize].total_cmp(&unsorted[b as usize]));
        let values: Vec<f32> = order.iter().map(|i| unsorted[*i as usize]).collect();
        let middles = values.windows(2).map(|pair| 0.5 * pair[0] + 0.5 * pair[1]).collect();
        Self { values, middles, order }
    }

    pub(super) fn nearest(&self, value: f32) -> u8 {
        self.middles.iter().map(|middle| u32::from(*middle < value)).sum::<u32>() as u8
    }

    /// Turns labels of the unsorted codebook into labels of this one.
    pub(super) fn relabel(&self, labels: &mut [u8]) {
        let mut rank = [0u8; 256];
        for (i, from) in self.order.iter().enumerate() {
            rank[*from as usize] = i as u8;
        }
        labels.iter_mut().for_each(|label| *label = rank[*label as usize]);
    }
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
        let book = Book::new(&[3.0, -1.0, 1.0]);
        assert_eq!(book.values, [-1.0, 1.0, 3.0]);
        let found = [-9.0, 0.0, 0.1, 2.0, 2.1, f32::NAN].map(|v| book.nearest(v));
        assert_eq!(found, [0, 0, 1, 1, 2, 0]);
        let mut labels = [0, 1, 2, 0];
        book.relabel(&mut labels);
        assert_eq!(labels, [2, 0, 1, 2]);
        assert_eq!(Book::new(&[7.0]).nearest(-1.0), 0);
    }
}
