//! Bits under a hard budget: which width each row (or any other item) gets.
//!
//! ```text
//! minimise  Σ_i E_i(b_i)    subject to  Σ_i cost_i(b_i) ≤ budget
//! ```
//!
//! [`greedy`] is Algorithm 1 of SKIM (Bai, Liu, Liu, PMLR 267:2520-2534, 2025) for items of equal
//! cost, with its errata mended: the largest *drop* of the error wins, the loop tests before it
//! spends, and it stops when every row is at `bmax`. It is optimal where every `E_i` is convex.
//!
//! [`hull`] takes any costs and curves: it climbs the lower convex hulls of all items in order of
//! slope, which is the optimum of the Lagrangian `Σ E + λ·cost`, and spends what the next edge
//! cannot use by exchanges between items near that slope.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{CoreError, Result};

/// Where [`greedy`] starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllocationStart {
    /// Every row at `bmin`: errors alone decide.
    #[default]
    Min,
    /// Every row at the average, rounded down; errors decide about the fraction. SKIM uses this
    /// for OPT, where lower layer errors raised perplexity.
    Floor,
    /// Every row at the average, rounded down, and nothing else: a fraction stays unspent.
    Uniform,
}

/// Total bits of `rows` rows at an average of `bits`, rounded up; a product that exceeds an
/// integer only by the error of f64 (`100 · 2.2`) is that integer.
pub fn target(rows: usize, bits: f64) -> usize {
    (rows as f64 * bits - 1e-9).ceil().max(0.0) as usize
}

/// Distributes `target_bits` over rows; `errors` is `[rows, bmax − bmin + 1]`, entry `(i, b − bmin)`
/// the error of row `i` at `b` bits. Ties go to the lower row.
///
/// # Errors
/// An empty or impossible range of widths, errors of another length or not finite, or
/// [`CoreError::Budget`] when even `bmin` everywhere exceeds the target.
pub fn greedy(
    errors: &[f64],
    bmin: u8,
    bmax: u8,
    target_bits: usize,
    start: AllocationStart,
) -> Result<Vec<u8>> {
    if bmin > bmax || bmax > 8 {
        return Err(CoreError::Bits { bits: bmax, grid: "allocated", min: bmin, max: 8 });
    }
    let width = (bmax - bmin) as usize + 1;
    if !errors.len().is_multiple_of(width) {
        return Err(CoreError::Shape {
            what: "error table",
            expected: format!("a multiple of {width} widths"),
            found: errors.len().to_string(),
        });
    }
    check_finite(errors, width)?;
    let rows = errors.len() / width;
    let minimum = rows * bmin as usize;
    if minimum > target_bits {
        return Err(CoreError::Budget { given: target_bits as u64, minimum: minimum as u64 });
    }
    let average = (target_bits / rows.max(1)).clamp(bmin as usize, bmax as usize) as u8;
    let first = if start == AllocationStart::Min { bmin } else { average };
    let mut bits = vec![first; rows];
    if start == AllocationStart::Uniform {
        return Ok(bits);
    }
    let gain = |row: usize, bits: u8| {
        let at = row * width + (bits - bmin) as usize;
        (sortable(errors[at] - errors[at + 1]), Reverse(row))
    };
    let mut heap = BinaryHeap::new();
    if first < bmax {
        heap.extend((0..rows).map(|row| gain(row, first)));
    }
    for _ in rows * first as usize..target_bits {
        let Some((_, Reverse(row))) = heap.pop() else { break };
        bits[row] += 1;
        if bits[row] < bmax {
            heap.push(gain(row, bits[row]));
        }
    }
    Ok(bits)
}

fn check_finite(errors: &[f64], width: usize) -> Result<()> {
    match errors.iter().position(|e| !e.is_finite()) {
        None => Ok(()),
        Some(at) => Err(CoreError::NotFinite {
            what: "error table",
            row: at / width,
            col: at % width,
            value: errors[at].to_string(),
        }),
    }
}

/// An integer that orders as [`f64::total_cmp`] does.
fn sortable(value: f64) -> i64 {
    let bits = value.to_bits() as i64;
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

/// The options of one item: what each costs and how large its error is, in any order. Items of
/// one layer can share `costs`.
#[derive(Debug, Clone, Copy)]
pub struct Curve<'a> {
    /// Cost of each option, in bits.
    pub costs: &'a [u64],
    /// Error of each option, weighted so that items can be compared.
    pub errors: &'a [f64],
}

/// A step along an item's hull.
struct Edge {
    /// Error that is saved per bit.
    slope: f64,
    item: u32,
    /// Place on the hull, so that equal slopes are climbed in order.
    rank: u8,
    from: u8,
    to: u8,
}

/// The option of each item such that costs sum to at most `budget` and errors to nearly the
/// least: the gap to the optimum is below the error of one step at the critical slope.
///
/// # Errors
/// An item without options or with costs and errors of different length, errors that are not
/// finite, or [`CoreError::Budget`] when the cheapest options exceed the budget.
pub fn hull(curves: &[Curve<'_>], budget: u64) -> Result<Vec<usize>> {
    check_curves(curves)?;
    let mut edges = Vec::with_capacity(2 * curves.len());
    let mut choice = Vec::with_capacity(curves.len());
    let mut minimum = 0u64;
    for (item, curve) in curves.iter().enumerate() {
        let cheapest = climb(curve, item as u32, &mut edges);
        minimum = minimum.saturating_add(curve.costs[cheapest]);
        choice.push(cheapest);
    }
    if minimum > budget {
        return Err(CoreError::Budget { given: budget, minimum });
    }
    edges.par_sort_unstable_by(|a, b| {
        b.slope.total_cmp(&a.slope).then(a.item.cmp(&b.item)).then(a.rank.cmp(&b.rank))
    });
    let mut plan = Plan { curves, choice, left: budget - minimum };
    if let Some(critical) = edges.iter().find(|edge| !plan.accept(edge)) {
        plan.exchange(critical.slope);
        for edge in &edges {
            plan.accept(edge);
        }
    }
    Ok(plan.choice)
}

fn check_curves(curves: &[Curve<'_>]) -> Result<()> {
    for (item, curve) in curves.iter().enumerate() {
        let (costs, errors) = (curve.costs.len(), curve.errors.len());
        if costs != errors || !(1..=256).contains(&costs) {
            return Err(CoreError::Shape {
                what: "options of an item",
                expected: "1 to 256 costs and as many errors".into(),
                found: format!("{costs} costs and {errors} errors at item {item}"),
            });
        }
        if let Some(col) = curve.errors.iter().position(|e| !e.is_finite()) {
            return Err(CoreError::NotFinite {
                what: "error curve",
                row: item,
                col,
                value: curve.errors[col].to_string(),
            });
        }
    }
    Ok(())
}

/// Appends the edges of an item's lower convex hull; returns its cheapest option. Slopes fall from
/// edge to edge as computed, not only in exact arithmetic, so sorting cannot reorder them.
fn climb(curve: &Curve<'_>, item: u32, edges: &mut Vec<Edge>) -> usize {
    let mut order: Vec<usize> = (0..curve.costs.len()).collect();
    order.sort_by(|&a, &b| {
        let errors = curve.errors[a].total_cmp(&curve.errors[b]);
        curve.costs[a].cmp(&curve.costs[b]).then(errors).then(a.cmp(&b))
    });
    let slope = |a: usize, b: usize| {
        (curve.errors[a] - curve.errors[b]) / (curve.costs[b] - curve.costs[a]) as f64
    };
    let first = edges.len();
    let cheapest = order[0];
    let mut last = cheapest;
    for &to in &order[1..] {
        // Dearer without being better, or of equal cost and no better.
        if curve.errors[to] >= curve.errors[last] {
            continue;
        }
        let mut from = last;
        while let Some(top) = edges[first..].last().filter(|top| top.slope < slope(from, to)) {
            from = top.from as usize;
            edges.pop();
        }
        let rank = (edges.len() - first) as u8;
        edges.push(Edge { slope: slope(from, to), item, rank, from: from as u8, to: to as u8 });
        last = to;
    }
    cheapest
}

/// An allocation in progress.
struct Plan<'a> {
    curves: &'a [Curve<'a>],
    choice: Vec<usize>,
    /// Budget that is not spent.
    left: u64,
}

/// A change of one item's option.
struct Move {
    /// By how much `error + λ·cost` rises: what the move is away from the Lagrangian optimum.
    deficit: f64,
    item: usize,
    to: usize,
    cost: i128,
    error: f64,
}

/// Moves considered together in one exchange.
const CANDIDATES: usize = 256;
/// Exchanges at most: what is left of the budget is less than one edge, so few are of use.
const EXCHANGES: usize = 32;

impl Plan<'_> {
    /// Takes an edge if its item stands at its start and the budget allows.
    fn accept(&mut self, edge: &Edge) -> bool {
        let (costs, item) = (self.curves[edge.item as usize].costs, edge.item as usize);
        let step = costs[edge.to as usize] - costs[edge.from as usize];
        let fits = self.choice[item] == edge.from as usize && step <= self.left;
        if fits {
            self.choice[item] = edge.to as usize;
            self.left -= step;
        }
        fits
    }

    /// Spends the rest of the budget on single moves and pairs of moves that lower the error. At
    /// the Lagrangian optimum nothing can gain more than `λ·left`, which bounds the search.
    fn exchange(&mut self, critical: f64) {
        for _ in 0..EXCHANGES {
            if self.left == 0 {
                return;
            }
            let moves = self.moves(critical);
            let Some((one, other)) = best_exchange(&moves, self.left as i128) else { return };
            let mut left = self.left as i128;
            for change in [Some(one), other].into_iter().flatten() {
                let change = &moves[change];
                self.choice[change.item] = change.to;
                left -= change.cost;
            }
            self.left = left as u64;
        }
    }

    /// The moves with the smallest deficits.
    fn moves(&self, critical: f64) -> Vec<Move> {
        let bound = critical * self.left as f64;
        let mut moves: Vec<Move> = self
            .curves
            .par_iter()
            .zip(&self.choice)
            .enumerate()
            .flat_map_iter(|(item, (curve, &from))| {
                let options = (0..curve.costs.len()).filter(move |&to| to != from);
                options.map(move |to| {
                    let cost = curve.costs[to] as i128 - curve.costs[from] as i128;
                    let error = curve.errors[to] - curve.errors[from];
                    Move { deficit: error + critical * cost as f64, item, to, cost, error }
                })
            })
            .filter(|change| change.deficit < bound)
            .collect();
        let order = |a: &Move, b: &Move| {
            a.deficit.total_cmp(&b.deficit).then(a.item.cmp(&b.item)).then(a.to.cmp(&b.to))
        };
        if moves.len() > CANDIDATES {
            moves.select_nth_unstable_by(CANDIDATES, order);
            moves.truncate(CANDIDATES);
        }
        moves.sort_unstable_by(order);
        moves
    }
}

/// The move, or pair of moves of two items, that lowers the error most within the budget.
fn best_exchange(moves: &[Move], left: i128) -> Option<(usize, Option<usize>)> {
    let mut best = (0.0, None);
    for (i, one) in moves.iter().enumerate() {
        if one.cost <= left && one.error < best.0 {
            best = (one.error, Some((i, None)));
        }
        for (j, other) in moves[..i].iter().enumerate() {
            let (cost, error) = (one.cost + other.cost, one.error + other.error);
            if one.item != other.item && cost <= left && error < best.0 {
                best = (error, Some((i, Some(j))));
            }
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use approx::assert_relative_eq;
    use proptest::prelude::*;

    const SMALL: [f64; 12] = [100.0, 30.0, 9.0, 50.0, 14.0, 4.0, 8.0, 2.0, 0.5, 400.0, 90.0, 25.0];

    fn error_of(errors: &[f64], bits: &[u8]) -> f64 {
        bits.iter().enumerate().map(|(row, b)| errors[row * 3 + *b as usize - 2]).sum()
    }

    fn min_start(errors: &[f64], total: usize) -> Vec<u8> {
        greedy(errors, 2, 4, total, AllocationStart::Min).unwrap()
    }

    /// Hull allocation of rows of equal length, in greedy's terms.
    fn by_hull(errors: &[f64], total: usize) -> Vec<u8> {
        let curves: Vec<Curve> =
            errors.chunks(3).map(|errors| Curve { costs: &[2, 3, 4], errors }).collect();
        let choice = hull(&curves, total as u64).unwrap();
        choice.into_iter().map(|option| option as u8 + 2).collect()
    }

    /// Least error over all allocations, by dynamic programming over the budget.
    fn knapsack(curves: &[Curve<'_>], budget: usize) -> f64 {
        let mut least = vec![0f64; budget + 1];
        for curve in curves {
            let mut next = vec![f64::INFINITY; budget + 1];
            for (cost, error) in curve.costs.iter().zip(curve.errors) {
                let cost = *cost as usize;
                for spent in cost..=budget {
                    next[spent] = next[spent].min(least[spent - cost] + error);
                }
            }
            least = next;
        }
        least[budget]
    }

    fn best(errors: &[f64], total: usize) -> f64 {
        let curves: Vec<Curve> =
            errors.chunks(3).map(|errors| Curve { costs: &[2, 3, 4], errors }).collect();
        knapsack(&curves, total)
    }

    const RATES: [f64; 3] = [0.1175, 0.03454, 0.009497];

    /// 200 rows of convex errors of very different size.
    fn smooth() -> Vec<f64> {
        let mut rng = SplitMix64::new(11);
        let scales: Vec<f64> = (0..200).map(|_| (2.0 * rng.normal()).exp()).collect();
        scales.iter().flat_map(|v| RATES.map(|rate| v * rate)).collect()
    }

    /// 200 rows with noise on every entry: some neither monotone nor convex.
    fn noisy() -> Vec<f64> {
        let mut rng = SplitMix64::new(12);
        let mut errors = Vec::new();
        for _ in 0..200 {
            let v = (2.0 * rng.normal()).exp();
            for rate in RATES {
                errors.push(v * rate * (0.6 * rng.normal()).exp());
            }
        }
        errors
    }

    #[test]
    fn t6_four_rows() {
        let want = [558.0, 248.0, 178.0, 113.0, 77.0, 56.0, 46.0, 40.0, 38.5];
        for (total, want) in (8..=16).zip(want) {
            assert_eq!(error_of(&SMALL, &min_start(&SMALL, total)), want);
            assert_eq!(error_of(&SMALL, &by_hull(&SMALL, total)), want);
            assert_eq!(best(&SMALL, total), want);
        }
        assert_eq!(min_start(&SMALL, 12), [3, 3, 2, 4]);
        assert_eq!(min_start(&SMALL, 13), [4, 3, 2, 4]);
    }

    #[test]
    fn t6_greedy_misses_what_is_not_convex() {
        let errors = [10.0, 9.5, 0.0, 10.0, 7.0, 6.5];
        let bits = min_start(&errors, 6);
        assert_eq!((error_of(&errors, &bits), bits), (16.5, vec![3, 3]));
        let bits = by_hull(&errors, 6);
        assert_eq!((error_of(&errors, &bits), bits), (10.0, vec![4, 2]));
        assert_eq!(best(&errors, 6), 10.0);
    }

    #[test]
    fn t6_smooth_rows_are_optimal() {
        let errors = smooth();
        let golden = [
            (2.25, [159, 32, 9], 46.67196233),
            (2.5, [129, 42, 29], 34.10334047),
            (3.0, [75, 50, 75], 25.50527123),
            (3.2, [60, 40, 100], 24.30815251),
            (3.75, [15, 20, 165], 22.98981953),
        ];
        for (average, counts, error) in golden {
            let total = target(200, average);
            let bits = min_start(&errors, total);
            let found = [2, 3, 4].map(|b| bits.iter().filter(|bits| **bits == b).count());
            assert_eq!(found, counts);
            assert_relative_eq!(error_of(&errors, &bits), error, max_relative = 1e-9);
            assert_relative_eq!(best(&errors, total), error, max_relative = 1e-9);
            let hull = error_of(&errors, &by_hull(&errors, total));
            assert_relative_eq!(hull, error, max_relative = 1e-9);
            let spent: usize = bits.iter().map(|b| *b as usize).sum();
            assert!((spent as f64 - 200.0 * average).abs() < 1.0);

            // The certificate: no gain that was taken is below one that was not.
            let gain = |row: usize, b: u8| {
                errors[row * 3 + b as usize - 2] - errors[row * 3 + b as usize - 1]
            };
            let accepted = (0..200usize).filter(|r| bits[*r] > 2).map(|r| gain(r, bits[r] - 1));
            let rejected = (0..200usize).filter(|r| bits[*r] < 4).map(|r| gain(r, bits[r]));
            let lowest = accepted.fold(f64::INFINITY, f64::min);
            assert!(lowest >= rejected.fold(0.0, f64::max));

            let scaled: Vec<f64> = errors.iter().map(|e| e * 0.125).collect();
            assert_eq!(min_start(&scaled, total), bits);
        }
        let uniform = greedy(&errors, 2, 4, 600, AllocationStart::Uniform).unwrap();
        assert_relative_eq!(error_of(&errors, &uniform), 83.22928296, max_relative = 1e-9);
    }

    #[test]
    fn t6_noisy_rows_need_the_hull() {
        let errors = noisy();
        let rows = || errors.chunks(3);
        assert_eq!(rows().filter(|e| e[0] < e[1] || e[1] < e[2]).count(), 32);
        assert_eq!(rows().filter(|e| e[0] - e[1] < e[1] - e[2]).count(), 45);
        for (average, greedy, hull, optimum) in
            [(3.0, 38.7548, 23.6765, 23.6763), (2.25, 58.8506, 45.4326, 45.4326)]
        {
            let total = target(200, average);
            assert_relative_eq!(
                error_of(&errors, &min_start(&errors, total)),
                greedy,
                max_relative = 2e-6
            );
            assert_relative_eq!(best(&errors, total), optimum, max_relative = 3e-6);
            let found = error_of(&errors, &by_hull(&errors, total));
            assert!(found <= hull + 5e-5 && found >= best(&errors, total) - 1e-9, "{found}");
        }
    }

    #[test]
    fn starts_and_ends_of_the_range() {
        let errors = smooth();
        assert_eq!(min_start(&errors, 400), [2; 200]);
        assert_eq!(min_start(&errors, 900), [4; 200]);
        assert_eq!(by_hull(&errors, 900), [4; 200]);
        let floor = |total| greedy(&errors, 2, 4, total, AllocationStart::Floor).unwrap();
        assert_eq!(floor(600), [3; 200]);
        let bits = floor(640);
        assert!(bits.iter().all(|b| *b >= 3));
        assert_eq!(bits.iter().map(|b| *b as usize).sum::<usize>(), 640);
        let mut last = f64::INFINITY;
        for total in 400..=800 {
            let error = error_of(&errors, &min_start(&errors, total));
            assert!(error <= last);
            last = error;
        }
        assert_eq!(target(100, 2.2), 220);
        assert_eq!(target(4096, 3.2), 13108);
        assert_eq!(target(0, 3.0), 0);
        assert!(greedy(&[], 2, 4, 0, AllocationStart::Min).unwrap().is_empty());
    }

    #[test]
    fn impossible_requests_are_errors() {
        let below = CoreError::Budget { given: 7, minimum: 8 };
        assert_eq!(greedy(&SMALL, 2, 4, 7, AllocationStart::Min), Err(below.clone()));
        let curves: Vec<Curve> =
            SMALL.chunks(3).map(|errors| Curve { costs: &[2, 3, 4], errors }).collect();
        assert_eq!(hull(&curves, 7), Err(below));
        assert!(greedy(&SMALL[1..], 2, 4, 12, AllocationStart::Min).is_err());
        assert!(greedy(&SMALL, 4, 2, 12, AllocationStart::Min).is_err());
        assert!(greedy(&[f64::NAN, 1.0], 2, 3, 3, AllocationStart::Min).is_err());
        let broken = [Curve { costs: &[1], errors: &[f64::INFINITY] }];
        assert!(matches!(hull(&broken, 9), Err(CoreError::NotFinite { row: 0, col: 0, .. })));
        assert!(hull(&[Curve { costs: &[], errors: &[] }], 9).is_err());
        assert_eq!(hull(&[], 0), Ok(vec![]));
    }

    #[test]
    fn many_items_of_different_length() {
        let mut rng = SplitMix64::new(5);
        let lengths = [64u64, 192, 576];
        let costs: Vec<[u64; 4]> =
            lengths.map(|m| [1, 2, 3, 4].map(|b| m * b + (16u64 << b))).into();
        let errors: Vec<[f64; 4]> = (0..50_000)
            .map(|_| {
                let v = rng.normal().exp();
                [0.36, 0.1175, 0.03454, 0.009497].map(|rate| v * rate)
            })
            .collect();
        let curves: Vec<Curve> = errors
            .iter()
            .enumerate()
            .map(|(i, errors)| Curve { costs: &costs[i % 3], errors })
            .collect();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| hull(&curves, 50_000 * 700).unwrap())
        };
        let choice = run(1);
        assert_eq!(choice, run(3));
        let spent: u64 = choice.iter().zip(&curves).map(|(o, c)| c.costs[*o]).sum();
        assert!(spent <= 50_000 * 700 && spent > 50_000 * 700 - 2000, "{spent}");
    }

    proptest! {
        /// Within the budget, and within one step of the optimum.
        #[test]
        fn hull_is_near_the_optimum(
            items in prop::collection::vec(
                prop::collection::vec((0u64..12, 0f64..10.0), 1..5), 1..8),
            extra in 0u64..40
        ) {
            let parts: Vec<(Vec<u64>, Vec<f64>)> =
                items.iter().map(|item| item.iter().copied().unzip()).collect();
            let curves: Vec<Curve> =
                parts.iter().map(|(costs, errors)| Curve { costs, errors }).collect();
            let minimum: u64 = parts.iter().map(|p| p.0.iter().min().unwrap()).sum();
            let budget = minimum + extra;
            let choice = hull(&curves, budget).unwrap();
            let spent: u64 = choice.iter().zip(&curves).map(|(o, c)| c.costs[*o]).sum();
            prop_assert!(spent <= budget);
            let error: f64 = choice.iter().zip(&curves).map(|(o, c)| c.errors[*o]).sum();
            let optimum = knapsack(&curves, budget as usize);
            let step = parts
                .iter()
                .map(|p| {
                    let (low, high) = p.1.iter().fold((f64::MAX, 0f64), |(l, h), e| {
                        (l.min(*e), h.max(*e))
                    });
                    high - low
                })
                .fold(0.0, f64::max);
            prop_assert!(error >= optimum - 1e-9 && error <= optimum + step + 1e-9);
        }
    }
}
