//! From a recipe's goal to the layout of every matrix: bits of codes, bits in all, or the bytes of
//! the files.

use anybit_core::CoreError;

use crate::methods::Rounding;
use crate::recipe::Count;
use crate::tables::{Allocation, Goal, MatrixTable};
use crate::{MatrixLayout, Plan, PtqError, Recipe, Result};

/// Attempts at a size of files whose headers depend on the choice.
const ATTEMPTS: u64 = 16;

/// Chooses a grid for every row of `plan` under the goal of `recipe`; returns the error that the
/// tables predict.
///
/// # Errors
/// [`PtqError::Goal`] when even the least exceeds it.
pub fn allocate(
    plan: &mut Plan,
    recipe: &Recipe,
    rounding: &dyn Rounding,
    tables: &[MatrixTable],
) -> Result<f64> {
    let Some(allocation) = rounding.allocation() else { return Ok(0.0) };
    let error = match recipe.max_bytes {
        None => {
            let goal = match goal_of(recipe, tables) {
                Goal::Bytes(bytes) => Goal::Bytes(bytes.saturating_sub(fixed_bytes(plan, tables))),
                codes => codes,
            };
            let choices = allocation.choose(tables, goal).map_err(|e| too_small(e, recipe))?;
            apply(plan, tables, &choices)
        }
        Some(most) => within(plan, recipe, allocation, tables, most)?,
    };
    plan.provisional = false;
    Ok(error)
}

/// The goal that `bits` and `count` name, for these matrices.
pub fn goal_of(recipe: &Recipe, tables: &[MatrixTable]) -> Goal {
    let weights: usize = tables.iter().map(|t| t.rows * t.cols).sum();
    match recipe.count {
        Count::Codes => Goal::CodeBits(recipe.bits),
        Count::Total => Goal::Bytes((weights as f64 * recipe.bits / 8.0 + 1e-6) as u64),
    }
}

/// Files of at most `most` bytes: what headers and other tensors take is known after a choice, and
/// the matrices get the rest.
fn within(
    plan: &mut Plan,
    recipe: &Recipe,
    allocation: &dyn Allocation,
    tables: &[MatrixTable],
    most: u64,
) -> Result<f64> {
    let matrix_bytes = |plan: &Plan| -> u64 {
        let own =
            |t: &MatrixTable| plan.matrix(&t.tensor).map_or(0, |m| m.layout.bytes(m.rows, m.cols));
        tables.iter().map(own).sum()
    };
    let rest_of = |plan: &Plan| plan.weight_bytes() - matrix_bytes(plan);
    let mut other = rest_of(plan) + fixed_bytes(plan, tables);
    for attempt in 1..=ATTEMPTS {
        let Some(rest) = most.checked_sub(other) else { break };
        let choices = allocation.choose(tables, Goal::Bytes(rest)).map_err(|e| match e {
            CoreError::Budget { minimum, .. } => PtqError::Goal(format!(
                "{most} bytes are too few: what is not allocated (norms, headers, tensors that \
                 stay as they are) takes {other}, the matrices at least {}; allow more, or fewer \
                 bits (--set bmin, --embed-bits)",
                minimum.div_ceil(8),
            )),
            other => too_small(other, recipe),
        })?;
        let error = apply(plan, tables, &choices);
        if plan.weight_bytes() <= most {
            return Ok(error);
        }
        // Headers grow by a few bytes with every grid more; never go back.
        other = other.max(rest_of(plan) + fixed_bytes(plan, tables)) + 64 * attempt;
    }
    Err(PtqError::Goal(format!(
        "{most} bytes are too few: what is not allocated (norms, headers, unquantized tensors) takes \
         {other}"
    )))
}

/// Bytes of what a layout keeps beside the grids: column scales, single weights.
fn fixed_bytes(plan: &Plan, tables: &[MatrixTable]) -> u64 {
    let own = |t: &MatrixTable| {
        let Some(m) = plan.matrix(&t.tensor) else { return 0 };
        let bare = MatrixLayout { column_scale: false, sparse: None, ..m.layout.clone() };
        m.layout.bytes(m.rows, m.cols) - bare.bytes(m.rows, m.cols)
    };
    tables.iter().map(own).sum()
}

fn apply(plan: &mut Plan, tables: &[MatrixTable], choices: &[Vec<u8>]) -> f64 {
    let mut error = 0.0;
    for (table, choice) in tables.iter().zip(choices) {
        error += table.error_of(choice);
        if let Some(planned) = plan.matrices.iter_mut().find(|m| m.tensor == table.tensor) {
            let MatrixLayout { column_scale, sparse, .. } = planned.layout;
            planned.layout = MatrixLayout { column_scale, sparse, ..table.layout_of(choice) };
        }
    }
    plan.lay_out();
    error
}

fn too_small(error: CoreError, recipe: &Recipe) -> PtqError {
    match error {
        CoreError::Budget { minimum, given } => PtqError::Goal(format!(
            "{} bits per weight are too few for {}: its least takes {:.3} times as much; ask for \
             more bits, or allow fewer with --set bmin",
            recipe.bits,
            recipe.method,
            minimum as f64 / (given as f64).max(1.0)
        )),
        other => PtqError::Goal(format!("{}: {other}", recipe.method)),
    }
}
