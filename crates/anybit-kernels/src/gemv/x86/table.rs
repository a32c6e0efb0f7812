//! Products of rows of codes of tables.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::affine::TILE;
use super::super::operand::{BLOCK, Operand, RUN};
use super::super::table::{Grouping, MOST_PARTS, TablePlane};
use super::{load, unpack};

/// Some rows, at most [`TILE`], and `T` tokens of an operand.
pub(in super::super) struct Call<'a, const T: usize> {
    pub plane: &'a TablePlane,
    pub rows: Range<usize>,
    pub x: &'a Operand,
    pub tokens: [usize; T],
}

/// Where a token's numbers lie.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub codes: *const i16,
    /// Of each run.
    pub scales: *const f32,
}

impl<const T: usize> Call<'_, T> {
    /// The tokens' numbers.
    #[inline(always)]
    pub(super) fn lines(&self) -> [Line; T] {
        let x = self.x;
        assert!(x.blocks == self.plane.blocks && self.rows.len() <= TILE);
        self.tokens.map(|token| {
            assert!(token < x.tokens, "no such token");
            Line {
                codes: x.codes[token * x.blocks * BLOCK..].as_ptr(),
                scales: x.scales[token * x.runs..].as_ptr(),
            }
        })
    }
}

/// Sums of a row while its blocks pass.
struct State<const T: usize> {
    /// Integers that await their scale.
    total: [__m256i; T],
    /// Scales of the run.
    scales: [f32; T],
    sums: [__m256; T],
}

impl<const T: usize> State<T> {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new() -> Self {
        let (total, sums) = ([_mm256_setzero_si256(); T], [_mm256_setzero_ps(); T]);
        Self { total, scales: [0.0; T], sums }
    }

    /// Ends a part with its scale.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn scale(&mut self, t: usize, scale: f32) {
        let (sum, scale) = (_mm256_cvtepi32_ps(self.total[t]), self.scales[t] * scale);
        self.sums[t] = _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), self.sums[t]);
        self.total[t] = _mm256_setzero_si256();
    }
}

/// Scales are per row, per some blocks, per some halves of blocks.
pub(super) const PER_ROW: usize = 0;
pub(super) const PER_BLOCK: usize = 1;
pub(super) const PER_HALF: usize = 2;

/// Adds the products of rows with `T` tokens to `out`.
///
/// # Safety
/// The machine must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn rows<const T: usize>(
    call: &Call<'_, T>,
    spread: &mut Spread,
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function; the bits are the plane's.
    unsafe { with_bits!(call.plane.bits, BITS => of_bits::<BITS, T>(call, spread, out)) }
}

/// # Safety
/// As [`rows`], and the plane must have `BITS` bits.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn of_bits<const BITS: usize, const T: usize>(
    call: &Call<'_, T>,
    spread: &mut Spread,
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function.
    unsafe {
        match call.plane.grouping {
            Grouping::Row => products::<BITS, T, PER_ROW>(call, spread, out),
            Grouping::Blocks(_) => products::<BITS, T, PER_BLOCK>(call, spread, out),
            Grouping::Halves(_) => products::<BITS, T, PER_HALF>(call, spread, out),
        }
    }
}

/// # Safety
/// As [`of_bits`], and `GROUP` must be the plane's.
// A function of its own for each: registers are allotted within functions.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<const BITS: usize, const T: usize, const GROUP: usize>(
    call: &Call<'_, T>,
    spread: &mut Spread,
    out: &mut [[f32; TILE]; T],
) {
    let (plane, x) = (call.plane, call.x);
    let lines = call.lines();
    for (index, row) in call.rows.clone().enumerate() {
        let codes = &plane.codes[row * plane.row_bytes()..][..plane.row_bytes()];
        let mut tables: Tables = [[_mm256_setzero_si256(); 2]; 16];
        load_tables::<BITS>(plane, row, &mut tables);
        if GROUP != PER_ROW {
            spread.fill(plane, row, if GROUP == PER_BLOCK { 1 } else { 2 } * plane.blocks);
        }
        let mut state = State::new();
        for run in 0..x.runs {
            for t in 0..T {
                // SAFETY: each token has this run.
                state.scales[t] = unsafe { *lines[t].scales.add(run) };
            }
            for block in run * RUN..plane.blocks.min((run + 1) * RUN) {
                // SAFETY: the row and each token have these blocks.
                unsafe {
                    let at = codes.as_ptr().add(block * 8 * BITS);
                    add_block::<BITS, T, GROUP>(at, block, &tables, &lines, spread, &mut state);
                }
            }
            if GROUP == PER_ROW {
                for t in 0..T {
                    state.scale(t, 1.0);
                }
            }
        }
        let scale = if GROUP == PER_ROW { plane.scale(row, 0) } else { 1.0 };
        let factor = plane.unit(row) * scale;
        for t in 0..T {
            out[t][index] += add_lanes(state.sums[t]) * factor;
        }
    }
}

/// Adds the products of a block.
///
/// # Safety
/// As [`products`]; the block must lie in the row at `codes` and in the tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_block<const BITS: usize, const T: usize, const GROUP: usize>(
    codes: *const u8,
    block: usize,
    tables: &Tables,
    lines: &[Line; T],
    spread: &Spread,
    state: &mut State<T>,
) {
    // SAFETY: a block has `8·BITS` bytes.
    let codes = unsafe { unpack::<BITS>(codes) };
    for half in 0..2 {
        let w = lookup::<BITS>(tables, codes[half]);
        for t in 0..T {
            for i in 0..2 {
                let at = block * BLOCK + half * 32 + 16 * i;
                // SAFETY: a token has 64 codes of each block.
                let a = unsafe { load(lines[t].codes.add(at)) };
                let products = _mm256_madd_epi16(w[i], a);
                state.total[t] = _mm256_add_epi32(state.total[t], products);
            }
            match GROUP {
                PER_HALF => state.scale(t, spread.scales[2 * block + half]),
                PER_BLOCK if half == 1 => state.scale(t, spread.scales[block]),
                _ => {}
            }
        }
    }
}

/// Scales of a row's groups, spread over its blocks or halves of blocks; written before they are
/// read, as far as a row needs.
pub(in super::super) struct Spread {
    pub(super) scales: [f32; MOST_PARTS],
    groups: [f32; MOST_PARTS],
}

impl Spread {
    pub fn new() -> Self {
        Self { scales: [0.0; MOST_PARTS], groups: [0.0; MOST_PARTS] }
    }

    #[inline(never)]
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn fill(&mut self, plane: &TablePlane, row: usize, parts: usize) {
        let count = plane.groups;
        let (Grouping::Blocks(len) | Grouping::Halves(len)) = plane.grouping else { return };
        let groups = if len == 1 { &mut self.scales } else { &mut self.groups };
        let scales = plane.scales.as_ref().expect("groups have scales");
        widen_halves(&scales[row * count..(row + 1) * count], &mut groups[..count]);
        // Behind the last group only padding follows, whatever its scale.
        if len == 1 {
            return self.scales[count..parts].fill(0.0);
        }
        for (group, parts) in self.scales[..parts].chunks_mut(len).enumerate() {
            parts.fill(self.groups[group.min(count - 1)]);
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,f16c")]
fn widen_halves(halves: &[half::f16], out: &mut [f32]) {
    let (halves, rest) = halves.as_chunks::<8>();
    let (eights, out) = out.as_chunks_mut::<8>();
    for (halves, out) in halves.iter().zip(eights) {
        // SAFETY: eight halves are there, and room for eight numbers.
        unsafe {
            let eight = _mm_loadu_si128(halves.as_ptr().cast());
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(eight));
        }
    }
    for (half, out) in rest.iter().zip(out) {
        *out = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half.to_bits() as i32)));
    }
}

/// Low and high bytes of a table's centroids, sixteen entries a vector, twice in each.
type Tables = [[__m256i; 2]; 16];

#[inline]
#[target_feature(enable = "avx2")]
fn load_tables<const BITS: usize>(plane: &TablePlane, row: usize, tables: &mut Tables) {
    let entries = 1usize << BITS;
    let own = &plane.table.split[plane.table_of(row) * 2 * entries..][..2 * entries];
    for part in 0..entries.div_ceil(16) {
        for side in 0..2 {
            let count = entries.min(16);
            let mut sixteen = [0u8; 16];
            let first = side * entries + part * 16;
            sixteen[..count].copy_from_slice(&own[first..first + count]);
            // SAFETY: sixteen bytes are there.
            let lane = unsafe { _mm_loadu_si128(sixteen.as_ptr().cast()) };
            tables[part][side] = _mm256_broadcastsi128_si256(lane);
        }
    }
}

/// Centroids of codes, in the order of columns.
#[inline]
#[target_feature(enable = "avx2")]
fn lookup<const BITS: usize>(tables: &Tables, codes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    let index = if BITS > 4 { _mm256_and_si256(codes, mask) } else { codes };
    let mut low = _mm256_shuffle_epi8(tables[0][0], index);
    let mut high = _mm256_shuffle_epi8(tables[0][1], index);
    if BITS > 4 {
        let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask);
        for part in 1..1usize << (BITS - 4) {
            let here = _mm256_cmpeq_epi8(upper, _mm256_set1_epi8(part as i8));
            let found = _mm256_shuffle_epi8(tables[part][0], index);
            low = _mm256_blendv_epi8(low, found, here);
            let found = _mm256_shuffle_epi8(tables[part][1], index);
            high = _mm256_blendv_epi8(high, found, here);
        }
    }
    [_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_lanes(sum: __m256) -> f32 {
    let halves = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
    let pairs = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
    _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
}
