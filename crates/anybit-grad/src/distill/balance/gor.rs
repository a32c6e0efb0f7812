//! GoR, two trained scalars `σ = (σ_task, σ_teacher)` (Rehman et al., arXiv 2509.20854).
//!
//! ```text
//! L = Σ_i L_i / (2 σ_i²) + ln(1 + σ_i²)          w_i = 1 / (2 σ_i²)
//! ∂L/∂σ_i = −L_i / σ_i³ + 2 σ_i / (1 + σ_i²)
//! equilibrium: σ_i² = (L_i + √(L_i² + 8 L_i)) / 4,  w_i = 2 / (L_i + √(L_i² + 8 L_i))
//! ```
//!
//! INFERRED: of the paper only the abstract was at hand ("learnable regularization", "two trainable
//! parameters"); this is the non-negative form of Liebel and Körner (arXiv 1805.06334), the most
//! likely one. Do not compare numbers with the paper's. `per_first_loss` is the loss-normalized
//! variant, the same of `L_i / L_i(0)`.

pub use super::learned::LearnedOptions as GorOptions;
use super::learned::Rule;

/// `L / (2 σ²) + ln(1 + σ²)`: what the scalar of one loss minimizes; never below 0.
pub fn objective(sigma: f64, loss: f64) -> f64 {
    loss / (2.0 * sigma * sigma) + (sigma * sigma).ln_1p()
}

/// The rule of [`objective`].
#[derive(Debug, Clone, Copy)]
pub(super) struct LiebelKoerner;

impl Rule for LiebelKoerner {
    const NAME: &'static str = "gor";
    const SYMBOL: &'static str = "sigma";
    const FIRST: f64 = 1.0;

    fn weight(sigma: f64) -> f64 {
        0.5 / (sigma * sigma)
    }

    fn of_weight(weight: f64) -> f64 {
        (0.5 / weight).sqrt()
    }

    fn gradient(sigma: f64, loss: f64) -> f64 {
        -loss / sigma.powi(3) + 2.0 * sigma / (1.0 + sigma * sigma)
    }

    fn equilibrium(loss: f64) -> f64 {
        ((loss + (loss * loss + 8.0 * loss).sqrt()) / 4.0).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Invariant 1: the gradient is that of the objective.
    #[test]
    fn invariant_1_gradient() {
        approx::assert_abs_diff_eq!(LiebelKoerner::gradient(0.7, 1.3), -2.850490, epsilon = 1e-6);
        for sigma in [0.3, 0.7, 1.0, 2.5, 7.0] {
            for loss in [0.0, 0.2, 1.3, 8.0] {
                let h = 1e-5;
                let numeric = (objective(sigma + h, loss) - objective(sigma - h, loss)) / (2.0 * h);
                let gradient = LiebelKoerner::gradient(sigma, loss);
                let size = gradient.abs().max(1.0);
                assert!((numeric - gradient).abs() < 1e-6 * size, "{numeric} {gradient}");
            }
        }
    }

    /// Invariant 2: descent on a constant loss ends at the equilibrium of section 1.3.
    #[test]
    fn invariant_2_equilibria() {
        let golden = [
            (0.01, 0.07325, 6.825),
            (0.1, 0.25, 2.0),
            (1.0, 1.0, 0.5),
            (5.0, 3.2656, 0.1531),
            (50.0, 25.963, 0.01926),
        ];
        for (loss, variance, weight) in golden {
            let mut sigma = 1.0;
            for _ in 0..60_000 {
                sigma -= 5e-3 * LiebelKoerner::gradient(sigma, loss);
            }
            let want = LiebelKoerner::equilibrium(loss);
            approx::assert_relative_eq!(sigma, want, max_relative = 1e-6);
            approx::assert_relative_eq!(want * want, variance, max_relative = 5e-4);
            approx::assert_relative_eq!(LiebelKoerner::weight(want), weight, max_relative = 5e-4);
        }
    }

    /// Invariant 3: the objective is not negative.
    #[test]
    fn invariant_3_never_negative() {
        for sigma in [1e-3, 0.1, 1.0, 30.0, 1e6] {
            for loss in [0.0, 1e-6, 0.01, 1.0, 1e4] {
                assert!(objective(sigma, loss) >= 0.0);
            }
        }
    }

    /// Invariant 5: the effective ratio grows with the unit of the teacher's loss, within bounds.
    #[test]
    fn invariant_5_partly_free_of_units() {
        let weight = |loss| LiebelKoerner::weight(LiebelKoerner::equilibrium(loss));
        let ratio = |c: f64| weight(c * 3.6) * c / weight(0.9);
        for (c, want) in [(1.0 / 30.0, 0.112), (1.0, 0.371), (30.0, 0.509)] {
            approx::assert_abs_diff_eq!(ratio(c), want, epsilon = 1e-3);
        }
        let ratios: Vec<f64> = (-3..=3).map(|e| ratio(10f64.powi(e))).collect();
        assert!(ratios.is_sorted());
        // w L is below 1 for every loss.
        assert!(ratios.iter().all(|r| r * 3.6 * weight(0.9) < 1.0));
    }

    #[test]
    fn weights_and_scalars_are_inverse() {
        for weight in [1e-8, 0.5, 20.0] {
            let back = LiebelKoerner::weight(LiebelKoerner::of_weight(weight));
            approx::assert_relative_eq!(back, weight, max_relative = 1e-12);
        }
        approx::assert_abs_diff_eq!(LiebelKoerner::of_weight(20.0), 0.158, epsilon = 2e-4);
    }
}
