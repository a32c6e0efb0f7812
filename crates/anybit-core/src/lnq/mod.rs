//! LNQ, non-uniform rounding under the Gram matrix of the inputs (GuidedQuant, Kim et al., arXiv
//! 2505.07004, section 4; specification of SKIM, section 7.3). For one row with codebook `c`, labels
//! `l`, `P` the one-hot matrix of `l` and residual `r = w − P c`, alternately
//!
//! ```text
//! codebook:  c += (Pᵀ H P + ρ)⁻¹ Pᵀ H r               closed form, ρ = ridge · mean diagonal
//! sweeps:    l_j = nearest_c(q_j + (r H)_j / H_jj)    coordinate descent, column after column
//! ```
//!
//! The ridge pulls towards the previous codebook, not towards zero, so that both halves can only
//! lower `r H rᵀ`; a row whose loss rises nevertheless, by rounding errors, is put back. `r H` is
//! kept in f32: updates inside a block of columns are immediate, the rest of the row follows once
//! per block with a matrix product, as in GPTQ. Rows start from the labels given, or from one pass
//! of GPTQ's error feedback onto the given codebooks ([`feedback_labels`]), whichever is better.

mod codebook;
mod feedback;

use std::ops::Range;

use rayon::prelude::*;

use crate::column_scale::full_gram;
use crate::linalg::{View, matmul};
use crate::{CoreError, Gram, Matrix, Result};
use codebook::{Book, least_squares};
use feedback::Feedback;

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
}

impl Default for LnqOptions {
    fn default() -> Self {
        let init = LnqInit::Feedback { damp: 0.01, act_order: true };
        Self { rounds: 2, sweeps: 4, ridge: 1e-7, init }
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
    let books = check(weights, codebooks, gram)?;
    let labels = sorted_labels(&books, labels, weights.cols)?;
    let alternative = match options.init {
        LnqInit::Labels => None,
        LnqInit::Feedback { damp, act_order } => {
            Some(Feedback::new(gram, damp, act_order)?.round(weights, &books))
        }
    };
    let diagonal = gram.diagonal();
    let inverse = diagonal.iter().map(|h| if *h > 0.0 { 1.0 / *h } else { 0.0 }).collect();
    let solver = Solver { weights, h: full_gram(gram), inverse, options };
    let chunks: Vec<(State, Vec<f64>)> = (0..weights.rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|chunk| {
            let rows = chunk * ROWS..((chunk + 1) * ROWS).min(weights.rows);
            let part = rows.start * weights.cols..rows.end * weights.cols;
            let other = alternative.as_ref().map(|labels| &labels[part.clone()]);
            solver.run(rows.clone(), &books[rows], &labels[part], other)
        })
        .collect();
    let mut done = Lnq {
        codebooks: Vec::with_capacity(weights.rows),
        labels: Vec::with_capacity(labels.len()),
        row_losses: Vec::with_capacity(weights.rows),
        trace: vec![0.0; 3 + 2 * options.rounds],
    };
    for (state, trace) in chunks {
        done.codebooks.extend(state.books.into_iter().map(|book| book.values));
        done.labels.extend(state.labels);
        done.row_losses.extend(state.losses);
        done.trace.iter_mut().zip(trace).for_each(|(total, part)| *total += part);
    }
    Ok(done)
}

/// Labels, in the order of the given codebooks, that one pass of GPTQ's error feedback gives:
/// `w_{j+1..} −= (w_j − q_j) / U_jj · U_{j, j+1..}` with `H⁻¹ = UᵀU`.
///
/// # Errors
/// As [`lnq`] with [`LnqInit::Feedback`].
pub fn feedback_labels(
    weights: &Matrix,
    codebooks: &[Vec<f32>],
    gram: &Gram,
    damp: f64,
    act_order: bool,
) -> Result<Vec<u8>> {
    let books = check(weights, codebooks, gram)?;
    let mut labels = Feedback::new(gram, damp, act_order)?.round(weights, &books);
    for (labels, book) in labels.chunks_mut(weights.cols.max(1)).zip(&books) {
        labels.iter_mut().for_each(|label| *label = book.order[*label as usize]);
    }
    Ok(labels)
}

/// Checks everything but labels; returns sorted codebooks.
fn check(weights: &Matrix, codebooks: &[Vec<f32>], gram: &Gram) -> Result<Vec<Book>> {
    weights.check_finite("weight")?;
    let shape = |what, expected: usize, found: usize| {
        let (expected, found) = (expected.to_string(), found.to_string());
        Err(CoreError::Shape { what, expected, found })
    };
    if gram.size() != weights.cols {
        return shape("Gram matrix of the inputs", weights.cols, gram.size());
    }
    if codebooks.len() != weights.rows {
        return shape("codebooks", weights.rows, codebooks.len());
    }
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
    Ok(codebooks.iter().map(|values| Book::new(values)).collect())
}

/// Labels that refer to sorted codebooks.
fn sorted_labels(books: &[Book], labels: &[u8], cols: usize) -> Result<Vec<u8>> {
    if labels.len() != books.len() * cols {
        return Err(CoreError::Shape {
            what: "labels",
            expected: (books.len() * cols).to_string(),
            found: labels.len().to_string(),
        });
    }
    let mut sorted = labels.to_vec();
    for (row, (labels, book)) in sorted.chunks_mut(cols.max(1)).zip(books).enumerate() {
        if labels.iter().any(|label| *label as usize >= book.values.len()) {
            return Err(CoreError::CodeRange { row });
        }
        book.relabel(labels);
    }
    Ok(sorted)
}

/// What all rows share.
struct Solver<'a> {
    weights: &'a Matrix,
    h: Matrix,
    /// `1 / H_jj`; zero for inputs that never fire, whose labels then stay.
    inverse: Vec<f32>,
    options: LnqOptions,
}

/// A few rows: codes and what follows from them.
#[derive(Clone)]
struct State {
    first: usize,
    books: Vec<Book>,
    labels: Vec<u8>,
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
                self.labels[part.clone()].copy_from_slice(&other.labels[part.clone()]);
                self.residual[part.clone()].copy_from_slice(&other.residual[part.clone()]);
                self.product[part.clone()].copy_from_slice(&other.product[part]);
                self.books[r] = other.books[r].clone();
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
        books: &[Book],
        labels: &[u8],
        alternative: Option<&[u8]>,
    ) -> (State, Vec<f64>) {
        let m = self.weights.cols;
        let mut best = self.state(rows.start, books.to_vec(), labels.to_vec());
        let mut trace = vec![best.loss()];
        if let Some(labels) = alternative {
            let mut other = self.state(rows.start, books.to_vec(), labels.to_vec());
            other.keep_better(&best, m);
            best = other;
        }
        trace.push(best.loss());
        for half_step in 0..=2 * self.options.rounds {
            let mut next = best.clone();
            match half_step % 2 {
                0 => self.fit_codebooks(&mut next),
                _ => self.sweep(&mut next),
            }
            self.refresh(&mut next);
            next.keep_better(&best, m);
            best = next;
            trace.push(best.loss());
        }
        (best, trace)
    }

    fn state(&self, first: usize, books: Vec<Book>, labels: Vec<u8>) -> State {
        let (residual, product) = (vec![0.0; labels.len()], vec![0.0; labels.len()]);
        let losses = vec![0.0; books.len()];
        let mut state = State { first, books, labels, residual, product, losses };
        self.refresh(&mut state);
        state
    }

    /// Recomputes residuals, products and losses from codes.
    fn refresh(&self, state: &mut State) {
        let (m, count) = (self.weights.cols, state.books.len());
        for r in 0..count {
            let part = r * m..(r + 1) * m;
            let (w, values) = (self.weights.row(state.first + r), &state.books[r].values);
            let codes = w.iter().zip(&state.labels[part.clone()]);
            for (out, (w, label)) in state.residual[part].iter_mut().zip(codes) {
                *out = w - values[*label as usize];
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

    /// Solves for the codebook of every row.
    fn fit_codebooks(&self, state: &mut State) {
        let m = self.weights.cols;
        let matrices = self.normal_matrices(state);
        for (r, matrix) in matrices.iter().enumerate() {
            let part = r * m..(r + 1) * m;
            let labels = &mut state.labels[part.clone()];
            let book = &mut state.books[r];
            let mut pull = vec![0f64; book.values.len()];
            for (label, p) in labels.iter().zip(&state.product[part]) {
                pull[*label as usize] += *p as f64;
            }
            let Some(shift) = least_squares(matrix, &pull, self.options.ridge) else { continue };
            let values: Vec<f32> =
                book.values.iter().zip(shift).map(|(c, s)| (*c as f64 + s) as f32).collect();
            if values.iter().all(|c| c.is_finite()) {
                *book = Book::new(&values);
                book.relabel(labels);
            }
        }
    }

    /// `PᵀHP` of every row, `[k, k]`. Only tiles of the upper half of `H` are read.
    fn normal_matrices(&self, state: &State) -> Vec<Vec<f64>> {
        let m = self.weights.cols;
        let sizes = state.books.iter().map(|book| book.values.len());
        let mut matrices: Vec<Vec<f64>> = sizes.map(|k| vec![0f64; k * k]).collect();
        let mut sums = Vec::new();
        for i in (0..m).step_by(TILE) {
            for j in (i..m).step_by(TILE) {
                let (down, across) = (i..(i + TILE).min(m), j..(j + TILE).min(m));
                for (r, matrix) in matrices.iter_mut().enumerate() {
                    let labels = &state.labels[r * m..(r + 1) * m];
                    let k = state.books[r].values.len();
                    sums.clear();
                    sums.resize(k * across.len(), 0f32);
                    self.add_tile(labels, down.clone(), across.clone(), &mut sums, matrix);
                }
            }
        }
        matrices
    }

    /// Adds what a tile of `H`, and its mirror image, contribute to one row's `PᵀHP`. Rows of the
    /// tile are summed by label first, which is the bulk of the work and runs over whole vectors.
    fn add_tile(
        &self,
        labels: &[u8],
        down: Range<usize>,
        across: Range<usize>,
        sums: &mut [f32],
        matrix: &mut [f64],
    ) {
        let width = across.len();
        let k = sums.len() / width;
        let mirrored = down.start != across.start;
        for i in down {
            let start = labels[i] as usize * width;
            let row = &self.h.row(i)[across.clone()];
            sums[start..start + width].iter_mut().zip(row).for_each(|(sum, h)| *sum += h);
        }
        for (p, sums) in sums.chunks_exact(width).enumerate() {
            for (sum, q) in sums.iter().zip(&labels[across.clone()]) {
                let q = *q as usize;
                matrix[p * k + q] += *sum as f64;
                if mirrored {
                    matrix[q * k + p] += *sum as f64;
                }
            }
        }
    }

    /// Coordinate descent: `sweeps` passes over all columns, fewer when labels stop changing.
    fn sweep(&self, state: &mut State) {
        let (m, count) = (self.weights.cols, state.books.len());
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
        let labels = &mut state.labels[from..from + len];
        let book = &state.books[r];
        let mut changed = false;
        for j in 0..len {
            let old = book.values[labels[j] as usize];
            let label = book.nearest(old + product[j] * self.inverse[start + j]);
            let step = old - book.values[label as usize];
            if step != 0.0 {
                labels[j] = label;
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
