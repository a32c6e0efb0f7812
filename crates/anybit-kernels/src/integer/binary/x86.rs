//! Counts of differing signs on x86-64.
//!
//! | instructions | for 64 columns of a row and a token | columns per cycle, Zen 3 |
//! |---|---|---|
//! | POPCNT | xor, popcnt, add on the four scalar ports | 85 |
//! | AVX2 | 16 lookups of 4 columns each, 32 to a shuffle, 32 to an add | 190 |
//! | AVX-512 | an eighth of xor, popcnt, add | 340 (Ice Lake) |
//!
//! The rates are derived from ports and instruction counts, not measured. Counting the nibbles of
//! an XOR takes eight AVX2 instructions for 256 columns (xor, and, shift, and, two shuffles, two
//! adds): 128 columns per cycle. Tables of the token's nibbles instead, looked up with the nibbles
//! of many rows, save the XOR, and share the rest among tokens.

use std::arch::x86_64::*;

use super::{Column, ROWS, Tile, counts_scalar};

/// Words whose counts fit bytes: `8 · 7` lookups of at most 4.
const FLUSH: usize = 7;

/// [`Tile::run`] with POPCNT.
///
/// # Safety
/// The machine must have POPCNT.
#[target_feature(enable = "popcnt")]
pub(super) unsafe fn tile_popcnt<const T: usize>(tile: &Tile<'_, T>) -> [[f32; ROWS]; T] {
    tile.run(counts_scalar)
}

/// [`Tile::run`] with AVX2, of [`pairs_of_nibbles`].
///
/// # Safety
/// The machine must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn tile_avx2<const T: usize>(tile: &Tile<'_, T>) -> [[f32; ROWS]; T] {
    tile.run(|columns, words| {
        // SAFETY: AVX2 by the caller's contract.
        unsafe { counts_avx2(columns, words) }
    })
}

/// [`Tile::run`] with AVX-512.
///
/// # Safety
/// The machine must have AVX-512 F and VPOPCNTDQ.
#[target_feature(enable = "avx2,avx512f,avx512vpopcntdq")]
pub(super) unsafe fn tile_avx512<const T: usize>(tile: &Tile<'_, T>) -> [[f32; ROWS]; T] {
    tile.run(|columns, words| {
        // SAFETY: instructions by the caller's contract.
        unsafe { counts_avx512(columns, words) }
    })
}

/// A column for lookups: of byte `b` of the rows, vector `b` has in its lower half the lower
/// nibbles, in its upper half the upper ones; in the lower nibbles of its own bytes those of rows
/// 0 to 15, in the upper ones those of rows 16 to 31.
pub(super) fn pairs_of_nibbles(column: Column) -> Column {
    let mut arranged = [0u64; ROWS];
    for (byte, vector) in arranged.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        for (lane, eight) in vector.iter_mut().enumerate() {
            let (upper, first) = (lane / 2, lane % 2 * 8);
            let nibble = |row: usize| (column.0[row] >> (8 * byte + 4 * upper)) & 15;
            for i in 0..8 {
                let row = first + i;
                *eight |= (nibble(row) | (nibble(row + 16) << 4)) << (8 * i);
            }
        }
    }
    Column(arranged)
}

/// How many bits each nibble has that differ from the lower (first half) or the upper nibble
/// (second half) of a byte.
#[derive(Clone, Copy)]
#[repr(align(32))]
struct Table([u8; 32]);

/// The table of each byte.
static TABLES: [Table; 256] = tables();

const fn tables() -> [Table; 256] {
    let mut tables = [Table([0; 32]); 256];
    let mut byte = 0;
    while byte < 256 {
        let mut nibble = 0;
        while nibble < 16 {
            tables[byte].0[nibble] = ((byte & 15) ^ nibble).count_ones() as u8;
            tables[byte].0[16 + nibble] = ((byte >> 4) ^ nibble).count_ones() as u8;
            nibble += 1;
        }
        byte += 1;
    }
    tables
}

/// Counts of each row and token, for at most 2^16 − 1 columns.
///
/// # Safety
/// The machine must have AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn counts_avx2<const T: usize>(columns: &[Column], words: [&[u64]; T]) -> [[u32; ROWS]; T] {
    let mask = _mm256_set1_epi8(15);
    let mut wide = [[_mm256_setzero_si256(); 2]; T];
    for (chunk, columns) in columns.chunks(FLUSH).enumerate() {
        let x = words.map(|words| words[chunk * FLUSH..][..columns.len()].as_ptr().cast::<u8>());
        let w = columns.as_ptr().cast::<__m256i>();
        let mut narrow = [[_mm256_setzero_si256(); 2]; T];
        for byte in 0..8 * columns.len() {
            // SAFETY: a column has eight aligned vectors.
            let pairs = unsafe { _mm256_load_si256(w.add(byte)) };
            let first = _mm256_and_si256(pairs, mask);
            let second = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), mask);
            for (narrow, x) in narrow.iter_mut().zip(&x) {
                // SAFETY: a word has eight bytes, and there is a word for each column; tables are
                // aligned.
                let table = unsafe {
                    let table = &TABLES[*x.add(byte) as usize];
                    _mm256_load_si256(table.0.as_ptr().cast())
                };
                narrow[0] = _mm256_add_epi8(narrow[0], _mm256_shuffle_epi8(table, first));
                narrow[1] = _mm256_add_epi8(narrow[1], _mm256_shuffle_epi8(table, second));
            }
        }
        for (wide, narrow) in wide.iter_mut().zip(&narrow) {
            for (wide, narrow) in wide.iter_mut().zip(narrow) {
                let lower = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(*narrow));
                let upper = _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(*narrow));
                *wide = _mm256_add_epi16(*wide, _mm256_add_epi16(lower, upper));
            }
        }
    }
    let mut counts = [[0; ROWS]; T];
    for (counts, wide) in counts.iter_mut().zip(&wide) {
        for (counts, wide) in counts.as_chunks_mut::<16>().0.iter_mut().zip(wide) {
            let first = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(*wide));
            let second = _mm256_cvtepu16_epi32(_mm256_extracti128_si256::<1>(*wide));
            // SAFETY: sixteen counts are two vectors.
            unsafe {
                _mm256_storeu_si256(counts.as_mut_ptr().cast(), first);
                _mm256_storeu_si256(counts.as_mut_ptr().add(8).cast(), second);
            }
        }
    }
    counts
}

/// Counts of each row and token.
///
/// # Safety
/// The machine must have AVX-512 F and VPOPCNTDQ.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512vpopcntdq")]
unsafe fn counts_avx512<const T: usize>(
    columns: &[Column],
    words: [&[u64]; T],
) -> [[u32; ROWS]; T] {
    let words = words.map(|words| &words[..columns.len()]);
    let mut sums = [[_mm512_setzero_si512(); ROWS / 8]; T];
    for (c, column) in columns.iter().enumerate() {
        let mut w = [_mm512_setzero_si512(); ROWS / 8];
        for (w, eight) in w.iter_mut().zip(column.0.as_chunks::<8>().0) {
            // SAFETY: eight words are an aligned vector.
            *w = unsafe { _mm512_load_si512(eight.as_ptr().cast()) };
        }
        for (sums, words) in sums.iter_mut().zip(&words) {
            let x = _mm512_set1_epi64(words[c] as i64);
            for (sum, w) in sums.iter_mut().zip(&w) {
                let different = _mm512_xor_si512(*w, x);
                *sum = _mm512_add_epi64(*sum, _mm512_popcnt_epi64(different));
            }
        }
    }
    let mut counts = [[0; ROWS]; T];
    for (counts, sums) in counts.iter_mut().zip(&sums) {
        for (counts, sum) in counts.as_chunks_mut::<8>().0.iter_mut().zip(sums) {
            let eight = _mm512_cvtepi64_epi32(*sum);
            // SAFETY: eight counts are a vector.
            unsafe { _mm256_storeu_si256(counts.as_mut_ptr().cast(), eight) };
        }
    }
    counts
}
