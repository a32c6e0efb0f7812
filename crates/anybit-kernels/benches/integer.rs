//! Linears in integers: bytes times bytes, four bits times four bits (which are bytes too), and
//! signs times signs by popcount and as bytes.
//!
//! Activations are on their grids already: rounding them costs all the same.

mod common;

use std::fmt;
use std::hint::black_box;

use anybit_core::rounding::{half_integer, nearest};
use anybit_core::{ActivationQuantizer, GridSpec, Matrix, QuantizedMatrix, RowScale, ScaleFit};
use anybit_kernels::{BinaryWeight, IntegerWeight, QuantizedRows, quantize_rows};
use common::{SIZES, Size, normals};
use divan::Bencher;
use divan::counter::ItemsCount;

fn main() {
    common::run();
}

#[derive(Clone, Copy)]
struct Case {
    size: Size,
    tokens: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} tokens", self.size, self.tokens)
    }
}

impl Case {
    fn weights(&self) -> Matrix {
        let Size { cols, rows } = self.size;
        let data = normals(rows * cols, 1).into_iter().map(|w| 0.02 * w).collect();
        Matrix { rows, cols, data }
    }

    fn activations(&self, quantizer: &ActivationQuantizer) -> QuantizedRows {
        let x = normals(self.tokens * self.size.cols, 2);
        let mut rows = QuantizedRows::default();
        quantize_rows(quantizer, &x, &mut rows);
        rows
    }

    fn time(&self, bencher: Bencher<'_, '_>, mut forward: impl FnMut(&mut [f32])) {
        let Size { cols, rows } = self.size;
        let mut y = vec![0.0; self.tokens * rows];
        bencher
            .counter(ItemsCount::new(self.tokens * rows * cols))
            .bench_local(|| forward(black_box(&mut y[..])));
    }
}

/// Both usual sizes, and a square between them.
fn cases() -> Vec<Case> {
    let sizes = SIZES.into_iter().chain([Size { cols: 2048, rows: 2048 }]);
    sizes.flat_map(|size| [1, 16, 512].map(|tokens| Case { size, tokens })).collect()
}

/// Symmetric weights of `bits` bits, a scale per `group`, times symmetric activations of as many.
fn uniform(bencher: Bencher<'_, '_>, case: Case, bits: u8, group: Option<usize>) {
    let grid = GridSpec::affine(bits, true, group);
    let plane = nearest(&case.weights(), grid, ScaleFit::MinMax).expect("finite weights");
    let matrix = QuantizedMatrix::single(plane);
    let weight = IntegerWeight::new(&matrix, &[case.size.cols]).expect("an affine matrix");
    let x = case.activations(&ActivationQuantizer::plain(case.size.cols, bits, true));
    case.time(bencher, |y| weight.forward(&x, None, y));
}

#[divan::bench(args = cases())]
fn w8a8(bencher: Bencher<'_, '_>, case: Case) {
    uniform(bencher, case, 8, None);
}

#[divan::bench(args = cases())]
fn w4a4(bencher: Bencher<'_, '_>, case: Case) {
    uniform(bencher, case, 4, None);
}

#[divan::bench(args = cases())]
fn w4a4_groups_of_64(bencher: Bencher<'_, '_>, case: Case) {
    uniform(bencher, case, 4, Some(64));
}

/// Signs on both sides.
fn signs(case: Case) -> (QuantizedMatrix, QuantizedRows) {
    let plane = half_integer(&case.weights(), 1, None, RowScale::Rms).expect("finite weights");
    let quantizer = ActivationQuantizer::half_integer(case.size.cols, 1, RowScale::Rms);
    (QuantizedMatrix::single(plane), case.activations(&quantizer))
}

#[divan::bench(args = cases())]
fn w1a1_popcount(bencher: Bencher<'_, '_>, case: Case) {
    let (matrix, x) = signs(case);
    let weight = BinaryWeight::new(&matrix, &[case.size.cols], &[1]).expect("a matrix of signs");
    case.time(bencher, |y| weight.forward(&x, None, y));
}

#[divan::bench(args = cases())]
fn w1a1_bytes(bencher: Bencher<'_, '_>, case: Case) {
    let (matrix, x) = signs(case);
    let weight = IntegerWeight::new(&matrix, &[case.size.cols]).expect("an affine matrix");
    case.time(bencher, |y| weight.forward(&x, None, y));
}
