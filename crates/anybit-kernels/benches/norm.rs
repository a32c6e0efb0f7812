//! RMSNorm. Items are numbers, bytes those that are read.

mod common;

use std::hint::black_box;

use anybit_kernels::rms_norm;
use common::{Rows, cases, normals};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

fn main() {
    common::run();
}

#[divan::bench(args = cases([576, 2048]))]
fn rms(bencher: Bencher<'_, '_>, case: Rows) {
    let (x, weight) = (normals(case.tokens * case.channels, 1), normals(case.channels, 2));
    let mut y = vec![0.0; x.len()];
    bencher
        .counter(BytesCount::new(4 * x.len()))
        .counter(ItemsCount::new(x.len()))
        .bench_local(|| rms_norm(black_box(&x[..]), &weight, 1e-5, &mut y));
}
