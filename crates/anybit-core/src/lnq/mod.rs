//! LNQ, non-uniform rounding under the Gram matrix of the inputs (GuidedQuant, Kim et al., arXiv
//! 2505.07004, section 4; specification of SKIM, section 7.3). For one row with parameters `θ` of
//! its grid (the centroids of its codebook, or the scales of its groups: [`RowGrid`]), codes `l`,
//! `q = P θ` and residual `r = w − P θ`, alternately
//!
//! ```text
//! grid:      θ += (Pᵀ H P + ρ)⁻¹ Pᵀ H r               closed form, ρ = ridge · mean diagonal
//! sweeps:    l_j = nearest(q_j + (r H)_j / H_jj)      coordinate descent, column after column
//! ```
//!
//! Parameters are rounded to f16, as they are stored, before codes follow them. The ridge pulls towards the previous grid, not towards zero, so that both halves can only
//! lower `r H rᵀ`; a row whose loss rises nevertheless, by rounding errors, is put back. `r H` is
//! kept in f32: updates inside a block of columns are immediate, the rest of the row follows once
//! per block with a matrix product, as in GPTQ. Rows start from the labels given, or from one pass
//! of GPTQ's error feedback onto the given grids ([`feedback`](feedback())), whichever is better.

mod feedback;
mod row_grid;

use std::ops::Range;

use rayon::prelude::*;

pub use feedback::feedback;
pub use row_grid::{RowGrid, Table};

use crate::error::check_len;
use crate::linalg::{View, matmul};
use crate::rounding::{GptqFactor, GptqOptions};
use crate::{CoreError, Gram, Matrix, Result};
use row_grid::{least_squares, relabel};

/// Rows that one task rounds together; fixed, so that results do not depend on threads.
const ROWS: usize = 32;
/// Columns between two updates of the rest of the row.
const BLOCK: usize = 128;
/// Side of the tiles of `H` that are summed in f32 for `PᵀHP`; a tile stays in the cache while all
/// rows of a task use it.
const TILE: usize = 256;

/// Where rows start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LnqInit {
    /// At the labels given.
    Labels,
    /// At those of error feedback onto the given codebooks, where they are better.
    Feedback {
        /// Damping as a fraction of the mean diagonal of `H`.
        damp: f64,
        /// Round columns in order of falling `H_jj`.
        act_order: bool,
    },
}

/// Settings of [`lnq`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LnqOptions {
    /// Rounds of codebook and sweeps; a last codebook follows.
    pub rounds: usize,
    /// Sweeps of coordinate descent in a round.
    pub sweeps: usize,
    /// Ridge of the codebook's equations, as a fraction of their mean diagonal.
    pub ridge: f64,
    /// Where rows start.
    pub init: LnqInit,
    /// Round parameters to f16, as they are stored, and sweep once more at the end, since rounding
    /// moves all weights of a centroid or group together.
    pub half: bool,
}

impl LnqOptions {
    /// Fits and sweeps in turn, beginning with a fit.
    fn half_steps(&self) -> usize {
        2 * self.rounds + 1 + usize::from(self.half)
    }
}

impl Default for LnqOptions {
    fn default() -> Self {
        let init = LnqInit::Feedback { damp: 0.01, act_order: true };
        Self { rounds: 2, sweeps: 4, ridge: 1e-7, init, half: true }
    }
}

/// Rounded rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Lnq {
    /// Codebook of each row, ascending.
    pub codebooks: Vec<Vec<f32>>,
    /// Labels, `[n, m]`.
    pub labels: Vec<u8>,
    /// `r H rᵀ` of each row.
    pub row_losses: Vec<f64>,
    /// Their sum at the start given, after the choice of the start, and after every half step;
    /// never rises.
    pub trace: Vec<f64>,
}

/// Improves `labels`, `[n, m]`, and `codebooks`, one per row of 1 to 256 centroids in any order,
/// under `gram`.
///
/// For fewer calibration tokens than a few times `m`, adding a few percent of the mean diagonal to
/// the diagonal of `gram` makes the result generalise better.
///
/// # Errors
/// Shapes that differ, values that are not finite, labels outside their codebook; with
/// [`LnqInit::Feedback`] also a Gram matrix that stays singular.
pub fn lnq(
    weights: &Matrix,
    labels: &[u8],
    codebooks: &[Vec<f32>],
    gram: &Gram,
    options: LnqOptions,
) -> Result<Lnq> {
    check(weights, codebooks)?;
    let (grids, labels) = sorted(weights.cols, codebooks, labels)?;
    let factor = match options.init {
        LnqInit::Labels => None,
        LnqInit::Feedback { damp, act_order } => {
            let options = GptqOptions { damp, act_order, ..Default::default() };
            Some(GptqFactor::new(gram, options)?)
        }
    };
    let h = gram.to_full();
    let refined = refine(weights, grids, Some(labels), &h, factor.as_ref(), options)?;
    let codebooks = refined.grids.iter().map(|grid| grid.table().values().to_vec()).collect();
    let Refined { codes: labels, row_losses, trace, .. } = refined;
    Ok(Lnq { codebooks, labels, row_losses, trace })
}

/// Rounded rows on grids of any kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Refined {
    /// Grid of each row.
    pub grids: Vec<RowGrid>,
    /// Codes, `[n, m]`.
    pub codes: Vec<u8>,
    /// `r H rᵀ` of each row.
    pub row_losses: Vec<f64>,
    /// Their sum at the start given, after the choice of the start, and after every half step;
    /// never rises.
    pub trace: Vec<f64>,
}

/// Rounds rows on `grids` under `h`, all of `H` ([`Gram::to_full`]), starting from `codes`, from error feedback with `factor`,
/// or from the better of both. `options.init` plays no part.
///
/// # Errors
/// A Gram matrix of another size, neither codes nor factor, weights that are not finite.
pub fn refine(
    weights: &Matrix,
    grids: Vec<RowGrid>,
    codes: Option<Vec<u8>>,
    h: &Matrix,
    factor: Option<&GptqFactor>,
    options: LnqOptions,
) -> Result<Refined> {
    weights.check_finite("weight")?;
    check_len("Gram matrix of the inputs", weights.cols, h.rows)?;
    check_len("grids of rows", weights.rows, grids.len())?;
    let fed_back = factor.map(|factor| feedback(weights, &grids, factor).0);
    let (codes, alternative) = match (codes, fed_back) {
        (Some(codes), alternative) => (codes, alternative),
        (None, Some(codes)) => (codes, None),
        (None, None) => {
            let (expected, found) = ("codes or a factor".into(), "neither".into());
            return Err(CoreError::Shape { what: "start of the rounding", expected, found });
        }
    };
    check_len("codes", weights.data.len(), codes.len())?;
    let diagonal: Vec<f32> = (0..h.rows).map(|j| h.row(j)[j]).collect();
    let inverse = diagonal.iter().map(|h| if *h > 0.0 { 1.0 / *h } else { 0.0 }).collect();
    let solver = Solver { weights, h, inverse, options };
    let chunks: Vec<(State, Vec<f64>)> = (0..weights.rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|chunk| {
            let rows = chunk * ROWS..((chunk + 1) * ROWS).min(weights.rows);
            let part = rows.start * weights.cols..rows.end * weights.cols;
            let other = alternative.as_ref().map(|codes| &codes[part.clone()]);
            solver.run(rows.clone(), &grids[rows], &codes[part], other)
        })
        .collect();
    let mut done = Refined {
        grids: Vec::with_capacity(weights.rows),
        codes: Vec::with_capacity(codes.len()),
        row_losses: Vec::with_capacity(weights.rows),
        trace: vec![0.0; 2 + options.half_steps()],
    };
    for (state, trace) in chunks {
        done.grids.extend(state.grids);
        done.codes.extend(state.codes);
        done.row_losses.extend(state.losses);
        done.trace.iter_mut().zip(trace).for_each(|(total, part)| *total += part);
    }
    Ok(done)
}

fn check(weights: &Matrix, codebooks: &[Vec<f32>]) -> Result<()> {
    check_len("codebooks", weights.rows, codebooks.len())?;
    for (row, values) in codebooks.iter().enumerate() {
        if !(1..=256).contains(&values.len()) {
            return Err(CoreError::Shape {
                what: "centroids of a codebook",
                expected: "1 to 256".into(),
                found: format!("{} at row {row}", values.len()),
            });
        }
        if let Some(col) = values.iter().position(|v| !v.is_finite()) {
            let value = values[col].to_string();
            return Err(CoreError::NotFinite { what: "codebook", row, col, value });
        }
    }
    Ok(())
}

/// Grids of sorted codebooks, and labels that refer to them.
fn sorted(cols: usize, codebooks: &[Vec<f32>], labels: &[u8]) -> Result<(Vec<RowGrid>, Vec<u8>)> {
    check_len("labels", codebooks.len() * cols, labels.len())?;
    let mut labels = labels.to_vec();
    let mut grids = Vec::with_capacity(codebooks.len());
    let rows = labels.chunks_mut(cols.max(1)).zip(codebooks);
    for (row, (labels, values)) in rows.enumerate() {
        if labels.iter().any(|label| *label as usize >= values.len()) {
            return Err(CoreError::CodeRange { row });
        }
        let (table, order) = Table::sorted(values);
        relabel(&order, labels);
        grids.push(RowGrid::own(table));
    }
    Ok((grids, labels))
}

/// What all rows share.
struct Solver<'a> {
    weights: &'a Matrix,
    h: &'a Matrix,
    /// `1 / H_jj`; zero for inputs that never fire, whose labels then stay.
    inverse: Vec<f32>,
    options: LnqOptions,
}

/// A few rows: grids, codes and what follows from them.
#[derive(Clone)]
struct State {
    first: usize,
    grids: Vec<RowGrid>,
    codes: Vec<u8>,
    /// `R = W − Q`, and `R·H`.
    residual: Vec<f32>,
    product: Vec<f32>,
    losses: Vec<f64>,
}

impl State {
    fn loss(&self) -> f64 {
        self.losses.iter().sum()
    }

    /// Replaces every row that is worse than in `other`.
    fn keep_better(&mut self, other: &State, m: usize) {
        for (r, loss) in other.losses.iter().enumerate() {
            // A loss that is NaN is not better than anything.
            let keep = self.losses[r] <= *loss;
            if !keep {
                let part = r * m..(r + 1) * m;
                self.codes[part.clone()].copy_from_slice(&other.codes[part.clone()]);
                self.residual[part.clone()].copy_from_slice(&other.residual[part.clone()]);
                self.product[part.clone()].copy_from_slice(&other.product[part]);
                self.grids[r] = other.grids[r].clone();
                self.losses[r] = *loss;
            }
        }
    }
}

impl Solver<'_> {
    /// Runs the rounds on some rows; returns the best state and the trace of losses.
    fn run(
        &self,
        rows: Range<usize>,
        grids: &[RowGrid],
        codes: &[u8],
        alternative: Option<&[u8]>,
    ) -> (State, Vec<f64>) {
        let m = self.weights.cols;
        let mut best = self.state(rows.start, grids.to_vec(), codes.to_vec());
        let mut trace = vec![best.loss()];
        if let Some(codes) = alternative {
            let mut other = self.state(rows.start, grids.to_vec(), codes.to_vec());
            other.keep_better(&best, m);
            best = other;
        }
        trace.push(best.loss());
        for half_step in 0..self.options.half_steps() {
            let mut next = best.clone();
            match half_step % 2 {
                0 => self.fit_grids(&mut next),
                _ => self.sweep(&mut next),
            }
            self.refresh(&mut next);
            next.keep_better(&best, m);
            best = next;
            trace.push(best.loss());
        }
        (best, trace)
    }

    fn state(&self, first: usize, grids: Vec<RowGrid>, codes: Vec<u8>) -> State {
        let (residual, product) = (vec![0.0; codes.len()], vec![0.0; codes.len()]);
        let losses = vec![0.0; grids.len()];
        let mut state = State { first, grids, codes, residual, product, losses };
        self.refresh(&mut state);
        state
    }

    /// Recomputes residuals, products and losses from codes.
    fn refresh(&self, state: &mut State) {
        let (m, count) = (self.weights.cols, state.grids.len());
        for (r, grid) in state.grids.iter().enumerate() {
            let part = r * m..(r + 1) * m;
            let codes = self.weights.row(state.first + r).iter().zip(&state.codes[part.clone()]);
            for (j, (out, (w, code))) in state.residual[part].iter_mut().zip(codes).enumerate() {
                *out = w - grid.value(j, *code);
            }
        }
        let lhs = View::rows(&state.residual, count, m, m);
        matmul(&mut state.product, m, false, 1.0, lhs, View::rows(&self.h.data, m, m, m));
        for (r, loss) in state.losses.iter_mut().enumerate() {
            let part = r * m..(r + 1) * m;
            let pairs = state.residual[part.clone()].iter().zip(&state.product[part]);
            *loss = pairs.map(|(r, p)| *r as f64 * *p as f64).sum();
        }
    }

    /// Solves for the grid of every row.
    fn fit_grids(&self, state: &mut State) {
        let m = self.weights.cols;
        let features = self.features(state);
        let matrices = self.normal_matrices(state, &features);
        for (r, matrix) in matrices.iter().enumerate() {
            let part = r * m..(r + 1) * m;
            let grid = &mut state.grids[r];
            let mut pull = vec![0f64; grid.parameters()];
            for ((index, factor), p) in
                features[part.clone()].iter().zip(&state.product[part.clone()])
            {
                pull[*index as usize] += (*factor * *p) as f64;
            }
            let Some(shift) = least_squares(matrix, &pull, self.options.ridge) else { continue };
            if let Some(moved) = grid.moved(&shift, &mut state.codes[part], self.options.half) {
                *grid = moved;
            }
        }
    }

    /// The entries of `P`: of each weight its parameter and its coefficient.
    fn features(&self, state: &State) -> Vec<(u16, f32)> {
        let m = self.weights.cols.max(1);
        let rows = state.codes.chunks(m).zip(&state.grids);
        let row = |(codes, grid): (&[u8], &RowGrid)| -> Vec<(u16, f32)> {
            let feature = |(j, code): (usize, &u8)| {
                let (index, factor) = grid.feature(j, *code);
                (index as u16, factor)
            };
            codes.iter().enumerate().map(feature).collect()
        };
        rows.flat_map(row).collect()
    }

    /// `PᵀHP` of every row, `[k, k]`. Only tiles of the upper half of `H` are read.
    fn normal_matrices(&self, state: &State, features: &[(u16, f32)]) -> Vec<Vec<f64>> {
        let m = self.weights.cols;
        let sizes = state.grids.iter().map(RowGrid::parameters);
        let mut matrices: Vec<Vec<f64>> = sizes.map(|k| vec![0f64; k * k]).collect();
        let mut sums = Vec::new();
        for i in (0..m).step_by(TILE) {
            for j in (i..m).step_by(TILE) {
                let (down, across) = (i..(i + TILE).min(m), j..(j + TILE).min(m));
                for (r, matrix) in matrices.iter_mut().enumerate() {
                    let features = &features[r * m..(r + 1) * m];
                    let k = state.grids[r].parameters();
                    sums.clear();
                    sums.resize(k * across.len(), 0f32);
                    self.add_tile(features, down.clone(), across.clone(), &mut sums, matrix);
                }
            }
        }
        matrices
    }

    /// Adds what a tile of `H`, and its mirror image, contribute to one row's `PᵀHP`. Rows of the
    /// tile are summed by parameter first, which is the bulk of the work and runs over whole
    /// vectors.
    fn add_tile(
        &self,
        features: &[(u16, f32)],
        down: Range<usize>,
        across: Range<usize>,
        sums: &mut [f32],
        matrix: &mut [f64],
    ) {
        let width = across.len();
        let k = sums.len() / width;
        let mirrored = down.start != across.start;
        for i in down {
            let (index, factor) = features[i];
            let start = index as usize * width;
            let row = &self.h.row(i)[across.clone()];
            sums[start..start + width].iter_mut().zip(row).for_each(|(sum, h)| *sum += factor * h);
        }
        for (p, sums) in sums.chunks_exact(width).enumerate() {
            for (sum, (q, factor)) in sums.iter().zip(&features[across.clone()]) {
                let (q, sum) = (*q as usize, (*sum * *factor) as f64);
                matrix[p * k + q] += sum;
                if mirrored {
                    matrix[q * k + p] += sum;
                }
            }
        }
    }

    /// Coordinate descent: `sweeps` passes over all columns, fewer when labels stop changing.
    fn sweep(&self, state: &mut State) {
        let (m, count) = (self.weights.cols, state.grids.len());
        let mut steps = vec![0f32; count * BLOCK];
        for _ in 0..self.options.sweeps {
            let mut moved = false;
            for start in (0..m).step_by(BLOCK) {
                let len = BLOCK.min(m - start);
                steps.fill(0.0);
                let mut changed = false;
                for (r, steps) in steps.chunks_exact_mut(BLOCK).enumerate() {
                    changed |= self.sweep_block(state, r, start, &mut steps[..len]);
                }
                if changed {
                    let lhs = View::rows(&steps, count, len, BLOCK);
                    let rhs = View::rows(&self.h.data[start * m..], len, m, m);
                    matmul(&mut state.product, m, true, 1.0, lhs, rhs);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
    }

    /// Moves the labels of one row inside a block; records by how much the residual changed. The
    /// product itself is left to the caller, who updates the whole row.
    fn sweep_block(&self, state: &mut State, r: usize, start: usize, steps: &mut [f32]) -> bool {
        let m = self.weights.cols;
        let (from, len) = (r * m + start, steps.len());
        let mut product = [0f32; BLOCK];
        let product = &mut product[..len];
        product.copy_from_slice(&state.product[from..from + len]);
        let codes = &mut state.codes[from..from + len];
        let grid = &state.grids[r];
        let mut changed = false;
        for j in 0..len {
            let old = grid.value(start + j, codes[j]);
            let code = grid.nearest(start + j, old + product[j] * self.inverse[start + j]);
            let step = old - grid.value(start + j, code);
            if step != 0.0 {
                codes[j] = code;
                steps[j] = step;
                changed = true;
                let row = &self.h.row(start + j)[start..start + len];
                product.iter_mut().zip(row).for_each(|(p, h)| *p += step * h);
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests;
