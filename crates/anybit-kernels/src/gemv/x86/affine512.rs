//! Products of tiles of affine codes: a row for each of sixteen lanes.
//!
//! Lanes do what those of [`super::affine`] do, in the same order, so both give the same bits.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;

use super::super::affine::{COLUMNS, TILE, Zeros};
use super::super::operand::BLOCK;
use super::affine::{Groups, Input, PAIRS, Pointer, STEPS};
use super::{load, multiply_add, prefetch};

impl Groups {
    /// The scales of all rows.
    ///
    /// # Safety
    /// The rows must have a group here.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn all_scales(&self) -> __m512 {
        // SAFETY: by the caller's contract.
        unsafe {
            match self.scales {
                Pointer::Half(at) => _mm512_cvtph_ps(load(at)),
                Pointer::Single(at) => _mm512_loadu_ps(at),
            }
        }
    }

    /// What a part's integers start from.
    ///
    /// # Safety
    /// The rows must have a group here, and `STORED` say whether zero points are stored.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn all_starts<const STORED: bool>(&self, start: i32) -> __m512i {
        let start = _mm512_set1_epi32(start);
        if !STORED {
            return start;
        }
        // SAFETY: by the caller's contract.
        let zeros = unsafe { _mm_loadu_si128(self.zeros.cast()) };
        _mm512_mullo_epi32(start, _mm512_cvtepu8_epi32(zeros))
    }
}

/// # Safety
/// 64 bytes must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn four(at: *const u8) -> [__m512i; 2] {
    // SAFETY: by the caller's contract.
    let v = unsafe { _mm512_loadu_si512(at.cast()) };
    let mask = _mm512_set1_epi8(15);
    [_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask)]
}

/// # Safety
/// 32 bytes must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn two(at: *const u8) -> [__m512i; 2] {
    // SAFETY: by the caller's contract.
    let v = _mm512_broadcast_i64x4(unsafe { load(at) });
    let mask = _mm512_set1_epi8(3);
    let e0 = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
    let e1 = _mm512_srlv_epi64(v, _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6));
    [_mm512_and_si512(e0, mask), _mm512_and_si512(e1, mask)]
}

/// # Safety
/// Sixteen bytes must be there.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn one(at: *const u8) -> [__m512i; 2] {
    // SAFETY: by the caller's contract.
    let v = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(at.cast()) });
    let mask = _mm512_set1_epi8(1);
    let e0 = _mm512_srlv_epi64(v, _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3));
    let e1 = _mm512_srlv_epi64(v, _mm512_setr_epi64(4, 4, 5, 5, 6, 6, 7, 7));
    [_mm512_and_si512(e0, mask), _mm512_and_si512(e1, mask)]
}

/// Lower slices, and upper ones shifted by `SHIFT` bits, which stay in their bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn join<const SHIFT: u32>(lower: [__m512i; 2], upper: [__m512i; 2]) -> [__m512i; 2] {
    [
        _mm512_or_si512(lower[0], _mm512_slli_epi16::<SHIFT>(upper[0])),
        _mm512_or_si512(lower[1], _mm512_slli_epi16::<SHIFT>(upper[1])),
    ]
}

/// The bytes `E₀` and `E₁`.
///
/// # Safety
/// `16·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn unpack<const BITS: usize>(at: *const u8) -> [__m512i; 2] {
    // SAFETY: the slices take `16·BITS` bytes together.
    unsafe {
        match BITS {
            1 => one(at),
            2 => two(at),
            3 => join::<2>(two(at), one(at.add(32))),
            4 => four(at),
            5 => join::<4>(four(at), one(at.add(64))),
            6 => join::<4>(four(at), two(at.add(64))),
            7 => join::<4>(four(at), join::<2>(two(at.add(64)), one(at.add(96)))),
            _ => [_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())],
        }
    }
}

/// Eight columns of sixteen rows, as pairs of 16-bit numbers: a vector for each two columns.
///
/// # Safety
/// `16·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn pairs<const BITS: usize>(at: *const u8) -> [__m512i; PAIRS] {
    if BITS == 4 {
        // SAFETY: as of this function.
        let v = unsafe { _mm512_loadu_si512(at.cast()) };
        let mask = _mm512_set1_epi16(15);
        return [
            _mm512_and_si512(v, mask),
            _mm512_and_si512(_mm512_srli_epi16::<8>(v), mask),
            _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask),
            _mm512_srli_epi16::<12>(v),
        ];
    }
    // SAFETY: as of this function.
    let [e0, e1] = unsafe { unpack::<BITS>(at) };
    let mask = _mm512_set1_epi16(255);
    [
        _mm512_and_si512(e0, mask),
        _mm512_srli_epi16::<8>(e0),
        _mm512_and_si512(e1, mask),
        _mm512_srli_epi16::<8>(e1),
    ]
}

/// Adds the products of a tile with a group of `T` tokens, which lie side by side, to `out`.
///
/// # Safety
/// The machine must have AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) unsafe fn tile<const T: usize>(
    input: Input<'_>,
    tile: usize,
    group: usize,
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function; the bits are the plane's.
    unsafe {
        with_bits!(input.plane.bits, BITS => match input.plane.zeros {
            Zeros::Fixed(_) => of_bits::<BITS, T, false>(input, tile, group, out),
            Zeros::Stored(_) => of_bits::<BITS, T, true>(input, tile, group, out),
        })
    }
}

/// # Safety
/// As [`tile`], and the plane must have `BITS` bits, and `STORED` say whether zero points are stored.
// A function of its own for each: registers are allotted within functions.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn of_bits<const BITS: usize, const T: usize, const STORED: bool>(
    input: Input<'_>,
    tile: usize,
    group: usize,
    out: &mut [[f32; TILE]; T],
) {
    let (plane, x) = (input.plane, input.x);
    assert!(x.width == T && x.blocks == plane.blocks, "other tokens side by side");
    let bytes = plane.tile_bytes();
    let mut codes = plane.codes[tile * bytes..][..bytes].as_ptr();
    let (a, x_scales) = x.group(group);
    let mut a = a.as_ptr();
    let mut starts = input.starts[group * plane.parts * T..][..plane.parts * T].as_ptr();
    let mut groups = Groups::of(plane, tile);
    for run in 0..x.runs {
        let mut products = [_mm512_setzero_ps(); T];
        for part in plane.parts_of_run(run) {
            // Two sums of one token, so that none waits for the one before.
            let mut totals = [[_mm512_setzero_si512(); 2]; T];
            for t in 0..T {
                // SAFETY: rows and tokens have this part.
                totals[t][0] = unsafe { groups.all_starts::<STORED>(*starts.add(t)) };
            }
            starts = starts.wrapping_add(T);
            for _ in plane.halves(part) {
                for step in 0..STEPS {
                    prefetch::<BITS>(codes.wrapping_add(step * 16 * BITS), 16 * BITS);
                    // SAFETY: tile and tokens have these columns.
                    unsafe {
                        let w = pairs::<BITS>(codes.add(step * 16 * BITS));
                        for p in 0..PAIRS {
                            for t in 0..T {
                                let at = a.add((step * COLUMNS + 2 * p) * T + 2 * t);
                                let a = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                                let own = &mut totals[t][if T == 1 { p % 2 } else { 0 }];
                                *own = multiply_add(*own, w[p], a);
                            }
                        }
                    }
                }
                codes = codes.wrapping_add(STEPS * 16 * BITS);
                a = a.wrapping_add(BLOCK / 2 * T);
            }
            // SAFETY: as above.
            let scales = unsafe { groups.all_scales() };
            groups.advance();
            for t in 0..T {
                let [mut total, other] = totals[t];
                if T == 1 {
                    total = _mm512_add_epi32(total, other);
                }
                products[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales, products[t]);
            }
        }
        for t in 0..T {
            let scale = _mm512_set1_ps(x_scales[run * T + t]);
            // SAFETY: a tile has sixteen sums.
            unsafe {
                let sums = _mm512_loadu_ps(out[t].as_ptr());
                let sums = _mm512_fmadd_ps(products[t], scale, sums);
                _mm512_storeu_ps(out[t].as_mut_ptr(), sums);
            }
        }
    }
}

/// [`tile`] with quantized activations, four columns of bytes at a time; the same bits.
///
/// # Safety
/// As [`tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(in super::super) unsafe fn tile_of_bytes<const T: usize>(
    input: Input<'_>,
    tile: usize,
    group: usize,
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function; the bits are the plane's.
    unsafe {
        with_bits!(input.plane.bits, BITS => match input.plane.zeros {
            Zeros::Fixed(_) => bytes_of_bits::<BITS, T, false>(input, tile, group, out),
            Zeros::Stored(_) => bytes_of_bits::<BITS, T, true>(input, tile, group, out),
        })
    }
}

/// With `A = 2(2a − 2z_a)`, `Σ u·A = 4·Σ u·a − 2·2z_a·Σ u`; the second sum is taken beside.
///
/// # Safety
/// As [`of_bits`].
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn bytes_of_bits<const BITS: usize, const T: usize, const STORED: bool>(
    input: Input<'_>,
    tile: usize,
    group: usize,
    out: &mut [[f32; TILE]; T],
) {
    let (plane, x) = (input.plane, input.x);
    assert!(x.width == T && x.blocks == plane.blocks, "other tokens side by side");
    let bytes = plane.tile_bytes();
    let mut codes = plane.codes[tile * bytes..][..bytes].as_ptr();
    let own = x.bytes(group);
    let mut a = own.codes.as_ptr();
    let mut zeros = [0; T];
    zeros[..own.doubled_zeros.len()].copy_from_slice(own.doubled_zeros);
    let mut starts = input.starts[group * plane.parts * T..][..plane.parts * T].as_ptr();
    let mut groups = Groups::of(plane, tile);
    let ones = _mm512_set1_epi8(1);
    for run in 0..x.runs {
        let mut products = [_mm512_setzero_ps(); T];
        for part in plane.parts_of_run(run) {
            let mut totals = [_mm512_setzero_si512(); T];
            let mut sum = _mm512_setzero_si512();
            for _ in plane.halves(part) {
                for step in 0..STEPS {
                    // SAFETY: tile and tokens have these columns.
                    unsafe {
                        let w = unpack::<BITS>(codes.add(step * 16 * BITS));
                        for half in 0..2 {
                            sum = _mm512_dpbusd_epi32(sum, w[half], ones);
                            for t in 0..T {
                                let at = a.add((step * COLUMNS + 4 * half) * T + 4 * t);
                                let a = _mm512_set1_epi32(at.cast::<i32>().read_unaligned());
                                totals[t] = _mm512_dpbusd_epi32(totals[t], w[half], a);
                            }
                        }
                    }
                }
                codes = codes.wrapping_add(STEPS * 16 * BITS);
                a = a.wrapping_add(BLOCK / 2 * T);
            }
            // SAFETY: as above.
            let scales = unsafe { groups.all_scales() };
            for t in 0..T {
                // SAFETY: rows and tokens have this part.
                let start = unsafe { groups.all_starts::<STORED>(*starts.add(t)) };
                let centre = _mm512_mullo_epi32(sum, _mm512_set1_epi32(2 * zeros[t]));
                let total = _mm512_sub_epi32(_mm512_slli_epi32::<2>(totals[t]), centre);
                let total = _mm512_cvtepi32_ps(_mm512_add_epi32(total, start));
                products[t] = _mm512_fmadd_ps(total, scales, products[t]);
            }
            starts = starts.wrapping_add(T);
            groups.advance();
        }
        for t in 0..T {
            let scale = _mm512_set1_ps(own.scales[run * T + t]);
            // SAFETY: a tile has sixteen sums.
            unsafe {
                let sums = _mm512_loadu_ps(out[t].as_ptr());
                let sums = _mm512_fmadd_ps(products[t], scale, sums);
                _mm512_storeu_ps(out[t].as_mut_ptr(), sums);
            }
        }
    }
}
