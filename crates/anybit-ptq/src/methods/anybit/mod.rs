//! Past SKIM: one budget over the whole model, in the units of the loss. With `H_k` the guided
//! Gram matrix of a row group (GuidedQuant, arXiv 2505.07004: inputs weighted by the squared
//! gradients of the outputs), for labels drawn from the model itself:
//!
//! ```text
//! KL(original ‖ quantized) ≈ Σ over linears, row groups k, rows i of  r_i H_k r_iᵀ        nats per token
//! 1  E_io   that error of row i on grid o after GPTQ's error feedback, for every grid o
//! 2  o_i    minimise Σ E  within the budget: the convex hulls of all rows of all matrices
//! 3         feedback again on the inputs of the quantized model, then LNQ: codes and scales (or
//!           codebooks) in turn, each step lowering r H_k rᵀ
//! ```
//!
//! Grids are codebooks of 1 to 8 bits that all rows of a matrix share, with a scale per group of
//! columns, and codebooks of a row's own where a row is wide enough to pay for them. Under a goal
//! in bytes, embedding and head are rows like all others; their errors count what each token's row
//! does to logits and, as a lookup, to the loss.

mod fit;

use anybit_core::allocate::{Curve, hull};
use anybit_core::bitstream::words_per_row;
use anybit_core::{CoreError, GridSpec};
use anybit_grad::Labels;
use serde::{Deserialize, Serialize};

use super::{Citation, Method, Place, Rounding, options_table, read_options};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Inputs, Needs, Site, SiteError, SiteKind, SiteRounding};
use crate::tables::{Allocation, ErrorTable, Goal, MatrixTable};

/// SKIM's any-bit rows with guided error feedback and one budget for the model.
pub struct Anybit;

/// Which labels sensitivities are taken for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LabelSource {
    /// Drawn from the model: errors are KL divergences.
    #[default]
    Model,
    /// Those of the text.
    Text,
}

/// Its options; each part can be switched off to see what it is worth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Fewest bits of a row.
    pub bmin: u8,
    /// Most bits of a row.
    pub bmax: u8,
    /// Most bits of a codebook of a row's own; 0 for shared codebooks only.
    pub row_codebooks: u8,
    /// Row groups of a linear that have a Gram matrix of their own; 0 for the plain one, whose
    /// errors of different matrices cannot be compared.
    pub guided_groups: usize,
    /// Row groups of embedding and head.
    pub vocab_groups: usize,
    /// Labels of the sensitivities.
    pub labels: LabelSource,
    /// One budget for all matrices; otherwise each has the average.
    pub whole_model: bool,
    /// Observe the inputs of the model quantized so far; otherwise the original's.
    pub sequential: bool,
    /// Rounds of LNQ after error feedback.
    pub rounds: usize,
    /// Damping of error feedback.
    pub damp: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bmin: 1,
            bmax: 8,
            row_codebooks: 4,
            guided_groups: 1,
            vocab_groups: 16,
            labels: LabelSource::Model,
            whole_model: true,
            sequential: true,
            rounds: 2,
            damp: 0.01,
        }
    }
}

impl Method for Anybit {
    fn name(&self) -> &'static str {
        "anybit"
    }

    fn summary(&self) -> &'static str {
        "one budget for every row of the model, error feedback in units of the loss, any size"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "Its parts: any-bit rows from SKIM (R. Bai, B. Liu, Q. Liu, ICML 2025, PMLR \
                        267:2520-2534); guided Gram matrices and LNQ from GuidedQuant (J. Kim et \
                        al., ICML 2025, arXiv 2505.07004); error feedback from GPTQ (E. Frantar \
                        et al., ICLR 2023)",
            link: "https://proceedings.mlr.press/v267/bai25c.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        let options: Options = read_options(recipe)?;
        let Options { bmin, bmax, row_codebooks, guided_groups, vocab_groups, damp, .. } = options;
        if bmin < 1 || bmax > 8 || bmin > bmax || row_codebooks > 8 {
            return Err(format!(
                "bmin {bmin}, bmax {bmax}, row_codebooks {row_codebooks}: 1 ≤ bmin ≤ bmax ≤ 8, \
                 row_codebooks at most 8"
            ));
        }
        if guided_groups > 64 || !(1..=256).contains(&vocab_groups) {
            return Err("guided_groups is 0 to 64, vocab_groups 1 to 256".into());
        }
        if !(damp > 0.0 && damp.is_finite()) {
            return Err(format!("damp is {damp}: it must be above 0"));
        }
        let group_size = usize::try_from(recipe.group()).ok();
        let vocabulary = recipe.max_bytes.is_some();
        if guided_groups == 0 && (options.whole_model || vocabulary) {
            return Err("guided_groups = 0 leaves errors without a common unit: it needs \
                        whole_model = false and no max_bytes"
                .into());
        }
        Ok(Box::new(WholeModel { options, group_size, seed: recipe.seed, vocabulary }))
    }
}

struct WholeModel {
    options: Options,
    group_size: Option<usize>,
    seed: u64,
    /// Whether embedding and head are part of the budget.
    vocabulary: bool,
}

impl WholeModel {
    /// The grids that a row of `cols` weights may get.
    fn grids(&self, cols: usize) -> Vec<GridSpec> {
        let Options { bmin, bmax, row_codebooks, .. } = self.options;
        let group_size = self.group_size.filter(|g| *g < cols);
        let shared = (bmin..=bmax).map(|bits| GridSpec::SharedCodebook { bits, group_size });
        let own = (bmin..=bmax.min(row_codebooks)).map(|bits| GridSpec::Codebook { bits });
        shared.chain(own).collect()
    }
}

impl Rounding for WholeModel {
    fn needs(&self) -> Needs {
        let Options { guided_groups, vocab_groups, labels, sequential, .. } = self.options;
        let labels = match labels {
            LabelSource::Model => Labels::Model { seed: self.seed },
            LabelSource::Text => Labels::Text,
        };
        let guided = (guided_groups > 0).then_some(guided_groups);
        Needs {
            gram: guided.is_none(),
            fisher: (guided.is_some() || self.vocabulary).then_some(labels),
            guided,
            // Observed always, so that goals in bits and in bytes share one run of gradients.
            vocab_groups: Some(vocab_groups),
            vocabulary: self.vocabulary,
            inputs: if sequential { Inputs::Quantized } else { Inputs::Original },
            ..Default::default()
        }
    }

    fn options(&self) -> toml::Table {
        options_table(&self.options)
    }

    fn folds(&self) -> bool {
        false
    }

    fn layout(&self, place: Place<'_>) -> MatrixLayout {
        MatrixLayout::single(self.grids(place.shape.1)[0], place.shape.0)
    }

    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError> {
        let mut matrices = Vec::new();
        for (i, linear) in site.linears.iter().enumerate() {
            let fit = fit::Fit::new(linear, self.grams(site, i)?, self.options, self.group_size);
            let matrix = fit.and_then(|fit| fit.round(linear.layout));
            matrices.push(matrix.map_err(|e| (i, e))?);
        }
        Ok(SiteRounding::plain(matrices))
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        Some(self)
    }
}

impl WholeModel {
    /// The Gram matrices that linear `index` of a site is rounded under.
    fn grams<'a>(
        &self,
        site: &'a Site<'_>,
        index: usize,
    ) -> Result<&'a [anybit_core::Gram], SiteError> {
        let block = !matches!(site.kind, SiteKind::Embedding | SiteKind::Head);
        match block && self.options.guided_groups == 0 {
            true => Ok(std::slice::from_ref(site.gram()?)),
            false => site.guided(index),
        }
    }
}

impl Allocation for WholeModel {
    fn tabulate(&self, site: &Site<'_>) -> Result<Vec<ErrorTable>, SiteError> {
        let mut tables = Vec::new();
        for (i, linear) in site.linears.iter().enumerate() {
            let fit = fit::Fit::new(linear, self.grams(site, i)?, self.options, self.group_size)
                .map_err(|e| (i, e))?;
            let options = self.grids(linear.weights.cols);
            let errors = fit.errors(&options, linear.row_factors).map_err(|e| (i, e))?;
            tables.push(ErrorTable { options, errors });
        }
        Ok(tables)
    }

    fn choose(&self, tables: &[MatrixTable], goal: Goal) -> Result<Vec<Vec<u8>>, CoreError> {
        if self.options.whole_model {
            return choose_together(tables, goal);
        }
        let weights: usize = tables.iter().map(|t| t.rows * t.cols).sum();
        let mut choices = Vec::new();
        for table in tables {
            let share = (table.rows * table.cols) as f64 / weights as f64;
            let goal = match goal {
                Goal::Bytes(bytes) => Goal::Bytes((bytes as f64 * share) as u64),
                bits => bits,
            };
            choices.extend(choose_together(std::slice::from_ref(table), goal)?);
        }
        Ok(choices)
    }
}

/// Step 2. What planes cost beyond their rows (tables, the numbers of row groups) is only known
/// once grids are chosen: the budget shrinks by the excess until everything fits.
fn choose_together(tables: &[MatrixTable], goal: Goal) -> Result<Vec<Vec<u8>>, CoreError> {
    let bytes = match goal {
        Goal::CodeBits(bits) => {
            let weights: usize = tables.iter().map(|t| t.rows * t.cols).sum();
            let cost = |grid: &GridSpec, cols: usize| (cols * grid.bits() as usize) as u64;
            return choose_within(tables, (weights as f64 * bits + 1e-6) as u64, cost);
        }
        Goal::Bytes(bytes) => bytes,
    };
    let mut budget = bytes * 8;
    for _ in 0..32 {
        let choices = choose_within(tables, budget, stored_bits)?;
        let layout = |(t, c): (&MatrixTable, &Vec<u8>)| t.layout_of(c).bytes(t.rows, t.cols);
        let size: u64 = tables.iter().zip(&choices).map(layout).sum();
        if size <= bytes {
            return Ok(choices);
        }
        budget = budget.saturating_sub((size - bytes) * 8);
    }
    Err(CoreError::Budget { given: bytes * 8, minimum: bytes * 8 + 1 })
}

/// Bits that one row of a grid takes.
fn stored_bits(grid: &GridSpec, cols: usize) -> u64 {
    let lengths = anybit_core::Plane::lengths(*grid, 1, cols);
    (words_per_row(cols, grid.bits()) * 32 + lengths.scales * 16) as u64
}

fn choose_within(
    tables: &[MatrixTable],
    budget: u64,
    cost: impl Fn(&GridSpec, usize) -> u64,
) -> Result<Vec<Vec<u8>>, CoreError> {
    let costs: Vec<Vec<u64>> = tables
        .iter()
        .map(|t| t.table.options.iter().map(|grid| cost(grid, t.cols)).collect())
        .collect();
    let mut curves = Vec::new();
    for (table, costs) in tables.iter().zip(&costs) {
        let rows = table.table.errors.chunks_exact(costs.len());
        curves.extend(rows.map(|errors| Curve { costs, errors }));
    }
    let chosen = hull(&curves, budget)?;
    let mut rest = chosen.into_iter().map(|option| option as u8);
    Ok(tables.iter().map(|t| rest.by_ref().take(t.rows).collect()).collect())
}
