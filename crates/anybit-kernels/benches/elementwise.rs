//! Rotary embedding, softmax and SwiGLU. Items are numbers. Their loops do not follow `ANYBIT_ISA`.

mod common;

use std::fmt;
use std::hint::black_box;

use anybit_kernels::{RopeTable, softmax, swiglu};
use common::normals;
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    common::run();
}

#[derive(Clone, Copy)]
struct Case {
    channels: usize,
    tokens: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} channels, {} tokens", self.channels, self.tokens)
    }
}

fn cases(channels: [usize; 2]) -> Vec<Case> {
    let of = |channels| [1, 256].map(|tokens| Case { channels, tokens });
    channels.into_iter().flat_map(of).collect()
}

/// Heads of 64 channels.
#[divan::bench(args = cases([576, 2048]))]
fn rope(bencher: Bencher<'_, '_>, case: Case) {
    let frequencies = (0..32).map(|i| 10_000f64.powf(-(i as f64) / 32.0)).collect();
    let table = RopeTable::new(frequencies, 1000 + case.tokens);
    let mut x = normals(case.tokens * case.channels, 1);
    bencher.counter(ItemsCount::new(x.len())).bench_local(|| {
        for (token, x) in black_box(&mut x[..]).chunks_exact_mut(case.channels).enumerate() {
            table.rotate(x, 1000 + token);
        }
    });
}

/// In place, so that each call has to have numbers of its own.
#[divan::bench(args = cases([1536, 5632]))]
fn gates(bencher: Bencher<'_, '_>, case: Case) {
    let count = case.tokens * case.channels;
    let (gate, up) = (normals(count, 1), normals(count, 2));
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| gate.clone())
        .bench_local_refs(|gate| swiglu(gate, &up));
}

/// As [`gates`].
#[divan::bench(args = [256, 2048, 49152])]
fn softmax_of(bencher: Bencher<'_, '_>, count: usize) {
    let row = normals(count, 1);
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| row.clone())
        .bench_local_refs(|row| softmax(row));
}
