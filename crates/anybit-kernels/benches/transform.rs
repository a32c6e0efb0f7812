//! Online transforms and quantizers of activations. Items are operations on numbers, bytes those of
//! the rows. Their loops do not follow `ANYBIT_ISA`.

mod common;

use std::hint::black_box;

use anybit_core::transform::kronecker_sizes;
use anybit_core::{ActivationQuantizer, Hadamard, Matrix, Transform};
use anybit_kernels::{QuantizedRows, quantize_rows, transform_rows};
use common::{Rows, cases, normals};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};

fn main() {
    common::run();
}

/// Channels of both models, outside and inside their MLPs.
const CHANNELS: [usize; 4] = [576, 1536, 2048, 5632];

/// In place, again and again: what is applied has to be orthogonal.
fn time(bencher: Bencher<'_, '_>, case: Rows, transform: &Transform) {
    let mut x = normals(case.tokens * case.channels, 1);
    bencher
        .counter(BytesCount::new(4 * x.len()))
        .counter(ItemsCount::new(case.tokens * transform.flops()))
        .bench_local(|| transform_rows(transform, black_box(&mut x[..])));
}

/// Walsh–Hadamard, with a factor of another order where the channels are no power of two.
#[divan::bench(args = cases(CHANNELS))]
fn hadamard(bencher: Bencher<'_, '_>, case: Rows) {
    let map = Hadamard::new(case.channels).expect("an order that is known");
    time(bencher, case, &Transform::Hadamard(map));
}

/// Blocks of 128 channels or, where they do not divide a row, of 64.
#[divan::bench(args = cases(CHANNELS))]
fn walsh_hadamard_blocks(bencher: Bencher<'_, '_>, case: Rows) {
    let block = if case.channels.is_multiple_of(128) { 128 } else { 64 };
    let map = Hadamard::blocks(case.channels, block).expect("a power of two");
    time(bencher, case, &Transform::Hadamard(map));
}

/// A dense matrix that moves every channel by one: orthogonal, and as slow as any other.
fn shift(n: usize) -> Matrix {
    let mut matrix = Matrix::zeros(n, n);
    (0..n).for_each(|i| matrix.row_mut(i)[(i + 1) % n] = 1.0);
    matrix
}

#[divan::bench(args = cases(CHANNELS))]
fn kronecker(bencher: Bencher<'_, '_>, case: Rows) {
    let sizes = kronecker_sizes(case.channels);
    let (left, right) = (Some(shift(sizes.0)), Some(shift(sizes.1)));
    time(bencher, case, &Transform::Kronecker { sizes, left, right });
}

/// Activations to codes. Items are numbers.
#[divan::bench(args = cases(CHANNELS))]
fn quantize_to_4_bits(bencher: Bencher<'_, '_>, case: Rows) {
    quantize(bencher, case, &ActivationQuantizer::plain(case.channels, 4, false));
}

/// As [`quantize_to_4_bits`].
#[divan::bench(args = cases(CHANNELS))]
fn quantize_to_8_bits(bencher: Bencher<'_, '_>, case: Rows) {
    quantize(bencher, case, &ActivationQuantizer::plain(case.channels, 8, true));
}

fn quantize(bencher: Bencher<'_, '_>, case: Rows, quantizer: &ActivationQuantizer) {
    let x = normals(case.tokens * case.channels, 1);
    let mut rows = QuantizedRows::default();
    bencher
        .counter(BytesCount::new(4 * x.len()))
        .counter(ItemsCount::new(x.len()))
        .bench_local(|| quantize_rows(quantizer, black_box(&x[..]), &mut rows));
}
