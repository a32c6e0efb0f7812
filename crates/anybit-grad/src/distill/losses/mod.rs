//! Losses of distillation as operations of the tape: `p` is the teacher's distribution of the next
//! token, `q` the student's, both softmax of logits over `T`.
//!
//! | kind | per token | source |
//! |---|---|---|
//! | `forward_kl` | `T² KL(p‖q)` | Hinton et al., arXiv 1503.02531 |
//! | `reverse_kl` | `T² KL(q‖p)` | MiniLLM, GKD |
//! | `jsd` | `T² (a KL(p‖m) + b KL(q‖m))`, `m = β p + (1 − β) q` | GKD, arXiv 2306.13649 |
//! | `cakld` | `γ KL(q‖p) + (1 − γ) KL(p‖q)` | BitDistiller, arXiv 2402.10631 |
//! | `token_scaled` | `softmax_t(CE_t / scale) · KL(p‖q)` | TSLD |
//! | `feature_mse` | distance of hidden states | FitNets |
//! | `attention_transfer` | distance of token saliencies | Zagoruyko and Komodakis, ICLR 2017 |
//!
//! KL instead of the teacher's soft cross-entropy: the gradient is the same, and the value is 0 for
//! equal logits, which balancers read. Means are over tokens with a target, never over the
//! vocabulary or over tokens that are masked; without any such token the loss is 0.

mod divergence;
mod features;
mod logits;
mod teacher;

use serde::{Deserialize, Serialize};

use super::error::{DistillError, Result, check_setting};

pub use logits::{Distillation, Joint};
pub use teacher::{Teacher, TopK};

/// What the student is to have in common with its teacher.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum DistillLoss {
    /// `T² KL(p‖q)`: the student covers what the teacher finds likely.
    ForwardKl {
        /// Both logits are divided by it. 1 for language models, 4 for classifiers.
        #[serde(default = "one")]
        temperature: f64,
    },
    /// `T² KL(q‖p)`: the student avoids what the teacher finds unlikely.
    ReverseKl {
        /// Both logits are divided by it.
        #[serde(default = "one")]
        temperature: f64,
    },
    /// Jensen–Shannon divergence, between the two above.
    Jsd {
        /// Share of the teacher in the mixture, in `[0, 1]`.
        #[serde(default = "half")]
        beta: f64,
        /// Both logits are divided by it.
        #[serde(default = "one")]
        temperature: f64,
        /// How its two terms are weighed.
        #[serde(default)]
        form: JsdForm,
    },
    /// Confidence-aware mixture of both KL divergences, at temperature 1.
    Cakld {
        /// Share of the reverse one.
        #[serde(default)]
        gamma: Gamma,
    },
    /// Forward KL at temperature 1 with more weight on the tokens of a sequence that the teacher
    /// finds hard; weights of a sequence sum to 1, and sequences are averaged.
    TokenScaled {
        /// What the teacher's cross-entropy is divided by: larger is closer to equal weights.
        #[serde(default = "ten")]
        scale: f64,
    },
    /// Squared distance of hidden states, see [`crate::Tape::feature_mse`].
    FeatureMse {
        /// Whether rows are scaled to unit length first.
        #[serde(default)]
        normalise: bool,
    },
    /// Squared distance of token saliencies, see [`crate::Tape::attention_transfer`].
    AttentionTransfer {},
}

/// How the two terms of a Jensen–Shannon divergence are weighed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JsdForm {
    /// `(1 − β) KL(p‖m) + β KL(q‖m)`: forward KL at β = 0, reverse KL at β = 1.
    #[default]
    Continuous,
    /// `β KL(p‖m) + (1 − β) KL(q‖m)` as GKD prints it: 0 at both ends, which are refused.
    Paper,
}

/// Share of the reverse KL in `cakld`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gamma {
    /// The same for all, in `[0, 1]`.
    Const(f64),
    /// The mean over the tokens at hand of the teacher's largest probability. BitDistiller takes
    /// the mean over ten batches once: measure it with [`Teacher::mean_confidence`] and give it as
    /// a constant.
    #[default]
    MaxProb,
    /// For each token the teacher's probability of its target.
    LabelProb,
}

fn one() -> f64 {
    1.0
}

fn half() -> f64 {
    0.5
}

fn ten() -> f64 {
    10.0
}

impl Default for DistillLoss {
    fn default() -> Self {
        Self::ForwardKl { temperature: 1.0 }
    }
}

impl DistillLoss {
    /// Its name in recipes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ForwardKl { .. } => "forward_kl",
            Self::ReverseKl { .. } => "reverse_kl",
            Self::Jsd { .. } => "jsd",
            Self::Cakld { .. } => "cakld",
            Self::TokenScaled { .. } => "token_scaled",
            Self::FeatureMse { .. } => "feature_mse",
            Self::AttentionTransfer {} => "attention_transfer",
        }
    }

    /// Whether it compares logits; the others compare hidden states.
    pub fn on_logits(&self) -> bool {
        !matches!(self, Self::FeatureMse { .. } | Self::AttentionTransfer {})
    }

    /// What logits are divided by.
    pub fn temperature(&self) -> f64 {
        match *self {
            Self::ForwardKl { temperature }
            | Self::ReverseKl { temperature }
            | Self::Jsd { temperature, .. } => temperature,
            Self::Cakld { .. }
            | Self::TokenScaled { .. }
            | Self::FeatureMse { .. }
            | Self::AttentionTransfer {} => 1.0,
        }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// What is out of range, by its key.
    pub fn validate(&self) -> Result<()> {
        let (name, temperature) = (self.name(), self.temperature());
        check_setting(name, "temperature", temperature, temperature > 0.0, "it must be above 0")?;
        match *self {
            Self::Jsd { beta, form, .. } => {
                let ok = match form {
                    JsdForm::Continuous => (0.0..=1.0).contains(&beta),
                    JsdForm::Paper => beta > 0.0 && beta < 1.0,
                };
                let fix = "it must be in [0, 1]; in the paper's form the ends are no loss at all";
                check_setting(name, "beta", beta, ok, fix)
            }
            Self::Cakld { gamma: Gamma::Const(gamma) } => {
                let ok = (0.0..=1.0).contains(&gamma);
                check_setting(name, "gamma", gamma, ok, "it must be in [0, 1]")
            }
            Self::TokenScaled { scale } => {
                check_setting(name, "scale", scale, scale > 0.0, "it must be above 0")
            }
            _ => Ok(()),
        }
    }

    /// Fails unless it compares logits.
    fn check_on_logits(&self) -> Result<()> {
        let what = "it compares hidden states; call it through the operation of its own";
        match self.on_logits() {
            true => self.validate(),
            false => Err(DistillError::input(self.name(), what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> serde_json::Result<DistillLoss> {
        serde_json::from_str(text)
    }

    #[test]
    fn every_loss_has_a_name_and_survives_a_round_trip() {
        for text in [
            r#"{"type": "forward_kl", "temperature": 4.0}"#,
            r#"{"type": "reverse_kl"}"#,
            r#"{"type": "jsd", "beta": 0.1, "form": "paper"}"#,
            r#"{"type": "cakld"}"#,
            r#"{"type": "cakld", "gamma": {"const": 0.3}}"#,
            r#"{"type": "cakld", "gamma": "label_prob"}"#,
            r#"{"type": "token_scaled"}"#,
            r#"{"type": "feature_mse", "normalise": true}"#,
            r#"{"type": "attention_transfer"}"#,
        ] {
            let loss = parse(text).unwrap();
            loss.validate().unwrap();
            assert!(text.contains(&format!("\"{}\"", loss.name())), "{text}");
            assert_eq!(parse(&serde_json::to_string(&loss).unwrap()).unwrap(), loss);
        }
        assert_eq!(parse(r#"{"type": "forward_kl"}"#).unwrap(), DistillLoss::default());
        assert!(parse(r#"{"type": "forward_kl", "temp": 4.0}"#).is_err());
        assert!(parse(r#"{"type": "attention_transfer", "temp": 4.0}"#).is_err());
    }

    #[test]
    fn what_is_out_of_range_is_named() {
        for (text, key) in [
            (r#"{"type": "forward_kl", "temperature": 0.0}"#, "temperature"),
            (r#"{"type": "jsd", "beta": 1.5}"#, "beta"),
            (r#"{"type": "jsd", "beta": 1.0, "form": "paper"}"#, "beta"),
            (r#"{"type": "cakld", "gamma": {"const": -1.0}}"#, "gamma"),
            (r#"{"type": "token_scaled", "scale": 0.0}"#, "scale"),
        ] {
            let error = parse(text).unwrap().validate().unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
    }
}
