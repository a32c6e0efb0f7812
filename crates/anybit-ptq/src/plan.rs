//! [`Plan`]: what a recipe means for each tensor of a model, to the byte, from headers alone.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::Site;
use anybit_io::native::SiteRecord;
use anybit_io::safetensors_file::{FileDtype, FileLayout, PlannedTensor, layout};
use anybit_io::{Checkpoint, Dtype, ModelConfig};

use crate::activations::site_records;
use crate::methods::{Place, Rounding};
use crate::site::SiteKind;
use crate::{LinearSettings, MatrixLayout, PtqError, Recipe, Result};

/// The embedding's tensor.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The untied head's tensor.
pub const HEAD: &str = "lm_head.weight";

/// A matrix that will be packed.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedMatrix {
    /// Name of its tensor.
    pub tensor: String,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// How it is rounded.
    pub settings: LinearSettings,
    /// How it is stored.
    pub layout: MatrixLayout,
    /// Whether the norm before takes up factors of its columns.
    pub folds: bool,
}

impl PlannedMatrix {
    /// The tensors that will hold it.
    fn parts(&self) -> Vec<PlannedTensor> {
        self.layout.parts(&self.tensor, self.rows, self.cols)
    }
}

/// What will be written, and what stands in the way.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Matrices that will be packed, in the order of the model.
    pub matrices: Vec<PlannedMatrix>,
    /// Tensors that stay as they are, numbers of transforms included.
    pub dense: Vec<PlannedTensor>,
    /// What will stand at the sites, by `model.layers.N.SITE`.
    pub sites: BTreeMap<String, SiteRecord>,
    /// The weight files.
    pub files: Vec<FileLayout>,
    /// Everything that makes the recipe impossible for this model.
    pub problems: Vec<String>,
    /// Estimated peak of resident memory, in bytes.
    pub ram_bytes: u64,
    /// Estimated floating-point operations.
    pub flops: f64,
    /// Whether rows have yet to be allocated: until then layouts are the least that they can be.
    pub provisional: bool,
}

impl Plan {
    /// Plans `recipe` for `checkpoint`; `out` is where the disk space is needed.
    ///
    /// # Errors
    /// What makes planning impossible: an invalid recipe, a packed source, a disk that is too
    /// small. What does not fit the model is listed in [`Plan::problems`].
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe, out: Option<&Path>) -> Result<Self> {
        recipe.validate()?;
        let recipe = &recipe.resolved()?;
        if checkpoint.is_packed() {
            return Err(PtqError::Recipe(format!(
                "{} is packed already; quantize the original model",
                checkpoint.path.display()
            )));
        }
        let config = &checkpoint.config;
        let rounding = recipe.rounding()?;
        let mut problems = Vec::new();
        check_names(recipe, config, &mut problems);
        let sites = site_records(checkpoint, recipe)?;
        let tiers = rounding.needs().tiers;
        let (mut matrices, mut dense): (Vec<PlannedMatrix>, Vec<_>) = (Vec::new(), Vec::new());
        let mut misfits: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shape) in config.tensors() {
            match (settings_of(recipe, &*rounding, &tensor), &shape[..]) {
                (Some(mut settings), &[rows, cols]) => {
                    if tiers {
                        settings.tier = tier_of(recipe, &tensor, &sites, settings.grid.bits());
                    }
                    let shape = (rows, cols);
                    let matrix = place((recipe, &sites), &*rounding, &tensor, shape, settings);
                    let low = cols - settings.tier.map_or(0, |t| t.0);
                    let planes = matrix.layout.planes.iter().map(|(grid, _)| (*grid, low));
                    for (grid, cols) in planes.chain(matrix.layout.high) {
                        if let Err(e) = grid.validate(cols) {
                            misfits.entry(e.to_string()).or_default().push(tensor.clone());
                        }
                    }
                    matrices.push(matrix);
                }
                _ => {
                    let dtype = match checkpoint.tensor(&tensor)?.dtype {
                        Dtype::F16 => FileDtype::F16,
                        Dtype::BF16 => FileDtype::BF16,
                        // Of a transformed model: more digits than the original had.
                        _ if checkpoint.has_sites() && shape.len() == 2 => FileDtype::F16,
                        // Decoded block types need all of f32 to stay exact.
                        _ => FileDtype::F32,
                    };
                    dense.push(PlannedTensor::new(tensor, dtype, shape));
                }
            }
        }
        for (name, record) in &sites {
            dense.extend(record.parts(name));
        }
        for norm in matrices.iter().filter(|m| m.folds).filter_map(|m| norm_of(&m.tensor)) {
            // Factors are exact only with all digits.
            let tensor = dense.iter_mut().find(|t: &&mut PlannedTensor| t.name == norm);
            tensor.into_iter().for_each(|t| t.dtype = FileDtype::F32);
        }
        problems.extend(misfits.into_iter().map(|(what, tensors)| match &tensors[..] {
            [one] => format!("{one}: {what}"),
            [first, rest @ ..] => format!("{first} and {} more: {what}", rest.len()),
            [] => what,
        }));
        let (ram_bytes, flops) = estimate(config, recipe, &*rounding, &matrices);
        // Transforms are fitted first; what they store is known then.
        let untransformed = recipe.transformer()?.is_some() && !checkpoint.has_sites();
        let provisional = rounding.allocation().is_some() || untransformed;
        let files = Vec::new();
        let mut plan =
            Self { matrices, dense, sites, files, problems, ram_bytes, flops, provisional };
        plan.lay_out();
        if let Some(out) = out {
            // Finished blocks wait beside the output until it is assembled.
            anybit_io::atomic::check_space(out, 2 * plan.weight_bytes())?;
        }
        Ok(plan)
    }

    /// Lays out the files again, after layouts of matrices changed.
    pub fn lay_out(&mut self) {
        let mut tensors = self.dense.clone();
        if self.problems.is_empty() {
            tensors.extend(self.matrices.iter().flat_map(PlannedMatrix::parts));
        }
        self.files = layout(tensors);
    }

    /// Exact size of the weight files.
    pub fn weight_bytes(&self) -> u64 {
        self.files.iter().map(FileLayout::file_bytes).sum()
    }

    /// The matrices of one block.
    pub fn block(&self, layer: usize) -> impl Iterator<Item = &PlannedMatrix> {
        let prefix = format!("model.layers.{layer}.");
        self.matrices.iter().filter(move |m| m.tensor.starts_with(&prefix))
    }

    /// The plan of one tensor.
    pub fn matrix(&self, tensor: &str) -> Option<&PlannedMatrix> {
        self.matrices.iter().find(|m| m.tensor == tensor)
    }

    /// Bits per weight of the blocks' linears, packed or not: (codes, everything stored).
    pub fn bits_per_weight(&self) -> (f64, f64) {
        let (mut weights, mut codes, mut total) = (0f64, 0f64, 0f64);
        for m in self.matrices.iter().filter(|m| m.tensor.contains(".layers.")) {
            let n = (m.rows * m.cols) as f64;
            weights += n;
            codes += m.layout.code_bits(m.cols) as f64;
            total += m.parts().iter().map(|p| p.bytes() as f64 * 8.0).sum::<f64>();
        }
        let transforms = self.dense.iter().filter(|t| t.name.contains(".transform."));
        total += transforms.map(|t| t.bytes() as f64 * 8.0).sum::<f64>();
        let kept = |t: &&PlannedTensor| t.name.ends_with("_proj.weight");
        for t in self.dense.iter().filter(kept) {
            weights += t.shape.iter().product::<usize>() as f64;
            codes += t.bytes() as f64 * 8.0;
            total += t.bytes() as f64 * 8.0;
        }
        (codes / weights.max(1.0), total / weights.max(1.0))
    }
}

/// Settings of a tensor that is to be packed.
fn settings_of(recipe: &Recipe, rounding: &dyn Rounding, tensor: &str) -> Option<LinearSettings> {
    let allocated = rounding.needs().vocabulary;
    match tensor {
        EMBEDDING | HEAD if allocated => Some(recipe.settings_at(8)),
        EMBEDDING => recipe.embed_bits.map(|b| recipe.settings_at(b)),
        HEAD => recipe.head_bits.map(|b| recipe.settings_at(b)),
        _ => {
            let linear = tensor.strip_suffix("_proj.weight")?;
            recipe.settings(&format!("{linear}_proj"))
        }
    }
}

/// The last columns of a linear that have a grid of their own, and its bits: the high part of its
/// site's basis, where that has more than the linear's `bits` or inputs are split there: products in
/// integers need both in the same parts.
fn tier_of(
    recipe: &Recipe,
    tensor: &str,
    sites: &BTreeMap<String, SiteRecord>,
    bits: u8,
) -> Option<(usize, u8)> {
    let (layer, linear) = split_linear(tensor)?;
    let site = SiteKind::of(linear)?.site()?;
    let record = sites.get(&site.full_name(layer))?;
    let split = record.quantizer.as_ref().is_some_and(|q| q.segments.len() > 1);
    let wanted = record.high > 0 && (split || recipe.high_bits > bits);
    wanted.then_some((record.high, recipe.high_bits.max(bits)))
}

/// Block index and name of a linear below its block.
fn split_linear(tensor: &str) -> Option<(&str, &str)> {
    tensor.strip_prefix("model.layers.")?.strip_suffix(".weight")?.split_once('.')
}

/// The norm that feeds a linear.
fn norm_of(tensor: &str) -> Option<String> {
    let (layer, linear) = split_linear(tensor)?;
    Some(format!("model.layers.{layer}.{}", SiteKind::of(linear)?.norm()?))
}

/// A matrix where it stands in the model: its norm may take up factors when all that the norm
/// feeds is packed, and nothing stands between.
fn place(
    (recipe, sites): (&Recipe, &BTreeMap<String, SiteRecord>),
    rounding: &dyn Rounding,
    tensor: &str,
    (rows, cols): (usize, usize),
    settings: LinearSettings,
) -> PlannedMatrix {
    let tensor = tensor.to_string();
    let kind = split_linear(&tensor).and_then(|(_, linear)| SiteKind::of(linear));
    let packed = |kind: SiteKind, layer: &str| {
        let full = |linear: &&str| format!("model.layers.{layer}.{linear}");
        kind.linears().iter().all(|linear| recipe.settings(&full(linear)).is_some())
    };
    let free = |kind: SiteKind, layer: &str| {
        let name = kind.site().map(|s| format!("model.layers.{layer}.{}", s.name()));
        let still = |r: &SiteRecord| r.transform.is_none() && r.quantizer.is_none();
        name.is_some_and(|name| sites.get(&name).is_none_or(still))
    };
    let folds = match (kind, split_linear(&tensor)) {
        (Some(kind), Some((layer, _))) => {
            let norm = kind.norm().is_some();
            rounding.folds() && norm && packed(kind, layer) && free(kind, layer)
        }
        _ => false,
    };
    let vocabulary = if tensor == HEAD { SiteKind::Head } else { SiteKind::Embedding };
    let own = rounding.needs().vocabulary;
    let layout = match kind {
        // Embedding and head are rounded to nearest, or by GPTQ and its like on a plain grid.
        None if !own => MatrixLayout::single(settings.grid, rows),
        kind => rounding.layout(Place {
            kind: kind.unwrap_or(vocabulary),
            folds,
            shape: (rows, cols),
            settings: &settings,
        }),
    };
    PlannedMatrix { tensor, rows, cols, settings, layout, folds }
}

/// Patterns that match nothing are mistakes, and so is a head that is not there.
fn check_names(recipe: &Recipe, config: &ModelConfig, problems: &mut Vec<String>) {
    let linears: Vec<String> = (0..config.num_layers)
        .flat_map(|l| config.block_linears().map(|(n, _, _)| format!("model.layers.{l}.{n}")))
        .collect();
    for pattern in recipe.skip.iter().chain(recipe.layers.keys()) {
        if !linears.iter().any(|l| crate::recipe::matches(pattern, l)) {
            let example = &linears[0];
            problems
                .push(format!("pattern {pattern:?} matches no linear (names look like {example})"));
        }
    }
    let site_names: Vec<String> =
        (0..config.num_layers).flat_map(|l| Site::INPUTS.map(|site| site.full_name(l))).collect();
    for pattern in recipe.sites.keys() {
        if !site_names.iter().any(|name| crate::recipe::matches(pattern, name)) {
            let example = &site_names[site_names.len() - 1];
            problems.push(format!(
                "pattern {pattern:?} matches no input of linears (names look like {example})"
            ));
        }
    }
    if recipe.head_bits.is_some() && config.tie_embeddings {
        problems.push("head_bits: the head of this model is its embedding; use embed_bits".into());
    }
}

/// Peak memory and work, from sizes alone; rough on purpose (`docs/decisions.md`).
fn estimate(
    config: &ModelConfig,
    recipe: &Recipe,
    rounding: &dyn Rounding,
    matrices: &[PlannedMatrix],
) -> (u64, f64) {
    let needs = rounding.needs();
    let observes = needs.data();
    let c = &recipe.calibration;
    let tokens = if observes { c.tokens.next_multiple_of(c.seqlen) } else { 0 } as f64;
    let (d, f, q) = (config.hidden_size, config.intermediate_size, config.q_size());
    let widest = d.max(f).max(q) as f64;
    let block: f64 = config.block_linears().iter().map(|(_, o, i)| (o * i) as f64).sum();
    let largest = matrices.iter().map(|m| m.rows.min(1 << 15) * m.cols).max().unwrap_or(0) as f64;
    let streams = tokens * (d + q) as f64 * 4.0;
    let mut statistics = if observes { widest * widest * (4.0 * 4.0 + 3.0 * 8.0) } else { 0.0 };
    if let Some(groups) = needs.guided {
        // Of q, k and v at once; a factor of each beside.
        statistics += groups as f64 * (3.0 * 4.0 * (d * d) as f64 + 8.0 * widest * widest);
    }
    if needs.fisher.is_some() {
        statistics += 4.0 * block;
    }
    if let Some(groups) = needs.vocab_groups.filter(|_| needs.vocabulary) {
        let table = (config.vocab_size * d) as f64;
        statistics += 16.0 * table + groups as f64 * 16.0 * (d * d) as f64;
    }
    let work = (c.seqlen as f64) * (3.0 * f as f64 + 6.0 * d as f64) * 4.0;
    let ram = 60e6 + streams + statistics + block * 6.0 + largest * 12.0 + work;
    let sites: f64 = [d, q, d, f].iter().map(|n| (n * n) as f64).sum();
    let recomputed = 2.0 * (d * f) as f64;
    let rounding: f64 = match observes {
        true => matrices.iter().map(|m| (m.rows * m.cols) as f64 * m.cols as f64 * 2.0).sum(),
        false => matrices.iter().map(|m| (m.rows * m.cols) as f64 * 20.0).sum(),
    };
    let layers = config.num_layers as f64;
    let gradients = match needs.fisher {
        // Up, up again and back, which is twice as much.
        Some(_) => {
            let tokens = c.gradient_tokens.min(c.tokens) as f64;
            let head = (config.vocab_size * d) as f64;
            tokens * (8.0 * layers * block + 4.0 * head)
        }
        None => 0.0,
    };
    let rounding = gradients + rounding;
    (ram as u64, layers * tokens * (2.0 * (block + recomputed) + 1.2 * sites) + rounding)
}
