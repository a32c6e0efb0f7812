//! Rotary embedding, softmax and SwiGLU. Items are numbers. Their loops do not follow `ANYBIT_ISA`.

mod common;

use std::hint::black_box;

use anybit_kernels::{RopeTable, softmax, swiglu};
use common::{Rows, cases, normals};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    common::run();
}

/// Heads of 64 channels.
#[divan::bench(args = cases([576, 2048]))]
fn rope(bencher: Bencher<'_, '_>, case: Rows) {
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
fn gates(bencher: Bencher<'_, '_>, case: Rows) {
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
