//! What training writes down while it goes on: [`JsonLines`] for programs, [`TensorBoard`] for eyes.
//! One [`Record`] per step and per validation goes to both.

mod jsonl;
mod tensorboard;

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

pub use jsonl::JsonLines;
pub use tensorboard::TensorBoard;

/// What a record is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An optimizer step.
    Step,
    /// A validation.
    Validation,
}

/// One line of a log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What it is about.
    pub kind: Kind,
    /// Steps taken.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Loss, in nats per token; `null` in the file where it is not finite, read back as NaN.
    #[serde(deserialize_with = "number")]
    pub loss: f64,
    /// Learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Norm of the gradients before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Speed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_s: Option<f64>,
    /// Seconds since the session began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Share of the entries that pass gradient, by operand.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub trusted: BTreeMap<String, f64>,
    /// What else a trainer reports, by name.
    #[serde(default, deserialize_with = "numbers", skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<String, f64>,
}

impl Record {
    /// A record of a loss alone.
    pub fn new(kind: Kind, step: u64, tokens: u64, loss: f64) -> Self {
        let (trusted, extra) = (BTreeMap::new(), BTreeMap::new());
        let (lr, grad_norm, tokens_per_s, seconds) = (None, None, None, None);
        Self { kind, step, tokens, loss, lr, grad_norm, tokens_per_s, seconds, trusted, extra }
    }
}

/// JSON has no NaN: serde_json writes `null`, and a log must stay readable to be resumed.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

fn numbers<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    let read = BTreeMap::<String, Option<f64>>::deserialize(from)?;
    Ok(read.into_iter().map(|(name, value)| (name, value.unwrap_or(f64::NAN))).collect())
}
