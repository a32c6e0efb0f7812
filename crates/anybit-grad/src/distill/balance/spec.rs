//! [`BalancerSpec`]: a balancer as a recipe names it.
//!
//! ```toml
//! [balancer]
//! type = "gor"
//! first = "equilibrium"
//! normalise = true
//! ```

use serde::{Deserialize, Serialize};

use super::dwa::{Dwa, DwaOptions};
use super::fixed::{Fixed, FixedOptions};
use super::gor::{GorOptions, LiebelKoerner};
use super::gradnorm::{GradNorm, GradNormOptions};
use super::learned::Learned;
use super::logit_gradient::{LogitGradient, LogitGradientOptions};
use super::uncertainty::{Kendall, UncertaintyOptions};
use super::{Balancer, Needs};
use crate::distill::error::Result;

/// Settings of a balancer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BalancerSpec {
    /// GoR: two trained scalars and their regularizer.
    Gor(GorOptions),
    /// Given weights; (1, 0) is the task alone, (0, 1) the teacher alone.
    Fixed(FixedOptions),
    /// Two trained log-variances.
    Uncertainty(UncertaintyOptions),
    /// Dynamic weight average.
    Dwa(DwaOptions),
    /// Equal gradient norms at shared parameters.
    Gradnorm(GradNormOptions),
    /// Inverse gradient norms at the logits.
    LogitGradient(LogitGradientOptions),
}

impl Default for BalancerSpec {
    fn default() -> Self {
        Self::Gor(GorOptions::default())
    }
}

impl BalancerSpec {
    /// Its name in recipes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Gor(_) => "gor",
            Self::Fixed(_) => "fixed",
            Self::Uncertainty(_) => "uncertainty",
            Self::Dwa(_) => "dwa",
            Self::Gradnorm(_) => "gradnorm",
            Self::LogitGradient(_) => "logit_gradient",
        }
    }

    /// What the trainer must supply beside the losses.
    pub fn needs(&self) -> Needs {
        match self {
            Self::Gradnorm(_) => Needs::ParameterNorms,
            Self::LogitGradient(_) => Needs::LogitNorms,
            Self::Gor(_) | Self::Fixed(_) | Self::Uncertainty(_) | Self::Dwa(_) => Needs::Losses,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// What is out of range, by its key.
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Gor(options) | Self::Uncertainty(options) => options.validate(self.name()),
            Self::Fixed(options) => options.validate(),
            Self::Dwa(options) => options.validate(),
            Self::Gradnorm(options) => options.validate(),
            Self::LogitGradient(options) => options.validate(),
        }
    }

    /// The balancer of a training of `steps` optimizer steps.
    ///
    /// # Errors
    /// As [`Self::validate`].
    pub fn build(&self, steps: u64) -> Result<Box<dyn Balancer>> {
        self.validate()?;
        Ok(match *self {
            Self::Gor(options) => Box::new(Learned::<LiebelKoerner>::new(options, steps)),
            Self::Fixed(options) => Box::new(Fixed(options)),
            Self::Uncertainty(options) => Box::new(Learned::<Kendall>::new(options, steps)),
            Self::Dwa(options) => Box::new(Dwa::new(options, steps)),
            Self::Gradnorm(options) => Box::new(GradNorm::new(options)),
            Self::LogitGradient(options) => Box::new(LogitGradient::new(options)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> serde_json::Result<BalancerSpec> {
        serde_json::from_str(text)
    }

    #[test]
    fn every_balancer_has_a_name_and_survives_a_round_trip() {
        for text in [
            r#"{"type": "gor", "per_first_loss": true, "first": "equilibrium"}"#,
            r#"{"type": "fixed", "task": 0.0}"#,
            r#"{"type": "uncertainty", "lr": 0.01}"#,
            r#"{"type": "dwa", "interval": 5}"#,
            r#"{"type": "gradnorm"}"#,
            r#"{"type": "logit_gradient", "decay": 0.5}"#,
        ] {
            let spec = parse(text).unwrap();
            let balancer = spec.build(100).unwrap();
            assert_eq!((balancer.name(), balancer.needs()), (spec.name(), spec.needs()));
            assert!(text.contains(&format!("\"{}\"", spec.name())), "{text}");
            assert_eq!(parse(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
        }
        assert_eq!(parse(r#"{"type": "gor"}"#).unwrap(), BalancerSpec::default());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(parse(r#"{"type": "gor", "sigma": 1.0}"#).is_err());
        assert!(parse(r#"{"type": "goor"}"#).is_err());
        for (text, key) in [
            (r#"{"type": "gor", "lr": -1.0}"#, "lr"),
            (r#"{"type": "gor", "w_max": 1e-9}"#, "w_max"),
            (r#"{"type": "fixed", "teacher": -1.0}"#, "teacher"),
            (r#"{"type": "uncertainty", "batches": 0}"#, "batches"),
            (r#"{"type": "dwa", "temperature": 0.0}"#, "temperature"),
            (r#"{"type": "gradnorm", "alpha": -1.0}"#, "alpha"),
            (r#"{"type": "logit_gradient", "decay": 1.0}"#, "decay"),
        ] {
            let spec = parse(text).unwrap();
            let error = spec.build(10).unwrap_err().to_string();
            assert!(error.contains(spec.name()) && error.contains(key), "{error}");
        }
    }
}
