//! Round to nearest (RTN): every weight goes to the nearest value of its group's grid.

use rayon::prelude::*;

use super::fit_row;
use crate::error::check_len;
use crate::{GridSpec, Matrix, Plane, Result, ScaleFit};

/// Rounds `weights` to the affine grid `spec`.
///
/// # Errors
/// An invalid grid, a weight that is not finite, or a scale that an f16 cannot hold.
pub fn nearest(weights: &Matrix, spec: GridSpec, fit: ScaleFit) -> Result<Plane> {
    let mut planes = nearest_tiers(weights, &[(spec, weights.cols)], fit)?;
    Ok(planes.remove(0))
}

/// [`nearest`] with a grid for each tier of columns, which tile a row: one plane per tier.
///
/// # Errors
/// As [`nearest`], or tiers that do not tile a row.
pub fn nearest_tiers(
    weights: &Matrix,
    tiers: &[(GridSpec, usize)],
    fit: ScaleFit,
) -> Result<Vec<Plane>> {
    weights.check_finite("weight")?;
    check_len("columns of all tiers", weights.cols, tiers.iter().map(|t| t.1).sum())?;
    let mut planes = Vec::new();
    let mut start = 0;
    for &(spec, cols) in tiers {
        let mut plane = Plane::empty(spec, weights.rows, cols)?;
        let group_len = spec.group_len(cols);
        plane.rows_mut().enumerate().try_for_each(|(row, mut out)| {
            let w = &weights.row(row)[start..start + cols];
            let groups = fit_row(spec, w, fit, row)?;
            let codes: Vec<u8> =
                w.iter().enumerate().map(|(j, &w)| groups[j / group_len].encode(w)).collect();
            out.set_affine(&codes, &groups);
            Ok(())
        })?;
        planes.push(plane);
        start += cols;
    }
    Ok(planes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedMatrix, RowSource, rng::SplitMix64};
    use proptest::prelude::*;

    fn random(rows: usize, cols: usize, seed: u64) -> Matrix {
        let mut rng = SplitMix64::new(seed);
        let data = (0..rows * cols).map(|_| rng.normal() as f32).collect();
        Matrix::from_vec(rows, cols, data).unwrap()
    }

    proptest! {
        /// Each weight moves by at most half a step (plus the clamp of the negative extreme), and
        /// decoding a row alone equals decoding the whole.
        #[test]
        fn error_is_bounded_and_rows_agree(
            bits in 1u8..=8, sym in any::<bool>(), cols in 1usize..70, rows in 1usize..5,
            grouped in any::<bool>(), seed in any::<u64>()
        ) {
            let w = random(rows, cols, seed);
            let group = (grouped && cols >= 8).then_some(8 * (cols / 8).min(2));
            let spec = GridSpec::affine(bits, sym, group);
            let q = QuantizedMatrix::single(nearest(&w, spec, ScaleFit::MinMax).unwrap());
            let all = q.dequantize();
            let mut row = vec![0.0; cols];
            for r in 0..rows {
                q.read_rows(r..r + 1, &mut row);
                prop_assert_eq!(&row[..], all.row(r));
                let range = w.row(r).iter().fold(0f32, |m, v| m.max(v.abs()));
                let step = 2.0 * range / ((1u32 << bits) - 1) as f32;
                if bits > 1 {
                    for (a, b) in w.row(r).iter().zip(&row) {
                        prop_assert!((a - b).abs() <= step * 1.01 + 1e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn nan_is_an_error() {
        let mut w = random(2, 8, 1);
        w.data[11] = f32::NAN;
        let e = nearest(&w, GridSpec::affine(4, true, None), ScaleFit::MinMax).unwrap_err();
        assert!(matches!(e, crate::CoreError::NotFinite { row: 1, col: 3, .. }));
    }
}
