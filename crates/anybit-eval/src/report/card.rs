//! `README.md`: the model card. Markdown with the front matter that model hubs read.

use serde_json::Value;

use super::Report;
use super::facts;

pub(super) fn card(report: &Report) -> String {
    let sections = [
        front_matter(report),
        introduction(report),
        numbers(report),
        activations(report),
        how_to_run(),
        recipe(report),
        data(report),
        sources(report),
    ];
    sections.join("\n")
}

fn front_matter(report: &Report) -> String {
    // A JSON string is a YAML string, whatever is in it.
    let quoted = |text: &str| Value::from(text).to_string();
    let license = report.license.as_deref().map(|l| format!("license: {}\n", quoted(l)));
    format!(
        "---\n{}base_model: {}\nlibrary_name: anybit\ntags:\n- quantized\n---\n",
        license.unwrap_or_default(),
        quoted(&report.base_model)
    )
}

fn introduction(report: &Report) -> String {
    format!(
        "# {}, quantized with {}\n\n\
         This is a quantized copy of {}, made by anybit {} with the method {}: {}. \
         Plots and a table of all matrices are in `report.html`, the same values for programs in \
         `report.json`.\n",
        inline(&report.base_model),
        inline(&report.method),
        inline(&report.base_model),
        inline(&report.anybit_version),
        inline(&report.method),
        inline(&report.method_summary),
    )
}

fn numbers(report: &Report) -> String {
    let mut out = String::from("## Numbers\n\n| | original | quantized |\n|---|---|---|\n");
    for fact in facts::headline(report) {
        let [label, before, after] = [&fact.label, &fact.before, &fact.after].map(|t| inline(t));
        out.push_str(&format!("| {label} | {before} | {after} |\n"));
    }
    out.push_str(match report.quality {
        Some(_) => {
            "\nPerplexities that differ in convention, window, text or tokenizer cannot be \
             compared.\n"
        }
        None => "\nThe quality of the result was not measured in this run.\n",
    });
    out
}

fn activations(report: &Report) -> String {
    let mut out = String::new();
    if let Some(name) = &report.transform {
        out.push_str(&format!(
            "## Transform\n\n{}: {}.",
            inline(name),
            inline(&report.transform_summary)
        ));
        if let Some(divergence) = report.transform_divergence {
            out.push_str(&format!(
                " Before rounding the transformed model diverges from the original by \
                 {divergence:.1e} nats per token.",
            ));
        }
        out.push_str("\n\n");
    }
    if !report.activations.is_empty() {
        out.push_str(
            "## Activations\n\n| site | online transform | bits | grid |\n|---|---|---|---|\n",
        );
    }
    for row in &report.activations {
        let cells = facts::activation(row);
        let [site, transform, bits, grid] = cells.each_ref().map(|c| inline(c));
        out.push_str(&format!("| {site} | {transform} | {bits} | {grid} |\n"));
    }
    out
}

fn how_to_run() -> String {
    let command = fenced("sh", "anybit generate DIR --prompt \"...\"");
    format!("## How to run\n\n{command}\n`DIR` is the folder that this file is in.\n")
}

fn recipe(report: &Report) -> String {
    let mut out = format!("## Recipe\n\n{}", fenced("toml", &report.recipe_toml));
    if let Some(command) = &report.command {
        out.push_str(&format!("\nMade with:\n\n{}", fenced("sh", command)));
    }
    out
}

fn data(report: &Report) -> String {
    let mut out = String::from("## Data\n\n");
    let calibration = facts::calibration(&report.calibration);
    match calibration.is_empty() {
        true => out.push_str("Calibration: none; the method needs no data.\n"),
        false => out.push_str("Calibration:\n\n"),
    }
    for (name, value) in calibration {
        out.push_str(&format!("- {}: {}\n", inline(&name), inline(&value)));
    }
    match &report.quality {
        Some(q) => {
            let (text, convention) = (inline(&q.text), inline(&q.convention));
            let tokens = facts::grouped(q.tokens as u64);
            out.push_str(&format!(
                "\nEvaluation: {text}, {tokens} tokens scored in windows of {}, {convention} \
                 convention.\n",
                q.ctx
            ));
        }
        None => out.push_str("\nEvaluation: none.\n"),
    }
    out
}

fn sources(report: &Report) -> String {
    let mut out = String::from("## Sources and license\n\n");
    for c in &report.citations {
        let (method, reference) = (inline(&c.method), inline(&c.reference));
        out.push_str(&format!("- {method}: {reference}. <{}>\n", link(&c.link)));
    }
    out.push_str(match report.citations.is_empty() {
        true => "The method is common knowledge and cites no article.\n",
        false => {
            "\nArticles that are published under CC BY 4.0 are cited here by authors, title and a \
             link to the original publication.\n"
        }
    });
    out.push_str(&format!("\nLicense: {}.\n", inline(&facts::license(report))));
    out
}

/// Text for the middle of a line or a table's cell.
fn inline(text: &str) -> String {
    let one_line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    one_line.replace('<', "&lt;").replace('|', "\\|")
}

/// A link without what would end it.
fn link(text: &str) -> String {
    text.chars().filter(|c| !c.is_whitespace() && !"<>".contains(*c)).collect()
}

/// A code block whose fence is longer than any in `text`.
fn fenced(language: &str, text: &str) -> String {
    let longest = text.split(|c: char| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}{language}\n{}\n{fence}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn front_matter_and_sections() {
        let card = report(1, |_| 0.01).to_model_card();
        let front = "---\nlicense: \"apache-2.0\"\nbase_model: \"tiny\"\nlibrary_name: anybit\n\
                     tags:\n- quantized\n---\n";
        assert!(card.starts_with(front), "{card}");
        for part in [
            "| perplexity on wiki.test.raw (hf convention, windows of 512, 40,880 tokens scored)",
            "anybit generate DIR --prompt \"...\"",
            "```toml\nmethod = \"gptq\"\nbits = 4\n```\n",
            "- sources: name builtin, tokens 9000\n",
            "<https://openreview.net/forum?id=tcbBPnfwxS&page=1>",
            "CC BY 4.0",
            "License: apache-2.0",
        ] {
            assert!(card.contains(part), "{part}\n{card}");
        }
        assert!(card.ends_with(".\n"));
    }

    #[test]
    fn unknown_license_and_odd_texts() {
        let mut report = report(0, |_| 0.0);
        report.license = None;
        report.base_model = "a \"b\"\nc | <d>".into();
        report.recipe_toml = "x = '''\n```\n'''".into();
        report.quality = None;
        report.calibration = Value::Null;
        let card = report.to_model_card();
        assert!(card.starts_with("---\nbase_model: \"a \\\"b\\\"\\nc | <d>\"\nlibrary_name"));
        assert!(card.contains("# a \"b\" c \\| &lt;d>, quantized"));
        assert!(card.contains("````toml\n"));
        assert!(card.contains("as the base model's: check it before redistribution"));
        assert!(card.contains("Calibration: none"));
    }
}
