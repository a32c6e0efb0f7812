//! One packed matrix in a file: which tensors it is made of, its record, reading it back.

use anybit_core::bitstream::{pack_row, unpack_row, words_per_row};
use anybit_core::quantized::{group_bits, permutation_of};
use anybit_core::{CoreError, GridSpec, Matrix, Plane, PlaneLengths, QuantizedMatrix, Sparse};
use half::f16;
use serde::{Deserialize, Serialize};

use super::{relative_error, squared_norm};
use crate::safetensors_file::{FileDtype, PlannedTensor, RawTensor};
use crate::{Checkpoint, IoError, Result};

/// No matrix is longer or wider; a manifest that says so is damaged.
const MAX_SIDE: usize = 1 << 28;

/// One plane of a packed matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlaneRecord {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Grid.
    pub grid: GridSpec,
}

/// What the manifest says of one packed matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedRecord {
    /// Logical rows.
    pub rows: usize,
    /// Logical columns.
    pub cols: usize,
    /// Method that chose the codes.
    pub method: String,
    /// Planes, row groups outermost.
    pub planes: Vec<PlaneRecord>,
    /// Column groups.
    pub column_groups: usize,
    /// Whether a column scale is stored.
    pub column_scale: bool,
    /// Whether a row permutation is stored.
    pub row_perm: bool,
    /// Whether the row group of each row is stored: a permutation in fewer bytes (format 1.1).
    #[serde(default)]
    pub row_groups: bool,
    /// Entries of the sparse part; none when null (format 1.1).
    #[serde(default)]
    pub sparse: Option<usize>,
    /// Bits of all codes, without padding.
    pub code_bits: u64,
    /// Bytes of everything stored.
    pub bytes: u64,
    /// `‖W − Q‖² / ‖W‖²`.
    pub relative_error: f64,
    /// `tr((W−Q) H (W−Q)ᵀ) / tr(W H Wᵀ)` on the calibration inputs, when there were any.
    pub output_error: Option<f64>,
    /// `‖Q‖²`: what decoding must give again.
    pub decoded_norm: f64,
    /// BLAKE3 of the stored parts in order, in hex.
    pub blake3: String,
}

/// What was measured of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// `‖W − Q‖² / ‖W‖²`.
    pub relative_error: f64,
    /// The same in the metric of the calibration inputs, when there were any.
    pub output_error: Option<f64>,
    /// `‖Q‖²` as decoded.
    pub decoded_norm: f64,
}

impl Measured {
    /// Decodes `matrix` and compares it with the weights that it stands for.
    pub fn against(weights: &Matrix, matrix: &QuantizedMatrix) -> Self {
        let decoded = matrix.dequantize();
        Self {
            relative_error: relative_error(weights, &decoded),
            output_error: None,
            decoded_norm: squared_norm(&decoded),
        }
    }
}

/// The linear that a weight tensor belongs to: `x.q_proj.weight` → `x.q_proj`.
pub(super) fn linear_name(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

impl QuantizedRecord {
    /// A record for `matrix`; errors and hash are the caller's to fill in.
    pub fn describe(matrix: &QuantizedMatrix, method: &str) -> Self {
        let planes = matrix
            .planes
            .iter()
            .map(|p| PlaneRecord { rows: p.rows, cols: p.cols, grid: p.grid })
            .collect();
        Self {
            rows: matrix.rows,
            cols: matrix.cols,
            method: method.into(),
            planes,
            column_groups: matrix.column_groups,
            column_scale: matrix.column_scale.is_some(),
            row_perm: matrix.row_perm.is_some() && matrix.row_groups().is_none(),
            row_groups: matrix.row_groups().is_some(),
            sparse: matrix.sparse.as_ref().map(|s| s.cols.len()),
            code_bits: matrix.code_bits(),
            bytes: matrix.bytes().1 as u64,
            relative_error: 0.0,
            output_error: None,
            decoded_norm: 0.0,
            blake3: String::new(),
        }
    }

    /// The record of `matrix` with errors and hash, and the bytes of its stored parts, in the order
    /// of [`Self::parts`].
    pub fn with_parts(
        matrix: &QuantizedMatrix,
        method: &str,
        measured: Measured,
    ) -> (Self, Vec<Vec<u8>>) {
        let parts = part_bytes(matrix);
        let record = Self {
            relative_error: measured.relative_error,
            output_error: measured.output_error,
            decoded_norm: measured.decoded_norm,
            blake3: Self::hash(parts.iter().map(Vec::as_slice)),
            ..Self::describe(matrix, method)
        };
        (record, parts)
    }

    /// The tensors that hold the matrix `tensor`, in the order in which they are hashed.
    pub fn parts(&self, tensor: &str) -> Vec<PlannedTensor> {
        let linear = linear_name(tensor);
        let mut parts = Vec::new();
        for (i, p) in self.planes.iter().enumerate() {
            let place = format!("{}.{}", i / self.column_groups, i % self.column_groups);
            let PlaneLengths { codes, scales, exact_scales, zeros, table } =
                Plane::lengths(p.grid, p.rows, p.cols);
            let per_row = |len: usize| vec![p.rows, len / p.rows.max(1)];
            let codes_name = format!("{linear}.codes.{place}");
            parts.push(PlannedTensor::new(codes_name, FileDtype::U32, per_row(codes)));
            let kind = match p.grid {
                GridSpec::Codebook { .. } => "codebook",
                _ => "scales",
            };
            let scales_name = format!("{linear}.{kind}.{place}");
            let (dtype, scales) = match p.grid.has_exact_scales() {
                true => (FileDtype::F32, exact_scales),
                false => (FileDtype::F16, scales),
            };
            parts.push(PlannedTensor::new(scales_name, dtype, per_row(scales)));
            if zeros > 0 {
                let zeros_name = format!("{linear}.zeros.{place}");
                parts.push(PlannedTensor::new(zeros_name, FileDtype::U32, per_row(zeros)));
            }
            if table > 0 {
                let table_name = format!("{linear}.table.{place}");
                parts.push(PlannedTensor::new(table_name, FileDtype::F16, vec![table]));
            }
        }
        let mut part = |name: &str, dtype: FileDtype, len: usize| {
            parts.push(PlannedTensor::new(format!("{linear}.{name}"), dtype, vec![len]));
        };
        if self.column_scale {
            part("column_scale", FileDtype::F16, self.cols);
        }
        if self.row_perm {
            part("row_perm", FileDtype::U32, self.rows);
        }
        if self.row_groups {
            part("row_groups", FileDtype::U32, words_per_row(self.rows, self.group_bits()));
        }
        if let Some(entries) = self.sparse {
            let column =
                if Sparse::col_bytes(self.cols) == 2 { FileDtype::U16 } else { FileDtype::U32 };
            part("sparse_rows", FileDtype::U32, self.rows + 1);
            part("sparse_cols", column, entries);
            part("sparse_values", FileDtype::F16, entries);
        }
        parts
    }

    /// Bits of a row group's number.
    fn group_bits(&self) -> u8 {
        group_bits(self.planes.len() / self.column_groups.max(1))
    }

    /// Hash of the stored parts.
    pub fn hash<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
        let mut hasher = blake3::Hasher::new();
        parts.for_each(|p| {
            hasher.update(p);
        });
        hasher.finalize().to_hex().to_string()
    }

    /// Reads the matrix back.
    ///
    /// # Errors
    /// Missing parts, wrong shapes, codes out of range, scales that are not finite.
    pub fn load(&self, tensor: &str, checkpoint: &Checkpoint) -> Result<QuantizedMatrix> {
        self.load_with(tensor, |name| checkpoint.raw(name))
    }

    /// The stored parts of the matrix `tensor`, in the order in which they are hashed.
    ///
    /// # Errors
    /// A record that describes no matrix, missing parts, or parts of another shape.
    pub fn find_parts<'a>(
        &self,
        tensor: &str,
        find: impl Fn(&str) -> Result<&'a RawTensor>,
    ) -> Result<Vec<&'a RawTensor>> {
        let fail = |source| IoError::Matrix { name: tensor.to_string(), source };
        if self.column_groups == 0 {
            let (expected, found) = ("at least 1".into(), "0".into());
            return Err(fail(CoreError::Shape { what: "column groups", expected, found }));
        }
        if self.row_groups && self.planes.len() / self.column_groups > 256 {
            let (expected, found) = ("at most 256".into(), self.planes.len().to_string());
            return Err(fail(CoreError::Shape { what: "row groups", expected, found }));
        }
        if self.rows > MAX_SIDE || self.sparse.is_some_and(|n| n > MAX_SIDE) {
            let expected = format!("at most {MAX_SIDE} rows and sparse entries");
            let found = format!("{} and {:?}", self.rows, self.sparse);
            return Err(fail(CoreError::Shape { what: "matrix", expected, found }));
        }
        for p in &self.planes {
            let (rows, cols) = (p.rows, p.cols);
            if rows > MAX_SIDE || cols > MAX_SIDE {
                let expected = format!("sides of at most {MAX_SIDE}");
                let found = format!("{rows}×{cols}");
                return Err(fail(CoreError::Shape { what: "plane", expected, found }));
            }
            p.grid.validate(p.cols).map_err(fail)?;
        }
        let mut raw = Vec::new();
        for part in self.parts(tensor) {
            let found = find(&part.name)?;
            if found.dtype != part.dtype || found.shape != part.shape {
                return Err(IoError::Shape {
                    path: found.path.clone(),
                    name: part.name,
                    expected: part.shape,
                    found: found.shape.clone(),
                });
            }
            raw.push(found);
        }
        Ok(raw)
    }

    /// [`Self::load`] from parts that `find` finds by name, whose pages in the file are released:
    /// the matrix is a copy.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_with<'a>(
        &self,
        tensor: &str,
        find: impl Fn(&str) -> Result<&'a RawTensor>,
    ) -> Result<QuantizedMatrix> {
        let parts = self.find_parts(tensor, find)?;
        let matrix = self.assemble(tensor, &parts);
        parts.iter().for_each(|part| part.release());
        matrix
    }

    /// The matrix of the parts that [`Self::find_parts`] lists.
    fn assemble(&self, tensor: &str, parts: &[&RawTensor]) -> Result<QuantizedMatrix> {
        let fail = |source| IoError::Matrix { name: tensor.to_string(), source };
        let mut raw = parts.iter();
        // `parts` listed exactly what is taken here, in this order.
        let mut next = || raw.next().map(|part| part.bytes()).unwrap_or_default();
        let mut planes = Vec::new();
        for p in &self.planes {
            let codes = words(next());
            let (scales, exact_scales) = match p.grid.has_exact_scales() {
                true => (Vec::new(), singles(next())),
                false => (halves(next()), Vec::new()),
            };
            let zeros = if p.grid.has_zeros() { words(next()) } else { Vec::new() };
            let shared = matches!(p.grid, GridSpec::SharedCodebook { .. });
            let table = if shared { halves(next()) } else { Vec::new() };
            let shape = (p.rows, p.cols);
            let plane = Plane::from_parts(p.grid, shape, codes, scales, exact_scales, zeros, table);
            planes.push(plane.map_err(fail)?);
        }
        let column_scale = self.column_scale.then(|| halves(next()));
        let mut row_perm = self.row_perm.then(|| words(next()));
        if self.row_groups {
            let mut groups = vec![0; self.rows];
            unpack_row(&words(next()), self.group_bits(), 0, &mut groups);
            let firsts = planes.iter().step_by(self.column_groups);
            row_perm = Some(permutation_of(&groups, firsts).map_err(fail)?);
        }
        let shape = (self.rows, self.cols);
        let groups = self.column_groups;
        let matrix = QuantizedMatrix::from_planes(shape, planes, groups, column_scale, row_perm);
        let matrix = matrix.map_err(fail)?;
        if self.sparse.is_none() {
            return Ok(matrix);
        }
        let (rows, cols, values) = (words(next()), next(), halves(next()));
        let cols = match Sparse::col_bytes(self.cols) {
            2 => cols.as_chunks::<2>().0.iter().map(|b| u16::from_le_bytes(*b).into()).collect(),
            _ => words(cols),
        };
        matrix.with_sparse(Sparse { rows, cols, values }).map_err(fail)
    }
}

/// The stored parts of a matrix, in the order of [`QuantizedRecord::parts`].
pub fn part_bytes(matrix: &QuantizedMatrix) -> Vec<Vec<u8>> {
    let words = |w: &[u32]| w.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let halves = |h: &[f16]| h.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut parts = Vec::new();
    for p in &matrix.planes {
        parts.push(words(&p.codes));
        parts.push(match p.grid.has_exact_scales() {
            true => p.exact_scales.iter().flat_map(|v| v.to_le_bytes()).collect(),
            false => halves(&p.scales),
        });
        if !p.zeros.is_empty() {
            parts.push(words(&p.zeros));
        }
        if !p.table.is_empty() {
            parts.push(halves(&p.table));
        }
    }
    parts.extend(matrix.column_scale.as_deref().map(halves));
    match matrix.row_groups() {
        Some(groups) => {
            let bits = group_bits(matrix.row_group_count());
            let mut stream = vec![0; words_per_row(groups.len(), bits)];
            pack_row(&groups, bits, &mut stream);
            parts.push(words(&stream));
        }
        None => parts.extend(matrix.row_perm.as_deref().map(words)),
    }
    if let Some(sparse) = &matrix.sparse {
        parts.push(words(&sparse.rows));
        parts.push(match Sparse::col_bytes(matrix.cols) {
            2 => sparse.cols.iter().flat_map(|c| (*c as u16).to_le_bytes()).collect(),
            _ => words(&sparse.cols),
        });
        parts.push(halves(&sparse.values));
    }
    parts
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect()
}

fn singles(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b)).collect()
}
