//! Dot products in 32 partial sums, so that they vectorize and their order is fixed: the same bits on
//! every machine, and the same for a row of sixteen-bit numbers as for its f32 copy.

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
    assert_eq!(a.len(), b.len(), "factors have different lengths");
    let (a_lanes, a_tail) = a.as_chunks::<LANES>();
    let (b_lanes, b_tail) = b.as_chunks::<LANES>();
    let sums = match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: chosen because the machine has these instructions.
        Isa::Avx2 | Isa::Avx512 => unsafe { x86::lanes(a_lanes, b_lanes) },
        _ => lanes(a_lanes, b_lanes),
    };
    add(sums) + a_tail.iter().zip(b_tail).map(|(a, b)| a * b).sum::<f32>()
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

fn dot_of<H: Half>(x: &[f32], row: &[[u8; 2]]) -> f32 {
    assert_eq!(x.len(), row.len(), "factors have different lengths");
    let (x_lanes, x_tail) = x.as_chunks::<LANES>();
    let (row_lanes, row_tail) = row.as_chunks::<LANES>();
    let sums = match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: chosen because the machine has these instructions.
        Isa::Avx2 | Isa::Avx512 => unsafe { x86::lanes_of::<H>(x_lanes, row_lanes) },
        _ => lanes_of::<H>(x_lanes, row_lanes),
    };
    add(sums) + x_tail.iter().zip(row_tail).map(|(x, w)| x * H::value(*w)).sum::<f32>()
}

/// The sum of all lanes.
fn add(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// Sums of products lane by lane, the scalar twin.
fn lanes(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    sums
}

/// [`lanes`] of a row of sixteen-bit numbers, the scalar twin.
fn lanes_of<H: Half>(x: &[[f32; LANES]], row: &[[[u8; 2]; LANES]]) -> [f32; LANES] {
    let mut sums = [0f32; LANES];
    for (x, row) in x.iter().zip(row) {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(row) {
            *sum = x.mul_add(H::value(*w), *sum);
        }
    }
    sums
}

/// A type of sixteen-bit numbers.
trait Half {
    /// One as f32.
    fn value(bytes: [u8; 2]) -> f32;

    /// Eight as f32.
    ///
    /// # Safety
    /// Sixteen bytes must be there, and the machine have AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(at: *const u8) -> std::arch::x86_64::__m256;
}

struct F16;
struct Bf16;

impl Half for F16 {
    fn value(bytes: [u8; 2]) -> f32 {
        f16::from_le_bytes(bytes).to_f32()
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn eight(at: *const u8) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's contract.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(at.cast()) })
    }
}

impl Half for Bf16 {
    fn value(bytes: [u8; 2]) -> f32 {
        f32::from_bits((u16::from_le_bytes(bytes) as u32) << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn eight(at: *const u8) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: by the caller's contract.
        let wide = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(at.cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Half, LANES};
    use std::arch::x86_64::*;

    /// [`super::lanes`] with AVX2 and FMA.
    ///
    /// # Safety
    /// The machine must have them.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn lanes(a: &[[f32; LANES]], b: &[[f32; LANES]]) -> [f32; LANES] {
        let mut sums = [_mm256_setzero_ps(); LANES / 8];
        for (a, b) in a.iter().zip(b) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight numbers from each multiple of eight on are in the chunks.
                *sum = unsafe {
                    let (a, b) = (a.as_ptr().add(8 * i), b.as_ptr().add(8 * i));
                    _mm256_fmadd_ps(_mm256_loadu_ps(a), _mm256_loadu_ps(b), *sum)
                };
            }
        }
        out(sums)
    }

    /// [`super::lanes_of`] with AVX2, FMA and F16C.
    ///
    /// # Safety
    /// The machine must have them.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn lanes_of<H: Half>(x: &[[f32; LANES]], row: &[[[u8; 2]; LANES]]) -> [f32; LANES] {
        let mut sums = [_mm256_setzero_ps(); LANES / 8];
        for (x, row) in x.iter().zip(row) {
            for (i, sum) in sums.iter_mut().enumerate() {
                // SAFETY: eight numbers from each multiple of eight on are in the chunks.
                *sum = unsafe {
                    let (x, row) = (x.as_ptr().add(8 * i), row.as_flattened().as_ptr());
                    _mm256_fmadd_ps(_mm256_loadu_ps(x), H::eight(row.add(16 * i)), *sum)
                };
            }
        }
        out(sums)
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn out(sums: [__m256; LANES / 8]) -> [f32; LANES] {
        let mut out = [0f32; LANES];
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: room for eight numbers.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * i), sum) };
        }
        out
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
                assert_eq!(unsafe { x86::lanes(a, b) }, lanes(a, b), "{len}");
                let halves: Vec<[u8; 2]> =
                    b.as_flattened().iter().map(|v| f16::from_f32(*v).to_le_bytes()).collect();
                let row = halves.as_chunks().0;
                // SAFETY: as above.
                let (f16, bf16) =
                    unsafe { (x86::lanes_of::<F16>(a, row), x86::lanes_of::<Bf16>(a, row)) };
                assert_eq!(f16, lanes_of::<F16>(a, row), "{len}");
                // Bytes of f16 read as bf16 are other numbers, not broken ones.
                assert_eq!(bf16, lanes_of::<Bf16>(a, row), "{len}");
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
