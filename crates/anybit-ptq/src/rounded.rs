//! A site rounded by a method: packed matrices with what was measured of them, and the weights
//! that the block computes with from then on.

use std::collections::BTreeMap;
use std::sync::Arc;

use anybit_core::{Gram, GridSpec, Matrix, QuantizedMatrix};
use anybit_io::native::{fold_factors, relative_error, scale_columns, squared_norm};
use anybit_runtime::DecoderLayer;

use crate::methods::Rounding;
use crate::plan::PlannedMatrix;
use crate::sensitivity::BlockSensitivity;
use crate::site::{Site, SiteKind, SiteLinear, Statistics};
use crate::{Plan, PtqError, Result};

/// A packed matrix with what was measured of it.
pub struct Rounded {
    /// Name of its tensor.
    pub tensor: String,
    /// The codes.
    pub matrix: QuantizedMatrix,
    /// `‖W − Q‖² / ‖W‖²`.
    pub relative_error: f64,
    /// The same in the metric of the inputs.
    pub output_error: Option<f64>,
    /// `‖Q‖²` as decoded, without factors that a norm took up.
    pub decoded_norm: f64,
}

/// A norm that took up factors of its channels.
pub struct FoldedNorm {
    /// Name of its tensor.
    pub tensor: String,
    /// Its weight, factors included.
    pub weight: Vec<f32>,
    /// The linears that were divided by the factors.
    pub consumers: Vec<String>,
}

/// What rounding a site changes in its block.
#[derive(Default)]
pub struct RoundedSite {
    /// The packed matrices.
    pub rounded: Vec<Rounded>,
    /// The norm, if it changed.
    pub norm: Option<FoldedNorm>,
    decoded: Vec<Matrix>,
    kind: Option<SiteKind>,
}

impl RoundedSite {
    /// Puts the decoded weights in the place of the originals.
    ///
    /// # Errors
    /// A tensor that is no linear of a block.
    pub fn install(&mut self, layer: &mut DecoderLayer) -> Result<()> {
        for (rounded, decoded) in self.rounded.iter().zip(self.decoded.drain(..)) {
            linear_of(layer, &rounded.tensor)?.set_weight(Arc::new(decoded));
        }
        if let (Some(norm), Some(kind)) = (&self.norm, self.kind) {
            match kind {
                SiteKind::AttnInput => layer.attention_norm.clone_from(&norm.weight),
                _ => layer.mlp_norm.clone_from(&norm.weight),
            }
        }
        Ok(())
    }
}

/// The planned linears of a site of block `index`, with their original weights.
pub struct SiteWeights<'a> {
    planned: Vec<(&'static str, &'a PlannedMatrix)>,
    originals: Vec<Matrix>,
    /// What is rounded in the place of an original: it with its rows clipped.
    clipped: Vec<Option<Matrix>>,
}

/// Clip factors of the rows of a block's linears, `[rows, 2]`, by name below `model.layers.N.`:
/// of the largest and of the smallest weight of a row.
pub type Clips = BTreeMap<String, Matrix>;

/// Clips what shares a scale, `group` columns of a row, to its range: what was trained with.
fn clip_rows(weights: &Matrix, clips: &Matrix, group: usize) -> Matrix {
    let mut clipped = weights.clone();
    let rows = clipped.data.chunks_exact_mut(weights.cols.max(1));
    for (row, clip) in rows.zip(clips.data.chunks_exact(2)) {
        for part in row.chunks_mut(group) {
            let (lo, hi) = part.iter().fold((0f32, 0f32), |(lo, hi), w| (lo.min(*w), hi.max(*w)));
            part.iter_mut().for_each(|w| *w = w.clamp(lo * clip[1], hi * clip[0]));
        }
    }
    clipped
}

impl<'a> SiteWeights<'a> {
    /// Reads them from `layer`.
    ///
    /// # Errors
    /// A tensor that is no linear of a block.
    pub fn read(
        plan: &'a Plan,
        index: usize,
        kind: SiteKind,
        layer: &mut DecoderLayer,
        clips: &Clips,
    ) -> Result<Self> {
        let (mut planned, mut originals, mut clipped) = (Vec::new(), Vec::new(), Vec::new());
        for name in kind.linears() {
            let tensor = format!("model.layers.{index}.{name}.weight");
            let Some(matrix) = plan.matrix(&tensor) else { continue };
            let original = Matrix::from_rows(&*linear_of(layer, &tensor)?.weight);
            // Clips were fitted for grids that end at the extremes.
            let grid = matrix.layout.planes[0].0;
            let affine = matches!(grid, GridSpec::Uniform { .. } | GridSpec::HalfInteger { .. });
            let clip = clips.get(*name).filter(|_| affine);
            let group = grid.group_len(matrix.cols);
            clipped.push(clip.map(|clip| clip_rows(&original, clip, group)));
            originals.push(original);
            planned.push((*name, matrix));
        }
        Ok(Self { planned, originals, clipped })
    }

    /// Whether nothing of the site is planned.
    pub fn is_empty(&self) -> bool {
        self.planned.is_empty()
    }

    /// Tensors of the linears, in order.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.planned.iter().map(|(_, m)| m.tensor.as_str())
    }

    /// What a method sees.
    pub fn site<'b>(
        &'b self,
        kind: SiteKind,
        statistics: &'b Statistics,
        sensitivity: Option<&'b BlockSensitivity>,
    ) -> Site<'b> {
        let targets = self.originals.iter().zip(&self.clipped);
        let targets = targets.map(|(original, clipped)| clipped.as_ref().unwrap_or(original));
        let linears =
            self.planned.iter().zip(targets).map(|((name, planned), weights)| SiteLinear {
                name,
                weights,
                settings: planned.settings,
                layout: &planned.layout,
                fisher: sensitivity.and_then(|s| s.fisher.get(*name)),
                row_factors: None,
            });
        let folds = self.planned.iter().all(|(_, m)| m.folds);
        Site { kind, folds, linears: linears.collect(), statistics }
    }

    /// Names the linear that a method failed on.
    pub fn failed(&self, (index, source): (usize, anybit_core::CoreError)) -> PtqError {
        let tensor = self.planned.get(index).map_or(String::new(), |(_, p)| p.tensor.clone());
        PtqError::Tensor { tensor, source }
    }
}

/// Rounds the planned linears of a site.
///
/// # Errors
/// The linear that cannot be rounded, by its name.
pub fn round_site(
    rounding: &dyn Rounding,
    (plan, index, kind): (&Plan, usize, SiteKind),
    layer: &mut DecoderLayer,
    statistics: &Statistics,
    (sensitivity, clips): (Option<&BlockSensitivity>, &Clips),
) -> Result<RoundedSite> {
    let weights = SiteWeights::read(plan, index, kind, layer, clips)?;
    if weights.is_empty() {
        return Ok(RoundedSite::default());
    }
    let site = weights.site(kind, statistics, sensitivity);
    let done = rounding.round(&site).map_err(|e| weights.failed(e))?;
    let norm = match (done.fold, kind.norm()) {
        (Some(fold), Some(name)) => {
            let original = match kind {
                SiteKind::AttnInput => &layer.attention_norm,
                _ => &layer.mlp_norm,
            };
            let weight: Vec<f32> = original.iter().zip(&fold).map(|(g, a)| g * a).collect();
            let factors = fold_factors(&weight, original);
            let consumers = weights.tensors().map(str::to_owned).collect();
            let tensor = format!("model.layers.{index}.{name}");
            Some((FoldedNorm { tensor, weight, consumers }, factors))
        }
        _ => None,
    };
    let factors = norm.as_ref().map(|(_, factors)| &factors[..]);
    let measured = weights.planned.iter().zip(&weights.originals).zip(done.matrices);
    let gram = statistics.gram.as_ref();
    let (rounded, decoded) = measured
        .map(|(((_, planned), original), matrix)| {
            measure(&planned.tensor, original, matrix, gram, factors)
        })
        .unzip();
    Ok(RoundedSite { rounded, norm: norm.map(|n| n.0), decoded, kind: Some(kind) })
}

/// Measures a packed matrix against its original; `factors` are what the norm before took up.
pub fn measure(
    tensor: &str,
    original: &Matrix,
    matrix: QuantizedMatrix,
    gram: Option<&Gram>,
    factors: Option<&[f32]>,
) -> (Rounded, Matrix) {
    let decoded = matrix.dequantize();
    let decoded_norm = squared_norm(&decoded);
    let effective = factors.map(|factors| scale_columns(&decoded, factors));
    let effective = effective.as_ref().unwrap_or(&decoded);
    let output_error = gram.map(|gram| {
        let mut difference = original.clone();
        difference.data.iter_mut().zip(&effective.data).for_each(|(w, q)| *w -= q);
        gram.trace(&difference) / gram.trace(original).max(f64::MIN_POSITIVE)
    });
    let relative_error = relative_error(original, effective);
    let tensor = tensor.to_owned();
    (Rounded { tensor, relative_error, output_error, decoded_norm, matrix }, decoded)
}

fn linear_of<'a>(
    layer: &'a mut DecoderLayer,
    tensor: &str,
) -> Result<&'a mut anybit_runtime::Linear> {
    let name = tensor.splitn(4, '.').nth(3).and_then(|n| n.strip_suffix(".weight"));
    name.and_then(|n| layer.linear_mut(n))
        .ok_or_else(|| PtqError::Recipe(format!("{tensor} is no linear of a block")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_clipped_group_by_group() {
        let weights = Matrix { rows: 1, cols: 5, data: vec![4.0, -2.0, 1.0, -8.0, 0.5] };
        let clips = Matrix { rows: 1, cols: 2, data: vec![0.5, 0.75] };
        assert_eq!(clip_rows(&weights, &clips, 2).data, [2.0, -1.5, 0.5, -6.0, 0.25]);
        assert_eq!(clip_rows(&weights, &clips, 128).data, [2.0, -2.0, 1.0, -6.0, 0.5]);
    }
}
