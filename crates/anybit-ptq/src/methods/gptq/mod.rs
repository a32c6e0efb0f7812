//! GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023): columns are rounded one after another
//! and each error is spread over the columns that follow, in the metric `H = XᵀX` of the inputs.
//! The arithmetic is in [`anybit_core::rounding::gptq`](mod@anybit_core::rounding::gptq); here
//! the factor of `H` is shared by the linears of a site.

use anybit_core::QuantizedMatrix;
use anybit_core::rounding::gptq::{GptqFactor, GptqOptions, gptq_tiers};

use super::{Citation, Method, NoOptions, Place, Rounding, read_options, whole_bits};
use crate::Recipe;
use crate::layout::MatrixLayout;
use crate::site::{Needs, Site, SiteError, SiteRounding};
use crate::tables::Allocation;

/// GPTQ.
pub struct Gptq;

impl Method for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn summary(&self) -> &'static str {
        "error feedback in the metric of the inputs"
    }

    fn citation(&self) -> Option<Citation> {
        Some(Citation {
            reference: "E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh. GPTQ: Accurate \
                        Post-Training Quantization for Generative Pre-trained Transformers. \
                        ICLR 2023 (arXiv 2210.17323)",
            link: "https://openreview.net/forum?id=tcbBPnfwxS",
        })
    }

    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String> {
        read_options::<NoOptions>(recipe)?;
        whole_bits(recipe)?;
        Ok(Box::new(Feedback))
    }
}

struct Feedback;

impl Rounding for Feedback {
    fn needs(&self) -> Needs {
        Needs { gram: true, tiers: true, ..Default::default() }
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
        let gram = site.gram()?;
        let Some(first) = site.linears.first() else {
            return Ok(SiteRounding::plain(Vec::new()));
        };
        // Damping and order are settings of the whole recipe, so one factor serves the site.
        let options = GptqOptions {
            damp: first.settings.damp,
            act_order: first.settings.act_order,
            fit: first.settings.scale,
        };
        let factor = GptqFactor::new(gram, options).map_err(|e| (0, e))?;
        SiteRounding::each(site, |l| {
            let tiers = l.settings.tiers(l.weights.cols);
            let (planes, _) = gptq_tiers(l.weights, &factor, &tiers, l.settings.scale)?;
            let shape = (l.weights.rows, l.weights.cols);
            QuantizedMatrix::from_planes(shape, planes, tiers.len(), None, None)
        })
    }

    fn allocation(&self) -> Option<&dyn Allocation> {
        None
    }
}
