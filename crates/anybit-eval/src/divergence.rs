//! One position's scores from logits.
//!
//! With `p = softmax(r)` of the reference and `q = softmax(m)` of the model, both kept as logits:
//!
//! ```text
//! KL(p‖q) = Σ p_i (r_i − m_i) − log Σ e^r + log Σ e^m
//! ```
//!
//! so that equal logits give exactly 0. Sums run in f32 over short blocks and in f64 over blocks.

use anybit_kernels::activation::exp;

/// Entries that are summed in f32 before going to f64.
const BLOCK: usize = 256;

/// What one position says about a model, by itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Position {
    /// Log of the softmax's denominator.
    pub log_sum: f64,
    /// Index of the largest logit.
    pub top: usize,
    /// Negative log-likelihood of the target, in nats.
    pub nll: f64,
}

/// What it says about a model beside its reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Comparison {
    /// `KL(reference ‖ model)`, in nats.
    pub kl: f64,
    /// Whether both find the same token most probable.
    pub same_top: bool,
    /// Probability of the target under the model, minus that under the reference.
    pub delta_p: f64,
}

/// Scores one row of logits.
pub fn score(logits: &[f32], target: usize) -> Position {
    let mut top = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[top] {
            top = i;
        }
    }
    let max = logits[top];
    let sum = blocked_sum(logits, logits, |l, _| exp(l - max));
    let log_sum = max as f64 + sum.ln();
    Position { log_sum, top, nll: log_sum - logits[target] as f64 }
}

/// Compares two rows of logits that were scored for the same target.
pub fn compare(reference: (&[f32], Position), model: (&[f32], Position)) -> Comparison {
    let ((r, at_r), (m, at_m)) = (reference, model);
    let log_sum = at_r.log_sum as f32;
    let cross = blocked_sum(r, m, |r, m| exp(r - log_sum) * (r - m));
    // The weights were normalized in f32; their true sum takes the last digits out.
    let total = blocked_sum(r, r, |r, _| exp(r - log_sum));
    Comparison {
        kl: (cross / total - at_r.log_sum + at_m.log_sum).max(0.0),
        same_top: at_r.top == at_m.top,
        delta_p: (-at_m.nll).exp() - (-at_r.nll).exp(),
    }
}

/// `Σ f(a_i, b_i)`: 16 lanes of f32 inside a block, f64 across blocks.
#[inline(always)]
fn blocked_sum(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f64 {
    let mut total = 0f64;
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut lanes = [0f32; 16];
        let (ac, bc) = (a.chunks_exact(16), b.chunks_exact(16));
        for (a, b) in ac.remainder().iter().zip(bc.remainder()) {
            lanes[0] += f(*a, *b);
        }
        for (a, b) in ac.zip(bc) {
            for i in 0..16 {
                lanes[i] += f(a[i], b[i]);
            }
        }
        total += lanes.iter().map(|l| *l as f64).sum::<f64>();
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn softmax64(l: &[f32]) -> Vec<f64> {
        let max = l.iter().fold(f32::MIN, |m, v| m.max(*v)) as f64;
        let e: Vec<f64> = l.iter().map(|v| (*v as f64 - max).exp()).collect();
        let sum: f64 = e.iter().sum();
        e.into_iter().map(|e| e / sum).collect()
    }

    proptest! {
        #[test]
        fn equals_the_definition(r in prop::collection::vec(-20f32..20.0, 1..600),
                                 noise in prop::collection::vec(-3f32..3.0, 600), t in any::<usize>()) {
            let m: Vec<f32> = r.iter().zip(&noise).map(|(r, n)| r + n).collect();
            let target = t % r.len();
            let (pr, pm) = (score(&r, target), score(&m, target));
            let (p, q) = (softmax64(&r), softmax64(&m));
            let kl: f64 = p.iter().zip(&q).map(|(p, q)| if *p > 0.0 { p * (p / q).ln() } else { 0.0 }).sum();
            let c = compare((&r, pr), (&m, pm));
            prop_assert!((c.kl - kl).abs() < 2e-6 * (1.0 + kl), "{} {kl}", c.kl);
            prop_assert!((pr.nll + p[target].ln()).abs() < 1e-5);
            prop_assert!((c.delta_p - (q[target] - p[target])).abs() < 1e-5);
            // The control: a row compared with itself.
            let same = compare((&r, pr), (&r, pr));
            prop_assert_eq!((same.kl, same.same_top, same.delta_p), (0.0, true, 0.0));
        }
    }
}
