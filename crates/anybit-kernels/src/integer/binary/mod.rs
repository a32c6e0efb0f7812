//! `y = x Wᵀ + b` by XOR and popcount, where weights and activations are signs: the half-integer
//! grid of one bit on both sides.
//!
//! With `u ∈ {0, 1}` a weight is `(u − ½)·s_w`, with `a ∈ {−1, 0}` an activation `(a + ½)·s_a`. A
//! bit says that one is negative, `1 − u` and `−a`, and then `n` columns have
//!
//! ```text
//! Σ (2u − 1)(2a + 1) = n − 2·popcount(w ⊕ x)
//! ```
//!
//! which is the integer of [`super::IntegerWeight`], in the same parts of a row and scaled in the
//! same order: results have its bits.
//!
//! A part starts with a word of 64 columns; what is missing in its last word is zero on both sides
//! and never differs. [`ROWS`] rows lie side by side, word by word, so that their counts are lanes
//! of vectors and nothing is summed across one.

#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;
use std::sync::OnceLock;

use anybit_core::{GridSpec, Plane, QuantizedMatrix, RowSource};
use rayon::prelude::*;

use super::{FEW_TOKENS, QuantizedRows, TILE_BYTES, TOKENS, is_plain, nth, parts_of};
use crate::DisjointMut;

/// Rows of a block, which are computed together.
const ROWS: usize = 32;
/// Tokens that pass a block together.
const QUAD: usize = 4;
/// Rows whose scalar counts for [`QUAD`] tokens stay in registers.
const FEW_ROWS: usize = 2;
/// Most blocks of a task.
const BLOCKS: usize = 16;

/// Columns that share a grid in weights and activations, or a piece of them.
#[derive(Debug, Clone)]
struct Part {
    segment: usize,
    /// Group within its segment.
    group: usize,
    columns: Range<usize>,
    words: Range<usize>,
}

/// A word of each row of a block.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct Column([u64; ROWS]);

/// The signs of a weight `[out, in]`, for products with the signs of activations.
#[derive(Debug, Clone)]
pub struct BinaryWeight {
    rows: usize,
    cols: usize,
    segments: Vec<usize>,
    parts: Vec<Part>,
    /// Words of a row.
    words: usize,
    /// `[⌈rows / ROWS⌉, words]`, arranged for `isa`; rows behind the last one are zero.
    columns: Vec<Column>,
    /// `¼·s_w`, `[⌈rows / ROWS⌉, parts]`.
    quarters: Vec<[f32; ROWS]>,
    isa: Isa,
}

impl BinaryWeight {
    /// Takes the signs of `matrix` for activations of these segments (columns of each) and bits.
    ///
    /// `None` when one side is not on half-integer grids of one bit, or where
    /// [`super::IntegerWeight::new`] has none.
    pub fn new(
        matrix: &QuantizedMatrix,
        segments: &[usize],
        activation_bits: &[u8],
    ) -> Option<Self> {
        Self::for_isa(Isa::best(), matrix, segments, activation_bits)
    }

    /// [`Self::new`] for instructions that this machine must have.
    pub(crate) fn for_isa(
        isa: Isa,
        matrix: &QuantizedMatrix,
        segments: &[usize],
        activation_bits: &[u8],
    ) -> Option<Self> {
        assert!(isa.detected(), "this machine lacks {isa:?}");
        let one = |p: &Plane| matches!(p.grid, GridSpec::HalfInteger { bits: 1, .. });
        let signs =
            activation_bits.len() == segments.len() && activation_bits.iter().all(|b| *b == 1);
        if !signs || !is_plain(matrix, segments) || !matrix.planes.iter().all(one) {
            return None;
        }
        let ((rows, cols), planes) = (matrix.shape(), &matrix.planes);
        let mut parts = Vec::new();
        let mut words = 0;
        for part in parts_of(planes) {
            let columns = part.start..part.end;
            let start = words;
            words += columns.len().div_ceil(64);
            let (segment, group) = (part.segment, part.group);
            parts.push(Part { segment, group, columns, words: start..words });
        }
        let blocks = rows.div_ceil(ROWS);
        let mut columns = vec![Column([0; ROWS]); blocks * words];
        let mut quarters = vec![[0f32; ROWS]; blocks * parts.len()];
        let filled = columns.par_chunks_mut(words).zip(quarters.par_chunks_mut(parts.len()));
        filled.enumerate().for_each(|(block, (columns, quarters))| {
            let mut codes = vec![0u8; cols];
            for (lane, row) in (block * ROWS..rows).take(ROWS).enumerate() {
                super::unpack_planes(planes, row, &mut codes);
                for (part, quarters) in parts.iter().zip(quarters.iter_mut()) {
                    quarters[lane] = 0.25 * planes[part.segment].scale(row, part.group);
                    let columns = &mut columns[part.words.clone()];
                    for (i, u) in codes[part.columns.clone()].iter().enumerate() {
                        columns[i / 64].0[lane] |= u64::from(*u ^ 1) << (i % 64);
                    }
                }
            }
            columns.iter_mut().for_each(|column| *column = isa.arrange(*column));
        });
        let segments = segments.to_vec();
        Some(Self { rows, cols, segments, parts, words, columns, quarters, isa })
    }

    /// Rows (`out`) and columns (`in`).
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Bytes of signs and scales in memory.
    pub fn stored_bytes(&self) -> usize {
        size_of_val(&self.columns[..]) + size_of_val(&self.quarters[..])
    }

    /// Computes `y[tokens, out] = x · Wᵀ + bias`, where `x` and `W` are the values of their codes.
    ///
    /// # Panics
    /// When `x` has other columns or segments, a code other than −1 and 0, a zero point other than
    /// −½, or a buffer's length does not fit.
    pub fn forward(&self, x: &QuantizedRows, bias: Option<&[f32]>, y: &mut [f32]) {
        let tokens = x.tokens(self.cols, &self.segments);
        assert!(x.doubled_zeros.iter().all(|z| *z == -1), "a zero point other than −½");
        assert_eq!(y.len(), tokens * self.rows, "output has another shape");
        assert!(bias.is_none_or(|b| b.len() == self.rows), "bias has another length");
        let signs = self.signs(x, tokens);
        let job = Job { weight: self, x, signs: &signs, bias, y: DisjointMut::new(y) };
        let blocks = self.rows.div_ceil(ROWS);
        let step = (TILE_BYTES / (self.words * size_of::<Column>())).clamp(1, BLOCKS);
        let tiles = blocks.div_ceil(step);
        (0..tiles * tokens.div_ceil(TOKENS)).into_par_iter().for_each(|task| {
            let (first, start) = (task % tiles * step, task / tiles * TOKENS);
            let end = (start + TOKENS).min(tokens);
            let whole = end - (end - start) % QUAD;
            for block in first..(first + step).min(blocks) {
                // SAFETY: the rows of this block and these tokens are this task's.
                unsafe {
                    for token in (start..whole).step_by(QUAD) {
                        job.tile::<QUAD>(block, token);
                    }
                    for token in whole..end {
                        job.tile::<1>(block, token);
                    }
                }
            }
        });
    }

    /// Signs of activations, `[tokens, words]`.
    fn signs(&self, x: &QuantizedRows, tokens: usize) -> Vec<u64> {
        let mut signs = vec![0; tokens * self.words];
        let fill = |(token, signs): (usize, &mut [u64])| {
            let codes = nth(&x.codes, token, self.cols);
            for part in &self.parts {
                let fits = pack_signs(&codes[part.columns.clone()], &mut signs[part.words.clone()]);
                assert!(fits, "a code other than −1 and 0");
            }
        };
        match tokens <= FEW_TOKENS {
            true => signs.chunks_mut(self.words).enumerate().for_each(fill),
            false => signs.par_chunks_mut(self.words).enumerate().for_each(fill),
        }
        signs
    }
}

/// Packs the signs of codes, 64 to a word; whether all codes are −1 or 0.
fn pack_signs(codes: &[i8], words: &mut [u64]) -> bool {
    let mut others = 0;
    for (codes, word) in codes.chunks(64).zip(words) {
        let (eights, rest) = codes.as_chunks::<8>();
        let mut packed = 0;
        for (i, eight) in eights.iter().enumerate() {
            let (signs, other) = eight_signs(*eight);
            packed |= signs << (8 * i);
            others |= other;
        }
        if !rest.is_empty() {
            let mut eight = [0; 8];
            eight[..rest.len()].copy_from_slice(rest);
            let (signs, other) = eight_signs(eight);
            packed |= signs << (8 * eights.len());
            others |= other;
        }
        *word = packed;
    }
    others == 0
}

/// The signs of eight codes, the first in the lowest bit, and zero if all codes are −1 or 0.
#[inline(always)]
fn eight_signs(codes: [i8; 8]) -> (u64, u64) {
    let codes = u64::from_le_bytes(codes.map(|a| a as u8));
    let negative = (codes >> 7) & 0x0101_0101_0101_0101;
    // The factor moves bit 8i to 56 + i; no two of all its products meet, so nothing is carried.
    let signs = negative.wrapping_mul(0x0102_0408_1020_4080) >> 56;
    (signs, codes ^ (negative * 0xFF))
}

/// One call of [`BinaryWeight::forward`].
struct Job<'a> {
    weight: &'a BinaryWeight,
    x: &'a QuantizedRows,
    signs: &'a [u64],
    bias: Option<&'a [f32]>,
    y: DisjointMut,
}

impl Job<'_> {
    /// Writes the rows of a block, of `T` tokens from `token` on.
    ///
    /// # Safety
    /// These elements of the output must belong to the calling task alone.
    unsafe fn tile<const T: usize>(&self, block: usize, token: usize) {
        use std::array::from_fn;
        let (w, x) = (self.weight, self.x);
        let tile = Tile {
            parts: &w.parts,
            columns: nth(&w.columns, block, w.words),
            quarters: nth(&w.quarters, block, w.parts.len()),
            signs: from_fn(|t| nth(self.signs, token + t, w.words)),
            scales: from_fn(|t| nth(&x.scales, token + t, w.segments.len())),
        };
        let sums: [[f32; ROWS]; T] = match w.isa {
            Isa::Scalar => tile.run(counts_scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: weights are made for instructions that the machine has.
            Isa::Popcnt => unsafe { x86::tile_popcnt(&tile) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { x86::tile_avx2(&tile) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx512 => unsafe { x86::tile_avx512(&tile) },
        };
        let row = block * ROWS;
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

/// A block of the weight and `T` tokens.
struct Tile<'a, const T: usize> {
    parts: &'a [Part],
    columns: &'a [Column],
    /// Of each part.
    quarters: &'a [[f32; ROWS]],
    signs: [&'a [u64]; T],
    /// Of each segment.
    scales: [&'a [f32]; T],
}

impl<const T: usize> Tile<'_, T> {
    /// The products, given how many signs differ between columns and as many words. Inlined, so
    /// that it is compiled for the instruction set of `counts`.
    #[inline(always)]
    fn run(&self, counts: impl Fn(&[Column], [&[u64]; T]) -> [[u32; ROWS]; T]) -> [[f32; ROWS]; T] {
        let mut y = [[0f32; ROWS]; T];
        for (part, quarters) in self.parts.iter().zip(self.quarters) {
            let signs = self.signs.map(|signs| &signs[part.words.clone()]);
            let counts = counts(&self.columns[part.words.clone()], signs);
            let n = part.columns.len() as i32;
            for ((y, counts), scales) in y.iter_mut().zip(&counts).zip(&self.scales) {
                let scale = scales[part.segment];
                for ((y, count), quarter) in y.iter_mut().zip(counts).zip(quarters) {
                    let integer = n - 2 * (*count as i32);
                    *y += integer as f32 * (*quarter * scale);
                }
            }
        }
        y
    }
}

/// How many signs of each row differ from those of each token: the scalar twin.
#[inline(always)]
fn counts_scalar<const T: usize>(columns: &[Column], words: [&[u64]; T]) -> [[u32; ROWS]; T] {
    let words = words.map(|words| &words[..columns.len()]);
    let mut counts = [[0; ROWS]; T];
    for first in (0..ROWS).step_by(FEW_ROWS) {
        let mut few = [[0u32; FEW_ROWS]; T];
        for (c, column) in columns.iter().enumerate() {
            for (few, words) in few.iter_mut().zip(&words) {
                for (count, w) in few.iter_mut().zip(&column.0[first..first + FEW_ROWS]) {
                    *count += (*w ^ words[c]).count_ones();
                }
            }
        }
        for (counts, few) in counts.iter_mut().zip(&few) {
            counts[first..first + FEW_ROWS].copy_from_slice(few);
        }
    }
    counts
}

/// Instructions that count; a weight is arranged for one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    Scalar,
    /// The scalar twin with an instruction for `count_ones`.
    #[cfg(target_arch = "x86_64")]
    Popcnt,
    /// Tables of counts.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F and VPOPCNTDQ.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// All, the best first.
    const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Popcnt,
        Self::Scalar,
    ];

    /// Whether this machine has it.
    fn detected(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Popcnt => is_x86_feature_detected!("popcnt"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vpopcntdq")
            }
        }
    }

    /// The level that it belongs to.
    fn level(self) -> crate::isa::Isa {
        match self {
            Self::Scalar => crate::isa::Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Popcnt => crate::isa::Isa::Scalar,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => crate::isa::Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => crate::isa::Isa::Avx512,
        }
    }

    /// The best that this machine has and [`crate::isa::isa`] allows.
    fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        let found = || {
            let allowed = |own: &Isa| own.detected() && own.level() <= crate::isa::isa();
            Self::ALL.iter().copied().find(allowed)
        };
        *BEST.get_or_init(|| found().unwrap_or(Self::Scalar))
    }

    /// The words of a column as these instructions read them.
    fn arrange(self, column: Column) -> Column {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => x86::pairs_of_nibbles(column),
            _ => column,
        }
    }
}
