//! Distances of hidden states as operations of the tape; the teacher's are constants.
//!
//! ```text
//! feature_mse          1/n Σ_t ‖y_t − h_t‖² / d,  or of unit rows  1/n Σ_t ‖y_t/‖y_t‖ − h_t/‖h_t‖‖²
//!                      y = x Aᵀ with a learned adapter A where widths differ
//! attention_transfer   mean over sequences of ‖Q/‖Q‖ − Q'/‖Q'‖‖²,  Q_t = Σ_c x_tc²
//! ∂‖u − v‖²/∂y = −2 (v − (u·v) u) / ‖y‖   for u = y/‖y‖ and a constant unit vector v
//! ```
//!
//! FitNets (Romero et al., ICLR 2015) and attention transfer (Zagoruyko and Komodakis, ICLR 2017),
//! the latter over the tokens of a sequence in place of the positions of an image (INFERRED). Tokens
//! without a target do not count. The gradient is made in the forward pass.

use rayon::prelude::*;

use crate::distill::error::{DistillError, Result};
use crate::ops::IGNORE;
use crate::{Tape, Tensor, Var};

/// Least norm that something is divided by.
const LEAST_NORM: f64 = 1e-12;

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
}

/// `‖y/‖y‖ − h/‖h‖‖²`; `y` becomes `factor` times its gradient.
fn unit_distance(y: &mut [f32], h: &[f32], factor: f64) -> f64 {
    let norm = |v: &[f32]| dot(v, v).sqrt().max(LEAST_NORM);
    let (y_norm, h_norm) = (norm(y), norm(h));
    let cosine = dot(y, h) / (y_norm * h_norm);
    let mut distance = 0.0;
    for (y, h) in y.iter_mut().zip(h) {
        let (u, v) = (*y as f64 / y_norm, *h as f64 / h_norm);
        distance += (u - v) * (u - v);
        *y = (-2.0 * factor * (v - cosine * u) / y_norm) as f32;
    }
    distance
}

/// `‖y − h‖² / d`; `y` becomes `factor` times its gradient.
fn mean_distance(y: &mut [f32], h: &[f32], factor: f64) -> f64 {
    let size = y.len() as f64;
    let step = (2.0 * factor / size) as f32;
    let mut distance = 0.0;
    for (y, h) in y.iter_mut().zip(h) {
        let gap = *y - h;
        distance += gap as f64 * gap as f64;
        *y = step * gap;
    }
    distance / size
}

/// `Q_t = Σ_c x_tc²`, 0 for tokens without a target.
fn saliency(x: &[f32], cols: usize, targets: &[u32]) -> Vec<f32> {
    let rows = x.par_chunks_exact(cols).zip(targets);
    rows.map(|(row, t)| if *t == IGNORE { 0.0 } else { dot(row, row) as f32 }).collect()
}

/// Rows and columns of a teacher's hidden states, with one row per target.
fn teacher_dims(place: &'static str, teacher: &Tensor, targets: &[u32]) -> Result<(usize, usize)> {
    let [rows, cols] = *teacher.shape() else {
        let what = format!("hidden states of shape {:?}; a matrix is needed", teacher.shape());
        return Err(DistillError::input(place, what));
    };
    match rows == targets.len() {
        true => Ok((rows, cols)),
        false => {
            let (what, other) = ("the teacher".into(), "the list of targets");
            Err(DistillError::Rows { what, found: rows, other, expected: targets.len() })
        }
    }
}

impl Tape {
    /// Distance of hidden states `student: [tokens, width]` from `teacher: [tokens, teacher width]`,
    /// a scalar: the mean over tokens with a target of the mean squared difference, or with
    /// `normalise` of the squared distance between rows of unit length, which is at most 4.
    /// `adapter: [teacher width, width]` maps the student's to the teacher's and is learned along;
    /// it is needed where widths differ.
    ///
    /// # Errors
    /// Widths or numbers of rows that differ.
    ///
    /// # Panics
    /// When `student` or `adapter` is no matrix, or they do not fit together.
    pub fn feature_mse(
        &mut self,
        student: Var,
        adapter: Option<Var>,
        teacher: &Tensor,
        targets: &[u32],
        normalise: bool,
    ) -> Result<Var> {
        let student = match adapter {
            Some(adapter) => {
                assert_eq!(self.dims(student).1, self.dims(adapter).1, "the adapter's width");
                self.linear(student, adapter, None)
            }
            None => student,
        };
        let (rows, cols) = teacher_dims("feature_mse", teacher, targets)?;
        let found = self.dims(student);
        if found != (rows, cols) {
            let what = format!(
                "the student's hidden states are {found:?}, the teacher's {:?}; give an adapter \
                 [teacher width, student width]",
                (rows, cols)
            );
            return Err(DistillError::input("feature_mse", what));
        }
        let count = targets.iter().filter(|t| **t != IGNORE).count().max(1) as f64;
        let mut grad = self.buffer(rows * cols);
        grad.copy_from_slice(self.data(student));
        let distance = if normalise { unit_distance } else { mean_distance };
        let one = |((y, h), target): ((&mut [f32], &[f32]), &u32)| {
            if *target == IGNORE {
                y.fill(0.0);
                return 0.0;
            }
            distance(y, h, 1.0 / count)
        };
        let pairs = grad.par_chunks_exact_mut(cols).zip(teacher.data().par_chunks_exact(cols));
        let each: Vec<f64> = pairs.zip(targets).map(one).collect();
        let grad = self.constant(Tensor::new([rows, cols], grad));
        Ok(self.saved(&[(student, grad)], each.iter().sum::<f64>() / count))
    }

    /// Distance of the saliencies of tokens, in sequences of `seqlen`, between hidden states
    /// `student: [tokens, width]` and `teacher: [tokens, any width]`: a scalar, at most 2.
    ///
    /// # Errors
    /// Numbers of rows that differ or are not whole sequences.
    ///
    /// # Panics
    /// When `student` is no matrix.
    pub fn attention_transfer(
        &mut self,
        student: Var,
        teacher: &Tensor,
        targets: &[u32],
        seqlen: usize,
    ) -> Result<Var> {
        let (rows, teacher_cols) = teacher_dims("attention_transfer", teacher, targets)?;
        let (found, cols) = self.dims(student);
        if found != rows || seqlen == 0 || !rows.is_multiple_of(seqlen) {
            let what = format!(
                "{found} rows of the student and {rows} of the teacher; equally many whole \
                 sequences of {seqlen} are needed"
            );
            return Err(DistillError::input("attention_transfer", what));
        }
        let mut of_student = saliency(self.data(student), cols, targets);
        let of_teacher = saliency(teacher.data(), teacher_cols, targets);
        let counts = |sequence: &&[u32]| sequence.iter().any(|t| *t != IGNORE);
        let count = targets.chunks(seqlen).filter(counts).count().max(1) as f64;
        let sequences = of_student.chunks_exact_mut(seqlen).zip(of_teacher.chunks_exact(seqlen));
        let loss: f64 = sequences.map(|(q, other)| unit_distance(q, other, 1.0 / count)).sum();
        let mut grad = self.buffer(rows * cols);
        let x = self.data(student).par_chunks_exact(cols);
        let parts = grad.par_chunks_exact_mut(cols).zip(x).zip(&of_student);
        parts.for_each(|((grad, x), dq)| {
            grad.iter_mut().zip(x).for_each(|(g, x)| *g = 2.0 * *dq * *x);
        });
        let grad = self.constant(Tensor::new([rows, cols], grad));
        Ok(self.saved(&[(student, grad)], loss / count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    const TARGETS: [u32; 6] = [3, 0, IGNORE, 10, 3, 7];

    #[test]
    fn gradients() {
        let (same, wide) = (random(1, [6, 5]), random(2, [6, 8]));
        for normalise in [false, true] {
            check_gradients(&[random(3, [6, 5])], |t, v| {
                t.feature_mse(v[0], None, &same, &TARGETS, normalise).unwrap()
            });
            check_gradients(&[random(4, [6, 5]), random(5, [8, 5])], |t, v| {
                t.feature_mse(v[0], Some(v[1]), &wide, &TARGETS, normalise).unwrap()
            });
        }
        check_gradients(&[random(6, [6, 5])], |t, v| {
            t.attention_transfer(v[0], &wide, &TARGETS, 3).unwrap()
        });
    }

    #[test]
    fn values_by_hand() {
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 2], vec![3.0, 4.0, 1.0, 1.0]));
        let teacher = Tensor::new([2, 2], vec![3.0, 0.0, 9.0, 9.0]);
        let targets = [0, IGNORE];
        let plain = tape.feature_mse(x, None, &teacher, &targets, false).unwrap();
        assert_eq!(tape.data(plain), [8.0]);
        // (0.6, 0.8) against (1, 0).
        let unit = tape.feature_mse(x, None, &teacher, &targets, true).unwrap();
        approx::assert_relative_eq!(tape.data(unit)[0], 0.8, max_relative = 1e-6);
        // Saliencies (25, 2) and (9, 162).
        let attention = tape.attention_transfer(x, &teacher, &[0, 0], 2).unwrap();
        let cosine = (25.0f64 * 9.0 + 2.0 * 162.0)
            / ((25.0f64 * 25.0 + 4.0).sqrt() * (81.0f64 + 162.0 * 162.0).sqrt());
        let want = 2.0 - 2.0 * cosine;
        approx::assert_relative_eq!(tape.data(attention)[0] as f64, want, max_relative = 1e-5);
    }

    /// Invariant 16: masked tokens change nothing.
    #[test]
    fn invariant_16_masked_tokens() {
        let (x, teacher) = (random(7, [6, 5]), random(8, [6, 5]));
        let run = |poison: f32| {
            let mut x = x.clone();
            x.data_mut()[10..15].fill(poison);
            let mut tape = Tape::default();
            let x = tape.leaf(x, true);
            let mse = tape.feature_mse(x, None, &teacher, &TARGETS, true).unwrap();
            let attention = tape.attention_transfer(x, &teacher, &TARGETS, 3).unwrap();
            let both = tape.weighted_sum(&[(1.0, mse), (1.0, attention)]);
            tape.backward(both);
            assert!(tape.grad(x).unwrap()[10..15].iter().all(|g| *g == 0.0));
            tape.data(both)[0]
        };
        assert_eq!(run(1.0), run(-70.0));
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut tape = Tape::default();
        let x = tape.leaf(random(9, [6, 5]), true);
        let wide = random(10, [6, 8]);
        let error = tape.feature_mse(x, None, &wide, &TARGETS, false).unwrap_err().to_string();
        assert!(error.contains("(6, 5)") && error.contains("(6, 8)"), "{error}");
        assert!(tape.feature_mse(x, None, &wide, &TARGETS[..5], false).is_err());
        let error = tape.attention_transfer(x, &wide, &TARGETS, 4).unwrap_err().to_string();
        assert!(error.contains("sequences of 4"), "{error}");
    }
}
