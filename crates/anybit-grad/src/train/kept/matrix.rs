//! [`KeptMatrix`]: a packed matrix whose codes stay and whose values are learned.
//!
//! ```text
//! v = f16(v₀ + u δ)                       a codebook's entry or a scale; δ is learned, at first 0
//! W = (c[k], (k − z) s or t[k] s) · column factor + sparse part
//! dv = Σ dW · column factor · ∂W/∂v       over the weights that v stands for
//! dδ = u dv                               rounding to f16 passes gradient as it is
//! ```
//!
//! The unit `u` is the root mean square of a row's codebook, the first scale of a group, the first
//! factor of a column: Adam moves every value by about the learning rate whatever its gradient, and
//! entries of 0.05 and scales of 0.002 would need rates of their own. Counted in units, a learning
//! rate is the share by which a step changes a value. Exact scales (f32) are not rounded.
//!
//! What is multiplied is decoded by [`QuantizedMatrix`] itself from values as they are stored, so
//! that a product in training is that of the written file. Sums are taken row by row in f64, or in
//! tiles of rows, so that they do not depend on the number of threads.

use std::sync::Arc;

use anybit_core::bitstream::{unpack_row, words_per_row};
use anybit_core::{GridSpec, Plane, QuantizedMatrix, RowSource};
use half::f16;
use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::sum_rows;
use crate::{Tape, Tensor, Var};

const VALUES: &str = "values";
const TABLES: &str = "tables";
const COLUMNS: &str = "column_scale";

/// First values, and the units in which they move.
#[derive(Debug, Default)]
struct Origin {
    first: Vec<f32>,
    unit: Vec<f32>,
}

impl Origin {
    /// Adds values of which `per_unit` at a time have their root mean square as unit.
    fn extend(&mut self, first: &[f32], per_unit: usize) {
        for part in first.chunks(per_unit.max(1)) {
            let squares: f64 = part.iter().map(|v| f64::from(*v).powi(2)).sum();
            let unit = (squares / part.len() as f64).sqrt() as f32;
            self.unit.extend(part.iter().map(|_| unit));
        }
        self.first.extend_from_slice(first);
    }

    /// `v₀ + u δ`.
    fn at(&self, moved: &[f32]) -> Vec<f32> {
        assert_eq!(moved.len(), self.first.len(), "learned values of another matrix");
        let from = self.first.iter().zip(&self.unit);
        from.zip(moved).map(|((first, unit), moved)| first + unit * moved).collect()
    }
}

/// A packed matrix whose values are learned.
#[derive(Debug)]
pub struct KeptMatrix {
    first: QuantizedMatrix,
    /// Logical row of each stored row.
    logical: Vec<u32>,
    /// Codebooks and scales of all planes, one plane after another.
    values: Origin,
    /// Shared codebooks of all planes.
    tables: Origin,
    /// Factors of columns; empty when they are not trained.
    columns: Origin,
}

fn floats(values: &[f16]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// The nearest f16, which is finite for whatever is.
fn to_half(value: f32) -> f16 {
    let most = f16::MAX.to_f32();
    f16::from_f32(value.clamp(-most, most))
}

impl KeptMatrix {
    /// Learns the values of `first`; those of its column scale only with `column_scale`.
    pub fn new(first: QuantizedMatrix, column_scale: bool) -> Self {
        let (mut values, mut tables) = (Origin::default(), Origin::default());
        for plane in &first.planes {
            let per_unit = match plane.grid {
                GridSpec::Codebook { bits } => 1usize << bits,
                _ => 1,
            };
            values.extend(&floats(&plane.scales), per_unit);
            values.extend(&plane.exact_scales, per_unit);
            tables.extend(&floats(&plane.table), plane.table.len());
        }
        let mut columns = Origin::default();
        if let Some(scale) = first.column_scale.as_ref().filter(|_| column_scale) {
            columns.extend(&floats(scale), 1);
        }
        let logical = logical_rows(&first);
        Self { first, logical, values, tables, columns }
    }

    /// What is learned, in the order in which [`Self::record`] takes it.
    fn origins(&self) -> Vec<(&'static str, &Origin)> {
        let all = [(VALUES, &self.values), (TABLES, &self.tables), (COLUMNS, &self.columns)];
        all.into_iter().filter(|(_, origin)| !origin.first.is_empty()).collect()
    }

    /// The ends of the names of what is learned, and their values before the first step.
    pub fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        let zeros = |len: usize| Tensor::new([len], vec![0.0; len]);
        self.origins().into_iter().map(|(end, o)| (end, zeros(o.first.len()))).collect()
    }

    /// The matrix before the first step.
    pub fn first(&self) -> &QuantizedMatrix {
        &self.first
    }

    /// The matrix as it is stored when this was learned.
    ///
    /// # Panics
    /// When the number of values is not that of [`Self::parameters`].
    pub fn moved(&self, learned: &[&[f32]]) -> QuantizedMatrix {
        assert_eq!(learned.len(), self.origins().len(), "learned values of another matrix");
        let mut learned = learned.iter();
        let [values, tables, columns] =
            [&self.values, &self.tables, &self.columns].map(|o| match o.first.is_empty() {
                true => Vec::new(),
                false => o.at(learned.next().copied().unwrap_or_default()),
            });
        let mut matrix = self.first.clone();
        let (mut value, mut entry) = (0, 0);
        for plane in &mut matrix.planes {
            // A plane has scales of one kind.
            let own = &values[value..];
            value += plane.scales.len() + plane.exact_scales.len();
            plane.scales.iter_mut().zip(own).for_each(|(s, v)| *s = to_half(*v));
            plane.exact_scales.iter_mut().zip(own).for_each(|(s, v)| *s = *v);
            let own = &tables[entry..];
            entry += plane.table.len();
            plane.table.iter_mut().zip(own).for_each(|(t, v)| *t = to_half(*v));
        }
        if let Some(scale) = &mut matrix.column_scale {
            scale.iter_mut().zip(&columns).for_each(|(s, v)| *s = to_half(*v));
        }
        matrix
    }

    /// Records the decoded weight, `[rows, cols]`.
    ///
    /// # Panics
    /// As [`Self::moved`].
    pub fn record(self: &Arc<Self>, tape: &mut Tape, learned: &[Var]) -> Var {
        let values: Vec<&[f32]> = learned.iter().map(|v| tape.data(*v)).collect();
        let matrix = self.moved(&values);
        let (rows, cols) = (matrix.rows, matrix.cols);
        let mut y = tape.buffer(rows * cols);
        let decoded = y.par_chunks_mut(cols.max(1)).enumerate();
        decoded.for_each(|(row, out)| matrix.read_rows(row..row + 1, out));
        let (own, inputs) = (self.clone(), learned.to_vec());
        tape.custom(learned, Tensor::new([rows, cols], y), move |pass| {
            own.backward(pass, &matrix, &inputs);
        })
    }

    fn backward(&self, pass: &mut Pass<'_>, matrix: &QuantizedMatrix, learned: &[Var]) {
        let gradient = Gradient { matrix, logical: &self.logical, dw: pass.grad() };
        for ((end, origin), var) in self.origins().into_iter().zip(learned) {
            if !pass.wants(*var) {
                continue;
            }
            let mut sums = pass.buffer(origin.first.len());
            sums.fill(0.0);
            match end {
                VALUES => gradient.values(&mut sums),
                TABLES => gradient.tables(&mut sums),
                _ => gradient.columns(&mut sums),
            }
            pass.accumulate2(*var, &sums, &origin.unit, |sum, unit| sum * unit);
            pass.recycle(sums);
        }
    }
}

/// The inverse of the row permutation.
fn logical_rows(matrix: &QuantizedMatrix) -> Vec<u32> {
    let mut logical: Vec<u32> = (0..matrix.rows as u32).collect();
    for (row, slot) in matrix.row_perm.iter().flatten().enumerate() {
        logical[*slot as usize] = row as u32;
    }
    logical
}

/// `Σ grad` by code.
fn by_code(codes: &[u8], grad: &[f32]) -> [f64; 256] {
    let mut sums = [0.0; 256];
    codes.iter().zip(grad).for_each(|(code, g)| sums[*code as usize] += f64::from(*g));
    sums
}

/// A plane, with its first stored row and its first column.
#[derive(Clone, Copy)]
struct Place<'a> {
    plane: &'a Plane,
    row: usize,
    col: usize,
}

/// A stored row of a plane: its codes, and the gradient of what they decode to before the factors
/// of columns.
#[derive(Default)]
struct PlaneRow {
    codes: Vec<u8>,
    grad: Vec<f32>,
}

/// The gradient `dW` of a decoded matrix, to be passed on to its values.
struct Gradient<'a> {
    matrix: &'a QuantizedMatrix,
    logical: &'a [u32],
    dw: &'a [f32],
}

impl<'a> Gradient<'a> {
    fn places(&self) -> Vec<Place<'a>> {
        let mut all = Vec::new();
        let mut row = 0;
        for group in self.matrix.planes.chunks(self.matrix.column_groups) {
            let mut col = 0;
            for plane in group {
                all.push(Place { plane, row, col });
                col += plane.cols;
            }
            row += group[0].rows;
        }
        all
    }

    /// `dW` of a stored row.
    fn of(&self, place: Place<'_>, slot: usize) -> &'a [f32] {
        let logical = self.logical[place.row + slot] as usize;
        let start = logical * self.matrix.cols + place.col;
        &self.dw[start..start + place.plane.cols]
    }

    fn read(&self, place: Place<'_>, slot: usize, row: &mut PlaneRow) {
        let Place { plane, col, .. } = place;
        let bits = plane.grid.bits();
        let words = words_per_row(plane.cols, bits);
        row.codes.resize(plane.cols, 0);
        unpack_row(&plane.codes[slot * words..(slot + 1) * words], bits, 0, &mut row.codes);
        row.grad.clear();
        row.grad.extend_from_slice(self.of(place, slot));
        if let Some(scale) = &self.matrix.column_scale {
            let own = &scale[col..col + plane.cols];
            row.grad.iter_mut().zip(own).for_each(|(g, s)| *g *= s.to_f32());
        }
    }

    /// Of codebooks and scales, which belong to one row each.
    fn values(&self, mut out: &mut [f32]) {
        for place in self.places() {
            let len = place.plane.scales.len() + place.plane.exact_scales.len();
            let (own, rest) = std::mem::take(&mut out).split_at_mut(len);
            out = rest;
            let per_row = (len / place.plane.rows.max(1)).max(1);
            let rows = own.par_chunks_mut(per_row).enumerate();
            rows.for_each_init(PlaneRow::default, |row, (slot, out)| {
                self.read(place, slot, row);
                row_values(place.plane, slot, row, out);
            });
        }
    }

    /// Of shared codebooks, which all rows of a plane add to.
    fn tables(&self, mut out: &mut [f32]) {
        for place in self.places() {
            let plane = place.plane;
            let (own, rest) = std::mem::take(&mut out).split_at_mut(plane.table.len());
            out = rest;
            if own.is_empty() {
                continue;
            }
            let len = plane.grid.group_len(plane.cols);
            sum_rows(own, true, plane.rows, |slot, sum| {
                let mut row = PlaneRow::default();
                self.read(place, slot, &mut row);
                let groups = row.codes.chunks(len).zip(row.grad.chunks(len));
                for (group, (codes, grad)) in groups.enumerate() {
                    let scale = f64::from(plane.scale(slot, group));
                    let sums = by_code(codes, grad);
                    sum.iter_mut().zip(sums).for_each(|(s, own)| *s += (own * scale) as f32);
                }
            });
        }
    }

    /// Of the factors of columns.
    fn columns(&self, out: &mut [f32]) {
        for place in self.places() {
            let plane = place.plane;
            let own = &mut out[place.col..place.col + plane.cols];
            sum_rows(own, true, plane.rows, |slot, sum| {
                let mut decoded = vec![0.0; plane.cols];
                plane.decode_row(slot, &mut decoded);
                let each = sum.iter_mut().zip(decoded.iter().zip(self.of(place, slot)));
                each.for_each(|(s, (value, g))| *s += value * g);
            });
        }
    }
}

/// The gradient of a row's codebook or scales.
fn row_values(plane: &Plane, slot: usize, row: &PlaneRow, out: &mut [f32]) {
    if matches!(plane.grid, GridSpec::Codebook { .. }) {
        let sums = by_code(&row.codes, &row.grad);
        return out.iter_mut().zip(sums).for_each(|(o, sum)| *o = sum as f32);
    }
    let len = plane.grid.group_len(plane.cols);
    let groups = row.codes.chunks(len).zip(row.grad.chunks(len));
    for (group, (out, (codes, grad))) in out.iter_mut().zip(groups).enumerate() {
        let zero = plane.zero(slot, group);
        let level = |code: u8| match plane.table.get(usize::from(code)) {
            Some(entry) => entry.to_f32(),
            None => f32::from(code) - zero,
        };
        let products = codes.iter().zip(grad).map(|(u, g)| f64::from(level(*u)) * f64::from(*g));
        *out = products.sum::<f64>() as f32;
    }
}

#[cfg(test)]
mod tests {
    use anybit_core::rng::SplitMix64;
    use anybit_core::rounding::nearest;
    use anybit_core::{Matrix, ScaleFit, Sparse};

    use super::*;
    use crate::testing::normals;

    const ROWS: usize = 10;
    const COLS: usize = 40;

    fn codes(seed: u64, cols: usize, bits: u8) -> Vec<u8> {
        let mut rng = SplitMix64::new(seed);
        (0..cols).map(|_| rng.below(1 << bits) as u8).collect()
    }

    fn halves(values: &[f32]) -> Vec<f16> {
        values.iter().map(|v| f16::from_f32(*v)).collect()
    }

    fn codebook(bits: u8, rows: usize, cols: usize) -> Plane {
        let mut plane = Plane::empty(GridSpec::Codebook { bits }, rows, cols).unwrap();
        let entries = halves(&normals(7, rows << bits));
        plane.rows_mut().zip(entries.par_chunks(1 << bits)).enumerate().for_each(
            |(row, (mut out, entries))| out.set_codebook(&codes(row as u64, cols, bits), entries),
        );
        plane
    }

    fn shared(bits: u8, group: Option<usize>) -> Plane {
        let grid = GridSpec::SharedCodebook { bits, group_size: group };
        let mut plane = Plane::empty(grid, ROWS, COLS).unwrap();
        let groups = grid.groups(COLS);
        let scales = halves(&normals(8, ROWS * groups));
        plane.rows_mut().zip(scales.par_chunks(groups)).enumerate().for_each(
            |(row, (mut out, scales))| out.set_scaled(&codes(row as u64, COLS, bits), scales),
        );
        plane.table = halves(&normals(9, 1 << bits));
        plane
    }

    fn affine(grid: GridSpec, cols: usize) -> Plane {
        let weights = Matrix::from_vec(ROWS, cols, normals(3, ROWS * cols)).unwrap();
        nearest(&weights, grid, ScaleFit::MinMax).unwrap()
    }

    fn factors() -> Option<Vec<f16>> {
        Some(halves(&normals(4, COLS)))
    }

    /// Every grid, and everything that may stand around one.
    fn matrices() -> Vec<QuantizedMatrix> {
        let uniform = |symmetric| GridSpec::Uniform { bits: 3, symmetric, group_size: Some(16) };
        let half = |exact| GridSpec::HalfInteger { bits: 2, group_size: None, exact };
        let mut all = vec![
            QuantizedMatrix::single(codebook(3, ROWS, COLS)),
            QuantizedMatrix::single(affine(uniform(true), COLS)),
            QuantizedMatrix::single(affine(uniform(false), COLS)),
            QuantizedMatrix::single(affine(half(false), COLS)),
            QuantizedMatrix::single(affine(half(true), COLS)),
            QuantizedMatrix::single(shared(3, Some(16))),
            QuantizedMatrix::single(shared(2, None)),
        ];
        let sparse = Sparse::from_entries((ROWS, COLS), &[3, 44, 399], &[0.5, -1.0, 2.0]).unwrap();
        all.push(QuantizedMatrix::single(codebook(2, ROWS, COLS)).with_sparse(sparse).unwrap());
        let groups = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1];
        let planes = vec![codebook(2, 4, COLS), codebook(3, 6, COLS)];
        let rows = QuantizedMatrix::from_row_groups((ROWS, COLS), planes, &groups, factors());
        all.push(rows.unwrap());
        let planes = vec![affine(uniform(false), 24), codebook(2, ROWS, 16)];
        let perm = (0..ROWS as u32).map(|row| (row * 3 + 1) % ROWS as u32).collect();
        let tiers = QuantizedMatrix::from_planes((ROWS, COLS), planes, 2, factors(), Some(perm));
        all.push(tiers.unwrap());
        all.push(QuantizedMatrix { column_scale: factors(), ..all[5].clone() });
        all
    }

    /// Learned values that are not zero.
    fn learned(kept: &KeptMatrix) -> Vec<Tensor> {
        let near = |(i, (_, t)): (usize, (&str, Tensor))| {
            let values = normals(20 + i as u64, t.len()).into_iter().map(|v| 0.1 * v).collect();
            Tensor::new([t.len()], values)
        };
        kept.parameters().into_iter().enumerate().map(near).collect()
    }

    fn record(kept: &Arc<KeptMatrix>, learned: &[Tensor]) -> (Tape, Vec<Var>, Var) {
        let mut tape = Tape::default();
        let vars: Vec<Var> = learned.iter().map(|t| tape.leaf(t.clone(), true)).collect();
        let y = kept.record(&mut tape, &vars);
        (tape, vars, y)
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// The decoded weight is linear in each kind of value, so that differences over large steps,
    /// beside which rounding to f16 is small, are exact.
    #[test]
    fn gradients_are_finite_differences() {
        const STEP: f32 = 0.5;
        for (which, matrix) in matrices().into_iter().enumerate() {
            let kept = Arc::new(KeptMatrix::new(matrix, true));
            let inputs = learned(&kept);
            let (mut tape, vars, y) = record(&kept, &inputs);
            let cotangent = normals(99, ROWS * COLS);
            tape.backward_from(y, &cotangent);
            for (input, var) in vars.iter().enumerate() {
                let gradient = tape.grad(*var).unwrap().to_vec();
                let norm = dot(&gradient, &gradient).sqrt();
                assert!(norm > 0.0, "matrix {which}, input {input}");
                for direction in 0..3 {
                    let v = normals(1000 + direction, gradient.len());
                    let moved = |step: f32| {
                        let mut moved = inputs.clone();
                        let values = moved[input].data_mut().iter_mut();
                        values.zip(&v).for_each(|(x, v)| *x += step * v);
                        let (tape, _, y) = record(&kept, &moved);
                        dot(tape.data(y), &cotangent)
                    };
                    let numeric = (moved(STEP) - moved(-STEP)) / f64::from(2.0 * STEP);
                    let analytic = dot(&gradient, &v);
                    assert!(
                        (numeric - analytic).abs() <= 5e-3 * norm,
                        "matrix {which}, input {input}: finite difference {numeric}, gradient \
                         {analytic}, norm {norm}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_learned_is_the_matrix_itself() {
        for matrix in matrices() {
            let kept = Arc::new(KeptMatrix::new(matrix.clone(), true));
            let zeros: Vec<Tensor> = kept.parameters().into_iter().map(|(_, t)| t).collect();
            let values: Vec<&[f32]> = zeros.iter().map(Tensor::data).collect();
            assert_eq!(kept.moved(&values), matrix);
            let (tape, _, y) = record(&kept, &zeros);
            assert_eq!(tape.data(y), matrix.dequantize().data);
        }
    }

    /// Codes stay, values move by their unit and stay finite, and factors of columns stay unless
    /// they are trained.
    #[test]
    fn codes_stay_and_values_move() {
        let matrix = matrices().swap_remove(8);
        let kept = KeptMatrix::new(matrix.clone(), false);
        let names: Vec<&str> = kept.parameters().iter().map(|(end, _)| *end).collect();
        assert_eq!(names, [VALUES]);
        let ones = vec![1.0; kept.values.first.len()];
        let moved = kept.moved(&[&ones]);
        assert_eq!(
            (&moved.column_scale, &moved.row_perm),
            (&matrix.column_scale, &matrix.row_perm)
        );
        for (plane, before) in moved.planes.iter().zip(&matrix.planes) {
            assert_eq!(plane.codes, before.codes);
            assert_ne!(plane.scales, before.scales);
        }
        let entries = floats(&matrix.planes[0].scales[..4]);
        let rms = (dot(&entries, &entries) / 4.0).sqrt() as f32;
        let want = f16::from_f32(entries[2] + rms);
        approx::assert_relative_eq!(
            moved.planes[0].scales[2].to_f32(),
            want.to_f32(),
            max_relative = 2e-3
        );
        let far = vec![1e9; ones.len()];
        assert!(kept.moved(&[&far]).planes.iter().all(|p| p.scales.iter().all(|s| s.is_finite())));
    }

    #[test]
    fn gradients_do_not_depend_on_the_number_of_threads() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut all = Vec::new();
                for matrix in matrices() {
                    let kept = Arc::new(KeptMatrix::new(matrix, true));
                    let (mut tape, vars, y) = record(&kept, &learned(&kept));
                    tape.backward_from(y, &normals(5, ROWS * COLS));
                    all.extend(vars.iter().map(|v| tape.grad(*v).unwrap().to_vec()));
                }
                all
            })
        };
        assert!(run(1) == run(3));
    }
}
