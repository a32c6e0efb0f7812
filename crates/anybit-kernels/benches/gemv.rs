//! Products straight from packed codes: every width, every kind of grid, few tokens.
//!
//! Bytes are those of a pass over the weight. Weights of the two usual sizes lie in caches, so that
//! their rates say what taking codes apart costs; `beyond_caches` is a vocabulary's weight, whose
//! rate is a share of what `memory` says.

mod common;

use std::fmt;
use std::hint::black_box;

use anybit_core::{ActivationQuantizer, GridSpec, QuantizedMatrix, RowSource};
use anybit_kernels::gemv::{Input, PackedWeight, Product, Scratch, gemv};
use anybit_kernels::{QuantizedRows, SpinPool, quantize_rows};
use common::{SIZES, Size, normals, random_plane};
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::f16;

fn main() {
    common::run();
}

/// A grid, a size and so many tokens.
#[derive(Clone, Copy)]
struct Case {
    size: Size,
    grid: GridSpec,
    column_scale: bool,
    tokens: usize,
}

impl Case {
    fn new(size: Size, grid: GridSpec) -> Self {
        Self { size, grid, column_scale: false, tokens: 1 }
    }

    fn weight(&self) -> PackedWeight {
        let Size { rows, cols } = self.size;
        let scale = self.column_scale.then(|| vec![f16::from_f32(1.25); cols]);
        let planes = vec![random_plane(self.grid, self.size)];
        let matrix = QuantizedMatrix::from_planes((rows, cols), planes, 1, scale, None)
            .expect("a plane of the matrix's size");
        PackedWeight::new(&matrix).expect("a grouping that kernels know")
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.grid {
            GridSpec::Codebook { bits } | GridSpec::SharedCodebook { bits, .. } => {
                write!(f, "{}, {} entries", self.size, 1u32 << bits)?;
            }
            grid => write!(f, "{}, {} bits", self.size, grid.bits())?,
        }
        match self.grid.group_size() {
            Some(group) => write!(f, ", groups of {group}")?,
            None => f.write_str(", whole rows")?,
        }
        if self.column_scale {
            f.write_str(", column scale")?;
        }
        if self.tokens > 1 {
            write!(f, ", {} tokens", self.tokens)?;
        }
        Ok(())
    }
}

/// Times products with one weight.
fn products(bencher: Bencher<'_, '_>, case: Case, input: Input<'_>) {
    let weight = case.weight();
    let (rows, cols) = weight.shape();
    let mut y = vec![0.0; case.tokens * rows];
    let mut scratch = Scratch::default();
    bencher
        .counter(BytesCount::new(weight.pass_bytes()))
        .counter(ItemsCount::new(case.tokens * rows * cols))
        .bench_local(|| {
            let mut products = [Product { weight: &weight, bias: None, y: &mut y }];
            gemv(black_box(input), &mut products, &mut scratch);
        });
}

fn with_values(bencher: Bencher<'_, '_>, case: Case) {
    let x = normals(case.tokens * case.size.cols, 2);
    products(bencher, case, Input::Values(&x));
}

/// [`Case::new`] for each size and grid.
fn cases(grids: impl Iterator<Item = GridSpec> + Clone) -> Vec<Case> {
    let of = |size| grids.clone().map(move |grid| Case::new(size, grid));
    SIZES.into_iter().flat_map(of).collect()
}

/// The grids of `bits` bits that have groups: 32, 64 and whole rows.
fn groups(grid: impl Fn(Option<usize>) -> GridSpec) -> [GridSpec; 3] {
    [Some(32), Some(64), None].map(grid)
}

fn uniform_cases() -> Vec<Case> {
    cases((1..=8).flat_map(|bits| groups(|group| GridSpec::affine(bits, true, group))))
}

#[divan::bench(args = uniform_cases())]
fn uniform(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn asymmetric_cases() -> Vec<Case> {
    let widths = [2, 3, 4, 8].into_iter();
    cases(widths.flat_map(|bits| groups(|group| GridSpec::affine(bits, false, group))))
}

/// Zero points are stored.
#[divan::bench(args = asymmetric_cases())]
fn asymmetric(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn codebook_cases() -> Vec<Case> {
    let plain = cases((1..=8).map(|bits| GridSpec::Codebook { bits }));
    let scaled = plain.iter().map(|case| Case { column_scale: true, ..*case });
    plain.iter().copied().chain(scaled).collect()
}

/// A table per row, as AWQ and SKIM scale their columns and without.
#[divan::bench(args = codebook_cases())]
fn codebook(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn shared_cases() -> Vec<Case> {
    let widths = [2, 3, 4, 8].into_iter();
    cases(widths.map(|bits| GridSpec::SharedCodebook { bits, group_size: Some(64) }))
}

/// One table, a scale per group.
#[divan::bench(args = shared_cases())]
fn shared_codebook(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn column_scale_cases() -> Vec<Case> {
    let widths = [2, 4, 8].into_iter();
    let plain = cases(widths.map(|bits| GridSpec::affine(bits, true, Some(64))));
    plain.into_iter().map(|case| Case { column_scale: true, ..case }).collect()
}

/// Beside [`uniform`].
#[divan::bench(args = column_scale_cases())]
fn column_scale(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn batch_cases() -> Vec<Case> {
    let with = |tokens: usize| {
        let plain = cases([2, 4, 8].into_iter().map(|bits| GridSpec::affine(bits, true, Some(64))));
        plain.into_iter().map(move |case| Case { tokens, ..case })
    };
    [2, 4, 8, 32].into_iter().flat_map(with).collect()
}

/// Sequences that advance together.
#[divan::bench(args = batch_cases())]
fn batch(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

fn code_cases() -> Vec<Case> {
    cases([4, 8].into_iter().map(|bits| GridSpec::affine(bits, true, Some(64))))
}

/// Inputs of eight bits, whose products are exact.
#[divan::bench(args = code_cases())]
fn codes(bencher: Bencher<'_, '_>, case: Case) {
    let x = normals(case.tokens * case.size.cols, 2);
    let mut rows = QuantizedRows::default();
    quantize_rows(&ActivationQuantizer::plain(case.size.cols, 8, true), &x, &mut rows);
    products(bencher, case, Input::Codes(&rows));
}

fn beyond_cases() -> Vec<Case> {
    let uniform = (1..=8).map(|bits| GridSpec::affine(bits, true, None));
    let grouped = [(2, 64), (4, 64), (6, 64), (8, 64), (4, 32)].into_iter();
    let grouped = grouped.map(|(bits, group)| GridSpec::affine(bits, true, Some(group)));
    let codebooks = (1..=8).map(|bits| GridSpec::Codebook { bits });
    let size = Size { cols: 2048, rows: 49152 };
    uniform.chain(grouped).chain(codebooks).map(|grid| Case::new(size, grid)).collect()
}

/// A weight that no cache holds.
#[divan::bench(args = beyond_cases())]
fn beyond_caches(bencher: Bencher<'_, '_>, case: Case) {
    with_values(bencher, case);
}

/// What the threads of the pool read from memory together: the most that [`beyond_caches`] can
/// have.
#[divan::bench]
fn memory(bencher: Bencher<'_, '_>) {
    // Ones: pages of zeros that were never written would all be one page.
    let words = vec![1u64; 32 << 20];
    let pool = SpinPool::global();
    let share = words.len() / pool.threads();
    bencher.counter(BytesCount::new(8 * share * pool.threads())).bench_local(|| {
        pool.run(&|worker| {
            let mut sums = [0u64; 16];
            for chunk in words[worker * share..(worker + 1) * share].as_chunks::<16>().0 {
                sums.iter_mut().zip(chunk).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
            }
            black_box(sums);
        });
    });
}
