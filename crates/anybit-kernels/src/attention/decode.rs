//! Attention of one query, which is what each new token of a sequence asks for.
//!
//! The query heads that share a kv head are taken together, so that a row of keys or values is
//! read, and decoded where it is not in f32, once for all of them. In two passes over the
//! positions `p` that the query sees, for each query head `g`:
//!
//! ```text
//! s[g, p] = q_g · k_p / √d      w[g, ·] = softmax(s[g, ·])      out_g = Σ_p w[g, p] v_p
//! ```
//!
//! A kv head is one thread's work and its sums have a fixed order; callers spread kv heads over
//! threads.

use super::AttentionShape;
use crate::dot::total;
use crate::{DisjointMut, KvRows, SpinPool, softmax, with_scratch};

/// Positions decoded at a time: at 128 channels their 16 KiB stay in the first-level cache.
const TILE: usize = 32;
/// Rows that one step of the inner loops takes, to load queries and outputs once for all of them.
const ROWS: usize = 4;
/// Channels that one step of the inner loops takes.
const LANES: usize = 8;
/// Multiplications below which threads do not pay.
const FEW: usize = 1 << 14;

/// One query and the cache that it looks at.
#[derive(Clone, Copy)]
pub struct Query<'a> {
    /// `[heads · head_dim]`.
    pub q: &'a [f32],
    /// `[kv_heads, capacity, head_dim]`.
    pub keys: &'a KvRows,
    /// `[kv_heads, capacity, head_dim]`.
    pub values: &'a KvRows,
    /// Sizes and position.
    pub shape: AttentionShape,
}

/// [`attend_one`] for every kv head of `count` queries, on all threads: `out` is
/// `[count, heads · head_dim]`.
///
/// # Panics
/// As [`attend_one`], and when queries have different sizes.
pub fn attention_decode<'a>(
    count: usize,
    query: impl Fn(usize) -> Query<'a> + Sync,
    out: &mut [f32],
) {
    if count == 0 {
        return;
    }
    let AttentionShape { heads, kv_heads, head_dim, .. } = query(0).shape;
    let channels = heads / kv_heads * head_dim;
    assert_eq!(out.len(), count * kv_heads * channels, "the output has another length");
    let dst = DisjointMut::new(out);
    let tasks = count * kv_heads;
    let one = |task: usize| {
        let Query { q, keys, values, shape } = query(task / kv_heads);
        assert_eq!((shape.heads, shape.kv_heads, shape.head_dim), (heads, kv_heads, head_dim));
        // SAFETY: the channels of this kv head and query belong to this task alone.
        let out = unsafe { std::slice::from_raw_parts_mut(dst.at(task * channels), channels) };
        attend_one(q, keys, values, shape, task % kv_heads, out);
    };
    let span: usize = (0..count).map(|i| query(i).shape.start + 1).sum();
    let pool = SpinPool::global();
    if 2 * span * heads * head_dim < FEW {
        return (0..tasks).for_each(one);
    }
    pool.run(&|worker| (worker..tasks).step_by(pool.threads()).for_each(one));
}

/// Computes `softmax(q kᵀ / √d) v` at position `shape.start` for the query heads of kv head
/// `head_group`.
///
/// `q` is the whole query, `[heads · head_dim]`; `out` is `[heads / kv_heads · head_dim]`, the
/// channels of these heads alone. `keys` and `values` are `[kv_heads, capacity, head_dim]`.
///
/// # Panics
/// When the length of `q` or `out` does not fit `shape`, and when the cache has no such head or
/// position.
pub fn attend_one(
    q: &[f32],
    keys: &KvRows,
    values: &KvRows,
    shape: AttentionShape,
    head_group: usize,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim, capacity, start, window } = shape;
    let group = heads / kv_heads;
    let channels = group * head_dim;
    assert_eq!(q.len(), heads * head_dim, "the query has another length");
    assert_eq!(out.len(), channels, "the output has another length");
    assert!(head_group < kv_heads && start < capacity, "the cache has no such head or position");
    let q = &q[head_group * channels..(head_group + 1) * channels];
    let begin = window.map_or(0, |w| (start + 1).saturating_sub(w));
    let span = start + 1 - begin;
    let first = head_group * capacity + begin;
    let tile_len = if keys.decodes() || values.decodes() { TILE * head_dim } else { 0 };
    let len = tile_len + group * span;
    let sizes = Sizes { group, head_dim, span, scale: 1.0 / (head_dim as f32).sqrt() };
    with_scratch(len, |scratch| {
        let (tile, scores) = scratch.split_at_mut(tile_len);
        sizes.attend(q, keys, values, first, tile, scores, out);
    });
}

/// Whole steps of [`ROWS`] rows, and the rows that remain.
fn split_rows(rows: &[f32], head_dim: usize) -> (&[f32], &[f32]) {
    rows.split_at(rows.len() - rows.len() % (ROWS * head_dim))
}

/// Sizes of a kv head's work.
#[derive(Clone, Copy)]
struct Sizes {
    /// Query heads.
    group: usize,
    head_dim: usize,
    /// Positions that the query sees.
    span: usize,
    /// `1 / √d`.
    scale: f32,
}

impl Sizes {
    /// Both passes over the positions, whose rows begin at row `first`.
    #[expect(clippy::too_many_arguments)]
    fn attend(
        self,
        q: &[f32],
        keys: &KvRows,
        values: &KvRows,
        first: usize,
        tile: &mut [f32],
        scores: &mut [f32],
        out: &mut [f32],
    ) {
        let Self { head_dim, span, .. } = self;
        for at in (0..span).step_by(TILE) {
            let end = span.min(at + TILE);
            let keys = keys.read(first + at..first + end, head_dim, tile);
            let (fours, ones) = split_rows(keys, head_dim);
            for (i, rows) in fours.chunks_exact(ROWS * head_dim).enumerate() {
                self.score::<ROWS>(q, rows, at + i * ROWS, scores);
            }
            for (i, row) in ones.chunks_exact(head_dim).enumerate() {
                self.score::<1>(q, row, at + fours.len() / head_dim + i, scores);
            }
        }
        scores.chunks_exact_mut(span).for_each(softmax);
        out.fill(0.0);
        for at in (0..span).step_by(TILE) {
            let end = span.min(at + TILE);
            let values = values.read(first + at..first + end, head_dim, tile);
            let (fours, ones) = split_rows(values, head_dim);
            for (i, rows) in fours.chunks_exact(ROWS * head_dim).enumerate() {
                self.accumulate::<ROWS>(scores, at + i * ROWS, rows, out);
            }
            for (i, row) in ones.chunks_exact(head_dim).enumerate() {
                self.accumulate::<1>(scores, at + fours.len() / head_dim + i, row, out);
            }
        }
    }

    /// Writes `s[g, at + r]` for `R` rows of keys.
    #[inline]
    fn score<const R: usize>(self, q: &[f32], keys: &[f32], at: usize, scores: &mut [f32]) {
        let d = self.head_dim;
        for g in 0..self.group {
            let products = dots::<R>(&q[g * d..(g + 1) * d], keys).map(|s| s * self.scale);
            scores[g * self.span + at..][..R].copy_from_slice(&products);
        }
    }

    /// Adds `Σ_r w[g, at + r] v_r` to `out_g` for `R` rows of values.
    #[inline]
    fn accumulate<const R: usize>(
        self,
        weights: &[f32],
        at: usize,
        values: &[f32],
        out: &mut [f32],
    ) {
        let d = self.head_dim;
        for g in 0..self.group {
            let weights = &weights[g * self.span + at..][..R];
            let weights = std::array::from_fn(|r| weights[r]);
            add_rows::<R>(&mut out[g * d..(g + 1) * d], weights, values);
        }
    }
}

/// Products of `q` with each of `R` rows. A product does not depend on the rows beside it.
#[inline(always)]
fn dots<const R: usize>(q: &[f32], rows: &[f32]) -> [f32; R] {
    let (q_lanes, q_tail) = q.as_chunks::<LANES>();
    let rows = rows_of::<R>(rows, q.len());
    let lanes = rows.map(|row| &row.as_chunks::<LANES>().0[..q_lanes.len()]);
    let mut sums = [[0f32; LANES]; R];
    for (c, q) in q_lanes.iter().enumerate() {
        for r in 0..R {
            add_product(&mut sums[r], &lanes[r][c], q);
        }
    }
    let tail = q_lanes.len() * LANES;
    std::array::from_fn(|r| {
        let products = rows[r][tail..].iter().zip(q_tail).map(|(k, q)| k * q);
        total(sums[r]) + products.sum::<f32>()
    })
}

/// `out += Σ_r weights[r] · rows[r]`, one row after the other.
#[inline(always)]
fn add_rows<const R: usize>(out: &mut [f32], weights: [f32; R], rows: &[f32]) {
    let rows = rows_of::<R>(rows, out.len());
    let (out_lanes, out_tail) = out.as_chunks_mut::<LANES>();
    let lanes = rows.map(|row| &row.as_chunks::<LANES>().0[..out_lanes.len()]);
    let tail = out_lanes.len() * LANES;
    for (c, out) in out_lanes.iter_mut().enumerate() {
        let mut sums = *out;
        for r in 0..R {
            add_product(&mut sums, &lanes[r][c], &[weights[r]; LANES]);
        }
        *out = sums;
    }
    for (i, out) in out_tail.iter_mut().enumerate() {
        for (row, weight) in rows.iter().zip(&weights) {
            *out = row[tail + i].mul_add(*weight, *out);
        }
    }
}

/// The first `R` rows of `cols`, each a slice of its own.
#[inline(always)]
fn rows_of<const R: usize>(rows: &[f32], cols: usize) -> [&[f32]; R] {
    std::array::from_fn(|r| &rows[r * cols..(r + 1) * cols])
}

/// `sums += a · b`, lane by lane.
#[inline(always)]
fn add_product(sums: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for i in 0..LANES {
        sums[i] = a[i].mul_add(b[i], sums[i]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::tests::{BITS, naive, stored};
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    /// Every kv head by [`attend_one`].
    fn attend(q: &[f32], keys: &KvRows, values: &KvRows, shape: AttentionShape) -> Vec<f32> {
        // What lies in the buffers must not matter.
        let mut out = vec![f32::NAN; q.len()];
        let channels = q.len() / shape.kv_heads;
        for (head_group, out) in out.chunks_exact_mut(channels).enumerate() {
            attend_one(q, keys, values, shape, head_group, out);
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn equals_the_scalar_twin(kv_heads in 1usize..4, group in 1usize..=4,
                                  head_dim in 1usize..=80, start in 0usize..200,
                                  window in prop::option::of(1usize..220),
                                  key in 0usize..6, value in 0usize..6, seed in any::<u64>()) {
            let shape = AttentionShape {
                heads: kv_heads * group, kv_heads, head_dim, capacity: start + 3, start, window,
            };
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let q = normals(shape.heads * head_dim);
            let count = kv_heads * shape.capacity * head_dim;
            let (keys, k) = stored(&normals(count), head_dim, BITS[key]);
            let (values, v) = stored(&normals(count), head_dim, BITS[value]);
            let out = attend(&q, &keys, &values, shape);
            for (a, b) in out.iter().zip(naive(&q, &k, &v, shape)) {
                prop_assert!((a - b).abs() < 2e-5 * (1.0 + b.abs()), "{a} {b}");
            }
            // However they are stored, it is what their values give in f32, bit for bit.
            let plain = attend(&q, &KvRows::Plain(k), &KvRows::Plain(v), shape);
            prop_assert_eq!(&out, &plain);
            // All heads at once, beside another query of another length.
            let mut both = vec![f32::NAN; 2 * q.len()];
            let short = AttentionShape { start: start / 2, ..shape };
            let query = |i: usize| {
                let shape = [shape, short][i];
                Query { q: &q, keys: &keys, values: &values, shape }
            };
            attention_decode(2, query, &mut both);
            prop_assert_eq!(&both[..q.len()], &plain);
            prop_assert_eq!(&both[q.len()..], &attend(&q, &keys, &values, short));
        }
    }
}
