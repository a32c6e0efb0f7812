//! Codebooks that all rows of a matrix share, with a scale per group of columns:
//! `q_ij = s_{i,g(j)} · c[u_ij]`. A codebook costs nothing per row, so narrow rows and wide codes
//! keep the values where weights are dense without paying `16 · 2^b` bits a row for it.
//!
//! ```text
//! c = exact k-means of w_ij / rms_{i,g}  with weights  rms²_{i,g} h_j       h = diag(H)
//! s = argmin Σ_j h_j (w_j − s c[u_j])²   for nearest codes, alternating     per group
//! ```
//!
//! The weights are what an error of a normalized value costs in the output. [`crate::lnq`] refines
//! scales and codes under all of `H`.

use std::sync::Arc;

use half::f16;
use rayon::prelude::*;

use crate::kmeans::Exact1d;
use crate::lnq::{RowGrid, Table};
use crate::{Matrix, Result};

/// Values that the codebooks are fitted to; more change them little.
const SAMPLE: usize = 1 << 13;
/// Alternations of codes and scale.
const ROUNDS: usize = 3;
/// Starts of a scale, as multiples of the root mean square: coarse codebooks have several local
/// optima, fine ones hardly.
const STARTS: [f32; 3] = [1.0, 0.8, 1.25];
/// Entries from which on one start is enough.
const FINE: usize = 16;

/// Fits codebooks of `1..=max_bits` bits to `weights`, in that order; `importance` is `h`, one
/// value per column. All values are ones that an f16 holds.
///
/// # Errors
/// Weights or importances that are not finite, an empty matrix, more than 8 bits.
pub fn fit_codebooks(
    weights: &Matrix,
    importance: &[f32],
    group_len: usize,
    max_bits: u8,
) -> Result<Vec<Arc<Table>>> {
    weights.check_finite("weight")?;
    let (n, m) = (weights.rows, weights.cols);
    // A stride that shares no factor with the row length visits all columns evenly.
    let mut stride = (n * m / SAMPLE).max(1);
    while stride > 1 && gcd(stride, m) != 1 {
        stride += 1;
    }
    let (mut values, mut masses) = (Vec::new(), Vec::new());
    for at in (0..n * m).step_by(stride) {
        let (row, col) = (at / m, at % m);
        let start = col / group_len * group_len;
        let group = &weights.row(row)[start..(start + group_len).min(m)];
        let rms = root_mean_square(group);
        if rms > 0.0 {
            values.push(weights.row(row)[col] / rms);
            masses.push(rms * rms * importance[col]);
        }
    }
    if values.is_empty() {
        (values, masses) = (vec![0.0], vec![1.0]);
    }
    let clusters = Exact1d::new(&values, &masses, 1 << max_bits)?;
    let table = |bits: u8| {
        let centroids = clusters.solution(1 << bits).centroids;
        let rounded: Vec<f32> = centroids.iter().map(|c| f16::from_f32(*c).to_f32()).collect();
        Arc::new(Table::sorted(&rounded).0)
    };
    Ok((1..=max_bits).map(table).collect())
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn root_mean_square(values: &[f32]) -> f32 {
    let sum: f64 = values.iter().map(|v| *v as f64 * *v as f64).sum();
    (sum / values.len().max(1) as f64).sqrt() as f32
}

/// Fits the scales of every row to `table`.
pub fn fit_rows(
    weights: &Matrix,
    importance: &[f32],
    table: &Arc<Table>,
    group_len: usize,
) -> Vec<RowGrid> {
    let fit = |row: &[f32]| {
        let groups = row.chunks(group_len).zip(importance.chunks(group_len));
        let scales: Vec<f32> = groups.map(|(w, h)| fit_scale(w, h, table)).collect();
        RowGrid::scaled(table, &scales, group_len)
    };
    weights.data.par_chunks(weights.cols.max(1)).map(fit).collect()
}

/// The scale of one group, one that an f16 holds; zero for a group of zeros.
fn fit_scale(w: &[f32], h: &[f32], table: &Table) -> f32 {
    let rms = root_mean_square(w);
    let round = |s: f64| {
        let s = f16::from_f64(s);
        if s.is_finite() { s.to_f32() } else { f16::MAX.to_f32() }
    };
    let mut best = (f64::INFINITY, round(rms as f64));
    let starts = if table.values().len() < FINE { &STARTS[..] } else { &STARTS[..1] };
    for start in starts {
        let mut scale = round((rms * start) as f64);
        for _ in 0..ROUNDS {
            if scale == 0.0 {
                break;
            }
            let (mut error, mut dot, mut square) = (0f64, 0f64, 0f64);
            let inverse = 1.0 / scale;
            for (w, h) in w.iter().zip(h) {
                let c = table.values()[table.nearest(w * inverse) as usize];
                let (c, w, h) = (c as f64, *w as f64, *h as f64);
                error += h * (w - scale as f64 * c).powi(2);
                dot += h * w * c;
                square += h * c * c;
            }
            if error < best.0 {
                best = (error, scale);
            }
            if square <= 0.0 {
                break;
            }
            scale = round(dot / square);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;

    fn gaussian(n: usize, m: usize) -> Matrix {
        let mut rng = SplitMix64::new(6);
        let mut w = Matrix::zeros(n, m);
        for (i, row) in w.data.chunks_mut(m).enumerate() {
            row.iter_mut().for_each(|w| *w = rng.normal() as f32 * (1.0 + i as f32));
        }
        w
    }

    /// On Gaussian weights the relative error approaches that of Lloyd and Max (T4 of SKIM's
    /// specification), whatever the size of each row.
    #[test]
    fn gaussian_rate() {
        let w = gaussian(40, 512);
        let ones = vec![1.0; 512];
        let tables = fit_codebooks(&w, &ones, 512, 4).unwrap();
        for (bits, want) in [(1, 0.36338), (2, 0.11748), (3, 0.034548), (4, 0.009501)] {
            let grids = fit_rows(&w, &ones, &tables[bits - 1], 512);
            let (mut error, mut norm) = (0f64, 0f64);
            for (row, grid) in w.data.chunks(512).zip(&grids) {
                for (j, w) in row.iter().enumerate() {
                    let q = grid.value(j, grid.nearest(j, *w));
                    error += (*w as f64 - q as f64).powi(2);
                    norm += *w as f64 * *w as f64;
                }
            }
            let relative = error / norm;
            assert!((relative / want - 1.0).abs() < 0.04, "{bits} bits: {relative} for {want}");
        }
    }

    #[test]
    fn zeros_and_tails() {
        let mut w = gaussian(3, 40);
        w.row_mut(1).fill(0.0);
        let tables = fit_codebooks(&w, &[1.0; 40], 16, 3).unwrap();
        let grids = fit_rows(&w, &[1.0; 40], &tables[2], 16);
        assert_eq!(grids[0].scales().count(), 3);
        assert!(grids[1].scales().all(|s| s == 0.0));
        assert_eq!(grids[1].value(5, grids[1].nearest(5, 3.0)), 0.0);
        let zeros = Matrix::zeros(2, 8);
        assert_eq!(fit_codebooks(&zeros, &[1.0; 8], 8, 2).unwrap()[1].values().len(), 4);
        let mut bad = gaussian(2, 8);
        bad.data[3] = f32::NAN;
        assert!(fit_codebooks(&bad, &[1.0; 8], 8, 2).is_err());
    }
}
