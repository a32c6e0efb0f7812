//! The scalar twin of the vector kernels: the same integers, block by block.

use super::operand::{LANES, Operand, RUN};
use super::plane::{BLOCK, Grouping, TiledPlane, Values, unpack_block};

/// Product of row `row` with token `token`.
pub(super) fn row(plane: &TiledPlane, row: usize, x: &Operand, token: usize) -> f32 {
    let bits = plane.bits as usize;
    let stream = &plane.codes[row * plane.row_bytes()..(row + 1) * plane.row_bytes()];
    let (per, halves) = match plane.grouping {
        Grouping::Row => (usize::MAX, false),
        Grouping::Blocks(n) => (2 * n, false),
        Grouping::Halves(n) => (n, true),
    };
    let mut sum = 0f32;
    let mut codes = [0; BLOCK];
    for (block, bytes) in stream.chunks_exact(8 * bits).enumerate() {
        unpack_block(bytes, bits, &mut codes);
        let at = token * x.blocks + block;
        let mut integers = [0i32; 2];
        for (half, integer) in integers.iter_mut().enumerate() {
            let a = &x.codes[at * BLOCK + half * 32..][..32];
            let own = &codes[half * 32..][..32];
            let group = (2 * block + half) / per;
            let dot = |weight: &dyn Fn(u8) -> i32| {
                own.iter().zip(a).fold(0i32, |sum, (u, a)| sum + weight(*u) * *a as i32)
            };
            let sums = &x.sums[(2 * at + half) * LANES..][..LANES];
            let total: i32 = sums.iter().sum();
            *integer = match &plane.values {
                Values::Fixed { doubled_zero } => dot(&|u| u as i32) - doubled_zero * total,
                Values::Stored { zeros } => {
                    // Behind the last column there may be no group, and nothing to add.
                    let zero = zeros.get(row * plane.groups + group.min(plane.groups - 1));
                    dot(&|u| u as i32) - 2 * zero.map_or(0, |z| *z as i32) * total
                }
                Values::Table(table) => {
                    let entries = 1usize << bits;
                    let split = &table.split[plane.table_of(table, row) * 2 * entries..];
                    let centroid = |u: u8| {
                        i16::from_le_bytes([split[u as usize], split[entries + u as usize]]) as i32
                    };
                    dot(&centroid)
                }
            };
        }
        let scale = |half: usize| {
            x.scales[token * x.runs + block / RUN]
                * plane.scale(row, ((2 * block + half) / per).min(plane.groups - 1))
        };
        sum += match halves {
            true => integers[0] as f32 * scale(0) + integers[1] as f32 * scale(1),
            // Either half fits as tightly as a vector's lane does, both together do not.
            false => (integers[0] as i64 + integers[1] as i64) as f32 * scale(0),
        };
    }
    sum * unit(plane, row)
}

/// What the integers of a row are worth beside its scales.
pub(super) fn unit(plane: &TiledPlane, row: usize) -> f32 {
    match &plane.values {
        Values::Table(table) => table.unit[plane.table_of(table, row)],
        _ => 1.0,
    }
}
