//! [`RowEstimator`]: grids that follow from the row alone, which most estimators have.
//!
//! Forward, one row at a time: copy, rotate, find the scale, note who passes gradient, round, and
//! in the full form rotate back. Backward with `M` from the forward, a bit per entry, and all else
//! constant:
//!
//! ```text
//! half form  dA = (dÂ_h ⊙ M) H        full form  dA = ((dÂ H) ⊙ M) H
//! ```
//!
//! The Jacobian `J = H diag(M) H` is a projection: symmetric, `J² = J`, its trace the number of
//! entries that pass. (QuEST, algorithms 1 and 2.)

use std::fmt::Debug;

pub(super) use anybit_core::half_integer::rms;
use rayon::prelude::*;

use super::rotation::Rotation;
use super::{Estimator, EstimatorError};
use crate::tape::Pass;
use crate::tiles::CHUNK;
use crate::{Tape, Tensor, Var};

/// Entries whose bits share a word of a mask.
const WORD: usize = 64;

/// A grid that depends on the row alone.
pub(super) trait RowGrid: Debug + Send + Sync {
    /// Columns that are handled together; rows are whole multiples.
    fn columns(&self) -> usize {
        1
    }

    /// Replaces a row by its grid values. `mask`, zeros before, gets a bit for every entry that
    /// passes gradient (see [`set_bits`]).
    fn quantize(&self, row: &mut [f32], mask: &mut [u64]);
}

/// Sets the bit of every entry that `passes`.
pub(super) fn set_bits(mask: &mut [u64], row: &[f32], passes: impl Fn(f32) -> bool) {
    for (word, row) in mask.iter_mut().zip(row.chunks(WORD)) {
        let bits = row.iter().enumerate().map(|(i, a)| u64::from(passes(*a)) << i);
        *word = bits.fold(0, |word, bit| word | bit);
    }
}

/// Zeroes what has no bit.
fn keep_bits(mask: &[u64], row: &mut [f32]) {
    for (word, row) in mask.iter().zip(row.chunks_mut(WORD)) {
        for (i, g) in row.iter_mut().enumerate() {
            *g = if (word >> i) & 1 == 1 { *g } else { 0.0 };
        }
    }
}

/// A grid behind a rotation.
#[derive(Debug)]
pub(super) struct RowEstimator<G> {
    pub name: &'static str,
    pub grid: G,
    pub rotation: Rotation,
}

/// Rows that one task handles.
fn task_rows(cols: usize) -> usize {
    (CHUNK / cols).max(1)
}

impl<G: RowGrid> RowEstimator<G> {
    /// Fills `y`; returns a mask of whole words per row.
    fn forward(&self, x: &[f32], cols: usize, y: &mut [f32]) -> Vec<u64> {
        if let Err(error) = self.check(cols) {
            panic!("{error}");
        }
        assert!(x.len().is_multiple_of(cols), "not made of rows of {cols}");
        let (rows, words) = (task_rows(cols), cols.div_ceil(WORD));
        let mut mask = vec![0; x.len() / cols * words];
        let outputs = y.par_chunks_mut(rows * cols).zip(mask.par_chunks_mut(rows * words));
        outputs.zip(x.par_chunks(rows * cols)).for_each(|((y, mask), x)| {
            let outputs = y.chunks_exact_mut(cols).zip(mask.chunks_exact_mut(words));
            for ((y, mask), x) in outputs.zip(x.chunks_exact(cols)) {
                y.copy_from_slice(x);
                self.rotation.rotate(y);
                self.grid.quantize(y, mask);
                self.rotation.finish(y);
            }
        });
        mask
    }
}

/// `dx += J dy`.
fn backward(rotation: &Rotation, pass: &mut Pass<'_>, x: Var, cols: usize, mask: &[u64]) {
    let (rows, words) = (task_rows(cols), cols.div_ceil(WORD));
    let project = |rows: &mut [f32], mask: &[u64]| {
        for (row, mask) in rows.chunks_exact_mut(cols).zip(mask.chunks_exact(words)) {
            rotation.finish(row);
            keep_bits(mask, row);
            rotation.rotate(row);
        }
    };
    let dy = pass.grad();
    let mut dx = pass.take(x);
    let accumulate = dx.accumulate;
    let inputs = dy.par_chunks(rows * cols).zip(mask.par_chunks(rows * words));
    dx.data.par_chunks_mut(rows * cols).zip(inputs).for_each(|(dx, (dy, mask))| {
        if accumulate {
            let mut own = dy.to_vec();
            project(&mut own, mask);
            dx.iter_mut().zip(&own).for_each(|(d, g)| *d += *g);
        } else {
            dx.copy_from_slice(dy);
            project(dx, mask);
        }
    });
    pass.put(x, dx);
}

impl<G: RowGrid> Estimator for RowEstimator<G> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn check(&self, cols: usize) -> Result<(), EstimatorError> {
        let unit = self.grid.columns();
        if !cols.is_multiple_of(unit) {
            let fix = "choose another estimator for this linear";
            return Err(EstimatorError::Cols { cols, what: "groups", unit, fix });
        }
        self.rotation.check(cols)
    }

    fn record(&self, tape: &mut Tape, x: Var, learned: &[Var]) -> Var {
        assert!(learned.is_empty(), "{} learns nothing", self.name);
        let (rows, cols) = tape.dims(x);
        let mut y = tape.buffer(rows * cols);
        let mask = self.forward(tape.data(x), cols, &mut y);
        let rotation = self.rotation.clone();
        tape.custom(&[x], Tensor::new([rows, cols], y), move |pass| {
            backward(&rotation, pass, x, cols, &mask);
        })
    }

    fn trusted_share(&self, x: &[f32], cols: usize, _learned: &[&[f32]]) -> f64 {
        let mut y = vec![0.0; x.len()];
        let mask = self.forward(x, cols, &mut y);
        let passing: u64 = mask.iter().map(|word| u64::from(word.count_ones())).sum();
        passing as f64 / x.len().max(1) as f64
    }
}
