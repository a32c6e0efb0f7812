//! Three levels, `−α, 0, α` times the row's root mean square, with the `α` of the least mean
//! squared error on N(0, 1). (QuEST calls it 1.58 bits; its released code has the constant, but a grid of
//! four levels.)
//!
//! Trust is half a step beyond the end, `|a| ≤ 3/2 α`.

use super::levels::{LevelGrid, Passing};

/// `α`, as the released code has it; the least error is at 1.2240064.
pub(super) const ALPHA: f64 = 1.2240089519030855;

/// `reach` of trust: half a step beyond the end of the grid.
pub(super) const TRUST: f64 = 1.5;

/// The grid; gradient passes up to `reach` times its end.
pub(super) fn grid(reach: f64) -> LevelGrid {
    LevelGrid::mirrored(&[0.0, ALPHA], Passing::Within((reach * ALPHA) as f32))
}
