//! Error tables: what every row of every matrix would lose on each grid that it may get, and the
//! choice of grids under a goal. Tables are computed once, on the original model, and kept in the
//! cache ([`crate::cache`]), so that another goal costs only the choice and the rounding.

use std::collections::BTreeMap;

use anybit_core::{CoreError, GridSpec};
use anybit_io::Checkpoint;
use anybit_runtime::DecoderLayer;
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::layout::MatrixLayout;
use crate::methods::Rounding;
use crate::plan::{EMBEDDING, HEAD};
use crate::rounded::{Clips, SiteWeights};
use crate::sensitivity::{Sensitivity, VocabStatistics};
use crate::site::{Site, SiteError, SiteKind};
use crate::stages::walk_block;
use crate::streams::{Mover, Stream};
use crate::{Event, Plan, PtqError, Result};

/// Errors of one matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorTable {
    /// The grids that a row may get.
    pub options: Vec<GridSpec>,
    /// Error of each row on each of them, `[rows, options]`, in units that the method may compare
    /// across rows, and across matrices if it allocates across them.
    pub errors: Vec<f64>,
}

/// The table of a matrix with a name and a shape.
#[derive(Debug, Clone)]
pub struct MatrixTable {
    /// Its tensor.
    pub tensor: String,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Its errors.
    pub table: ErrorTable,
}

impl MatrixTable {
    /// Error of a choice of options.
    pub fn error_of(&self, choice: &[u8]) -> f64 {
        let width = self.table.options.len();
        let rows = self.table.errors.chunks_exact(width).zip(choice);
        rows.map(|(errors, option)| errors[*option as usize]).sum()
    }

    /// The layout of a choice of options.
    pub fn layout_of(&self, choice: &[u8]) -> MatrixLayout {
        MatrixLayout::by_row(&self.table.options, choice)
    }
}

/// What an allocation has to meet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Bits of codes per weight, on average.
    CodeBits(f64),
    /// Bytes of the matrices with everything that is stored for them, at most.
    Bytes(u64),
}

/// The part of a method that gives every row its grid.
pub trait Allocation: Send + Sync {
    /// Errors of the linears of a site.
    ///
    /// # Errors
    /// The index of the linear that cannot be measured, and the reason.
    fn tabulate(&self, site: &Site<'_>) -> std::result::Result<Vec<ErrorTable>, SiteError>;

    /// The option of every row of every matrix.
    ///
    /// # Errors
    /// [`CoreError::Budget`] when the least that is possible exceeds the goal.
    fn choose(
        &self,
        tables: &[MatrixTable],
        goal: Goal,
    ) -> std::result::Result<Vec<Vec<u8>>, CoreError>;
}

/// The tables of all planned matrices, in the order of the plan, from the inputs that `sequences`
/// give; computed block by block where the
/// cache does not hold them.
///
/// # Errors
/// What reading, measuring and writing report.
pub fn tabulate(
    checkpoint: &Checkpoint,
    plan: &Plan,
    rounding: &dyn Rounding,
    sequences: &[Vec<u32>],
    sensitivity: Option<&Sensitivity>,
    cache: &Cache,
    observe: &mut dyn FnMut(Event),
) -> Result<Vec<MatrixTable>> {
    let Some(allocation) = rounding.allocation() else { return Ok(Vec::new()) };
    let layers = checkpoint.config.num_layers;
    let mut found: BTreeMap<String, ErrorTable> = BTreeMap::new();
    let name = |index: usize| format!("tables-{index:03}.json");
    let mut stream = Stream::default();
    let mut mover: Option<Mover> = None;
    for index in 0..layers {
        observe(Event::Measuring(index, layers));
        if let Some(tables) = cache.read::<BTreeMap<String, ErrorTable>>(&name(index))? {
            found.extend(tables);
            if let Some(mover) = &mut mover {
                mover.advance(&DecoderLayer::load(checkpoint, index)?, &mut stream);
            }
            continue;
        }
        // Only now, since a full cache needs neither.
        if mover.is_none() {
            mover = Some(Mover::new(&checkpoint.config, sequences.first().map_or(1, Vec::len)));
            stream = Stream::embed(sequences, &checkpoint.weight(EMBEDDING)?);
            for layer in 0..index {
                let layer = DecoderLayer::load(checkpoint, layer)?;
                mover.iter_mut().for_each(|m| m.advance(&layer, &mut stream));
            }
        }
        let Some(mover) = &mut mover else { continue };
        let block = sensitivity.map(|s| s.block(index)).transpose()?;
        let tokens = block.as_ref().and_then(|b| b.tokens.as_ref());
        let mut layer = DecoderLayer::load(checkpoint, index)?;
        let mut tables = BTreeMap::new();
        walk_block(
            &mut layer,
            &mut stream,
            mover,
            (rounding.needs(), tokens),
            &mut |layer, kind, statistics| {
                let weights = SiteWeights::read(plan, index, kind, layer, &Clips::new())?;
                if weights.is_empty() {
                    return Ok(());
                }
                let site = weights.site(kind, &statistics, block.as_ref());
                let own = allocation.tabulate(&site).map_err(|e| weights.failed(e))?;
                tables.extend(weights.tensors().map(str::to_owned).zip(own));
                Ok(())
            },
        )?;
        cache.write(&name(index), &tables)?;
        found.extend(tables);
    }
    observe(Event::Measuring(layers, layers));
    if plan.matrix(EMBEDDING).is_some() && rounding.needs().vocabulary {
        found.extend(vocabulary_tables(checkpoint, plan, allocation, sensitivity, cache)?);
    }
    let mut tables = Vec::new();
    for m in &plan.matrices {
        let vocabulary = m.tensor == EMBEDDING || m.tensor == HEAD;
        if vocabulary && !rounding.needs().vocabulary {
            continue;
        }
        let table = found.remove(&m.tensor);
        let whole = |t: &ErrorTable| t.errors.len() == m.rows * t.options.len();
        let table = table.filter(whole).ok_or_else(|| {
            let what = format!("it holds no whole table of {}; delete it", m.tensor);
            anybit_io::IoError::damaged(cache.folder(), what)
        })?;
        tables.push(MatrixTable { tensor: m.tensor.clone(), rows: m.rows, cols: m.cols, table });
    }
    Ok(tables)
}

/// Tables of embedding and head.
fn vocabulary_tables(
    checkpoint: &Checkpoint,
    plan: &Plan,
    allocation: &dyn Allocation,
    sensitivity: Option<&Sensitivity>,
    cache: &Cache,
) -> Result<BTreeMap<String, ErrorTable>> {
    let name = "tables-vocabulary.json";
    if let Some(tables) = cache.read(name)? {
        return Ok(tables);
    }
    let mut tables = BTreeMap::new();
    let Some(vocabulary) = sensitivity.map(Sensitivity::vocabulary).transpose()?.flatten() else {
        return Ok(tables);
    };
    for (tensor, kind) in [(EMBEDDING, SiteKind::Embedding), (HEAD, SiteKind::Head)] {
        let Some(planned) = plan.matrix(tensor) else { continue };
        let tied = checkpoint.config.tie_embeddings;
        let table = with_vocabulary_site(checkpoint, planned, (kind, tied), &vocabulary, |site| {
            allocation.tabulate(site)
        })?;
        tables.extend(table.into_iter().map(|table| (tensor.to_owned(), table)));
    }
    cache.write(name, &tables)?;
    Ok(tables)
}

/// Calls `f` with the embedding or head as a site of its own.
///
/// # Errors
/// What reading and `f` report.
pub fn with_vocabulary_site<T>(
    checkpoint: &Checkpoint,
    planned: &crate::PlannedMatrix,
    (kind, tied): (SiteKind, bool),
    vocabulary: &VocabStatistics,
    f: impl FnOnce(&Site<'_>) -> std::result::Result<T, SiteError>,
) -> Result<T> {
    let weights = anybit_core::Matrix::from_rows(&checkpoint.weight(&planned.tensor)?);
    let (statistics, factors) = vocabulary.of(kind, tied);
    let linear = crate::site::SiteLinear {
        name: crate::sensitivity::VOCABULARY,
        weights: &weights,
        settings: planned.settings,
        layout: &planned.layout,
        fisher: None,
        row_factors: Some(&factors),
    };
    let site = Site { kind, folds: false, linears: vec![linear], statistics: &statistics };
    f(&site).map_err(|(_, source)| PtqError::Tensor { tensor: planned.tensor.clone(), source })
}
