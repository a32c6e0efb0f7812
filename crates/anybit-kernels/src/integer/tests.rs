use super::*;
use anybit_core::rng::SplitMix64;
use anybit_core::rounding::{half_integer, nearest};
use anybit_core::{ActivationQuantizer, Matrix, RowScale, ScaleFit, Sparse};
use proptest::prelude::*;

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.iter().copied().filter(|isa| isa.detected())
}

fn plane(rng: &mut SplitMix64, (rows, cols): (usize, usize), grid: GridSpec) -> Plane {
    let w = (0..rows * cols).map(|_| rng.normal() as f32).collect();
    nearest(&Matrix::from_vec(rows, cols, w).unwrap(), grid, ScaleFit::MinMax).unwrap()
}

/// Random codes on random grids.
fn rows(rng: &mut SplitMix64, tokens: usize, segments: &[usize]) -> QuantizedRows {
    let cols: usize = segments.iter().sum();
    let parts = tokens * segments.len();
    QuantizedRows {
        cols,
        segments: segments.to_vec(),
        codes: (0..tokens * cols).map(|_| rng.next_u64() as i8).collect(),
        scales: (0..parts).map(|_| 0.01 + rng.uniform() as f32).collect(),
        doubled_zeros: (0..parts).map(|_| rng.below(511) as i32 - 256).collect(),
    }
}

/// The values that the codes stand for.
fn values(x: &QuantizedRows) -> Vec<f32> {
    let owner = |j: usize| {
        let mut end = 0usize;
        let ends = x.segments.iter().map(|s| {
            end += *s;
            end
        });
        ends.take_while(|end| *end <= j).count()
    };
    let owners: Vec<usize> = (0..x.cols).map(owner).collect();
    let value = |(i, code): (usize, &i8)| {
        let grid = i / x.cols * x.segments.len() + owners[i % x.cols];
        (2 * *code as i32 - x.doubled_zeros[grid]) as f32 * (0.5 * x.scales[grid])
    };
    x.codes.iter().enumerate().map(value).collect()
}

/// The integers from decoded weights: `2w / s` is an integer, but for the rounding of `w` where
/// scales are exact.
fn naive(q: &QuantizedMatrix, x: &QuantizedRows, token: usize, row: usize) -> Vec<i64> {
    let decoded = q.dequantize();
    let mut out = Vec::new();
    let mut start = 0;
    for (segment, plane) in q.planes.iter().enumerate() {
        let cols = start..start + plane.cols;
        let len = plane.grid.group_len(plane.cols);
        let zero = x.doubled_zeros[token * q.column_groups + segment] as i64;
        let w = decoded.row(row)[cols.clone()].chunks(len);
        let a = nth(&x.codes, token, x.cols)[cols].chunks(len);
        for (g, (w, a)) in w.zip(a).enumerate() {
            let doubled = |w: f32| (2.0 * w / plane.scale(row, g)).round() as i64;
            let term = |(w, a): (&f32, &i8)| doubled(*w) * (2 * *a as i64 - zero);
            out.push(w.iter().zip(a).map(term).sum());
        }
        start += plane.cols;
    }
    out
}

/// Compares with [`crate::linear()`] on the values, and integers with exact ones.
fn check(q: &QuantizedMatrix, x: &QuantizedRows, bias: Option<&[f32]>) {
    let (rows, cols) = q.shape();
    let tokens = x.codes.len() / cols;
    let weight = IntegerWeight::new(q, &x.segments).unwrap();
    assert_eq!(weight.shape(), q.shape());
    let mut y = vec![f32::NAN; tokens * rows];
    weight.forward(x, bias, &mut y);
    for isa in isas() {
        let mut same = vec![f32::NAN; tokens * rows];
        weight.forward_on(isa, x, bias, &mut same);
        assert_eq!(y, same, "{isa:?}");
    }
    let (decoded, inputs) = (q.dequantize(), values(x));
    let mut want = vec![0.0; tokens * rows];
    crate::linear(&inputs, &decoded, bias, &mut want);
    for (i, (y, want)) in y.iter().zip(&want).enumerate() {
        let (token, row) = (i / rows, i % rows);
        let terms = nth(&inputs, token, cols).iter().zip(decoded.row(row));
        let magnitude: f32 = terms.map(|(x, w)| (x * w).abs()).sum();
        let bias = bias.map_or(0.0, |b| b[row].abs());
        assert!((y - want).abs() <= 1e-4 * (magnitude + bias), "{y} {want} of {magnitude}");
    }
    for (token, row) in [(0, 0), (tokens - 1, rows - 1)] {
        assert_eq!(weight.integers(x, token, row), naive(q, x, token, row));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn equals_the_linear_on_values(tokens in 1usize..=9, out in 1usize..50,
                                   widths in prop::collection::vec(1usize..150, 1..=2),
                                   bits in (1u8..=8, 1u8..=8), kind in 0..4,
                                   group in 0usize..9, biased in any::<bool>(),
                                   seed in any::<u64>()) {
        let mut rng = SplitMix64::new(seed);
        let bits = [bits.0, bits.1];
        let planes: Vec<Plane> = widths.iter().zip(bits).map(|(cols, bits)| {
            let group = (group > 0 && 8 * group <= *cols).then_some(8 * group);
            let grid = match kind {
                0 | 3 => GridSpec::HalfInteger { bits, group_size: group, exact: kind == 3 },
                _ => GridSpec::affine(bits, kind == 1, group),
            };
            plane(&mut rng, (out, *cols), grid)
        }).collect();
        let shape = (out, widths.iter().sum());
        let q = QuantizedMatrix::from_planes(shape, planes, widths.len(), None, None).unwrap();
        let bias: Vec<f32> = (0..out).map(|_| rng.normal() as f32).collect();
        let x = rows(&mut rng, tokens, &widths);
        check(&q, &x, biased.then_some(&bias[..]));
    }

    #[test]
    fn dots_equal_the_scalar_twin(len in 0usize..300, bits in 1u8..=8, seed in any::<u64>()) {
        let mut rng = SplitMix64::new(seed);
        let mut u = || -> Vec<u8> {
            (0..len).map(|_| (rng.next_u64() & ((1 << bits) - 1)) as u8).collect()
        };
        let u = [u(), u(), u(), u()];
        let mut a = || -> Vec<i8> { (0..len).map(|_| rng.next_u64() as i8).collect() };
        let a = [a(), a()];
        let (u, a) = (u.each_ref().map(|u| &u[..]), a.each_ref().map(|a| &a[..]));
        let want = a.map(|a| u.map(|u| dot_scalar(u, a)));
        for isa in isas() {
            for narrow in [false, bits <= NARROW_BITS] {
                prop_assert_eq!(isa.dots(u, a, narrow), want);
                prop_assert_eq!(isa.dots([u[1]], [a[1]], narrow)[0][0], want[1][1]);
                prop_assert_eq!(dot(u[0], a[0], narrow), want[0][0]);
            }
        }
    }
}

#[test]
fn extreme_bytes_neither_saturate_nor_overflow() {
    for (code, narrow) in [(255u8, false), (63, true), (63, false), (128, false)] {
        for activation in [-128i8, 127] {
            for len in [1, 16, 31, 32, 64, 4096, 4101, PIECE] {
                let (u, a) = (vec![code; len], vec![activation; len]);
                let want = len as i32 * code as i32 * activation as i32;
                assert_eq!(dot_scalar(&u, &a), want);
                for isa in isas() {
                    let got = isa.dots([&u[..]; ROWS], [&a[..]; PAIR], narrow);
                    assert_eq!(got, [[want; ROWS]; PAIR], "{isa:?} {code} {activation} {len}");
                }
            }
        }
    }
}

/// A group longer than a piece, with the largest integers that there are.
#[test]
fn long_groups_are_computed_in_pieces() {
    let (out, cols) = (3, 2 * PIECE + 100);
    for (bits, symmetric) in [(8, false), (8, true), (4, true), (1, true)] {
        // All weights negative but one: codes far from the zero point.
        let mut w = vec![-1f32; out * cols];
        w.iter_mut().step_by(cols).for_each(|w| *w = 0.01);
        let w = Matrix::from_vec(out, cols, w).unwrap();
        let grid = GridSpec::affine(bits, symmetric, None);
        let q = QuantizedMatrix::single(nearest(&w, grid, ScaleFit::MinMax).unwrap());
        for (code, zero) in [(-128, 254), (127, -256), (-128, -1), (127, -1)] {
            let x = QuantizedRows {
                cols,
                segments: vec![cols],
                codes: vec![code; cols],
                scales: vec![0.5],
                doubled_zeros: vec![zero],
            };
            check(&q, &x, None);
            let weight = IntegerWeight::new(&q, &[cols]).unwrap();
            assert_eq!(weight.integers(&x, 0, 0).len(), 1);
        }
    }
}

/// Weights and activations on the grids that they are trained on: the integers of QuEST's kernels,
/// and the product of the fake-quantized values.
#[test]
fn half_integers_are_what_was_trained() {
    let mut rng = SplitMix64::new(12);
    let (out, cols, tokens) = (9, 256, 5);
    for (w_bits, a_bits) in [(1, 1), (2, 2), (3, 5), (4, 4), (8, 8), (8, 1), (1, 8)] {
        for scale in [RowScale::Rms, RowScale::Largest] {
            let w = (0..out * cols).map(|_| 0.02 * rng.normal() as f32).collect();
            let w = Matrix::from_vec(out, cols, w).unwrap();
            let q = QuantizedMatrix::single(half_integer(&w, w_bits, None, scale).unwrap());
            let quantizer = ActivationQuantizer::half_integer(cols, a_bits, scale);
            let mut x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
            let mut coded = QuantizedRows::default();
            crate::quantize_rows(&quantizer, &x, &mut coded);
            check(&q, &coded, None);
            crate::fake_rows(&quantizer, &mut x);
            assert_eq!(values(&coded), x);
            let weight = IntegerWeight::new(&q, &[cols]).unwrap();
            let middle = 1i64 << (w_bits - 1);
            for (token, row) in [(0, 0), (4, 8), (2, 5)] {
                let u = nth(&weight.codes, row, cols).iter().map(|u| *u as i64 - middle);
                let pairs: Vec<(i64, i64)> =
                    u.zip(nth(&coded.codes, token, cols)).map(|(w, a)| (w, *a as i64)).collect();
                let sum = |f: fn(&(i64, i64)) -> i64| pairs.iter().map(f).sum::<i64>();
                let product = sum(|(w, a)| w * a);
                let four_times = 4 * product + 2 * sum(|p| p.0) + 2 * sum(|p| p.1) + cols as i64;
                assert_eq!(weight.integers(&coded, token, row), [four_times]);
                if (w_bits, a_bits) == (1, 1) {
                    let different = sum(|(w, a)| i64::from(w != a));
                    assert_eq!(four_times, cols as i64 - 2 * different);
                }
            }
        }
    }
}

/// More tokens than a task takes, more rows than a tile.
#[test]
fn same_bits_on_any_number_of_threads() {
    let mut rng = SplitMix64::new(8);
    let planes = vec![
        plane(&mut rng, (203, 504), GridSpec::affine(4, true, Some(64))),
        plane(&mut rng, (203, 72), GridSpec::affine(8, false, None)),
    ];
    let q = QuantizedMatrix::from_planes((203, 576), planes, 2, None, None).unwrap();
    let weight = IntegerWeight::new(&q, &[504, 72]).unwrap();
    for tokens in [0, 1, 3, TOKENS + 9] {
        let x = rows(&mut rng, tokens, &[504, 72]);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![f32::NAN; tokens * 203];
            pool.install(|| weight.forward(&x, None, &mut y));
            y
        };
        let y = run(1);
        assert!(y.iter().all(|y| y.is_finite()));
        assert_eq!(y, run(3));
        if tokens > 0 {
            check(&q, &x, None);
        }
    }
}

#[test]
fn only_plain_affine_matrices_are_taken() {
    let mut rng = SplitMix64::new(5);
    let affine = plane(&mut rng, (6, 32), GridSpec::affine(4, true, Some(16)));
    let q = QuantizedMatrix::single(affine.clone());
    assert!(IntegerWeight::new(&q, &[32]).is_some());
    for segments in [&[16, 16][..], &[31], &[33], &[]] {
        assert!(IntegerWeight::new(&q, segments).is_none(), "{segments:?}");
    }
    for grid in
        [GridSpec::Codebook { bits: 2 }, GridSpec::SharedCodebook { bits: 2, group_size: Some(16) }]
    {
        let codebook = QuantizedMatrix::single(Plane::empty(grid, 6, 32).unwrap());
        assert!(IntegerWeight::new(&codebook, &[32]).is_none());
    }
    let planes = vec![affine.clone(), affine.clone()];
    let parts = QuantizedMatrix::from_planes((6, 64), planes.clone(), 2, None, None).unwrap();
    assert!(IntegerWeight::new(&parts, &[32, 32]).is_some());
    assert!(IntegerWeight::new(&parts, &[64]).is_none());
    let stacked = QuantizedMatrix::from_planes((12, 32), planes, 1, None, None).unwrap();
    assert!(IntegerWeight::new(&stacked, &[32]).is_none());
    let one = vec![affine];
    let permuted = Some((0..6).rev().collect());
    let permuted = QuantizedMatrix::from_planes((6, 32), one.clone(), 1, None, permuted);
    assert!(IntegerWeight::new(&permuted.unwrap(), &[32]).is_none());
    let scale = Some(vec![half::f16::ONE; 32]);
    let scaled = QuantizedMatrix::from_planes((6, 32), one, 1, scale, None).unwrap();
    assert!(IntegerWeight::new(&scaled, &[32]).is_none());
    let sparse = q.with_sparse(Sparse::from_entries((6, 32), &[3], &[1.0]).unwrap()).unwrap();
    assert!(IntegerWeight::new(&sparse, &[32]).is_none());
}
