//! Dot products in 32 partial sums, so that they vectorize and their order is fixed: the same bits on
//! every machine, and the same for a row of sixteen-bit numbers as for its f32 copy.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use anybit_core::HalfRow;
use half::f16;

use crate::isa::{Isa, isa};

/// Lanes of a dot product.
const LANES: usize = 32;

/// Dot product of slices of equal lengths.
///
/// # Panics
/// When they are not.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_of::<Single>(a, b)
}

/// Dot product with a row of sixteen-bit numbers, without a copy of it.
///
/// # Panics
/// When its length is another.
pub fn dot_half(x: &[f32], row: HalfRow<'_>) -> f32 {
    match row {
        HalfRow::F16(row) => dot_of::<F16>(x, row),
        HalfRow::Bf16(row) => dot_of::<Bf16>(x, row),
    }
}

/// Dot products of the rows of `x` with one row, which is read once for several of them: the bits that
/// each would get alone.
///
/// # Panics
/// When `x` has other columns, or `out` other rows.
pub fn dots(x: &[f32], row: &[f32], out: &mut [f32]) {
    dots_of::<Single>(x, row, out);
}

/// [`dots`] with a row of sixteen-bit numbers.
///
/// # Panics
/// As [`dots`].
pub fn dots_half(x: &[f32], row: HalfRow<'_>, out: &mut [f32]) {
    match row {
        HalfRow::F16(row) => dots_of::<F16>(x, row, out),
        HalfRow::Bf16(row) => dots_of::<Bf16>(x, row, out),
    }
}

fn dots_of<F: Format>(x: &[f32], row: &[F::Stored], out: &mut [f32]) {
    assert_eq!(x.len(), row.len() * out.len(), "factors have different lengths");
    if row.is_empty() {
        return out.fill(0.0);
    }
    let (four, rest) = out.as_chunks_mut::<4>();
    let (x_four, x_rest) = x.split_at(4 * four.len() * row.len());
    for (x, out) in x_four.chunks_exact(4 * row.len()).zip(four) {
        *out = products::<F, 4>(std::array::from_fn(|t| &x[t * row.len()..][..row.len()]), row);
    }
    for (x, out) in x_rest.chunks_exact(row.len()).zip(rest) {
        *out = dot_of::<F>(x, row);
    }
}

#[inline]
fn dot_of<F: Format>(x: &[f32], row: &[F::Stored]) -> f32 {
    assert_eq!(x.len(), row.len(), "factors have different lengths");
    products::<F, 1>([x], row)[0]
}

/// Dot products of rows with one, all of the same length.
#[inline]
fn products<F: Format, const T: usize>(x: [&[f32]; T], row: &[F::Stored]) -> [f32; T] {
    let (row_lanes, row_tail) = row.as_chunks::<LANES>();
    let x = x.map(|x| x.as_chunks::<LANES>());
    let x_lanes = x.map(|x| x.0);
    let sums = match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: chosen because the machine has these instructions; lengths are equal.
        Isa::Avx512 => unsafe { lanes_avx512::<F, T>(x_lanes, row_lanes) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => x_lanes.map(|x| unsafe { lanes_avx2::<F>(x, row_lanes) }),
        _ => x_lanes.map(|x| lanes::<F>(x, row_lanes)),
    };
    std::array::from_fn(|t| {
        let tail = x[t].1.iter().zip(row_tail).map(|(x, w)| x * F::value(*w));
        total(sums[t]) + tail.sum::<f32>()
    })
}

/// Sum of the lanes, by halves.
#[inline(always)]
pub(crate) fn total<const N: usize>(mut lanes: [f32; N]) -> f32 {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Sums of products lane by lane, the scalar twin.
fn lanes<F: Format>(x: &[[f32; LANES]], row: &[[F::Stored; LANES]]) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for (x, row) in x.iter().zip(row) {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(row) {
            *sum = x.mul_add(F::value(*w), *sum);
        }
    }
    sums
}

/// [`lanes`] with AVX2, FMA and F16C.
///
/// # Safety
/// The machine must have them.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_avx2<F: Format>(x: &[[f32; LANES]], row: &[[F::Stored; LANES]]) -> [f32; LANES] {
    let mut sums = [_mm256_setzero_ps(); LANES / 8];
    for (x, row) in x.iter().zip(row) {
        for (i, sum) in sums.iter_mut().enumerate() {
            // SAFETY: eight numbers from each multiple of eight on are in the chunks.
            *sum = unsafe {
                let x = _mm256_loadu_ps(x.as_ptr().add(8 * i));
                _mm256_fmadd_ps(x, F::eight(row.as_ptr().add(8 * i)), *sum)
            };
        }
    }
    let mut out = [0f32; LANES];
    for (i, sum) in sums.into_iter().enumerate() {
        // SAFETY: room for eight numbers.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), sum) };
    }
    out
}

/// Asks for a cache line.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(line: *const i8) {
    // SAFETY: a hint that reads nothing, wherever it points.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
}

/// Bytes of a row that are asked for before they are needed.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 8192;

/// [`lanes`] of several rows with AVX-512.
///
/// # Safety
/// The machine must have AVX-512 F and BW; rows must have the same length.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn lanes_avx512<F: Format, const T: usize>(
    x: [&[[f32; LANES]]; T],
    row: &[[F::Stored; LANES]],
) -> [[f32; LANES]; T] {
    let mut sums = [[_mm512_setzero_ps(); LANES / 16]; T];
    for (at, row) in row.iter().enumerate() {
        for i in 0..LANES / 16 {
            // One stream is more than the hardware foresees; rows follow each other.
            let ahead = row.as_ptr().wrapping_add(16 * i).cast::<i8>().wrapping_add(AHEAD);
            prefetch(ahead);
            // SAFETY: sixteen numbers from each multiple of sixteen on are in the chunks.
            let w = unsafe { F::sixteen(row.as_ptr().add(16 * i)) };
            for (x, sums) in x.iter().zip(&mut sums) {
                // SAFETY: as above.
                let x = unsafe { _mm512_loadu_ps(x.get_unchecked(at).as_ptr().add(16 * i)) };
                sums[i] = _mm512_fmadd_ps(x, w, sums[i]);
            }
        }
    }
    let mut out = [[0f32; LANES]; T];
    for (out, sums) in out.iter_mut().zip(sums) {
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: room for sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(16 * i), sum) };
        }
    }
    out
}

/// What numbers are stored in.
trait Format {
    /// One as stored.
    type Stored: Copy;

    /// One as f32.
    fn value(stored: Self::Stored) -> f32;

    /// Eight as f32.
    ///
    /// # Safety
    /// Eight must be there, and the machine have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(at: *const Self::Stored) -> __m256;

    /// Sixteen as f32.
    ///
    /// # Safety
    /// Sixteen must be there, and the machine have AVX-512 F and BW.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(at: *const Self::Stored) -> __m512;
}

struct Single;
struct F16;
struct Bf16;

impl Format for Single {
    type Stored = f32;

    fn value(stored: f32) -> f32 {
        stored
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn eight(at: *const f32) -> __m256 {
        // SAFETY: by the caller's contract.
        unsafe { _mm256_loadu_ps(at) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn sixteen(at: *const f32) -> __m512 {
        // SAFETY: by the caller's contract.
        unsafe { _mm512_loadu_ps(at) }
    }
}

impl Format for F16 {
    type Stored = [u8; 2];

    fn value(stored: [u8; 2]) -> f32 {
        f16::from_le_bytes(stored).to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn eight(at: *const [u8; 2]) -> __m256 {
        // SAFETY: by the caller's contract.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn sixteen(at: *const [u8; 2]) -> __m512 {
        // SAFETY: by the caller's contract.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }
}

impl Format for Bf16 {
    type Stored = [u8; 2];

    fn value(stored: [u8; 2]) -> f32 {
        f32::from_bits((u16::from_le_bytes(stored) as u32) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn eight(at: *const [u8; 2]) -> __m256 {
        // SAFETY: by the caller's contract.
        let wide = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(at.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn sixteen(at: *const [u8; 2]) -> __m512 {
        // SAFETY: by the caller's contract.
        let wide = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(at.cast()) });
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use half::bf16;

    fn normals(len: usize, rng: &mut SplitMix64) -> Vec<f32> {
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn dots_have_the_bits_of_the_scalar_twin() {
        let mut rng = SplitMix64::new(2);
        for len in [0, 1, 7, 31, 32, 33, 100, 576, 1537] {
            let (a, b) = (normals(len, &mut rng), normals(len, &mut rng));
            if Isa::Avx2.detected() {
                let (a, b) = (a.as_chunks().0, b.as_chunks().0);
                // SAFETY: just asked for.
                assert_eq!(unsafe { lanes_avx2::<Single>(a, b) }, lanes::<Single>(a, b), "{len}");
                let halves: Vec<[u8; 2]> =
                    b.as_flattened().iter().map(|v| f16::from_f32(*v).to_le_bytes()).collect();
                let row = halves.as_chunks().0;
                // SAFETY: as above.
                let (f16, bf16) =
                    unsafe { (lanes_avx2::<F16>(a, row), lanes_avx2::<Bf16>(a, row)) };
                assert_eq!(f16, lanes::<F16>(a, row), "{len}");
                // Bytes of f16 read as bf16 are other numbers, not broken ones.
                assert_eq!(bf16, lanes::<Bf16>(a, row), "{len}");
            }
            if Isa::Avx512.detected() {
                let five: Vec<f32> = (0..5 * len).map(|_| rng.normal() as f32).collect();
                let halves: Vec<[u8; 2]> =
                    b.iter().map(|v| f16::from_f32(*v).to_le_bytes()).collect();
                let mut all = [0.0; 5];
                dots(&five, &b, &mut all);
                let alone =
                    |row: &[f32]| five.chunks(len.max(1)).map(|x| dot(x, row)).collect::<Vec<_>>();
                assert_eq!(all[..5 * len.min(1)], alone(&b), "{len}");
                for row in [HalfRow::F16(&halves), HalfRow::Bf16(&halves)] {
                    dots_half(&five, row, &mut all);
                    let alone = five.chunks(len.max(1)).map(|x| dot_half(x, row));
                    assert_eq!(all[..5 * len.min(1)], alone.collect::<Vec<_>>(), "{len}");
                }
                let lanes_of = |x| lanes::<Single>(x, b.as_chunks().0);
                let x = [a.as_chunks().0, b.as_chunks().0];
                // SAFETY: just asked for.
                let wide = unsafe { lanes_avx512::<Single, 2>(x, b.as_chunks().0) };
                assert_eq!(wide, x.map(lanes_of), "{len}");
                let row = halves.as_chunks().0;
                // SAFETY: as above.
                let wide = unsafe {
                    [lanes_avx512::<F16, 1>([x[0]], row), lanes_avx512::<Bf16, 1>([x[0]], row)]
                };
                assert_eq!(wide, [[lanes::<F16>(x[0], row)], [lanes::<Bf16>(x[0], row)]], "{len}");
            }
            let want: f64 = a.iter().zip(&b).map(|(a, b)| *a as f64 * *b as f64).sum();
            approx::assert_abs_diff_eq!(dot(&a, &b) as f64, want, epsilon = 1e-4);
        }
    }

    /// Subnormal, huge and broken numbers too, at an odd address.
    #[test]
    fn rows_of_halves_have_the_bits_of_their_copies() {
        let mut rng = SplitMix64::new(3);
        for len in [0, 1, 7, 32, 33, 100, 577] {
            let x = normals(len, &mut rng);
            let mut values = normals(len, &mut rng);
            let odd = [1e-7, -3e4, 6e-5, f32::INFINITY];
            values.iter_mut().skip(5).zip(odd).for_each(|(v, odd)| *v = odd);
            let check = |bytes: Vec<u8>, is_f16: bool, copy: Vec<f32>| {
                let shifted: Vec<u8> = std::iter::once(0).chain(bytes).collect();
                let row = shifted[1..].as_chunks().0;
                let row = if is_f16 { HalfRow::F16(row) } else { HalfRow::Bf16(row) };
                assert_eq!(dot_half(&x, row).to_bits(), dot(&x, &copy).to_bits(), "{len}");
            };
            let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
            check(bytes, true, halves.iter().map(|h| h.to_f32()).collect());
            let halves: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            let bytes = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
            check(bytes, false, halves.iter().map(|h| h.to_f32()).collect());
        }
    }
}
