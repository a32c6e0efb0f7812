//! Lloyd's iterations from k-means++ seeds, as SqueezeLLM runs them: here only to be compared with
//! [`super::Exact1d`], which is never worse and often much better. Alternately
//!
//! ```text
//! l_j = argmin_q |w_j − c_q|        c_q = Σ_{j in q} G_j w_j / Σ_{j in q} G_j
//! ```
//!
//! until centroids move by less than `tolerance` times the variance of the values (the rule of
//! scikit-learn). Seeds are drawn with probability `∝ G_j · (distance to the nearest seed)²`.

use super::{Solution, check, effective, middles, nearest};
use crate::Result;
use crate::rng::SplitMix64;

/// Settings of [`lloyd`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LloydOptions {
    /// Most iterations.
    pub iterations: usize,
    /// Stop when the squared shift of all centroids is at most this times the variance.
    pub tolerance: f64,
    /// Seed of k-means++.
    pub seed: u64,
}

impl Default for LloydOptions {
    fn default() -> Self {
        Self { iterations: 50, tolerance: 1e-4, seed: 0 }
    }
}

/// Where the iterations stopped.
#[derive(Debug, Clone, PartialEq)]
pub struct LloydResult {
    /// Codebook and labels.
    pub solution: Solution,
    /// `Σ w (x − c)²`.
    pub cost: f64,
}

/// Clusters `values` into `k` from k-means++ seeds.
///
/// # Errors
/// As [`super::Exact1d::new`].
pub fn lloyd(
    values: &[f32],
    weights: &[f32],
    k: usize,
    options: LloydOptions,
) -> Result<LloydResult> {
    let (values, weights) = prepare(values, weights, k)?;
    let seeds = plus_plus(&values, &weights, k, &mut SplitMix64::new(options.seed));
    Ok(iterate(&values, &weights, seeds, options))
}

/// Clusters `values` from the given centroids.
///
/// # Errors
/// As [`super::Exact1d::new`]; also centroids that are not finite.
pub fn lloyd_from(
    values: &[f32],
    weights: &[f32],
    initial: &[f64],
    options: LloydOptions,
) -> Result<LloydResult> {
    let (values, weights) = prepare(values, weights, initial.len())?;
    let ones = vec![1.0; initial.len()];
    check(initial, &ones, initial.len())?;
    Ok(iterate(&values, &weights, initial.to_vec(), options))
}

fn prepare(values: &[f32], weights: &[f32], k: usize) -> Result<(Vec<f64>, Vec<f64>)> {
    let values: Vec<f64> = values.iter().map(|v| *v as f64).collect();
    let weights: Vec<f64> = weights.iter().map(|w| *w as f64).collect();
    check(&values, &weights, k)?;
    let weights = effective(&weights);
    Ok((values, weights))
}

/// k-means++ (Arthur, Vassilvitskii 2007) with weights.
fn plus_plus(values: &[f64], weights: &[f64], k: usize, rng: &mut SplitMix64) -> Vec<f64> {
    let mut seeds = Vec::with_capacity(k);
    let mut chance = weights.to_vec();
    let mut square = vec![f64::INFINITY; values.len()];
    while seeds.len() < k {
        let seed = values[draw(&chance, rng)];
        seeds.push(seed);
        for (j, x) in values.iter().enumerate() {
            square[j] = square[j].min((x - seed) * (x - seed));
            chance[j] = weights[j] * square[j];
        }
    }
    seeds
}

/// An index with probability proportional to its chance; the first when all chances are zero.
fn draw(chances: &[f64], rng: &mut SplitMix64) -> usize {
    let mut left = rng.uniform() * chances.iter().sum::<f64>();
    let mut last = 0;
    for (j, chance) in chances.iter().enumerate().filter(|(_, chance)| **chance > 0.0) {
        last = j;
        left -= chance;
        if left < 0.0 {
            break;
        }
    }
    last
}

fn iterate(
    values: &[f64],
    weights: &[f64],
    mut centroids: Vec<f64>,
    options: LloydOptions,
) -> LloydResult {
    centroids.sort_by(f64::total_cmp);
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count;
    for _ in 0..options.iterations {
        if step(values, weights, &mut centroids) <= options.tolerance * variance {
            break;
        }
    }
    let middles = middles(&centroids);
    let labels: Vec<u8> = values.iter().map(|x| nearest(&middles, *x) as u8).collect();
    let mut cost = 0.0;
    for ((x, w), label) in values.iter().zip(weights).zip(&labels) {
        let distance = x - centroids[*label as usize];
        cost += w * distance * distance;
    }
    let centroids = centroids.into_iter().map(|c| c as f32).collect();
    LloydResult { solution: Solution { centroids, labels }, cost }
}

/// Assigns and averages once; returns the squared shift. A cluster without weight stays.
fn step(values: &[f64], weights: &[f64], centroids: &mut [f64]) -> f64 {
    let middles = middles(centroids);
    let mut sums = vec![(0f64, 0f64); centroids.len()];
    for (x, w) in values.iter().zip(weights) {
        let (mass, moment) = &mut sums[nearest(&middles, *x)];
        *mass += w;
        *moment += w * x;
    }
    let mut shift = 0.0;
    for (c, (mass, moment)) in centroids.iter_mut().zip(sums) {
        if mass > 0.0 {
            let mean = moment / mass;
            shift += (mean - *c) * (mean - *c);
            *c = mean;
        }
    }
    shift
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separated_groups_are_found_and_seeds_repeat() {
        let x = [0.0f32, 0.1, 5.0, 5.1, 9.0, 9.2];
        let options = LloydOptions { seed: 3, ..Default::default() };
        let result = lloyd(&x, &[1.0; 6], 3, options).unwrap();
        assert_eq!(result.solution.labels, [0, 0, 1, 1, 2, 2]);
        assert_eq!(result, lloyd(&x, &[1.0; 6], 3, options).unwrap());
        assert!(lloyd(&x, &[1.0; 6], 0, options).is_err());
        assert!(lloyd_from(&x, &[1.0; 6], &[f64::NAN], options).is_err());
    }

    #[test]
    fn fewer_values_than_clusters() {
        let result = lloyd(&[1.0, 1.0, 2.0], &[1.0; 3], 8, LloydOptions::default()).unwrap();
        assert_eq!(result.cost, 0.0);
        assert_eq!(result.solution.centroids.len(), 8);
    }
}
