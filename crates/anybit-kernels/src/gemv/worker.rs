//! What each thread does of a call: tiles of rows, for all tokens.

use std::ops::Range;

use anybit_core::Sparse;

use super::affine::TILE;
use super::lines::Lines;
use super::operand::Operand;
#[cfg(target_arch = "x86_64")]
use super::x86;
use super::{Input, KernelPlane, MOST, PackedWeight, TOKENS, WIDE_TOKENS, width};
use crate::DisjointMut;
use crate::isa::Isa;

/// Bytes of the activations that stay in the second-level cache while weights pass.
const BLOCK_BYTES: usize = 1 << 19;

/// One product as its workers see it.
pub(super) struct Part<'a> {
    pub weight: &'a PackedWeight,
    pub bias: Option<&'a [f32]>,
    pub y: DisjointMut,
    pub operands: &'a [Operand],
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub starts: &'a [Lines<i32>],
}

/// The products of a call.
pub(super) struct Jobs<'a> {
    pub isa: Isa,
    pub parts: [Option<Part<'a>>; MOST],
    pub tokens: usize,
}

impl Jobs<'_> {
    /// Computes the share of one of `threads` workers: as many tiles of each row group as the
    /// others, so that all have the same bytes and the same work.
    pub fn run(&self, index: usize, threads: usize, input: Input<'_>) {
        with_room(|room| {
            let width = width(self.isa, self.tokens);
            let mut worker = Worker { isa: self.isa, width, input, room };
            for part in self.parts.iter().flatten() {
                let weight = part.weight;
                let most = (BLOCK_BYTES / (2 * weight.cols) / WIDE_TOKENS).max(4) * WIDE_TOKENS;
                for first in (0..self.tokens).step_by(most) {
                    let tokens = first..self.tokens.min(first + most);
                    let mut stored = 0;
                    let groups = weight.planes.chunks_exact(weight.column_groups);
                    for (group, planes) in groups.enumerate() {
                        let own = RowGroup { part, group, stored, rows: planes[0].rows() };
                        let tiles = own.rows.div_ceil(TILE);
                        let share = tiles * index / threads..tiles * (index + 1) / threads;
                        share.for_each(|tile| worker.tile(&own, tile, tokens.clone()));
                        stored += own.rows;
                    }
                }
            }
        });
    }
}

/// Rows of equal grids of a product.
struct RowGroup<'a> {
    part: &'a Part<'a>,
    group: usize,
    /// Its first stored row.
    stored: usize,
    rows: usize,
}

impl RowGroup<'_> {
    /// Rows of a tile.
    fn tile(&self, tile: usize) -> Range<usize> {
        tile * TILE..self.rows.min((tile + 1) * TILE)
    }
}

/// What kernels write on while they work.
struct Room {
    #[cfg(target_arch = "x86_64")]
    spread: x86::table::Spread,
}

/// Runs `f` with this thread's room, which is made once.
fn with_room<R>(f: impl FnOnce(&mut Room) -> R) -> R {
    thread_local! {
        static ROOM: std::cell::RefCell<Box<Room>> = std::cell::RefCell::new(Box::new(Room {
            #[cfg(target_arch = "x86_64")]
            spread: x86::table::Spread::new(),
        }));
    }
    ROOM.with_borrow_mut(|room| f(room))
}

/// One thread's part of a product.
struct Worker<'a> {
    isa: Isa,
    width: usize,
    input: Input<'a>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    room: &'a mut Room,
}

impl Worker<'_> {
    /// A tile of rows, for some tokens.
    fn tile(&mut self, own: &RowGroup<'_>, tile: usize, tokens: Range<usize>) {
        for first in tokens.clone().step_by(self.width) {
            let own_tokens = first..tokens.end.min(first + self.width);
            match self.width {
                1 => self.some::<1>(own, tile, own_tokens),
                TOKENS => self.some::<TOKENS>(own, tile, own_tokens),
                _ => self.some::<WIDE_TOKENS>(own, tile, own_tokens),
            }
        }
    }

    /// [`Self::tile`] for as many tokens as a kernel takes; where there are fewer, the last one
    /// several times.
    fn some<const T: usize>(&mut self, own: &RowGroup<'_>, tile: usize, tokens: Range<usize>) {
        let count = tokens.len();
        let all = std::array::from_fn(|t| tokens.start + t.min(count - 1));
        let mut sums = [[0f32; TILE]; T];
        self.products(own, tile, all, &mut sums);
        let rows = own.tile(tile);
        let slots = own.stored + rows.start..own.stored + rows.end;
        self.write(own.part, slots, tokens.start, &sums[..count]);
    }

    /// Adds the products of a tile with tokens to `sums`, over all column groups.
    fn products<const T: usize>(
        &mut self,
        own: &RowGroup<'_>,
        tile: usize,
        tokens: [usize; T],
        sums: &mut [[f32; TILE]; T],
    ) {
        let weight = own.part.weight;
        let groups = weight.column_groups;
        for (at, x) in own.part.operands.iter().enumerate() {
            let index = own.group * groups + at;
            match &weight.planes[index] {
                #[cfg(target_arch = "x86_64")]
                KernelPlane::Affine(plane) if self.isa > Isa::Scalar => {
                    let input = x86::affine::Input { plane, x, starts: &own.part.starts[index] };
                    // SAFETY: chosen because the machine has these instructions.
                    unsafe {
                        match self.isa {
                            Isa::Avx512 if T == WIDE_TOKENS && x.is_coded() => {
                                x86::affine512::tile_of_bytes(input, tile, tokens[0] / T, sums)
                            }
                            Isa::Avx512 => x86::affine512::tile(input, tile, tokens[0] / T, sums),
                            _ => x86::affine::tile(input, tile, tokens, sums),
                        }
                    }
                }
                #[cfg(target_arch = "x86_64")]
                KernelPlane::Table(plane) if self.isa > Isa::Scalar => {
                    let call = x86::table::Call { plane, rows: own.tile(tile), x, tokens };
                    let spread = &mut self.room.spread;
                    // SAFETY: chosen because the machine has these instructions.
                    unsafe {
                        match self.isa {
                            Isa::Avx512 => x86::table512::rows(&call, spread, sums),
                            _ => x86::table::rows(&call, spread, sums),
                        }
                    }
                }
                KernelPlane::Affine(plane) => {
                    for (sums, token) in sums.iter_mut().zip(tokens) {
                        plane.add_tile(tile, x, token, sums);
                    }
                }
                KernelPlane::Table(plane) => {
                    for (sums, token) in sums.iter_mut().zip(tokens) {
                        for (sum, row) in sums.iter_mut().zip(own.tile(tile)) {
                            *sum += plane.product(row, x, token);
                        }
                    }
                }
            }
        }
    }

    /// Writes the results of stored rows `slots` and of the tokens of `sums`, the first of which is
    /// `token`.
    fn write(&self, part: &Part<'_>, slots: Range<usize>, token: usize, sums: &[[f32; TILE]]) {
        let weight = part.weight;
        if weight.logical.is_none() && weight.sparse.is_none() {
            return copy(part, slots, token, sums);
        }
        for (at, slot) in slots.enumerate() {
            let row = weight.logical.as_ref().map_or(slot, |l| l[slot] as usize);
            let bias = part.bias.map_or(0.0, |b| b[row]);
            for (t, sums) in sums.iter().enumerate() {
                let mut sum = sums[at] + bias;
                if let Some(sparse) = &weight.sparse {
                    sum += sparse_product(sparse, row, token + t, self.input, weight.cols);
                }
                // SAFETY: an element of a row that this worker alone has.
                unsafe { *part.y.at((token + t) * weight.rows + row) = sum };
            }
        }
    }
}

/// Writes the results of rows that lie in their order, as [`Worker::write`].
fn copy(part: &Part<'_>, rows: Range<usize>, token: usize, sums: &[[f32; TILE]]) {
    for (t, sums) in sums.iter().enumerate() {
        let first = (token + t) * part.weight.rows + rows.start;
        // SAFETY: elements of rows that this worker alone has.
        let y = unsafe { part.y.slice(first, rows.len()) };
        y.copy_from_slice(&sums[..rows.len()]);
        if let Some(bias) = part.bias {
            y.iter_mut().zip(&bias[rows.clone()]).for_each(|(y, b)| *y += b);
        }
    }
}

/// The product of a sparse row with a token, with the values that its codes stand for.
fn sparse_product(s: &Sparse, row: usize, token: usize, input: Input<'_>, cols: usize) -> f32 {
    let entries = s.rows[row] as usize..s.rows[row + 1] as usize;
    let entries = s.cols[entries.clone()].iter().zip(&s.values[entries]);
    match input {
        Input::Values(x) => {
            let x = &x[token * cols..(token + 1) * cols];
            entries.map(|(col, value)| value.to_f32() * x[*col as usize]).sum()
        }
        Input::Codes(x) => {
            let segments = x.segments.len();
            let value = |col: usize| {
                let (mut segment, mut end) = (0, x.segments[0]);
                while col >= end {
                    segment += 1;
                    end += x.segments[segment];
                }
                let at = token * segments + segment;
                let doubled = 2 * x.codes[token * cols + col] as i32 - x.doubled_zeros[at];
                doubled as f32 * 0.5 * x.scales[at]
            };
            entries.map(|(col, weight)| weight.to_f32() * value(*col as usize)).sum()
        }
    }
}
