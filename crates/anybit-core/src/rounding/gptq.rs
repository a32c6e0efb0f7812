//! GPTQ (Frantar et al., ICLR 2023): column after column, each column's rounding error is spread
//! over the columns that are still free, in the metric of the inputs.
//!
//! With `H = XᵀX + damping` and upper triangular `U`, `H⁻¹ = UᵀU`, for `j = 0..m`:
//!
//! ```text
//! q_j = grid(w_j)      e_j = (w_j − q_j) / U_jj      w_{j+1..} −= e_j · U_{j, j+1..}
//! ```
//!
//! and then `Σ_j e_j² = (w − q) H (w − q)ᵀ` exactly: the sum that [`gptq`] returns is the output
//! error. Updates inside a block of columns are immediate; the rest of the row is updated once
//! per block with a matrix product.

use rayon::prelude::*;

use super::{fit_row, place};
use crate::error::check_len;
use crate::linalg::{View, inverse_cholesky, matmul};
use crate::quantized::PlaneRowMut;
use crate::{Gram, GridSpec, GroupGrid, Matrix, Plane, Result, ScaleFit};

/// Rows that one task rounds together; fixed, so that results do not depend on threads.
const ROWS: usize = 32;
/// Columns between two updates of the rest of the row, unless groups ask for another number.
const BLOCK: usize = 128;

/// Settings of [`gptq`].
#[derive(Debug, Clone, Copy)]
pub struct GptqOptions {
    /// Damping as a fraction of the mean diagonal of `H`.
    pub damp: f64,
    /// Round columns in order of falling `H_jj`. Scales are then fitted to the original weights
    /// (static groups), so codes stay in their natural places.
    pub act_order: bool,
    /// How scales are fitted.
    pub fit: ScaleFit,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self { damp: 0.01, act_order: true, fit: ScaleFit::MinMax }
    }
}

/// What rounding one matrix gave.
pub struct GptqResult {
    /// The codes.
    pub plane: Plane,
    /// `Σ e²` over all rows, `= Σ_i (w_i − q_i) H_damped (w_i − q_i)ᵀ`.
    pub loss: f64,
    /// The damping that was needed.
    pub damp: f64,
}

/// What GPTQ needs of a Gram matrix; shared by all linears with the same inputs.
pub struct GptqFactor {
    /// Column that is rounded at each step.
    pub(crate) order: Vec<usize>,
    /// Channels that no token excites.
    pub(crate) dead: Vec<bool>,
    /// `U` with `H⁻¹ = UᵀU`, in rounding order.
    pub(crate) u: Matrix,
    act_order: bool,
    /// The damping that was needed.
    pub damp: f64,
}

impl GptqFactor {
    /// Factors `gram`. Channels that no token excites (`H_jj = 0`) get the mean diagonal of the
    /// others: they are independent of them, and damping keeps its size.
    ///
    /// # Errors
    /// A Gram matrix that stays singular.
    pub fn new(gram: &Gram, options: GptqOptions) -> Result<Self> {
        let dead = gram.dead();
        let order = column_order(gram, options.act_order);
        let mut damped = gram.permuted(&order);
        let live: Vec<f32> = gram.diagonal().into_iter().filter(|h| *h != 0.0).collect();
        let mean = match live.len() {
            0 => 1.0,
            count => (live.iter().map(|h| *h as f64).sum::<f64>() / count as f64) as f32,
        };
        for (j, &column) in order.iter().enumerate() {
            if dead[column] {
                damped.set(j, j, mean);
            }
        }
        let (u, damp) = inverse_cholesky(&damped, options.damp)?;
        Ok(Self { order, dead, u, act_order: options.act_order, damp })
    }
}

/// Rounds `weights` to the affine grid `spec` under the Gram matrix of its inputs.
///
/// # Errors
/// As [`super::nearest()`]; also a Gram matrix of another size, or one that stays singular.
pub fn gptq(
    weights: &Matrix,
    gram: &Gram,
    spec: GridSpec,
    options: GptqOptions,
) -> Result<GptqResult> {
    gptq_with(weights, &GptqFactor::new(gram, options)?, spec, options.fit)
}

/// [`gptq`] with a factor that is already there. Channels that no token excites keep no weight: it
/// could only harm.
///
/// # Errors
/// As [`gptq`].
pub fn gptq_with(
    weights: &Matrix,
    factor: &GptqFactor,
    spec: GridSpec,
    fit: ScaleFit,
) -> Result<GptqResult> {
    let (mut planes, loss) = gptq_tiers(weights, factor, &[(spec, weights.cols)], fit)?;
    Ok(GptqResult { plane: planes.remove(0), loss, damp: factor.damp })
}

/// [`gptq_with`] with a grid for each tier of columns, which tile a row: one plane per tier, and
/// the loss. With several tiers all scales are fitted to the original weights.
///
/// # Errors
/// As [`gptq`], or tiers that do not tile a row.
pub fn gptq_tiers(
    weights: &Matrix,
    factor: &GptqFactor,
    tiers: &[(GridSpec, usize)],
    fit: ScaleFit,
) -> Result<(Vec<Plane>, f64)> {
    weights.check_finite("weight")?;
    check_len("columns of all tiers", weights.cols, tiers.iter().map(|t| t.1).sum())?;
    check_len("Gram matrix of the inputs", weights.cols, factor.order.len())?;
    let planes = tiers.iter().map(|&(spec, cols)| Plane::empty(spec, weights.rows, cols));
    let mut planes: Vec<Plane> = planes.collect::<Result<_>>()?;
    let task = Task::new(weights, factor, tiers, fit);
    // Each task holds its rows in every plane.
    let mut outs: Vec<Vec<PlaneRowMut<'_>>> = (0..weights.rows).map(|_| Vec::new()).collect();
    for plane in &mut planes {
        let rows: Vec<_> = plane.rows_mut().collect();
        outs.iter_mut().zip(rows).for_each(|(out, row)| out.push(row));
    }
    let losses: Vec<f64> = outs
        .par_chunks_mut(ROWS)
        .enumerate()
        .map(|(chunk, outs)| {
            let (rows, loss) = task.round_rows(chunk * ROWS, outs.len())?;
            for (out, row) in outs.iter_mut().zip(rows) {
                let (mut column, mut group) = (0, 0);
                for (out, &(spec, cols)) in out.iter_mut().zip(tiers) {
                    let groups = spec.groups(cols);
                    let codes = &row.codes[column..column + cols];
                    out.set_affine(codes, &row.groups[group..group + groups]);
                    (column, group) = (column + cols, group + groups);
                }
            }
            Ok(loss)
        })
        .collect::<Result<_>>()?;
    drop(outs);
    Ok((planes, losses.iter().sum()))
}

fn column_order(gram: &Gram, act_order: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..gram.size()).collect();
    if act_order {
        let diagonal = gram.diagonal();
        order.sort_by(|&a, &b| diagonal[b].total_cmp(&diagonal[a]).then(a.cmp(&b)));
    }
    order
}

struct Task<'a> {
    weights: &'a Matrix,
    factor: &'a GptqFactor,
    tiers: &'a [(GridSpec, usize)],
    /// Group of each column, counted through all tiers.
    group_of: Vec<usize>,
    fit: ScaleFit,
}

struct RoundedRow {
    codes: Vec<u8>,
    groups: Vec<GroupGrid>,
}

impl<'a> Task<'a> {
    fn new(
        weights: &'a Matrix,
        factor: &'a GptqFactor,
        tiers: &'a [(GridSpec, usize)],
        fit: ScaleFit,
    ) -> Self {
        let mut group_of = Vec::with_capacity(weights.cols);
        for &(spec, cols) in tiers {
            let first = group_of.last().map_or(0, |g| g + 1);
            group_of.extend((0..cols).map(|j| first + j / spec.group_len(cols)));
        }
        Self { weights, factor, tiers, group_of, fit }
    }

    /// Whether scales are fitted to the original weights.
    fn is_static(&self) -> bool {
        self.factor.act_order || self.tiers.len() > 1
    }

    /// Grids of a row's groups, fitted to the original weights.
    fn fit_groups(&self, source: &[f32], row: usize) -> Result<Vec<GroupGrid>> {
        let mut groups = Vec::new();
        let mut start = 0;
        for &(spec, cols) in self.tiers {
            groups.extend(fit_row(spec, &source[start..start + cols], self.fit, row)?);
            start += cols;
        }
        Ok(groups)
    }

    /// Rounds `count` rows from `first`; returns codes and grids in natural column order.
    fn round_rows(&self, first: usize, count: usize) -> Result<(Vec<RoundedRow>, f64)> {
        let m = self.weights.cols;
        let (spec, cols) = self.tiers[0];
        let group_len = spec.group_len(cols);
        let block = if self.is_static() { BLOCK } else { block_len(group_len) };
        let mut rows = Vec::with_capacity(count);
        // Working copies in rounding order; dead columns hold no weight, and no scale is theirs.
        let mut w = vec![0f32; count * m];
        for (r, w) in w.chunks_exact_mut(m).enumerate() {
            let mut source = self.weights.row(first + r).to_vec();
            let dead = source.iter_mut().zip(&self.factor.dead).filter(|(_, dead)| **dead);
            dead.for_each(|(weight, _)| *weight = 0.0);
            for (w, &column) in w.iter_mut().zip(&self.factor.order) {
                *w = source[column];
            }
            let groups = match self.is_static() {
                true => self.fit_groups(&source, first + r)?,
                false => Vec::with_capacity(m.div_ceil(group_len)),
            };
            rows.push(RoundedRow { codes: vec![0; m], groups });
        }
        let mut errors = vec![0f32; count * block];
        let mut loss = 0f64;
        for start in (0..m).step_by(block) {
            let len = block.min(m - start);
            for (r, row) in rows.iter_mut().enumerate() {
                let (w, e) = (&mut w[r * m..(r + 1) * m], &mut errors[r * block..r * block + len]);
                loss += self.round_block(row, w, start, e, first + r)?;
            }
            let rest = start + len;
            if rest < m {
                let lhs = View::rows(&errors, count, len, block);
                let rhs = View::rows(&self.factor.u.data[start * m + rest..], len, m - rest, m);
                matmul(&mut w[rest..], m, true, -1.0, lhs, rhs);
            }
        }
        Ok((rows, loss))
    }

    fn round_block(
        &self,
        row: &mut RoundedRow,
        w: &mut [f32],
        start: usize,
        errors: &mut [f32],
        row_index: usize,
    ) -> Result<f64> {
        let m = w.len();
        let (spec, cols) = self.tiers[0];
        let group_len = spec.group_len(cols);
        let end = start + errors.len();
        let mut loss = 0f64;
        for j in start..end {
            if !self.is_static() && j % group_len == 0 {
                let current = &w[j..(j + group_len).min(m)];
                let fitted = GroupGrid::fit(spec, current, self.fit)
                    .map_err(|e| place(e, row_index, j / group_len))?;
                row.groups.push(fitted);
            }
            let column = self.factor.order[j];
            let grid = row.groups[self.group_of[column]];
            let code = grid.encode(w[j]);
            row.codes[column] = code;
            let u = &self.factor.u.row(j)[j..end];
            let e = (w[j] - grid.decode(code)) / u[0];
            for (w, u) in w[j + 1..end].iter_mut().zip(&u[1..]) {
                *w -= e * u;
            }
            errors[j - start] = e;
            loss += e as f64 * e as f64;
        }
        Ok(loss)
    }
}

/// A block of columns is a whole number of groups where that is possible, so that a group's scale
/// is fitted to weights that carry every update that is due.
fn block_len(group_len: usize) -> usize {
    if BLOCK.is_multiple_of(group_len) || group_len > 4 * BLOCK { BLOCK } else { group_len }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedMatrix, rng::SplitMix64, rounding::nearest};

    fn normals(n: usize, rng: &mut SplitMix64) -> Vec<f32> {
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    /// Inputs with correlated channels, as activations have.
    fn correlated(tokens: usize, m: usize, rng: &mut SplitMix64) -> Vec<f32> {
        let basis = normals(m * (m / 4).max(1), rng);
        let k = (m / 4).max(1);
        let mut x = normals(tokens * m, rng);
        for row in x.chunks_mut(m) {
            let z = normals(k, rng);
            for (j, v) in row.iter_mut().enumerate() {
                *v = *v * 0.3 + (0..k).map(|i| z[i] * basis[i * m + j]).sum::<f32>();
            }
        }
        x
    }

    fn case(n: usize, m: usize, seed: u64) -> (Matrix, Gram) {
        let mut rng = SplitMix64::new(seed);
        let w = Matrix::from_vec(n, m, normals(n * m, &mut rng)).unwrap();
        let mut gram = Gram::new(m);
        gram.add(&correlated(4 * m, m, &mut rng));
        (w, gram)
    }

    fn output_error(w: &Matrix, plane: &Plane, gram: &Gram) -> f64 {
        let q = QuantizedMatrix::single(plane.clone()).dequantize();
        (0..w.rows)
            .map(|r| {
                let d: Vec<f32> = w.row(r).iter().zip(q.row(r)).map(|(a, b)| a - b).collect();
                gram.quad(&d)
            })
            .sum()
    }

    /// The identity of GPTQ (SKIM specification 4.5, step 6): Σe² is the damped output error.
    #[test]
    fn loss_identity_for_every_shape_of_group() {
        for (m, group, act_order) in [
            (72, None, false),
            (72, Some(32), false),
            (200, Some(64), false),
            (200, Some(64), true),
            (200, Some(24), false),
            (300, Some(192), false),
            (96, None, true),
        ] {
            for bits in [2, 3, 4] {
                let (w, gram) = case(40, m, 7);
                let spec = GridSpec::affine(bits, bits % 2 == 0, group);
                let options = GptqOptions { act_order, ..Default::default() };
                let result = gptq(&w, &gram, spec, options).unwrap();
                let mut damped = gram.clone();
                let mean = gram.diagonal().iter().sum::<f32>() / m as f32;
                for i in 0..m {
                    damped.set(i, i, gram.at(i, i) + result.damp as f32 * mean);
                }
                let want = output_error(&w, &result.plane, &damped);
                approx::assert_relative_eq!(result.loss, want, max_relative = 2e-3);
            }
        }
    }

    #[test]
    fn beats_nearest_on_correlated_inputs() {
        let (w, gram) = case(32, 128, 11);
        for bits in [2, 3, 4] {
            let spec = GridSpec::affine(bits, true, Some(64));
            let ours = gptq(&w, &gram, spec, GptqOptions::default()).unwrap().plane;
            let rtn = nearest(&w, spec, ScaleFit::MinMax).unwrap();
            let (ours, rtn) = (output_error(&w, &ours, &gram), output_error(&w, &rtn, &gram));
            assert!(ours < 0.5 * rtn, "{bits} bits: {ours} against {rtn}");
        }
    }

    #[test]
    fn identity_gram_is_rtn() {
        let (w, _) = case(8, 64, 5);
        let mut gram = Gram::new(64);
        for i in 0..64 {
            gram.set(i, i, 1.0);
        }
        let spec = GridSpec::affine(3, true, None);
        let ours = gptq(&w, &gram, spec, GptqOptions::default()).unwrap().plane;
        // All diagonal entries are equal, so the order is the natural one.
        assert_eq!(ours, nearest(&w, spec, ScaleFit::MinMax).unwrap());
    }

    #[test]
    fn dead_channels_keep_no_weight_and_threads_do_not_matter() {
        let (mut w, mut gram) = case(70, 64, 9);
        for i in 0..64 {
            gram.set(i, 5, 0.0);
        }
        let clean = gptq(&w, &gram, GridSpec::affine(4, true, None), GptqOptions::default());
        (0..70).for_each(|i| w.row_mut(i)[5] = 100.0);
        let spec = GridSpec::affine(4, true, None);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| gptq(&w, &gram, spec, GptqOptions::default()).unwrap().plane)
        };
        let plane = run(1);
        assert_eq!(plane, run(3));
        assert_eq!(plane, clean.unwrap().plane, "what is dropped widens no grid");
        let q = QuantizedMatrix::single(plane).dequantize();
        assert!((0..70).all(|r| q.row(r)[5] == 0.0));
    }

    /// T15 of ResQ's specification, on the grids of that document (scale max/7 and max/127), and
    /// tiers against their own bits.
    #[test]
    fn tiers_have_their_own_bits() {
        let (w, gram) = case(24, 80, 13);
        let factor = GptqFactor::new(&gram, GptqOptions::default()).unwrap();
        let tiers = [(GridSpec::affine(4, true, None), 64), (GridSpec::affine(8, true, None), 16)];
        let (planes, loss) = gptq_tiers(&w, &factor, &tiers, ScaleFit::MinMax).unwrap();
        let bits: Vec<_> = planes.iter().map(|p| (p.cols, p.grid.bits())).collect();
        assert_eq!(bits, [(64, 4), (16, 8)]);
        let mixed = QuantizedMatrix::from_planes((24, 80), planes, 2, None, None).unwrap();
        let error = |q: &QuantizedMatrix| {
            let mut r = w.clone();
            r.data.iter_mut().zip(q.dequantize().data).for_each(|(w, q)| *w -= q);
            gram.trace(&r)
        };
        let uniform = gptq_with(&w, &factor, tiers[0].0, ScaleFit::MinMax).unwrap();
        let nearest = crate::rounding::nearest_tiers(&w, &tiers, ScaleFit::MinMax).unwrap();
        let nearest = QuantizedMatrix::from_planes((24, 80), nearest, 2, None, None).unwrap();
        assert!(error(&mixed) < error(&QuantizedMatrix::single(uniform.plane)));
        assert!(error(&mixed) < error(&nearest));
        assert!(loss >= error(&mixed));
        assert!(gptq_tiers(&w, &factor, &tiers[..1], ScaleFit::MinMax).is_err());
    }

    /// T10: w = [.45, .4, .35] with correlated inputs; feedback finds [0, 1, 0].
    #[test]
    fn golden_three_columns() {
        let w = Matrix::from_vec(1, 3, vec![0.45, 0.4, 0.35]).unwrap();
        let mut gram = Gram::new(3);
        for i in 0..3 {
            for j in 0..3 {
                gram.set(i, j, if i == j { 1.0 } else { 0.8 });
            }
        }
        let (u, damp) = inverse_cholesky(&gram, 0.0).unwrap();
        let grid = GroupGrid { scale: 1.0, zero: 2.0, max_code: 3.0 };
        let factor =
            GptqFactor { order: vec![0, 1, 2], dead: vec![false; 3], u, act_order: true, damp };
        let (spec, fit) = (GridSpec::affine(2, true, None), ScaleFit::MinMax);
        let tiers = [(spec, 3)];
        let task = Task::new(&w, &factor, &tiers, fit);
        let mut row = RoundedRow { codes: vec![0; 3], groups: vec![grid] };
        let mut work = w.data.clone();
        let loss = task.round_block(&mut row, &mut work, 0, &mut [0.0; 3], 0).unwrap();
        assert_eq!(row.codes, [2, 3, 2]);
        approx::assert_relative_eq!(loss, 0.169, max_relative = 1e-5);
    }
}
