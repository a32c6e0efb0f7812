//! `y = x Wᵀ + b` in integers, for packed affine weights and quantized activations.
//!
//! In a group of columns a weight is `(u − z_w)·s_w` and an activation `(a − z_a)·s_a`, so
//!
//! ```text
//! Σ (u − z_w)(a − z_a)·s_w·s_a = ¼·s_w·s_a·[ 2·(2·Σ u·a − 2z_a·Σ u) − 2z_w·Σ (2a − 2z_a) ]
//! ```
//!
//! The bracket is an exact integer: `2z_w` and `2z_a` are, for half-integer grids too. `Σ u` is
//! known when the weight is loaded and `Σ (2a − 2z_a)` once per token, which leaves one dot product
//! of unsigned with signed bytes per group: the fastest thing that a processor does with such
//! numbers.
//!
//! Integers are exact and groups are added in their order, so a result has the same bits whatever
//! the instruction set, the tiles and the number of threads.

mod binary;
mod coded;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use binary::BinaryWeight;
pub use coded::CodedWeight;

use std::sync::OnceLock;

use anybit_core::bitstream::{unpack_row, words_per_row};
use anybit_core::{GridSpec, Plane, QuantizedMatrix, RowSource};
use rayon::prelude::*;

use crate::isa::isa;
use crate::{DisjointMut, SpinPool};

/// Rows of a micro-tile: each load of an activation is used so many times.
const ROWS: usize = 4;
/// Tokens of a micro-tile: with [`ROWS`] as many sums as sixteen registers leave room for.
const PAIR: usize = 2;
/// Columns up to which the integer of a group fits an i32: `2^13 · 510 · 510 < 2^31`. Longer
/// groups are computed in pieces.
const PIECE: usize = 1 << 13;
/// Bits of codes whose products with two signed bytes add up in an i16: `2 · 63 · 128 < 2^15`.
const NARROW_BITS: u8 = 6;
/// Tokens of a task.
const TOKENS: usize = 256;
/// Bytes of the weights of a task, which stay in the second-level cache while tokens pass.
const TILE_BYTES: usize = 1 << 16;
/// Bytes of the activations that stay in the first-level cache while weights pass.
const BLOCK_BYTES: usize = 1 << 14;
/// Tokens that one task sums.
const FEW_TOKENS: usize = 16;

/// Activations of some tokens on their grids.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct QuantizedRows {
    /// Columns of a row.
    pub cols: usize,
    /// Columns of each segment, which tile a row.
    pub segments: Vec<usize>,
    /// Signed codes, `[tokens, cols]`.
    pub codes: Vec<i8>,
    /// Steps, `[tokens, segments]`.
    pub scales: Vec<f32>,
    /// Twice the zero points in units of codes, −256 to 254, `[tokens, segments]`.
    pub doubled_zeros: Vec<i32>,
}

impl QuantizedRows {
    /// Checks them against the columns and segments of a weight, and counts tokens.
    pub(crate) fn tokens(&self, cols: usize, segments: &[usize]) -> usize {
        let (tokens, parts) = (self.codes.len() / cols, segments.len());
        assert_eq!((self.cols, &self.segments[..]), (cols, segments), "other inputs");
        assert_eq!(self.codes.len(), tokens * cols, "inputs are not whole tokens");
        let grids = (self.scales.len(), self.doubled_zeros.len());
        assert_eq!(grids, (tokens * parts, tokens * parts), "not a grid for each segment");
        tokens
    }
}

/// Columns that share a grid in weights and activations, or a piece of them.
#[derive(Debug, Clone, Copy)]
struct Part {
    segment: usize,
    /// Group within its segment.
    group: usize,
    start: usize,
    end: usize,
    /// Whether the group starts here.
    first: bool,
    /// Whether codes have at most [`NARROW_BITS`].
    narrow: bool,
}

impl Part {
    /// `Σ (2a − 2z_a)` of a token with these codes and doubled zero points.
    fn centred(&self, codes: &[i8], doubled_zeros: &[i32]) -> i32 {
        let sum: i32 = codes[self.start..self.end].iter().map(|a| *a as i32).sum();
        2 * sum - (self.end - self.start) as i32 * doubled_zeros[self.segment]
    }
}

/// What a part's combination needs to know of [`ROWS`] rows, side by side so that it vectorizes.
#[derive(Debug, Clone, Copy, Default)]
struct Lanes {
    /// `¼·s_w`.
    quarter_scales: [f32; ROWS],
    /// `2·z_w`.
    zeros: [i32; ROWS],
    /// `Σ u`.
    sums: [i32; ROWS],
}

impl Lanes {
    /// `Σ (2u − 2z_w)(2a − 2z_a)` from `Σ u·a`, `2z_a` and `Σ (2a − 2z_a)`; nothing overflows in
    /// [`PIECE`] columns.
    #[inline(always)]
    fn integer(&self, lane: usize, dot: i32, zero: i32, centred: i32) -> i32 {
        2 * (2 * dot - zero * self.sums[lane]) - self.zeros[lane] * centred
    }
}

/// A packed affine weight `[out, in]`, unpacked to one byte per weight for integer products.
#[derive(Debug, Clone)]
pub struct IntegerWeight {
    rows: usize,
    cols: usize,
    segments: Vec<usize>,
    parts: Vec<Part>,
    /// `[rows, cols]`.
    codes: Vec<u8>,
    /// `[⌈rows / ROWS⌉, parts]`; lanes behind the last row are zero.
    lanes: Vec<Lanes>,
}

impl IntegerWeight {
    /// Unpacks `matrix` for activations of these segments (columns of each).
    ///
    /// `None` when their products are not sums of integers: codebooks, permuted rows, several row
    /// groups, a column scale, a sparse part, or column groups other than the segments.
    pub fn new(matrix: &QuantizedMatrix, segments: &[usize]) -> Option<Self> {
        let (rows, cols) = matrix.shape();
        let planes = &matrix.planes;
        let affine =
            |p: &Plane| matches!(p.grid, GridSpec::Uniform { .. } | GridSpec::HalfInteger { .. });
        if !is_plain(matrix, segments) || !planes.iter().all(affine) {
            return None;
        }
        let parts = parts_of(planes);
        let mut codes = vec![0; rows * cols];
        codes.par_chunks_mut(cols).enumerate().for_each(|(row, codes)| {
            unpack_planes(planes, row, codes);
        });
        let mut lanes = vec![Lanes::default(); rows.div_ceil(ROWS) * parts.len()];
        lanes.par_chunks_mut(parts.len()).enumerate().for_each(|(block, lanes)| {
            for (lane, row) in (block * ROWS..rows).take(ROWS).enumerate() {
                let codes = nth(&codes, row, cols);
                for (lanes, part) in lanes.iter_mut().zip(&parts) {
                    let plane = &planes[part.segment];
                    lanes.quarter_scales[lane] = 0.25 * plane.scale(row, part.group);
                    lanes.zeros[lane] = doubled_zero(plane, row, part.group);
                    lanes.sums[lane] = codes[part.start..part.end].iter().map(|u| *u as i32).sum();
                }
            }
        });
        let segments = segments.to_vec();
        Some(Self { rows, cols, segments, parts, codes, lanes })
    }

    /// Rows (`out`) and columns (`in`).
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bytes of codes and grids in memory.
    pub fn stored_bytes(&self) -> usize {
        self.codes.len() + size_of_val(&self.lanes[..])
    }

    /// Computes `y[tokens, out] = x · Wᵀ + bias`, where `x` and `W` are the values of their codes.
    ///
    /// # Panics
    /// When `x` has other columns or segments, a zero point outside −128 to 127, or a buffer's
    /// length does not fit.
    pub fn forward(&self, x: &QuantizedRows, bias: Option<&[f32]>, y: &mut [f32]) {
        self.forward_on(Isa::best(), x, bias, y);
    }

    fn forward_on(&self, isa: Isa, x: &QuantizedRows, bias: Option<&[f32]>, y: &mut [f32]) {
        let tokens = self.tokens(x);
        assert_eq!(y.len(), tokens * self.rows, "output has another shape");
        assert!(bias.is_none_or(|b| b.len() == self.rows), "bias has another length");
        let centred = self.centred(x, tokens);
        let job = Job { isa, weight: self, x, centred: &centred, bias, y: DisjointMut::new(y) };
        let tile = self.tile_rows();
        let row_tiles = self.rows.div_ceil(tile);
        let block = (BLOCK_BYTES / self.cols).clamp(2 * PAIR, TOKENS) / PAIR * PAIR;
        SpinPool::global().each(row_tiles * tokens.div_ceil(TOKENS), |task| {
            let (t, first) = (task % row_tiles, task / row_tiles * TOKENS);
            let rows = t * tile..((t + 1) * tile).min(self.rows);
            let last = (first + TOKENS).min(tokens);
            for start in (first..last).step_by(block) {
                let end = (start + block).min(last);
                for row in rows.clone().step_by(ROWS) {
                    // SAFETY: `tile` is a multiple of `ROWS`, so the micro-tiles of these rows
                    // and tokens lie inside this task's part of the output.
                    unsafe {
                        for token in (start..end - (end - start) % PAIR).step_by(PAIR) {
                            job.tile::<PAIR>(row, token);
                        }
                        if !(end - start).is_multiple_of(PAIR) {
                            job.tile::<1>(row, end - 1);
                        }
                    }
                }
            }
        });
    }

    /// The exact integers `Σ (2u − 2z_w)(2a − 2z_a)` of one token and row, one per group of each
    /// segment; `¼·s_w·s_a` times them add up to the output.
    ///
    /// # Panics
    /// As [`Self::forward`], or when token or row do not exist.
    pub fn integers(&self, x: &QuantizedRows, token: usize, row: usize) -> Vec<i64> {
        self.tokens(x);
        let (u, a) = (nth(&self.codes, row, self.cols), nth(&x.codes, token, self.cols));
        let zeros = nth(&x.doubled_zeros, token, self.segments.len());
        let lanes = nth(&self.lanes, row / ROWS, self.parts.len());
        let mut integers = Vec::new();
        for (part, lanes) in self.parts.iter().zip(lanes) {
            let dot = dot(&u[part.start..part.end], &a[part.start..part.end], part.narrow);
            let (zero, centred) = (zeros[part.segment], part.centred(a, zeros));
            let integer = lanes.integer(row % ROWS, dot, zero, centred) as i64;
            match integers.last_mut() {
                Some(last) if !part.first => *last += integer,
                _ => integers.push(integer),
            }
        }
        integers
    }

    /// Checks `x` and counts its tokens.
    fn tokens(&self, x: &QuantizedRows) -> usize {
        let tokens = x.tokens(self.cols, &self.segments);
        let fits = |z: &i32| (-256..=254).contains(z);
        assert!(x.doubled_zeros.iter().all(fits), "a zero point that no code reaches");
        tokens
    }

    /// `Σ (2a − 2z_a)`, `[tokens, parts]`.
    fn centred(&self, x: &QuantizedRows, tokens: usize) -> Vec<i32> {
        let parts = self.parts.len();
        let mut sums = vec![0; tokens * parts];
        let fill = |token: usize, sums: &mut [i32]| {
            let codes = nth(&x.codes, token, self.cols);
            let zeros = nth(&x.doubled_zeros, token, self.segments.len());
            for (sum, part) in sums.iter_mut().zip(&self.parts) {
                *sum = part.centred(codes, zeros);
            }
        };
        SpinPool::global().chunks(&mut sums, FEW_TOKENS * parts, |at, sums| {
            let tokens = sums.chunks_exact_mut(parts).enumerate();
            tokens.for_each(|(token, sums)| fill(at * FEW_TOKENS + token, sums));
        });
        sums
    }

    /// Rows of a task, a multiple of [`ROWS`]: equal tasks, so that no thread waits for a larger
    /// one.
    fn tile_rows(&self) -> usize {
        let most = (TILE_BYTES / self.cols).clamp(16, 128);
        self.rows.div_ceil(self.rows.div_ceil(most)).next_multiple_of(ROWS)
    }
}

/// Row `index` of a matrix of rows of `width`.
#[inline(always)]
fn nth<V>(values: &[V], index: usize, width: usize) -> &[V] {
    &values[index * width..][..width]
}

/// Whether `matrix` is nothing but planes side by side, one for each segment.
fn is_plain(matrix: &QuantizedMatrix, segments: &[usize]) -> bool {
    let (rows, cols) = matrix.shape();
    rows * cols > 0
        && matrix.row_perm.is_none()
        && matrix.column_scale.is_none()
        && matrix.sparse.is_none()
        && matrix.row_group_count() == 1
        && matrix.planes.iter().map(|p| p.cols).eq(segments.iter().copied())
}

/// Codes of row `row` of planes side by side.
fn unpack_planes(planes: &[Plane], row: usize, codes: &mut [u8]) {
    let mut rest = codes;
    for plane in planes {
        let (own, tail) = rest.split_at_mut(plane.cols);
        let bits = plane.grid.bits();
        let words = words_per_row(plane.cols, bits);
        unpack_row(nth(&plane.codes, row, words), bits, 0, own);
        rest = tail;
    }
}

/// The parts of a row, in the order of columns.
fn parts_of(planes: &[Plane]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut offset = 0;
    for (segment, plane) in planes.iter().enumerate() {
        let len = plane.grid.group_len(plane.cols);
        let narrow = plane.grid.bits() <= NARROW_BITS;
        for group in 0..plane.grid.groups(plane.cols) {
            let (start, end) = (group * len, ((group + 1) * len).min(plane.cols));
            for piece in (start..end).step_by(PIECE) {
                parts.push(Part {
                    segment,
                    group,
                    start: offset + piece,
                    end: offset + end.min(piece + PIECE),
                    first: piece == start,
                    narrow,
                });
            }
        }
        offset += plane.cols;
    }
    parts
}

/// Twice the zero point of a group: an integer for every affine grid.
fn doubled_zero(plane: &Plane, row: usize, group: usize) -> i32 {
    if !plane.grid.has_zeros() {
        return (2.0 * plane.grid.implied_zero()) as i32;
    }
    let (bits, groups) = (plane.grid.bits(), plane.grid.groups(plane.cols));
    let mut zero = [0];
    unpack_row(nth(&plane.zeros, row, words_per_row(groups, bits)), bits, group, &mut zero);
    2 * zero[0] as i32
}

/// One call of [`IntegerWeight::forward`].
struct Job<'a> {
    isa: Isa,
    weight: &'a IntegerWeight,
    x: &'a QuantizedRows,
    centred: &'a [i32],
    bias: Option<&'a [f32]>,
    y: DisjointMut,
}

impl Job<'_> {
    /// Writes [`ROWS`] rows (or as many as there are) from `row` on, of `T` tokens from `token` on.
    ///
    /// # Safety
    /// These elements of the output must belong to the calling task alone.
    unsafe fn tile<const T: usize>(&self, row: usize, token: usize) {
        use std::array::from_fn;
        let (w, x) = (self.weight, self.x);
        let (parts, segments) = (w.parts.len(), w.segments.len());
        let tile = Tile {
            parts: &w.parts,
            lanes: nth(&w.lanes, row / ROWS, parts),
            // Behind the last row it stands in: its lanes are zero and nobody reads the result.
            u: from_fn(|r| nth(&w.codes, (row + r).min(w.rows - 1), w.cols)),
            a: from_fn(|t| nth(&x.codes, token + t, w.cols)),
            scales: from_fn(|t| nth(&x.scales, token + t, segments)),
            zeros: from_fn(|t| nth(&x.doubled_zeros, token + t, segments)),
            centred: from_fn(|t| nth(self.centred, token + t, parts)),
        };
        let sums: [[f32; ROWS]; T] = match self.isa {
            Isa::Scalar => tile.run(|u, a, _| dots_scalar(u, a)),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: chosen because the machine has these instructions.
            Isa::Avx2 => unsafe { x86::tile_avx2(&tile) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Vnni => unsafe { x86::tile_vnni(&tile) },
        };
        let rows = ROWS.min(w.rows - row);
        for (t, sums) in sums.iter().enumerate() {
            for (r, sum) in sums[..rows].iter().enumerate() {
                let bias = self.bias.map_or(0.0, |b| b[row + r]);
                // SAFETY: inside the output and this task's, by the caller's contract.
                unsafe { *self.y.at((token + t) * w.rows + row + r) = sum + bias };
            }
        }
    }
}

/// [`ROWS`] rows of the weight and `T` tokens.
struct Tile<'a, const T: usize> {
    parts: &'a [Part],
    /// Of each part.
    lanes: &'a [Lanes],
    u: [&'a [u8]; ROWS],
    a: [&'a [i8]; T],
    /// Of each segment.
    scales: [&'a [f32]; T],
    /// Of each segment, doubled.
    zeros: [&'a [i32]; T],
    /// Of each part.
    centred: [&'a [i32]; T],
}

impl<const T: usize> Tile<'_, T> {
    /// The products, given dot products of slices of equal lengths. Inlined, so that it is
    /// compiled for the instruction set of `dots`.
    #[inline(always)]
    fn run(
        &self,
        dots: impl Fn([&[u8]; ROWS], [&[i8]; T], bool) -> [[i32; ROWS]; T],
    ) -> [[f32; ROWS]; T] {
        let mut y = [[0f32; ROWS]; T];
        for (p, (part, lanes)) in self.parts.iter().zip(self.lanes).enumerate() {
            let u = self.u.map(|u| &u[part.start..part.end]);
            let a = self.a.map(|a| &a[part.start..part.end]);
            let sums = dots(u, a, part.narrow);
            for t in 0..T {
                let (scale, zero) = (self.scales[t][part.segment], self.zeros[t][part.segment]);
                let centred = self.centred[t][p];
                for r in 0..ROWS {
                    let integer = lanes.integer(r, sums[t][r], zero, centred);
                    y[t][r] += integer as f32 * (lanes.quarter_scales[r] * scale);
                }
            }
        }
        y
    }
}

/// Instructions that dot products use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Isa {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Vnni,
}

impl Isa {
    /// All, the best first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Vnni,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Scalar,
    ];

    /// Whether this machine has it.
    fn detected(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni")
            }
        }
    }

    /// The best that this machine has and [`isa`] allows.
    fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        let found = || Self::ALL.iter().copied().find(|own| own.detected() && own.level() <= isa());
        *BEST.get_or_init(|| found().unwrap_or(Self::Scalar))
    }

    /// The level that it belongs to.
    fn level(self) -> crate::isa::Isa {
        match self {
            Self::Scalar => crate::isa::Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => crate::isa::Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Vnni => crate::isa::Isa::Avx512,
        }
    }

    /// Dot products of `R` rows (at most [`ROWS`]; the rest of the result is zero) with `T` tokens.
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))]
    fn dots<const R: usize, const T: usize>(
        self,
        u: [&[u8]; R],
        a: [&[i8]; T],
        narrow: bool,
    ) -> [[i32; ROWS]; T] {
        let len = a[0].len();
        let equal = u.iter().all(|u| u.len() == len) && a.iter().all(|a| a.len() == len);
        assert!(equal, "factors have different lengths");
        match self {
            Self::Scalar => dots_scalar(u, a),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: chosen because the machine has these instructions; lengths are equal.
            Self::Avx2 => unsafe {
                match narrow {
                    true => x86::dots_avx2::<R, T, true>(u, a),
                    false => x86::dots_avx2::<R, T, false>(u, a),
                }
            },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Self::Vnni => unsafe { x86::dots_vnni(u, a) },
        }
    }
}

/// `Σ u·a`, the scalar twin.
pub fn dot_scalar(u: &[u8], a: &[i8]) -> i32 {
    u.iter().zip(a).map(|(u, a)| *u as i32 * *a as i32).sum()
}

/// `Σ u·a` with the best instructions of this machine. `narrow` says that no `u` exceeds 63, which
/// is faster; the result is wrong where one does.
///
/// # Panics
/// When the lengths differ.
pub fn dot(u: &[u8], a: &[i8], narrow: bool) -> i32 {
    Isa::best().dots([u], [a], narrow)[0][0]
}

/// Dot products of each row with each token.
#[inline(always)]
fn dots_scalar<const R: usize, const T: usize>(u: [&[u8]; R], a: [&[i8]; T]) -> [[i32; ROWS]; T] {
    let mut out = [[0; ROWS]; T];
    for (out, a) in out.iter_mut().zip(a) {
        for (out, u) in out.iter_mut().zip(u) {
            *out = dot_scalar(u, a);
        }
    }
    out
}
