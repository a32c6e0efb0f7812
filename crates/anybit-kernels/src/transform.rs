//! Online transforms and quantizers over many rows, on all threads.
//!
//! The arithmetic of a row is that of [`anybit_core`], which is its scalar twin too: rows do not
//! depend on each other, so the result has the same bits.

use anybit_core::kronecker::Factors;
use anybit_core::scratch::with_scratch;
use anybit_core::transform::factors;
use anybit_core::{ActivationQuantizer, Transform};

use crate::isa::{Isa, isa};
use crate::{DisjointMut, QuantizedRows, SpinPool};

/// Values that one task handles.
const TASK: usize = 1 << 14;

fn rows_per_task(cols: usize) -> usize {
    (TASK / cols.max(1)).max(1)
}

/// `x → x P`, every row of `x`.
pub fn transform_rows(transform: &Transform, x: &mut [f32]) {
    let cols = transform.size().max(1);
    let step = rows_per_task(cols) * cols;
    SpinPool::global().chunks(x, step, |_, rows| apply(transform, rows, isa()));
}

/// [`Transform::apply`] with the vectors of `isa`; nothing is fused or reordered, so the bits are
/// the same.
fn apply(transform: &Transform, rows: &mut [f32], isa: Isa) {
    match transform {
        Transform::Kronecker { sizes, left, right } => {
            kronecker(factors(*sizes, left, right), rows, isa);
        }
        Transform::Compose(steps) => steps.iter().for_each(|step| apply(step, rows, isa)),
        _ => transform.apply(rows),
    }
}

fn kronecker(factors: Factors<'_>, rows: &mut [f32], isa: Isa) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(factors: Factors<'_>, rows: &mut [f32], scratch: &mut [f32]) {
            factors.apply_in(rows, false, scratch);
        }
        if isa != Isa::Scalar {
            // SAFETY: every level above the scalar one has AVX2.
            return with_scratch(factors.scratch(), |scratch| unsafe {
                avx2(factors, rows, scratch)
            });
        }
    }
    let _ = isa;
    factors.apply(rows, false);
}

/// Replaces rows by the values of their codes.
pub fn fake_rows(quantizer: &ActivationQuantizer, x: &mut [f32]) {
    let cols = quantizer.cols().max(1);
    let step = rows_per_task(cols) * cols;
    SpinPool::global().chunks(x, step, |_, rows| quantizer.fake(rows));
}

/// Puts rows on their grids.
pub fn quantize_rows(quantizer: &ActivationQuantizer, x: &[f32], out: &mut QuantizedRows) {
    let (cols, parts) = (quantizer.cols(), quantizer.segments.len());
    let tokens = x.len() / cols.max(1);
    out.cols = cols;
    out.segments.clear();
    out.segments.extend(quantizer.segments.iter().map(|s| s.cols));
    out.codes.resize(tokens * cols, 0);
    out.scales.resize(tokens * parts, 0.0);
    out.doubled_zeros.resize(tokens * parts, 0);
    let step = rows_per_task(cols);
    let codes = DisjointMut::new(&mut out.codes);
    let scales = DisjointMut::new(&mut out.scales);
    let zeros = DisjointMut::new(&mut out.doubled_zeros);
    SpinPool::global().each(tokens.div_ceil(step), |task| {
        for token in task * step..tokens.min((task + 1) * step) {
            let x = &x[token * cols..(token + 1) * cols];
            // SAFETY: parts of a token, which belongs to this task alone.
            unsafe {
                let grids = (scales.slice(token * parts, parts), zeros.slice(token * parts, parts));
                quantizer.encode_row(x, codes.slice(token * cols, cols), grids.0, grids.1);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use anybit_core::{Hadamard, Matrix, RowScale};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        /// Rows of any length, none or more than a task takes: what the core does to each.
        #[test]
        fn any_rows_are_row_by_row(rows in 0usize..300, blocks in 1usize..5, block in 0u32..8,
                                   bits in 2u8..=8, symmetric in any::<bool>(),
                                   seed in any::<u64>()) {
            let block = 1usize << block;
            let cols = blocks * block;
            let mut rng = SplitMix64::new(seed);
            let x: Vec<f32> = (0..rows * cols).map(|_| rng.normal() as f32).collect();
            let transform = Transform::Hadamard(Hadamard::blocks(cols, block).unwrap());
            let quantizer = ActivationQuantizer::plain(cols, bits, symmetric);
            let mut many = x.clone();
            transform_rows(&transform, &mut many);
            // What was left in there must not matter.
            let mut coded = QuantizedRows { codes: vec![7; 9], ..QuantizedRows::default() };
            quantize_rows(&quantizer, &many, &mut coded);
            fake_rows(&quantizer, &mut many);
            prop_assert_eq!(coded.segments.clone(), [cols]);
            prop_assert_eq!((coded.codes.len(), coded.scales.len()), (rows * cols, rows));
            for (t, one) in x.chunks(cols).enumerate() {
                let mut one = one.to_vec();
                transform.apply(&mut one);
                let (mut codes, mut scale, mut zero) = (vec![0; cols], [0.0], [0]);
                quantizer.encode_row(&one, &mut codes, &mut scale, &mut zero);
                quantizer.fake(&mut one);
                prop_assert_eq!(&one, &many[t * cols..(t + 1) * cols]);
                prop_assert_eq!(&codes, &coded.codes[t * cols..(t + 1) * cols]);
                prop_assert_eq!((scale[0], zero[0]), (coded.scales[t], coded.doubled_zeros[t]));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// At every level of instructions the bits of the core.
        #[test]
        fn kronecker_products_have_the_bits_of_the_core(
            rows in 0usize..9, sizes in (1usize..20, 1usize..70), sides in 0u8..4,
            seed in any::<u64>(),
        ) {
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let mut side = |bit: u8, n: usize| {
                (sides & bit > 0).then(|| Matrix::from_vec(n, n, normals(n * n)).unwrap())
            };
            let (left, right) = (side(1, sizes.0), side(2, sizes.1));
            let x = normals(rows * sizes.0 * sizes.1);
            let transform =
                Transform::Compose(vec![Transform::Kronecker { sizes, left, right }]);
            let mut expected = x.clone();
            transform.apply(&mut expected);
            for isa in Isa::available() {
                let mut got = x.clone();
                apply(&transform, &mut got, isa);
                prop_assert!(got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
        }
    }

    #[test]
    fn many_rows_are_row_by_row() {
        let mut rng = SplitMix64::new(3);
        let x: Vec<f32> = (0..576 * 70).map(|_| rng.normal() as f32).collect();
        let transform = Transform::Hadamard(Hadamard::new(576).unwrap());
        let tiered = ActivationQuantizer::tiered(576, 4, 72, 8, false);
        let row_scale = Some(RowScale::Rms);
        let half = ActivationQuantizer { symmetric: true, row_scale, ..tiered.clone() };
        for quantizer in [tiered, half] {
            let mut many = x.clone();
            transform_rows(&transform, &mut many);
            let mut rows = QuantizedRows::default();
            quantize_rows(&quantizer, &many, &mut rows);
            fake_rows(&quantizer, &mut many);
            for (t, one) in x.chunks(576).enumerate() {
                let mut one = one.to_vec();
                transform.apply(&mut one);
                quantizer.fake(&mut one);
                assert_eq!(one, many[t * 576..(t + 1) * 576]);
                for (j, value) in one.iter().enumerate() {
                    let part = 2 * t + usize::from(j >= 504);
                    let doubled = 2 * rows.codes[t * 576 + j] as i32 - rows.doubled_zeros[part];
                    assert_eq!(doubled as f32 * (0.5 * rows.scales[part]), *value);
                }
            }
        }
    }
}
