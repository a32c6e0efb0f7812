//! [`TablePlane`]: codes of tables of centroids, row by row.
//!
//! A row is cut into *blocks* of 64 columns, the last one padded with code 0, whose codes lie as
//! [`super::slices`] says; of either half the second and third eight codes are exchanged, so that
//! widening a vector of bytes half by half gives 16-bit numbers in the order of columns.

use anybit_core::bitstream::{unpack_row, words_per_row};
use anybit_core::{GridSpec, Plane};
use half::f16;
use rayon::prelude::*;

use super::lines::Lines;
use super::operand::{BLOCK, Operand, RUN};
use super::slices::{pack, unpack, unpack_fast};

/// Largest magnitude of a centroid in 16 bits: sixteen pairs of products with a 15-bit activation,
/// doubled, add up in an i32. As fine as an f16 of the table's largest.
const CENTROID: f32 = 2047.0;

/// Most halves of blocks of a row in groups.
pub(super) const MOST_PARTS: usize = 1024;

/// Columns that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grouping {
    /// The row.
    Row,
    /// So many whole blocks.
    Blocks(usize),
    /// So many halves of blocks.
    Halves(usize),
}

/// Centroids; the 16-bit ones are `round(c / unit)`.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// Whether each row has its own.
    pub per_row: bool,
    /// Low bytes of the 16-bit centroids of a table, then high bytes: `[tables, 2, 2^bits]`.
    pub split: Vec<u8>,
    /// What a 16-bit centroid of 1 is worth, `[tables]`.
    pub unit: Vec<f32>,
    /// The centroids, `[tables, 2^bits]`.
    pub exact: Vec<f16>,
}

/// A plane in kernel order.
#[derive(Debug, Clone)]
pub(super) struct TablePlane {
    pub rows: usize,
    pub cols: usize,
    pub bits: u8,
    pub blocks: usize,
    pub grouping: Grouping,
    /// Groups of a row.
    pub groups: usize,
    /// `[rows, blocks, 8·bits]`.
    pub codes: Lines<u8>,
    /// One per row and group, or none: the table holds the values.
    pub scales: Option<Vec<f16>>,
    pub table: Table,
}

/// Exchanges the second and third eight of a half.
fn exchange(half: &[u8; 32]) -> [u8; 32] {
    let mut out = *half;
    out[8..16].copy_from_slice(&half[16..24]);
    out[16..24].copy_from_slice(&half[8..16]);
    out
}

/// Brings codes into the order in which they are packed, and back.
fn exchange_halves(codes: &mut [u8; BLOCK]) {
    codes.as_chunks_mut::<32>().0.iter_mut().for_each(|half| *half = exchange(half));
}

impl TablePlane {
    /// `None` for groups that are not whole halves of blocks and for more than [`MOST_PARTS`]. The
    /// grid has a table, and there are columns.
    pub fn new(plane: &Plane) -> Option<Self> {
        let (rows, cols, bits) = (plane.rows, plane.cols, plane.grid.bits());
        let groups = plane.grid.groups(cols);
        let grouping = match plane.grid.group_size() {
            _ if groups <= 1 => Grouping::Row,
            Some(size) if size.is_multiple_of(BLOCK) => Grouping::Blocks(size / BLOCK),
            Some(size) if size.is_multiple_of(BLOCK / 2) => Grouping::Halves(size / (BLOCK / 2)),
            _ => return None,
        };
        let blocks = cols.div_ceil(BLOCK);
        if grouping != Grouping::Row && 2 * blocks > MOST_PARTS {
            return None;
        }
        let row_bytes = blocks * 8 * bits as usize;
        let mut codes = Lines::zeros(rows * row_bytes);
        let words = words_per_row(cols, bits);
        codes.par_chunks_mut(row_bytes).enumerate().for_each(|(row, out)| {
            let stream = &plane.codes[row * words..(row + 1) * words];
            for (block, out) in out.chunks_exact_mut(8 * bits as usize).enumerate() {
                let mut codes = [0; BLOCK];
                let count = BLOCK.min(cols - block * BLOCK);
                unpack_row(stream, bits, block * BLOCK, &mut codes[..count]);
                exchange_halves(&mut codes);
                pack(&codes, bits as usize, out);
            }
        });
        let (scales, table) = match plane.grid {
            GridSpec::Codebook { .. } => (None, Table::new(bits, true, &plane.scales)),
            GridSpec::SharedCodebook { .. } => {
                (Some(plane.scales.clone()), Table::new(bits, false, &plane.table))
            }
            _ => unreachable!("a grid without table"),
        };
        Some(Self { rows, cols, bits, blocks, grouping, groups, codes, scales, table })
    }

    /// Bytes of a row's codes.
    pub fn row_bytes(&self) -> usize {
        self.blocks * 8 * self.bits as usize
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        let scales = self.scales.as_ref().map_or(0, |s| 2 * s.len());
        self.codes.len() + scales + self.table.split.len() + 4 * self.table.unit.len()
    }

    /// Scale of a group.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        self.scales.as_ref().map_or(1.0, |s| s[row * self.groups + group].to_f32())
    }

    /// Halves of blocks in a group.
    fn group_len(&self) -> usize {
        match self.grouping {
            Grouping::Row => usize::MAX,
            Grouping::Blocks(n) => 2 * n,
            Grouping::Halves(n) => n,
        }
    }

    /// The table of a row.
    pub fn table_of(&self, row: usize) -> usize {
        if self.table.per_row { row } else { 0 }
    }

    /// What the integers of a row are worth beside its scales.
    pub fn unit(&self, row: usize) -> f32 {
        self.table.unit[self.table_of(row)]
    }

    /// Decodes row `row`, the same bits as [`Plane::decode_row`].
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let stream = &self.codes[row * self.row_bytes()..(row + 1) * self.row_bytes()];
        let entries = 1usize << self.bits;
        let mut exact = [0f32; 256];
        let own = &self.table.exact[self.table_of(row) * entries..][..entries];
        exact.iter_mut().zip(own).for_each(|(e, c)| *e = c.to_f32());
        let mut codes = [0; BLOCK];
        let blocks = stream.chunks_exact(8 * self.bits as usize).zip(out.chunks_mut(BLOCK));
        for (block, (bytes, out)) in blocks.enumerate() {
            unpack_fast(bytes, self.bits as usize, &mut codes);
            exchange_halves(&mut codes);
            for (half, (out, codes)) in out.chunks_mut(32).zip(codes.chunks(32)).enumerate() {
                let pairs = out.iter_mut().zip(codes);
                match self.table.per_row {
                    true => pairs.for_each(|(o, u)| *o = exact[*u as usize]),
                    false => {
                        let scale = self.scale(row, (2 * block + half) / self.group_len());
                        pairs.for_each(|(o, u)| *o = exact[*u as usize] * scale);
                    }
                }
            }
        }
    }

    /// Product of row `row` with token `token`: the scalar twin, the same integers.
    pub fn product(&self, row: usize, x: &Operand, token: usize) -> f32 {
        let (bits, entries) = (self.bits as usize, 1usize << self.bits);
        let stream = &self.codes[row * self.row_bytes()..(row + 1) * self.row_bytes()];
        let split = &self.table.split[self.table_of(row) * 2 * entries..][..2 * entries];
        let centroid = |u: u8| i16::from_le_bytes([split[u as usize], split[entries + u as usize]]);
        let mut sum = 0f32;
        let mut codes = [0; BLOCK];
        for (block, bytes) in stream.chunks_exact(8 * bits).enumerate() {
            unpack(bytes, bits, &mut codes);
            exchange_halves(&mut codes);
            let a = &x.codes[(token * x.blocks + block) * BLOCK..][..BLOCK];
            let mut integers = [0i64; 2];
            for (at, (u, a)) in codes.iter().zip(a).enumerate() {
                integers[at / 32] += (centroid(*u) as i32 * *a as i32) as i64;
            }
            let scale = |half: usize| {
                let group = ((2 * block + half) / self.group_len()).min(self.groups.max(1) - 1);
                x.scales[token * x.runs + block / RUN] * self.scale(row, group)
            };
            sum += match self.grouping {
                Grouping::Halves(_) => {
                    integers[0] as f32 * scale(0) + integers[1] as f32 * scale(1)
                }
                _ => (integers[0] + integers[1]) as f32 * scale(0),
            };
        }
        sum * self.unit(row)
    }
}

impl Table {
    fn new(bits: u8, per_row: bool, exact: &[f16]) -> Self {
        let entries = 1usize << bits;
        let mut split = vec![0; 2 * exact.len()];
        let mut unit = Vec::with_capacity(exact.len() / entries);
        let tables = exact.chunks_exact(entries).zip(split.chunks_exact_mut(2 * entries));
        for (centroids, split) in tables {
            let largest = centroids.iter().fold(0f32, |m, c| m.max(c.to_f32().abs()));
            let step = if largest > 0.0 { largest / CENTROID } else { 1.0 };
            let (low, high) = split.split_at_mut(entries);
            for ((c, low), high) in centroids.iter().zip(low).zip(high) {
                let [l, h] = ((c.to_f32() / step).round_ties_even() as i16).to_le_bytes();
                (*low, *high) = (l, h);
            }
            unit.push(step);
        }
        Self { per_row, split, unit, exact: exact.to_vec() }
    }
}
