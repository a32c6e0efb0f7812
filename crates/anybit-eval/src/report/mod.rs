//! The report of one quantization run, in three forms from one set of values: `report.json` for
//! programs, `report.html` for a reader with a browser, `README.md` as the model card.
//!
//! Nothing here knows the time, the machine or a folder: the same run gives the same bytes.
//! Values that are not finite are `null` in JSON and "not finite" elsewhere.

mod card;
mod facts;
mod frontier;
mod heatmap;
mod page;
mod plots;
mod scaling;
pub mod training;

pub use frontier::{Frontier, FrontierPoint};
pub use heatmap::Attribution;
use serde::Serialize;
use serde_json::Value;

use crate::Result;

/// What one run did and how good its result is.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the model that was quantized.
    pub base_model: String,
    /// Name of the method.
    pub method: String,
    /// What the method does, in one line.
    pub method_summary: String,
    /// Name of the transform before rounding; null for none.
    pub transform: Option<String>,
    /// What the transform does, in one line; empty for none.
    pub transform_summary: String,
    /// Divergence of the transformed model from the original before anything was rounded, in nats
    /// per token.
    pub transform_divergence: Option<f64>,
    /// What stands at the sites of a block.
    pub activations: Vec<ActivationRow>,
    /// The recipe with every default filled in.
    pub recipe_toml: String,
    /// The command that makes the same files again.
    pub command: Option<String>,
    /// Calibration data: sources, tokens, seed; null for methods that need none.
    pub calibration: Value,
    /// Bits of a weight's code, over the packed linears of the blocks.
    pub bits_per_weight_codes: f64,
    /// Bits of a weight with everything that is stored for it.
    pub bits_per_weight_total: f64,
    /// Size of the weight files written.
    pub weight_file_bytes: u64,
    /// Error that the method predicted for the grids that it chose, in its own units; null where
    /// it chose none.
    pub predicted_error: Option<f64>,
    /// Size of the weight files read.
    pub original_file_bytes: u64,
    /// License of the base model, when it is known.
    pub license: Option<String>,
    /// Every packed matrix.
    pub matrices: Vec<MatrixRow>,
    /// Every block.
    pub blocks: Vec<BlockRow>,
    /// The result measured against the original, when it was.
    pub quality: Option<Quality>,
    /// Where the method comes from.
    pub citations: Vec<CitationRow>,
    /// Version of the program.
    pub anybit_version: String,
}

/// One packed matrix.
#[derive(Debug, Clone, Serialize)]
pub struct MatrixRow {
    /// Name of its tensor.
    pub tensor: String,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Bits of a weight's code.
    pub bits: f64,
    /// Bits of a weight with everything that is stored for it.
    pub total_bits: f64,
    /// Bytes of everything stored.
    pub bytes: u64,
    /// `‖W − Q‖² / ‖W‖²`.
    pub relative_error: f64,
    /// `tr((W−Q) H (W−Q)ᵀ) / tr(W H Wᵀ)` on the calibration inputs, when there were any.
    pub output_error: Option<f64>,
}

/// What stands at one kind of site.
#[derive(Debug, Clone, Serialize)]
pub struct ActivationRow {
    /// The site.
    pub site: String,
    /// The online transform, in words; null for none.
    pub transform: Option<String>,
    /// Blocks that have one.
    pub transformed_blocks: usize,
    /// Blocks in all.
    pub blocks: usize,
    /// Mean bits of a code; null where nothing is quantized.
    pub bits: Option<f64>,
    /// Whether the grid is symmetric; null where nothing is quantized.
    pub symmetric: Option<bool>,
}

/// One block of the decoder.
#[derive(Debug, Clone, Serialize)]
pub struct BlockRow {
    /// Index.
    pub block: usize,
    /// `‖x_q − x‖² / ‖x‖²` of the hidden states after it, when they were followed.
    pub hidden_error: Option<f64>,
}

/// The quantized model beside the original, on one text.
#[derive(Debug, Clone, Serialize)]
pub struct Quality {
    /// Name of the text.
    pub text: String,
    /// Which positions were scored: a [`Convention`](crate::Convention)'s name.
    pub convention: String,
    /// Tokens of a window.
    pub ctx: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Perplexity of the original.
    pub original_perplexity: f64,
    /// Perplexity of the quantized model.
    pub quantized_perplexity: f64,
    /// Mean of `KL(original ‖ quantized)` over positions, in nats.
    pub kl_mean: f64,
    /// 95% interval of that mean.
    pub kl_ci95: Option<[f64; 2]>,
    /// Median.
    pub kl_median: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// Share of positions where both find the same token most probable.
    pub top1_agreement: f64,
}

/// A paper that the run rests on.
#[derive(Debug, Clone, Serialize)]
pub struct CitationRow {
    /// What it is cited for.
    pub method: String,
    /// Authors, title, venue.
    pub reference: String,
    /// Link to the proceedings.
    pub link: String,
}

impl Report {
    /// `report.json`.
    pub fn to_json(&self) -> String {
        // No map with keys that are not strings is in here: the conversion cannot fail.
        let value = serde_json::to_value(self).unwrap_or_default();
        format!("{value:#}\n")
    }

    /// `report.html`: one file without scripts and without anything to load.
    ///
    /// # Errors
    /// A plot cannot be drawn or the page not be laid out: a fault of this program.
    pub fn to_html(&self) -> Result<String> {
        page::html(self)
    }

    /// `README.md`, the model card with its front matter.
    pub fn to_model_card(&self) -> String {
        card::card(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const LINEARS: [&str; 7] = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];

    fn matrix(tensor: String, error: f64) -> MatrixRow {
        MatrixRow {
            tensor,
            rows: 576,
            cols: 1536,
            bits: 4.0,
            total_bits: 4.5,
            bytes: 497_664,
            relative_error: error,
            output_error: Some(error / 3.0),
        }
    }

    fn quality() -> Quality {
        Quality {
            text: "wiki.test.raw".into(),
            convention: "hf".into(),
            ctx: 512,
            tokens: 40_880,
            original_perplexity: 30.2,
            quantized_perplexity: 31.75,
            kl_mean: 0.0213,
            kl_ci95: Some([0.0201, 0.0225]),
            kl_median: 0.0113,
            kl_p99: 0.21,
            top1_agreement: 0.912,
        }
    }

    pub(super) fn report(layers: usize, error: impl Fn(usize) -> f64) -> Report {
        let linear = |layer: usize, kind: &str| {
            matrix(format!("model.layers.{layer}.{kind}.weight"), error(layer))
        };
        let block = |b: usize| BlockRow { block: b, hidden_error: Some(error(b) * (b + 1) as f64) };
        Report {
            base_model: "tiny".into(),
            transform: None,
            transform_summary: String::new(),
            transform_divergence: None,
            activations: Vec::new(),
            method: "gptq".into(),
            method_summary: "error feedback in the metric of the inputs".into(),
            recipe_toml: "method = \"gptq\"\nbits = 4\n".into(),
            command: Some("anybit quantize tiny tiny-4bit --recipe recipe.toml".into()),
            calibration: json!({
                "sources": [{"name": "builtin", "tokens": 9000}],
                "tokens": 8192,
                "tokens_asked_for": 8192,
                "seed": 0,
            }),
            bits_per_weight_codes: 4.0,
            bits_per_weight_total: 4.5,
            weight_file_bytes: 98_362_432,
            predicted_error: Some(0.02),
            original_file_bytes: 269_060_552,
            license: Some("apache-2.0".into()),
            matrices: (0..layers).flat_map(|l| LINEARS.map(|kind| linear(l, kind))).collect(),
            blocks: (0..layers).map(block).collect(),
            quality: Some(quality()),
            citations: vec![CitationRow {
                method: "GPTQ".into(),
                reference: "E. Frantar et al. GPTQ. ICLR 2023".into(),
                link: "https://openreview.net/forum?id=tcbBPnfwxS&page=1".into(),
            }],
            anybit_version: "0.1.0".into(),
        }
    }

    fn plots(html: &str) -> usize {
        html.matches("<svg").count()
    }

    #[test]
    fn json_has_the_keys() {
        let mut report = report(2, |_| 0.01);
        report.matrices[0].relative_error = f64::NAN;
        let text = report.to_json();
        assert!(text.ends_with("}\n"));
        let value: Value = serde_json::from_str(&text).unwrap();
        for key in ["base_model", "method", "recipe_toml", "calibration", "quality", "citations"] {
            assert!(!value[key].is_null(), "{key}");
        }
        assert_eq!(value["weight_file_bytes"], 98_362_432);
        assert_eq!(value["matrices"].as_array().unwrap().len(), 14);
        assert!(value["matrices"][0]["relative_error"].is_null());
        assert_eq!(value["blocks"][1]["block"], 1);
        assert_eq!(value["quality"]["kl_ci95"][1], 0.0225);
    }

    #[test]
    fn the_page_stands_alone_and_is_the_same_each_time() {
        let report = report(30, |l| 0.002 * (1 + l % 5) as f64);
        let html = report.to_html().unwrap();
        assert_eq!(html, report.to_html().unwrap());
        assert_eq!(report.to_json(), report.to_json());
        assert_eq!(report.to_model_card(), report.to_model_card());
        assert_eq!(plots(&html), 3);
        assert_eq!(html.matches("http").count(), 1, "only the citation links out");
        let link = "href=\"https://openreview.net/forum?id=tcbBPnfwxS&amp;page=1\"";
        assert!(html.contains(link));
        for part in ["30.20", "31.75", "hf convention", "0.02130", "91.20%", "2.74", "8192"] {
            assert!(html.contains(part), "{part}");
        }
        assert!(!html.contains("<script") && !html.contains("NaN"));
        assert!(html.ends_with("</html>\n"));
    }

    #[test]
    fn hostile_names_are_escaped() {
        let mut report = report(2, |_| 0.01);
        report.matrices[3].tensor = "model.layers.0.<script>alert(1)</script>.weight".into();
        report.citations[0].link = "javascript:alert(1)".into();
        report.base_model = "\"><script>".into();
        report.recipe_toml = "</pre><script>".into();
        let html = report.to_html().unwrap();
        assert!(!html.contains("<script") && !html.contains("href=\"javascript"));
        assert!(html.contains("&lt;script&gt;alert(1)"));
    }

    #[test]
    fn odd_values_are_drawn_or_named() {
        let none = report(0, |_| 0.0).to_html().unwrap();
        assert_eq!(plots(&none), 0);
        assert_eq!(none.matches("Nothing to draw").count(), 3);

        let one = report(1, |_| 0.01).to_html().unwrap();
        assert_eq!(plots(&one), 3);
        assert!(one.contains("<circle"));

        let zeros = report(300, |_| 0.0).to_html().unwrap();
        assert_eq!(plots(&zeros), 3);
        assert!(zeros.contains("lower edge: 4200") && zeros.contains("lower edge: 300"));

        let mut broken = report(3, |l| [0.0, f64::NAN, 1e300][l]);
        if let Some(q) = &mut broken.quality {
            q.quantized_perplexity = f64::INFINITY;
            q.kl_ci95 = None;
        }
        let html = broken.to_html().unwrap();
        assert_eq!(plots(&html), 3);
        assert!(!html.contains("NaN") && html.contains("not finite: 14"));
        assert!(!broken.to_model_card().contains("NaN"));
    }

    #[test]
    fn what_was_not_measured_is_said() {
        let mut report = report(2, |_| 0.01);
        report.quality = None;
        report.command = None;
        report.calibration = Value::Null;
        report.citations.clear();
        report.matrices.iter_mut().for_each(|m| m.output_error = None);
        report.blocks.iter_mut().for_each(|b| b.hidden_error = None);
        let html = report.to_html().unwrap();
        assert_eq!(plots(&html), 2);
        assert!(html.contains("Output errors were not measured"));
        assert!(html.contains("was not measured in this run"));
        assert_eq!(html.matches("http").count(), 0);
    }
}
