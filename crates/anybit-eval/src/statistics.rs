//! Means with their uncertainty, medians and percentiles.

/// Mean and standard error of independent samples.
pub fn mean_and_error(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n.max(1.0);
    if values.len() < 2 {
        return (mean, None);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, Some((variance / n).sqrt()))
}

/// A 95% interval from the standard error of chunk means; `None` with fewer than two chunks.
pub fn interval_95(chunk_means: &[f64]) -> Option<[f64; 2]> {
    let (mean, error) = mean_and_error(chunk_means);
    error.map(|e| [mean - 1.96 * e, mean + 1.96 * e])
}

/// The value below which a share `q` of `values` lies, linearly between neighbours. Reorders
/// `values`; NaN when there are none.
pub fn quantile(values: &mut [f32], q: f64) -> f64 {
    if values.is_empty() {
        return f64::NAN;
    }
    values.sort_unstable_by(f32::total_cmp);
    let at = q * (values.len() - 1) as f64;
    let (low, high) = (values[at.floor() as usize] as f64, values[at.ceil() as usize] as f64);
    low + (high - low) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let (mean, error) = mean_and_error(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(mean, 2.5);
        approx::assert_relative_eq!(error.unwrap(), (5.0f64 / 3.0 / 4.0).sqrt());
        assert_eq!(mean_and_error(&[3.0]), (3.0, None));
        assert_eq!(quantile(&mut [3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&mut [4.0, 1.0], 0.25), 1.75);
        assert!(quantile(&mut [], 0.5).is_nan());
        let [low, high] = interval_95(&[1.0, 1.0, 1.0]).unwrap();
        assert_eq!((low, high), (1.0, 1.0));
    }
}
