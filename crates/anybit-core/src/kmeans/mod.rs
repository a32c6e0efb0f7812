//! Weighted one-dimensional k-means, the codebooks of SqueezeLLM and SKIM (Bai, Liu, Liu, PMLR
//! 267:2520-2534, 2025, eq. 4). For one row of `W` with sensitivities `G`, over `k` centroids `c`
//! and labels `l`:
//!
//! ```text
//! minimise  Σ_j G_j (w_j − c_{l_j})²
//! ```
//!
//! [`Exact1d`] finds the optimum for every `k` at once by dynamic programming and is what
//! quantizers use; [`lloyd()`] is the usual k-means++ with Lloyd's iterations, kept for comparison.
//! Clusters of an optimum are intervals, so a weight's cluster is that of its nearest centroid.

pub mod exact;
pub mod lloyd;
mod segments;

pub use exact::{Exact1d, Solution};
pub use lloyd::{LloydOptions, LloydResult, lloyd, lloyd_from};

use crate::{CoreError, Result};

/// Largest number of clusters: codes are bytes.
pub const MAX_CLUSTERS: usize = 256;

/// Rejects what neither algorithm can cluster.
fn check(values: &[f64], weights: &[f64], clusters: usize) -> Result<()> {
    if values.is_empty() || values.len() != weights.len() {
        return Err(CoreError::Shape {
            what: "values and weights of k-means",
            expected: "two lists of one length, not empty".into(),
            found: format!("{} values and {} weights", values.len(), weights.len()),
        });
    }
    if !(1..=MAX_CLUSTERS).contains(&clusters) {
        return Err(CoreError::Shape {
            what: "number of clusters",
            expected: format!("1 to {MAX_CLUSTERS}"),
            found: clusters.to_string(),
        });
    }
    for (what, list) in [("k-means value list", values), ("k-means weight list", weights)] {
        if let Some(col) = list.iter().position(|v| !v.is_finite()) {
            return Err(CoreError::NotFinite { what, row: 0, col, value: list[col].to_string() });
        }
    }
    match weights.iter().position(|w| *w < 0.0) {
        None => Ok(()),
        Some(col) => Err(CoreError::NegativeWeight {
            what: "k-means weight list",
            row: 0,
            col,
            value: weights[col].to_string(),
        }),
    }
}

/// The weights that count: all ones when every weight is zero, as for a row that no calibration
/// token reached.
fn effective(weights: &[f64]) -> Vec<f64> {
    if weights.iter().all(|w| *w == 0.0) { vec![1.0; weights.len()] } else { weights.to_vec() }
}

/// Borders between the clusters of ascending `centroids`.
fn middles(centroids: &[f64]) -> Vec<f64> {
    centroids.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect()
}

/// Cluster of `value`; a value on a border belongs to the lower one.
fn nearest(middles: &[f64], value: f64) -> usize {
    middles.partition_point(|middle| *middle < value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use approx::assert_relative_eq;
    use proptest::prelude::*;

    fn solve(values: &[f64], weights: &[f64], kmax: usize) -> Exact1d {
        Exact1d::new_f64(values, weights, kmax).unwrap()
    }

    /// Row "R7" of the specification: 256 normals, then 256 lognormal weights.
    fn r7() -> (Vec<f64>, Vec<f64>) {
        let mut rng = SplitMix64::new(7);
        let x = (0..256).map(|_| rng.normal()).collect();
        let w = (0..256).map(|_| (1.5 * rng.normal()).exp()).collect();
        (x, w)
    }

    fn assert_costs(problem: &Exact1d, want: &[(usize, f64)], relative: f64) {
        for &(k, cost) in want {
            assert_relative_eq!(problem.cost(k), cost, max_relative = relative, epsilon = 1e-12);
        }
    }

    #[test]
    fn t1_small_golden_costs() {
        let x = [-3.0f32, -1.0, 0.0, 0.5, 2.0, 7.0];
        let problem = Exact1d::new(&x, &[1.0, 4.0, 2.0, 2.0, 1.0, 0.5], 6).unwrap();
        let want = [(1, 41.976190476), (2, 15.9), (3, 5.9), (4, 2.7), (5, 0.25), (6, 0.0)];
        assert_costs(&problem, &want, 1e-10);
        let three = problem.solution(3);
        assert_eq!(three.centroids, [-1.4, 0.6, 7.0]);
        assert_eq!(three.labels, [0, 0, 1, 1, 1, 2]);

        let problem = solve(&[0.0, 1.0, 2.0, 10.0, 11.0, 12.0], &[1.0; 6], 6);
        let want = [(1, 154.0), (2, 4.0), (3, 2.5), (4, 1.0), (5, 0.5), (6, 0.0)];
        assert_costs(&problem, &want, 1e-12);
    }

    #[test]
    fn t2_golden_row_of_256() {
        let (x, w) = r7();
        assert_relative_eq!(x.iter().sum::<f64>(), 26.225640248811118, max_relative = 1e-12);
        assert_relative_eq!(w.iter().sum::<f64>(), 744.612598555937, max_relative = 1e-12);
        let plain = [
            (1, 255.1121539607),
            (2, 93.9177444020),
            (3, 53.4410123787),
            (4, 29.9037203044),
            (8, 7.7690516563),
            (16, 1.5178579752),
        ];
        assert_costs(&solve(&x, &[1.0; 256], 16), &plain, 2e-10);
        let weighted = [
            (1, 876.2697863126),
            (2, 298.4932482707),
            (3, 152.4419888649),
            (4, 88.0945366563),
            (8, 18.8143638655),
            (16, 2.9956358592),
            (32, 0.4167181779),
        ];
        let problem = solve(&x, &w, 32);
        assert_costs(&problem, &weighted, 2e-10);
        let four = problem.solution(4);
        for (c, want) in
            four.centroids.iter().zip([-1.19242451, -0.36627603, 0.68719550, 2.19888111])
        {
            assert_relative_eq!(*c, want as f32, max_relative = 1e-6);
        }
        let mut counts = [0; 4];
        four.labels.iter().for_each(|l| counts[*l as usize] += 1);
        assert_eq!(counts, [48, 91, 96, 21]);
    }

    /// Lloyd's iterations stop at fixed points that are arbitrarily bad; the program does not.
    #[test]
    fn t2_lloyd_fixed_points() {
        let exact = LloydOptions { iterations: 50, tolerance: 0.0, seed: 0 };
        let x = [0f32, 1.0, 2.0, 10.0, 11.0, 12.0, 20.0, 21.0, 22.0];
        let stuck = lloyd_from(&x, &[1.0; 9], &[0.5, 2.0, 16.0], exact).unwrap();
        assert_eq!(stuck.solution.centroids, [0.5, 2.0, 16.0]);
        assert_eq!(stuck.cost, 154.5);
        assert_relative_eq!(Exact1d::new(&x, &[1.0; 9], 3).unwrap().cost(3), 6.0);

        let (x, w) = r7();
        let problem = solve(&x, &w, 16);
        let mut sorted = x.clone();
        sorted.sort_by(f64::total_cmp);
        let (x, w): (Vec<f32>, Vec<f32>) =
            x.iter().zip(&w).map(|(x, w)| (*x as f32, *w as f32)).unzip();
        for (k, ratio) in [(4, 1.00001), (8, 1.668), (16, 3.856)] {
            let quantile = |i: usize| {
                let at = (i as f64 + 0.5) / k as f64 * 255.0;
                let low = sorted[at as usize];
                low + (sorted[at as usize + 1] - low) * at.fract()
            };
            let initial: Vec<f64> = (0..k).map(quantile).collect();
            let cost = lloyd_from(&x, &w, &initial, exact).unwrap().cost;
            assert_relative_eq!(cost / problem.cost(k), ratio, max_relative = 5e-4);
        }
        for seed in 0..20 {
            for k in [4, 8, 16] {
                let options = LloydOptions { seed, ..Default::default() };
                let ratio = lloyd(&x, &w, k, options).unwrap().cost / problem.cost(k);
                assert!(ratio > 1.0 - 1e-6 && ratio < 4.0, "k = {k}, seed {seed}: {ratio}");
            }
        }
    }

    #[test]
    fn t3_costs_fall_and_flatten_and_invariances_hold() {
        let (x, w) = r7();
        let problem = solve(&x, &w, 32);
        let costs: Vec<f64> = (1..=32).map(|k| problem.cost(k)).collect();
        let falls: Vec<f64> = costs.windows(2).map(|c| c[0] - c[1]).collect();
        assert!(falls.iter().all(|f| *f >= 0.0));
        assert!(falls.windows(2).all(|f| f[1] <= f[0]));

        let reversed: Vec<f64> = x.iter().rev().copied().collect();
        let weights: Vec<f64> = w.iter().rev().map(|w| w * 3e-9).collect();
        let moved: Vec<f64> = x.iter().map(|x| 5.0 - 0.01 * x).collect();
        let (scaled, shifted) = (solve(&reversed, &weights, 16), solve(&moved, &w, 16));
        for k in [1, 2, 5, 16] {
            assert_relative_eq!(scaled.cost(k), costs[k - 1] * 3e-9, max_relative = 1e-10);
            assert_relative_eq!(shifted.cost(k), costs[k - 1] * 1e-4, max_relative = 1e-9);
        }
        let (plain, mapped) = (problem.solution(5), shifted.solution(5));
        for (c, d) in plain.centroids.iter().zip(mapped.centroids.iter().rev()) {
            assert_relative_eq!(5.0 - 0.01 * c, *d, max_relative = 1e-6);
        }
        for (a, b) in plain.labels.iter().zip(&mapped.labels) {
            assert_eq!(*a, 4 - b);
        }
    }

    /// The rate of Lloyd-Max quantizers of N(0, 1), on a grid of values weighted by the density.
    #[test]
    fn t4_gaussian_rate() {
        let x: Vec<f32> = (0..4001).map(|i| (i as f32 - 2000.0) * 0.004).collect();
        let w: Vec<f32> = x.iter().map(|x| (-x * x / 2.0).exp()).collect();
        let total: f64 = w.iter().map(|w| *w as f64).sum();
        let problem = Exact1d::new(&x, &w, 32).unwrap();
        let rates = [0.3633802276, 0.1174818478, 0.0345477608, 0.0095010080, 0.0025046684];
        for (bits, rate) in rates.iter().enumerate() {
            let excess = problem.cost(2 << bits) / total / rate - 1.0;
            assert!((-1e-3..1e-5).contains(&excess), "{} bits: {excess}", bits + 1);
        }
        let four = problem.solution(4).centroids;
        for (c, want) in four.iter().zip([-1.51, -0.453, 0.453, 1.51]) {
            approx::assert_abs_diff_eq!(*c, want, epsilon = 3e-3);
        }
    }

    /// Four groups far apart: the cost is convex in k but not in bits, and prefix sums in f64
    /// lose it to cancellation.
    #[test]
    fn t5_groups_far_apart() {
        let case = |spacing: f64, heavy: f64| {
            let mut x = Vec::new();
            let mut w = Vec::new();
            for group in 0..4 {
                let offsets = [-100.0, -1.0, 0.0, 1.0, 100.0];
                for (offset, weight) in offsets.into_iter().zip([1e-4, 1.0, heavy, 1.0, 1e-4]) {
                    x.push(group as f64 * spacing + offset);
                    w.push(weight);
                }
            }
            solve(&x, &w, 16)
        };
        let near = case(1000.0, 1e4);
        let want =
            [(4, 16.0), (8, 11.91960000000408), (12, 7.84001599840016), (16, 3.92000799920008)];
        assert_costs(&near, &want, 1e-9);
        assert!(near.cost(4) - near.cost(8) < near.cost(8) - near.cost(16));
        let far = case(10000.0, 1e6);
        let want =
            [(4, 16.0), (8, 11.920003918804161), (12, 7.84001599840016), (16, 3.92000799920008)];
        assert_costs(&far, &want, 1e-9);
    }

    #[test]
    fn degenerate_rows() {
        let one = Exact1d::new(&[2.5; 7], &[1.0; 7], 4).unwrap();
        assert_eq!((one.cost(1), one.cost(4)), (0.0, 0.0));
        assert_eq!(one.solution(4), Solution { centroids: vec![2.5; 4], labels: vec![0; 7] });

        let x = [3.0f32, 1.0, -0.0, 0.0, 1.9];
        let ones = Exact1d::new(&x, &[1.0; 5], 3).unwrap();
        let zeros = Exact1d::new(&x, &[0.0; 5], 3).unwrap();
        assert_eq!(ones.solution(2), zeros.solution(2));

        // Weightless values do not pull centroids but do get the nearest one; 2.0 is a tie.
        let w = [1.0, 1.0, 0.0, 0.0, 0.0];
        let light = Exact1d::new(&[3.0, 1.0, -9.0, 2.0, 2.1], &w, 2).unwrap();
        assert_eq!(light.cost(2), 0.0);
        let want = Solution { centroids: vec![1.0, 3.0], labels: vec![1, 0, 0, 0, 1] };
        assert_eq!(light.solution(2), want);
    }

    #[test]
    fn bad_input_is_an_error() {
        let fails = |x: &[f32], w: &[f32], k| Exact1d::new(x, w, k).err();
        assert!(matches!(fails(&[], &[], 2), Some(CoreError::Shape { .. })));
        assert!(matches!(fails(&[1.0], &[1.0, 2.0], 2), Some(CoreError::Shape { .. })));
        assert!(matches!(fails(&[1.0], &[1.0], 0), Some(CoreError::Shape { .. })));
        assert!(matches!(fails(&[1.0], &[1.0], 257), Some(CoreError::Shape { .. })));
        assert!(matches!(
            fails(&[1.0, f32::NAN], &[1.0, 1.0], 2),
            Some(CoreError::NotFinite { col: 1, .. })
        ));
        assert!(matches!(
            fails(&[1.0, 2.0], &[f32::INFINITY, 1.0], 2),
            Some(CoreError::NotFinite { col: 0, .. })
        ));
        assert!(matches!(
            fails(&[1.0, 2.0], &[1.0, -1.0], 2),
            Some(CoreError::NegativeWeight { col: 1, .. })
        ));
    }

    /// Least cost over all ways to cut the sorted values into at most `k` intervals.
    fn brute_force(points: &[(f64, f64)], k: usize) -> f64 {
        if points.is_empty() {
            return 0.0;
        }
        if k == 0 {
            return f64::INFINITY;
        }
        (1..=points.len())
            .map(|cut| {
                let (head, tail) = points.split_at(cut);
                let mass: f64 = head.iter().map(|p| p.1).sum();
                let mean = head.iter().map(|p| p.0 * p.1).sum::<f64>() / mass;
                let cost: f64 = head.iter().map(|p| p.1 * (p.0 - mean) * (p.0 - mean)).sum();
                cost + brute_force(tail, k - 1)
            })
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        /// Equals brute force, labels are those of the nearest centroid, and Lloyd never wins.
        #[test]
        fn optimal_on_small_rows(
            pairs in prop::collection::vec((-8i32..8, 1u32..6, 0.1f32..3.0), 1..10),
            coarse in any::<bool>(), k in 1usize..5, seed in any::<u64>()
        ) {
            let x: Vec<f32> = pairs
                .iter()
                .map(|p| p.0 as f32 / 2.0 + if coarse { 0.0 } else { p.2 })
                .collect();
            let w: Vec<f32> = pairs.iter().map(|p| p.1 as f32 * p.2).collect();
            let problem = Exact1d::new(&x, &w, 5).unwrap();
            let mut points: Vec<(f64, f64)> =
                x.iter().zip(&w).map(|(x, w)| (*x as f64, *w as f64)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (got, want) = (problem.cost(k), brute_force(&points, k));
            prop_assert!((got - want).abs() <= 1e-9 * want + 1e-11, "{got} for {want}");

            let solution = problem.solution(k);
            prop_assert_eq!(solution.centroids.len(), k);
            prop_assert!(solution.centroids.is_sorted());
            let mut cost = 0.0;
            for ((x, w), label) in x.iter().zip(&w).zip(&solution.labels) {
                let distance = (x - solution.centroids[*label as usize]).abs();
                let least =
                    solution.centroids.iter().map(|c| (x - c).abs()).fold(f32::MAX, f32::min);
                prop_assert!(distance <= least + 1e-5);
                cost += *w as f64 * distance as f64 * distance as f64;
            }
            prop_assert!((cost - got).abs() <= 1e-5 * (1.0 + got), "{cost} for {got}");

            let options = LloydOptions { seed, ..Default::default() };
            let other = lloyd(&x, &w, k, options).unwrap().cost;
            prop_assert!(got <= other * (1.0 + 1e-9) + 1e-11, "{got} above Lloyd's {other}");
        }

        /// On longer rows, with repeated values and weights over many magnitudes.
        #[test]
        fn never_above_lloyd(n in 1usize..200, spread in 0f64..6.0, half in any::<bool>(),
                             k in 1usize..17, seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let x: Vec<f32> = (0..n)
                .map(|_| {
                    let v = rng.normal() as f32;
                    if half { (v * 8.0).round() / 8.0 } else { v }
                })
                .collect();
            let w: Vec<f32> = (0..n).map(|_| (spread * rng.normal()).exp() as f32).collect();
            let problem = Exact1d::new(&x, &w, 16).unwrap();
            let other = lloyd(&x, &w, k, LloydOptions::default()).unwrap().cost;
            let (got, total) = (problem.cost(k), problem.cost(1));
            prop_assert!(got <= other * (1.0 + 1e-9) + 1e-12 * total, "{got} above {other}");
            prop_assert!(k == 1 || got <= problem.cost(k - 1) * (1.0 + 1e-9) + 1e-12 * total);
        }
    }
}
