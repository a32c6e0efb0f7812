//! [`TiledPlane`]: a packed plane in the order in which vector registers take it apart.
//!
//! A row is cut into *blocks* of 64 columns, the last one padded with code 0; a block of `b`-bit
//! codes takes `8·b` bytes. Codes are split into *slices* of 4, 2 and 1 bits (`b` = 5 is 4 + 1,
//! lowest bits first; 8 bits stay whole), stored one after the other. With `E₀` and `E₁` the 32
//! codes of either half of a block, of which the second and third eight are exchanged:
//!
//! | slice | bytes | byte `j` holds |
//! |---|---|---|
//! | 8 | 64 | `E₀[j]`, then `E₁[j]` |
//! | 4 | 32 | `E₀[j]`, `E₁[j]` |
//! | 2 | 16 | `E₀[j]`, `E₀[16 + j]`, `E₁[j]`, `E₁[16 + j]` |
//! | 1 | 8 | `E₀[8l + j]` for `l` = 0 … 3, then `E₁[8l + j]` |
//!
//! One load, shifts and masks give `E₀` and `E₁` in bytes, and widening a vector of bytes half by
//! half gives 16-bit numbers in the order of columns, because of that exchange.

use anybit_core::bitstream::{unpack_row, words_per_row};
use anybit_core::{GridSpec, Plane};
use half::f16;
use rayon::prelude::*;

use super::lines::Lines;
use super::operand::RUN;

/// Columns of a block.
pub(super) const BLOCK: usize = 64;
/// Largest magnitude of a centroid in 16 bits: sixteen pairs of products with a 15-bit activation,
/// doubled, add up in an i32. As fine as an f16 of the table's largest.
const CENTROID: f32 = 2047.0;

/// Most parts of a row that have parameters of their own: halves of blocks, or runs where a row has
/// a zero point.
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

/// What codes stand for.
#[derive(Debug, Clone)]
pub(super) enum Values {
    /// `(u − z)·s` with a fixed `2z`.
    Fixed { doubled_zero: i32 },
    /// `(u − z)·s` with a zero point per group, `[rows, groups]`.
    Stored { zeros: Vec<u8> },
    /// Entries of tables.
    Table(Table),
}

/// Tables of centroids; the 16-bit ones are `round(c / unit)`.
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

/// Scales, one per row and group.
#[derive(Debug, Clone)]
pub(super) enum Scales {
    /// There are none: tables hold the values.
    One,
    /// As stored in groups.
    Half(Vec<f16>),
    /// One per row, or exact ones.
    Single(Vec<f32>),
}

/// A plane in kernel order.
#[derive(Debug, Clone)]
pub(super) struct TiledPlane {
    pub rows: usize,
    pub cols: usize,
    pub bits: u8,
    pub blocks: usize,
    pub grouping: Grouping,
    /// Groups of a row.
    pub groups: usize,
    /// `[rows, blocks, 8·bits]`.
    pub codes: Lines<u8>,
    pub scales: Scales,
    pub values: Values,
}

/// Exchanges the second and third eight of a half.
fn exchange(half: &[u8; 32]) -> [u8; 32] {
    let mut out = *half;
    out[8..16].copy_from_slice(&half[16..24]);
    out[16..24].copy_from_slice(&half[8..16]);
    out
}

/// Slices of codes of `bits` bits: width and place of the lowest bit.
pub(super) const fn slices(bits: usize) -> [Option<(usize, usize)>; 3] {
    match bits {
        1 | 2 | 4 | 8 => [Some((bits, 0)), None, None],
        3 => [Some((2, 0)), Some((1, 2)), None],
        5 => [Some((4, 0)), Some((1, 4)), None],
        6 => [Some((4, 0)), Some((2, 4)), None],
        _ => [Some((4, 0)), Some((2, 4)), Some((1, 6))],
    }
}

/// Packs the 64 codes of a block, in the order of columns, into `8·bits` bytes.
fn pack_block(codes: &[u8; BLOCK], bits: usize, out: &mut [u8]) {
    let halves = codes.as_chunks::<32>().0;
    let e = [exchange(&halves[0]), exchange(&halves[1])];
    let mut out = out;
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = out.split_at_mut(8 * width);
        let mask = (0xffu32 >> (8 - width)) as u8;
        let part = |half: usize, at: usize| (e[half][at] >> shift) & mask;
        match width {
            8 => own.copy_from_slice(e.as_flattened()),
            4 => {
                for (j, byte) in own.iter_mut().enumerate() {
                    *byte = part(0, j) | part(1, j) << 4;
                }
            }
            2 => {
                for (j, byte) in own.iter_mut().enumerate() {
                    let low = part(0, j) | part(0, 16 + j) << 2;
                    *byte = low | part(1, j) << 4 | part(1, 16 + j) << 6;
                }
            }
            _ => {
                own.fill(0);
                for l in 0..8 {
                    for (j, byte) in own.iter_mut().enumerate() {
                        *byte |= part(l / 4, 8 * (l % 4) + j) << l;
                    }
                }
            }
        }
        out = rest;
    }
}

/// The reverse of [`pack_block`].
pub(super) fn unpack_block(bytes: &[u8], bits: usize, codes: &mut [u8; BLOCK]) {
    let mut e = [[0u8; 32]; 2];
    let mut bytes = bytes;
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = bytes.split_at(8 * width);
        for (j, byte) in own.iter().enumerate() {
            match width {
                8 => e[j / 32][j % 32] = *byte,
                4 => {
                    e[0][j] |= (byte & 15) << shift;
                    e[1][j] |= (byte >> 4) << shift;
                }
                2 => {
                    for l in 0..4 {
                        e[l / 2][16 * (l % 2) + j] |= (byte >> (2 * l) & 3) << shift;
                    }
                }
                _ => {
                    for l in 0..8 {
                        e[l / 4][8 * (l % 4) + j] |= (byte >> l & 1) << shift;
                    }
                }
            }
        }
        bytes = rest;
    }
    for (half, codes) in e.iter().zip(codes.as_chunks_mut::<32>().0) {
        *codes = exchange(half);
    }
}

impl TiledPlane {
    /// `None` for groups that are not whole halves of blocks, for more than [`MOST_PARTS`], and for
    /// planes without columns.
    pub fn new(plane: &Plane) -> Option<Self> {
        let (rows, cols, bits) = (plane.rows, plane.cols, plane.grid.bits());
        // A plane's fields are open: with other bits kernels would read behind its codes.
        if cols == 0 || plane.grid.validate(cols).is_err() {
            return None;
        }
        let groups = plane.grid.groups(cols);
        let grouping = match plane.grid.group_size() {
            _ if groups <= 1 => Grouping::Row,
            Some(size) if size.is_multiple_of(BLOCK) => Grouping::Blocks(size / BLOCK),
            Some(size) if size.is_multiple_of(BLOCK / 2) => Grouping::Halves(size / (BLOCK / 2)),
            _ => return None,
        };
        let blocks = cols.div_ceil(BLOCK);
        let parts = match grouping {
            Grouping::Row if plane.grid.has_zeros() => blocks.div_ceil(RUN),
            Grouping::Row => 0,
            Grouping::Blocks(_) | Grouping::Halves(_) => 2 * blocks,
        };
        if parts > MOST_PARTS {
            return None;
        }
        let mut codes = Lines::zeros(rows * blocks * 8 * bits as usize);
        let words = words_per_row(cols, bits);
        let row_bytes = blocks * 8 * bits as usize;
        codes.par_chunks_mut(row_bytes.max(1)).enumerate().for_each(|(row, out)| {
            let stream = &plane.codes[row * words..(row + 1) * words];
            for (block, out) in out.chunks_exact_mut(8 * bits as usize).enumerate() {
                let mut codes = [0; BLOCK];
                let count = BLOCK.min(cols - block * BLOCK);
                unpack_row(stream, bits, block * BLOCK, &mut codes[..count]);
                pack_block(&codes, bits as usize, out);
            }
        });
        let values = values_of(plane);
        let scales = match (&plane.grid, grouping) {
            (GridSpec::Codebook { .. }, _) => Scales::One,
            (grid, _) if grid.has_exact_scales() => Scales::Single(plane.exact_scales.clone()),
            (_, Grouping::Row) => Scales::Single(plane.scales.iter().map(|s| s.to_f32()).collect()),
            _ => Scales::Half(plane.scales.clone()),
        };
        Some(Self { rows, cols, bits, blocks, grouping, groups, codes, scales, values })
    }

    /// Bytes of a row's codes.
    pub fn row_bytes(&self) -> usize {
        self.blocks * 8 * self.bits as usize
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        let scales = match &self.scales {
            Scales::One => 0,
            Scales::Half(s) => 2 * s.len(),
            Scales::Single(s) => 4 * s.len(),
        };
        let values = match &self.values {
            Values::Fixed { .. } => 0,
            Values::Stored { zeros } => zeros.len(),
            Values::Table(table) => table.split.len() + 4 * table.unit.len(),
        };
        self.codes.len() + scales + values
    }

    /// Bytes held for reading rows exactly, beside [`Self::bytes`].
    pub fn exact_bytes(&self) -> usize {
        match &self.values {
            Values::Table(table) => 2 * table.exact.len(),
            _ => 0,
        }
    }

    /// Scale of a group.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        match &self.scales {
            Scales::One => 1.0,
            Scales::Half(s) => s[row * self.groups + group].to_f32(),
            Scales::Single(s) => s[row * self.groups + group],
        }
    }

    /// Columns of a group; the last may be shorter.
    fn group_len(&self) -> usize {
        match self.grouping {
            Grouping::Row => self.cols,
            Grouping::Blocks(n) => n * BLOCK,
            Grouping::Halves(n) => n * BLOCK / 2,
        }
    }

    /// The table of a row.
    pub fn table_of(&self, table: &Table, row: usize) -> usize {
        if table.per_row { row } else { 0 }
    }

    /// Decodes row `row`, the same bits as [`Plane::decode_row`].
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let stream = &self.codes[row * self.row_bytes()..(row + 1) * self.row_bytes()];
        let entries = 1usize << self.bits;
        let mut exact = [0f32; 256];
        if let Values::Table(table) = &self.values {
            let at = self.table_of(table, row) * entries;
            let own = &table.exact[at..at + entries];
            exact.iter_mut().zip(own).for_each(|(e, c)| *e = c.to_f32());
        }
        let mut codes = [0; BLOCK];
        let len = self.group_len().max(1);
        let blocks = stream.chunks_exact(8 * self.bits as usize).zip(out.chunks_mut(BLOCK));
        for (block, (bytes, out)) in blocks.enumerate() {
            super::unpack_codes(bytes, self.bits, &mut codes);
            // A group is at least half a block.
            for (half, (out, codes)) in out.chunks_mut(32).zip(codes.chunks(32)).enumerate() {
                let group = (block * BLOCK + half * 32) / len;
                let scale = self.scale(row, group);
                let pairs = out.iter_mut().zip(codes);
                match &self.values {
                    Values::Fixed { doubled_zero } => {
                        let zero = *doubled_zero as f32 * 0.5;
                        pairs.for_each(|(o, u)| *o = (*u as f32 - zero) * scale);
                    }
                    Values::Stored { zeros } => {
                        let zero = zeros[row * self.groups + group] as f32;
                        pairs.for_each(|(o, u)| *o = (*u as f32 - zero) * scale);
                    }
                    Values::Table(table) if table.per_row => {
                        pairs.for_each(|(o, u)| *o = exact[*u as usize]);
                    }
                    Values::Table(_) => pairs.for_each(|(o, u)| *o = exact[*u as usize] * scale),
                }
            }
        }
    }
}

fn values_of(plane: &Plane) -> Values {
    let entries = 1usize << plane.grid.bits();
    let (per_row, exact) = match plane.grid {
        GridSpec::Codebook { .. } => (true, &plane.scales),
        GridSpec::SharedCodebook { .. } => (false, &plane.table),
        _ if plane.grid.has_zeros() => {
            let (bits, groups) = (plane.grid.bits(), plane.grid.groups(plane.cols));
            let mut zeros = vec![0; plane.rows * groups];
            let words = words_per_row(groups, bits);
            for (row, zeros) in zeros.chunks_exact_mut(groups.max(1)).enumerate() {
                unpack_row(&plane.zeros[row * words..(row + 1) * words], bits, 0, zeros);
            }
            return Values::Stored { zeros };
        }
        _ => return Values::Fixed { doubled_zero: (2.0 * plane.grid.implied_zero()) as i32 },
    };
    let mut split = vec![0; 2 * exact.len()];
    let mut unit = Vec::with_capacity(exact.len() / entries);
    for (centroids, split) in exact.chunks_exact(entries).zip(split.chunks_exact_mut(2 * entries)) {
        let largest = centroids.iter().fold(0f32, |m, c| m.max(c.to_f32().abs()));
        let step = if largest > 0.0 { largest / CENTROID } else { 1.0 };
        let (low, high) = split.split_at_mut(entries);
        for ((c, low), high) in centroids.iter().zip(low).zip(high) {
            let [l, h] = ((c.to_f32() / step).round_ties_even() as i16).to_le_bytes();
            (*low, *high) = (l, h);
        }
        unit.push(step);
    }
    Values::Table(Table { per_row, split, unit, exact: exact.clone() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;

    #[test]
    fn blocks_come_back_and_codes_are_where_the_table_says() {
        let mut rng = SplitMix64::new(1);
        for bits in 1..=8usize {
            let mask = (0xffu32 >> (8 - bits)) as u8;
            let codes: [u8; BLOCK] = std::array::from_fn(|_| rng.next_u64() as u8 & mask);
            let mut bytes = vec![0; 8 * bits];
            pack_block(&codes, bits, &mut bytes);
            let mut back = [0; BLOCK];
            unpack_block(&bytes, bits, &mut back);
            assert_eq!(back, codes, "{bits} bits");
        }
        let mut one = [0; BLOCK];
        one[9] = 5;
        let mut bytes = [0; 32];
        pack_block(&one, 4, &mut bytes);
        assert_eq!(bytes[17], 5);
    }
}
