use super::operand::{BLOCK, RUN};
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

/// A bound of what an entry of a table is worth. A centroid has twelve bits of its table's largest,
/// which no weight may take.
fn largest_value(matrix: &QuantizedMatrix) -> f64 {
    let halves = matrix.planes[0].scales.iter().chain(&matrix.planes[0].table);
    let largest = halves.fold(1f64, |m, h| m.max(h.to_f64().abs()));
    largest * largest
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
        rows in 1usize..40, cols in 1usize..330, tokens in 0usize..19, seed in any::<u64>(),
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
        let centroids = largest_value(&matrix);
        let sizes = x.chunks(cols).map(|x| x.iter().map(|x| x.abs() as f64).sum::<f64>());
        let sizes: Vec<f64> = sizes.map(|size| size * centroids).collect();
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
        rows in 1usize..20, cols in 64usize..600, tokens in 1usize..20, seed in any::<u64>(),
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
        let mut first = QuantizedRows::default();
        crate::quantize_rows(&quantizer, &x[..cols], &mut first);
        for isa in Isa::available() {
            let y = run(isa, 2, Input::Codes(&codes), &weight, tokens);
            // Alone a token takes other instructions, and gets the same bits.
            prop_assert_eq!(&run(isa, 1, Input::Codes(&first), &weight, 1), &y[..rows]);
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
    let both = |isa: Isa, threads: usize, tokens: usize| {
        let (mut a, mut b) = (vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * 33]);
        let mut products = [
            Product { weight: &mixed, bias: Some(&bias), y: &mut a },
            Product { weight: &plain, bias: None, y: &mut b },
        ];
        let input = Input::Values(&x[..tokens * cols]);
        let pool = SpinPool::new(threads);
        gemv_on(isa, &pool, input, &mut products, &mut Scratch::default());
        (a, b)
    };
    for isa in Isa::available() {
        let (a, b) = both(isa, 1, 6);
        for (y, w, bias) in [(&a, &decoded[0], Some(&bias[..])), (&b, &decoded[1], None)] {
            for (y, (want, size)) in y.iter().zip(exact(&x, w, bias)) {
                assert!((*y as f64 - want).abs() <= 3e-4 * (size + 1.0), "{y} {want}");
            }
        }
        assert_eq!(both(isa, 3, 6), (a.clone(), b.clone()));
        for tokens in 0..6 {
            let (fewer, rest) = both(isa, 2, tokens);
            assert_eq!(fewer, a[..tokens * rows], "{tokens}");
            assert_eq!(rest, b[..tokens * 33], "{tokens}");
        }
    }
}

/// One column to one more than a run, around every border of vectors, halves, blocks and runs; one
/// row and one more than a kernel takes; no token to one more than share an unpacking.
#[test]
fn corners_of_every_width() {
    let mut rng = SplitMix64::new(7);
    let shapes = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257];
    for bits in 1..=8u8 {
        for (at, cols) in shapes.into_iter().enumerate() {
            let rows = [1, TILE + 1, TILE, 2 * TILE + 1][at % 4];
            for kind in 0..5usize {
                let bits = if kind == 0 { bits.max(2) } else { bits };
                let group = [None, Some(32), Some(64)][(at + kind) % 3].filter(|g| *g <= cols);
                let plane = random_plane(grid(kind, bits, group), rows, cols, &mut rng);
                let mut scale = || f16::from_f64(0.8 + 0.4 * rng.uniform());
                let scale: Vec<f16> = (0..cols).map(|_| scale()).collect();
                let scale = (at % 2 == 1).then_some(scale);
                let matrix =
                    QuantizedMatrix::from_planes((rows, cols), vec![plane], 1, scale, None);
                let matrix = matrix.unwrap();
                let weight = PackedWeight::new(&matrix).unwrap();
                let decoded = matrix.dequantize();
                let mut back = vec![0.0; rows * cols];
                weight.read_rows(0..rows, &mut back);
                assert_eq!(back, decoded.data, "{kind} {bits} {cols}");
                let tokens =
                    [0, 1, 2, TOKENS, TOKENS + 1, WIDE_TOKENS + 1][(at + bits as usize) % 6];
                let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
                let want = exact(&x, &decoded, None);
                let centroids = largest_value(&matrix);
                let sizes = x.chunks(cols).map(|x| x.iter().map(|x| x.abs() as f64).sum::<f64>());
                let sizes: Vec<f64> = sizes.map(|size| size * centroids).collect();
                let mut fastest = None;
                for isa in Isa::available() {
                    let y = run(isa, 1, Input::Values(&x), &weight, tokens);
                    assert_eq!(y.len(), want.len());
                    for (i, (y, (want, size))) in y.iter().zip(&want).enumerate() {
                        let error = (*y as f64 - want).abs();
                        // Column scales widen the bounds of the test above.
                        let bound = if kind < 3 { 1e-4 * size } else { 5e-4 * sizes[i / rows] };
                        assert!(error <= bound + 1e-6, "{kind} {bits} {cols}: {y} {want}");
                    }
                    // Vectors of the same lanes, exact integers: the same bits.
                    if isa > Isa::Scalar && kind < 3 {
                        assert_eq!(*fastest.get_or_insert_with(|| y.clone()), y);
                    }
                }
            }
        }
    }
}

/// Every product as large as it can be, all of one sign: sums of integers just fit.
#[test]
fn the_largest_sums_fit() {
    let (rows, cols, tokens) = (3, 4 * BLOCK * RUN + 40, 7);
    for kind in 0..5 {
        for bits in [if kind == 0 { 2 } else { 1 }, 4, 8] {
            for group in [None, Some(32), Some(128)] {
                let mut plane = Plane::empty(grid(kind, bits, group), rows, cols).unwrap();
                let codes = vec![((1u32 << bits) - 1) as u8; cols];
                let words = anybit_core::bitstream::words_per_row(cols, bits);
                for row in plane.codes.chunks_exact_mut(words) {
                    anybit_core::bitstream::pack_row(&codes, bits, row);
                }
                plane.scales.fill(f16::ONE);
                plane.exact_scales.fill(1.0);
                plane.table.fill(f16::ONE);
                let matrix = QuantizedMatrix::single(plane);
                let weight = PackedWeight::new(&matrix).unwrap();
                for value in [1f32, -1.0] {
                    let x = vec![value; tokens * cols];
                    let want = exact(&x, &matrix.dequantize(), None);
                    for isa in Isa::available() {
                        let y = run(isa, 1, Input::Values(&x), &weight, tokens);
                        for (y, (want, size)) in y.iter().zip(&want) {
                            let error = (*y as f64 - want).abs();
                            assert!(error <= 1e-4 * size, "{isa:?} {kind} {bits}: {y} {want}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn vectors_unpack_what_the_scalar_twin_does() {
    if !Isa::Avx2.detected() {
        return;
    }
    let mut rng = SplitMix64::new(8);
    for bits in 1..=8usize {
        for _ in 0..20 {
            // No byte more than there must be, so that a sanitizer sees one that is read too many.
            let bytes: Vec<u8> = (0..8 * bits).map(|_| rng.next_u64() as u8).collect();
            let (mut fast, mut slow) = ([0; 64], [0; 64]);
            // SAFETY: just asked for.
            unsafe { x86::unpack_codes(&bytes, bits, &mut fast) };
            slices::unpack(&bytes, bits, &mut slow);
            assert_eq!(fast, slow, "{bits} bits");
        }
    }
}

/// Scales of tables are spread over a row's halves of blocks, for which there is room up to a
/// length; affine rows have any.
#[test]
fn very_long_rows_of_tables_are_left_to_the_general_path() {
    let most = table::MOST_PARTS * BLOCK / 2;
    let weight = |grid, cols| {
        let mut plane = Plane::empty(grid, 1, cols).unwrap();
        plane.scales.fill(f16::ONE);
        plane.table.fill(f16::from_f32(0.25));
        PackedWeight::new(&QuantizedMatrix::single(plane))
    };
    assert!(weight(grid(4, 2, Some(32)), most + 1).is_none());
    // All codes are zero, and where it is stored so is the zero point.
    for (grid, cols, each) in [
        (grid(1, 1, None), 8 * most, 0.0),
        (grid(1, 1, Some(64)), most + 64, 0.0),
        (grid(0, 2, Some(32)), 2 * most, -2.0),
        (grid(4, 2, Some(32)), most, 0.25),
        (grid(4, 2, None), 2 * most, 0.25),
    ] {
        let (weight, x) = (weight(grid, cols).unwrap(), vec![0.5; cols]);
        let want = each * 0.5 * cols as f32;
        for isa in Isa::available() {
            let y = run(isa, 1, Input::Values(&x), &weight, 1)[0];
            assert!((y - want).abs() <= 2e-4 * want.abs(), "{isa:?} {cols}: {y} {want}");
        }
    }
}

/// Parts of every length, groups that end in padding, rows that no tile is full of: read in every
/// order, and the same bits by vectors and one by one.
#[test]
fn groups_of_every_length_are_read_and_multiplied() {
    let mut rng = SplitMix64::new(12);
    let mut scratch = Scratch::default();
    for (kind, bits) in [(0, 3), (0, 8), (1, 1), (1, 4), (1, 6), (2, 2), (2, 5), (2, 7)] {
        for group in [None, Some(32), Some(96), Some(128), Some(160), Some(192), Some(512)] {
            let (rows, cols) = ([3, 8, 21][rng.next_u64() as usize % 3], 1157);
            let plane = random_plane(grid(kind, bits, group), rows, cols, &mut rng);
            let matrix = QuantizedMatrix::single(plane);
            let (weight, want) = (PackedWeight::new(&matrix).unwrap(), matrix.dequantize());
            for (first, end) in [(0, rows), (1, rows), (rows - 1, rows), (2, 3)] {
                let mut back = vec![f32::NAN; (end - first) * cols];
                weight.read_rows(first..end, &mut back);
                assert_eq!(back, want.data[first * cols..end * cols], "{kind} {bits} {group:?}");
            }
            let KernelPlane::Affine(plane) = &weight.planes[0] else { panic!("not affine") };
            let mut one = vec![f32::NAN; cols];
            plane.decode_scalar(0, 2..3, &mut one, cols);
            assert_eq!(one, want.row(2));
            // The scratch of other tokens and widths before.
            let tokens = 1 + rng.next_u64() as usize % 9;
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
            let sums = exact(&x, &want, None);
            for isa in Isa::available() {
                let mut y = vec![f32::NAN; tokens * rows];
                let mut products = [Product { weight: &weight, bias: None, y: &mut y }];
                let pool = SpinPool::new(2);
                gemv_on(isa, &pool, Input::Values(&x), &mut products, &mut scratch);
                for (y, (want, size)) in y.iter().zip(&sums) {
                    assert!((*y as f64 - want).abs() <= 4e-5 * size, "{kind} {bits} {group:?}");
                }
            }
        }
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

/// What is taken apart without another look has to be whole.
#[test]
fn broken_matrices_are_refused() {
    let whole = |rows| {
        let mut rng = SplitMix64::new(9);
        QuantizedMatrix::single(random_plane(grid(0, 4, None), rows, 64, &mut rng))
    };
    let refused = |matrix: QuantizedMatrix| {
        let new = std::panic::AssertUnwindSafe(|| PackedWeight::new(&matrix).is_some());
        assert!(std::panic::catch_unwind(new).is_err());
    };
    assert!(PackedWeight::new(&whole(4)).is_some());
    refused(QuantizedMatrix { rows: 3, ..whole(4) });
    refused(QuantizedMatrix { cols: 32, ..whole(4) });
    refused(QuantizedMatrix { column_groups: 0, ..whole(4) });
    refused(QuantizedMatrix { planes: Vec::new(), ..whole(4) });
    refused(QuantizedMatrix { column_scale: Some(vec![f16::ONE; 63]), ..whole(4) });
    let cut = |cut: fn(&mut Plane)| {
        let mut matrix = whole(4);
        cut(&mut matrix.planes[0]);
        matrix
    };
    refused(cut(|plane| plane.scales.truncate(3)));
    refused(cut(|plane| plane.codes.truncate(3)));
    let mut many = cut(|plane| plane.rows = usize::MAX / 8 + 2);
    many.rows = many.planes[0].rows;
    refused(many);
    for perm in [vec![0, 0, 1, 2], vec![0, 1, 2, 4], vec![0, 1, 2], vec![0, 1, 2, 3, 3]] {
        refused(QuantizedMatrix { row_perm: Some(perm), ..whole(4) });
    }
    let mut none = whole(4);
    none.planes[0].grid = GridSpec::Uniform { bits: 0, symmetric: true, group_size: None };
    none.planes[0].codes.clear();
    assert!(PackedWeight::new(&none).is_none());
    // A part of a row without columns: such files can be written.
    let empty = Plane::empty(grid(1, 4, None), 4, 0).unwrap();
    let planes = vec![whole(4).planes.remove(0), empty];
    let parts = QuantizedMatrix::from_planes((4, 64), planes, 2, None, None).unwrap();
    assert!(PackedWeight::new(&parts).is_none());
}

#[test]
#[should_panic(expected = "inputs of other lengths")]
fn products_share_one_input() {
    let mut rng = SplitMix64::new(10);
    let mut weight = |cols| {
        let plane = random_plane(grid(0, 4, None), 2, cols, &mut rng);
        PackedWeight::new(&QuantizedMatrix::single(plane)).unwrap()
    };
    let (long, short) = (weight(64), weight(32));
    let (mut a, mut b) = ([0.0; 2], [0.0; 2]);
    let mut products = [
        Product { weight: &long, bias: None, y: &mut a },
        Product { weight: &short, bias: None, y: &mut b },
    ];
    gemv(Input::Values(&[1.0; 64]), &mut products, &mut Scratch::default());
}

#[test]
#[should_panic(expected = "inputs have other segments")]
fn codes_of_more_segments_are_refused() {
    let mut rng = SplitMix64::new(11);
    let plane = random_plane(grid(0, 4, None), 2, 64, &mut rng);
    let weight = PackedWeight::new(&QuantizedMatrix::single(plane)).unwrap();
    let mut codes = QuantizedRows::default();
    let quantizer = ActivationQuantizer::tiered(96, 4, 32, 8, true);
    crate::quantize_rows(&quantizer, &[1.0; 96], &mut codes);
    let mut y = [0.0; 2];
    let mut products = [Product { weight: &weight, bias: None, y: &mut y }];
    gemv(Input::Codes(&codes), &mut products, &mut Scratch::default());
}

#[test]
fn nothing_is_multiplied_where_there_are_no_products() {
    gemv(Input::Values(&[1.0; 3]), &mut [], &mut Scratch::default());
}
