//! Dot products of unsigned and signed bytes with vector instructions: 16 or 32 (AVX2) or 64
//! (AVX-512 VNNI) columns at a time.

use std::arch::x86_64::*;

use super::{ROWS, Tile, dots_scalar};

/// [`Tile::run`] with AVX2.
///
/// # Safety
/// The machine must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn tile_avx2<const T: usize>(tile: &Tile<'_, T>) -> [[f32; ROWS]; T] {
    tile.run(|u, a, narrow| {
        // SAFETY: AVX2 by the caller's contract, equal lengths by that of `run`.
        unsafe {
            match narrow {
                true => dots_avx2::<ROWS, T, true>(u, a),
                false => dots_avx2::<ROWS, T, false>(u, a),
            }
        }
    })
}

/// [`Tile::run`] with AVX-512 VNNI.
///
/// # Safety
/// The machine must have AVX-512 F, BW and VNNI.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn tile_vnni<const T: usize>(tile: &Tile<'_, T>) -> [[f32; ROWS]; T] {
    tile.run(|u, a, _| {
        // SAFETY: instructions by the caller's contract, equal lengths by that of `run`.
        unsafe { dots_vnni(u, a) }
    })
}

/// Dot products of each row with each token; `NARROW` when no `u` exceeds 63.
///
/// # Safety
/// The machine must have AVX2; all slices must have the same length.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn dots_avx2<const R: usize, const T: usize, const NARROW: bool>(
    u: [&[u8]; R],
    a: [&[i8]; T],
) -> [[i32; ROWS]; T] {
    let len = a[0].len();
    let step = if NARROW { 32 } else { 16 };
    let whole = len - len % step;
    let ones = _mm256_set1_epi16(1);
    let mut sums = [[_mm256_setzero_si256(); ROWS]; T];
    let mut j = 0;
    while j < whole {
        let mut x = [_mm256_setzero_si256(); T];
        for (x, a) in x.iter_mut().zip(&a) {
            // SAFETY: `step` bytes from `j` on lie inside every slice.
            *x = unsafe {
                let at = a.as_ptr().add(j);
                match NARROW {
                    true => _mm256_loadu_si256(at.cast()),
                    false => _mm256_cvtepi8_epi16(_mm_loadu_si128(at.cast())),
                }
            };
        }
        for (r, u) in u.iter().enumerate() {
            // SAFETY: as above.
            let w = unsafe {
                let at = u.as_ptr().add(j);
                match NARROW {
                    true => _mm256_loadu_si256(at.cast()),
                    false => _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast())),
                }
            };
            for (sums, x) in sums.iter_mut().zip(&x) {
                let products = match NARROW {
                    // Pairs in an i16, which do not saturate, then pairs of those.
                    true => _mm256_madd_epi16(_mm256_maddubs_epi16(w, *x), ones),
                    false => _mm256_madd_epi16(w, *x),
                };
                sums[r] = _mm256_add_epi32(sums[r], products);
            }
        }
        j += step;
    }
    let mut out = [[0; ROWS]; T];
    if whole < len {
        out = dots_scalar(u.map(|u| &u[whole..]), a.map(|a| &a[whole..]));
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        // SAFETY: AVX2 by the caller's contract.
        let sums = unsafe { reduce(sums) };
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
    out
}

/// Dot products of each row with each token. Exact for all bytes: the instruction adds four
/// products to an i32 without saturating.
///
/// # Safety
/// The machine must have AVX-512 F, BW and VNNI; all slices must have the same length.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vnni")]
pub(super) unsafe fn dots_vnni<const R: usize, const T: usize>(
    u: [&[u8]; R],
    a: [&[i8]; T],
) -> [[i32; ROWS]; T] {
    let len = a[0].len();
    let mut sums = [[_mm512_setzero_si512(); ROWS]; T];
    let mut j = 0;
    while j < len {
        // What lies behind the end reads as zero.
        let mask: __mmask64 = if len - j < 64 { (1 << (len - j)) - 1 } else { !0 };
        let mut x = [_mm512_setzero_si512(); T];
        for (x, a) in x.iter_mut().zip(&a) {
            // SAFETY: the bytes of `mask` from `j` on lie inside every slice.
            *x = unsafe { _mm512_maskz_loadu_epi8(mask, a.as_ptr().add(j)) };
        }
        for (r, u) in u.iter().enumerate() {
            // SAFETY: as above.
            let w = unsafe { _mm512_maskz_loadu_epi8(mask, u.as_ptr().add(j).cast()) };
            for (sums, x) in sums.iter_mut().zip(&x) {
                sums[r] = _mm512_dpbusd_epi32(sums[r], w, *x);
            }
        }
        j += 64;
    }
    let mut out = [[0; ROWS]; T];
    for (out, sums) in out.iter_mut().zip(&sums) {
        let mut halves = [_mm256_setzero_si256(); ROWS];
        for (half, sum) in halves.iter_mut().zip(sums) {
            let high = _mm512_extracti64x4_epi64::<1>(*sum);
            *half = _mm256_add_epi32(_mm512_castsi512_si256(*sum), high);
        }
        // SAFETY: AVX-512 includes AVX2.
        *out = unsafe { reduce(halves) };
    }
    out
}

/// The sum of each vector's eight numbers.
///
/// # Safety
/// The machine must have AVX2.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn reduce(sums: [__m256i; ROWS]) -> [i32; ROWS] {
    let [a, b, c, d] = sums;
    let quarters = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    let high = _mm256_extracti128_si256::<1>(quarters);
    let total = _mm_add_epi32(_mm256_castsi256_si128(quarters), high);
    let mut out = [0; ROWS];
    // SAFETY: the array has the vector's 16 bytes.
    unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), total) };
    out
}
