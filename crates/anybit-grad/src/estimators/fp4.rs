//! The levels of E2M1, `0, ½, 1, 3/2, 2, 3, 4, 6` and their negatives, times 0.48707976, which has
//! the least mean squared error on N(0, 1), and times the row's root mean square. (QuEST's FP4
//! variant.)
//!
//! Trust allows errors of at most `T`, half the widest gap between levels: `T = 0.48707976`, which
//! on the grid every error satisfies, so that it is `|a| ≤ 3.40956 RMS`. The released code has
//! `T = 0.318577` by mistake, from the Gaussian grid it derives from, and so masks
//! `2.2669 < |a| < 2.6039` too; published numbers are made with that.

use serde::{Deserialize, Serialize};

use super::levels::{LevelGrid, Passing};

/// Which entries of an FP4 operand pass gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fp4Trust {
    /// Errors up to half the widest gap, as the paper has it.
    #[default]
    HalfGap,
    /// Errors up to 0.318577 of the root mean square, as the released code has it.
    Released,
}

/// What E2M1 is multiplied by.
const SCALE: f64 = 0.48707976;
/// Positive values of E2M1.
const MAGNITUDES: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// Half the widest gap between them.
const HALF_GAP: f64 = 1.0;
/// `T` of the released code.
const RELEASED: f64 = 0.318577;

/// The grid.
pub(super) fn grid(trust: Fp4Trust) -> LevelGrid {
    let passing = match trust {
        Fp4Trust::HalfGap => Passing::Within((SCALE * (MAGNITUDES[7] + HALF_GAP)) as f32),
        Fp4Trust::Released => Passing::Error(RELEASED as f32),
    };
    LevelGrid::mirrored(&MAGNITUDES.map(|m| SCALE * m), passing)
}
