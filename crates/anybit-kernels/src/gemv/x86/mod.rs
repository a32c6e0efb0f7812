//! Vector kernels: AVX2, and AVX-512 with VNNI.

/// Runs `$call` with the constant `$BITS` of so many bits, 1 to 8.
macro_rules! with_bits {
    ($bits:expr, $BITS:ident => $call:expr) => {
        with_bits!(@ $bits, $BITS => $call; 1 2 3 4 5 6 7)
    };
    (@ $bits:expr, $BITS:ident => $call:expr; $($n:literal)*) => {
        match $bits {
            $($n => {
                const $BITS: usize = $n;
                $call
            })*
            _ => {
                const $BITS: usize = 8;
                $call
            }
        }
    };
}

pub(super) mod affine;
pub(super) mod affine512;
pub(super) mod table;
pub(super) mod table512;

use std::arch::x86_64::*;

/// `sum` with the products of pairs added. In assembly, since the compiler takes the instruction
/// apart, into products and a sum, where it finds several in a row that wait for each other: here
/// other sums fill the time.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_add(sum: __m512i, w: __m512i, a: __m512i) -> __m512i {
    let mut total = sum;
    // SAFETY: registers only; the instruction is one of this function's.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {total}, {w}, {a}",
            total = inout(zmm_reg) total,
            w = in(zmm_reg) w,
            a = in(zmm_reg) a,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    total
}

/// Asks for what lies behind `len` bytes of codes at some distance: one stream of them is more than the
/// hardware foresees.
#[inline(always)]
fn prefetch<const BITS: usize>(codes: *const u8, len: usize) {
    for line in (0..len).step_by(64) {
        let ahead = codes.wrapping_add(line + 1024 * BITS);
        // SAFETY: a hint that reads nothing, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
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

/// The bytes `E₀` and `E₁`.
///
/// # Safety
/// `8·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: usize>(at: *const u8) -> [__m256i; 2] {
    // SAFETY: the slices take `8·BITS` bytes together.
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

/// The codes `E₀` and `E₁`, one after the other.
///
/// # Safety
/// The machine must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn unpack_codes(bytes: &[u8], bits: usize, codes: &mut [u8; 64]) {
    assert!(bytes.len() >= 8 * bits, "codes are cut");
    let at = bytes.as_ptr();
    // SAFETY: all bytes are there.
    let halves = unsafe { with_bits!(bits, BITS => unpack::<BITS>(at)) };
    for (half, codes) in halves.into_iter().zip(codes.as_chunks_mut::<32>().0) {
        // SAFETY: a half has 32 bytes.
        unsafe { _mm256_storeu_si256(codes.as_mut_ptr().cast(), half) };
    }
}
