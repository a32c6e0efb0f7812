//! RMSNorm: `y_i = x_i · w_i / sqrt(mean(x²) + ε)`.

use crate::SpinPool;
use crate::dot::dot;

/// Rows that one task normalizes.
const ROWS: usize = 16;

/// Normalizes each row of `x`, `[rows, weight.len()]`, into `y`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    let normalize = |y: &mut [f32], x: &[f32]| {
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            y.copy_from_slice(x);
            rms_norm_row(y, weight, eps);
        }
    };
    assert_eq!(x.len(), y.len(), "other rows");
    SpinPool::global().chunks(y, ROWS * n, |at, y| normalize(y, &x[at * ROWS * n..][..y.len()]));
}

/// Normalizes one row in place.
pub fn rms_norm_row(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * factor * w;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn equals_the_scalar_twin(rows in 0usize..2 * ROWS + 3, n in 1usize..140, tiny in 0u32..30,
                                  seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let (weight, mut x) = (normals(n), normals(rows * n));
            // Where values are as small as ε, it decides.
            x.iter_mut().for_each(|x| *x *= 0.5f32.powi(tiny as i32));
            let eps = 1e-5f32;
            let mut y = vec![f32::NAN; x.len()];
            rms_norm(&x, &weight, eps, &mut y);
            for (x, y) in x.chunks(n).zip(y.chunks(n)) {
                let mean = x.iter().map(|x| *x as f64 * *x as f64).sum::<f64>() / n as f64;
                let root = (mean + eps as f64).sqrt();
                for ((x, w), y) in x.iter().zip(&weight).zip(y) {
                    let want = *x as f64 * *w as f64 / root;
                    let error = (*y as f64 - want).abs();
                    prop_assert!(error <= 2e-6 * want.abs() + 1e-12, "{y} {want}");
                }
                // In company or alone, in place or not: the same bits.
                let mut alone = x.to_vec();
                rms_norm_row(&mut alone, &weight, eps);
                prop_assert_eq!(&alone[..], y);
            }
        }
    }
}
