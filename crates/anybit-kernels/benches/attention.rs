//! Attention over every kind of cache: of one query, as decoding asks for it, and of a prompt.
//!
//! Its loops are compiled for the processors that `.cargo/config.toml` names and do not follow
//! `ANYBIT_ISA`. Bytes are those of the cache that is read.

mod common;

use std::fmt;
use std::hint::black_box;

use anybit_core::ActivationQuantizer;
use anybit_kernels::attention::Query;
use anybit_kernels::{AttentionShape, KvRows, PlainType, attention, attention_decode};
use common::normals;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

fn main() {
    common::run();
}

/// Heads, kv heads and channels of a head: SmolLM2-135M's and TinyLlama-1.1B's.
const HEADS: [(usize, usize, usize); 2] = [(9, 3, 64), (32, 4, 64)];

/// Bits of stored keys and values: f32, f16 or packed.
const BITS: [u8; 6] = [32, 16, 8, 4, 3, 2];

#[derive(Clone, Copy)]
struct Case {
    heads: (usize, usize, usize),
    positions: usize,
    bits: u8,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (heads, kv_heads, _) = self.heads;
        let of = match self.bits {
            32 => "f32".to_string(),
            16 => "f16".to_string(),
            bits => format!("{bits} bits"),
        };
        write!(f, "{heads} heads on {kv_heads}, {} positions, {of}", self.positions)
    }
}

fn cases(positions: &[usize]) -> Vec<Case> {
    let mut cases = Vec::new();
    for heads in HEADS {
        for positions in positions {
            let case = |bits| Case { heads, positions: *positions, bits };
            cases.extend(BITS.map(case));
        }
    }
    cases
}

impl Case {
    fn stored(&self, seed: u64) -> KvRows {
        let (_, kv_heads, head_dim) = self.heads;
        let quantizer = (self.bits <= 8).then(|| ActivationQuantizer {
            half: true,
            ..ActivationQuantizer::plain(head_dim, self.bits, false)
        });
        let plain = if self.bits == 32 { PlainType::F32 } else { PlainType::F16 };
        let count = kv_heads * self.positions;
        let mut rows = KvRows::new(count, head_dim, quantizer.as_ref(), plain);
        let values = normals(count * head_dim, seed);
        values.chunks_exact(head_dim).enumerate().for_each(|(row, x)| rows.store(row, x));
        rows
    }

    /// The shape at position `start` of a cache that is full.
    fn shape(&self, start: usize) -> AttentionShape {
        let (heads, kv_heads, head_dim) = self.heads;
        AttentionShape { heads, kv_heads, head_dim, capacity: self.positions, start, window: None }
    }
}

fn decode_cases() -> Vec<Case> {
    cases(&[256, 2048])
}

#[divan::bench(args = decode_cases())]
fn decode(bencher: Bencher<'_, '_>, case: Case) {
    let (heads, _, head_dim) = case.heads;
    let (keys, values) = (case.stored(1), case.stored(2));
    let q = normals(heads * head_dim, 3);
    let mut out = vec![0.0; q.len()];
    let shape = case.shape(case.positions - 1);
    bencher
        .counter(BytesCount::new(keys.bytes() + values.bytes()))
        .counter(ItemsCount::new(2 * q.len() * case.positions))
        .bench_local(|| {
            let q = black_box(&q[..]);
            let query = |_| Query { q, keys: &keys, values: &values, shape };
            attention_decode(1, query, &mut out);
        });
}

fn prefill_cases() -> Vec<Case> {
    cases(&[512])
}

/// Items are the multiply-adds that the causal mask leaves.
#[divan::bench(args = prefill_cases())]
fn prefill(bencher: Bencher<'_, '_>, case: Case) {
    let (heads, _, head_dim) = case.heads;
    let (keys, values) = (case.stored(1), case.stored(2));
    let q = normals(case.positions * heads * head_dim, 3);
    let mut out = vec![0.0; q.len()];
    bencher
        .counter(ItemsCount::new(q.len() * (case.positions + 1)))
        .bench_local(|| attention(black_box(&q[..]), &keys, &values, case.shape(0), &mut out));
}
