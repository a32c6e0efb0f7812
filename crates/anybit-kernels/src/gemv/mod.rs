//! `y = x Wᵀ + b` for few tokens: products straight from packed codes.
//!
//! A decode step reads every weight once, so its speed is that of memory as long as taking codes
//! apart costs less than fetching them. [`PackedWeight`] holds codes in the order in which vector
//! registers take them apart ([`plane`]); activations are 16-bit integers ([`operand`]), so one
//! multiply-add of pairs serves every grid: affine codes widened, codebook entries looked up by
//! byte shuffle. All tokens of a step share one unpacking.
//!
//! Rows are independent and sums run in a fixed order: the same input gives the same bits on any
//! number of threads and in any company of other tokens.

mod lines;
mod operand;
mod plane;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use anybit_core::{QuantizedMatrix, RowSource, Segment, Sparse};

use crate::isa::{Isa, isa};
use crate::pool::SpinPool;
use crate::{DisjointMut, QuantizedRows};
use lines::Lines;
use operand::{LANES, Operand, RUN};
use plane::{BLOCK, Grouping, TiledPlane, Values};

/// Rows between two looks at the next token: their codes stay in the first-level cache.
const ROWS: usize = 8;
/// Tokens that share one unpacking.
const TOKENS: usize = 4;

/// A packed weight `[out, in]` in kernel order. It decodes to the same bits as the matrix that it
/// was made of.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    rows: usize,
    cols: usize,
    /// Row groups outermost, as in [`QuantizedMatrix`].
    planes: Vec<TiledPlane>,
    column_groups: usize,
    column_scale: Option<Vec<f32>>,
    /// Logical row of each stored row.
    logical: Option<Vec<u32>>,
    /// Stored row of each logical row.
    stored: Option<Vec<u32>>,
    sparse: Option<Sparse>,
    stored_bytes: usize,
}

impl PackedWeight {
    /// Brings `matrix` into kernel order. `None` for groups of columns that are not multiples of
    /// 32, for very long rows (over 32768 columns in groups) and for what is empty: the general
    /// path serves them.
    ///
    /// # Panics
    /// When planes do not tile the matrix, or the permutation of its rows is none.
    pub fn new(matrix: &QuantizedMatrix) -> Option<Self> {
        let (rows, cols) = matrix.shape();
        if rows * cols == 0 {
            return None;
        }
        assert!(is_whole(matrix), "planes and permutation do not fit their matrix");
        let planes = matrix.planes.iter().map(TiledPlane::new).collect::<Option<_>>()?;
        let logical = matrix.row_perm.as_ref().map(|perm| {
            let mut logical = vec![0; rows];
            for (row, stored) in perm.iter().enumerate() {
                logical[*stored as usize] = row as u32;
            }
            logical
        });
        let factors = |scale: &Vec<half::f16>| scale.iter().map(|s| s.to_f32()).collect();
        Some(Self {
            rows,
            cols,
            planes,
            column_groups: matrix.column_groups,
            column_scale: matrix.column_scale.as_ref().map(factors),
            logical,
            stored: matrix.row_perm.clone(),
            sparse: matrix.sparse.clone(),
            stored_bytes: matrix.stored_bytes(),
        })
    }

    /// Bytes of a product's pass over the weight, padding included.
    pub fn pass_bytes(&self) -> usize {
        let sparse = self.sparse.as_ref().map_or(0, |s| s.values.len() * 6 + s.rows.len() * 4);
        self.planes.iter().map(TiledPlane::bytes).sum::<usize>() + sparse
    }

    /// Bytes held in memory.
    pub fn held_bytes(&self) -> usize {
        let words = |v: &Option<Vec<u32>>| v.as_ref().map_or(0, |v| 4 * v.len());
        let scale = self.column_scale.as_ref().map_or(0, |s| 4 * s.len());
        let exact = self.planes.iter().map(TiledPlane::exact_bytes).sum::<usize>();
        self.pass_bytes() + words(&self.logical) + words(&self.stored) + scale + exact
    }

    /// Whether inputs quantized in these segments can be multiplied as integers:
    /// no column scale, and column groups that are the segments.
    pub fn takes_codes(&self, segments: &[Segment]) -> bool {
        let groups = self.planes[..self.column_groups].iter().map(|p| p.cols);
        self.column_scale.is_none() && groups.eq(segments.iter().map(|s| s.cols))
    }
}

/// Whether planes tile the matrix and rows are permuted. Its constructors see to that, but its
/// fields are open, and kernels write where these say.
fn is_whole(matrix: &QuantizedMatrix) -> bool {
    let (planes, groups) = (&matrix.planes, matrix.column_groups);
    if groups == 0 || planes.is_empty() || !planes.len().is_multiple_of(groups) {
        return false;
    }
    let widths = || planes[..groups].iter().map(|p| p.cols);
    let aligned = planes.chunks_exact(groups).all(|own| {
        own.iter().all(|p| p.rows == own[0].rows) && own.iter().map(|p| p.cols).eq(widths())
    });
    let height = planes.iter().step_by(groups).map(|p| p.rows).sum::<usize>();
    let permuted = matrix.row_perm.as_ref().is_none_or(|perm| {
        let mut seen = vec![false; matrix.rows];
        let mut is_new = |slot: &u32| {
            seen.get_mut(*slot as usize).is_some_and(|seen| !std::mem::replace(seen, true))
        };
        perm.len() == matrix.rows && perm.iter().all(&mut is_new)
    });
    aligned && permuted && (height, widths().sum::<usize>()) == (matrix.rows, matrix.cols)
}

impl RowSource for PackedWeight {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            let mut slot = self.stored.as_ref().map_or(row, |s| s[row] as usize);
            let mut first = 0;
            while slot >= self.planes[first].rows {
                slot -= self.planes[first].rows;
                first += self.column_groups;
            }
            let mut rest = &mut *out;
            for plane in &self.planes[first..first + self.column_groups] {
                let (own, tail) = rest.split_at_mut(plane.cols);
                plane.decode_row(slot, own);
                rest = tail;
            }
            if let Some(scale) = &self.column_scale {
                out.iter_mut().zip(scale).for_each(|(o, s)| *o *= s);
            }
            if let Some(sparse) = &self.sparse {
                sparse.add_row(row, out);
            }
        }
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
    }
}

/// The 64 codes of a block, with the best instructions.
fn unpack_codes(bytes: &[u8], bits: u8, codes: &mut [u8; BLOCK]) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: chosen because the machine has these instructions.
        Isa::Avx2 | Isa::Avx512 => unsafe { x86::unpack_codes(bytes, bits, codes) },
        _ => plane::unpack_block(bytes, bits as usize, codes),
    }
}

/// The input of a product.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// Values, `[tokens, in]`.
    Values(&'a [f32]),
    /// Values on their grids.
    Codes(&'a QuantizedRows),
}

/// One product of a step.
pub struct Product<'a> {
    /// The weight.
    pub weight: &'a PackedWeight,
    /// The bias, `[out]`.
    pub bias: Option<&'a [f32]>,
    /// The result, `[tokens, out]`.
    pub y: &'a mut [f32],
}

/// Buffers of [`gemv`]; grown once.
#[derive(Debug, Clone, Default)]
pub struct Scratch {
    /// Of each product and column group.
    operands: Vec<Operand>,
    /// Of each product's planes: what sums start from.
    initial: Vec<Lines<i32>>,
}

/// Computes `y = x Wᵀ + bias` for all `products`, which share an input, in one parallel region.
///
/// With [`Input::Values`] an input is rounded to 15 bits of the largest of 256 columns; products
/// with [`Input::Codes`] are exact integers until they are scaled.
///
/// # Panics
/// When a buffer's length does not fit, weights take inputs of other lengths than each other, there
/// are more than four products, or codes come in other segments than [`PackedWeight::takes_codes`]
/// accepts.
pub fn gemv(input: Input<'_>, products: &mut [Product<'_>], scratch: &mut Scratch) {
    gemv_on(isa(), SpinPool::global(), input, products, scratch);
}

fn gemv_on(
    isa: Isa,
    pool: &SpinPool,
    input: Input<'_>,
    products: &mut [Product<'_>],
    scratch: &mut Scratch,
) {
    assert!(products.len() <= MOST, "more than {MOST} products of one input");
    if products.is_empty() {
        return;
    }
    let operands: usize = products.iter().map(|p| p.weight.column_groups).sum();
    let planes: usize = products.iter().map(|p| p.weight.planes.len()).sum();
    scratch.operands.resize_with(operands.max(scratch.operands.len()), Operand::default);
    scratch.initial.resize_with(planes.max(scratch.initial.len()), Lines::default);
    prepare(input, products, scratch);
    let tokens = scratch.operands[0].tokens;
    let mut jobs = Jobs { isa, parts: [const { None }; MOST], tokens };
    let (mut operands, mut initial) = (&scratch.operands[..], &scratch.initial[..]);
    for (part, product) in jobs.parts.iter_mut().zip(products.iter_mut()) {
        let weight = product.weight;
        assert_eq!(product.y.len(), tokens * weight.rows, "output has another shape");
        assert!(product.bias.is_none_or(|b| b.len() == weight.rows), "bias has another length");
        let (own, rest) = operands.split_at(weight.column_groups);
        assert!(own.iter().all(|x| x.tokens == tokens), "inputs of other lengths");
        let (initials, others) = initial.split_at(weight.planes.len());
        let (bias, y) = (product.bias, DisjointMut::new(product.y));
        *part = Some(Part { weight, bias, y, operands: own, initial: initials });
        (operands, initial) = (rest, others);
    }
    let threads = pool.threads();
    pool.run(&|worker| jobs.run(worker, threads, input));
}

/// Most products of one input: queries, keys and values.
const MOST: usize = 4;

/// Fills operands and the starts of sums.
fn prepare(input: Input<'_>, products: &[Product<'_>], scratch: &mut Scratch) {
    let (mut operands, mut initials) = (&mut scratch.operands[..], &mut scratch.initial[..]);
    for Product { weight, .. } in products {
        let (own, rest) = std::mem::take(&mut operands).split_at_mut(weight.column_groups);
        let mut first = 0;
        for (group, operand) in own.iter_mut().enumerate() {
            let cols = weight.planes[group].cols;
            match input {
                Input::Values(x) => {
                    let factors = weight.column_scale.as_deref();
                    assert!(x.len().is_multiple_of(weight.cols), "inputs are not whole tokens");
                    operand.fill(x, weight.cols, (first, cols), factors);
                }
                Input::Codes(x) => {
                    let own = weight.column_scale.is_none()
                        && x.segments.len() == weight.column_groups
                        && x.segments[group] == cols;
                    assert!(own, "inputs have other segments");
                    operand.fill_codes(x, group, (first, cols));
                }
            }
            first += cols;
        }
        let (starts, others) = std::mem::take(&mut initials).split_at_mut(weight.planes.len());
        for (at, (plane, start)) in weight.planes.iter().zip(starts).enumerate() {
            initial(plane, &own[at % weight.column_groups], start);
        }
        (operands, initials) = (rest, others);
    }
}

/// What the sums of a plane start from: `−2z·Σ a` where zero points are fixed, `Σ a` where they
/// are stored, nothing for tables; a vector per run, per block where groups are blocks, per half
/// where they are halves.
fn initial(plane: &TiledPlane, x: &Operand, out: &mut Lines<i32>) {
    let factor = match &plane.values {
        Values::Fixed { doubled_zero } => -doubled_zero,
        Values::Stored { .. } => 1,
        Values::Table(_) => return,
    };
    let halves = match plane.grouping {
        Grouping::Row => 2 * RUN,
        Grouping::Blocks(_) => 2,
        Grouping::Halves(_) => 1,
    };
    let parts = (2 * x.blocks).div_ceil(halves);
    out.resize(x.tokens * parts * LANES);
    let tokens = x.sums.chunks_exact(2 * LANES * x.blocks);
    for (token, out) in tokens.zip(out.chunks_exact_mut(parts * LANES)) {
        let parts = token.chunks(halves * LANES).zip(out.as_chunks_mut::<LANES>().0);
        for (part, sums) in parts {
            *sums = [0; LANES];
            for half in part.as_chunks::<LANES>().0 {
                sums.iter_mut().zip(half).for_each(|(sum, s)| *sum += factor * s);
            }
        }
    }
}

/// One product as its workers see it.
struct Part<'a> {
    weight: &'a PackedWeight,
    bias: Option<&'a [f32]>,
    y: DisjointMut,
    operands: &'a [Operand],
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    initial: &'a [Lines<i32>],
}

struct Jobs<'a> {
    isa: Isa,
    parts: [Option<Part<'a>>; MOST],
    tokens: usize,
}

impl Jobs<'_> {
    /// Computes the share of one of `threads` workers: as many rows of each plane as the others,
    /// so that all have the same bytes and the same work.
    fn run(&self, index: usize, threads: usize, input: Input<'_>) {
        let mut worker = Worker { isa: self.isa, tokens: self.tokens, input, room: Room::new() };
        for part in self.parts.iter().flatten() {
            let weight = part.weight;
            let mut stored = 0;
            for (group, planes) in weight.planes.chunks_exact(weight.column_groups).enumerate() {
                let rows = planes[0].rows;
                let end = rows * (index + 1) / threads;
                for first in (rows * index / threads..end).step_by(ROWS) {
                    worker.rows(part, group, first..end.min(first + ROWS), stored);
                }
                stored += rows;
            }
        }
    }
}

/// Products of a few rows with `T` tokens.
type Sums<const T: usize> = [[f32; T]; ROWS];

/// What kernels write on while they work.
#[cfg(target_arch = "x86_64")]
type Room = x86::Spread;
/// What kernels write on while they work: scalar ones need nothing.
#[cfg(not(target_arch = "x86_64"))]
struct Room;

#[cfg(not(target_arch = "x86_64"))]
impl Room {
    fn new() -> Self {
        Self
    }
}

/// One thread's part of a product.
struct Worker<'a> {
    isa: Isa,
    tokens: usize,
    input: Input<'a>,
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    room: Room,
}

impl Worker<'_> {
    /// Rows `rows` of a row group whose first stored row is `stored`, for all tokens. A kernel
    /// takes one token or four: the last are repeated.
    fn rows(&mut self, part: &Part<'_>, group: usize, rows: Range<usize>, stored: usize) {
        let mut token = 0;
        while token < self.tokens {
            let left = self.tokens - token;
            if left == 1 {
                let sums = self.products(part, group, rows.clone(), [token]);
                self.write(part, &sums, stored + rows.start..stored + rows.end, token, 1);
            } else {
                let last = left.min(TOKENS) - 1;
                let tokens = std::array::from_fn(|t| token + t.min(last));
                let sums = self.products::<TOKENS>(part, group, rows.clone(), tokens);
                self.write(part, &sums, stored + rows.start..stored + rows.end, token, last + 1);
            }
            token += TOKENS;
        }
    }

    /// Products of rows of a row group with tokens, over all column groups.
    fn products<const T: usize>(
        &mut self,
        part: &Part<'_>,
        group: usize,
        rows: Range<usize>,
        tokens: [usize; T],
    ) -> Sums<T> {
        let groups = part.weight.column_groups;
        let mut sums = [[0f32; T]; ROWS];
        for (at, x) in part.operands.iter().enumerate() {
            let index = group * groups + at;
            let plane = &part.weight.planes[index];
            match self.isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx512 => {
                    let (rows, initial) = (rows.clone(), &part.initial[index]);
                    let call = x86::Call { plane, rows, x, initial, tokens };
                    // SAFETY: chosen because the machine has these instructions.
                    unsafe {
                        match self.isa {
                            Isa::Avx512 => x86::avx512::rows(&call, &mut self.room, &mut sums),
                            _ => x86::avx2::rows(&call, &mut self.room, &mut sums),
                        }
                    }
                }
                _ => {
                    for (sums, row) in sums.iter_mut().zip(rows.clone()) {
                        for (sum, token) in sums.iter_mut().zip(tokens) {
                            *sum += scalar::row(plane, row, x, token);
                        }
                    }
                }
            }
        }
        sums
    }

    /// Writes the results of stored rows `rows` and `count` tokens from `token` on.
    fn write<const T: usize>(
        &self,
        part: &Part<'_>,
        sums: &Sums<T>,
        rows: Range<usize>,
        token: usize,
        count: usize,
    ) {
        let weight = part.weight;
        for (sums, slot) in sums.iter().zip(rows) {
            let row = weight.logical.as_ref().map_or(slot, |l| l[slot] as usize);
            let bias = part.bias.map_or(0.0, |b| b[row]);
            for (t, sum) in sums[..count].iter().enumerate() {
                let mut sum = *sum + bias;
                if let Some(sparse) = &weight.sparse {
                    sum += sparse_product(sparse, row, token + t, self.input, weight.cols);
                }
                // SAFETY: an element of a row that this worker alone has.
                unsafe { *part.y.at((token + t) * weight.rows + row) = sum };
            }
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
