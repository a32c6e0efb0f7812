//! Scaling laws of models trained at low precision: how many parameters at full precision a
//! quantized parameter is worth.
//!
//! The law is that of QuEST (arXiv 2502.05003, section 4):
//! `L(N, D, P) = A / (N·eff(P))^α + B / D^β + E`, with the loss `L` in nats per token, `N`
//! parameters without embeddings, `D` tokens of training and a precision `P`. `eff` is 1 for the
//! reference precision.

mod data;
mod fit;
mod solve;

use std::collections::BTreeMap;

pub use data::{Run, Runs, parse_runs, read_runs};
pub use fit::{Fit, FitOptions, FittedRun, Intervals, Irreducible, Precision, fit};
use serde::Serialize;

/// The constants of the law.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Law {
    /// Factor of the parameters' term.
    pub a: f64,
    /// Exponent of the parameters.
    pub alpha: f64,
    /// Factor of the tokens' term.
    pub b: f64,
    /// Exponent of the tokens.
    pub beta: f64,
    /// The loss that no size and no data take away.
    pub e: f64,
    /// What a parameter of each precision is worth, the reference's being 1.
    pub eff: BTreeMap<String, f64>,
}

impl Law {
    /// The loss after training `params` parameters of `precision` on `tokens` tokens; `None` for a
    /// precision that was not fitted.
    pub fn predict(&self, params: f64, tokens: f64, precision: &str) -> Option<f64> {
        let eff = self.eff.get(precision)?;
        let size = self.a / (params * eff).powf(self.alpha);
        Some(size + self.b / tokens.powf(self.beta) + self.e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prediction() {
        let eff = BTreeMap::from([("half".to_string(), 0.25)]);
        let law = Law { a: 8.0, alpha: 0.5, b: 30.0, beta: 1.0, e: 0.5, eff };
        assert_eq!(law.predict(64.0, 10.0, "half"), Some(2.0 + 3.0 + 0.5));
        assert_eq!(law.predict(64.0, 10.0, "quarter"), None);
    }
}
