//! [`Plan`]: what a recipe means for each tensor of a model, to the byte, from headers alone.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_io::native::{PlaneRecord, QuantizedRecord};
use anybit_io::safetensors_file::{FileDtype, FileLayout, PlannedTensor, layout};
use anybit_io::{Checkpoint, Dtype, Format, ModelConfig};

use crate::{LinearSettings, PtqError, Recipe, Result, methods};

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
    /// How.
    pub settings: LinearSettings,
}

impl PlannedMatrix {
    /// The tensors that will hold it.
    fn parts(&self) -> Vec<PlannedTensor> {
        let (rows, cols, grid) = (self.rows, self.cols, self.settings.grid);
        let record = QuantizedRecord {
            rows,
            cols,
            method: String::new(),
            planes: vec![PlaneRecord { rows, cols, grid }],
            column_groups: 1,
            column_scale: false,
            row_perm: false,
            code_bits: 0,
            bytes: 0,
            relative_error: 0.0,
            output_error: None,
            decoded_norm: 0.0,
            blake3: String::new(),
        };
        record.parts(&self.tensor)
    }
}

/// What will be written, and what stands in the way.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Matrices that will be packed, in the order of the model.
    pub matrices: Vec<PlannedMatrix>,
    /// Tensors that stay as they are.
    pub dense: Vec<PlannedTensor>,
    /// The weight files.
    pub files: Vec<FileLayout>,
    /// Everything that makes the recipe impossible for this model.
    pub problems: Vec<String>,
    /// Estimated peak of resident memory, in bytes.
    pub ram_bytes: u64,
    /// Estimated floating-point operations.
    pub flops: f64,
}

impl Plan {
    /// Plans `recipe` for `checkpoint`; `out` is where the disk space is needed.
    ///
    /// # Errors
    /// What makes planning impossible: an invalid recipe, a packed source, a disk that is too
    /// small. What does not fit the model is listed in [`Plan::problems`].
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe, out: Option<&Path>) -> Result<Self> {
        recipe.validate()?;
        if checkpoint.format() == Format::Native {
            return Err(PtqError::Recipe(format!(
                "{} is packed already; quantize the original model",
                checkpoint.path.display()
            )));
        }
        let config = &checkpoint.config;
        let mut problems = Vec::new();
        check_names(recipe, config, &mut problems);
        let (mut matrices, mut dense) = (Vec::new(), Vec::new());
        let mut misfits: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, shape) in config.tensors() {
            match (settings_of(recipe, &tensor), &shape[..]) {
                (Some(settings), &[rows, cols]) => {
                    if let Err(e) = settings.grid.validate(cols) {
                        misfits.entry(e.to_string()).or_default().push(tensor.clone());
                    }
                    matrices.push(PlannedMatrix { tensor, rows, cols, settings });
                }
                _ => {
                    let dtype = match checkpoint.tensor(&tensor)?.dtype {
                        Dtype::F16 => FileDtype::F16,
                        Dtype::BF16 => FileDtype::BF16,
                        // Decoded block types need all of f32 to stay exact.
                        _ => FileDtype::F32,
                    };
                    dense.push(PlannedTensor::new(tensor, dtype, shape));
                }
            }
        }
        problems.extend(misfits.into_iter().map(|(what, tensors)| match &tensors[..] {
            [one] => format!("{one}: {what}"),
            [first, rest @ ..] => format!("{first} and {} more: {what}", rest.len()),
            [] => what,
        }));
        let mut tensors = dense.clone();
        if problems.is_empty() {
            tensors.extend(matrices.iter().flat_map(PlannedMatrix::parts));
        }
        let files = layout(tensors);
        let (ram_bytes, flops) = estimate(config, recipe, &matrices);
        let plan = Self { matrices, dense, files, problems, ram_bytes, flops };
        if let Some(out) = out {
            // Finished blocks wait beside the output until it is assembled.
            anybit_io::atomic::check_space(out, 2 * plan.weight_bytes())?;
        }
        Ok(plan)
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
            codes += n * m.settings.grid.bits() as f64;
            total += m.parts().iter().map(|p| p.bytes() as f64 * 8.0).sum::<f64>();
        }
        let kept = |t: &&PlannedTensor| t.name.contains(".layers.") && t.shape.len() == 2;
        for t in self.dense.iter().filter(kept) {
            weights += t.shape.iter().product::<usize>() as f64;
            codes += t.bytes() as f64 * 8.0;
            total += t.bytes() as f64 * 8.0;
        }
        (codes / weights.max(1.0), total / weights.max(1.0))
    }
}

fn settings_of(recipe: &Recipe, tensor: &str) -> Option<LinearSettings> {
    match tensor {
        EMBEDDING => recipe.embed_bits.map(|b| recipe.settings_at(b)),
        HEAD => recipe.head_bits.map(|b| recipe.settings_at(b)),
        _ => {
            let linear = tensor.strip_suffix("_proj.weight")?;
            recipe.settings(&format!("{linear}_proj"))
        }
    }
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
    if recipe.head_bits.is_some() && config.tie_embeddings {
        problems.push("head_bits: the head of this model is its embedding; use embed_bits".into());
    }
}

/// Peak memory and work, from sizes alone; rough on purpose (`docs/decisions.md`).
fn estimate(config: &ModelConfig, recipe: &Recipe, matrices: &[PlannedMatrix]) -> (u64, f64) {
    let observes = methods::find(&recipe.method).is_some_and(|m| m.needs_gram());
    let c = &recipe.calibration;
    let tokens = if observes { c.tokens.next_multiple_of(c.seqlen) } else { 0 } as f64;
    let (d, f, q) = (config.hidden_size, config.intermediate_size, config.q_size());
    let widest = d.max(f).max(q) as f64;
    let block: f64 = config.block_linears().iter().map(|(_, o, i)| (o * i) as f64).sum();
    let largest = matrices.iter().map(|m| m.rows.min(1 << 15) * m.cols).max().unwrap_or(0) as f64;
    let streams = tokens * (d + q) as f64 * 4.0;
    let statistics = if observes { widest * widest * (4.0 * 4.0 + 3.0 * 8.0) } else { 0.0 };
    let work = (c.seqlen as f64) * (3.0 * f as f64 + 6.0 * d as f64) * 4.0;
    let ram = 60e6 + streams + statistics + block * 6.0 + largest * 12.0 + work;
    let sites: f64 = [d, q, d, f].iter().map(|n| (n * n) as f64).sum();
    let recomputed = 2.0 * (d * f) as f64;
    let rounding: f64 = match observes {
        true => matrices.iter().map(|m| (m.rows * m.cols) as f64 * m.cols as f64 * 2.0).sum(),
        false => matrices.iter().map(|m| (m.rows * m.cols) as f64 * 20.0).sum(),
    };
    let layers = config.num_layers as f64;
    (ram as u64, layers * tokens * (2.0 * (block + recomputed) + 1.2 * sites) + rounding)
}
