//! Causal attention with grouped keys over a cache: of many queries in blocks, of one in
//! [`attend_one`].

mod decode;

use anybit_core::linalg::{View, matmul, matmul_into};

use crate::{DisjointMut, KvRows, SpinPool, softmax, with_scratch};

pub use decode::{Query, attend_one, attention_decode};

/// Queries of one task.
const QUERIES: usize = 64;

/// Sizes of an attention call.
#[derive(Debug, Clone, Copy)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Positions allocated per head in `keys` and `values`.
    pub capacity: usize,
    /// Position of the first query; keys `0..start + queries` are filled.
    pub start: usize,
    /// Keys that a query sees, itself included; `None` for all.
    pub window: Option<usize>,
}

/// Computes `softmax(q kᵀ / √d) v` for every query and head.
///
/// `q` and `out` are `[queries, heads · head_dim]`; `keys` and `values` are
/// `[kv_heads, capacity, head_dim]`; those not in f32 are decoded as they are needed.
pub fn attention(
    q: &[f32],
    keys: &KvRows,
    values: &KvRows,
    shape: AttentionShape,
    out: &mut [f32],
) {
    let AttentionShape { heads, kv_heads, head_dim, capacity, start, window } = shape;
    let stride = heads * head_dim;
    let queries = q.len() / stride;
    assert_eq!(q.len(), out.len(), "queries and outputs differ in length");
    assert!(start + queries <= capacity, "more positions than the cache holds");
    let scale = 1.0 / (head_dim as f32).sqrt();
    let dst = DisjointMut::new(out);
    let blocks = queries.div_ceil(QUERIES);
    SpinPool::global().each(heads * blocks, |task| {
        let (head, first) = (task % heads, task / heads * QUERIES);
        let count = QUERIES.min(queries - first);
        let end = start + first + count;
        let begin = window.map_or(0, |w| (start + first + 1).saturating_sub(w));
        let span = end - begin;
        let cache = head / (heads / kv_heads) * capacity;
        let rows = cache + begin..cache + end;
        let decoded = |rows: &KvRows| if rows.decodes() { span * head_dim } else { 0 };
        let (key_len, value_len) = (decoded(keys), decoded(values));
        with_scratch(count * span + key_len + value_len, |scratch| {
            let (scores, scratch) = scratch.split_at_mut(count * span);
            let (key_scratch, value_scratch) = scratch.split_at_mut(key_len);
            let keys = keys.read(rows.clone(), head_dim, key_scratch);
            let values = values.read(rows.clone(), head_dim, value_scratch);
            let q = View::rows(&q[first * stride + head * head_dim..], count, head_dim, stride);
            matmul(scores, span, false, scale, q, View::rows(keys, span, head_dim, head_dim).t());
            for (i, row) in scores.chunks_exact_mut(span).enumerate() {
                let position = start + first + i;
                let low = window.map_or(0, |w| (position + 1).saturating_sub(w)) - begin;
                row[..low].fill(f32::NEG_INFINITY);
                row[position + 1 - begin..].fill(f32::NEG_INFINITY);
                softmax(row);
            }
            let values = View::rows(values, span, head_dim, head_dim);
            // SAFETY: this head's channels of these queries belong to this task alone.
            unsafe {
                let dst = dst.at(first * stride + head * head_dim);
                matmul_into(dst, stride, false, 1.0, View::rows(scores, count, span, span), values);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::PlainType;
    use anybit_core::ActivationQuantizer;
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    /// Bits of stored values: f32, f16 or packed.
    pub(super) const BITS: [u8; 6] = [32, 16, 8, 4, 3, 2];

    /// `x` stored as rows of `cols` at `bits`, and the values that they have there.
    pub(super) fn stored(x: &[f32], cols: usize, bits: u8) -> (KvRows, Vec<f32>) {
        let quantizer = (bits <= 8).then(|| ActivationQuantizer {
            half: true,
            ..ActivationQuantizer::plain(cols, bits, bits == 4)
        });
        let plain = if bits == 32 { PlainType::F32 } else { PlainType::F16 };
        let count = x.len() / cols;
        let mut rows = KvRows::new(count, cols, quantizer.as_ref(), plain);
        x.chunks_exact(cols).enumerate().for_each(|(row, x)| rows.store(row, x));
        let mut scratch = vec![0.0; x.len()];
        let values = rows.read(0..count, cols, &mut scratch).to_vec();
        (rows, values)
    }

    /// The scalar twin.
    pub(super) fn naive(q: &[f32], k: &[f32], v: &[f32], s: AttentionShape) -> Vec<f32> {
        let stride = s.heads * s.head_dim;
        let mut out = vec![0f32; q.len()];
        for t in 0..q.len() / stride {
            let position = s.start + t;
            let low = s.window.map_or(0, |w| (position + 1).saturating_sub(w));
            for h in 0..s.heads {
                let at = |p: usize| (h / (s.heads / s.kv_heads) * s.capacity + p) * s.head_dim;
                let q = &q[t * stride + h * s.head_dim..][..s.head_dim];
                let score = |p: usize| {
                    let dot: f32 = q.iter().zip(&k[at(p)..]).map(|(a, b)| a * b).sum();
                    (dot / (s.head_dim as f32).sqrt()) as f64
                };
                let max = (low..=position).map(score).fold(f64::MIN, f64::max);
                let sum: f64 = (low..=position).map(|p| (score(p) - max).exp()).sum();
                for c in 0..s.head_dim {
                    let value: f64 = (low..=position)
                        .map(|p| (score(p) - max).exp() / sum * v[at(p) + c] as f64)
                        .sum();
                    out[t * stride + h * s.head_dim + c] = value as f32;
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_the_scalar_twin(kv_heads in 1usize..3, group in 1usize..4, half in 1usize..9,
                                  start in 0usize..70, queries in 1usize..140,
                                  window in prop::option::of(1usize..90), seed in any::<u64>()) {
            let shape = AttentionShape {
                heads: kv_heads * group, kv_heads, head_dim: 2 * half,
                capacity: start + queries + 3, start, window,
            };
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let q = normals(queries * shape.heads * shape.head_dim);
            let k = normals(kv_heads * shape.capacity * shape.head_dim);
            let v = normals(k.len());
            let mut out = vec![0.0; q.len()];
            let rows = |x: &[f32]| KvRows::Plain(x.to_vec());
            attention(&q, &rows(&k), &rows(&v), shape, &mut out);
            for (a, b) in out.iter().zip(naive(&q, &k, &v, shape)) {
                prop_assert!((a - b).abs() < 2e-5, "{a} {b}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// However keys and values are stored, prefill gives what their values give in f32, bit for
        /// bit, and near what a query at a time gives.
        #[test]
        fn every_storage_is_its_values(kv_heads in 1usize..3, group in 1usize..4,
                                       head_dim in 1usize..40, start in 0usize..40,
                                       queries in 0usize..80,
                                       window in prop::option::of(1usize..60),
                                       key in 0usize..6, value in 0usize..6, seed in any::<u64>()) {
            let capacity = start + queries + 1;
            let heads = kv_heads * group;
            let shape = AttentionShape { heads, kv_heads, head_dim, capacity, start, window };
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let q = normals(queries * heads * head_dim);
            let count = kv_heads * capacity * head_dim;
            let (keys, k) = stored(&normals(count), head_dim, BITS[key]);
            let (values, v) = stored(&normals(count), head_dim, BITS[value]);
            let (k, v) = (KvRows::Plain(k), KvRows::Plain(v));
            let (mut packed, mut plain) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
            attention(&q, &keys, &values, shape, &mut packed);
            attention(&q, &k, &v, shape, &mut plain);
            prop_assert_eq!(&packed, &plain);
            let width = heads * head_dim;
            let mut one = vec![f32::NAN; width];
            for (at, (q, out)) in q.chunks(width).zip(packed.chunks(width)).enumerate() {
                let shape = AttentionShape { start: start + at, ..shape };
                let query = |_| Query { q, keys: &keys, values: &values, shape };
                attention_decode(1, query, &mut one);
                for (a, b) in one.iter().zip(out) {
                    prop_assert!((a - b).abs() < 5e-5 * (1.0 + b.abs()), "{a} {b}");
                }
            }
        }
    }
}
