//! SqueezeLLM (Kim et al., ICML 2024): a codebook per row, clustered with the Fisher diagonal `G`
//! as weights, and optionally some weights kept apart (dense-and-sparse):
//!
//! ```text
//! minimise Σ_j G_ij (w_ij − c_{i,l_ij})²  over 2^b centroids c_i
//! sparse:  the share `sensitive` of weights with the largest G, then the share `outliers` of the
//!          others with the largest |w|; their place in the codes holds the entry nearest to zero
//! ```
//!
//! Clusters are the exact optimum instead of Lloyd's iterations, and the threshold of outliers is
//! solved by quantile instead of by hand; `G` is accumulated in f32. Centroids are f16.

use std::cmp::Ordering;

use anybit_core::kmeans::Exact1d;
use anybit_core::lnq::Table;
use anybit_core::{CoreError, GridSpec, Matrix, Plane, QuantizedMatrix, Sparse};
use anybit_grad::Labels;
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Citation, Method, Place, Rounding, options_table, read_options, whole_bits};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Inputs, Needs, Site, SiteError, SiteRounding};
use crate::tables::Allocation;

/// SqueezeLLM.
pub struct SqueezeLlm;

/// Its options.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Share of weights kept apart for their size, such as 0.0045.
    pub outliers: f64,
    /// Share of weights kept apart for their sensitivity, such as 0.0005.
    pub sensitive: f64,
}

impl Method for SqueezeLlm {
    fn name(&self) -> &'static str {
        "squeezellm"
    }

    fn summary(&self) -> &'static str {
        "a codebook per row, clustered by the loss's sensitivity; outliers kept apart if wanted"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "S. Kim, C. Hooper, A. Gholami, Z. Dong, X. Li, S. Shen, M. W. Mahoney, \
                        K. Keutzer. SqueezeLLM: Dense-and-Sparse Quantization. ICML 2024, PMLR \
                        235:23901-23923",
            link: "https://proceedings.mlr.press/v235/kim24f.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        let options: Options = read_options(recipe)?;
        for (name, share) in [("outliers", options.outliers), ("sensitive", options.sensitive)] {
            if !(0.0..=0.5).contains(&share) {
                return Err(format!("{name} is {share}: a share of weights from 0 to 0.5"));
            }
        }
        whole_bits(recipe)?;
        Ok(Box::new(DenseAndSparse { options }))
    }
}

struct DenseAndSparse {
    options: Options,
}

impl DenseAndSparse {
    /// Weights kept apart of `count`: for sensitivity, for size.
    fn kept(&self, count: usize) -> [usize; 2] {
        let of = |share: f64| (share * count as f64).round() as usize;
        let sensitive = of(self.options.sensitive).min(count);
        [sensitive, of(self.options.outliers).min(count - sensitive)]
    }
}

impl Rounding for DenseAndSparse {
    fn needs(&self) -> Needs {
        Needs { fisher: Some(Labels::Text), inputs: Inputs::Original, ..Default::default() }
    }

    fn options(&self) -> toml::Table {
        options_table(&self.options)
    }

    fn folds(&self) -> bool {
        false
    }

    fn layout(&self, place: Place<'_>) -> MatrixLayout {
        let (rows, cols) = place.shape;
        let grid = GridSpec::Codebook { bits: place.settings.grid.bits() };
        let entries: usize = self.kept(rows * cols).iter().sum();
        let sparse = (entries > 0).then_some(entries);
        MatrixLayout { sparse, ..MatrixLayout::single(grid, rows) }
    }

    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError> {
        let mut matrices = Vec::new();
        for (i, linear) in site.linears.iter().enumerate() {
            let bits = linear.settings.grid.bits();
            let count = self.kept(linear.weights.data.len());
            let matrix = round_matrix(linear.weights, site.fisher(i)?, bits, count);
            matrices.push(matrix.map_err(|e| (i, e))?);
        }
        Ok(SiteRounding::plain(matrices))
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        None
    }
}

/// The optimal codebook of a row for every width up to `max_bits`. Zeros carry no weight, as in
/// the reference.
pub(crate) fn cluster_row(w: &[f32], g: &[f32], max_bits: u8) -> Result<Exact1d, CoreError> {
    let weights: Vec<f32> =
        w.iter().zip(g).map(|(w, g)| if *w == 0.0 { 0.0 } else { *g }).collect();
    Exact1d::new(w, &weights, 1 << max_bits)
}

/// The `2^bits` centroids of row `row` as they are stored, ascending.
///
/// # Errors
/// A centroid that an f16 cannot hold.
pub(crate) fn stored_codebook(
    clusters: &Exact1d,
    bits: u8,
    row: usize,
) -> Result<Table, CoreError> {
    let centroids = clusters.solution(1 << bits).centroids;
    let rounded: Vec<f32> = centroids.iter().map(|c| f16::from_f32(*c).to_f32()).collect();
    match rounded.iter().position(|c| !c.is_finite()) {
        None => Ok(Table::sorted(&rounded).0),
        Some(col) => {
            let value = format!("{} (beyond an f16)", centroids[col]);
            Err(CoreError::NotFinite { what: "codebook", row, col, value })
        }
    }
}

fn round_matrix(
    weights: &Matrix,
    fisher: &Matrix,
    bits: u8,
    kept: [usize; 2],
) -> Result<QuantizedMatrix, CoreError> {
    weights.check_finite("weight")?;
    let apart = keep_apart(weights, fisher, kept);
    let mut dense = weights.clone();
    apart.iter().for_each(|at| dense.data[*at] = 0.0);
    let mut plane = Plane::empty(GridSpec::Codebook { bits }, weights.rows, weights.cols)?;
    plane.rows_mut().enumerate().try_for_each(|(i, mut out)| {
        let row = dense.row(i);
        let table = stored_codebook(&cluster_row(row, fisher.row(i), bits)?, bits, i)?;
        let codes: Vec<u8> = row.iter().map(|w| table.nearest(*w)).collect();
        let centroids: Vec<f16> = table.values().iter().map(|c| f16::from_f32(*c)).collect();
        out.set_codebook(&codes, &centroids);
        Ok::<(), CoreError>(())
    })?;
    let matrix = QuantizedMatrix::single(plane);
    if apart.is_empty() {
        return Ok(matrix);
    }
    let decoded = matrix.dequantize();
    let values: Vec<f32> = apart.iter().map(|at| weights.data[*at] - decoded.data[*at]).collect();
    matrix.with_sparse(Sparse::from_entries((weights.rows, weights.cols), &apart, &values)?)
}

/// Indices of the weights that are kept apart, ascending; ties go to the lower index.
fn keep_apart(weights: &Matrix, fisher: &Matrix, [sensitive, outliers]: [usize; 2]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.data.len()).collect();
    let first = top(&mut order, sensitive, |at| fisher.data[at]);
    let second = top(&mut order[first..], outliers, |at| weights.data[at].abs());
    let mut apart = order[..first + second].to_vec();
    apart.par_sort_unstable();
    apart
}

/// Moves the `count` indices with the largest keys to the front.
fn top(order: &mut [usize], count: usize, key: impl Fn(usize) -> f32) -> usize {
    let count = count.min(order.len());
    let compare = |a: &usize, b: &usize| match key(*b).total_cmp(&key(*a)) {
        Ordering::Equal => a.cmp(b),
        other => other,
    };
    if count > 0 && count < order.len() {
        order.select_nth_unstable_by(count - 1, compare);
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;

    fn case() -> (Matrix, Matrix) {
        let mut rng = SplitMix64::new(12);
        let normal = |_| rng.normal() as f32;
        let mut w = Matrix::from_vec(6, 64, (0..384).map(normal).collect()).unwrap();
        w.data[70] = 40.0;
        let mut rng = SplitMix64::new(13);
        let g = (0..384).map(|_| (1.5 * rng.normal()).exp() as f32).collect();
        let mut g = Matrix::from_vec(6, 64, g).unwrap();
        g.data[200] = 1e6;
        (w, g)
    }

    #[test]
    fn weights_kept_apart_are_exact_up_to_f16() {
        let (w, g) = case();
        let matrix = round_matrix(&w, &g, 2, [1, 3]).unwrap();
        let decoded = matrix.dequantize();
        assert_eq!(matrix.sparse.as_ref().unwrap().cols.len(), 4);
        for at in [70, 200] {
            let (got, want) = (decoded.data[at], w.data[at]);
            assert!((got - want).abs() <= 1e-3 * want.abs(), "{got} for {want}");
        }
        // Without its outlier the row keeps finer centroids for all others.
        let error = |q: &Matrix| -> f64 {
            let row = w.row(1).iter().zip(q.row(1)).zip(g.row(1));
            row.map(|((w, q), g)| (*g * (w - q).powi(2)) as f64).sum()
        };
        let dense = round_matrix(&w, &g, 2, [0, 0]).unwrap();
        assert!(dense.sparse.is_none());
        assert!(error(&decoded) < error(&dense.dequantize()));
    }

    #[test]
    fn rows_of_zeros_constants_and_no_sensitivity() {
        let (mut w, mut g) = case();
        w.row_mut(0).fill(0.0);
        w.row_mut(2).fill(0.75);
        g.row_mut(3).fill(0.0);
        let decoded = round_matrix(&w, &g, 3, [0, 0]).unwrap().dequantize();
        assert!(decoded.row(0).iter().all(|q| *q == 0.0));
        assert!(decoded.row(2).iter().all(|q| *q == 0.75));
        // No sensitivity counts as equal sensitivity.
        let ones = Matrix::from_vec(1, 64, vec![1.0; 64]).unwrap();
        let row = Matrix::from_vec(1, 64, w.row(3).to_vec()).unwrap();
        let alone = round_matrix(&row, &ones, 3, [0, 0]).unwrap().dequantize();
        assert_eq!(decoded.row(3), alone.row(0));
        g.data[70] = f32::NAN;
        assert!(round_matrix(&w, &g, 3, [0, 0]).is_err());
        g.data[70] = -1.0;
        assert!(round_matrix(&w, &g, 3, [0, 0]).is_err());
        let (mut w, g) = case();
        w.row_mut(0).fill(1e6);
        assert!(round_matrix(&w, &g, 3, [0, 0]).unwrap_err().to_string().contains("f16"));
    }
}
