//! `2^b` levels of unequal spacing with the least mean squared error on N(0, 1): the quantizer of
//! Lloyd (1957, printed 1982) and Max (1960), in units of the row's root mean square.
//!
//! The least error has `l_i = E[ξ | t_{i−1} < ξ < t_i]` with `t_i` halfway between neighbours.
//! Lloyd's iteration alternates the two; at 8 bits it would take some ten thousand rounds. Newton's
//! method on the same equations, whose Jacobian is tridiagonal, takes five to ten from the uniform
//! grid's levels, and finds the same point, which for N(0, 1) is the only one. (The released code
//! of QuEST makes 20 of Lloyd's rounds, which leaves .01047 instead of .00950 at 4 bits.)

use serde::{Deserialize, Serialize};

use super::levels::{LevelGrid, Passing};
use super::uniform::ALPHA;

/// Which entries of an operand on the Gaussian grid pass gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GaussianGradient {
    /// All of them.
    Ste,
    /// Those between the outermost levels.
    Clip,
    /// Those up to half the outermost gap, the widest, beyond the outermost levels.
    #[default]
    Trust,
}

/// Rounds of Newton's method at most, and the largest change after which it ends: far below what an
/// f32 can tell.
const ROUNDS: usize = 40;
const SETTLED: f64 = 1e-10;

/// Density of N(0, 1).
fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// `P(0 < ξ < x)` for `x ≥ 0`: `φ(x) (x + x³/3 + x⁵/15 + …)`, whose terms are all positive.
fn mass(x: f64) -> f64 {
    let (mut term, mut sum, mut odd) = (x, x, 1.0);
    while term > 1e-17 * sum {
        odd += 2.0;
        term *= x * x / odd;
        sum += term;
    }
    density(x) * sum
}

/// The positive levels for `2^bits`, ascending.
fn magnitudes(bits: u8) -> Vec<f64> {
    let n = 1usize << (bits - 1);
    let step = 2.0 * ALPHA[bits as usize - 1] / (2 * n - 1) as f64;
    let mut levels: Vec<f64> = (0..n).map(|i| (i as f64 + 0.5) * step).collect();
    for _ in 0..ROUNDS {
        let change = newton(&levels);
        levels.iter_mut().zip(&change).for_each(|(l, c)| *l += c);
        if change.iter().all(|c| c.abs() < SETTLED) {
            break;
        }
    }
    levels
}

/// The change of every level that solves the linearized `l_i − E[ξ | t_{i−1} < ξ < t_i] = 0`.
fn newton(levels: &[f64]) -> Vec<f64> {
    let n = levels.len();
    // Of the lower end of every interval; the last one is open.
    let ends: Vec<f64> = std::iter::once(0.0)
        .chain(levels.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])))
        .collect();
    let densities: Vec<f64> = ends.iter().map(|t| density(*t)).chain([0.0]).collect();
    let masses: Vec<f64> = ends.iter().map(|t| mass(*t)).chain([0.5]).collect();
    // Elimination from the first row down, then substitution.
    let (mut upper, mut change) = (vec![0.0; n], vec![0.0; n]);
    for (i, level) in levels.iter().enumerate() {
        let inside = masses[i + 1] - masses[i];
        let mean = (densities[i] - densities[i + 1]) / inside;
        // ∂mean/∂l_{i−1} and ∂mean/∂l_{i+1}, each through the end halfway between; zero is fixed.
        let below = if i > 0 { 0.5 * densities[i] * (mean - ends[i]) / inside } else { 0.0 };
        let above = match ends.get(i + 1) {
            Some(end) => 0.5 * densities[i + 1] * (end - mean) / inside,
            None => 0.0,
        };
        let (before, carried) = if i > 0 { (upper[i - 1], change[i - 1]) } else { (0.0, 0.0) };
        let diagonal = 1.0 - below - above + below * before;
        upper[i] = -above / diagonal;
        change[i] = (mean - level + below * carried) / diagonal;
    }
    for i in (0..n - 1).rev() {
        change[i] -= upper[i] * change[i + 1];
    }
    change
}

/// The grid of `2^bits` levels.
pub(super) fn grid(bits: u8, gradient: GaussianGradient) -> LevelGrid {
    let levels = magnitudes(bits);
    let top = levels[levels.len() - 1];
    // At one bit the level below is the negative one.
    let second = if levels.len() > 1 { levels[levels.len() - 2] } else { -top };
    let limit = match gradient {
        GaussianGradient::Ste => f64::INFINITY,
        GaussianGradient::Clip => top,
        GaussianGradient::Trust => top + 0.5 * (top - second),
    };
    LevelGrid::mirrored(&levels, Passing::Within(limit as f32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_the_means_of_their_intervals() {
        // Max's table, and the spread of larger grids.
        let tops = [
            0.797_884_56,
            1.510_417_6,
            2.151_945_7,
            2.732_589_6,
            3.260_732_5,
            3.744_101_3,
            4.189_694_2,
            4.603_535_6,
        ];
        for (bits, top) in (1..=8).zip(tops) {
            let levels = magnitudes(bits);
            assert!(levels[0] > 0.0 && levels.is_sorted());
            approx::assert_relative_eq!(levels[levels.len() - 1], top, max_relative = 1e-7);
            assert!(newton(&levels).iter().all(|c| c.abs() < 1e-8), "{bits} bits");
        }
        for (got, want) in magnitudes(2).iter().zip([0.4528, 1.5104]) {
            approx::assert_relative_eq!(*got, want, max_relative = 1e-4);
        }
    }

    #[test]
    fn mass_of_the_normal_distribution() {
        for (x, want) in [(0.0, 0.0), (1.0, 0.341_344_746_068_542_9), (4.0, 0.499_968_328_758_167)]
        {
            approx::assert_abs_diff_eq!(mass(x), want, epsilon = 1e-14);
        }
    }
}
