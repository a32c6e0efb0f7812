//! Round to nearest: `u = clamp(round(w/s + z))` for each weight by itself. The baseline that
//! every other method has to beat; needs no data.

use anybit_core::QuantizedMatrix;
use anybit_core::rounding::nearest_tiers;

use super::{Citation, Method, NoOptions, Place, Rounding, read_options, whole_bits};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Needs, Site, SiteError, SiteRounding};
use crate::tables::Allocation;

/// Round to nearest.
pub struct Rtn;

impl Method for Rtn {
    fn name(&self) -> &'static str {
        "rtn"
    }

    fn summary(&self) -> &'static str {
        "round to nearest: no data needed, the baseline"
    }

    fn citation(&self) -> Option<Citation> {
        None
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        read_options::<NoOptions>(recipe)?;
        whole_bits(recipe)?;
        Ok(Box::new(Nearest))
    }
}

/// Rounds every weight by itself.
pub struct Nearest;

impl Rounding for Nearest {
    fn needs(&self) -> Needs {
        Needs { tiers: true, ..Default::default() }
    }

    fn options(&self) -> toml::Table {
        toml::Table::new()
    }

    fn folds(&self) -> bool {
        false
    }

    fn layout(&self, place: Place<'_>) -> MatrixLayout {
        MatrixLayout::tiered(&place.settings.tiers(place.shape.1), place.shape.0)
    }

    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError> {
        SiteRounding::each(site, |l| {
            let tiers = l.settings.tiers(l.weights.cols);
            let planes = nearest_tiers(l.weights, &tiers, l.settings.scale)?;
            let shape = (l.weights.rows, l.weights.cols);
            QuantizedMatrix::from_planes(shape, planes, tiers.len(), None, None)
        })
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        None
    }
}
