//! Dense linears in f32, bf16 and f16, and packed ones on the path of many tokens: few tokens go
//! through dot products, many through GEMM on tiles of rows that were decoded to f32.
//!
//! Bytes are those of the weight as it is stored.

mod common;

use std::fmt;
use std::hint::black_box;
use std::ops::Range;

use anybit_core::{GridSpec, HalfRow, Matrix, QuantizedMatrix, RowSource};
use anybit_kernels::{PackedWeight, linear};
use common::{SIZES, Size, normals, random_plane};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::{bf16, f16};

fn main() {
    common::run();
}

/// Tokens: up to four are few.
const TOKENS: [usize; 4] = [1, 4, 32, 512];

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

fn cases() -> Vec<Case> {
    let of = |size| TOKENS.into_iter().map(move |tokens| Case { size, tokens });
    SIZES.into_iter().flat_map(of).collect()
}

/// Sixteen-bit numbers as a checkpoint has them, decoded as `anybit-io` does.
struct Stored {
    size: Size,
    bytes: Vec<u8>,
    is_f16: bool,
}

fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = f16::from_le_bytes(*bytes).to_f32();
    }
}

fn decode_bf16(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *out = f32::from_bits((u16::from_le_bytes(*bytes) as u32) << 16);
    }
}

impl RowSource for Stored {
    fn shape(&self) -> (usize, usize) {
        (self.size.rows, self.size.cols)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let row_bytes = 2 * self.size.cols;
        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
        if self.is_f16 { decode_f16(bytes, out) } else { decode_bf16(bytes, out) }
    }

    fn stored_bytes(&self) -> usize {
        self.bytes.len()
    }

    fn half_row(&self, row: usize) -> Option<HalfRow<'_>> {
        let row = &self.bytes.as_chunks().0[row * self.size.cols..(row + 1) * self.size.cols];
        Some(if self.is_f16 { HalfRow::F16(row) } else { HalfRow::Bf16(row) })
    }
}

fn products(bencher: Bencher<'_, '_>, tokens: usize, weight: &dyn RowSource) {
    let (rows, cols) = weight.shape();
    let x = normals(tokens * cols, 2);
    let mut y = vec![0.0; tokens * rows];
    bencher
        .counter(BytesCount::new(weight.stored_bytes()))
        .counter(ItemsCount::new(tokens * rows * cols))
        .bench_local(|| linear(black_box(&x[..]), weight, None, &mut y));
}

#[divan::bench(args = cases())]
fn dense_f32(bencher: Bencher<'_, '_>, case: Case) {
    let Size { cols, rows } = case.size;
    let weight = Matrix { rows, cols, data: normals(rows * cols, 1) };
    products(bencher, case.tokens, &weight);
}

#[divan::bench(args = cases())]
fn dense_f16(bencher: Bencher<'_, '_>, case: Case) {
    let values = normals(case.size.rows * case.size.cols, 1);
    let bytes = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
    let weight = Stored { size: case.size, bytes, is_f16: true };
    products(bencher, case.tokens, &weight);
}

#[divan::bench(args = cases())]
fn dense_bf16(bencher: Bencher<'_, '_>, case: Case) {
    let values = normals(case.size.rows * case.size.cols, 1);
    let bytes = values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let weight = Stored { size: case.size, bytes, is_f16: false };
    products(bencher, case.tokens, &weight);
}

/// Rows decoded from kernel order: what a prompt of a packed model takes.
#[divan::bench(args = cases())]
fn packed_4_bits(bencher: Bencher<'_, '_>, case: Case) {
    let plane = random_plane(GridSpec::affine(4, true, Some(64)), case.size);
    let matrix = QuantizedMatrix::single(plane);
    let weight = PackedWeight::new(&matrix).expect("a grouping that kernels know");
    products(bencher, case.tokens, &weight);
}
