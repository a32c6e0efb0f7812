//! Round to nearest: `u = clamp(round(w/s + z))` for each weight by itself. The baseline that
//! every other method has to beat; needs no data.

use anybit_core::rounding::nearest;
use anybit_core::{CoreError, Gram, QuantizedMatrix};

use super::{Citation, Method, SiteLinear};

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

    fn needs_gram(&self) -> bool {
        false
    }

    fn round(
        &self,
        linears: &[SiteLinear<'_>],
        _gram: Option<&Gram>,
    ) -> Result<Vec<QuantizedMatrix>, (usize, CoreError)> {
        let round = |(i, l): (usize, &SiteLinear<'_>)| {
            let plane = nearest(l.weights, l.settings.grid, l.settings.scale);
            plane.map(QuantizedMatrix::single).map_err(|e| (i, e))
        };
        linears.iter().enumerate().map(round).collect()
    }
}
