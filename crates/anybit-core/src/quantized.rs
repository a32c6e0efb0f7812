//! [`QuantizedMatrix`]: packed codes and grid parameters of one weight matrix.
//!
//! A logical `[out, in]` matrix is a grid of (row group × column group) *planes*. Each plane has
//! its own [`GridSpec`] and codes, so one type carries RTN and GPTQ (one plane), SKIM (row groups
//! of different width) and ResQ (column groups). An optional row permutation says which stored
//! row holds a logical row; an optional column scale multiplies every decoded row.

use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use crate::bitstream::{pack_row, padding_is_zero, unpack_row, words_per_row};
use crate::{CoreError, GridSpec, Matrix, Result, RowSource, Sparse};

/// Packed codes and parameters of one plane.
#[derive(Debug, Clone, PartialEq)]
pub struct Plane {
    /// Rows of the plane.
    pub rows: usize,
    /// Columns of the plane.
    pub cols: usize,
    /// Its grid.
    pub grid: GridSpec,
    /// Bit streams, `[rows, words_per_row]`.
    pub codes: Vec<u32>,
    /// Codebooks: f16 centroids, `[rows, 2^bits]`. All other grids: f16 scales, `[rows, groups]`;
    /// empty where they are exact.
    pub scales: Vec<f16>,
    /// Exact scales, `[rows, groups]`; empty for other grids.
    pub exact_scales: Vec<f32>,
    /// Zero points as bit streams, `[rows, words_per_row(groups)]`; empty when implied.
    pub zeros: Vec<u32>,
    /// The f16 centroids of a shared codebook, `[2^bits]`; empty for other grids.
    pub table: Vec<f16>,
}

/// Lengths of a plane's parts: the layout of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneLengths {
    /// Words of codes.
    pub codes: usize,
    /// Scales or centroids of f16.
    pub scales: usize,
    /// Scales of f32.
    pub exact_scales: usize,
    /// Words of zero points.
    pub zeros: usize,
    /// Centroids of a shared codebook.
    pub table: usize,
}

impl Plane {
    /// Lengths of the parts of a plane of this shape.
    pub fn lengths(grid: GridSpec, rows: usize, cols: usize) -> PlaneLengths {
        let groups = grid.groups(cols);
        let entries = 1usize << grid.bits();
        let per_row = if matches!(grid, GridSpec::Codebook { .. }) { entries } else { groups };
        let zeros = if grid.has_zeros() { words_per_row(groups, grid.bits()) } else { 0 };
        let exact = grid.has_exact_scales();
        PlaneLengths {
            codes: rows * words_per_row(cols, grid.bits()),
            scales: if exact { 0 } else { rows * per_row },
            exact_scales: if exact { rows * groups } else { 0 },
            zeros: rows * zeros,
            table: if matches!(grid, GridSpec::SharedCodebook { .. }) { entries } else { 0 },
        }
    }

    /// Lengths of its parts, right or wrong.
    pub fn own_lengths(&self) -> PlaneLengths {
        PlaneLengths {
            codes: self.codes.len(),
            scales: self.scales.len(),
            exact_scales: self.exact_scales.len(),
            zeros: self.zeros.len(),
            table: self.table.len(),
        }
    }

    /// An all-zero plane to be filled row by row.
    ///
    /// # Errors
    /// What [`GridSpec::validate`] finds.
    pub fn empty(grid: GridSpec, rows: usize, cols: usize) -> Result<Self> {
        grid.validate(cols)?;
        let lengths = Self::lengths(grid, rows, cols);
        Ok(Self {
            rows,
            cols,
            grid,
            codes: vec![0; lengths.codes],
            scales: vec![f16::ZERO; lengths.scales],
            exact_scales: vec![0.0; lengths.exact_scales],
            zeros: vec![0; lengths.zeros],
            table: vec![f16::ZERO; lengths.table],
        })
    }

    /// Rebuilds a plane from stored parts.
    ///
    /// # Errors
    /// Wrong lengths, scales that are not finite, or non-zero padding bits.
    pub fn from_parts(
        grid: GridSpec,
        (rows, cols): (usize, usize),
        codes: Vec<u32>,
        scales: Vec<f16>,
        exact_scales: Vec<f32>,
        zeros: Vec<u32>,
        table: Vec<f16>,
    ) -> Result<Self> {
        grid.validate(cols)?;
        let plane = Self { rows, cols, grid, codes, scales, exact_scales, zeros, table };
        let (want, found) = (Self::lengths(grid, rows, cols), plane.own_lengths());
        if want != found {
            return Err(CoreError::Shape {
                what: "parts of a plane",
                expected: format!("{want:?}"),
                found: format!("{found:?}"),
            });
        }
        plane.check()?;
        Ok(plane)
    }

    fn check(&self) -> Result<()> {
        let stored = self.scales.len() + self.exact_scales.len();
        let per_row = (stored / self.rows.max(1)).max(1);
        let fail = |at: usize, value: String| {
            let (row, col) = (at / per_row, at % per_row);
            Err(CoreError::NotFinite { what: "scales", row, col, value })
        };
        if let Some(at) = self.scales.iter().position(|s| !s.is_finite()) {
            return fail(at, self.scales[at].to_string());
        }
        if let Some(at) = self.exact_scales.iter().position(|s| !s.is_finite()) {
            return fail(at, self.exact_scales[at].to_string());
        }
        if let Some(col) = self.table.iter().position(|c| !c.is_finite()) {
            let value = self.table[col].to_string();
            return Err(CoreError::NotFinite { what: "shared codebook", row: 0, col, value });
        }
        let words = words_per_row(self.cols, self.grid.bits());
        for (row, stream) in self.codes.chunks_exact(words.max(1)).enumerate() {
            if !padding_is_zero(stream, self.cols, self.grid.bits()) {
                return Err(CoreError::CodeRange { row });
            }
        }
        let groups = self.grid.groups(self.cols);
        let words = words_per_row(groups, self.grid.bits());
        for (row, stream) in self.zeros.chunks_exact(words.max(1)).enumerate() {
            if !padding_is_zero(stream, groups, self.grid.bits()) {
                return Err(CoreError::CodeRange { row });
            }
        }
        Ok(())
    }

    /// Views of one row's mutable parts, for rounding rows in parallel.
    pub fn rows_mut(&mut self) -> impl IndexedParallelIterator<Item = PlaneRowMut<'_>> {
        let lengths = Self::lengths(self.grid, 1, self.cols);
        let (grid, rows, cols) = (self.grid, self.rows, self.cols);
        let scales = by_row(&mut self.scales, lengths.scales, rows);
        let exact_scales = by_row(&mut self.exact_scales, lengths.exact_scales, rows);
        let zeros = by_row(&mut self.zeros, lengths.zeros, rows);
        let parts = self.codes.par_chunks_exact_mut(lengths.codes).zip(scales);
        parts.zip(exact_scales).zip(zeros).map(move |(((codes, scales), exact_scales), zeros)| {
            PlaneRowMut { grid, cols, codes, scales, exact_scales, zeros }
        })
    }

    /// Decodes columns `[0, cols)` of row `row` into `out`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let out = &mut out[..self.cols];
        if let GridSpec::Codebook { bits } = self.grid {
            let k = 1usize << bits;
            let table = to_f32(&self.scales[row * k..(row + 1) * k]);
            return self.decode_codes(row, 0, out, |u| table[u as usize]);
        }
        let table = to_f32(&self.table);
        let group_len = self.grid.group_len(self.cols);
        for (g, out) in out.chunks_mut(group_len).enumerate() {
            let (scale, zero) = (self.scale(row, g), self.zero(row, g));
            match self.grid {
                GridSpec::SharedCodebook { .. } => {
                    self.decode_codes(row, g * group_len, out, |u| table[u as usize] * scale);
                }
                _ => self.decode_codes(row, g * group_len, out, |u| (u as f32 - zero) * scale),
            }
        }
    }

    /// Scale of a group; no codebook of rows has one.
    pub fn scale(&self, row: usize, group: usize) -> f32 {
        let at = row * self.grid.groups(self.cols) + group;
        match self.grid.has_exact_scales() {
            true => self.exact_scales[at],
            false => self.scales[at].to_f32(),
        }
    }

    /// Zero point of a group, stored or implied; 0 for codebooks.
    pub fn zero(&self, row: usize, group: usize) -> f32 {
        if !self.grid.has_zeros() {
            return self.grid.implied_zero();
        }
        let (bits, groups) = (self.grid.bits(), self.grid.groups(self.cols));
        let words = words_per_row(groups, bits);
        let mut zero = [0u8];
        unpack_row(&self.zeros[row * words..(row + 1) * words], bits, group, &mut zero);
        zero[0] as f32
    }

    /// Decodes the codes from column `start` on.
    fn decode_codes(&self, row: usize, start: usize, out: &mut [f32], value: impl Fn(u8) -> f32) {
        let bits = self.grid.bits();
        let words = words_per_row(self.cols, bits);
        let stream = &self.codes[row * words..(row + 1) * words];
        let mut codes = [0u8; 256];
        for (chunk, out) in out.chunks_mut(256).enumerate() {
            let codes = &mut codes[..out.len()];
            unpack_row(stream, bits, start + chunk * 256, codes);
            out.iter_mut().zip(codes.iter()).for_each(|(o, u)| *o = value(*u));
        }
    }

    /// Appends the rows of `other`.
    ///
    /// # Errors
    /// [`CoreError::Shape`] when grid or columns differ.
    pub fn append_rows(&mut self, other: Self) -> Result<()> {
        if (self.grid, self.cols, &self.table) != (other.grid, other.cols, &other.table) {
            return Err(CoreError::Shape {
                what: "rows to append",
                expected: format!("{:?} of {} columns", self.grid, self.cols),
                found: format!("{:?} of {} columns", other.grid, other.cols),
            });
        }
        self.rows += other.rows;
        self.codes.extend(other.codes);
        self.scales.extend(other.scales);
        self.exact_scales.extend(other.exact_scales);
        self.zeros.extend(other.zeros);
        Ok(())
    }

    /// Bytes of codes, and of everything.
    pub fn bytes(&self) -> (usize, usize) {
        let codes = self.codes.len() * 4;
        let halves = self.scales.len() + self.table.len();
        (codes, codes + halves * 2 + (self.exact_scales.len() + self.zeros.len()) * 4)
    }
}

/// The part of each row; empty slices stand in for what a grid does not have.
fn by_row<T>(values: &mut [T], per_row: usize, rows: usize) -> Vec<&mut [T]> {
    match per_row {
        0 => (0..rows).map(|_| <&mut [T]>::default()).collect(),
        _ => values.chunks_exact_mut(per_row).collect(),
    }
}

fn to_f32(values: &[f16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// One row of a plane, to be written.
pub struct PlaneRowMut<'a> {
    grid: GridSpec,
    cols: usize,
    codes: &'a mut [u32],
    scales: &'a mut [f16],
    exact_scales: &'a mut [f32],
    zeros: &'a mut [u32],
}

impl PlaneRowMut<'_> {
    /// Stores an affine row: its codes and the grid of each group.
    pub fn set_affine(&mut self, codes: &[u8], groups: &[crate::GroupGrid]) {
        let (cols, count) = (self.cols, self.grid.groups(self.cols));
        debug_assert_eq!((codes.len(), groups.len()), (cols, count));
        pack_row(codes, self.grid.bits(), self.codes);
        for (s, g) in self.scales.iter_mut().zip(groups) {
            *s = f16::from_f32(g.scale);
        }
        for (s, g) in self.exact_scales.iter_mut().zip(groups) {
            *s = g.scale;
        }
        if self.grid.has_zeros() {
            let zeros: Vec<u8> = groups.iter().map(|g| g.zero as u8).collect();
            pack_row(&zeros, self.grid.bits(), self.zeros);
        }
    }

    /// Stores a codebook row: its codes and its `2^bits` centroids.
    pub fn set_codebook(&mut self, codes: &[u8], centroids: &[f16]) {
        debug_assert_eq!((codes.len(), centroids.len()), (self.cols, self.scales.len()));
        pack_row(codes, self.grid.bits(), self.codes);
        self.scales.copy_from_slice(centroids);
    }

    /// Stores a row of a shared codebook: its codes and the scale of each group.
    pub fn set_scaled(&mut self, codes: &[u8], scales: &[f16]) {
        debug_assert_eq!((codes.len(), scales.len()), (self.cols, self.scales.len()));
        pack_row(codes, self.grid.bits(), self.codes);
        self.scales.copy_from_slice(scales);
    }
}

/// A quantized weight matrix `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    /// Logical rows (`out`).
    pub rows: usize,
    /// Logical columns (`in`).
    pub cols: usize,
    /// Planes, row groups outermost: plane `(r, c)` is `planes[r · column_groups + c]`.
    pub planes: Vec<Plane>,
    /// Number of column groups.
    pub column_groups: usize,
    /// Factor of each column, applied after decoding.
    pub column_scale: Option<Vec<f16>>,
    /// Stored row of each logical row.
    pub row_perm: Option<Vec<u32>>,
    /// What is added last.
    pub sparse: Option<Sparse>,
}

impl QuantizedMatrix {
    /// A matrix of one plane.
    pub fn single(plane: Plane) -> Self {
        Self {
            rows: plane.rows,
            cols: plane.cols,
            planes: vec![plane],
            column_groups: 1,
            column_scale: None,
            row_perm: None,
            sparse: None,
        }
    }

    /// A matrix of row groups: `groups[r]` is the plane that holds logical row `r`, each plane
    /// holding its rows in their order.
    ///
    /// # Errors
    /// As [`Self::from_planes`], or a group that does not exist or has another number of rows.
    pub fn from_row_groups(
        shape: (usize, usize),
        planes: Vec<Plane>,
        groups: &[u8],
        column_scale: Option<Vec<f16>>,
    ) -> Result<Self> {
        if planes.len() == 1 && groups.iter().all(|g| *g == 0) {
            return Self::from_planes(shape, planes, 1, column_scale, None);
        }
        let perm = permutation_of(groups, planes.iter())?;
        Self::from_planes(shape, planes, 1, column_scale, Some(perm))
    }

    /// The row group of each logical row, when each group holds its rows in their order: a
    /// shorter way to store the permutation.
    pub fn row_groups(&self) -> Option<Vec<u8>> {
        let perm = self.row_perm.as_ref()?;
        let starts = row_starts(self.planes.iter().step_by(self.column_groups));
        if starts.len() > 256 {
            return None;
        }
        let group = |slot: &u32| (starts.partition_point(|s| s <= slot) - 1) as u8;
        let groups: Vec<u8> = perm.iter().map(group).collect();
        let mut next = starts;
        let in_order = perm.iter().zip(&groups).all(|(slot, group)| {
            let next = &mut next[*group as usize];
            *next += 1;
            *slot + 1 == *next
        });
        in_order.then_some(groups)
    }

    /// Assembles planes, checking that they tile the matrix.
    ///
    /// # Errors
    /// [`CoreError::Shape`] when planes do not tile it, or scale and permutation do not fit.
    pub fn from_planes(
        (rows, cols): (usize, usize),
        planes: Vec<Plane>,
        column_groups: usize,
        column_scale: Option<Vec<f16>>,
        row_perm: Option<Vec<u32>>,
    ) -> Result<Self> {
        let fail =
            |what, expected: String, found: String| Err(CoreError::Shape { what, expected, found });
        if column_groups == 0 || planes.is_empty() || !planes.len().is_multiple_of(column_groups) {
            let found = planes.len().to_string();
            return fail("number of planes", format!("a multiple of {column_groups}"), found);
        }
        for (i, p) in planes.iter().enumerate() {
            let (same_row, same_col) = (&planes[i - i % column_groups], &planes[i % column_groups]);
            if (p.rows, p.cols) != (same_row.rows, same_col.cols) {
                let want = format!("{}×{}", same_row.rows, same_col.cols);
                return fail("plane shape", want, format!("{}×{}", p.rows, p.cols));
            }
        }
        let sum_rows: usize = planes.iter().step_by(column_groups).map(|p| p.rows).sum();
        let sum_cols: usize = planes[..column_groups].iter().map(|p| p.cols).sum();
        if (sum_rows, sum_cols) != (rows, cols) {
            return fail(
                "sum of planes",
                format!("{rows}×{cols}"),
                format!("{sum_rows}×{sum_cols}"),
            );
        }
        if let Some(scale) = &column_scale
            && (scale.len() != cols || scale.iter().any(|s| !s.is_finite()))
        {
            return fail("column scale", format!("{cols} finite values"), "otherwise".into());
        }
        if let Some(perm) = &row_perm {
            let mut seen = vec![false; rows];
            let valid = perm.len() == rows
                && perm.iter().all(|&p| {
                    seen.get_mut(p as usize).is_some_and(|s| !std::mem::replace(s, true))
                });
            if !valid {
                return fail("row permutation", format!("a permutation of {rows}"), "none".into());
            }
        }
        Ok(Self { rows, cols, planes, column_groups, column_scale, row_perm, sparse: None })
    }

    /// Adds a sparse part.
    ///
    /// # Errors
    /// Rows, columns or values that do not fit.
    pub fn with_sparse(mut self, sparse: Sparse) -> Result<Self> {
        sparse.check(self.rows, self.cols)?;
        self.sparse = Some(sparse);
        Ok(self)
    }

    /// Total bytes of codes, and of everything that is stored.
    pub fn bytes(&self) -> (usize, usize) {
        let (codes, all) =
            self.planes.iter().map(Plane::bytes).fold((0, 0), |(c, a), (pc, pa)| (c + pc, a + pa));
        let scale = self.column_scale.as_ref().map_or(0, |s| s.len() * 2);
        let perm = match self.row_groups() {
            Some(groups) => words_per_row(groups.len(), group_bits(self.row_group_count())) * 4,
            None => self.row_perm.as_ref().map_or(0, |p| p.len() * 4),
        };
        let sparse = self.sparse.as_ref().map_or(0, |s| s.bytes(self.cols));
        (codes, all + scale + perm + sparse)
    }

    /// Planes on top of each other.
    pub fn row_group_count(&self) -> usize {
        self.planes.len() / self.column_groups
    }

    /// Sum of code bits over all weights (no padding).
    pub fn code_bits(&self) -> u64 {
        self.planes.iter().map(|p| (p.rows * p.cols) as u64 * p.grid.bits() as u64).sum()
    }

    /// Decodes everything.
    pub fn dequantize(&self) -> Matrix {
        let mut m = Matrix::zeros(self.rows, self.cols);
        m.data
            .par_chunks_mut(self.cols.max(1))
            .enumerate()
            .for_each(|(r, out)| self.read_rows(r..r + 1, out));
        m
    }

    fn decode_logical_row(&self, row: usize, out: &mut [f32]) {
        let mut slot = self.row_perm.as_ref().map_or(row, |p| p[row] as usize);
        let mut first = 0;
        while slot >= self.planes[first].rows {
            slot -= self.planes[first].rows;
            first += self.column_groups;
        }
        let mut start = 0;
        for plane in &self.planes[first..first + self.column_groups] {
            plane.decode_row(slot, &mut out[start..start + plane.cols]);
            start += plane.cols;
        }
        if let Some(scale) = &self.column_scale {
            for (o, s) in out.iter_mut().zip(scale) {
                *o *= s.to_f32();
            }
        }
        if let Some(sparse) = &self.sparse {
            sparse.add_row(row, out);
        }
    }
}

/// Bits of a row group's number in the stream of row groups.
pub fn group_bits(groups: usize) -> u8 {
    (groups.max(2) - 1).ilog2() as u8 + 1
}

/// First stored row of each plane.
fn row_starts<'a>(planes: impl Iterator<Item = &'a Plane>) -> Vec<u32> {
    let mut start = 0;
    let next = |plane: &Plane| {
        let first = start;
        start = u32::saturating_add(start, plane.rows as u32);
        first
    };
    planes.map(next).collect()
}

/// The permutation that puts each logical row into its group, in order; `planes` holds one plane
/// of each group.
///
/// # Errors
/// A group that does not exist, or that has another number of rows than its plane.
pub fn permutation_of<'a>(
    groups: &[u8],
    planes: impl Iterator<Item = &'a Plane> + Clone,
) -> Result<Vec<u32>> {
    let fail = |expected: String, found: String| {
        Err(CoreError::Shape { what: "row groups", expected, found })
    };
    let starts = row_starts(planes.clone());
    let mut next = starts.clone();
    let mut perm = Vec::with_capacity(groups.len());
    for group in groups {
        let Some(next) = next.get_mut(*group as usize) else {
            return fail(format!("below {}", starts.len()), group.to_string());
        };
        perm.push(*next);
        *next += 1;
    }
    for ((start, end), plane) in starts.iter().zip(&next).zip(planes) {
        if (end - start) as usize != plane.rows {
            return fail(format!("{} rows in a group", plane.rows), (end - start).to_string());
        }
    }
    Ok(perm)
}

impl RowSource for QuantizedMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(self.cols)) {
            self.decode_logical_row(row, out);
        }
    }

    fn stored_bytes(&self) -> usize {
        self.bytes().1
    }
}
