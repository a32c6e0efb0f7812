use super::*;
use anybit_core::rng::SplitMix64;
use anybit_core::{ActivationQuantizer, GridSpec, Matrix, Plane, RowScale};
use half::f16;
use proptest::prelude::*;

/// A plane of random codes and parameters.
fn random_plane(grid: GridSpec, rows: usize, cols: usize, rng: &mut SplitMix64) -> Plane {
    let mut plane = Plane::empty(grid, rows, cols).unwrap();
    let bits = grid.bits();
    let fill = |words: &mut [u32], count: usize, rng: &mut SplitMix64| {
        let per_row = anybit_core::bitstream::words_per_row(count, bits);
        for row in words.chunks_mut(per_row.max(1)) {
            let mask = (0xffu32 >> (8 - bits)) as u8;
            let codes: Vec<u8> = (0..count).map(|_| rng.next_u64() as u8 & mask).collect();
            anybit_core::bitstream::pack_row(&codes, bits, row);
        }
    };
    fill(&mut plane.codes, cols, rng);
    fill(&mut plane.zeros, grid.groups(cols), rng);
    let halves = plane.scales.iter_mut().chain(plane.table.iter_mut());
    halves.for_each(|s| *s = f16::from_f64(rng.normal()));
    plane.exact_scales.iter_mut().for_each(|s| *s = rng.normal() as f32);
    plane
}

/// Every kind of grid; group sizes that kernels know.
fn grid(kind: usize, bits: u8, group: Option<usize>) -> GridSpec {
    match kind {
        0 => GridSpec::affine(bits, true, group),
        1 => GridSpec::affine(bits, false, group),
        2 => GridSpec::HalfInteger { bits, group_size: group, exact: true },
        3 => GridSpec::Codebook { bits },
        _ => GridSpec::SharedCodebook { bits, group_size: group },
    }
}

/// `x Wᵀ + b` in f64, and what rounding errors scale with: the token's largest input times the
/// row's sum of magnitudes.
fn exact(x: &[f32], w: &Matrix, bias: Option<&[f32]>) -> Vec<(f64, f64)> {
    x.chunks(w.cols)
        .flat_map(|x| {
            let largest = x.iter().fold(0f64, |m, x| m.max(x.abs() as f64));
            (0..w.rows).map(move |r| {
                let sum: f64 = x.iter().zip(w.row(r)).map(|(a, b)| *a as f64 * *b as f64).sum();
                let size: f64 = w.row(r).iter().map(|w| w.abs() as f64).sum();
                (sum + bias.map_or(0.0, |b| b[r] as f64), largest * size)
            })
        })
        .collect()
}

fn run(
    isa: Isa,
    threads: usize,
    input: Input<'_>,
    weight: &PackedWeight,
    tokens: usize,
) -> Vec<f32> {
    let pool = SpinPool::new(threads);
    let mut y = vec![f32::NAN; tokens * weight.rows];
    let mut scratch = Scratch::default();
    let mut products = [Product { weight, bias: None, y: &mut y }];
    gemv_on(isa, &pool, input, &mut products, &mut scratch);
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]
    /// Every grid, width, grouping and shape: decoded rows have the bits of the matrix, products
    /// are near the exact ones, all instruction sets agree.
    #[test]
    fn every_grid_on_every_instruction_set(
        kind in 0usize..5, bits in 1u8..=8, group in prop::option::of(1usize..5),
        rows in 1usize..20, cols in 1usize..330, tokens in 0usize..7, seed in any::<u64>(),
    ) {
        let bits = if kind == 0 { bits.max(2) } else { bits };
        let group = group.map(|g| 32 * g).filter(|g| *g <= cols);
        let mut rng = SplitMix64::new(seed);
        let plane = random_plane(grid(kind, bits, group), rows, cols, &mut rng);
        let matrix = QuantizedMatrix::single(plane);
        let weight = PackedWeight::new(&matrix).expect("a grouping that kernels know");
        let decoded = matrix.dequantize();
        let mut back = vec![0.0; rows * cols];
        weight.read_rows(0..rows, &mut back);
        prop_assert_eq!(&back, &decoded.data);
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
        let want = exact(&x, &decoded, None);
        // A centroid has twelve bits of its table's largest, which no weight may take.
        let halves = matrix.planes[0].scales.iter().chain(&matrix.planes[0].table);
        let largest = halves.fold(1f64, |m, h| m.max(h.to_f64().abs()));
        let sizes = x.chunks(cols).map(|x| x.iter().map(|x| x.abs() as f64).sum::<f64>());
        let sizes: Vec<f64> = sizes.map(|s| s * largest * largest).collect();
        for isa in Isa::available() {
            let y = run(isa, 1, Input::Values(&x), &weight, tokens);
            prop_assert_eq!(y.len(), want.len());
            for (at, (a, (b, size))) in y.iter().zip(&want).enumerate() {
                let error = (*a as f64 - b).abs();
                let bound = if kind < 3 { 4e-5 * size } else { 3e-4 * sizes[at / rows] };
                prop_assert!(error <= bound + 1e-6, "{} {a} {b} of {size}", isa.name());
            }
        }
    }

    /// Codes in, integers out: the same as the integer linear to the last bits of f32 sums.
    #[test]
    fn codes_multiply_as_the_integer_linear_does(
        kind in 0usize..3, bits in 2u8..=8, low in 2u8..=8, halves in 0usize..3, high in 0usize..60,
        rows in 1usize..12, cols in 64usize..200, tokens in 1usize..6, seed in any::<u64>(),
    ) {
        let mut rng = SplitMix64::new(seed);
        let mut quantizer = ActivationQuantizer::tiered(cols, low, high, 8, kind != 1);
        quantizer.row_scale = [None, None, Some(RowScale::Rms)][kind];
        let group = [None, Some(32), Some(64)][halves].filter(|_| high == 0);
        let planes: Vec<Plane> = quantizer
            .widths()
            .into_iter()
            .map(|cols| random_plane(grid(kind, bits, group), rows, cols, &mut rng))
            .collect();
        let count = planes.len();
        let matrix = QuantizedMatrix::from_planes((rows, cols), planes, count, None, None).unwrap();
        let weight = PackedWeight::new(&matrix).unwrap();
        let integer = crate::IntegerWeight::new(&matrix, &quantizer.widths()).unwrap();
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
        let mut codes = QuantizedRows::default();
        crate::quantize_rows(&quantizer, &x, &mut codes);
        let mut want = vec![0.0; tokens * rows];
        integer.forward(&codes, None, &mut want);
        let mut fake = x.clone();
        quantizer.fake(&mut fake);
        let sizes = exact(&fake, &matrix.dequantize(), None);
        for isa in Isa::available() {
            let y = run(isa, 2, Input::Codes(&codes), &weight, tokens);
            for ((a, b), (_, size)) in y.iter().zip(&want).zip(&sizes) {
                let error = (*a as f64 - *b as f64).abs();
                prop_assert!(error <= 1e-6 * size, "{} {a} {b}", isa.name());
            }
        }
    }
}

/// Rows of several grids, permuted, scaled by column, with single weights beside, several products
/// of one input, biases; the same bits on any number of threads and in any company of tokens.
#[test]
fn mixed_rows_columns_and_companies() {
    let mut rng = SplitMix64::new(4);
    let (rows, cols) = (70, 200);
    let grids = [grid(3, 2, None), grid(4, 3, Some(64)), grid(3, 5, None), grid(1, 4, Some(32))];
    let groups: Vec<u8> = (0..rows).map(|i| ((i * 7 + i / 9) % 4) as u8).collect();
    let planes = grids.iter().enumerate().map(|(g, grid)| {
        let count = groups.iter().filter(|own| **own as usize == g).count();
        random_plane(*grid, count, cols, &mut rng)
    });
    let planes: Vec<Plane> = planes.collect();
    let scale = (0..cols).map(|_| f16::from_f64(1.0 + 0.1 * rng.normal())).collect();
    let at: Vec<usize> = (0..rows * cols).step_by(97).collect();
    let values: Vec<f32> = at.iter().map(|_| rng.normal() as f32).collect();
    let sparse = Sparse::from_entries((rows, cols), &at, &values).unwrap();
    let matrix = QuantizedMatrix::from_row_groups((rows, cols), planes, &groups, Some(scale));
    let matrix = matrix.unwrap().with_sparse(sparse).unwrap();
    let mixed = PackedWeight::new(&matrix).unwrap();
    let other = QuantizedMatrix::single(random_plane(grid(0, 4, None), 33, cols, &mut rng));
    let plain = PackedWeight::new(&other).unwrap();
    let decoded = [matrix.dequantize(), other.dequantize()];
    let mut back = vec![0.0; rows * cols];
    mixed.read_rows(0..rows, &mut back);
    assert_eq!(back, decoded[0].data);

    let bias: Vec<f32> = (0..rows).map(|_| rng.normal() as f32).collect();
    let x: Vec<f32> = (0..6 * cols).map(|_| rng.normal() as f32).collect();
    let both = |threads: usize, tokens: usize| {
        let (mut a, mut b) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * 33]);
        let mut products = [
            Product { weight: &mixed, bias: Some(&bias), y: &mut a },
            Product { weight: &plain, bias: None, y: &mut b },
        ];
        let input = Input::Values(&x[..tokens * cols]);
        let pool = SpinPool::new(threads);
        gemv_on(isa(), &pool, input, &mut products, &mut Scratch::default());
        (a, b)
    };
    let (a, b) = both(1, 6);
    for (y, w, bias) in [(&a, &decoded[0], Some(&bias[..])), (&b, &decoded[1], None)] {
        for (y, (want, size)) in y.iter().zip(exact(&x, w, bias)) {
            assert!((*y as f64 - want).abs() <= 3e-4 * (size + 1.0), "{y} {want}");
        }
    }
    assert_eq!(both(3, 6), (a.clone(), b.clone()));
    for tokens in 1..6 {
        let (fewer, rest) = both(2, tokens);
        assert_eq!(fewer, a[..tokens * rows], "{tokens}");
        assert_eq!(rest, b[..tokens * 33], "{tokens}");
    }
}

#[test]
fn what_is_not_finite_stays_visible() {
    let mut rng = SplitMix64::new(5);
    let matrix = QuantizedMatrix::single(random_plane(grid(0, 4, None), 5, 100, &mut rng));
    let weight = PackedWeight::new(&matrix).unwrap();
    let mut x = vec![1.0; 200];
    x[70] = f32::NAN;
    for isa in Isa::available() {
        let y = run(isa, 1, Input::Values(&x), &weight, 2);
        assert!(y[..5].iter().all(|y| y.is_nan()) && y[5..].iter().all(|y| y.is_finite()));
    }
}

#[test]
fn odd_groups_are_left_to_the_general_path() {
    let mut rng = SplitMix64::new(6);
    let matrix = QuantizedMatrix::single(random_plane(grid(0, 4, Some(24)), 5, 96, &mut rng));
    assert!(PackedWeight::new(&matrix).is_none());
}
