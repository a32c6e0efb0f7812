//! `report.html`: the values of a report put into the template beside this file, which escapes
//! all of them but the plots, whose texts are escaped where they are drawn.

use minijinja::{Environment, UndefinedBehavior, Value, context};

use super::facts::{self, Fact, NONE, number};
use super::plots::{self, Plot};
use super::{CitationRow, MatrixRow, Report};
use crate::{EvalError, Result};

/// Ends in `.html`, which is what turns escaping on.
const TEMPLATE: &str = "report.html";

pub(super) fn html(report: &Report) -> Result<String> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.add_template(TEMPLATE, include_str!("report.html")).map_err(fail)?;
    let values = values(report)?;
    let page = env.get_template(TEMPLATE).map_err(fail)?.render(values).map_err(fail)?;
    Ok(page + "\n")
}

fn fail(error: minijinja::Error) -> EvalError {
    EvalError::Report { what: error.to_string() }
}

fn values(report: &Report) -> Result<Value> {
    let calibration = facts::calibration(&report.calibration);
    let calibration = calibration.into_iter().map(|(name, value)| context! { name, value });
    Ok(context! {
        base_model => &report.base_model,
        method => &report.method,
        method_summary => &report.method_summary,
        version => &report.anybit_version,
        license => facts::license(report),
        facts => facts::headline(report).into_iter().map(fact).collect::<Vec<Value>>(),
        measured => report.quality.is_some(),
        figures => figures(report)?,
        matrices => report.matrices.iter().map(matrix).collect::<Vec<Value>>(),
        recipe => report.recipe_toml.trim_end(),
        command => &report.command,
        calibration => calibration.collect::<Vec<Value>>(),
        evaluation => report.quality.as_ref().map(|q| q.text.clone()),
        citations => report.citations.iter().map(citation).collect::<Vec<Value>>(),
    })
}

fn fact(fact: Fact) -> Value {
    context! { label => fact.label, before => fact.before, after => fact.after }
}

fn figures(report: &Report) -> Result<Vec<Value>> {
    let errors = plots::errors(&report.matrices)?;
    let bits = plots::bits(&report.matrices)?;
    let hidden = plots::hidden(&report.blocks)?;
    Ok(vec![
        figure(
            "Error of each linear",
            "The squared error of the weights relative to the weights, and that of the outputs on \
             the calibration inputs relative to the outputs, over the layers.",
            errors,
        ),
        figure(
            "Bits per weight of each linear",
            "Bits of the codes alone, over the layers; the table below adds what else is stored.",
            bits,
        ),
        figure(
            "Error of the hidden states",
            "The squared difference between the hidden states of the quantized and of the \
             original model after each block, relative to the original: how errors add up on \
             the way through the model.",
            hidden,
        ),
    ])
}

fn figure(title: &str, caption: &str, plot: Option<Plot>) -> Value {
    let (svg, notes) = match plot {
        Some(plot) => (Some(Value::from_safe_string(plot.svg)), plot.notes),
        None => (None, vec!["Nothing to draw: no such value was measured.".to_string()]),
    };
    context! { title, caption, svg, notes }
}

fn matrix(row: &MatrixRow) -> Value {
    context! {
        tensor => &row.tensor,
        shape => format!("{} × {}", row.rows, row.cols),
        bits => number(row.bits),
        total_bits => number(row.total_bits),
        bytes => facts::grouped(row.bytes),
        relative_error => number(row.relative_error),
        output_error => row.output_error.map_or_else(|| NONE.to_string(), number),
    }
}

fn citation(row: &CitationRow) -> Value {
    context! {
        method => &row.method,
        reference => &row.reference,
        link => &row.link,
        href => href(&row.link),
    }
}

/// The link as an attribute, when it leads to the web and nowhere else.
fn href(link: &str) -> Option<Value> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._~:/?#[]@!$()*+,;=%&".contains(c);
    let web = link.starts_with("https://") || link.starts_with("http://");
    (web && link.chars().all(allowed)).then(|| Value::from_safe_string(link.replace('&', "&amp;")))
}
