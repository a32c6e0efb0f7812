//! Sites: the places of a block where activations can be transformed and quantized.
//!
//! | site | what flows there | transform | quantizer |
//! |---|---|---|---|
//! | `attn_input` | RMSNorm's output, into q, k, v | online or folded | per token |
//! | `query`, `key` | heads after the rotary embedding | online, `P_q = P_k⁻ᵀ` | key: cache |
//! | `value` | heads of v | folded into v and o | cache |
//! | `attn_output` | attention's output, into o | online | per token |
//! | `mlp_input` | RMSNorm's output, into gate and up | online or folded | per token |
//! | `down_input` | `silu(gate)·up`, into down | online | per token |

use std::fmt::Display;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{ActivationQuantizer, Transform};

/// A place of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// Input of q, k and v.
    AttnInput,
    /// Queries after the rotary embedding, head by head.
    Query,
    /// Keys after the rotary embedding, head by head: what the cache holds.
    Key,
    /// Values, head by head: what the cache holds.
    Value,
    /// Input of o.
    AttnOutput,
    /// Input of gate and up.
    MlpInput,
    /// Input of down.
    DownInput,
}

impl Site {
    /// All sites, in the order of computation.
    pub const ALL: [Self; 7] = [
        Self::AttnInput,
        Self::Query,
        Self::Key,
        Self::Value,
        Self::AttnOutput,
        Self::MlpInput,
        Self::DownInput,
    ];

    /// Those that feed linears.
    pub const INPUTS: [Self; 4] =
        [Self::AttnInput, Self::AttnOutput, Self::MlpInput, Self::DownInput];

    /// Its name in block `layer`.
    pub fn full_name(self, layer: impl Display) -> String {
        format!("model.layers.{layer}.{}", self.name())
    }

    /// Its name in files and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::AttnInput => "attn_input",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::AttnOutput => "attn_output",
            Self::MlpInput => "mlp_input",
            Self::DownInput => "down_input",
        }
    }

    /// The linears that it feeds, below `model.layers.N.`.
    pub fn linears(self) -> &'static [&'static str] {
        match self {
            Self::AttnInput => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            Self::AttnOutput => &["self_attn.o_proj"],
            Self::MlpInput => &["mlp.gate_proj", "mlp.up_proj"],
            Self::DownInput => &["mlp.down_proj"],
            Self::Query | Self::Key | Self::Value => &[],
        }
    }
}

/// What stands at one site.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SiteState {
    /// The online transform.
    pub transform: Option<Arc<Transform>>,
    /// The quantizer, after the transform.
    pub quantizer: Option<ActivationQuantizer>,
}

/// What stands at the sites of one block.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockSites {
    states: [SiteState; 7],
}

impl BlockSites {
    /// What stands at `site`.
    pub fn at(&self, site: Site) -> &SiteState {
        &self.states[site as usize]
    }

    /// The same, to be changed.
    pub fn at_mut(&mut self, site: Site) -> &mut SiteState {
        &mut self.states[site as usize]
    }

    /// The online transform at `site`.
    pub fn transform(&self, site: Site) -> Option<&Transform> {
        self.at(site).transform.as_deref()
    }

    /// The quantizer at `site`.
    pub fn quantizer(&self, site: Site) -> Option<&ActivationQuantizer> {
        self.at(site).quantizer.as_ref()
    }
}
