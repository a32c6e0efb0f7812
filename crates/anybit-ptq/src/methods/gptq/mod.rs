//! GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, ICLR 2023): columns are rounded one after another
//! and each error is spread over the columns that follow, in the metric `H = XᵀX` of the inputs.
//! The arithmetic is in [`anybit_core::rounding::gptq`](mod@anybit_core::rounding::gptq); here
//! the factor of `H` is shared by the linears of a site.

use anybit_core::rounding::gptq::{GptqFactor, GptqOptions, gptq_with};
use anybit_core::{CoreError, Gram, QuantizedMatrix};

use super::{Citation, Method, SiteLinear};

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

    fn needs_gram(&self) -> bool {
        true
    }

    fn round(
        &self,
        linears: &[SiteLinear<'_>],
        gram: Option<&Gram>,
    ) -> Result<Vec<QuantizedMatrix>, (usize, CoreError)> {
        let missing = || CoreError::Shape {
            what: "Gram matrix of the inputs",
            expected: "one".into(),
            found: "none".into(),
        };
        let gram = gram.ok_or_else(|| (0, missing()))?;
        let Some(first) = linears.first() else { return Ok(Vec::new()) };
        // Damping and order are settings of the whole recipe, so one factor serves the site.
        let options = GptqOptions {
            damp: first.settings.damp,
            act_order: first.settings.act_order,
            fit: first.settings.scale,
        };
        let factor = GptqFactor::new(gram, options).map_err(|e| (0, e))?;
        let round = |(i, l): (usize, &SiteLinear<'_>)| {
            let result = gptq_with(l.weights, &factor, l.settings.grid, l.settings.scale);
            result.map(|r| QuantizedMatrix::single(r.plane)).map_err(|e| (i, e))
        };
        linears.iter().enumerate().map(round).collect()
    }
}
