//! RMSNorm. Items are numbers, bytes those that are read.

mod common;

use std::fmt;
use std::hint::black_box;

use anybit_kernels::rms_norm;
use common::normals;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

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

fn cases() -> Vec<Case> {
    let of = |channels| [1, 256].map(|tokens| Case { channels, tokens });
    [576, 2048].into_iter().flat_map(of).collect()
}

#[divan::bench(args = cases())]
fn rms(bencher: Bencher<'_, '_>, case: Case) {
    let (x, weight) = (normals(case.tokens * case.channels, 1), normals(case.channels, 2));
    let mut y = vec![0.0; x.len()];
    bencher
        .counter(BytesCount::new(4 * x.len()))
        .counter(ItemsCount::new(x.len()))
        .bench_local(|| rms_norm(black_box(&x[..]), &weight, 1e-5, &mut y));
}
