//! Exact weighted 1-D k-means for every number of clusters up to `kmax` (SKIM, section 1.4, with
//! the program of Grønlund et al., arXiv 1701.07204, in place of Lloyd's iterations).
//!
//! Over sorted distinct values, with `cost(a, b)` the weighted scatter of values `a..b`,
//!
//! ```text
//! D_1[b] = cost(0, b)        D_k[b] = min_a D_{k−1}[a] + cost(a, b)
//! ```
//!
//! Since `cost` is Monge, the least `a` that attains the minimum falls neither as `b` grows nor as
//! `k` does (Yao 1980), so a layer is filled by halving strides in `O(n log n)`: each `b` searches
//! only between the cuts of its two neighbours of twice the stride, and from the cut that the
//! layer before made at `b`. Cuts of all layers are kept for back-tracking.

use super::segments::{Plain, Precise, Segments};
use super::{check, effective, middles, nearest};
use crate::Result;

/// Where the last layer's cost, as a fraction of the cost of one cluster, is so small that f64
/// prefix sums could choose a cut that is worse by a relative 1e-8, cuts are found again with
/// compensated sums.
const WELL_CONDITIONED: f64 = 1.0 / (1 << 20) as f64;

/// Optimal clusterings of one row into any number of clusters up to `kmax`.
#[derive(Debug, Clone)]
pub struct Exact1d {
    /// Elements in the caller's order.
    values: Vec<f64>,
    /// Distinct values that carry weight, ascending, and their weights.
    points: Vec<f64>,
    masses: Vec<f64>,
    /// `cuts[(k − 2)(d + 1) + b]`: where the last of `k` clusters of points `0..b` starts.
    cuts: Vec<u32>,
    kmax: usize,
}

/// A codebook and the code of every element.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// `k` centroids, ascending; duplicates of the last where there are fewer distinct values.
    pub centroids: Vec<f32>,
    /// Index of the nearest centroid of each element, the lower one in a tie.
    pub labels: Vec<u8>,
}

impl Exact1d {
    /// Solves for `values` with `weights` and all `k` up to `kmax`.
    ///
    /// Elements without weight influence nothing and are labelled with the nearest centroid; when
    /// all weights are zero, all count as one.
    ///
    /// # Errors
    /// Lists that are empty or differ in length, `kmax` outside 1 to 256, values that are not
    /// finite, negative weights.
    pub fn new(values: &[f32], weights: &[f32], kmax: usize) -> Result<Self> {
        let values: Vec<f64> = values.iter().map(|v| *v as f64).collect();
        let weights: Vec<f64> = weights.iter().map(|w| *w as f64).collect();
        Self::new_f64(&values, &weights, kmax)
    }

    /// [`Exact1d::new`] for values that an f32 does not hold.
    ///
    /// # Errors
    /// As [`Exact1d::new`].
    pub fn new_f64(values: &[f64], weights: &[f64], kmax: usize) -> Result<Self> {
        check(values, weights, kmax)?;
        let (points, masses) = merge(values, &effective(weights));
        // As many clusters as points need no cuts.
        let top = kmax.min(points.len() - 1);
        let mut cuts = Vec::new();
        if top > 1 {
            let plain = Plain::new(&points, &masses);
            let (found, left) = layers(&plain, points.len(), top);
            cuts = found;
            if left <= WELL_CONDITIONED * plain.whole(points.len()) {
                cuts = layers(&Precise::new(&points, &masses), points.len(), top).0;
            }
        }
        Ok(Self { values: values.to_vec(), points, masses, cuts, kmax })
    }

    /// `Σ w (x − c)²` of the best clustering into `k` clusters, computed afresh from its centroids
    /// and therefore free of the cancellation of prefix sums.
    ///
    /// # Panics
    /// When `k` is not in `1..=kmax` (a bug of the caller).
    pub fn cost(&self, k: usize) -> f64 {
        let centroids = self.centroids(k);
        let middles = middles(&centroids);
        let mut total = 0.0;
        for (x, mass) in self.points.iter().zip(&self.masses) {
            let distance = x - centroids[nearest(&middles, *x)];
            total += mass * distance * distance;
        }
        total
    }

    /// The best codebook of `k` centroids and its labels.
    ///
    /// # Panics
    /// As [`Exact1d::cost`].
    pub fn solution(&self, k: usize) -> Solution {
        let centroids = self.centroids(k);
        let middles = middles(&centroids);
        let labels = self.values.iter().map(|x| nearest(&middles, *x) as u8).collect();
        let mut centroids: Vec<f32> = centroids.into_iter().map(|c| c as f32).collect();
        let last = centroids[centroids.len() - 1];
        centroids.resize(k, last);
        Solution { centroids, labels }
    }

    /// Centroids of `min(k, distinct values)` clusters, ascending.
    fn centroids(&self, k: usize) -> Vec<f64> {
        assert!(
            (1..=self.kmax).contains(&k),
            "{k} clusters of a problem solved up to {}",
            self.kmax
        );
        let d = self.points.len();
        if k >= d {
            return self.points.clone();
        }
        let mut centroids = vec![0.0; k];
        let mut end = d;
        for clusters in (1..=k).rev() {
            let start = match clusters {
                1 => 0,
                _ => self.cuts[(clusters - 2) * (d + 1) + end] as usize,
            };
            centroids[clusters - 1] = self.mean(start, end);
            end = start;
        }
        centroids
    }

    /// Weighted mean of points `start..end`, taken relative to the first so that nothing cancels.
    fn mean(&self, start: usize, end: usize) -> f64 {
        let first = self.points[start];
        let (mut mass, mut moment) = (0f64, 0f64);
        for (x, m) in self.points[start..end].iter().zip(&self.masses[start..end]) {
            mass += m;
            moment += m * (x - first);
        }
        first + moment / mass
    }
}

/// Sorts, merges equal values and drops those without weight.
fn merge(values: &[f64], weights: &[f64]) -> (Vec<f64>, Vec<f64>) {
    // One integer per element, in the order of values and then of weights: compared without branches.
    let mut sorted: Vec<u128> = (values.iter().zip(weights).filter(|(_, w)| **w > 0.0))
        .map(|(v, w)| (ordered(*v) as u128) << 64 | w.to_bits() as u128)
        .collect();
    sorted.sort_unstable();
    let mut points: Vec<f64> = Vec::with_capacity(sorted.len());
    let mut masses: Vec<f64> = Vec::with_capacity(sorted.len());
    for element in sorted {
        let (value, weight) = (value_of((element >> 64) as u64), f64::from_bits(element as u64));
        if points.last() == Some(&value) {
            let last = masses.len() - 1;
            masses[last] += weight;
        } else {
            points.push(value);
            masses.push(weight);
        }
    }
    (points, masses)
}

const SIGN: u64 = 1 << 63;

/// Bits whose order as integers is that of the numbers ([`f64::total_cmp`]).
fn ordered(value: f64) -> u64 {
    let bits = value.to_bits();
    if bits & SIGN == 0 { bits | SIGN } else { !bits }
}

fn value_of(ordered: u64) -> f64 {
    f64::from_bits(if ordered & SIGN == 0 { !ordered } else { ordered & !SIGN })
}

/// Cuts of layers `2..=top` over `d > top` points, and the cost of `top` clusters.
fn layers<S: Segments>(segments: &S, d: usize, top: usize) -> (Vec<u32>, f64) {
    let width = d + 1;
    let mut cuts = vec![0u32; (top - 1) * width];
    let mut previous: Vec<f64> = (0..width).map(|b| segments.whole(b)).collect();
    let mut current = vec![0.0; width];
    let mut before: &[u32] = &vec![0; width];
    for (index, cuts) in cuts.chunks_exact_mut(width).enumerate() {
        let k = index + 2;
        segments.prepare(&mut previous);
        fill(segments, &previous, &mut current, before, cuts, k, k == top);
        std::mem::swap(&mut previous, &mut current);
        before = cuts;
    }
    (cuts, previous[d])
}

/// One layer: least costs and cuts of `k` clusters of points `0..b`, for `b` from `k` (every
/// point alone) to `d`, given the cuts `before` of one cluster less. Nothing reads more of the last
/// layer than its end.
fn fill<S: Segments>(
    segments: &S,
    previous: &[f64],
    current: &mut [f64],
    before: &[u32],
    cuts: &mut [u32],
    k: usize,
    last: bool,
) {
    let d = cuts.len() - 1;
    (cuts[k], current[k]) = ((k - 1) as u32, 0.0);
    let (cut, cost) = segments.best(previous, d, (k - 1).max(before[d] as usize), d - 1);
    (cuts[d], current[d]) = (cut as u32, cost);
    let span = d - k;
    let mut stride = if last { 1 } else { span.next_power_of_two() };
    while stride > 1 {
        let half = stride / 2;
        for b in (k + half..d).step_by(stride) {
            let high = (cuts[(b + half).min(d)] as usize).min(b - 1);
            let low = (cuts[b - half].max(before[b]) as usize).min(high);
            let (cut, cost) = segments.best(previous, b, low, high);
            (cuts[b], current[b]) = (cut as u32, cost);
        }
        stride = half;
    }
}
