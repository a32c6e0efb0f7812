//! Products of packed rows with AVX2, and with AVX-512 VNNI on 256-bit vectors, which adds the
//! products of pairs to the sums in the same instruction.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::operand::{LANES, Operand, RUN};
use super::plane::{BLOCK, Grouping, MOST_PARTS, Scales, TiledPlane, Values};
use super::scalar::unit;
use super::{ROWS, Sums};

/// Some rows, at most [`ROWS`], and `T` tokens of an operand.
pub(super) struct Call<'a, const T: usize> {
    pub plane: &'a TiledPlane,
    pub rows: Range<usize>,
    pub x: &'a Operand,
    /// What sums start from, as [`super::initial`] makes it.
    pub initial: &'a [i32],
    pub tokens: [usize; T],
}

/// Where a token's numbers lie.
#[derive(Clone, Copy)]
struct Line {
    codes: *const i16,
    /// Of each run.
    scales: *const f32,
    /// Vectors of each part of a row.
    initial: *const i32,
}

impl<const T: usize> Call<'_, T> {
    /// The tokens' numbers, with so many starts of sums for each.
    #[inline(always)]
    fn lines(&self, parts: usize) -> [Line; T] {
        let (x, blocks) = (self.x, self.plane.blocks);
        assert!(x.blocks == blocks && self.initial.len() >= x.tokens * parts * LANES);
        self.tokens.map(|token| {
            assert!(token < x.tokens, "no such token");
            Line {
                codes: x.codes[token * blocks * BLOCK..].as_ptr(),
                scales: x.scales[token * x.runs..].as_ptr(),
                initial: self.initial[token * parts * LANES..].as_ptr(),
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

    /// Begins a run.
    ///
    /// # Safety
    /// The tokens must have it.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn begin<const GROUP: usize, const FORM: usize>(
        &mut self,
        lines: &[Line; T],
        spread: &Spread,
        run: usize,
    ) {
        for t in 0..T {
            // SAFETY: by the caller's contract.
            unsafe {
                self.scales[t] = *lines[t].scales.add(run);
                if GROUP == ROW {
                    self.start::<FORM>(t, &lines[t], spread, run);
                }
            }
        }
    }

    /// Begins a part with what its sum starts from.
    ///
    /// # Safety
    /// The token must have it.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn start<const FORM: usize>(
        &mut self,
        t: usize,
        line: &Line,
        spread: &Spread,
        part: usize,
    ) {
        self.total[t] = match FORM {
            TABLE => _mm256_setzero_si256(),
            _ => {
                // SAFETY: by the caller's contract.
                let sum = unsafe { load(line.initial.add(part * LANES)) };
                match FORM {
                    STORED => _mm256_mullo_epi32(sum, _mm256_set1_epi32(spread.zeros[part])),
                    _ => sum,
                }
            }
        };
    }

    /// Ends a part with its scale.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn scale(&mut self, t: usize, scale: f32) {
        let (sum, scale) = (_mm256_cvtepi32_ps(self.total[t]), self.scales[t] * scale);
        self.sums[t] = _mm256_fmadd_ps(sum, _mm256_set1_ps(scale), self.sums[t]);
    }
}

/// Scales are per row, per some blocks, per some halves of blocks.
const ROW: usize = 0;
const BLOCKS: usize = 1;
const HALVES: usize = 2;
/// Zero points are fixed, stored per group, or there are tables.
const FIXED: usize = 0;
const STORED: usize = 1;
const TABLE: usize = 2;

/// The kernels of one instruction set.
macro_rules! kernels {
    ($module:ident, $features:literal, |$sum:ident, $w:ident, $a:ident| $add:expr) => {
        pub(super) mod $module {
            use super::*;

            /// Adds the products of rows with `T` tokens to `out`.
            ///
            /// # Safety
            /// The machine must have the instructions of this module.
            #[target_feature(enable = $features)]
            pub unsafe fn rows<const T: usize>(
                call: &Call<'_, T>,
                spread: &mut Spread,
                out: &mut Sums<T>,
            ) {
                // SAFETY: as of this function; the bits are the plane's.
                unsafe {
                    match call.plane.bits {
                        1 => of_bits::<1, T>(call, spread, out),
                        2 => of_bits::<2, T>(call, spread, out),
                        3 => of_bits::<3, T>(call, spread, out),
                        4 => of_bits::<4, T>(call, spread, out),
                        5 => of_bits::<5, T>(call, spread, out),
                        6 => of_bits::<6, T>(call, spread, out),
                        7 => of_bits::<7, T>(call, spread, out),
                        _ => of_bits::<8, T>(call, spread, out),
                    }
                }
            }

            /// # Safety
            /// As [`rows`], and the plane must have `BITS` bits.
            #[target_feature(enable = $features)]
            unsafe fn of_bits<const BITS: usize, const T: usize>(
                call: &Call<'_, T>,
                spread: &mut Spread,
                out: &mut Sums<T>,
            ) {
                // SAFETY: as of this function.
                unsafe {
                    match (&call.plane.values, call.plane.grouping) {
                        (Values::Fixed { .. }, Grouping::Row) => {
                            products::<BITS, T, ROW, FIXED>(call, spread, out)
                        }
                        (Values::Fixed { .. }, Grouping::Blocks(_)) => {
                            products::<BITS, T, BLOCKS, FIXED>(call, spread, out)
                        }
                        (Values::Fixed { .. }, Grouping::Halves(_)) => {
                            products::<BITS, T, HALVES, FIXED>(call, spread, out)
                        }
                        (Values::Stored { .. }, Grouping::Row) => {
                            products::<BITS, T, ROW, STORED>(call, spread, out)
                        }
                        (Values::Stored { .. }, Grouping::Blocks(_)) => {
                            products::<BITS, T, BLOCKS, STORED>(call, spread, out)
                        }
                        (Values::Stored { .. }, Grouping::Halves(_)) => {
                            products::<BITS, T, HALVES, STORED>(call, spread, out)
                        }
                        (Values::Table(_), Grouping::Row) => {
                            products::<BITS, T, ROW, TABLE>(call, spread, out)
                        }
                        (Values::Table(_), Grouping::Blocks(_)) => {
                            products::<BITS, T, BLOCKS, TABLE>(call, spread, out)
                        }
                        (Values::Table(_), Grouping::Halves(_)) => {
                            products::<BITS, T, HALVES, TABLE>(call, spread, out)
                        }
                    }
                }
            }

            /// # Safety
            /// As [`of_bits`], and `GROUP` and `FORM` must be the plane's.
            // A function of its own for each: registers are allotted within functions.
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn products<
                const BITS: usize,
                const T: usize,
                const GROUP: usize,
                const FORM: usize,
            >(
                call: &Call<'_, T>,
                spread: &mut Spread,
                out: &mut Sums<T>,
            ) {
                let (plane, x) = (call.plane, call.x);
                assert!(call.rows.len() <= ROWS, "too many rows");
                let parts = match GROUP {
                    ROW => x.runs,
                    BLOCKS => plane.blocks,
                    _ => 2 * plane.blocks,
                };
                let lines = call.lines(if FORM == TABLE { 0 } else { parts });
                for (index, row) in call.rows.clone().enumerate() {
                    let codes = &plane.codes[row * plane.row_bytes()..][..plane.row_bytes()];
                    let mut tables: Tables = [[_mm256_setzero_si256(); 2]; 16];
                    if FORM == TABLE {
                        load_tables::<BITS>(plane, row, &mut tables);
                    }
                    if GROUP != ROW || FORM == STORED {
                        spread.fill(plane, row, parts);
                    }
                    let mut state = State::new();
                    for run in 0..x.runs {
                        let (first, last) = (run * RUN, plane.blocks.min((run + 1) * RUN));
                        // SAFETY: the row has these blocks and each token this run.
                        unsafe {
                            state.begin::<GROUP, FORM>(&lines, spread, run);
                            if last - first == RUN {
                                for block in 0..RUN {
                                    let at = codes.as_ptr().add((first + block) * 8 * BITS);
                                    add_block::<BITS, T, GROUP, FORM>(
                                        at,
                                        first + block,
                                        &tables,
                                        &lines,
                                        spread,
                                        &mut state,
                                    );
                                }
                            } else {
                                for block in first..last {
                                    let at = codes.as_ptr().add(block * 8 * BITS);
                                    add_block::<BITS, T, GROUP, FORM>(
                                        at, block, &tables, &lines, spread, &mut state,
                                    );
                                }
                            }
                        }
                        if GROUP == ROW {
                            for t in 0..T {
                                state.scale(t, 1.0);
                            }
                        }
                    }
                    let factor =
                        unit(plane, row) * if GROUP == ROW { plane.scale(row, 0) } else { 1.0 };
                    for t in 0..T {
                        out[index][t] += add_lanes(state.sums[t]) * factor;
                    }
                }
            }

            /// Adds the products of a block.
            ///
            /// # Safety
            /// As [`products`]; the block must lie in the row at `codes` and in the tokens.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn add_block<
                const BITS: usize,
                const T: usize,
                const GROUP: usize,
                const FORM: usize,
            >(
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
                    let w = match FORM {
                        TABLE => lookup::<BITS>(tables, codes[half]),
                        _ => widen(codes[half]),
                    };
                    let part = if GROUP == HALVES { 2 * block + half } else { block };
                    for t in 0..T {
                        if GROUP == HALVES || (GROUP == BLOCKS && half == 0) {
                            // SAFETY: sums start from a vector for each part.
                            unsafe { state.start::<FORM>(t, &lines[t], spread, part) };
                        }
                        for i in 0..2 {
                            let at = block * BLOCK + half * 32 + 16 * i;
                            // SAFETY: a token has 64 codes of each block.
                            let $a = unsafe { load(lines[t].codes.add(at)) };
                            let ($w, $sum) = (w[i], state.total[t]);
                            state.total[t] = $add;
                        }
                        if GROUP == HALVES || (GROUP == BLOCKS && half == 1) {
                            state.scale(t, spread.scales[part]);
                        }
                    }
                }
            }
        }
    };
}

kernels!(avx2, "avx2,fma,f16c", |sum, w, a| _mm256_add_epi32(sum, _mm256_madd_epi16(w, a)));
kernels!(avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", |sum, w, a| {
    _mm256_dpwssd_epi32(sum, w, a)
});

/// Scales and `−2z` of a row's groups, spread over its blocks or halves of blocks; written before
/// they are read, as far as a row needs.
pub(super) struct Spread {
    scales: [f32; MOST_PARTS],
    zeros: [i32; MOST_PARTS],
    groups: [f32; MOST_PARTS],
}

impl Spread {
    pub fn new() -> Self {
        Self { scales: [0.0; MOST_PARTS], zeros: [0; MOST_PARTS], groups: [0.0; MOST_PARTS] }
    }

    #[inline(never)]
    #[target_feature(enable = "avx2,f16c")]
    fn fill(&mut self, plane: &TiledPlane, row: usize, parts: usize) {
        let count = plane.groups;
        let len = match plane.grouping {
            Grouping::Row => parts,
            Grouping::Blocks(n) | Grouping::Halves(n) => n,
        };
        let own = row * count..(row + 1) * count;
        let groups = if len == 1 { &mut self.scales } else { &mut self.groups };
        match &plane.scales {
            Scales::Half(scales) => widen_halves(&scales[own.clone()], &mut groups[..count]),
            Scales::Single(scales) => groups[..count].copy_from_slice(&scales[own.clone()]),
            Scales::One => groups[..count].fill(1.0),
        }
        // Behind the last group only padding follows, whatever its scale.
        match len {
            1 => self.scales[count..parts.max(count)].fill(0.0),
            _ => spread(&self.groups[..count], len, &mut self.scales[..parts], |scale| scale),
        }
        if let Values::Stored { zeros } = &plane.values {
            spread(&zeros[own], len, &mut self.zeros[..parts], |zero| -2 * zero as i32);
        }
    }
}

/// Gives each group's value to its `len` parts, the last one's to what remains.
#[inline(always)]
fn spread<A: Copy, B: Copy>(groups: &[A], len: usize, parts: &mut [B], value: impl Fn(A) -> B) {
    let last = groups.len() - 1;
    for (group, parts) in parts.chunks_mut(len).enumerate() {
        parts.fill(value(groups[group.min(last)]));
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

/// # Safety
/// 32 bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn load<V>(at: *const V) -> __m256i {
    // SAFETY: by the caller's contract.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// The bytes `E₀` and `E₁` of a block.
///
/// # Safety
/// `8·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: usize>(at: *const u8) -> [__m256i; 2] {
    // SAFETY: the slices of a block take `8·BITS` bytes together.
    unsafe {
        match BITS {
            1 => one(eight(at)),
            2 => two(sixteen(at)),
            3 => join::<2>(two(sixteen(at)), one(eight(at.add(16)))),
            4 => four(load(at)),
            5 => join::<4>(four(load(at)), one(eight(at.add(32)))),
            6 => join::<4>(four(load(at)), two(sixteen(at.add(32)))),
            7 => {
                let upper = join::<2>(two(sixteen(at.add(32))), one(eight(at.add(48))));
                join::<4>(four(load(at)), upper)
            }
            _ => [load(at), load(at.add(32))],
        }
    }
}

/// Sixteen bytes, in either lane.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn sixteen(at: *const u8) -> __m256i {
    // SAFETY: by the caller's contract.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(at.cast())) }
}

/// Eight bytes, in each quarter.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn eight(at: *const u8) -> __m256i {
    // SAFETY: by the caller's contract.
    unsafe { _mm256_set1_epi64x(at.cast::<i64>().read_unaligned()) }
}

/// Lower slices, and upper ones shifted by `SHIFT` bits, which stay in their bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn join<const SHIFT: i32>(lower: [__m256i; 2], upper: [__m256i; 2]) -> [__m256i; 2] {
    [
        _mm256_or_si256(lower[0], _mm256_slli_epi16::<SHIFT>(upper[0])),
        _mm256_or_si256(lower[1], _mm256_slli_epi16::<SHIFT>(upper[1])),
    ]
}

#[inline]
#[target_feature(enable = "avx2")]
fn four(v: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    [_mm256_and_si256(v, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask)]
}

/// Of sixteen bytes in either lane.
#[inline]
#[target_feature(enable = "avx2")]
fn two(v: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(3);
    let low = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 0, 2, 2));
    let high = _mm256_srlv_epi64(v, _mm256_setr_epi64x(4, 4, 6, 6));
    [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)]
}

/// Of eight bytes in each quarter.
#[inline]
#[target_feature(enable = "avx2")]
fn one(v: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(1);
    let low = _mm256_srlv_epi64(v, _mm256_setr_epi64x(0, 1, 2, 3));
    let high = _mm256_srlv_epi64(v, _mm256_setr_epi64x(4, 5, 6, 7));
    [_mm256_and_si256(low, mask), _mm256_and_si256(high, mask)]
}

/// Codes as 16-bit numbers, in the order of columns.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(codes: __m256i) -> [__m256i; 2] {
    let zero = _mm256_setzero_si256();
    [_mm256_unpacklo_epi8(codes, zero), _mm256_unpackhi_epi8(codes, zero)]
}

/// Low and high bytes of a table's centroids, sixteen entries a vector, twice in each.
type Tables = [[__m256i; 2]; 16];

#[inline]
#[target_feature(enable = "avx2")]
fn load_tables<const BITS: usize>(plane: &TiledPlane, row: usize, tables: &mut Tables) {
    let Values::Table(table) = &plane.values else { return };
    let entries = 1usize << BITS;
    let own = &table.split[plane.table_of(table, row) * 2 * entries..][..2 * entries];
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

/// The codes of a block, in the order of columns.
///
/// # Safety
/// The machine must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn unpack_codes(bytes: &[u8], bits: u8, codes: &mut [u8; BLOCK]) {
    assert!(bytes.len() >= 8 * bits as usize, "a block is cut");
    let at = bytes.as_ptr();
    // SAFETY: the block has its bytes.
    let halves = unsafe {
        match bits {
            1 => unpack::<1>(at),
            2 => unpack::<2>(at),
            3 => unpack::<3>(at),
            4 => unpack::<4>(at),
            5 => unpack::<5>(at),
            6 => unpack::<6>(at),
            7 => unpack::<7>(at),
            _ => unpack::<8>(at),
        }
    };
    for (half, codes) in halves.into_iter().zip(codes.as_chunks_mut::<32>().0) {
        let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(half);
        // SAFETY: a half has 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), ordered) };
    }
}
