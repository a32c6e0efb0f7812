//! AWQ (Lin et al., MLSys 2024): input channels that carry large activations are scaled up before
//! rounding and down again after it,
//!
//! ```text
//! q = Q(W diag(s)) diag(s)⁻¹     s_j = m_j^ρ / √(max s · min s)     m_j = mean |x_j|
//! ρ  of 0, 1/20, …, 19/20: the least Σ over the site's linears of tr(R H Rᵀ), R = W − q
//! clip: per group of columns, the range shrunk to the least output error r_g H_gg r_gᵀ
//! ```
//!
//! The reference measures the output of the block; the output of the site's linears is measured
//! here, exactly, through `H = XᵀX` of all calibration tokens instead of a sample. Queries and keys
//! are not clipped, as in the reference. Behind a norm the scales are folded into it; elsewhere
//! they are stored as column scales, so that attention outputs and down-projections are scaled
//! whatever the shape of the linear before.

use anybit_core::{CoreError, Gram, GridSpec, GroupGrid, Plane, QuantizedMatrix, ScaleFit};
use anybit_io::native::scale_columns;
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Citation, Method, Place, Rounding, options_table, read_options, whole_bits};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Inputs, Needs, Site, SiteError, SiteLinear, SiteRounding};
use crate::tables::Allocation;

/// AWQ.
pub struct Awq;

/// Its options; the defaults are the reference's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Exponents tried, from 0 up to 1 exclusive; 1 leaves the weights unscaled.
    pub grid: usize,
    /// Search for clipping ranges.
    pub clip: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { grid: 20, clip: true }
    }
}

/// Steps of the clipping range, and how many of them are tried: down to half of the range.
const CLIP_STEPS: (usize, usize) = (20, 10);

impl Method for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn summary(&self) -> &'static str {
        "round to nearest after scaling up the channels that carry large activations"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "J. Lin, J. Tang, H. Tang, S. Yang, W.-M. Chen, W.-C. Wang, G. Xiao, X. \
                        Dang, C. Gan, S. Han. AWQ: Activation-aware Weight Quantization for \
                        On-Device LLM Compression and Acceleration. MLSys 2024 (arXiv 2306.00978)",
            link: "https://proceedings.mlsys.org/paper_files/paper/2024/hash/42a452cbafa9dd64e9ba4aa95cc1ef21-Abstract-Conference.html",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        let options: Options = read_options(recipe)?;
        if !(1..=1000).contains(&options.grid) {
            return Err(format!("grid is {}: 1 to 1000 exponents", options.grid));
        }
        whole_bits(recipe)?;
        Ok(Box::new(ActivationAware { options }))
    }
}

struct ActivationAware {
    options: Options,
}

impl Rounding for ActivationAware {
    fn needs(&self) -> Needs {
        Needs { gram: true, magnitudes: true, inputs: Inputs::Quantized, ..Default::default() }
    }

    fn options(&self) -> toml::Table {
        options_table(&self.options)
    }

    fn folds(&self) -> bool {
        true
    }

    fn layout(&self, place: Place<'_>) -> MatrixLayout {
        let layout = MatrixLayout::single(place.settings.grid, place.shape.0);
        MatrixLayout { column_scale: !place.folds, ..layout }
    }

    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError> {
        let gram = site.gram()?;
        let ones = vec![1.0; gram.size()];
        let magnitudes = site.statistics.magnitudes.as_ref().unwrap_or(&ones);
        if site.folds {
            let linears: Vec<&SiteLinear<'_>> = site.linears.iter().collect();
            let scale = self.search(&linears, gram, magnitudes)?;
            let mut matrices = Vec::new();
            for (i, linear) in site.linears.iter().enumerate() {
                let matrix = self.round_scaled(linear, gram, &scale);
                matrices.push(matrix.map_err(|e| (i, e))?);
            }
            let fold = scale.iter().map(|s| 1.0 / s).collect();
            return Ok(SiteRounding { matrices, fold: Some(fold) });
        }
        let mut matrices = Vec::new();
        for (i, linear) in site.linears.iter().enumerate() {
            let scale = self.search(&[linear], gram, magnitudes).map_err(|(_, e)| (i, e))?;
            // What is stored is the inverse, as f16: the scale that it undoes.
            let stored: Vec<f16> = scale.iter().map(|s| f16::from_f32(1.0 / s)).collect();
            let representable = |s: &f16| s.is_finite() && *s != f16::ZERO;
            if let Some(at) = stored.iter().position(|s| !representable(s)) {
                let (what, value) = ("column scale", (1.0 / scale[at]).to_string());
                return Err((i, CoreError::NotFinite { what, row: 0, col: at, value }));
            }
            let scale: Vec<f32> = stored.iter().map(|s| 1.0 / s.to_f32()).collect();
            let mut matrix = self.round_scaled(linear, gram, &scale).map_err(|e| (i, e))?;
            matrix.column_scale = Some(stored);
            matrices.push(matrix);
        }
        Ok(SiteRounding::plain(matrices))
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        None
    }
}

impl ActivationAware {
    /// The scales with the least output error, without clipping.
    fn search(
        &self,
        linears: &[&SiteLinear<'_>],
        gram: &Gram,
        magnitudes: &[f32],
    ) -> Result<Vec<f32>, SiteError> {
        let mut best = (f64::INFINITY, vec![1.0; magnitudes.len()]);
        for step in 0..self.options.grid {
            let scale = scales(magnitudes, step as f32 / self.options.grid as f32);
            let mut error = 0.0;
            for (i, linear) in linears.iter().enumerate() {
                let scaled = scale_columns(linear.weights, &scale);
                let plane = anybit_core::rounding::nearest(
                    &scaled,
                    linear.settings.grid,
                    linear.settings.scale,
                );
                let plane = plane.map_err(|e| (i, e))?;
                let mut residual = QuantizedMatrix::single(plane).dequantize();
                for (q, w) in residual
                    .data
                    .chunks_mut(scale.len())
                    .zip(linear.weights.data.chunks(scale.len()))
                {
                    q.iter_mut().zip(w).zip(&scale).for_each(|((q, w), s)| *q = w - *q / s);
                }
                error += gram.trace(&residual);
            }
            if error < best.0 {
                best = (error, scale);
            }
        }
        Ok(best.1)
    }

    /// Rounds `W diag(s)`, with clipping if wanted.
    fn round_scaled(
        &self,
        linear: &SiteLinear<'_>,
        gram: &Gram,
        scale: &[f32],
    ) -> Result<QuantizedMatrix, CoreError> {
        let weights = scale_columns(linear.weights, scale);
        let attends = linear.name.ends_with("q_proj") || linear.name.ends_with("k_proj");
        let steps = if self.options.clip && !attends { CLIP_STEPS.1 } else { 1 };
        let grid = linear.settings.grid;
        let group_len = grid.group_len(weights.cols);
        let mut plane = Plane::empty(grid, weights.rows, weights.cols)?;
        let metric = GroupMetric { gram, scale };
        plane.rows_mut().enumerate().try_for_each(|(row, mut out)| {
            let mut codes = Vec::with_capacity(weights.cols);
            let mut groups = Vec::new();
            for (g, w) in weights.row(row).chunks(group_len).enumerate() {
                let fitted = metric.clip(grid, linear.settings.scale, w, g * group_len, steps);
                let fitted = fitted.map_err(|e| match e {
                    CoreError::ScaleOverflow { magnitude, .. } => {
                        CoreError::ScaleOverflow { row, group: g, magnitude }
                    }
                    other => other,
                })?;
                codes.extend(w.iter().map(|w| fitted.encode(*w)));
                groups.push(fitted);
            }
            out.set_affine(&codes, &groups);
            Ok::<(), CoreError>(())
        })?;
        Ok(QuantizedMatrix::single(plane))
    }
}

/// `s` for one exponent, around 1 in the geometric mean of its extremes.
fn scales(magnitudes: &[f32], exponent: f32) -> Vec<f32> {
    let raw: Vec<f32> = magnitudes.iter().map(|m| m.powf(exponent).max(1e-4)).collect();
    let (low, high) = raw.iter().fold((f32::MAX, 0f32), |(l, h), s| (l.min(*s), h.max(*s)));
    let middle = (low * high).sqrt();
    raw.into_iter().map(|s| s / middle).collect()
}

/// Output error of one group of columns.
struct GroupMetric<'a> {
    gram: &'a Gram,
    scale: &'a [f32],
}

impl GroupMetric<'_> {
    /// The grid of a group, its range shrunk to where the output error is least.
    fn clip(
        &self,
        grid: GridSpec,
        fit: ScaleFit,
        w: &[f32],
        start: usize,
        steps: usize,
    ) -> Result<GroupGrid, CoreError> {
        let mut best = (f64::INFINITY, GroupGrid::fit(grid, w, fit)?);
        if steps < 2 {
            return Ok(best.1);
        }
        let bound = w.iter().fold(0f32, |m, w| m.max(w.abs()));
        let mut residual = vec![0f32; w.len()];
        for step in 0..steps {
            let limit = bound * (1.0 - step as f32 / CLIP_STEPS.0 as f32);
            let clipped: Vec<f32> = w.iter().map(|w| w.clamp(-limit, limit)).collect();
            let fitted = GroupGrid::fit(grid, &clipped, fit)?;
            for (j, (r, w)) in residual.iter_mut().zip(w).enumerate() {
                *r = (w - fitted.decode(fitted.encode(*w))) / self.scale[start + j];
            }
            let error = self.gram.quad_at(start, &residual);
            if error < best.0 {
                best = (error, fitted);
            }
        }
        Ok(best.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LinearSettings;
    use crate::site::{SiteKind, Statistics};
    use anybit_core::Matrix;
    use anybit_core::rng::SplitMix64;

    /// One channel with large activations: scaling it up lowers the output error, and what the
    /// norm takes up is the inverse.
    #[test]
    fn salient_channels_are_protected() {
        let mut rng = SplitMix64::new(3);
        let mut normals = |n: usize| (0..n).map(|_| rng.normal() as f32).collect::<Vec<_>>();
        let weights = Matrix::from_vec(24, 64, normals(24 * 64)).unwrap();
        let mut x = normals(400 * 64);
        x.chunks_mut(64).for_each(|x| x[7] *= 30.0);
        let mut gram = Gram::new(64);
        gram.add(&x);
        let mut magnitudes = vec![0f32; 64];
        for x in x.chunks(64) {
            magnitudes.iter_mut().zip(x).for_each(|(m, x)| *m += x.abs() / 400.0);
        }
        let grid = GridSpec::affine(3, true, Some(32));
        let settings = LinearSettings {
            grid,
            scale: ScaleFit::MinMax,
            act_order: true,
            damp: 0.01,
            tier: None,
        };
        let layout = MatrixLayout::single(grid, 24);
        let statistics = Statistics {
            gram: Some(gram.clone()),
            magnitudes: Some(magnitudes),
            ..Default::default()
        };
        let site = |folds| Site {
            kind: SiteKind::MlpInput,
            folds,
            linears: vec![SiteLinear {
                name: "mlp.up_proj",
                weights: &weights,
                settings,
                layout: &layout,
                fisher: None,
                row_factors: None,
            }],
            statistics: &statistics,
        };
        let error = |options: Options, folds: bool| {
            let done = ActivationAware { options }.round(&site(folds)).unwrap();
            let mut q = done.matrices[0].dequantize();
            if let Some(fold) = done.fold {
                // The channel is scaled up, so its norm is scaled down.
                assert!(fold[7] < 0.8 * fold[8], "{} and {}", fold[7], fold[8]);
                q = scale_columns(&q, &fold);
            }
            q.data.iter_mut().zip(&weights.data).for_each(|(q, w)| *q = w - *q);
            gram.trace(&q)
        };
        let none = error(Options { grid: 1, clip: false }, false);
        let scaled = error(Options { clip: false, ..Default::default() }, true);
        let clipped = error(Options::default(), true);
        assert!(scaled < 0.5 * none, "{scaled} against {none}");
        assert!(clipped < scaled, "{clipped} against {scaled}");
        approx::assert_relative_eq!(clipped, error(Options::default(), false), max_relative = 0.05);
    }
}
