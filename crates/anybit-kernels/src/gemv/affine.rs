//! [`AffinePlane`]: codes of an affine grid in tiles of sixteen rows, a row for each lane of a vector.
//!
//! Columns are cut into *blocks* of 64 and halves of blocks, the last block padded with code 0, and
//! rows into tiles, the last one padded likewise. Of a tile, eight columns after the other lie
//! together as [`super::slices`] says: their first four columns are `E₀`, the others `E₁`, and in
//! either half row `r` has bytes `4r … 4r + 3` with columns 0, 2, 1, 3. The lower and the upper bytes
//! of 16-bit numbers are then pairs of neighbours, which is what a multiply-add of pairs takes: lane
//! `r` adds up row `r`, a scale for each row is one vector of 512 bits or two of 256, and nothing is
//! summed across lanes.
//!
//! A *part* of a row is what one integer adds up: as many halves of blocks as the largest power of two
//! that divides a group, at most a run of activations.

use std::ops::Range;

use anybit_core::bitstream::{unpack_row, words_per_row};
use anybit_core::{GridSpec, Plane};
use half::f16;
use rayon::prelude::*;

use super::lines::Lines;
use super::operand::{BLOCK, HALVES, Operand};
use super::slices::{pack, unpack};
use crate::SpinPool;
use crate::isa::{Isa, isa};

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Columns that are packed together.
pub(super) const COLUMNS: usize = 8;
/// Codes that are packed together.
const CODES: usize = TILE * COLUMNS;

/// Zero points.
#[derive(Debug, Clone)]
pub(super) enum Zeros {
    /// `2z`, the same everywhere.
    Fixed(i32),
    /// One per row and group, `[tiles, groups, 16]`.
    Stored(Vec<u8>),
}

/// Scales, `[tiles, groups, 16]`.
#[derive(Debug, Clone)]
pub(super) enum Scales {
    /// As stored in groups.
    Half(Vec<f16>),
    /// One per row, or exact ones.
    Single(Vec<f32>),
}

/// A plane of `(u − z)·s` in kernel order.
#[derive(Debug, Clone)]
pub(super) struct AffinePlane {
    pub rows: usize,
    pub cols: usize,
    pub bits: usize,
    pub blocks: usize,
    /// Groups of a row, those of its padding included.
    pub groups: usize,
    /// Parts of a group.
    pub group_parts: usize,
    /// Parts of a row.
    pub parts: usize,
    /// Halves of blocks in a part, as a power of two: at most a run's.
    pub part_log2: u32,
    /// `[tiles, blocks, 8, 16·bits]`.
    pub codes: Lines<u8>,
    pub scales: Scales,
    pub zeros: Zeros,
}

/// Where the code of a tile's row and of one of eight columns lies.
const fn place(row: usize, col: usize) -> usize {
    (col / 4) * CODES / 2 + row * 4 + [0, 2, 1, 3][col % 4]
}

impl AffinePlane {
    /// `None` for groups that are not whole halves of blocks. The grid is affine, and there are
    /// columns.
    pub fn new(plane: &Plane) -> Option<Self> {
        let (rows, cols, bits) = (plane.rows, plane.cols, plane.grid.bits());
        let groups = plane.grid.groups(cols);
        let run_log2 = HALVES.trailing_zeros();
        let (group_parts, part_log2) = match plane.grid.group_size() {
            _ if groups <= 1 => (parts_of(cols, run_log2), run_log2),
            Some(size) if size.is_multiple_of(BLOCK / 2) => {
                let halves = size / (BLOCK / 2);
                let log2 = halves.trailing_zeros().min(run_log2);
                (halves >> log2, log2)
            }
            _ => return None,
        };
        let (blocks, parts) = (cols.div_ceil(BLOCK), parts_of(cols, part_log2));
        let padded = parts.div_ceil(group_parts);
        let zeros = match &plane.grid {
            grid if grid.has_zeros() => Zeros::Stored(zeros_of(plane, groups, padded)),
            grid => Zeros::Fixed((2.0 * grid.implied_zero()) as i32),
        };
        let halves = || plane.scales.iter().map(|s| s.to_f32()).collect::<Vec<f32>>();
        let scales = match &plane.grid {
            grid if grid.has_exact_scales() => {
                Scales::Single(by_tiles(&plane.exact_scales, rows, groups, padded))
            }
            _ if groups <= 1 => Scales::Single(by_tiles(&halves(), rows, groups, padded)),
            _ => Scales::Half(by_tiles(&plane.scales, rows, groups, padded)),
        };
        Some(Self {
            rows,
            cols,
            bits: bits as usize,
            blocks,
            groups: padded,
            group_parts,
            parts,
            part_log2,
            codes: codes_of(plane, blocks),
            scales,
            zeros,
        })
    }

    /// Bytes of a tile's codes.
    pub fn tile_bytes(&self) -> usize {
        self.blocks * BLOCK * TILE / 8 * self.bits
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::Half(s) => 2 * s.len(),
            Scales::Single(s) => 4 * s.len(),
        };
        let zeros = match &self.zeros {
            Zeros::Fixed(_) => 0,
            Zeros::Stored(zeros) => zeros.len(),
        };
        self.codes.len() + scales + zeros
    }

    /// Halves of blocks of a part.
    pub fn halves(&self, part: usize) -> Range<usize> {
        part << self.part_log2..((part + 1) << self.part_log2).min(2 * self.blocks)
    }

    /// Parts of a run of activations.
    pub fn parts_of_run(&self, run: usize) -> Range<usize> {
        let count = HALVES >> self.part_log2;
        run * count..self.parts.min((run + 1) * count)
    }

    /// Where the parameters of a tile's part begin.
    pub fn parameters(&self, tile: usize, part: usize) -> usize {
        (tile * self.groups + part / self.group_parts) * TILE
    }

    /// What sums start from but for stored zero points, `[⌈tokens / width⌉, parts, width]`: `−2z·Σ a`
    /// where zero points are fixed, `−2·Σ a` where they are stored.
    pub fn starts(&self, x: &Operand, out: &mut Lines<i32>) {
        let factor = match &self.zeros {
            Zeros::Fixed(doubled) => -doubled,
            Zeros::Stored(_) => -2,
        };
        out.resize(x.tokens.div_ceil(x.width) * x.width * self.parts);
        SpinPool::global().chunks(out, x.width * self.parts, |group, out| {
            let first = group * x.width * 2 * x.blocks;
            for (at, sums) in x.sums[first..].chunks_exact(2 * x.blocks).take(x.width).enumerate() {
                let out = out.iter_mut().skip(at).step_by(x.width);
                for (sums, out) in sums.chunks(1 << self.part_log2).zip(out) {
                    *out = sums.iter().sum::<i32>().wrapping_mul(factor);
                }
            }
        });
    }

    fn scale(&self, at: usize) -> f32 {
        match &self.scales {
            Scales::Half(s) => s[at].to_f32(),
            Scales::Single(s) => s[at],
        }
    }

    /// The eight columns `at` of a tile.
    fn columns(&self, tile: usize, at: usize) -> &[u8] {
        let bytes = CODES / 8 * self.bits;
        &self.codes[tile * self.tile_bytes() + at * bytes..][..bytes]
    }

    /// Decodes rows of a tile to `out`, row by row at a distance of `stride`: the same bits as
    /// [`Plane::decode_row`].
    pub fn decode_rows(&self, rows: Range<usize>, out: &mut [f32], stride: usize) {
        let tile = rows.start / TILE;
        let lanes = rows.start % TILE..rows.start % TILE + rows.len();
        match isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: chosen because the machine has these instructions.
            Isa::Avx2 | Isa::Avx512 => unsafe {
                super::x86::affine::decode(self, tile, lanes, out, stride)
            },
            _ => self.decode_scalar(tile, lanes, out, stride),
        }
    }

    /// The scalar twin.
    pub fn decode_scalar(&self, tile: usize, lanes: Range<usize>, out: &mut [f32], stride: usize) {
        let mut codes = [0; CODES];
        for at in 0..self.cols.div_ceil(COLUMNS) {
            unpack(self.columns(tile, at), self.bits, &mut codes);
            let count = COLUMNS.min(self.cols - at * COLUMNS);
            for (row, lane) in lanes.clone().enumerate() {
                let own = self.parameters(tile, (at / 4) >> self.part_log2) + lane;
                let scale = self.scale(own);
                let zero = match &self.zeros {
                    Zeros::Fixed(doubled) => *doubled as f32 * 0.5,
                    Zeros::Stored(zeros) => zeros[own] as f32,
                };
                let out = &mut out[row * stride + at * COLUMNS..][..count];
                for (col, out) in out.iter_mut().enumerate() {
                    *out = (codes[place(lane, col)] as f32 - zero) * scale;
                }
            }
        }
    }

    /// Adds the products of a tile with token `token` to `sums`: the scalar twin, the same integers.
    pub fn add_tile(&self, tile: usize, x: &Operand, token: usize, sums: &mut [f32; TILE]) {
        let a = &x.codes[token * x.blocks * BLOCK..][..x.blocks * BLOCK];
        let mut codes = [0; CODES];
        for run in 0..x.runs {
            let mut products = [0f32; TILE];
            for part in self.parts_of_run(run) {
                let halves = self.halves(part);
                let mut totals = [0i32; TILE];
                for at in 4 * halves.start..4 * halves.end {
                    unpack(self.columns(tile, at), self.bits, &mut codes);
                    for (lane, total) in totals.iter_mut().enumerate() {
                        for (col, a) in a[at * COLUMNS..][..COLUMNS].iter().enumerate() {
                            let product = codes[place(lane, col)] as i32 * *a as i32;
                            *total = total.wrapping_add(product);
                        }
                    }
                }
                let own = self.parameters(tile, part);
                let first = 2 * token * x.blocks;
                let a: i32 = x.sums[first + halves.start..first + halves.end].iter().sum();
                for (lane, (sum, total)) in products.iter_mut().zip(totals).enumerate() {
                    let doubled = match &self.zeros {
                        Zeros::Fixed(doubled) => *doubled,
                        Zeros::Stored(zeros) => 2 * zeros[own + lane] as i32,
                    };
                    let total = total.wrapping_sub(doubled.wrapping_mul(a));
                    *sum += total as f32 * self.scale(own + lane);
                }
            }
            let scale = x.scales[token * x.runs + run];
            sums.iter_mut().zip(products).for_each(|(sum, product)| *sum += product * scale);
        }
    }
}

/// Parts of a row of `cols` columns.
const fn parts_of(cols: usize, part_log2: u32) -> usize {
    (2 * cols.div_ceil(BLOCK)).div_ceil(1 << part_log2)
}

/// Parameters `[rows, groups]` as `[tiles, padded, 16]`, zero where there are none.
fn by_tiles<V: Copy + Default>(values: &[V], rows: usize, groups: usize, padded: usize) -> Vec<V> {
    let mut out = vec![V::default(); rows.next_multiple_of(TILE) * padded];
    for (row, values) in values.chunks_exact(groups).enumerate() {
        for (group, value) in values.iter().enumerate() {
            out[(row / TILE * padded + group) * TILE + row % TILE] = *value;
        }
    }
    out
}

fn zeros_of(plane: &Plane, groups: usize, padded: usize) -> Vec<u8> {
    let (rows, bits) = (plane.rows, plane.grid.bits());
    let mut zeros = vec![0; rows * groups];
    let words = words_per_row(groups, bits);
    for (row, zeros) in zeros.chunks_exact_mut(groups).enumerate() {
        unpack_row(&plane.zeros[row * words..(row + 1) * words], bits, 0, zeros);
    }
    by_tiles(&zeros, rows, groups, padded)
}

fn codes_of(plane: &Plane, blocks: usize) -> Lines<u8> {
    let (rows, cols, bits) = (plane.rows, plane.cols, plane.grid.bits());
    let (words, width) = (words_per_row(cols, bits), blocks * BLOCK);
    let tile_bytes = width * TILE / 8 * bits as usize;
    let mut codes = Lines::zeros(rows.div_ceil(TILE) * tile_bytes);
    codes.par_chunks_mut(tile_bytes).enumerate().for_each(|(tile, out)| {
        let mut own = vec![0; TILE * width];
        for row in tile * TILE..rows.min((tile + 1) * TILE) {
            let stream = &plane.codes[row * words..(row + 1) * words];
            unpack_row(stream, bits, 0, &mut own[row % TILE * width..][..cols]);
        }
        for (at, out) in out.chunks_exact_mut(CODES / 8 * bits as usize).enumerate() {
            let mut codes = [0; CODES];
            for row in 0..TILE {
                for col in 0..COLUMNS {
                    codes[place(row, col)] = own[row * width + at * COLUMNS + col];
                }
            }
            pack(&codes, bits as usize, out);
        }
    });
    codes
}

/// Whether codes of the grid are affine, and not entries of a table.
pub(super) fn is_affine(grid: &GridSpec) -> bool {
    !matches!(grid, GridSpec::Codebook { .. } | GridSpec::SharedCodebook { .. })
}
