//! SKIM (Bai, Liu, Liu, ICML 2025, PMLR 267:2520-2534). For each matrix `W`, with `H = XᵀX` of its
//! inputs and the Fisher diagonal `G`:
//!
//! ```text
//! 1  E_ib = r H rᵀ,  r = w_i − c[l]   with the optimal 2^b centroids under weights G      eq. 4, 5
//! 2  b_i  greedily: the row whose error drops most gets the next bit, until Σ b_i = n·bits   alg. 1
//! 3  l    labels of row i at b_i bits, fixed from here on                                    alg. 3
//! 4  α    one factor per column: min Σ_i r_i H r_iᵀ, q_ij = α_j c_i[l_ij], c = G-mean of W/α eq. 13
//! ```
//!
//! The paper has no public code. INFERRED, and so ours: clusters are exact (it names no
//! algorithm), `bmin` is 2, "at most 120 steps" of Adam end when they bring nothing more, `H` is
//! that of the original model's inputs, centroids are means weighted by `G` (which continues step 3
//! at `α = 1`), the best `α` seen is kept, centroids are f16. Algorithm 1 is printed with the sign of the gain reversed and a test after the loop; both
//! are mended as in [`anybit_core::allocate`]. Where one norm feeds all linears of a site, they
//! share one `α`, which the norm takes up, so that it costs neither bytes nor time.

use anybit_core::allocate::{AllocationStart, greedy, target};
use anybit_core::column_scale::{CentroidWeights, ColumnScaleOptions, train};
use anybit_core::kmeans::Exact1d;
use anybit_core::{CoreError, Gram, GridSpec, Matrix, Plane, QuantizedMatrix};
use anybit_grad::Labels;
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::squeezellm::{cluster_row, stored_codebook};
use super::{Citation, Method, Place, Rounding, options_table, read_options};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Inputs, Needs, Site, SiteError, SiteLinear, SiteRounding};
use crate::tables::{Allocation, ErrorTable, Goal, MatrixTable};

/// SKIM.
pub struct Skim;

/// Its options; the defaults are the paper's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Fewest bits of a row.
    pub bmin: u8,
    /// Most bits of a row; raised to the average where that is more.
    pub bmax: u8,
    /// Where the allocation starts: `min`, `floor` (for OPT) or `uniform`.
    pub init: AllocationStart,
    /// Train column scales.
    pub scales: bool,
    /// Let one column scale serve all linears behind a norm, and the norm take it up.
    pub fold: bool,
    /// Steps of Adam for the column scales, at most.
    pub steps: usize,
    /// They end before when ten steps bring less than this share of the gain so far.
    pub settled: f64,
}

impl Default for Options {
    fn default() -> Self {
        let init = AllocationStart::Min;
        Self { bmin: 2, bmax: 4, init, scales: true, fold: true, steps: 120, settled: 0.005 }
    }
}

impl Method for Skim {
    fn name(&self) -> &'static str {
        "skim"
    }

    fn summary(&self) -> &'static str {
        "a codebook and a width per row, trained column scales; any average of bits"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "R. Bai, B. Liu, Q. Liu. SKIM: Any-bit Quantization Pushing The Limits of \
                        Post-Training Quantization. ICML 2025, PMLR 267:2520-2534",
            link: "https://proceedings.mlr.press/v267/bai25c.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        let mut options: Options = read_options(recipe)?;
        let Options { bmin, bmax, .. } = options;
        if bmin < 1 || bmax > 8 || bmin > bmax {
            return Err(format!("bmin {bmin} and bmax {bmax}: 1 ≤ bmin ≤ bmax ≤ 8"));
        }
        if recipe.max_bytes.is_none() {
            // A row may always have the average, and less than the least that the paper allows
            // where the average is below it.
            options.bmin = options.bmin.min(recipe.bits.floor().max(1.0) as u8);
            options.bmax = options.bmax.max(recipe.bits.ceil() as u8);
        }
        Ok(Box::new(ScaledClusters { options }))
    }
}

struct ScaledClusters {
    options: Options,
}

impl Rounding for ScaledClusters {
    fn needs(&self) -> Needs {
        Needs {
            gram: true,
            fisher: Some(Labels::Text),
            inputs: Inputs::Original,
            ..Default::default()
        }
    }

    fn options(&self) -> toml::Table {
        options_table(&self.options)
    }

    fn folds(&self) -> bool {
        self.options.scales && self.options.fold
    }

    fn layout(&self, place: Place<'_>) -> MatrixLayout {
        let grid = GridSpec::Codebook { bits: self.options.bmin };
        let column_scale = self.options.scales && !place.folds;
        MatrixLayout { column_scale, ..MatrixLayout::single(grid, place.shape.0) }
    }

    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError> {
        let gram = site.gram()?;
        if !site.folds || !self.folds() {
            let mut matrices = Vec::new();
            for (i, linear) in site.linears.iter().enumerate() {
                let labelled = Labelled::of(linear, site.fisher(i)?).map_err(|e| (i, e))?;
                let (alpha, books) = self.scale(&labelled, gram).map_err(|e| (i, e))?;
                let matrix =
                    pack(linear, &labelled, &books, 0, self.options.scales.then_some(&alpha));
                matrices.push(matrix.map_err(|e| (i, e))?);
            }
            return Ok(SiteRounding::plain(matrices));
        }
        // One α for all: their rows as one matrix.
        let mut all = Labelled::default();
        for (i, linear) in site.linears.iter().enumerate() {
            all.append(Labelled::of(linear, site.fisher(i)?).map_err(|e| (i, e))?);
        }
        let (alpha, books) = self.scale(&all, gram).map_err(|e| (0, e))?;
        let (mut matrices, mut first) = (Vec::new(), 0);
        for (i, linear) in site.linears.iter().enumerate() {
            matrices.push(pack(linear, &all, &books, first, None).map_err(|e| (i, e))?);
            first += linear.weights.rows;
        }
        Ok(SiteRounding { matrices, fold: Some(alpha) })
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        Some(self)
    }
}

/// Rows with their labels at the widths that they were given.
#[derive(Default)]
struct Labelled {
    weights: Matrix,
    fisher: Matrix,
    labels: Vec<u8>,
    bits: Vec<u8>,
    /// Centroids without column scales.
    books: Vec<Vec<f32>>,
}

impl Labelled {
    fn of(linear: &SiteLinear<'_>, fisher: &Matrix) -> Result<Self, CoreError> {
        let weights = linear.weights;
        let bits = linear.layout.row_bits(weights.rows);
        let rows: Vec<(Vec<u8>, Vec<f32>)> = bits
            .par_iter()
            .enumerate()
            .map(|(i, bits)| {
                let clusters = cluster_row(weights.row(i), fisher.row(i), *bits)?;
                let table = stored_codebook(&clusters, *bits, i)?;
                let labels = weights.row(i).iter().map(|w| table.nearest(*w)).collect();
                Ok((labels, table.values().to_vec()))
            })
            .collect::<Result<_, CoreError>>()?;
        let (labels, books): (Vec<_>, Vec<_>) = rows.into_iter().unzip();
        let (weights, fisher) = (weights.clone(), fisher.clone());
        Ok(Self { weights, fisher, labels: labels.concat(), bits, books })
    }

    fn append(&mut self, other: Self) {
        for (own, other) in [(&mut self.weights, other.weights), (&mut self.fisher, other.fisher)] {
            own.rows += other.rows;
            own.cols = other.cols;
            own.data.extend(other.data);
        }
        self.labels.extend(other.labels);
        self.bits.extend(other.bits);
        self.books.extend(other.books);
    }
}

impl ScaledClusters {
    /// Step 4: column scales, and the centroids that go with them.
    fn scale(&self, rows: &Labelled, gram: &Gram) -> Result<(Vec<f32>, Vec<Vec<f32>>), CoreError> {
        if !self.options.scales {
            return Ok((vec![1.0; rows.weights.cols], rows.books.clone()));
        }
        let options = ColumnScaleOptions {
            steps: self.options.steps,
            settled: self.options.settled,
            weights: CentroidWeights::Sensitivity,
            ..Default::default()
        };
        let Labelled { weights, fisher, labels, bits, .. } = rows;
        let scale = train(weights, labels, bits, fisher, gram, options)?;
        Ok((scale.alpha, scale.centroids))
    }
}

/// Packs the rows of `linear`, which begin at row `first` of `rows`.
fn pack(
    linear: &SiteLinear<'_>,
    rows: &Labelled,
    books: &[Vec<f32>],
    first: usize,
    alpha: Option<&Vec<f32>>,
) -> Result<QuantizedMatrix, CoreError> {
    let (n, m) = (linear.weights.rows, linear.weights.cols);
    let mut planes = Vec::new();
    for (group, (grid, count)) in linear.layout.planes.iter().enumerate() {
        let members = linear.layout.rows_of(group);
        let mut plane = Plane::empty(*grid, *count, m)?;
        plane.rows_mut().zip(members.par_iter()).try_for_each(|(mut out, row)| {
            let row = first + row;
            let centroids: Vec<f16> = books[row].iter().map(|c| f16::from_f32(*c)).collect();
            if let Some(col) = centroids.iter().position(|c| !c.is_finite()) {
                let value = format!("{} (beyond an f16)", books[row][col]);
                return Err(CoreError::NotFinite { what: "codebook", row, col, value });
            }
            out.set_codebook(&rows.labels[row * m..(row + 1) * m], &centroids);
            Ok(())
        })?;
        planes.push(plane);
    }
    let scale = alpha.map(|alpha| alpha.iter().map(|a| f16::from_f32(*a)).collect());
    linear.layout.assemble((n, m), planes, scale)
}

impl Allocation for ScaledClusters {
    fn tabulate(&self, site: &Site<'_>) -> Result<Vec<ErrorTable>, SiteError> {
        let gram = site.gram()?;
        let Options { bmin, bmax, .. } = self.options;
        let mut tables = Vec::new();
        for (i, linear) in site.linears.iter().enumerate() {
            let errors = row_errors(linear.weights, site.fisher(i)?, gram, (bmin, bmax));
            let options = (bmin..=bmax).map(|bits| GridSpec::Codebook { bits }).collect();
            tables.push(ErrorTable { options, errors: errors.map_err(|e| (i, e))? });
        }
        Ok(tables)
    }

    /// Each matrix has the average by itself, as in algorithm 3. A goal in bytes is met by the
    /// largest average that fits.
    fn choose(&self, tables: &[MatrixTable], goal: Goal) -> Result<Vec<Vec<u8>>, CoreError> {
        let bytes = match goal {
            Goal::CodeBits(bits) => return self.at_average(tables, bits),
            Goal::Bytes(bytes) => bytes,
        };
        let size = |choices: &[Vec<u8>]| -> u64 {
            let layout = |(t, c): (&MatrixTable, &Vec<u8>)| t.layout_of(c).bytes(t.rows, t.cols);
            tables.iter().zip(choices).map(layout).sum()
        };
        let (mut low, mut high) = (self.options.bmin as f64, self.options.bmax as f64);
        let mut best = self.at_average(tables, low)?;
        let minimum = size(&best);
        if minimum > bytes {
            return Err(CoreError::Budget { given: bytes * 8, minimum: minimum * 8 });
        }
        let most = self.at_average(tables, high)?;
        if size(&most) <= bytes {
            return Ok(most);
        }
        // Averages move in steps of a bit over the rows of the tallest matrix.
        let rows = tables.iter().map(|t| t.rows).max().unwrap_or(1);
        for _ in 0..rows.next_power_of_two().ilog2() + 4 {
            let middle = 0.5 * (low + high);
            let choice = self.at_average(tables, middle)?;
            if size(&choice) <= bytes {
                (low, best) = (middle, choice);
            } else {
                high = middle;
            }
        }
        Ok(best)
    }
}

impl ScaledClusters {
    fn at_average(&self, tables: &[MatrixTable], bits: f64) -> Result<Vec<Vec<u8>>, CoreError> {
        let Options { bmin, bmax, init, .. } = self.options;
        let choose = |t: &MatrixTable| -> Result<Vec<u8>, CoreError> {
            let widths = greedy(&t.table.errors, bmin, bmax, target(t.rows, bits), init)?;
            Ok(widths.into_iter().map(|b| b - bmin).collect())
        };
        tables.iter().map(choose).collect()
    }
}

/// Rows whose clusterings are held at a time.
const ROWS: usize = 2048;

/// Step 1: `E`, `[rows, bmax − bmin + 1]`.
fn row_errors(
    weights: &Matrix,
    fisher: &Matrix,
    gram: &Gram,
    (bmin, bmax): (u8, u8),
) -> Result<Vec<f64>, CoreError> {
    let mut errors = Vec::new();
    for first in (0..weights.rows).step_by(ROWS) {
        let count = ROWS.min(weights.rows - first);
        let rows = |m: &Matrix| {
            let data = m.data[first * m.cols..(first + count) * m.cols].to_vec();
            Matrix { rows: count, cols: m.cols, data }
        };
        errors.extend(chunk_errors(&rows(weights), &rows(fisher), first, gram, (bmin, bmax))?);
    }
    Ok(errors)
}

/// The rows from `first` on.
fn chunk_errors(
    weights: &Matrix,
    fisher: &Matrix,
    first: usize,
    gram: &Gram,
    (bmin, bmax): (u8, u8),
) -> Result<Vec<f64>, CoreError> {
    let m = weights.cols;
    let widths = (bmax - bmin) as usize + 1;
    let clusters: Vec<Exact1d> = (0..weights.rows)
        .into_par_iter()
        .map(|i| cluster_row(weights.row(i), fisher.row(i), bmax))
        .collect::<Result<_, _>>()?;
    let mut errors = vec![0f64; weights.rows * widths];
    for (at, bits) in (bmin..=bmax).enumerate() {
        let mut residual = weights.clone();
        let rows = residual.data.par_chunks_mut(m).zip(&clusters).enumerate();
        rows.try_for_each(|(i, (row, clusters))| {
            let table = stored_codebook(clusters, bits, first + i)?;
            row.iter_mut().for_each(|w| *w -= table.values()[table.nearest(*w) as usize]);
            Ok::<(), CoreError>(())
        })?;
        for (i, error) in gram.row_errors(&residual).into_iter().enumerate() {
            errors[i * widths + at] = error.max(0.0);
        }
    }
    Ok(errors)
}
