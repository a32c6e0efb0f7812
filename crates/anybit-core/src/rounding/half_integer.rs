//! Weights on the grid that they were trained on ([`crate::half_integer`]): the codes and the steps
//! of the training graph, to the bit.

use rayon::prelude::*;

use crate::{GridSpec, GroupGrid, HalfIntegerGrid, Matrix, Plane, Result, RowScale};

/// Rounds `weights`, already in the basis of the rounding, to half-integer grids of exact scales:
/// one per row, or per group of `group_size` columns.
///
/// # Errors
/// Bits or a group size that no grid has, a weight that is not finite.
pub fn half_integer(
    weights: &Matrix,
    bits: u8,
    group_size: Option<usize>,
    scale: RowScale,
) -> Result<Plane> {
    weights.check_finite("weight")?;
    let spec = GridSpec::HalfInteger { bits, group_size, exact: true };
    let mut plane = Plane::empty(spec, weights.rows, weights.cols)?;
    let grid = HalfIntegerGrid::new(bits, scale);
    let (zero, max_code) = (spec.implied_zero(), ((1u32 << bits) - 1) as f32);
    let (half, group_len) = ((1u32 << (bits - 1)) as f32, spec.group_len(weights.cols));
    plane.rows_mut().enumerate().for_each(|(row, mut out)| {
        let mut codes = Vec::with_capacity(weights.cols);
        let mut groups = Vec::new();
        for w in weights.row(row).chunks(group_len) {
            let step = grid.step(grid.end(w));
            codes.extend(w.iter().map(|w| (grid.code(*w, step) + half) as u8));
            groups.push(GroupGrid { scale: step, zero, max_code });
        }
        out.set_affine(&codes, &groups);
    });
    Ok(plane)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedMatrix, RowSource, rng::SplitMix64};
    use proptest::prelude::*;

    proptest! {
        /// What is decoded is what training computes with, to the bit.
        #[test]
        fn decoded_rows_are_the_trained_values(
            bits in 1u8..=8, rows in 1usize..5, cols in 1usize..70, grouped in any::<bool>(),
            largest in any::<bool>(), seed in any::<u64>()
        ) {
            let mut rng = SplitMix64::new(seed);
            let data = (0..rows * cols).map(|_| 0.02 * rng.normal() as f32).collect();
            let w = Matrix::from_vec(rows, cols, data).unwrap();
            let group = (grouped && cols >= 8).then_some(8 * (cols / 8).min(2));
            let scale = if largest { RowScale::Largest } else { RowScale::Rms };
            let plane = half_integer(&w, bits, group, scale).unwrap();
            let q = QuantizedMatrix::single(plane);
            let decoded = q.dequantize();
            let grid = HalfIntegerGrid::new(bits, scale);
            for r in 0..rows {
                let groups = w.row(r).chunks(group.unwrap_or(cols));
                let want: Vec<f32> = groups
                    .flat_map(|w| {
                        let step = grid.step(grid.end(w));
                        w.iter().map(move |w| grid.value(*w, step))
                    })
                    .collect();
                prop_assert_eq!(decoded.row(r), &want[..]);
            }
            let (codes, all) = q.bytes();
            prop_assert_eq!(all - codes, 4 * rows * cols.div_ceil(group.unwrap_or(cols)));
            prop_assert_eq!(q.stored_bytes(), all);
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let w = Matrix::zeros(2, 16);
        for bits in [0, 9] {
            assert!(half_integer(&w, bits, None, RowScale::Rms).is_err());
        }
        assert!(half_integer(&w, 4, Some(12), RowScale::Rms).is_err());
        let nan = Matrix::from_vec(1, 2, vec![1.0, f32::NAN]).unwrap();
        assert!(half_integer(&nan, 4, None, RowScale::Rms).is_err());
        // Rows of zeros have a step, the smallest.
        let plane = half_integer(&w, 1, None, RowScale::Rms).unwrap();
        assert!(plane.exact_scales.iter().all(|s| *s == 2e-8));
    }
}
