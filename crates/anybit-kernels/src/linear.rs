//! `y = x Wᵀ + b` for weights stored in any form.
//!
//! A tile of rows of `W` is decoded to f32 into a thread's scratch and multiplied at once, so no
//! f32 copy of `W` ever exists and what is computed is exactly what the decoded weights say. With
//! many tokens the tile goes through GEMM, with few through dot products ([`crate::dot`]), rows of
//! sixteen-bit numbers where they lie.

use anybit_core::RowSource;
use anybit_core::linalg::{View, matmul_into};

use crate::dot::{dots, dots_half};
use crate::isa::{Isa, isa};
use crate::{DisjointMut, SpinPool, with_scratch};

/// Up to so many tokens, dot products beat packing for GEMM.
fn few_tokens() -> usize {
    match isa() {
        Isa::Avx512 => 24,
        _ => 4,
    }
}
/// Tokens of a task: few enough that a linear of few rows still has work for several threads, or,
/// where there are [`MANY_TILES`], as many as amortize decoding a tile best.
const TOKENS: usize = 256;
const MOST_TOKENS: usize = 512;
/// Tiles of rows that are work enough for all threads.
const MANY_TILES: usize = 8;
/// Elements of a decoded tile: large enough to amortize GEMM's packing of `x`.
const TILE_ELEMENTS: usize = 1 << 19;

/// Computes `y[tokens, out] = x[tokens, in] · Wᵀ + bias`.
///
/// # Panics
/// When a buffer's length does not fit the shape of `weight`.
pub fn linear(x: &[f32], weight: &dyn RowSource, bias: Option<&[f32]>, y: &mut [f32]) {
    let (out, inp) = weight.shape();
    let tokens = x.len() / inp;
    assert_eq!(x.len(), tokens * inp, "inputs are not whole tokens");
    assert_eq!(y.len(), tokens * out, "output has another shape");
    if y.is_empty() {
        return;
    }
    if tokens <= few_tokens() {
        return few(x, weight, (out, inp), bias, y);
    }
    let tile = tile_rows(out, inp);
    let row_tiles = out.div_ceil(tile);
    let most = if row_tiles >= MANY_TILES { MOST_TOKENS } else { TOKENS };
    let dst = DisjointMut::new(y);
    SpinPool::global().each(row_tiles * tokens.div_ceil(most), |task| {
        let (t, first) = (task % row_tiles, task / row_tiles * most);
        let rows = t * tile..((t + 1) * tile).min(out);
        let count = most.min(tokens - first);
        let x = &x[first * inp..(first + count) * inp];
        // SAFETY: `rows` of tokens `first..first + count` belong to this task alone.
        let y = unsafe { dst.at(first * out + rows.start) };
        with_scratch(rows.len() * inp, |w| {
            weight.read_rows(rows.clone(), w);
            let lhs = View::rows(x, count, inp, inp);
            let rhs = View::rows(w, rows.len(), inp, inp).t();
            // SAFETY: as above, and the output has `out` elements per token.
            unsafe { matmul_into(y, out, false, 1.0, lhs, rhs) };
            for (row, bias) in bias.map(|b| &b[rows.clone()]).into_iter().flatten().enumerate() {
                for token in 0..count {
                    // SAFETY: as above.
                    unsafe { *y.add(token * out + row) += bias };
                }
            }
        });
    });
}

/// [`linear`] by dot products, each decoded row used for all tokens while it is in the first-level
/// cache. The shape is the one that `y` was checked against: asked again, a weight of another crate
/// might say something else.
fn few(
    x: &[f32],
    weight: &dyn RowSource,
    (out, inp): (usize, usize),
    bias: Option<&[f32]>,
    y: &mut [f32],
) {
    let dst = DisjointMut::new(y);
    let pool = SpinPool::global();
    let work = |worker: usize| {
        let share = |worker: usize| out * worker / pool.threads();
        with_scratch(inp + x.len() / inp, |scratch| {
            let (w, products) = scratch.split_at_mut(inp);
            for row in share(worker)..share(worker + 1) {
                match weight.half_row(row) {
                    Some(half) => dots_half(x, half, products),
                    None => {
                        weight.read_rows(row..row + 1, w);
                        dots(x, w, products);
                    }
                }
                let bias = bias.map_or(0.0, |b| b[row]);
                for (token, product) in products.iter().enumerate() {
                    // SAFETY: this row of every token belongs to this worker alone.
                    unsafe { *dst.at(token * out + row) = product + bias };
                }
            }
        });
    };
    pool.run(&work);
}

/// Rows of a tile: equal tiles, so that no thread waits for a larger one.
fn tile_rows(out: usize, inp: usize) -> usize {
    let most = (TILE_ELEMENTS / inp).clamp(16, 256);
    out.div_ceil(out.div_ceil(most)).next_multiple_of(16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use anybit_core::rounding::nearest;
    use anybit_core::{GridSpec, Matrix, QuantizedMatrix, ScaleFit};
    use proptest::prelude::*;

    /// The scalar twin.
    fn naive(x: &[f32], w: &Matrix, bias: Option<&[f32]>) -> Vec<f32> {
        x.chunks(w.cols)
            .flat_map(|x| {
                (0..w.rows).map(move |r| {
                    let sum: f64 = x.iter().zip(w.row(r)).map(|(a, b)| *a as f64 * *b as f64).sum();
                    sum as f32 + bias.map_or(0.0, |b| b[r])
                })
            })
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn equals_the_scalar_twin(tokens in 0usize..40, inp in 1usize..90, out in 1usize..140,
                                  biased in any::<bool>(), bits in 2u8..=8, seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let w = Matrix::from_vec(out, inp, normals(out * inp)).unwrap();
            let x = normals(tokens * inp);
            let bias = biased.then(|| normals(out));
            let mut y = vec![f32::NAN; tokens * out];
            linear(&x, &w, bias.as_deref(), &mut y);
            for (a, b) in y.iter().zip(naive(&x, &w, bias.as_deref())) {
                prop_assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} {b}");
            }
            // The packed kernel is the dense kernel on the decoded weights, bit for bit.
            let plane = nearest(&w, GridSpec::affine(bits, true, None), ScaleFit::MinMax).unwrap();
            let q = QuantizedMatrix::single(plane);
            let mut packed = vec![0.0; tokens * out];
            linear(&x, &q, bias.as_deref(), &mut packed);
            linear(&x, &q.dequantize(), bias.as_deref(), &mut y);
            prop_assert_eq!(packed, y);
        }
    }

    /// One row, one column, nothing at all; more columns than a tile has elements for.
    #[test]
    fn corners() {
        let mut rng = SplitMix64::new(4);
        let wide = TILE_ELEMENTS / 16 + 3;
        for (tokens, out, inp) in
            [(0, 3, 5), (2, 0, 5), (9, 0, 5), (1, 1, 1), (9, 1, 1), (9, 1, 33), (6, 17, wide)]
        {
            let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
            let w = Matrix::from_vec(out, inp, normals(out * inp)).unwrap();
            let (x, bias) = (normals(tokens * inp), normals(out));
            let mut y = vec![f32::NAN; tokens * out];
            linear(&x, &w, Some(&bias), &mut y);
            for (a, b) in y.iter().zip(naive(&x, &w, Some(&bias))) {
                assert!((a - b).abs() < 1e-3 * (1.0 + b.abs()), "{tokens} {out} {inp}: {a} {b}");
            }
        }
    }

    /// Rows of several grids and widths, permuted, scaled by column, with single weights beside:
    /// the kernel on the packed matrix is the dense kernel on the decoded one (T9 of SKIM's
    /// specification).
    #[test]
    fn rows_of_mixed_grids_equal_their_decoded_weights() {
        let mut rng = SplitMix64::new(9);
        let (rows, cols) = (70, 100);
        let grids = [
            GridSpec::Codebook { bits: 2 },
            GridSpec::SharedCodebook { bits: 3, group_size: Some(32) },
            GridSpec::Codebook { bits: 5 },
            GridSpec::affine(4, false, Some(24)),
        ];
        let groups: Vec<u8> = (0..rows).map(|i| ((i * 7 + i / 9) % 4) as u8).collect();
        let mut planes = Vec::new();
        for (g, grid) in grids.into_iter().enumerate() {
            let count = groups.iter().filter(|own| **own as usize == g).count();
            let mut plane = anybit_core::Plane::empty(grid, count, cols).unwrap();
            let bits = grid.bits();
            for word in plane.codes.iter_mut() {
                *word = rng.next_u64() as u32;
            }
            let used = cols * bits as usize;
            let words = used.div_ceil(32);
            for row in plane.codes.chunks_mut(words).filter(|_| !used.is_multiple_of(32)) {
                row[words - 1] &= (1u32 << (used % 32)) - 1;
            }
            let parts = plane.scales.iter_mut().chain(plane.table.iter_mut());
            parts.for_each(|s| *s = half::f16::from_f64(rng.normal()));
            planes.push(plane);
        }
        let scale = (0..cols).map(|_| half::f16::from_f64(1.0 + 0.1 * rng.normal())).collect();
        let at: Vec<usize> = (0..rows * cols).step_by(97).collect();
        let values: Vec<f32> = at.iter().map(|_| rng.normal() as f32).collect();
        let sparse = anybit_core::Sparse::from_entries((rows, cols), &at, &values).unwrap();
        let packed =
            QuantizedMatrix::from_row_groups((rows, cols), planes, &groups, Some(scale)).unwrap();
        assert_eq!(packed.row_groups().as_ref(), Some(&groups));
        let packed = packed.with_sparse(sparse).unwrap();
        let decoded = packed.dequantize();
        for tokens in [1, 3, 40] {
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();
            let (mut a, mut b) = (vec![0.0; tokens * rows], vec![0.0; tokens * rows]);
            linear(&x, &packed, None, &mut a);
            linear(&x, &decoded, None, &mut b);
            assert_eq!(a, b);
            for (a, b) in a.iter().zip(naive(&x, &decoded, None)) {
                assert!((a - b).abs() < 1e-4 * (1.0 + b.abs()), "{a} {b}");
            }
        }
    }

    #[test]
    fn same_bits_on_any_number_of_threads() {
        let mut rng = SplitMix64::new(8);
        let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
        let w = Matrix::from_vec(700, 576, normals(700 * 576)).unwrap();
        for tokens in [1, 3, 65] {
            let x = normals(tokens * 576);
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut y = vec![0.0; tokens * 700];
                pool.install(|| linear(&x, &w, None, &mut y));
                y
            };
            assert_eq!(run(1), run(3));
        }
    }
}
