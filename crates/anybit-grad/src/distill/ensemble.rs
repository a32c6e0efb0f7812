//! Several teachers as one (QAT-EKD-GoR; INFERRED, the paper's form is not known): `a_k` are weights
//! of the teachers of one row, which sum to 1.
//!
//! ```text
//! probabilities   p = Σ_k a_k softmax(z_k / T)          attains a loss of 0: the default
//! logits          p = softmax(Σ_k a_k z_k / T)          the geometric mean
//! ```
//!
//! `Σ_k a_k KL(p_k‖q)` has the gradient of the first, but its value is larger by the divergence of
//! the teachers among themselves; balancers read values, so that the first is the one to take. The
//! result is logits, to be used as [`super::Teacher::Logits`] at the same temperature. Called by the
//! trainer.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::{DistillError, Result, check_setting};
use crate::Tensor;
use crate::ops::IGNORE;

/// What is averaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mixture {
    /// Probabilities at the temperature of the loss.
    #[default]
    Probabilities,
    /// Logits.
    Logits,
}

/// Where the weights of teachers come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum TeacherWeights {
    /// All the same.
    #[default]
    Uniform,
    /// The same for all tokens, not negative; scaled to sum to 1.
    Fixed {
        /// One per teacher.
        weights: Vec<f64>,
    },
    /// For each token `softmax_k(−CE_k / tau)`: more for teachers that find the target likely. All
    /// the same for tokens without a target.
    CrossEntropy {
        /// Larger is closer to equal weights.
        tau: f64,
    },
}

/// Rows and vocabulary of all teachers.
fn common_dims(teachers: &[&Tensor]) -> Result<(usize, usize)> {
    let mut first = None;
    for (index, teacher) in teachers.iter().enumerate() {
        let [rows, vocab] = *teacher.shape() else {
            let what =
                format!("teacher {index} has shape {:?}; a matrix is needed", teacher.shape());
            return Err(DistillError::input("ensemble", what));
        };
        let (all_rows, all_vocab) = *first.get_or_insert((rows, vocab));
        let (what, other) = (format!("teacher {index}"), "teacher 0");
        if vocab != all_vocab {
            let expected = all_vocab;
            return Err(DistillError::Vocabulary { what, found: vocab, other, expected });
        }
        if rows != all_rows {
            return Err(DistillError::Rows { what, found: rows, other, expected: all_rows });
        }
    }
    first.ok_or_else(|| DistillError::input("ensemble", "there is no teacher; give at least one"))
}

/// `ln softmax(z / T)` in f64.
fn log_softmax(z: &[f32], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = z.iter().map(|z| *z as f64 / temperature).collect();
    let max = scaled.iter().fold(f64::NEG_INFINITY, |max, z| max.max(*z));
    let sum: f64 = scaled.iter().map(|z| (z - max).exp()).sum();
    scaled.iter().map(|z| z - max - sum.ln()).collect()
}

/// Weights scaled to sum to 1.
fn shares(weights: &[f64]) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Fails unless weights are finite, not negative and not all 0.
fn check_weights(weights: &[f64]) -> Result<()> {
    for weight in weights {
        check_setting("ensemble", "weights", *weight, *weight >= 0.0, "it must not be negative")?;
    }
    let sum: f64 = weights.iter().sum();
    check_setting("ensemble", "sum of weights", sum, sum > 0.0, "one of them must be above 0")
}

/// Weights `[tokens, teachers]` of `teachers`, logits `[tokens, vocab]` each.
///
/// # Errors
/// No teacher, sizes that differ, weights that are negative or of another number than teachers.
pub fn row_weights(
    spec: &TeacherWeights,
    teachers: &[&Tensor],
    targets: &[u32],
) -> Result<Vec<f64>> {
    let (rows, vocab) = common_dims(teachers)?;
    if rows != targets.len() {
        let (what, other) = ("the list of targets".into(), "teacher 0");
        return Err(DistillError::Rows { what, found: targets.len(), other, expected: rows });
    }
    let count = teachers.len();
    let uniform = vec![1.0 / count as f64; count];
    match spec {
        TeacherWeights::Uniform => Ok(uniform.repeat(rows)),
        TeacherWeights::Fixed { weights } => {
            if weights.len() != count {
                let what = format!("{} weights for {count} teachers; give one each", weights.len());
                return Err(DistillError::input("ensemble", what));
            }
            check_weights(weights)?;
            Ok(shares(weights).repeat(rows))
        }
        TeacherWeights::CrossEntropy { tau } => {
            check_setting("ensemble", "tau", *tau, *tau > 0.0, "it must be above 0")?;
            if let Some(target) = targets.iter().find(|t| **t != IGNORE && **t as usize >= vocab) {
                let what = format!("the target {target} is outside a vocabulary of {vocab} tokens");
                return Err(DistillError::input("ensemble", what));
            }
            let of_row = |(row, target): (usize, &u32)| {
                if *target == IGNORE {
                    return uniform.clone();
                }
                let part = row * vocab..(row + 1) * vocab;
                let label = |teacher: &&Tensor| {
                    log_softmax(&teacher.data()[part.clone()], 1.0)[*target as usize] / tau
                };
                let logs: Vec<f64> = teachers.iter().map(label).collect();
                let max = logs.iter().fold(f64::NEG_INFINITY, |max, l| max.max(*l));
                shares(&logs.iter().map(|l| (l - max).exp()).collect::<Vec<_>>())
            };
            let each: Vec<Vec<f64>> = targets.par_iter().enumerate().map(of_row).collect();
            Ok(each.concat())
        }
    }
}

/// Logits `[tokens, vocab]` whose softmax at `temperature` is the mixture of `teachers`, logits of
/// the same shape, with `weights: [tokens, teachers]` as [`row_weights`] gives them; the weights of
/// a row are scaled to sum to 1.
///
/// # Errors
/// No teacher, sizes that differ, weights that are negative, a temperature that is not above 0.
pub fn mix(
    teachers: &[&Tensor],
    weights: &[f64],
    mixture: Mixture,
    temperature: f64,
) -> Result<Tensor> {
    let (rows, vocab) = common_dims(teachers)?;
    let fix = "it must be above 0";
    check_setting("ensemble", "temperature", temperature, temperature > 0.0, fix)?;
    if weights.len() != rows * teachers.len() {
        let what =
            format!("{} weights for {} teachers of {rows} rows", weights.len(), teachers.len());
        return Err(DistillError::input("ensemble", what));
    }
    weights.chunks(teachers.len()).try_for_each(check_weights)?;
    let mut mixed = vec![0f32; rows * vocab];
    let tasks = mixed.par_chunks_exact_mut(vocab).zip(weights.par_chunks(teachers.len()));
    tasks.enumerate().for_each(|(row, (dst, weights))| {
        let part = row * vocab..(row + 1) * vocab;
        let mut sums = vec![0f64; vocab];
        for (teacher, share) in teachers.iter().zip(shares(weights)) {
            let logits = &teacher.data()[part.clone()];
            match mixture {
                Mixture::Logits => {
                    sums.iter_mut().zip(logits).for_each(|(s, z)| *s += share * *z as f64);
                }
                Mixture::Probabilities => {
                    let logs = log_softmax(logits, temperature);
                    sums.iter_mut().zip(logs).for_each(|(s, l)| *s += share * l.exp());
                }
            }
        }
        dst.iter_mut().zip(sums).for_each(|(dst, sum)| {
            *dst = match mixture {
                Mixture::Logits => sum as f32,
                Mixture::Probabilities => (temperature * sum.ln()) as f32,
            };
        });
    });
    Ok(Tensor::new([rows, vocab], mixed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tape;
    use crate::distill::{DistillLoss, Distillation, Teacher};
    use crate::testing::random;

    const TARGETS: [u32; 4] = [1, 6, IGNORE, 0];

    /// Loss and gradient of forward KL at temperature 2.
    fn run(student: &Tensor, teacher: &Tensor) -> (f64, Vec<f32>) {
        let loss = DistillLoss::ForwardKl { temperature: 2.0 };
        let teacher = Teacher::Logits(teacher);
        let given = Distillation { loss: &loss, teacher, targets: &TARGETS, seqlen: 4 };
        let mut tape = Tape::default();
        let z = tape.leaf(student.clone(), true);
        let loss = tape.distill(z, &given).unwrap();
        tape.backward(loss);
        (tape.data(loss)[0] as f64, tape.grad(z).unwrap().to_vec())
    }

    /// Invariant 13: the mixture and the mean of the teachers' divergences have the same gradient;
    /// their values differ by `T²` times the Jensen–Shannon divergence of the teachers.
    #[test]
    fn invariant_13_mixture_and_mean_of_divergences() {
        let (a, b, student) = (random(1, [4, 7]), random(2, [4, 7]), random(3, [4, 7]));
        let weights = [0.3, 0.7].repeat(4);
        let mixed = mix(&[&a, &b], &weights, Mixture::Probabilities, 2.0).unwrap();
        let (one, of_a, of_b) = (run(&student, &mixed), run(&student, &a), run(&student, &b));
        for (g, (a, b)) in one.1.iter().zip(of_a.1.iter().zip(&of_b.1)) {
            approx::assert_abs_diff_eq!(*g, 0.3 * a + 0.7 * b, epsilon = 1e-6);
        }
        let among = 0.3 * run(&mixed, &a).0 + 0.7 * run(&mixed, &b).0;
        let mean = 0.3 * of_a.0 + 0.7 * of_b.0;
        approx::assert_relative_eq!(mean - one.0, among, max_relative = 1e-4);
        assert!(among > 0.01);
    }

    #[test]
    fn one_teacher_is_itself() {
        let (z, student) = (random(4, [4, 7]), random(5, [4, 7]));
        let want = run(&student, &z);
        for mixture in [Mixture::Probabilities, Mixture::Logits] {
            let mixed = mix(&[&z, &z], &[0.5; 8], mixture, 2.0).unwrap();
            let got = run(&student, &mixed);
            approx::assert_relative_eq!(got.0, want.0, max_relative = 1e-5);
            for (a, b) in got.1.iter().zip(&want.1) {
                approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-6);
            }
        }
    }

    #[test]
    fn weights_of_rows() {
        let (a, b) = (random(6, [4, 7]), random(7, [4, 7]));
        let teachers = [&a, &b];
        let uniform = row_weights(&TeacherWeights::Uniform, &teachers, &TARGETS).unwrap();
        assert_eq!(uniform, [0.5; 8]);
        let fixed = TeacherWeights::Fixed { weights: vec![1.0, 3.0] };
        assert_eq!(row_weights(&fixed, &teachers, &TARGETS).unwrap(), [0.25, 0.75].repeat(4));
        let by_loss = TeacherWeights::CrossEntropy { tau: 0.5 };
        let weights = row_weights(&by_loss, &teachers, &TARGETS).unwrap();
        for (row, weights) in weights.chunks(2).enumerate() {
            approx::assert_relative_eq!(weights[0] + weights[1], 1.0, max_relative = 1e-12);
            if TARGETS[row] == IGNORE {
                assert_eq!(weights, [0.5, 0.5]);
                continue;
            }
            let log = |z: &Tensor| {
                log_softmax(&z.data()[row * 7..(row + 1) * 7], 1.0)[TARGETS[row] as usize]
            };
            let ratio = ((log(&a) - log(&b)) / 0.5).exp();
            approx::assert_relative_eq!(weights[0] / weights[1], ratio, max_relative = 1e-9);
        }
    }

    #[test]
    fn mismatches_name_both_sizes() {
        let (a, wide, long) = (random(8, [4, 7]), random(9, [4, 9]), random(10, [5, 7]));
        let error = |teachers: &[&Tensor]| {
            mix(teachers, &[0.5; 8], Mixture::Logits, 1.0).unwrap_err().to_string()
        };
        let vocab = error(&[&a, &wide]);
        assert!(vocab.contains("9 tokens") && vocab.contains('7'), "{vocab}");
        let rows = error(&[&a, &long]);
        assert!(rows.contains("5 rows") && rows.contains('4'), "{rows}");
        assert!(error(&[]).contains("no teacher"));
        let negative = mix(&[&a, &a], &[-0.5; 8], Mixture::Logits, 1.0).unwrap_err().to_string();
        assert!(negative.contains("-0.5"), "{negative}");
        let fixed = TeacherWeights::Fixed { weights: vec![1.0] };
        assert!(row_weights(&fixed, &[&a, &a], &TARGETS).is_err());
        assert!(row_weights(&TeacherWeights::Uniform, &[&a], &TARGETS[..3]).is_err());
    }
}
