//! [`TrainRecipe`]: what `anybit train` reads.
//!
//! ```toml
//! out = "runs/quest"
//! seed = 0
//! [model]
//! preset = "1m"
//! [data]
//! train = ["emma.txt"]
//! context = 128
//! tokenizer = { vocab_size = 1024 }
//! [quantizer]
//! weights = { type = "quest", bits = 4 }
//! activations = { type = "quest", bits = 4 }
//! [train]
//! steps = 400
//! batch = 16
//! lr = 3e-3
//! ```
//!
//! What is left out is as QuEST's recipe has it (section 3 of its specification): AdamW with
//! β = (0.9, 0.95) and decay 0.1 on the linears of the blocks, gradients clipped to norm 1, learning
//! rate from `lr/100` to `lr` in the first tenth and along a cosine down to `lr/10`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::TrainError;
use crate::distill::DistillRecipe;
use crate::{AdamWOptions, EstimatorSpec, OneCycle};

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainRecipe {
    /// Folder of the run: checkpoints, logs, report, model.
    pub out: PathBuf,
    /// Seed of the initial weights and of the order of sequences.
    #[serde(default)]
    pub seed: u64,
    /// What is trained.
    pub model: ModelRecipe,
    /// On what.
    pub data: DataRecipe,
    /// What the operands of the blocks' linears are rounded to.
    #[serde(default)]
    pub quantizer: QuantizerRecipe,
    /// How.
    pub train: TrainSettings,
    /// Teachers; none for training on the texts alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillRecipe>,
}

/// The model: one of `preset`, `config` and `init`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecipe {
    /// A shape by name, with random weights; see [`super::model::PRESETS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<String>,
    /// A `config.json`, with random weights; its vocabulary gives way to the tokenizer's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<PathBuf>,
    /// A checkpoint whose weights are trained further, packed ones decoded first unless their codes
    /// are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Whether the head of a preset is its embedding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tie_embeddings: Option<bool>,
}

/// The texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataRecipe {
    /// Files to train on: plain text, JSON lines, or parquet.
    pub train: Vec<PathBuf>,
    /// Files to validate on; without any, some of the training sequences are held out, evenly.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub validation: Vec<PathBuf>,
    /// Share of the training sequences that is held out when there are no validation files.
    #[serde(default = "hold_out")]
    pub validation_share: f64,
    /// Field of JSON lines, column of parquet.
    #[serde(default = "text_key")]
    pub text_key: String,
    /// Tokens of a sequence.
    pub context: usize,
    /// The tokenizer; by default that of `model.init`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<TokenizerRecipe>,
}

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenizerRecipe {
    /// A checkpoint, its folder, or a `tokenizer.json`.
    Path(PathBuf),
    /// A byte-level BPE trained on the training texts.
    Bpe(BpeRecipe),
}

/// A tokenizer to be trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BpeRecipe {
    /// Tokens, the 256 bytes and two special ones included.
    pub vocab_size: usize,
    /// Times that a pair must occur to be merged.
    #[serde(default = "twice")]
    pub min_frequency: u64,
}

/// Estimators of the operands of every linear in a block; embedding, head and norms stay as they
/// are.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizerRecipe {
    /// Of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<EstimatorSpec>,
    /// Of the inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<EstimatorSpec>,
}

/// Number format of the operands of linears that are not quantized; parameters, gradients and
/// moments are f32 in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16, as mixed-precision training on other hardware has them.
    Bf16,
}

/// Optimization.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSettings {
    /// Optimizer steps; this or `tokens`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Tokens to train on, rounded up to whole steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    /// Sequences of a step, over all ranks.
    pub batch: usize,
    /// Sequences that a rank holds at a time; gradients accumulate over a step's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micro_batch: Option<usize>,
    /// Largest learning rate.
    pub lr: f64,
    /// Share of the steps in which it rises.
    #[serde(default = "tenth")]
    pub warmup: f64,
    /// The first learning rate, as a share of the largest.
    #[serde(default = "hundredth")]
    pub lr_first: f64,
    /// The last.
    #[serde(default = "tenth")]
    pub lr_last: f64,
    /// Decay of the linears of the blocks and of learned steps.
    #[serde(default = "tenth")]
    pub weight_decay: f64,
    /// Decay rates of the means of gradients and of their squares.
    #[serde(default = "betas")]
    pub betas: (f64, f64),
    /// Largest norm of a step's gradients.
    #[serde(default = "one")]
    pub clip: f64,
    /// Number format of what is not quantized.
    #[serde(default)]
    pub precision: Precision,
    /// Steps between two validations; by default a twentieth of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validate_every: Option<u64>,
    /// Sequences of a validation between steps; the last one takes all there are.
    #[serde(default = "validation_sequences")]
    pub validation_sequences: usize,
    /// Steps between two checkpoints; by default a tenth of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every: Option<u64>,
    /// Checkpoints that are kept, beside the one with the least validation loss.
    #[serde(default = "two")]
    pub keep: usize,
}

fn hold_out() -> f64 {
    0.05
}

fn text_key() -> String {
    "text".into()
}

fn twice() -> u64 {
    2
}

fn two() -> usize {
    2
}

fn one() -> f64 {
    1.0
}

fn tenth() -> f64 {
    0.1
}

fn hundredth() -> f64 {
    0.01
}

fn betas() -> (f64, f64) {
    (0.9, 0.95)
}

fn validation_sequences() -> usize {
    64
}

impl TrainSettings {
    /// Settings of `steps` steps of `batch` sequences; all else by default.
    pub fn new(steps: u64, batch: usize, lr: f64) -> Self {
        Self {
            steps: Some(steps),
            tokens: None,
            batch,
            micro_batch: None,
            lr,
            warmup: tenth(),
            lr_first: hundredth(),
            lr_last: tenth(),
            weight_decay: tenth(),
            betas: betas(),
            clip: one(),
            precision: Precision::F32,
            validate_every: None,
            validation_sequences: validation_sequences(),
            checkpoint_every: None,
            keep: two(),
        }
    }

    /// Optimizer steps of sequences of `context` tokens.
    pub fn total_steps(&self, context: usize) -> u64 {
        let of_tokens = || self.tokens.map(|t| t.div_ceil((self.batch * context).max(1) as u64));
        self.steps.or_else(of_tokens).unwrap_or(0)
    }

    /// The learning rate over `steps`.
    pub fn schedule(&self, steps: u64) -> OneCycle {
        let (div, final_div) = (1.0 / self.lr_first, self.lr_first / self.lr_last);
        OneCycle { max: self.lr, steps: steps as usize, warmup: self.warmup, div, final_div }
    }

    /// The optimizer.
    pub fn adamw(&self) -> AdamWOptions {
        let (beta1, beta2) = self.betas;
        AdamWOptions { beta1, beta2, eps: 1e-8, weight_decay: self.weight_decay }
    }

    fn check(&self) -> Result<(), TrainError> {
        let fail = |key, what: &str| Err(TrainError::recipe(key, what));
        match (self.steps, self.tokens) {
            (Some(0), _) | (_, Some(0)) => return fail("train.steps", "at least 1 is needed"),
            (None, None) => return fail("train.steps", "give steps or tokens"),
            (Some(_), Some(_)) => return fail("train.steps", "give steps or tokens, not both"),
            _ => {}
        }
        if self.batch == 0 || self.micro_batch == Some(0) {
            return fail("train.batch", "at least 1 sequence is needed");
        }
        let positive = [
            ("train.lr", self.lr),
            ("train.lr_first", self.lr_first),
            ("train.lr_last", self.lr_last),
            ("train.clip", self.clip),
        ];
        for (key, value) in positive {
            if !(value > 0.0 && value.is_finite()) {
                return Err(TrainError::recipe(key, format!("{value} is not above zero")));
            }
        }
        for (key, share) in [
            ("train.warmup", self.warmup),
            ("train.betas", self.betas.0),
            ("train.betas", self.betas.1),
            ("train.weight_decay", self.weight_decay),
        ] {
            if !(0.0..1.0).contains(&share) {
                return Err(TrainError::recipe(key, format!("{share} is not in [0, 1)")));
            }
        }
        if self.validate_every == Some(0) || self.checkpoint_every == Some(0) {
            return fail("train.validate_every", "at least every step");
        }
        if self.validation_sequences == 0 || self.keep == 0 {
            return fail("train.keep", "at least 1 is needed");
        }
        Ok(())
    }
}

impl QuantizerRecipe {
    /// Whether nothing is quantized.
    pub fn is_none(&self) -> bool {
        self.weights.is_none() && self.activations.is_none()
    }

    /// Whether the codes of a packed checkpoint stay.
    pub fn keeps_codes(&self) -> bool {
        matches!(self.weights, Some(EstimatorSpec::Kept { .. }))
    }

    /// Checks the estimators, and that both operands of a product stand in the same basis.
    fn check(&self) -> Result<(), TrainError> {
        if self.keeps_codes() {
            return match self.activations {
                None => Ok(()),
                Some(_) => {
                    let what = "kept weights multiply inputs as they are: leave it out";
                    Err(TrainError::recipe("quantizer.activations", what))
                }
            };
        }
        let both =
            [("quantizer.weights", &self.weights), ("quantizer.activations", &self.activations)];
        for (place, spec) in both {
            if let Some(Err(source)) = spec.as_ref().map(EstimatorSpec::build) {
                return Err(TrainError::Estimator { place: place.into(), source });
            }
        }
        let basis = |spec: &Option<EstimatorSpec>| spec.as_ref().map_or(0, EstimatorSpec::basis);
        let (weights, activations) = (basis(&self.weights), basis(&self.activations));
        if weights != activations {
            let what = format!(
                "weights are returned in a basis of Hadamard blocks of {weights} columns, \
                 activations of {activations} (0: their own): their product would be another \
                 function. Give both the same hadamard, or form = \"full\" to the one that is \
                 alone"
            );
            return Err(TrainError::recipe("quantizer", what));
        }
        Ok(())
    }
}

impl TrainRecipe {
    /// Checks everything that needs no file.
    ///
    /// # Errors
    /// What is out of range or contradicts itself, by its key.
    pub fn check(&self) -> Result<(), TrainError> {
        let fail = |key, what: &str| Err(TrainError::recipe(key, what));
        let ModelRecipe { preset, config, init, tie_embeddings } = &self.model;
        let sources = [preset.is_some(), config.is_some(), init.is_some()];
        if sources.iter().filter(|s| **s).count() != 1 {
            return fail("model", "give exactly one of preset, config and init");
        }
        if tie_embeddings.is_some() && preset.is_none() {
            return fail("model.tie_embeddings", "belongs to a preset; a config says it itself");
        }
        if self.data.train.is_empty() {
            return fail("data.train", "give at least one file");
        }
        if self.data.context < 2 {
            return fail("data.context", "at least 2 tokens are needed");
        }
        if !(0.0..1.0).contains(&self.data.validation_share) {
            return fail("data.validation_share", "must be in [0, 1)");
        }
        if self.data.tokenizer.is_none() && init.is_none() {
            let what = "give the path of one, or { vocab_size = N } to train one";
            return fail("data.tokenizer", what);
        }
        if self.out.file_name().is_none() {
            return fail("out", "not a name for a folder");
        }
        let teachers = self.distill.iter().flat_map(|distill| &distill.teachers);
        if let Some(path) = init.iter().chain(teachers).find(|path| path.starts_with(&self.out)) {
            // A run that begins anew would remove what it begins from.
            let what = format!("holds {}, which is read: choose another", path.display());
            return Err(TrainError::recipe("out", what));
        }
        self.quantizer.check()?;
        if self.quantizer.keeps_codes() && init.is_none() {
            let what = "kept codes are those of a packed checkpoint: name it in model.init";
            return fail("quantizer.weights", what);
        }
        if self.quantizer.keeps_codes() && self.train.precision != Precision::F32 {
            let what = "kept codes are multiplied as the file holds them: leave it at f32";
            return fail("train.precision", what);
        }
        self.distill.as_ref().map_or(Ok(()), DistillRecipe::check)?;
        self.train.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Form;

    fn recipe() -> TrainRecipe {
        TrainRecipe {
            out: "out".into(),
            seed: 0,
            model: ModelRecipe { preset: Some("tiny".into()), ..Default::default() },
            data: DataRecipe {
                train: vec!["a.txt".into()],
                validation: Vec::new(),
                validation_share: hold_out(),
                text_key: text_key(),
                context: 32,
                tokenizer: Some(TokenizerRecipe::Path("t".into())),
            },
            quantizer: QuantizerRecipe::default(),
            train: TrainSettings::new(10, 4, 1e-3),
            distill: None,
        }
    }

    fn quest(form: Form) -> Option<EstimatorSpec> {
        Some(EstimatorSpec::Quest { bits: 4, hadamard: 128, form, clip_scale: None })
    }

    #[test]
    fn operands_in_different_bases_are_refused() {
        let mut recipe = recipe();
        recipe.check().unwrap();
        recipe.quantizer.weights = quest(Form::Half);
        let error = recipe.check().unwrap_err().to_string();
        assert!(error.contains("form = \"full\""), "{error}");
        recipe.quantizer.weights = quest(Form::Full);
        recipe.check().unwrap();
        recipe.quantizer.activations = quest(Form::Full);
        recipe.check().unwrap();
        let both = QuantizerRecipe { weights: quest(Form::Half), activations: quest(Form::Half) };
        recipe.quantizer = both;
        recipe.check().unwrap();
    }

    #[test]
    fn what_is_out_of_range_is_named_by_its_key() {
        type Break = fn(&mut TrainRecipe);
        let breaks: [(&str, Break); 12] = [
            ("train.steps", |r| r.train.steps = None),
            ("train.steps", |r| r.train.tokens = Some(5)),
            ("train.batch", |r| r.train.batch = 0),
            ("train.lr", |r| r.train.lr = f64::NAN),
            ("train.warmup", |r| r.train.warmup = 1.0),
            ("model", |r| r.model.config = Some("c".into())),
            ("out", |r| {
                r.model = ModelRecipe { init: Some("out/model".into()), ..Default::default() };
            }),
            ("data.train", |r| r.data.train.clear()),
            ("data.tokenizer", |r| r.data.tokenizer = None),
            ("quantizer.weights", |r| {
                r.quantizer.weights = Some(EstimatorSpec::Pact { bits: 9 });
            }),
            ("quantizer.weights: kept", |r| {
                r.quantizer.weights = Some(EstimatorSpec::Kept { column_scale: false });
            }),
            ("quantizer.activations", |r| {
                r.quantizer.weights = Some(EstimatorSpec::Kept { column_scale: false });
                r.quantizer.activations = Some(EstimatorSpec::Pact { bits: 4 });
            }),
        ];
        for (key, change) in breaks {
            let mut recipe = recipe();
            change(&mut recipe);
            let error = recipe.check().unwrap_err().to_string();
            assert!(error.starts_with(key), "{key}: {error}");
        }
    }

    #[test]
    fn the_learning_rate_is_quests() {
        let settings = TrainSettings::new(1000, 1, 2.0);
        let schedule = settings.schedule(1000);
        approx::assert_relative_eq!(schedule.lr(0), 0.02, max_relative = 1e-9);
        approx::assert_relative_eq!(schedule.lr(99), 2.0, max_relative = 1e-9);
        approx::assert_relative_eq!(schedule.lr(999), 0.2, max_relative = 1e-9);
        let tokens = TrainSettings { steps: None, tokens: Some(1000), ..settings };
        assert_eq!(tokens.total_steps(300), 4);
    }
}
