//! Products of rows of codes of tables, a block of 64 columns at a time.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::super::affine::TILE;
use super::super::operand::{BLOCK, RUN};
use super::super::table::{Grouping, TablePlane};
use super::table::{Call, Line, PER_BLOCK, PER_HALF, PER_ROW, Spread};
use super::{load, multiply_add, prefetch};

/// Adds the products of rows with `T` tokens to `out`.
///
/// # Safety
/// The machine must have AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
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
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
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

/// Sums of a row while its blocks pass.
struct State<const T: usize> {
    /// Integers that await their scale.
    total: [__m512i; T],
    sums: [__m512; T],
}

impl<const T: usize> State<T> {
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn new() -> Self {
        let (total, sums) = ([_mm512_setzero_si512(); T], [_mm512_setzero_ps(); T]);
        Self { total, sums }
    }

    /// Ends a part with its scale.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn scale(&mut self, t: usize, scale: f32) {
        let sum = _mm512_cvtepi32_ps(self.total[t]);
        self.sums[t] = _mm512_fmadd_ps(sum, _mm512_set1_ps(scale), self.sums[t]);
        self.total[t] = _mm512_setzero_si512();
    }
}

/// # Safety
/// As [`of_bits`], and `GROUP` must be the plane's.
// A function of its own for each: registers are allotted within functions.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn products<const BITS: usize, const T: usize, const GROUP: usize>(
    call: &Call<'_, T>,
    spread: &mut Spread,
    out: &mut [[f32; TILE]; T],
) {
    let (plane, x) = (call.plane, call.x);
    let lines = call.lines();
    for (index, row) in call.rows.clone().enumerate() {
        let codes = &plane.codes[row * plane.row_bytes()..][..plane.row_bytes()];
        let mut tables: Tables = [_mm512_setzero_si512(); 8];
        load_tables::<BITS>(plane, row, &mut tables);
        if GROUP != PER_ROW {
            spread.fill(plane, row, if GROUP == PER_BLOCK { 1 } else { 2 } * plane.blocks);
        }
        let mut state = State::new();
        for run in 0..x.runs {
            for block in run * RUN..plane.blocks.min((run + 1) * RUN) {
                // SAFETY: the row and each token have these blocks.
                unsafe {
                    let at = codes.as_ptr().add(block * 8 * BITS);
                    add_block::<BITS, T, GROUP>(at, block, &tables, &lines, spread, &mut state);
                }
            }
            if GROUP == PER_ROW {
                for t in 0..T {
                    // SAFETY: each token has this run.
                    state.scale(t, unsafe { *lines[t].scales.add(run) });
                }
            }
        }
        let scale = if GROUP == PER_ROW { plane.scale(row, 0) } else { 1.0 };
        add_lanes(&state.sums, plane.unit(row) * scale, index, out);
    }
}

/// Adds `factor` times the sum of each token's lanes to a row of `out`. Each sum is taken in the same
/// order, whatever `T`.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes<const T: usize>(
    sums: &[__m512; T],
    factor: f32,
    row: usize,
    out: &mut [[f32; TILE]; T],
) {
    for first in (0..T).step_by(8) {
        let own = |at: usize| sums[(first + at).min(T - 1)];
        let mut pairs = [_mm512_setzero_ps(); 4];
        for at in 0..4 {
            pairs[at] = quarters(own(2 * at), own(2 * at + 1));
        }
        // Lanes 0 to 3 of quarters: tokens 0 to 3, and 4 to 7.
        let [low, high] = [quarters(pairs[0], pairs[1]), quarters(pairs[2], pairs[3])];
        let halves = _mm512_add_ps(_mm512_unpacklo_ps(low, high), _mm512_unpackhi_ps(low, high));
        let swapped = _mm512_permute_ps::<0b01_00_11_10>(halves);
        let totals = _mm512_add_ps(halves, swapped);
        let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
        let totals = _mm512_castps512_ps256(_mm512_permutexvar_ps(order, totals));
        let mut eight = [0f32; 8];
        // SAFETY: room for eight numbers.
        unsafe { _mm256_storeu_ps(eight.as_mut_ptr(), totals) };
        for (out, total) in out[first..].iter_mut().zip(eight) {
            out[row] += total * factor;
        }
    }
}

/// Sums of neighbouring quarters: those of `a`, then those of `b`.
#[inline]
#[target_feature(enable = "avx512f")]
fn quarters(a: __m512, b: __m512) -> __m512 {
    let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b);
    let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b);
    _mm512_add_ps(even, odd)
}

/// Adds the products of a block.
///
/// # Safety
/// As [`products`]; the block must lie in the row at `codes` and in the tokens.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn add_block<const BITS: usize, const T: usize, const GROUP: usize>(
    codes: *const u8,
    block: usize,
    tables: &Tables,
    lines: &[Line; T],
    spread: &Spread,
    state: &mut State<T>,
) {
    prefetch::<BITS>(codes, 8 * BITS);
    // SAFETY: a block has `8·BITS` bytes.
    let w = lookup::<BITS>(tables, unsafe { unpack::<BITS>(codes) });
    for t in 0..T {
        // SAFETY: each token has the run of this block.
        let own = unsafe { *lines[t].scales.add(block / RUN) };
        for half in 0..2 {
            // SAFETY: a token has 64 codes of each block.
            let a = unsafe {
                let at = lines[t].codes.add(block * BLOCK + half * 32);
                _mm512_loadu_si512(at.cast())
            };
            state.total[t] = multiply_add(state.total[t], w[half], a);
            if GROUP == PER_HALF {
                state.scale(t, own * spread.scales[2 * block + half]);
            }
        }
        if GROUP == PER_BLOCK {
            state.scale(t, own * spread.scales[block]);
        }
    }
}

/// Entries of a table: their low and their high bytes, sixteen a lane, or as 16-bit numbers, 32 a
/// vector.
type Tables = [__m512i; 8];

#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
fn load_tables<const BITS: usize>(plane: &TablePlane, row: usize, tables: &mut Tables) {
    let entries = 1usize << BITS;
    let own = &plane.table.split[plane.table_of(row) * 2 * entries..][..2 * entries];
    let (low, high) = own.split_at(entries);
    if BITS <= 4 {
        for (table, bytes) in tables.iter_mut().zip([low, high]) {
            let mut sixteen = [0u8; 16];
            sixteen[..entries].copy_from_slice(bytes);
            // SAFETY: sixteen bytes are there.
            *table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(sixteen.as_ptr().cast()) });
        }
        return;
    }
    for (part, table) in tables[..entries / 32].iter_mut().enumerate() {
        let (low, high) = (&low[32 * part..][..32], &high[32 * part..][..32]);
        // SAFETY: 32 bytes of either side are there.
        let (low, high) = unsafe { (load(low.as_ptr()), load(high.as_ptr())) };
        let high = _mm512_slli_epi16::<8>(_mm512_cvtepu8_epi16(high));
        *table = _mm512_or_si512(_mm512_cvtepu8_epi16(low), high);
    }
}

/// Centroids of a block's codes, in the order of columns.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
fn lookup<const BITS: usize>(tables: &Tables, codes: __m512i) -> [__m512i; 2] {
    let [low, high] = if BITS <= 4 {
        let low = _mm512_shuffle_epi8(tables[0], codes);
        let high = _mm512_shuffle_epi8(tables[1], codes);
        [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
    } else {
        let zero = _mm512_setzero_si512();
        let words = [_mm512_unpacklo_epi8(codes, zero), _mm512_unpackhi_epi8(codes, zero)];
        [entries::<BITS>(tables, words[0]), entries::<BITS>(tables, words[1])]
    };
    // Lanes hold 16 columns each: 0, 32, 16, 48 after the exchange of quarters.
    [_mm512_inserti64x4::<1>(low, _mm512_castsi512_si256(high)), {
        _mm512_shuffle_i64x2::<0b11_10_11_10>(low, high)
    }]
}

/// Entries of 16-bit codes, of tables of 32 and more.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn entries<const BITS: usize>(tables: &Tables, codes: __m512i) -> __m512i {
    if BITS == 5 {
        return _mm512_permutexvar_epi16(codes, tables[0]);
    }
    let mut found = _mm512_permutex2var_epi16(tables[0], codes, tables[1]);
    for part in 1..1usize << (BITS - 6) {
        let own = _mm512_permutex2var_epi16(tables[2 * part], codes, tables[2 * part + 1]);
        let upper = _mm512_srli_epi16::<6>(codes);
        let here = _mm512_cmpeq_epi16_mask(upper, _mm512_set1_epi16(part as i16));
        found = _mm512_mask_mov_epi16(found, here, own);
    }
    found
}

/// The codes of a block, `E₀` and `E₁`.
///
/// # Safety
/// `8·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
unsafe fn unpack<const BITS: usize>(at: *const u8) -> __m512i {
    // SAFETY: the slices take `8·BITS` bytes together.
    unsafe {
        match BITS {
            1 => one(at),
            2 => two(at),
            3 => join::<2>(two(at), one(at.add(16))),
            4 => four(at),
            5 => join::<4>(four(at), one(at.add(32))),
            6 => join::<4>(four(at), two(at.add(32))),
            7 => join::<4>(four(at), join::<2>(two(at.add(32)), one(at.add(48)))),
            _ => _mm512_loadu_si512(at.cast()),
        }
    }
}

/// Lower slices, and upper ones shifted by `SHIFT` bits, which stay in their bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn join<const SHIFT: u32>(lower: __m512i, upper: __m512i) -> __m512i {
    _mm512_or_si512(lower, _mm512_slli_epi16::<SHIFT>(upper))
}

/// # Safety
/// 32 bytes must be there.
#[inline]
#[target_feature(enable = "avx2,avx512f")]
unsafe fn four(at: *const u8) -> __m512i {
    // SAFETY: by the caller's contract.
    let v = _mm512_broadcast_i64x4(unsafe { load(at) });
    let v = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
    _mm512_and_si512(v, _mm512_set1_epi8(15))
}

/// # Safety
/// Sixteen bytes must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn two(at: *const u8) -> __m512i {
    // SAFETY: by the caller's contract.
    let v = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(at.cast()) });
    let v = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
    _mm512_and_si512(v, _mm512_set1_epi8(3))
}

/// # Safety
/// Eight bytes must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn one(at: *const u8) -> __m512i {
    // SAFETY: by the caller's contract.
    let v = _mm512_set1_epi64(unsafe { at.cast::<i64>().read_unaligned() });
    let v = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    _mm512_and_si512(v, _mm512_set1_epi8(1))
}
