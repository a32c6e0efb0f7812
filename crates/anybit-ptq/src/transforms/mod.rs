//! Transforms of a whole model, one file or folder each: they write a *transformed model*, the same
//! function in another basis, block by block into the cache. It is a checkpoint like any other, in
//! f32 and without any rounding, so every method rounds it and every command reads it.
//!
//! | transform | residual stream | values → o | keys, queries | input of down |
//! |---|---|---|---|---|
//! | `scale` | – | factors, folded | – | factors, folded |
//! | `quarot` | random Hadamard, folded | Hadamard | Hadamard, online | Hadamard, online |
//! | `spinquant` | learned rotation, folded | learned, folded | Hadamard, online | Hadamard, online |
//! | `resq` | PCA, low and high parts, folded | PCA | PCA, online | Hadamard, online |
//! | `flatquant` | – (Kronecker at each input, online) | learned | learned, online | Kronecker, online |
//!
//! Adding one touches its file and one line of [`ALL`].

pub mod flatquant;
mod fuse;
pub mod quarot;
pub mod resq;
pub mod scale;
pub mod spinquant;
mod writer;

use std::path::Path;

use anybit_core::ScaleFit;
use anybit_io::Checkpoint;

pub use writer::{FittedSite, TransformWriter, TransformedBlock, Vocabulary, read_clips};

use crate::cache::Cache;
use crate::journal::{hash_source, hash_tokens};
use crate::methods::Citation;
use crate::{Calibration, Event, PtqError, Recipe, Result};

/// An entry of the registry.
pub trait TransformMethod: Send + Sync {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// One line for `--help` and reports.
    fn summary(&self) -> &'static str;

    /// Its paper.
    fn citation(&self) -> Option<Citation>;

    /// The transform with a recipe's settings and its table `transform_options`.
    ///
    /// # Errors
    /// A setting or an option that it does not know or cannot use, with what it may be.
    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Transformer>, String>;
}

/// How activations and weights are put on grids where the recipe does not say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActivationDefaults {
    /// Symmetric grids at the inputs of linears.
    pub symmetric: bool,
    /// Clip factor there.
    pub clip: f32,
    /// Clip factor of keys and values.
    pub kv_clip: f32,
    /// How the scales of weights are fitted.
    pub scale: ScaleFit,
}

impl Default for ActivationDefaults {
    fn default() -> Self {
        Self { symmetric: true, clip: 1.0, kv_clip: 1.0, scale: ScaleFit::MinMax }
    }
}

/// A transform with its settings.
pub trait Transformer: Send + Sync {
    /// Its options with every default filled in.
    fn options(&self) -> toml::Table;

    /// How activations are put on grids behind it.
    fn activations(&self) -> ActivationDefaults;

    /// Whether it is fitted to calibration text.
    fn needs_data(&self) -> bool;

    /// What of the recipe it is fitted to, beyond its options and the seed: a fit serves all
    /// recipes that agree in this.
    fn fitted_to(&self, recipe: &Recipe) -> String;

    /// Fits it and hands over the transformed blocks in order, from [`TransformWriter::finished`]
    /// on, and then embedding and head.
    ///
    /// # Errors
    /// What reading, fitting and writing report.
    fn fit(&self, model: &Model<'_>, out: &mut TransformWriter<'_>) -> Result<()>;
}

/// What is transformed.
pub struct Model<'a> {
    /// The original.
    pub checkpoint: &'a Checkpoint,
    /// The resolved recipe.
    pub recipe: &'a Recipe,
    /// Token sequences to fit to.
    pub sequences: &'a [Vec<u32>],
    /// Where intermediate results may be kept.
    pub cache: &'a Cache,
}

/// Every transform there is.
pub const ALL: [&dyn TransformMethod; 5] =
    [&scale::Scale, &quarot::QuaRot, &spinquant::SpinQuant, &resq::ResQ, &flatquant::FlatQuant];

/// The name that stands for no transform.
pub const NONE: &str = "none";

/// The transform of a name.
pub fn find(name: &str) -> Option<&'static dyn TransformMethod> {
    ALL.into_iter().find(|t| t.name() == name)
}

/// The names of all transforms.
pub fn names() -> Vec<&'static str> {
    ALL.iter().map(|t| t.name()).collect()
}

/// A transformed model in the cache.
pub struct Transformed {
    /// The model.
    pub checkpoint: Checkpoint,
    /// Keeps its folder to this process.
    _cache: Cache,
}

/// Transforms `checkpoint` as `recipe` says, or opens what the cache below `root` holds; none when
/// the recipe names no transform.
///
/// # Errors
/// What fitting, reading and writing report.
pub fn prepare(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    calibration: &Calibration,
    root: &Path,
    observe: &mut dyn FnMut(Event),
) -> Result<Option<Transformed>> {
    let recipe = recipe.resolved()?;
    let Some(transformer) = recipe.transformer()? else { return Ok(None) };
    if checkpoint.has_sites() || checkpoint.is_packed() {
        return Err(PtqError::Recipe(format!(
            "{} is transformed or packed already; give the original model",
            checkpoint.path.display()
        )));
    }
    checkpoint.check_finite()?;
    let sequences: &[Vec<u32>] = match transformer.needs_data() {
        true => &calibration.sequences,
        false => &[],
    };
    let (source, tokens) = (hash_source(checkpoint)?, hash_tokens(&[sequences]));
    let (options, seed) = (transformer.options().to_string(), recipe.seed.to_string());
    let fitted_to = transformer.fitted_to(&recipe);
    let parts = [&source, &recipe.transform, &options, &tokens, &seed, &fitted_to];
    let cache = Cache::open(root, "transformed", &parts.map(String::as_str))?;
    if !cache.path(writer::DONE).exists() {
        let mut writer = TransformWriter::open(checkpoint, &recipe, &cache, observe)?;
        let model = Model { checkpoint, recipe: &recipe, sequences, cache: &cache };
        transformer.fit(&model, &mut writer)?;
        writer.finish()?;
    }
    Ok(Some(Transformed { checkpoint: Checkpoint::open(cache.folder())?, _cache: cache }))
}
