//! What a method sees: the linears that share one input, and what was observed of that input.

use std::collections::BTreeMap;

use anybit_core::{CoreError, Gram, Matrix, QuantizedMatrix};
use anybit_grad::Labels;

use crate::LinearSettings;
use crate::layout::MatrixLayout;

/// Where activations flow into linears.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SiteKind {
    /// Input of q, k and v.
    AttnInput,
    /// Input of o.
    AttnOutput,
    /// Input of gate and up.
    MlpInput,
    /// Input of down.
    DownInput,
    /// The embedding, and the head where it is the same matrix: its inputs are the final hidden
    /// states.
    Embedding,
    /// Final hidden states, into an untied head.
    Head,
}

impl SiteKind {
    /// The sites of a block, in the order of computation.
    pub const BLOCK: [Self; 4] =
        [Self::AttnInput, Self::AttnOutput, Self::MlpInput, Self::DownInput];

    /// Names of the linears below `model.layers.N.`.
    pub fn linears(self) -> &'static [&'static str] {
        match self {
            Self::AttnInput => &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            Self::AttnOutput => &["self_attn.o_proj"],
            Self::MlpInput => &["mlp.gate_proj", "mlp.up_proj"],
            Self::DownInput => &["mlp.down_proj"],
            Self::Embedding | Self::Head => &[],
        }
    }

    /// The site before these linears, where activations are transformed and quantized.
    pub fn site(self) -> Option<anybit_core::Site> {
        use anybit_core::Site;
        match self {
            Self::AttnInput => Some(Site::AttnInput),
            Self::AttnOutput => Some(Site::AttnOutput),
            Self::MlpInput => Some(Site::MlpInput),
            Self::DownInput => Some(Site::DownInput),
            Self::Embedding | Self::Head => None,
        }
    }

    /// The norm whose output this is, below `model.layers.N.`: factors of its channels can be
    /// folded into its weight.
    pub fn norm(self) -> Option<&'static str> {
        match self {
            Self::AttnInput => Some("input_layernorm.weight"),
            Self::MlpInput => Some("post_attention_layernorm.weight"),
            _ => None,
        }
    }

    /// The site of a linear, by its name below `model.layers.N.`.
    pub fn of(linear: &str) -> Option<Self> {
        Self::BLOCK.into_iter().find(|site| site.linears().contains(&linear))
    }
}

/// Whose hidden states are observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Inputs {
    /// Those of the model quantized so far.
    #[default]
    Quantized,
    /// Those of the original model.
    Original,
}

/// What a method needs to be observed.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Needs {
    /// The Gram matrix of the inputs.
    pub gram: bool,
    /// Mean magnitudes of input channels.
    pub magnitudes: bool,
    /// Fisher diagonals of the weights, for these labels.
    pub fisher: Option<Labels>,
    /// Token-weighted Gram matrices of this many row groups; needs labels.
    pub guided: Option<usize>,
    /// Row groups of the embedding's and head's Gram matrices; needs labels.
    pub vocab_groups: Option<usize>,
    /// Whether the method rounds embedding and head too, with these.
    pub vocabulary: bool,
    /// Whose hidden states.
    pub inputs: Inputs,
    /// Whether it rounds column tiers with bits of their own.
    pub tiers: bool,
}

impl Needs {
    /// Whether calibration text is needed at all.
    pub fn data(&self) -> bool {
        self.looks() || self.fisher.is_some()
    }

    /// Whether inputs are observed.
    pub fn looks(&self) -> bool {
        self.gram || self.magnitudes || self.guided.is_some()
    }
}

/// What was observed of a site's input.
#[derive(Debug, Clone, Default)]
pub struct Statistics {
    /// `H = XᵀX` over all calibration tokens.
    pub gram: Option<Gram>,
    /// Mean of `|x_j|` of each channel.
    pub magnitudes: Option<Vec<f32>>,
    /// `H_k` of each linear's row groups, by name; per gradient sequence.
    pub guided: BTreeMap<String, Vec<Gram>>,
}

/// A linear to be rounded.
pub struct SiteLinear<'a> {
    /// Its name below `model.layers.N.`.
    pub name: &'a str,
    /// Its weight, `[out, in]`.
    pub weights: &'a Matrix,
    /// Its settings.
    pub settings: LinearSettings,
    /// How it will be stored.
    pub layout: &'a MatrixLayout,
    /// Fisher diagonal, of the weight's shape, when asked for.
    pub fisher: Option<&'a Matrix>,
    /// Factor of each row's error beyond what the statistics of its group say; none for one.
    pub row_factors: Option<&'a [f32]>,
}

/// The linears of one site.
pub struct Site<'a> {
    /// Which site.
    pub kind: SiteKind,
    /// Whether factors of channels may be folded into the norm before: all its consumers are here.
    pub folds: bool,
    /// The linears that are to be rounded.
    pub linears: Vec<SiteLinear<'a>>,
    /// What was observed.
    pub statistics: &'a Statistics,
}

impl Site<'_> {
    /// The Gram matrix.
    ///
    /// # Errors
    /// It was not observed.
    pub fn gram(&self) -> Result<&Gram, SiteError> {
        self.statistics.gram.as_ref().ok_or_else(|| missing(0, "Gram matrix of the inputs"))
    }

    /// Token-weighted Gram matrices of linear `index`.
    ///
    /// # Errors
    /// They were not observed.
    pub fn guided(&self, index: usize) -> Result<&[Gram], SiteError> {
        let grams = self.statistics.guided.get(self.linears[index].name);
        Ok(grams.ok_or_else(|| missing(index, "token-weighted Gram matrices"))?)
    }

    /// Fisher diagonal of linear `index`.
    ///
    /// # Errors
    /// It was not observed.
    pub fn fisher(&self, index: usize) -> Result<&Matrix, SiteError> {
        self.linears[index].fisher.ok_or_else(|| missing(index, "Fisher diagonal"))
    }
}

fn missing(index: usize, what: &'static str) -> SiteError {
    (index, CoreError::Shape { what, expected: "one".into(), found: "none".into() })
}

/// Index of the linear that cannot be rounded, and the reason.
pub type SiteError = (usize, CoreError);

/// What rounding a site gave.
pub struct SiteRounding {
    /// One matrix per linear, in order.
    pub matrices: Vec<QuantizedMatrix>,
    /// Factors of the input channels that the norm before takes up: the weights are
    /// `decoded · diag(fold)`.
    pub fold: Option<Vec<f32>>,
}

impl SiteRounding {
    /// Every linear of `site` by itself.
    ///
    /// # Errors
    /// The index of the linear that `round` fails on, and the reason.
    pub fn each(
        site: &Site<'_>,
        round: impl Fn(&SiteLinear<'_>) -> Result<QuantizedMatrix, CoreError>,
    ) -> Result<Self, SiteError> {
        let linears = site.linears.iter().enumerate();
        let matrices = linears.map(|(i, linear)| round(linear).map_err(|e| (i, e)));
        Ok(Self::plain(matrices.collect::<Result<_, _>>()?))
    }

    /// Matrices alone.
    pub fn plain(matrices: Vec<QuantizedMatrix>) -> Self {
        Self { matrices, fold: None }
    }
}
