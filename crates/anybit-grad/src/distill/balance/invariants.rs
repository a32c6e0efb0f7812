//! What the specification of balancers lists as testable about ways to weigh losses that are not
//! shipped, because of what these tests show.

use super::state::ScalarAdam;
use super::{Pair, both, two_softmax, zip};

/// Invariant 7: weights that are trained as they are, `∂L/∂w_i = L_i`, have nothing that holds them:
/// both fall to their bound, whatever the losses.
#[test]
fn invariant_7_free_weights_fall_to_their_bound() {
    const LEAST: f64 = 1e-8;
    const LR: f64 = 1e-2;
    for losses in [[1.0, 1.0], [0.9, 3.6], [1e-3, 50.0]] {
        let (mut weights, mut adam) = ([1.0; 2], ScalarAdam::new(LR));
        let mut steps = 0;
        while weights != [LEAST; 2] {
            adam.step(&mut weights, losses);
            weights = both(weights, |w| w.max(LEAST));
            steps += 1;
            // Adam moves by the learning rate: 1/LR steps, and one for its rounding.
            assert!(steps <= 102, "{weights:?}");
        }
    }
}

/// Weights `2 softmax(a)` at the end of descent on `Σ w_i L_i − β H(softmax(a))`.
fn softmax_entropy(losses: Pair, beta: f64) -> Pair {
    let mut a = [1.0, -0.5];
    // A smaller step for the stiffer objective.
    let lr = 0.5 / (1.0 + beta);
    for _ in 0..20_000 {
        let q = both(two_softmax(a), |w| w / 2.0);
        // The derivative of the objective by q; that of −q ln q is −(ln q + 1).
        let by_q = zip(losses, q, |loss, q| 2.0 * loss + beta * (q.ln() + 1.0));
        let mean = q[0] * by_q[0] + q[1] * by_q[1];
        let gradient = zip(q, by_q, |q, g| q * (g - mean));
        a = zip(a, gradient, |a, g| a - lr * g);
    }
    two_softmax(a)
}

/// Invariant 7: softmax weights with an entropy are even for `β → ∞`, have `q_i ~ exp(−2 L_i/β)`
/// between, and take the smaller loss alone at `β = 0`.
#[test]
fn invariant_7_softmax_weights_need_their_entropy() {
    for losses in [[0.9, 3.6], [3.6, 0.9], [0.2, 0.5]] {
        for w in softmax_entropy(losses, 1e6) {
            approx::assert_abs_diff_eq!(w, 1.0, epsilon = 1e-5);
        }
        for beta in [1.0, 3.0, 10.0] {
            let w = softmax_entropy(losses, beta);
            let ratio = (-2.0 * (losses[0] - losses[1]) / beta).exp();
            approx::assert_relative_eq!(w[0] / w[1], ratio, max_relative = 1e-6);
        }
        let w = softmax_entropy(losses, 0.0);
        let smaller = if losses[0] < losses[1] { w[0] } else { w[1] };
        assert!(smaller > 1.98, "{losses:?}: {w:?}");
    }
}
