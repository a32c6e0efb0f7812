//! Uncertainty weighting, two trained log-variances `s` (Kendall et al., CVPR 2018; the form of
//! LibMTL).
//!
//! ```text
//! L = Σ_i L_i / (2 e^{s_i}) + s_i / 2            w_i = e^{−s_i} / 2
//! ∂L/∂s_i = 1/2 − L_i / (2 e^{s_i})              equilibrium: s_i = ln L_i,  w_i L_i = 1/2
//! ```
//!
//! At equilibrium the unit of a loss does not matter. The total can be negative: it is no measure of
//! progress. The classification form of the paper drops the 1/2; ours keeps it.

pub use super::learned::LearnedOptions as UncertaintyOptions;
use super::learned::Rule;

/// `L / (2 e^s) + s / 2`: what the scalar of one loss minimizes.
pub fn objective(s: f64, loss: f64) -> f64 {
    loss * (-s).exp() / 2.0 + s / 2.0
}

/// The rule of [`objective`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Kendall;

impl Rule for Kendall {
    const NAME: &'static str = "uncertainty";
    const SYMBOL: &'static str = "s";
    const FIRST: f64 = -0.5;

    fn weight(s: f64) -> f64 {
        (-s).exp() / 2.0
    }

    fn of_weight(weight: f64) -> f64 {
        -(2.0 * weight).ln()
    }

    fn gradient(s: f64, loss: f64) -> f64 {
        0.5 - loss * (-s).exp() / 2.0
    }

    fn equilibrium(loss: f64) -> f64 {
        loss.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradient() {
        for s in [-3.0, -0.5, 0.0, 2.0] {
            for loss in [0.0, 0.2, 8.0] {
                let h = 1e-5;
                let numeric = (objective(s + h, loss) - objective(s - h, loss)) / (2.0 * h);
                approx::assert_abs_diff_eq!(numeric, Kendall::gradient(s, loss), epsilon = 1e-6);
            }
        }
    }

    /// Invariant 2: descent on a constant loss ends at `w L = 1/2`.
    #[test]
    fn invariant_2_equilibrium() {
        for loss in [0.01, 0.5, 1.0, 7.0] {
            let mut s = -0.5;
            for _ in 0..20_000 {
                s -= 1e-2 * Kendall::gradient(s, loss);
            }
            approx::assert_relative_eq!(s, Kendall::equilibrium(loss), epsilon = 1e-6);
            approx::assert_relative_eq!(Kendall::weight(s) * loss, 0.5, max_relative = 1e-6);
        }
    }

    /// Invariant 3: the total can be negative.
    #[test]
    fn invariant_3_can_be_negative() {
        assert!(objective(Kendall::equilibrium(0.01), 0.01) < 0.0);
    }

    /// Invariant 5: the effective ratio is free of the unit of the teacher's loss.
    #[test]
    fn invariant_5_free_of_units() {
        let weight = |loss| Kendall::weight(Kendall::equilibrium(loss));
        for c in [1e-3, 0.1, 1.0, 30.0, 1e3] {
            approx::assert_relative_eq!(weight(c * 3.6) * c / weight(0.9), 0.25, epsilon = 1e-12);
        }
    }

    /// Invariant 23: for `½(x−a)² + 1` and `c (½(x−b)² + 1)` the minimum at 1:1 depends on `c`, that
    /// of uncertainty weighting does not, GoR lies in between.
    #[test]
    fn invariant_23_two_bowls() {
        use super::super::gor::LiebelKoerner;
        fn minimum(c: f64, weight: impl Fn(f64) -> f64) -> f64 {
            let (a, b, mut x) = (-1.0, 1.0, 0.2);
            for _ in 0..4000 {
                let losses =
                    [0.5 * f64::powi(x - a, 2) + 1.0, c * (0.5 * f64::powi(x - b, 2) + 1.0)];
                let (wa, wb) = (weight(losses[0]), c * weight(losses[1]));
                x -= 0.05 * (wa * (x - a) + wb * (x - b)) / (wa + wb);
            }
            x
        }
        let spread = |weight: fn(f64) -> f64| (minimum(0.2, weight) - minimum(5.0, weight)).abs();
        let fixed = spread(|_| 1.0);
        let kendall = spread(|loss| Kendall::weight(Kendall::equilibrium(loss)));
        let gor = spread(|loss| LiebelKoerner::weight(LiebelKoerner::equilibrium(loss)));
        assert!(kendall < 1e-6 && kendall < gor && gor < fixed, "{kendall} {gor} {fixed}");
    }
}
