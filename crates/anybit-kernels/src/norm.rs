//! RMSNorm: `y_i = x_i · w_i / sqrt(mean(x²) + ε)`.

use rayon::prelude::*;

use crate::linear::dot;

/// Rows that one task normalizes.
const ROWS: usize = 16;

/// Normalizes each row of `x`, `[rows, weight.len()]`, into `y`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let n = weight.len();
    let normalize = |(y, x): (&mut [f32], &[f32])| {
        for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
            y.copy_from_slice(x);
            rms_norm_row(y, weight, eps);
        }
    };
    // Waking threads costs more than few rows.
    if x.len() <= ROWS * n {
        return normalize((y, x));
    }
    y.par_chunks_mut(ROWS * n).zip(x.par_chunks(ROWS * n)).for_each(normalize);
}

/// Normalizes one row in place.
pub fn rms_norm_row(x: &mut [f32], weight: &[f32], eps: f32) {
    let factor = 1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * factor * w;
    }
}
