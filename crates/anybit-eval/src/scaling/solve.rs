//! Least squares for the law: Levenberg–Marquardt on the residuals of `ln L`.
//!
//! Parameters are `ln A`, `ln α`, `ln B`, `ln β`, `E` and the `ln eff` of every precision but the
//! reference: logarithms keep signs and make all but `E` of one magnitude, while `E` itself may be
//! asked for with either sign.

/// Parameters that all runs share.
pub(super) const SHARED: usize = 5;
/// Index of `E`.
pub(super) const E: usize = 4;

const MAX_STEPS: usize = 500;
/// Damping beyond which no step is worth trying.
const MAX_DAMPING: f64 = 1e12;
/// Logarithms of exponents beyond which their terms are constants.
const MAX_LN_EXPONENT: f64 = 10.0;

/// A run as the solver sees it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) ln_params: f64,
    pub(super) ln_tokens: f64,
    pub(super) ln_loss: f64,
    /// Index of its precision; `None` for the reference.
    pub(super) precision: Option<usize>,
}

impl Sample {
    /// Indices of the parameters that its loss depends on.
    fn parameters(&self) -> impl Iterator<Item = usize> + use<> {
        (0..SHARED).chain(self.precision.map(|index| SHARED + index))
    }
}

/// What is minimized.
#[derive(Debug, Clone, Copy)]
pub(super) struct Problem<'a> {
    pub(super) samples: &'a [Sample],
    /// How often each counts.
    pub(super) weights: &'a [f64],
    /// Precisions without the reference.
    pub(super) precisions: usize,
    pub(super) fixed_e: bool,
    /// Residual from which it counts linearly.
    pub(super) huber: Option<f64>,
}

/// A minimum.
#[derive(Debug, Clone)]
pub(super) struct Solution {
    pub(super) parameters: Vec<f64>,
    pub(super) objective: f64,
}

/// Residual of one sample and its derivatives, in the order of [`Sample::parameters`].
struct Point {
    residual: f64,
    slopes: [f64; SHARED + 1],
}

impl Problem<'_> {
    /// `None` where the law gives no loss: none above 0, or none that can be represented.
    fn point(&self, parameters: &[f64], sample: &Sample) -> Option<Point> {
        let [ln_a, ln_alpha, ln_b, ln_beta, e] = *parameters.first_chunk::<SHARED>()?;
        if ln_alpha.abs() > MAX_LN_EXPONENT || ln_beta.abs() > MAX_LN_EXPONENT {
            return None;
        }
        let (alpha, beta) = (ln_alpha.exp(), ln_beta.exp());
        let ln_eff = sample.precision.map_or(0.0, |index| parameters[SHARED + index]);
        let ln_size = sample.ln_params + ln_eff;
        let size = (ln_a - alpha * ln_size).exp();
        let data = (ln_b - beta * sample.ln_tokens).exp();
        let loss = size + data + e;
        let slopes = [
            size,
            -size * alpha * ln_size,
            data,
            -data * beta * sample.ln_tokens,
            if self.fixed_e { 0.0 } else { 1.0 },
            -size * alpha,
        ];
        let slopes = slopes.map(|slope| slope / loss);
        let valid = loss > 0.0 && loss.is_finite() && slopes.iter().all(|s| s.is_finite());
        valid.then(|| Point { residual: loss.ln() - sample.ln_loss, slopes })
    }

    pub(super) fn objective(&self, parameters: &[f64]) -> Option<f64> {
        let mut sum = 0.0;
        for (sample, weight) in self.samples.iter().zip(self.weights) {
            let residual = self.point(parameters, sample)?.residual;
            sum += weight
                * match self.huber {
                    Some(delta) if residual.abs() > delta => delta * (residual.abs() - delta / 2.0),
                    _ => residual * residual / 2.0,
                };
        }
        Some(sum)
    }

    /// The Gauss–Newton matrix, by rows, and the gradient of the objective. A residual in the
    /// linear part of Huber's loss weighs as much as makes its gradient right.
    fn normal(&self, parameters: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let n = SHARED + self.precisions;
        let (mut matrix, mut gradient) = (vec![0.0; n * n], vec![0.0; n]);
        for (sample, weight) in self.samples.iter().zip(self.weights) {
            let Some(point) = self.point(parameters, sample) else { continue };
            let weight = match self.huber {
                Some(delta) => weight * (delta / point.residual.abs()).min(1.0),
                None => *weight,
            };
            for (i, slope) in sample.parameters().zip(point.slopes) {
                gradient[i] += weight * slope * point.residual;
                for (j, other) in sample.parameters().zip(point.slopes) {
                    matrix[i * n + j] += weight * slope * other;
                }
            }
        }
        (matrix, gradient)
    }
}

/// Descends from `start`; `None` where the law gives no losses there.
pub(super) fn minimize(problem: &Problem, start: Vec<f64>) -> Option<Solution> {
    let mut parameters = start;
    let mut objective = problem.objective(&parameters)?;
    let mut damping = 1e-3;
    for _ in 0..MAX_STEPS {
        let (matrix, gradient) = problem.normal(&parameters);
        let better = loop {
            let step = solve(&damped(&matrix, gradient.len(), damping), &gradient);
            let found = step.and_then(|step| {
                let there: Vec<f64> = parameters.iter().zip(&step).map(|(p, s)| p - s).collect();
                Some((problem.objective(&there)?, there))
            });
            match found {
                Some((lower, there)) if lower < objective => break Some((lower, there)),
                _ if damping > MAX_DAMPING => break None,
                _ => damping *= 4.0,
            }
        };
        // No step helps: this is the minimum as far as numbers can tell.
        let Some((lower, there)) = better else { break };
        damping = (damping / 5.0).max(1e-12);
        let gain = (objective - lower) / objective;
        let moved = parameters.iter().zip(&there).fold(0f64, |m, (p, q)| m.max((p - q).abs()));
        (parameters, objective) = (there, lower);
        if gain < 1e-14 && moved < 1e-7 {
            break;
        }
    }
    Some(Solution { parameters, objective })
}

/// `matrix` with a diagonal that is longer by a share of itself. Parameters that nothing depends on
/// get a 1, so that they stay where they are.
fn damped(matrix: &[f64], n: usize, damping: f64) -> Vec<f64> {
    let mut matrix = matrix.to_vec();
    for diagonal in matrix.iter_mut().step_by(n + 1) {
        *diagonal = if *diagonal > 0.0 { *diagonal * (1.0 + damping) } else { 1.0 };
    }
    matrix
}

/// `x` with `matrix · x = right` by Cholesky; `None` where the matrix is not positive definite.
fn solve(matrix: &[f64], right: &[f64]) -> Option<Vec<f64>> {
    let n = right.len();
    // With the right side as one row more, factoring substitutes forward too.
    let mut l = [matrix, right].concat();
    for i in 0..=n {
        for j in 0..=i.min(n - 1) {
            let done: f64 = (0..j).map(|k| l[i * n + k] * l[j * n + k]).sum();
            let left = l[i * n + j] - done;
            l[i * n + j] = match i == j {
                true if left > 0.0 => left.sqrt(),
                true => return None,
                false => left / l[j * n + j],
            };
        }
    }
    for i in (0..n).rev() {
        let done: f64 = (i + 1..n).map(|k| l[k * n + i] * l[n * n + k]).sum();
        l[n * n + i] = (l[n * n + i] - done) / l[i * n + i];
    }
    Some(l.split_off(n * n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Sample> {
        let sample = |i: usize| Sample {
            ln_params: 17.0 + i as f64 * 0.7,
            ln_tokens: 22.0 + (i * i % 5) as f64 * 0.8,
            ln_loss: (3.5 - 0.1 * i as f64).ln(),
            precision: [None, Some(0), Some(1)][i % 3],
        };
        (0..9).map(sample).collect()
    }

    #[test]
    fn gradients_are_those_of_differences() {
        let samples = samples();
        let weights = [1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0];
        let at = [2.1, -1.9, 4.0, -1.5, 0.4, -0.3, -1.6];
        // Of these residuals some are above 1, some below.
        for huber in [None, Some(1.0)] {
            let problem = Problem {
                samples: &samples,
                weights: &weights,
                precisions: 2,
                fixed_e: false,
                huber,
            };
            let (_, gradient) = problem.normal(&at);
            for (i, slope) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut there = at;
                    there[i] += by;
                    problem.objective(&there).unwrap()
                };
                let difference = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                let close =
                    approx::relative_eq!(*slope, difference, max_relative = 1e-5, epsilon = 1e-8);
                assert!(close, "parameter {i}, {huber:?}: {slope} and {difference}");
            }
            let (_, fixed) = Problem { fixed_e: true, ..problem }.normal(&at);
            assert_eq!(fixed[E], 0.0);
        }
    }

    #[test]
    fn a_minimum_has_no_gradient() {
        let samples = samples();
        let weights = [1.0; 9];
        let problem = Problem {
            samples: &samples,
            weights: &weights,
            precisions: 2,
            fixed_e: true,
            huber: None,
        };
        let start = vec![2.1, -1.9, 4.0, -1.5, 0.0, -0.3, -1.6];
        let before = problem.objective(&start).unwrap();
        let found = minimize(&problem, start).unwrap();
        assert!(found.objective < before);
        assert_eq!(found.parameters[E], 0.0);
        let (_, gradient) = problem.normal(&found.parameters);
        assert!(gradient.iter().all(|g| g.abs() < 1e-6), "{gradient:?}");
    }

    #[test]
    fn linear_systems() {
        let x = solve(&[4.0, 2.0, 2.0, 3.0], &[10.0, 9.0]).unwrap();
        approx::assert_relative_eq!(x[0], 1.5, max_relative = 1e-14);
        approx::assert_relative_eq!(x[1], 2.0, max_relative = 1e-14);
        assert!(solve(&[1.0, 2.0, 2.0, 1.0], &[1.0, 1.0]).is_none());
        assert_eq!(damped(&[2.0, 1.0, 1.0, 0.0], 2, 0.5), [3.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn where_the_law_has_no_loss() {
        let samples = samples();
        let weights = [1.0; 9];
        let (precisions, fixed_e, huber) = (2, false, None);
        let problem = Problem { samples: &samples, weights: &weights, precisions, fixed_e, huber };
        for (index, value) in [(0, 1e4), (1, 20.0), (E, -1e6), (E, f64::NAN)] {
            let mut at = vec![2.1, -1.9, 4.0, -1.5, 0.0, -0.3, -1.6];
            at[index] = value;
            assert!(minimize(&problem, at).is_none(), "{index}, {value}");
        }
    }
}
