//! One linear under its guided Gram matrices: errors on every grid, and the rounding itself.

use std::ops::Range;
use std::sync::Arc;

use anybit_core::kmeans::Exact1d;
use anybit_core::lnq::{LnqOptions, RowGrid, Table, feedback, refine};
use anybit_core::rounding::{GptqFactor, GptqOptions};
use anybit_core::shared_codebook::{fit_codebooks, fit_rows};
use anybit_core::{CoreError, Gram, GridSpec, Matrix, Plane, QuantizedMatrix};
use half::f16;
use rayon::prelude::*;

use super::Options;
use crate::layout::MatrixLayout;
use crate::methods::squeezellm::stored_codebook;
use crate::site::SiteLinear;

/// Rows whose clusterings are held at a time.
const ROWS: usize = 2048;

/// What rounding a linear needs of its weights and statistics.
pub(super) struct Fit<'a> {
    weights: &'a Matrix,
    grams: &'a [Gram],
    /// `diag(H_k)`.
    importance: Vec<Vec<f32>>,
    factors: Vec<GptqFactor>,
    /// All of `H_k`, where rows are to be refined.
    full: Vec<Matrix>,
    /// Shared codebooks of 1, 2, … bits.
    tables: Vec<Arc<Table>>,
    options: Options,
}

/// Rows that were rounded together.
struct Part {
    plane: usize,
    /// Places of the rows in their plane.
    slots: Vec<usize>,
    grids: Vec<RowGrid>,
    codes: Vec<u8>,
}

impl<'a> Fit<'a> {
    pub(super) fn new(
        linear: &SiteLinear<'a>,
        grams: &'a [Gram],
        options: Options,
        group_size: Option<usize>,
    ) -> Result<Self, CoreError> {
        let weights = linear.weights;
        let importance: Vec<Vec<f32>> = grams.iter().map(Gram::diagonal).collect();
        let damping = GptqOptions { damp: options.damp, act_order: true, ..Default::default() };
        // One after another: each needs three matrices in f64.
        let factors =
            grams.iter().map(|gram| GptqFactor::new(gram, damping)).collect::<Result<_, _>>()?;
        let mut mean = vec![0f32; weights.cols];
        for h in &importance {
            mean.iter_mut().zip(h).for_each(|(mean, h)| *mean += h / grams.len() as f32);
        }
        let group_len = group_size.unwrap_or(weights.cols);
        let tables = fit_codebooks(weights, &mean, group_len, options.bmax)?;
        Ok(Self { weights, grams, importance, factors, full: Vec::new(), tables, options })
    }

    /// Rows of group `k`.
    fn group(&self, k: usize) -> Range<usize> {
        let (rows, groups) = (self.weights.rows, self.grams.len());
        k * rows / groups..(k + 1) * rows / groups
    }

    fn gather(&self, rows: &[usize]) -> Matrix {
        let data = rows.iter().flat_map(|row| self.weights.row(*row)).copied().collect();
        Matrix { rows: rows.len(), cols: self.weights.cols, data }
    }

    /// The optimal codebooks of some rows of group `k`, up to `bits` wide.
    fn cluster(&self, w: &Matrix, k: usize, bits: u8) -> Result<Vec<Exact1d>, CoreError> {
        let h = &self.importance[k];
        w.data.par_chunks(w.cols).map(|row| Exact1d::new(row, h, 1 << bits)).collect()
    }

    /// Starting grids of some rows of group `k`; `clusters` are theirs where the grid is a codebook
    /// of each row.
    fn grids(
        &self,
        w: &Matrix,
        k: usize,
        grid: &GridSpec,
        clusters: &[Exact1d],
    ) -> Result<Vec<RowGrid>, CoreError> {
        let h = &self.importance[k];
        match *grid {
            GridSpec::Codebook { bits } => {
                let rows = clusters.par_iter().enumerate();
                rows.map(|(i, c)| Ok(RowGrid::own(stored_codebook(c, bits, i)?))).collect()
            }
            _ => {
                let table = &self.tables[grid.bits() as usize - 1];
                Ok(fit_rows(w, h, table, grid.group_len(w.cols)))
            }
        }
    }

    /// Step 1: `E`, `[rows, options]`, each row times its factor.
    pub(super) fn errors(
        &self,
        options: &[GridSpec],
        row_factors: Option<&[f32]>,
    ) -> Result<Vec<f64>, CoreError> {
        let width = options.len();
        let mut errors = vec![0f64; self.weights.rows * width];
        for k in 0..self.grams.len() {
            let all: Vec<usize> = self.group(k).collect();
            for rows in all.chunks(ROWS) {
                self.group_errors(k, rows, options, row_factors, &mut errors)?;
            }
        }
        Ok(errors)
    }

    /// The errors of some rows of group `k`.
    fn group_errors(
        &self,
        k: usize,
        rows: &[usize],
        options: &[GridSpec],
        row_factors: Option<&[f32]>,
        errors: &mut [f64],
    ) -> Result<(), CoreError> {
        let width = options.len();
        let w = self.gather(rows);
        let own = options.iter().filter(|grid| matches!(grid, GridSpec::Codebook { .. }));
        let clusters = match own.map(GridSpec::bits).max() {
            Some(bits) => self.cluster(&w, k, bits)?,
            None => Vec::new(),
        };
        for (at, grid) in options.iter().enumerate() {
            let grids = self.grids(&w, k, grid, &clusters)?;
            let losses = feedback(&w, &grids, &self.factors[k]).1;
            for (row, loss) in rows.iter().zip(losses) {
                let factor = row_factors.map_or(1.0, |f| f[*row] as f64);
                errors[row * width + at] = loss * factor;
            }
        }
        Ok(())
    }

    /// Step 3: all rows on the grids of `layout`.
    pub(super) fn round(mut self, layout: &MatrixLayout) -> Result<QuantizedMatrix, CoreError> {
        if self.options.rounds > 0 {
            self.full = self.grams.iter().map(Gram::to_full).collect();
        }
        let (n, m) = (self.weights.rows, self.weights.cols);
        let members: Vec<Vec<usize>> =
            (0..layout.planes.len()).map(|group| layout.rows_of(group)).collect();
        let jobs: Vec<(usize, usize)> =
            (0..self.grams.len()).flat_map(|k| (0..members.len()).map(move |p| (k, p))).collect();
        let parts: Vec<Part> = jobs
            .into_par_iter()
            .map(|(k, plane)| self.round_part(k, plane, &layout.planes[plane].0, &members[plane]))
            .collect::<Result<_, _>>()?;
        let mut planes = Vec::new();
        for (index, (grid, rows)) in layout.planes.iter().enumerate() {
            let mut plane = Plane::empty(*grid, *rows, m)?;
            if let GridSpec::SharedCodebook { bits, .. } = grid {
                let values = self.tables[*bits as usize - 1].values();
                plane.table = values.iter().map(|v| f16::from_f32(*v)).collect();
            }
            let own: Vec<&Part> = parts.iter().filter(|part| part.plane == index).collect();
            let mut place = vec![(0, 0); *rows];
            for (p, part) in own.iter().enumerate() {
                part.slots.iter().enumerate().for_each(|(i, slot)| place[*slot] = (p, i));
            }
            plane.rows_mut().zip(place).for_each(|(mut out, (p, i))| {
                let (part, codes) = (own[p], &own[p].codes[i * m..(i + 1) * m]);
                let row = &part.grids[i];
                let halves = |v: f32| f16::from_f32(v);
                match grid {
                    GridSpec::SharedCodebook { .. } => {
                        let scales: Vec<f16> = row.scales().map(halves).collect();
                        out.set_scaled(codes, &scales);
                    }
                    _ => {
                        let values: Vec<f16> =
                            row.table().values().iter().copied().map(halves).collect();
                        out.set_codebook(codes, &values);
                    }
                }
            });
            planes.push(plane);
        }
        layout.assemble((n, m), planes, None)
    }

    /// The rows of group `k` among `members`, the rows of a plane.
    fn round_part(
        &self,
        k: usize,
        plane: usize,
        grid: &GridSpec,
        members: &[usize],
    ) -> Result<Part, CoreError> {
        let range = self.group(k);
        let own = members.iter().enumerate().filter(|(_, row)| range.contains(row));
        let (slots, rows): (Vec<usize>, Vec<usize>) = own.map(|(slot, row)| (slot, *row)).unzip();
        let w = self.gather(&rows);
        if rows.is_empty() {
            return Ok(Part { plane, slots, grids: Vec::new(), codes: Vec::new() });
        }
        let clusters = match grid {
            GridSpec::Codebook { bits } => self.cluster(&w, k, *bits)?,
            _ => Vec::new(),
        };
        let grids = self.grids(&w, k, grid, &clusters)?;
        let options = LnqOptions { rounds: self.options.rounds, ..Default::default() };
        let done = match self.options.rounds {
            0 => {
                let codes = feedback(&w, &grids, &self.factors[k]).0;
                return Ok(Part { plane, slots, grids, codes });
            }
            _ => refine(&w, grids, None, &self.full[k], Some(&self.factors[k]), options)?,
        };
        Ok(Part { plane, slots, grids: done.grids, codes: done.codes })
    }
}
