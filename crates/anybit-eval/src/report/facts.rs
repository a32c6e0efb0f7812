//! Numbers and facts as text, the same in the page and in the model card.

use serde_json::Value;

use super::{ActivationRow, Quality, Report};

/// Where there is nothing to say.
pub(super) const NONE: &str = "–";

/// A line of the headline table.
pub(super) struct Fact {
    pub(super) label: String,
    pub(super) before: String,
    pub(super) after: String,
}

impl Fact {
    fn new(label: impl Into<String>, before: impl Into<String>, after: impl Into<String>) -> Self {
        Self { label: label.into(), before: before.into(), after: after.into() }
    }
}

/// Sizes, and quality when it was measured: original beside quantized.
pub(super) fn headline(report: &Report) -> Vec<Fact> {
    let (before, after) = (report.original_file_bytes, report.weight_file_bytes);
    let ratio = match before > 0 && after > 0 {
        true => format!("{:.2}× smaller", before as f64 / after as f64),
        false => NONE.into(),
    };
    let codes = number(report.bits_per_weight_codes);
    let total = number(report.bits_per_weight_total);
    let mut facts = vec![
        Fact::new("weight files", bytes(before), bytes(after)),
        Fact::new("compression ratio", NONE, ratio),
        Fact::new("bits per weight of the blocks' linears, codes alone", NONE, codes),
        Fact::new("the same with everything that is stored for them", NONE, total),
    ];
    if let Some(q) = &report.quality {
        facts.extend(quality(q));
    }
    facts
}

/// Site, transform, bits and grid of a row.
pub(super) fn activation(row: &ActivationRow) -> [String; 4] {
    let grid = match row.symmetric {
        None => NONE,
        Some(true) => "symmetric",
        Some(false) => "asymmetric",
    };
    [
        row.site.replace('_', " "),
        match &row.transform {
            None => NONE.into(),
            Some(text) if row.transformed_blocks == row.blocks => text.clone(),
            Some(text) => {
                format!("{text}, in {} of {} blocks", row.transformed_blocks, row.blocks)
            }
        },
        row.bits.map_or("unquantized".into(), number),
        grid.into(),
    ]
}

fn quality(q: &Quality) -> [Fact; 4] {
    let perplexity = format!(
        "perplexity on {} ({} convention, windows of {}, {} tokens scored)",
        q.text,
        q.convention,
        q.ctx,
        grouped(q.tokens as u64)
    );
    let mean = match q.kl_ci95 {
        Some([low, high]) => {
            format!("{} (95% interval {} to {})", number(q.kl_mean), number(low), number(high))
        }
        None => number(q.kl_mean),
    };
    let spread = format!("{}; {}", number(q.kl_median), number(q.kl_p99));
    let [original, quantized] = [q.original_perplexity, q.quantized_perplexity].map(number);
    [
        Fact::new(perplexity, original, quantized),
        Fact::new("KL divergence from the original, nats per token, mean", "0", mean),
        Fact::new("its median; its 99th percentile", "0; 0", spread),
        Fact::new("same most probable token", "100%", percent(q.top1_agreement)),
    ]
}

/// What is said of the calibration data: pairs of name and value; none when there was no data.
pub(super) fn calibration(value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Null => Vec::new(),
        Value::Object(map) => {
            map.iter().map(|(name, v)| (name.replace('_', " "), plain(v))).collect()
        }
        other => vec![("data".into(), plain(other))],
    }
}

fn plain(value: &Value) -> String {
    let join = |parts: Vec<String>, by: &str| parts.join(by);
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => join(items.iter().map(plain).collect(), "; "),
        Value::Object(map) => {
            let pair =
                |(name, v): (&String, &Value)| format!("{} {}", name.replace('_', " "), plain(v));
            join(map.iter().map(pair).collect(), ", ")
        }
        other => other.to_string(),
    }
}

/// The license of the result, or who knows it.
pub(super) fn license(report: &Report) -> String {
    match &report.license {
        Some(license) => format!("{license}, the base model's"),
        None => "as the base model's: check it before redistribution".into(),
    }
}

/// Four significant digits; scientific notation where zeros would crowd them out.
pub(super) fn number(value: f64) -> String {
    if !value.is_finite() {
        return "not finite".into();
    }
    if value == 0.0 {
        return "0".into();
    }
    if !(1e-3..1e6).contains(&value.abs()) {
        return format!("{value:.3e}");
    }
    let decimals = (3 - value.abs().log10().floor() as i32).max(0) as usize;
    format!("{value:.decimals$}")
}

fn percent(share: f64) -> String {
    match share.is_finite() {
        true => format!("{:.2}%", 100.0 * share),
        false => number(share),
    }
}

/// A size in the unit that fits, and exactly.
fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (n as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} bytes"),
        _ => format!("{} {} ({} bytes)", number(value), UNITS[unit], grouped(n)),
    }
}

/// `98362432` as `98,362,432`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    let groups: Vec<&str> = groups.map(|g| std::str::from_utf8(g).unwrap_or_default()).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers() {
        let shown = [0.0, -0.0, 30.1834, 12525.3, 0.0123456, 2.5e-7, 1.5e9, -0.5].map(number);
        let expected = ["0", "0", "30.18", "12525", "0.01235", "2.500e-7", "1.500e9", "-0.5000"];
        assert_eq!(shown, expected);
        assert_eq!([f64::NAN, f64::INFINITY].map(number), ["not finite"; 2]);
        assert_eq!(percent(f64::NAN), "not finite");
        assert_eq!(
            [0, 7, 999, 1000, 98_362_432].map(grouped),
            ["0", "7", "999", "1,000", "98,362,432"]
        );
        assert_eq!(bytes(98_362_432), "98.36 MB (98,362,432 bytes)");
        assert_eq!(bytes(12), "12 bytes");
    }

    #[test]
    fn data() {
        assert!(calibration(&Value::Null).is_empty());
        let value =
            json!({"sources": [{"name": "a", "tokens": 3}, {"name": "b"}], "tokens_all": 2});
        let pair = |name: &str, value: &str| (name.to_string(), value.to_string());
        let rows = calibration(&value);
        assert_eq!(rows[0], pair("sources", "name a, tokens 3; name b"));
        assert_eq!(rows[1], pair("tokens all", "2"));
        assert_eq!(calibration(&json!("x")), vec![pair("data", "x")]);
    }
}
