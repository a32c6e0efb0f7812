//! `y = x Wᵀ + b` for few tokens: products straight from packed codes.
//!
//! A decode step reads every weight once, so its speed is that of memory as long as taking codes
//! apart costs less than fetching them. [`PackedWeight`] holds codes in the order in which vector
//! registers take them apart: affine codes in tiles of sixteen rows ([`affine`]), codes of tables row by
//! row ([`table`]). Activations are 16-bit integers ([`operand`]), so one multiply-add of pairs
//! serves every grid. Up to four tokens share one unpacking.
//!
//! Rows are independent and sums run in a fixed order: the same input gives the same bits on any
//! number of threads and in any company of other tokens.

mod affine;
mod lines;
mod operand;
mod slices;
mod table;
#[cfg(test)]
mod tests;
mod worker;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::ops::Range;

use anybit_core::bitstream::words_per_row;
use anybit_core::{Plane, QuantizedMatrix, RowSource, Segment, Sparse};

use crate::isa::{Isa, isa};
use crate::pool::SpinPool;
use crate::{DisjointMut, QuantizedRows};
use affine::{AffinePlane, TILE};
use lines::Lines;
use operand::Operand;
use table::TablePlane;
use worker::{Jobs, Part};

/// Tokens that share one unpacking; with 512 bits, where registers hold more sums, the latter.
const TOKENS: usize = 4;
const WIDE_TOKENS: usize = 8;

/// A plane in kernel order.
#[derive(Debug, Clone)]
enum KernelPlane {
    Affine(AffinePlane),
    Table(TablePlane),
}

impl KernelPlane {
    /// `None` where kernels do not know the grouping.
    fn new(plane: &Plane) -> Option<Self> {
        // A plane's fields are open: with other bits kernels would read behind its codes.
        if plane.cols == 0 || plane.grid.validate(plane.cols).is_err() {
            return None;
        }
        // Before lengths are computed: the product of a made-up shape may wrap.
        let words = words_per_row(plane.cols, plane.grid.bits());
        assert_eq!(plane.codes.len() / words, plane.rows, "codes of other rows");
        let lengths = Plane::lengths(plane.grid, plane.rows, plane.cols);
        assert_eq!(plane.own_lengths(), lengths, "a cut plane");
        match affine::is_affine(&plane.grid) {
            true => AffinePlane::new(plane).map(Self::Affine),
            false => TablePlane::new(plane).map(Self::Table),
        }
    }

    fn rows(&self) -> usize {
        match self {
            Self::Affine(plane) => plane.rows,
            Self::Table(plane) => plane.rows,
        }
    }

    fn cols(&self) -> usize {
        match self {
            Self::Affine(plane) => plane.cols,
            Self::Table(plane) => plane.cols,
        }
    }

    /// Bytes that a product reads.
    fn bytes(&self) -> usize {
        match self {
            Self::Affine(plane) => plane.bytes(),
            Self::Table(plane) => plane.bytes(),
        }
    }

    /// Decodes rows of a tile to `out`, row by row at a distance of `stride`.
    fn decode_rows(&self, rows: Range<usize>, out: &mut [f32], stride: usize) {
        match self {
            Self::Affine(plane) => plane.decode_rows(rows, out, stride),
            Self::Table(plane) => {
                for (row, out) in rows.zip(out.chunks_mut(stride)) {
                    plane.decode_row(row, &mut out[..plane.cols]);
                }
            }
        }
    }
}

/// A packed weight `[out, in]` in kernel order. It decodes to the same bits as the matrix that it
/// was made of.
#[derive(Debug, Clone)]
pub struct PackedWeight {
    rows: usize,
    cols: usize,
    /// Row groups outermost, as in [`QuantizedMatrix`].
    planes: Vec<KernelPlane>,
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
    /// 32, for very long rows of tables (over 32768 columns in groups) and for what is empty: the
    /// general path serves them.
    ///
    /// # Panics
    /// When planes do not tile the matrix or are cut, or the permutation of its rows is none.
    pub fn new(matrix: &QuantizedMatrix) -> Option<Self> {
        let (rows, cols) = matrix.shape();
        if rows * cols == 0 {
            return None;
        }
        assert!(is_whole(matrix), "planes and permutation do not fit their matrix");
        let planes = matrix.planes.iter().map(KernelPlane::new).collect::<Option<_>>()?;
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
        self.planes.iter().map(KernelPlane::bytes).sum::<usize>() + sparse
    }

    /// Bytes held in memory.
    pub fn held_bytes(&self) -> usize {
        let words = |v: &Option<Vec<u32>>| v.as_ref().map_or(0, |v| 4 * v.len());
        let scale = self.column_scale.as_ref().map_or(0, |s| 4 * s.len());
        let exact = self.planes.iter().map(|plane| match plane {
            KernelPlane::Affine(_) => 0,
            KernelPlane::Table(plane) => 2 * plane.table.exact.len(),
        });
        let exact = exact.sum::<usize>();
        self.pass_bytes() + words(&self.logical) + words(&self.stored) + scale + exact
    }

    /// Planes of the first of `rows`, and its row there with those of the next that lie behind it
    /// in the same tile.
    fn run_of(&self, rows: Range<usize>) -> (&[KernelPlane], Range<usize>) {
        let stored = |row: usize| self.stored.as_ref().map_or(row, |s| s[row] as usize);
        let (mut slot, mut first) = (stored(rows.start), 0);
        while slot >= self.planes[first].rows() {
            slot -= self.planes[first].rows();
            first += self.column_groups;
        }
        let planes = &self.planes[first..first + self.column_groups];
        let most = (TILE - slot % TILE).min(planes[0].rows() - slot).min(rows.len());
        let follows = |i: &usize| stored(rows.start + i) == stored(rows.start) + i;
        (planes, slot..slot + 1 + (1..most).take_while(follows).count())
    }

    /// Columns of each column group.
    fn widths(&self) -> impl Iterator<Item = usize> {
        self.planes[..self.column_groups].iter().map(KernelPlane::cols)
    }

    /// Whether all grids are affine: products with quantized inputs are exact integers.
    pub fn is_affine(&self) -> bool {
        self.planes.iter().all(|plane| matches!(plane, KernelPlane::Affine(_)))
    }

    /// Whether inputs quantized in these segments can be multiplied as integers:
    /// no column scale, and column groups that are the segments.
    pub fn takes_codes(&self, segments: &[Segment]) -> bool {
        self.column_scale.is_none() && self.widths().eq(segments.iter().map(|s| s.cols))
    }
}

/// Whether planes tile the matrix and rows are permuted. Its constructors see to that, but its
/// fields are open, and kernels write where these say.
fn is_whole(matrix: &QuantizedMatrix) -> bool {
    let (planes, groups) = (&matrix.planes, matrix.column_groups);
    if matrix.column_scale.as_ref().is_some_and(|s| s.len() != matrix.cols) {
        return false;
    }
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
        let mut row = rows.start;
        while row < rows.end {
            let (planes, slots) = self.run_of(row..rows.end);
            let own = &mut out[(row - rows.start) * self.cols..][..slots.len() * self.cols];
            let mut col = 0;
            for plane in planes {
                plane.decode_rows(slots.clone(), &mut own[col..], self.cols);
                col += plane.cols();
            }
            for (row, out) in (row..).zip(own.chunks_exact_mut(self.cols)) {
                if let Some(scale) = &self.column_scale {
                    out.iter_mut().zip(scale).for_each(|(o, s)| *o *= s);
                }
                if let Some(sparse) = &self.sparse {
                    sparse.add_row(row, out);
                }
            }
            row += slots.len();
        }
    }

    fn stored_bytes(&self) -> usize {
        self.stored_bytes
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
    starts: Vec<Lines<i32>>,
}

/// Up to so many tokens, [`gemv`] is faster than GEMM on decoded rows with this machine's
/// instructions.
pub fn most_tokens() -> usize {
    match isa() {
        Isa::Avx512 => usize::MAX,
        _ => 32,
    }
}

/// Computes `y = x Wᵀ + bias` for all `products`, which share an input, in one parallel region.
///
/// With [`Input::Values`] an input is rounded to 15 bits of the largest of 256 columns; products
/// of affine codes with [`Input::Codes`] are exact integers until they are scaled. A token gets the
/// same bits in any company.
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
    scratch.starts.resize_with(planes.max(scratch.starts.len()), Lines::default);
    let firsts = prepare(isa, input, products, scratch);
    let tokens = scratch.operands[0].tokens;
    let mut jobs = Jobs { isa, parts: [const { None }; MOST], tokens };
    let mut starts = &scratch.starts[..];
    for (at, product) in products.iter_mut().enumerate() {
        let weight = product.weight;
        assert_eq!(product.y.len(), tokens * weight.rows, "output has another shape");
        assert!(product.bias.is_none_or(|b| b.len() == weight.rows), "bias has another length");
        let operands = &scratch.operands[firsts[at]..][..weight.column_groups];
        assert!(operands.iter().all(|x| x.tokens == tokens), "inputs of other lengths");
        let (own, others) = starts.split_at(weight.planes.len());
        let (bias, y) = (product.bias, DisjointMut::new(product.y));
        jobs.parts[at] = Some(Part { weight, bias, y, operands, starts: own });
        starts = others;
    }
    let threads = pool.threads();
    pool.run(&|worker| jobs.run(worker, threads, input));
}

/// Most products of one input: queries, keys and values.
const MOST: usize = 4;

/// Fills operands and the starts of sums. Returns where each product's operands begin: weights
/// that cut their input alike share them.
fn prepare(
    isa: Isa,
    input: Input<'_>,
    products: &[Product<'_>],
    scratch: &mut Scratch,
) -> [usize; MOST] {
    let (mut firsts, mut end) = ([0; MOST], 0);
    let mut starts = &mut scratch.starts[..];
    for (at, Product { weight, .. }) in products.iter().enumerate() {
        let alike = |other: &Product<'_>| {
            let plain = weight.column_scale.is_none() && other.weight.column_scale.is_none();
            plain && weight.widths().eq(other.weight.widths())
        };
        match products[..at].iter().position(alike) {
            Some(other) => firsts[at] = firsts[other],
            None => {
                firsts[at] = end;
                end += weight.column_groups;
                fill(input, weight, &mut scratch.operands[firsts[at]..end]);
            }
        }
        let operands = &mut scratch.operands[firsts[at]..][..weight.column_groups];
        if isa == Isa::Avx512 && weight.planes.iter().any(|p| matches!(p, KernelPlane::Affine(_))) {
            // Another product of the same input may have laid its tokens side by side.
            operands.iter_mut().for_each(|x| match width(isa, x.tokens) {
                width if width == x.width => {}
                WIDE_TOKENS if x.is_coded() => x.widen_bytes(WIDE_TOKENS),
                width => x.widen(width),
            });
        }
        let (own, others) = starts.split_at_mut(weight.planes.len());
        for (index, (plane, starts)) in weight.planes.iter().zip(own).enumerate() {
            if let KernelPlane::Affine(plane) = plane {
                plane.starts(&operands[index % weight.column_groups], starts);
            }
        }
        starts = others;
    }
    firsts
}

/// So many of these tokens share an unpacking.
fn width(isa: Isa, tokens: usize) -> usize {
    match tokens {
        0..=1 => 1,
        _ if tokens > TOKENS && isa == Isa::Avx512 => WIDE_TOKENS,
        _ => TOKENS,
    }
}

/// Fills the operands of a weight's column groups.
fn fill(input: Input<'_>, weight: &PackedWeight, operands: &mut [Operand]) {
    let mut first = 0;
    for (group, operand) in operands.iter_mut().enumerate() {
        let cols = weight.planes[group].cols();
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
}
