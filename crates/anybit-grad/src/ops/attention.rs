//! Causal attention with grouped keys, `y = softmax(q kᵀ / √d) v`, in blocks of queries.
//!
//! The forward keeps `ln Σ e^s` per query and head; the backward recomputes a block's
//! probabilities from it, so that memory grows with the tokens and not with their square. All
//! products are GEMMs on one head's channels, in place with strides.

use std::ops::Range;

use anybit_core::linalg::{View, matmul, matmul_into};
use anybit_kernels::activation::exp;
use anybit_kernels::dot::dot;
use anybit_kernels::{DisjointMut, with_scratch};
use rayon::prelude::*;

use crate::tape::{Pass, Slot};
use crate::tiles::softmax_lse;
use crate::{Tape, Tensor, Var};

/// Queries of a block.
const QUERIES: usize = 128;
/// Rows of keys' gradients that one task adds up.
const ROWS: usize = 16;

/// Sizes of an attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Tokens of a sequence; sequences lie one after another.
    pub seqlen: usize,
    /// Keys that a query sees, itself included; `None` for all before it.
    pub window: Option<usize>,
}

impl AttentionSpec {
    fn blocks(&self) -> usize {
        self.seqlen.div_ceil(QUERIES)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Length of a row of queries or outputs.
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Length of a row of keys or values.
    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// First position that the query at `position` sees.
    fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }

    fn block(&self, lane: usize, block: usize) -> Block<'_> {
        let first = block * QUERIES;
        let count = QUERIES.min(self.seqlen - first);
        let begin = self.first_key(first);
        Block { spec: self, lane, first, count, begin, span: first + count - begin }
    }
}

/// A block of queries of one head of one sequence, and the keys that any of them sees.
struct Block<'s> {
    spec: &'s AttentionSpec,
    /// `sequence · heads + head`.
    lane: usize,
    /// Position of the first query.
    first: usize,
    /// Queries.
    count: usize,
    /// Position of the first key.
    begin: usize,
    /// Keys.
    span: usize,
}

impl Block<'_> {
    /// Where the first query's channels of this head start.
    fn q_offset(&self) -> usize {
        let s = self.spec;
        let (sequence, head) = (self.lane / s.heads, self.lane % s.heads);
        ((sequence * s.seqlen + self.first) * s.heads + head) * s.head_dim
    }

    /// Where the first key's channels of this head's group start.
    fn kv_offset(&self) -> usize {
        let s = self.spec;
        let (sequence, head) = (self.lane / s.heads, self.lane % s.heads);
        let kv_head = head / (s.heads / s.kv_heads);
        ((sequence * s.seqlen + self.begin) * s.kv_heads + kv_head) * s.head_dim
    }

    /// This head's rows of `data`, laid out like the queries: `[count, head_dim]`.
    fn queries<'d>(&self, data: &'d [f32]) -> View<'d> {
        let s = self.spec;
        View::rows(&data[self.q_offset()..], self.count, s.head_dim, s.q_width())
    }

    /// This head's rows of `data`, laid out like the keys: `[span, head_dim]`.
    fn keys<'d>(&self, data: &'d [f32]) -> View<'d> {
        let s = self.spec;
        View::rows(&data[self.kv_offset()..], self.span, s.head_dim, s.kv_width())
    }

    /// A matrix of probabilities or their gradients, `[count, span]`.
    fn scores<'d>(&self, data: &'d [f32]) -> View<'d> {
        View::rows(data, self.count, self.span, self.span)
    }

    /// The keys of the block that query `i` sees.
    fn visible(&self, i: usize) -> Range<usize> {
        let position = self.first + i;
        self.spec.first_key(position) - self.begin..position + 1 - self.begin
    }

    /// Index of query `i` among the normalizers.
    fn lse_index(&self, i: usize) -> usize {
        self.lane * self.spec.seqlen + self.first + i
    }

    /// `p = f(i, s)` where `s` is row `i` of `q kᵀ / √d` within what is visible, 0 outside.
    fn probabilities(
        &self,
        q: &[f32],
        k: &[f32],
        p: &mut [f32],
        mut f: impl FnMut(usize, &mut [f32]),
    ) {
        matmul(p, self.span, false, self.spec.scale(), self.queries(q), self.keys(k).t());
        for (i, row) in p.chunks_exact_mut(self.span).enumerate() {
            let visible = self.visible(i);
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            f(i, &mut row[visible]);
        }
    }
}

/// `y = p v`, `p = softmax(q kᵀ / √d)` and its normalizers, `[sequences · heads, seqlen]`.
fn forward(q: &[f32], k: &[f32], v: &[f32], s: &AttentionSpec, y: &mut [f32], lse: &mut [f32]) {
    let blocks = s.blocks();
    let tasks = lse.len() / s.seqlen.max(1) * blocks;
    let (y, lse) = (DisjointMut::new(y), DisjointMut::new(lse));
    (0..tasks).into_par_iter().for_each(|task| {
        let block = s.block(task / blocks, task % blocks);
        with_scratch(block.count * block.span, |p| {
            block.probabilities(q, k, p, |i, row| {
                let value = softmax_lse(row);
                // SAFETY: the normalizers of this block's queries belong to this task alone.
                unsafe { *lse.at(block.lse_index(i)) = value };
            });
            // SAFETY: this head's channels of these queries belong to this task alone.
            unsafe {
                let y = y.at(block.q_offset());
                matmul_into(y, s.q_width(), false, 1.0, block.scores(p), block.keys(v));
            }
        });
    });
}

/// What the backward reads.
struct Saved<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    y: &'a [f32],
    dy: &'a [f32],
    lse: &'a [f32],
}

/// `dv = pᵀ dy`, `ds = p ∘ (dy vᵀ − rowsum(dy ∘ y))`, `dq = ds k / √d`, `dk = dsᵀ q / √d`.
///
/// `dk` and `dv` are written per query head, `[sequences · heads, seqlen, head_dim]`: a task owns
/// a head of a sequence and goes through its blocks in order.
fn backward(a: &Saved<'_>, s: &AttentionSpec, dq: &mut Slot, dk: &mut [f32], dv: &mut [f32]) {
    let size = s.seqlen * s.head_dim;
    let accumulate = dq.accumulate;
    let dq = DisjointMut::new(&mut dq.data);
    let lanes = dk.par_chunks_mut(size).zip(dv.par_chunks_mut(size));
    lanes.enumerate().for_each(|(lane, (dk, dv))| {
        dk.fill(0.0);
        dv.fill(0.0);
        for index in 0..s.blocks() {
            let block = s.block(lane, index);
            with_scratch(2 * block.count * block.span, |scratch| {
                let (p, ds) = scratch.split_at_mut(block.count * block.span);
                block_scores(a, &block, p, ds);
                let from = block.begin * s.head_dim;
                let (dk, dv) = (&mut dk[from..], &mut dv[from..]);
                let (p, ds) = (block.scores(p), block.scores(ds));
                matmul(dv, s.head_dim, true, 1.0, p.t(), block.queries(a.dy));
                matmul(dk, s.head_dim, true, s.scale(), ds.t(), block.queries(a.q));
                // SAFETY: this head's channels of these queries belong to this task alone.
                unsafe {
                    let dq = dq.at(block.q_offset());
                    matmul_into(dq, s.q_width(), accumulate, s.scale(), ds, block.keys(a.k));
                }
            });
        }
    });
}

/// `p` and `ds` of a block.
fn block_scores(a: &Saved<'_>, block: &Block<'_>, p: &mut [f32], ds: &mut [f32]) {
    let s = block.spec;
    block.probabilities(a.q, a.k, p, |i, row| {
        let lse = a.lse[block.lse_index(i)];
        row.iter_mut().for_each(|v| *v = exp(*v - lse));
    });
    matmul(ds, block.span, false, 1.0, block.queries(a.dy), block.keys(a.v).t());
    for (i, (ds, p)) in ds.chunks_exact_mut(block.span).zip(p.chunks_exact(block.span)).enumerate()
    {
        let at = block.q_offset() + i * s.q_width();
        let mean = dot(&a.dy[at..at + s.head_dim], &a.y[at..at + s.head_dim]);
        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
    }
}

/// Adds the gradients of a group's heads, in their order, into `[rows, kv_heads · head_dim]`.
fn add_groups(per_head: &[f32], s: &AttentionSpec, slot: &mut Slot) {
    let (d, group) = (s.head_dim, s.heads / s.kv_heads);
    let width = s.kv_width();
    slot.ready().par_chunks_mut(ROWS * width).enumerate().for_each(|(task, rows)| {
        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
            let (sequence, position) = ((task * ROWS + i) / s.seqlen, (task * ROWS + i) % s.seqlen);
            for (kv_head, sum) in row.chunks_exact_mut(d).enumerate() {
                for head in kv_head * group..(kv_head + 1) * group {
                    let from = ((sequence * s.heads + head) * s.seqlen + position) * d;
                    sum.iter_mut().zip(&per_head[from..from + d]).for_each(|(s, g)| *s += g);
                }
            }
        }
    });
}

/// Runs [`backward`] between the tape's buffers.
fn pass_back(pass: &mut Pass<'_>, [q, k, v, lse]: [Var; 4], s: &AttentionSpec) {
    let saved = Saved {
        q: pass.value(q),
        k: pass.value(k),
        v: pass.value(v),
        y: pass.output(),
        dy: pass.grad(),
        lse: pass.value(lse),
    };
    let (mut dk, mut dv) = (pass.buffer(saved.q.len()), pass.buffer(saved.q.len()));
    let mut dq = pass.take(q);
    backward(&saved, s, &mut dq, &mut dk, &mut dv);
    pass.put(q, dq);
    for (input, per_head) in [(k, dk), (v, dv)] {
        if pass.wants(input) {
            let mut slot = pass.take(input);
            add_groups(&per_head, s, &mut slot);
            pass.put(input, slot);
        }
        pass.recycle(per_head);
    }
}

impl Tape {
    /// Attention of `q: [rows, heads · head_dim]` over `k` and `v: [rows, kv_heads · head_dim]`,
    /// within sequences of `seqlen` rows.
    ///
    /// # Panics
    /// When the shapes do not fit `spec`.
    pub fn attention(&mut self, q: Var, k: Var, v: Var, spec: AttentionSpec) -> Var {
        let (rows, width) = self.dims(q);
        assert_eq!(width, spec.q_width(), "queries do not fit the heads");
        assert!(rows.is_multiple_of(spec.seqlen), "rows are not made of whole sequences");
        assert!(spec.heads.is_multiple_of(spec.kv_heads), "groups of heads differ");
        for (input, what) in [(k, "keys"), (v, "values")] {
            assert_eq!(self.dims(input), (rows, spec.kv_width()), "{what} do not fit");
        }
        assert!(spec.window != Some(0), "a window of 0 keys");
        let (mut y, mut lse) = (self.buffer(rows * width), self.buffer(rows * spec.heads));
        forward(self.data(q), self.data(k), self.data(v), &spec, &mut y, &mut lse);
        let lse = self.constant(Tensor::new([rows * spec.heads], lse));
        self.custom(&[q, k, v], Tensor::new([rows, width], y), move |pass| {
            pass_back(pass, [q, k, v, lse], &spec);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, normals, random};
    use proptest::prelude::*;

    /// The scalar twin.
    fn naive(q: &[f32], k: &[f32], v: &[f32], s: &AttentionSpec) -> Vec<f32> {
        let mut y = vec![0f32; q.len()];
        for (row, y) in y.chunks_exact_mut(s.q_width()).enumerate() {
            let position = row % s.seqlen;
            for (head, y) in y.chunks_exact_mut(s.head_dim).enumerate() {
                let q = &q[(row * s.heads + head) * s.head_dim..][..s.head_dim];
                let kv_head = head / (s.heads / s.kv_heads);
                let at = |p: usize| ((row - position + p) * s.kv_heads + kv_head) * s.head_dim;
                let keys: Vec<usize> = (s.first_key(position)..=position).collect();
                let weights: Vec<f64> = keys
                    .iter()
                    .map(|p| dot(q, &k[at(*p)..at(*p) + s.head_dim]) * s.scale())
                    .map(|score| (score as f64).exp())
                    .collect();
                let sum: f64 = weights.iter().sum();
                for (c, y) in y.iter_mut().enumerate() {
                    let mix = keys.iter().zip(&weights).map(|(p, w)| w * v[at(*p) + c] as f64);
                    *y = (mix.sum::<f64>() / sum) as f32;
                }
            }
        }
        y
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_the_scalar_twin(sequences in 1usize..3, kv_heads in 1usize..3, group in 1usize..4,
                                  head_dim in 1usize..9, seqlen in 1usize..280,
                                  window in prop::option::of(1usize..200), seed in any::<u64>()) {
            let heads = kv_heads * group;
            let spec = AttentionSpec { heads, kv_heads, head_dim, seqlen, window };
            let rows = sequences * seqlen;
            let q = normals(seed, rows * spec.q_width());
            let k = normals(seed ^ 1, rows * spec.kv_width());
            let v = normals(seed ^ 2, k.len());
            let (mut y, mut lse) = (vec![f32::NAN; q.len()], vec![f32::NAN; rows * heads]);
            forward(&q, &k, &v, &spec, &mut y, &mut lse);
            prop_assert!(lse.iter().all(|l| l.is_finite()));
            for (a, b) in y.iter().zip(naive(&q, &k, &v, &spec)) {
                prop_assert!((a - b).abs() < 2e-5, "{a} {b}");
            }
        }
    }

    fn check(rows: usize, spec: AttentionSpec) {
        let inputs = [
            random(1, [rows, spec.q_width()]),
            random(2, [rows, spec.kv_width()]),
            random(3, [rows, spec.kv_width()]),
        ];
        check_gradients(&inputs, |t, v| t.attention(v[0], v[1], v[2], spec));
    }

    #[test]
    fn gradients() {
        let spec = AttentionSpec { heads: 4, kv_heads: 2, head_dim: 3, seqlen: 7, window: None };
        check(7, spec);
        check(14, spec);
        check(14, AttentionSpec { window: Some(3), ..spec });
        check(14, AttentionSpec { window: Some(1), ..spec });
    }

    #[test]
    fn gradients_over_several_blocks() {
        let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 2, seqlen: 150, window: None };
        check(150, spec);
        check(300, AttentionSpec { window: Some(20), ..spec });
    }

    #[test]
    fn one_tensor_as_query_key_and_value() {
        let spec = AttentionSpec { heads: 2, kv_heads: 2, head_dim: 3, seqlen: 5, window: None };
        check_gradients(&[random(4, [5, 6])], |t, v| t.attention(v[0], v[0], v[0], spec));
    }
}
