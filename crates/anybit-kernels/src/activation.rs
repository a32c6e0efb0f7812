//! Elementwise functions that vectorize: a polynomial exponential, softmax and SwiGLU.

use crate::SpinPool;
use crate::isa::{Isa, isa};

/// Elements that one task handles.
const CHUNK: usize = 1 << 14;

/// `e^x` with a relative error below 2e-7: `2^n · 2^f`, `2^f` by a polynomial on `[−½, ½]`.
/// Below −87.3 it is 0, above the logarithm of the largest f32 infinite, and NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // The upper end lies beyond what an f32 holds, so that the product below overflows there.
    let clamped = x.clamp(-87.3, 89.0);
    let t = clamped * std::f32::consts::LOG2_E;
    let n = t.round_ties_even();
    // The product's low part keeps the fraction exact where `t` is large.
    let f = clamped.mul_add(std::f32::consts::LOG2_E, -n);
    let p = 1.540_353e-4f32;
    let p = p.mul_add(f, 1.333_355_8e-3);
    let p = p.mul_add(f, 9.618_129e-3);
    let p = p.mul_add(f, 5.550_411e-2);
    let p = p.mul_add(f, 2.402_265e-1);
    let p = p.mul_add(f, 6.931_472e-1);
    let p = p.mul_add(f, 1.0);
    // n is at most 128: two halves keep both factors finite until the product overflows.
    let half = (n as i32) >> 1;
    let scale = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let value = p * scale(half) * scale(n as i32 - half);
    if x < -87.3 { 0.0 } else { value }
}

/// Writes a function that is compiled for AVX-512 too, and runs so where there is. Both give the same
/// bits: nothing is fused or reordered that is not written so.
macro_rules! vectorized {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $of:ty),*) $body:block) => {
        $(#[$doc])*
        $vis fn $name($($arg: $of),*) {
            #[inline(always)]
            fn plain($($arg: $of),*) $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
                fn wide($($arg: $of),*) {
                    plain($($arg),*)
                }
                if isa() == Isa::Avx512 {
                    // SAFETY: the machine has these instructions.
                    return unsafe { wide($($arg),*) };
                }
            }
            plain($($arg),*)
        }
    };
}

vectorized! {
/// Softmax of a row in place.
pub fn softmax(row: &mut [f32]) {
    let max = largest(row);
    let mut lanes = [0f32; 16];
    let mut chunks = row.chunks_exact_mut(16);
    for chunk in &mut chunks {
        for (v, lane) in chunk.iter_mut().zip(&mut lanes) {
            *v = exp(*v - max);
            *lane += *v;
        }
    }
    let mut sum: f32 = lanes.iter().sum();
    for v in chunks.into_remainder() {
        *v = exp(*v - max);
        sum += *v;
    }
    let factor = 1.0 / sum;
    row.iter_mut().for_each(|v| *v *= factor);
}
}

/// Largest of the values, those that are not a number aside; −∞ of none.
#[inline(always)]
fn largest(row: &[f32]) -> f32 {
    // Lanes of which each takes a comparison and a choice: what vectors have an instruction for.
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane = if *v > *lane { *v } else { *lane };
        }
    }
    let rest = rest.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    lanes.into_iter().fold(rest, f32::max)
}

/// `gate = silu(gate) · up`, elementwise; `silu(x) = x / (1 + e^−x)`.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    assert_eq!(gate.len(), up.len(), "other rows");
    SpinPool::global().chunks(gate, CHUNK, |at, gate| {
        gated(gate, &up[at * CHUNK..]);
    });
}

vectorized! {
/// [`swiglu`] of a part.
fn gated(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "other rows");
    SpinPool::global().chunks(x, CHUNK, |at, x| {
        x.iter_mut().zip(&y[at * CHUNK..]).for_each(|(x, y)| *x += *y);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let want = (x as f64).exp();
            let error = (exp(x) as f64 / want - 1.0).abs();
            // The argument's own rounding is magnified by |x|.
            assert!(error < 4e-7 + 6e-8 * x.abs() as f64, "exp({x}): {error}");
            x += 0.0137;
        }
        assert_eq!((exp(0.0), exp(-1e9), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
        // Up to the largest f32, and nothing finite behind it.
        let last = 88.72f32;
        let ratio = exp(last) as f64 / (last as f64).exp();
        assert!((ratio - 1.0).abs() < 1e-5, "{ratio}");
        for x in [88.73, 89.0, 1e9, f32::INFINITY] {
            assert_eq!(exp(x), f32::INFINITY, "{x}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn softmax_equals_the_scalar_twin(n in 1usize..70, scale in 0.1f32..60.0,
                                          seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let x: Vec<f32> = (0..n).map(|_| scale * rng.normal() as f32).collect();
            let mut row = x.clone();
            softmax(&mut row);
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
            let e: Vec<f64> = x.iter().map(|x| (*x as f64 - max).exp()).collect();
            let sum: f64 = e.iter().sum();
            for (y, e) in row.iter().zip(e) {
                // As of `exp`: the argument's own rounding is magnified.
                let want = e / sum;
                prop_assert!((*y as f64 - want).abs() <= 2e-5 * want + 1e-30, "{y} {want}");
            }
        }
    }

    /// Around the length from which threads share the work.
    #[test]
    fn swiglu_equals_the_scalar_twin() {
        let mut rng = SplitMix64::new(3);
        for n in [0, 1, 7, 8, 33, CHUNK, CHUNK + 1, 2 * CHUNK + 5] {
            let mut normals = || (0..n).map(|_| 8.0 * rng.normal() as f32).collect::<Vec<_>>();
            let (gate, up) = (normals(), normals());
            let mut y = gate.clone();
            swiglu(&mut y, &up);
            for ((y, g), u) in y.iter().zip(&gate).zip(&up) {
                let (g, u) = (*g as f64, *u as f64);
                let want = g / (1.0 + (-g).exp()) * u;
                assert!((*y as f64 - want).abs() <= 5e-6 * want.abs() + 1e-30, "{y} {want}");
            }
        }
        // Where e^−x is infinite, nothing is left of the gate.
        let mut far = [-200.0, 200.0];
        swiglu(&mut far, &[3.0, 3.0]);
        assert_eq!(far, [0.0, 600.0]);
    }

    #[test]
    fn softmax_sums_to_one_and_keeps_masked_at_zero() {
        for n in [1, 5, 16, 33] {
            let mut row: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin() * 4.0).collect();
            row[n / 2] = f32::NEG_INFINITY;
            if n == 1 {
                row[0] = 3.0;
            }
            let masked = row[n / 2] == f32::NEG_INFINITY;
            softmax(&mut row);
            approx::assert_abs_diff_eq!(row.iter().sum::<f32>(), 1.0, epsilon = 1e-6);
            assert!(!masked || row[n / 2] == 0.0);
        }
    }
}
