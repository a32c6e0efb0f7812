use super::*;
use crate::integer::{IntegerWeight, PIECE};
use anybit_core::rng::SplitMix64;
use anybit_core::rounding::{half_integer, nearest};
use anybit_core::{ActivationQuantizer, Matrix, RowScale, ScaleFit};
use proptest::prelude::*;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.iter().copied().filter(|isa| isa.detected())
}

fn grid(group_size: Option<usize>, exact: bool) -> GridSpec {
    GridSpec::HalfInteger { bits: 1, group_size, exact }
}

fn plane(rng: &mut SplitMix64, (rows, cols): (usize, usize), grid: GridSpec) -> Plane {
    let w = (0..rows * cols).map(|_| rng.normal() as f32).collect();
    nearest(&Matrix::from_vec(rows, cols, w).unwrap(), grid, ScaleFit::MinMax).unwrap()
}

/// Random signs on random grids.
fn rows(rng: &mut SplitMix64, tokens: usize, segments: &[usize]) -> QuantizedRows {
    let cols: usize = segments.iter().sum();
    let parts = tokens * segments.len();
    QuantizedRows {
        cols,
        segments: segments.to_vec(),
        codes: (0..tokens * cols).map(|_| -((rng.next_u64() >> 63) as i8)).collect(),
        scales: (0..parts).map(|_| 0.01 + rng.uniform() as f32).collect(),
        doubled_zeros: vec![-1; parts],
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn one_bit(segments: &[usize]) -> Vec<u8> {
    vec![1; segments.len()]
}

/// Compares with [`IntegerWeight`], to the bit, on every instruction set.
fn check(q: &QuantizedMatrix, x: &QuantizedRows, bias: Option<&[f32]>) {
    let len = x.codes.len() / x.cols * q.rows;
    let mut want = vec![f32::NAN; len];
    IntegerWeight::new(q, &x.segments).unwrap().forward(x, bias, &mut want);
    assert!(want.iter().all(|y| y.is_finite()));
    for isa in isas() {
        let weight = BinaryWeight::for_isa(isa, q, &x.segments, &one_bit(&x.segments)).unwrap();
        assert_eq!(weight.shape(), q.shape());
        let mut y = vec![f32::NAN; len];
        weight.forward(x, bias, &mut y);
        assert_eq!(bits(&y), bits(&want), "{isa:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn equals_the_linear_in_integers(tokens in 0usize..=9, out in 1usize..80,
                                     widths in prop::collection::vec(1usize..1200, 1..=2),
                                     group in 0usize..40, exact in any::<bool>(),
                                     biased in any::<bool>(), seed in any::<u64>()) {
        let mut rng = SplitMix64::new(seed);
        let planes: Vec<Plane> = widths.iter().map(|cols| {
            let group = (group > 0 && 8 * group <= *cols).then_some(8 * group);
            plane(&mut rng, (out, *cols), grid(group, exact))
        }).collect();
        let shape = (out, widths.iter().sum());
        let q = QuantizedMatrix::from_planes(shape, planes, widths.len(), None, None).unwrap();
        let bias: Vec<f32> = (0..out).map(|_| rng.normal() as f32).collect();
        let x = rows(&mut rng, tokens, &widths);
        check(&q, &x, biased.then_some(&bias[..]));
    }

    #[test]
    fn signs_are_packed_in_order(codes in prop::collection::vec(-1i8..=0, 0..200),
                                 other in any::<i8>(), at in any::<prop::sample::Index>()) {
        let mut words = vec![u64::MAX; codes.len().div_ceil(64)];
        prop_assert!(pack_signs(&codes, &mut words));
        for i in 0..64 * words.len() {
            let want = codes.get(i).is_some_and(|a| *a < 0);
            prop_assert_eq!(words[i / 64] >> (i % 64) & 1 == 1, want);
        }
        if !codes.is_empty() {
            let mut codes = codes;
            let at = at.index(codes.len());
            codes[at] = other;
            prop_assert_eq!(pack_signs(&codes, &mut words), matches!(other, -1 | 0));
        }
    }
}

/// With steps of two the values are the signs, and the product counts them.
#[test]
fn products_are_sums_of_signs() {
    let mut rng = SplitMix64::new(31);
    for (tokens, out, cols) in [(1, 1, 1), (1, 1, 64), (5, 33, 65), (4, 32, 448), (7, 64, 449)] {
        let w: Vec<f32> = (0..out * cols).map(|_| rng.normal().signum() as f32).collect();
        let matrix = Matrix::from_vec(out, cols, w.clone()).unwrap();
        let plane = nearest(&matrix, grid(None, false), ScaleFit::MinMax).unwrap();
        let q = QuantizedMatrix::single(plane);
        let mut x = rows(&mut rng, tokens, &[cols]);
        x.scales.fill(2.0);
        let mut y = vec![f32::NAN; tokens * out];
        BinaryWeight::new(&q, &[cols], &[1]).unwrap().forward(&x, None, &mut y);
        for (i, y) in y.iter().enumerate() {
            let (w, a) = (nth(&w, i % out, cols), nth(&x.codes, i / out, cols));
            let products = w.iter().zip(a).map(|(w, a)| w * (2 * *a as i32 + 1) as f32);
            assert_eq!(*y, products.sum::<f32>(), "{tokens} {out} {cols}");
        }
        check(&q, &x, None);
    }
}

/// All signs differ, or none: no count saturates, in groups longer than a piece either.
#[test]
fn extreme_counts_fit() {
    for cols in [63, 448, 504, 512, PIECE, 2 * PIECE + 100] {
        for weight in [-1f32, 1.0] {
            let w = Matrix::from_vec(3, cols, vec![weight; 3 * cols]).unwrap();
            let q = nearest(&w, grid(None, true), ScaleFit::MinMax).unwrap();
            let q = QuantizedMatrix::single(q);
            for code in [-1, 0] {
                let mut x = rows(&mut SplitMix64::new(1), 5, &[cols]);
                x.codes.fill(code);
                x.scales.fill(2.0);
                check(&q, &x, None);
                let mut y = vec![f32::NAN; 15];
                BinaryWeight::new(&q, &[cols], &[1]).unwrap().forward(&x, None, &mut y);
                let sign = weight * (2 * code as i32 + 1) as f32;
                assert_eq!(y, [sign * cols as f32; 15]);
            }
        }
    }
}

/// Weights and activations as they are trained.
#[test]
fn trained_signs_multiply() {
    let mut rng = SplitMix64::new(13);
    let (out, cols, tokens) = (40, 320, 6);
    for scale in [RowScale::Rms, RowScale::Largest] {
        for group in [None, Some(64), Some(72)] {
            let w = (0..out * cols).map(|_| 0.02 * rng.normal() as f32).collect();
            let w = Matrix::from_vec(out, cols, w).unwrap();
            let q = QuantizedMatrix::single(half_integer(&w, 1, group, scale).unwrap());
            let quantizer = ActivationQuantizer::half_integer(cols, 1, scale);
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
            let mut coded = QuantizedRows::default();
            crate::quantize_rows(&quantizer, &x, &mut coded);
            check(&q, &coded, None);
        }
    }
}

/// More tokens than a task takes, more blocks too.
#[test]
fn same_bits_on_any_number_of_threads() {
    let mut rng = SplitMix64::new(9);
    let (out, segments) = (BLOCKS * ROWS + 70, [504, 72]);
    let planes = vec![
        plane(&mut rng, (out, 504), grid(Some(64), false)),
        plane(&mut rng, (out, 72), grid(None, true)),
    ];
    let q = QuantizedMatrix::from_planes((out, 576), planes, 2, None, None).unwrap();
    let weight = BinaryWeight::new(&q, &segments, &[1, 1]).unwrap();
    for tokens in [0, 1, 3, TOKENS + 9] {
        let x = rows(&mut rng, tokens, &segments);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![f32::NAN; tokens * out];
            pool.install(|| weight.forward(&x, None, &mut y));
            bits(&y)
        };
        assert_eq!(run(1), run(3));
        check(&q, &x, None);
    }
}

#[test]
fn only_signs_are_taken() {
    let mut rng = SplitMix64::new(5);
    let mut single = |grid| QuantizedMatrix::single(plane(&mut rng, (6, 32), grid));
    let q = single(grid(Some(16), false));
    assert!(BinaryWeight::new(&q, &[32], &[1]).is_some());
    for activation_bits in [&[2][..], &[8], &[], &[1, 1]] {
        assert!(BinaryWeight::new(&q, &[32], activation_bits).is_none());
    }
    for segments in [&[16, 16][..], &[31], &[]] {
        assert!(BinaryWeight::new(&q, segments, &one_bit(segments)).is_none());
    }
    for other in [
        GridSpec::HalfInteger { bits: 2, group_size: None, exact: true },
        GridSpec::affine(1, false, None),
        GridSpec::affine(4, true, None),
    ] {
        assert!(BinaryWeight::new(&single(other), &[32], &[1]).is_none());
    }
    let scale = Some(vec![half::f16::ONE; 32]);
    let scaled = QuantizedMatrix::from_planes((6, 32), q.planes, 1, scale, None).unwrap();
    assert!(BinaryWeight::new(&scaled, &[32], &[1]).is_none());
}

fn multiply(change: impl Fn(&mut QuantizedRows)) {
    let mut rng = SplitMix64::new(6);
    let q = QuantizedMatrix::single(plane(&mut rng, (3, 70), grid(None, true)));
    let mut x = rows(&mut rng, 2, &[70]);
    change(&mut x);
    BinaryWeight::new(&q, &[70], &[1]).unwrap().forward(&x, None, &mut [0.0; 6]);
}

#[test]
#[should_panic(expected = "a code other than")]
fn other_codes_are_refused() {
    multiply(|x| x.codes[139] = 1);
}

#[test]
#[should_panic(expected = "a zero point other than")]
fn other_zero_points_are_refused() {
    multiply(|x| x.doubled_zeros[1] = 0);
}

/// Prints what each instruction set takes:
/// `cargo test --release -p anybit-kernels time_of -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn time_of_each_instruction_set() {
    let mut rng = SplitMix64::new(2);
    let q = QuantizedMatrix::single(plane(&mut rng, (2048, 2048), grid(None, true)));
    for tokens in [1, 512] {
        let x = rows(&mut rng, tokens, &[2048]);
        let mut y = vec![0.0; tokens * 2048];
        for isa in isas() {
            let weight = BinaryWeight::for_isa(isa, &q, &[2048], &[1]).unwrap();
            let mut seconds: Vec<f64> = (0..9)
                .map(|_| {
                    let started = std::time::Instant::now();
                    weight.forward(&x, None, &mut y);
                    started.elapsed().as_secs_f64()
                })
                .collect();
            seconds.sort_by(f64::total_cmp);
            println!("{isa:?}, {tokens} tokens: {:.3} ms", 1e3 * seconds[4]);
        }
    }
}
