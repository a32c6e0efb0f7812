//! Divergences of one token and their gradients, from log-probabilities `lp` (teacher) and `lq`
//! (student) over any set of outcomes.
//!
//! ```text
//! KL(p‖q)                       gradient with respect to the logits of q:  q − p
//! KL(q‖p) = R                   q (ln q − ln p − R)
//! a KL(p‖m) + b KL(q‖m)         t − q Σ t,  t = b q (ln q/m − r) − a p r,  r = (1 − β) q / m
//! m = β p + (1 − β) q
//! ```
//!
//! `ln m` is formed from `lp` and `lq` in the log domain; mixing log-probabilities instead is a
//! mistake seen in the wild. Values are f32 with sums in f64, the gradients stand where `lq` was.
//! Called by [`super::logits`].

use anybit_kernels::activation::exp;

/// Log-probabilities are at least this: `0 · ln 0` is 0 then, and no divergence is infinite.
pub(super) const FLOOR: f32 = -1e4;

/// `ln softmax(row / temperature)` in place.
pub(super) fn log_softmax(row: &mut [f32], temperature: f64) {
    let inverse = (1.0 / temperature) as f32;
    row.iter_mut().for_each(|z| *z *= inverse);
    let log_sum = shift_by_max(row).ln() as f32;
    // Comparing keeps NaN, as `max` would not.
    row.iter_mut().for_each(|z| {
        let log = *z - log_sum;
        *z = if log < FLOOR { FLOOR } else { log };
    });
}

/// Subtracts the largest value from all and returns `Σ e^x` of the result.
fn shift_by_max(row: &mut [f32]) -> f64 {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, z| max.max(*z));
    let mut sum = 0f64;
    for z in row.iter_mut() {
        *z -= max;
        sum += exp(*z) as f64;
    }
    sum
}

/// `ln Σ e^x`.
pub(super) fn log_sum_exp(values: impl Iterator<Item = f32> + Clone) -> f32 {
    let max = values.clone().fold(FLOOR, f32::max);
    let sum: f64 = values.map(|v| exp(v - max) as f64).sum();
    if sum > 0.0 { max + sum.ln() as f32 } else { FLOOR }
}

/// What one token's divergence is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kernel {
    /// `forward · KL(p‖q) + reverse · KL(q‖p)`.
    Kl {
        /// Weight of the first.
        forward: f64,
        /// Weight of the second.
        reverse: f64,
    },
    /// `teacher · KL(p‖m) + student · KL(q‖m)`.
    Jsd {
        /// Weight of the first.
        teacher: f64,
        /// Weight of the second.
        student: f64,
        /// Share of the teacher in `m`.
        beta: f64,
    },
}

impl Kernel {
    /// The divergence; `lq` becomes its gradient with respect to the student's scaled logits, and
    /// `lp` loses its meaning.
    pub fn apply(self, lp: &mut [f32], lq: &mut [f32]) -> f64 {
        match self {
            Self::Kl { forward, reverse } => kl(lp, lq, forward, reverse),
            Self::Jsd { teacher, student, beta } => jsd(lp, lq, [teacher, student], beta),
        }
    }
}

/// `KL(a‖b)` of log-probabilities; what rounding makes negative is 0.
fn kl_value(la: &[f32], lb: &[f32]) -> f64 {
    let term = |(a, b): (&f32, &f32)| exp(*a) as f64 * (*a as f64 - *b as f64);
    not_negative(la.iter().zip(lb).map(term).sum())
}

/// The value, 0 when it is below; NaN stays.
fn not_negative(value: f64) -> f64 {
    if value < 0.0 { 0.0 } else { value }
}

fn kl(lp: &[f32], lq: &mut [f32], forward: f64, reverse: f64) -> f64 {
    if reverse == 0.0 {
        let value = kl_value(lp, lq);
        let factor = forward as f32;
        lq.iter_mut().zip(lp).for_each(|(q, lp)| *q = factor * (exp(*q) - exp(*lp)));
        return forward * value;
    }
    let (f, r) = (kl_value(lp, lq), kl_value(lq, lp));
    let (forward_factor, reverse_factor, inner) = (forward as f32, reverse as f32, r as f32);
    lq.iter_mut().zip(lp).for_each(|(g, lp)| {
        let (lq, q) = (*g, exp(*g));
        *g = forward_factor * (q - exp(*lp)) + reverse_factor * q * (lq - lp - inner);
    });
    forward * f + reverse * r
}

/// `ln x` for a share `x`.
fn log_share(x: f64) -> f32 {
    if x > 0.0 { x.ln() as f32 } else { 2.0 * FLOOR }
}

fn jsd(lp: &mut [f32], lq: &mut [f32], weights: [f64; 2], beta: f64) -> f64 {
    let (log_beta, log_rest) = (log_share(beta), log_share(1.0 - beta));
    let factors = weights.map(|w| w as f32);
    let (mut of_p, mut of_q, mut inner) = (0f64, 0f64, 0f64);
    for (lp, lq) in lp.iter_mut().zip(lq.iter()) {
        let (of_teacher, of_student) = (*lp + log_beta, *lq + log_rest);
        let (high, low) = match of_teacher > of_student {
            true => (of_teacher, of_student),
            false => (of_student, of_teacher),
        };
        let mixed = high + exp(low - high).ln_1p();
        let (p, q, share) = (exp(*lp), exp(*lq), exp(of_student - mixed));
        let (gap_p, gap_q) = (*lp - mixed, *lq - mixed);
        of_p += p as f64 * gap_p as f64;
        of_q += q as f64 * gap_q as f64;
        // The teacher's value is not needed again: its place holds `t`.
        *lp = factors[1] * q * (gap_q - share) - factors[0] * p * share;
        inner += *lp as f64;
    }
    let inner = inner as f32;
    lq.iter_mut().zip(lp.iter()).for_each(|(lq, t)| *lq = t - exp(*lq) * inner);
    weights[0] * not_negative(of_p) + weights[1] * not_negative(of_q)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    /// Softmax in f64.
    fn softmax(z: &[f32]) -> Vec<f64> {
        let max = z.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v)) as f64;
        let e: Vec<f64> = z.iter().map(|v| (*v as f64 - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.iter().map(|e| e / sum).collect()
    }

    /// KL divergence in f64, from logits.
    fn reference(zp: &[f32], zq: &[f32]) -> f64 {
        let log = |z: &[f32]| -> Vec<f64> {
            let max = z.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v)) as f64;
            let sum: f64 = z.iter().map(|v| (*v as f64 - max).exp()).sum();
            z.iter().map(|v| *v as f64 - max - sum.ln()).collect()
        };
        let (lp, lq) = (log(zp), log(zq));
        lp.iter().zip(&lq).map(|(p, q)| p.exp() * (p - q)).sum()
    }

    /// Value and gradient of logits.
    fn run(kernel: Kernel, zp: &[f32], zq: &[f32]) -> (f64, Vec<f32>) {
        let (mut lp, mut lq) = (zp.to_vec(), zq.to_vec());
        log_softmax(&mut lp, 1.0);
        log_softmax(&mut lq, 1.0);
        let value = kernel.apply(&mut lp, &mut lq);
        (value, lq)
    }

    const FORWARD: Kernel = Kernel::Kl { forward: 1.0, reverse: 0.0 };
    const REVERSE: Kernel = Kernel::Kl { forward: 0.0, reverse: 1.0 };

    fn continuous(beta: f64) -> Kernel {
        Kernel::Jsd { teacher: 1.0 - beta, student: beta, beta }
    }

    fn paper(beta: f64) -> Kernel {
        Kernel::Jsd { teacher: beta, student: 1.0 - beta, beta }
    }

    fn logits(seed: u64, n: usize, scale: f32) -> Vec<f32> {
        normals(seed, n).iter().map(|v| scale * v).collect()
    }

    /// Invariant 12: not negative, 0 for logits that differ by a constant, as in f64 up to |z| = 80.
    #[test]
    fn invariant_12_kl() {
        let z = logits(1, 50, 2.0);
        assert_eq!(run(FORWARD, &z, &z).0, 0.0);
        assert!(run(FORWARD, &z, &z).1.iter().all(|g| *g == 0.0));
        let shifted: Vec<f32> = z.iter().map(|v| v + 7.0).collect();
        for kernel in [FORWARD, REVERSE, continuous(0.3)] {
            let value = run(kernel, &z, &shifted).0;
            assert!((0.0..1e-5).contains(&value), "{value}");
        }
        for seed in 0..8 {
            for scale in [0.1, 1.0, 30.0] {
                let clamp =
                    |z: Vec<f32>| -> Vec<f32> { z.iter().map(|v| v.clamp(-80.0, 80.0)).collect() };
                let (p, q) = (clamp(logits(seed, 40, scale)), clamp(logits(seed + 50, 40, scale)));
                for (kernel, want) in [(FORWARD, reference(&p, &q)), (REVERSE, reference(&q, &p))] {
                    let value = run(kernel, &p, &q).0;
                    assert!(value >= 0.0);
                    assert!((value - want).abs() < 1e-5 * want.max(1.0), "{value} {want}");
                }
            }
        }
    }

    /// Invariant 13, first part: the gradient is that of the soft cross-entropy, `q − p`.
    #[test]
    fn invariant_13_gradient_of_soft_cross_entropy() {
        let (zp, zq) = (logits(3, 20, 1.5), logits(4, 20, 1.5));
        let (p, q) = (softmax(&zp), softmax(&zq));
        let (value, gradient) = run(FORWARD, &zp, &zq);
        for (g, (p, q)) in gradient.iter().zip(p.iter().zip(&q)) {
            approx::assert_abs_diff_eq!(*g as f64, q - p, epsilon = 1e-6);
        }
        let soft: f64 = p.iter().zip(&q).map(|(p, q)| -p * q.ln()).sum();
        let entropy: f64 = p.iter().map(|p| -p * p.ln()).sum();
        approx::assert_abs_diff_eq!(value, soft - entropy, epsilon = 1e-5);
    }

    /// Invariant 15: ends of the Jensen–Shannon divergences, and its bound at one half.
    #[test]
    fn invariant_15_ends_of_jsd() {
        let (zp, zq) = (logits(5, 30, 2.0), logits(6, 30, 2.0));
        for (beta, kernel) in [(0.0, FORWARD), (1.0, REVERSE)] {
            let (a, b) = (run(continuous(beta), &zp, &zq), run(kernel, &zp, &zq));
            approx::assert_relative_eq!(a.0, b.0, max_relative = 1e-5);
            for (a, b) in a.1.iter().zip(&b.1) {
                approx::assert_abs_diff_eq!(*a, *b, epsilon = 1e-5);
            }
            assert!(run(paper(beta), &zp, &zq).0 < 1e-5);
        }
        // Near the ends the continuous form stays, the paper's vanishes.
        let near = run(continuous(1e-6), &zp, &zq).0;
        approx::assert_relative_eq!(near, run(FORWARD, &zp, &zq).0, max_relative = 0.05);
        assert!(run(paper(1e-6), &zp, &zq).0 < 0.02 * near);
        for scale in [0.5, 3.0, 60.0] {
            let value = run(continuous(0.5), &logits(7, 30, scale), &logits(8, 30, scale)).0;
            assert!((0.0..=std::f64::consts::LN_2 + 1e-6).contains(&value), "{value}");
        }
    }

    #[test]
    fn gradients_are_those_of_the_values() {
        let mixed = Kernel::Kl { forward: 0.3, reverse: 0.7 };
        let (zp, zq) = (logits(9, 12, 1.0), logits(10, 12, 1.0));
        for kernel in [FORWARD, REVERSE, mixed, continuous(0.3), paper(0.7), continuous(0.5)] {
            let gradient = run(kernel, &zp, &zq).1;
            for (j, g) in gradient.iter().enumerate() {
                let moved = |h: f32| {
                    let mut zq = zq.clone();
                    zq[j] += h;
                    run(kernel, &zp, &zq).0
                };
                let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                approx::assert_abs_diff_eq!(numeric, *g as f64, epsilon = 3e-4);
            }
        }
    }

    #[test]
    fn impossible_tokens_are_finite_and_nan_is_seen() {
        let (zp, mut zq) = (vec![1.0, f32::NEG_INFINITY, 0.0], vec![0.5, 0.2, 0.1]);
        for kernel in [FORWARD, REVERSE, continuous(0.5)] {
            let (value, gradient) = run(kernel, &zp, &zq);
            assert!(value.is_finite() && gradient.iter().all(|g| g.is_finite()));
        }
        zq[1] = f32::NAN;
        for kernel in [FORWARD, REVERSE, continuous(0.5)] {
            assert!(run(kernel, &zp, &zq).0.is_nan());
        }
    }
}
