//! Plots of training: losses over tokens, and figures of methods over widths.

use std::ops::Range;

use plotters::prelude::{
    BindKeyPoints, Cartesian2d, ChartBuilder, ChartContext, Color, IntoDrawingArea, LineSeries,
    PathElement, Ranged, SVGBackend, SeriesLabelPosition, ShapeStyle,
};

use super::plots::{GREY, PALETTE, Scale, font};
use crate::{EvalError, Result};

type Drawn = std::result::Result<(), plotters::prelude::DrawingAreaErrorKind<std::io::Error>>;

/// A line of a loss plot.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Its name.
    pub name: String,
    /// Tokens and loss, in nats per token.
    pub points: Vec<(f64, f64)>,
    /// Whether points are marked; a line without marks is smoothed.
    pub markers: bool,
}

/// Losses over tokens, as an SVG. Lines without marks are exponential means over a fiftieth of
/// their points. Points that are no numbers are left out.
///
/// # Errors
/// Nothing to draw; it cannot be drawn, a fault of this program.
pub fn loss_plot(curves: &[Curve]) -> Result<String> {
    let drawn: Vec<Curve> = curves.iter().map(prepared).collect();
    if drawn.iter().all(|curve| curve.points.is_empty()) {
        return Err(EvalError::Report { what: "there are no losses to draw".into() });
    }
    to_svg(|out| draw_losses(out, &drawn))
}

fn to_svg(draw: impl FnOnce(&mut String) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg).map_err(|e| EvalError::Report { what: e.to_string() })?;
    Ok(svg)
}

/// Without what is no number, smoothed where it is a line.
fn prepared(curve: &Curve) -> Curve {
    let finite = curve.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite()).copied();
    let mut points: Vec<(f64, f64)> = finite.collect();
    let mut name = curve.name.clone();
    if !curve.markers {
        let window = (points.len() as f64 / 50.0).max(1.0);
        let keep = 1.0 - 1.0 / window;
        if window > 1.0 {
            name.push_str(&format!(", mean over {window:.0} points"));
        }
        let (mut mean, mut weight) = (0.0, 0.0);
        for (_, y) in &mut points {
            mean = keep * mean + (1.0 - keep) * *y;
            weight = keep * weight + (1.0 - keep);
            *y = mean / weight;
        }
    }
    Curve { name, points, markers: curve.markers }
}

/// The range of values, a twentieth wider on both sides.
fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    let pad = ((high - low) * 0.05).max(1e-9 * high.abs()).max(1e-9);
    low - pad..high + pad
}

fn draw_losses(out: &mut String, curves: &[Curve]) -> Drawn {
    let all = || curves.iter().flat_map(|curve| &curve.points);
    let most = all().map(|(x, _)| *x).fold(1.0, f64::max);
    let root = SVGBackend::with_string(out, (880, 420)).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..most, padded(all().map(|(_, y)| *y)))?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("loss, nats per token")
        .axis_style(GREY)
        .bold_line_style(GREY.mix(0.3))
        .light_line_style(GREY.mix(0.0))
        .label_style(font(15.0))
        .x_label_formatter(&|x: &f64| count(*x))
        .y_label_formatter(&|y: &f64| format!("{y:.2}"))
        .draw()?;
    for (curve, color) in curves.iter().zip(PALETTE.iter().cycle()) {
        let style = color.filled().stroke_width(2);
        let size = if curve.markers { 3 } else { 0 };
        chart
            .draw_series(LineSeries::new(curve.points.clone(), style).point_size(size))?
            .label(&curve.name)
            .legend(move |at| stroke(at, style));
    }
    legend(&mut chart)?;
    root.present()
}

/// The names of the lines.
fn legend<'a, 'b: 'a, X: Ranged, Y: Ranged>(
    chart: &mut ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, Y>>,
) -> Drawn {
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .border_style(GREY.mix(0.3))
        .label_font(font(15.0))
        .draw()
}

/// A line's mark beside its name.
fn stroke((x, y): (i32, i32), style: ShapeStyle) -> PathElement<(i32, i32)> {
    PathElement::new([(x, y), (x + 18, y)], style)
}

/// "250 k", "1.5 M".
fn count(x: f64) -> String {
    match x {
        x if x >= 1e6 => format!("{:.1} M", x / 1e6),
        x if x >= 1e3 => format!("{:.0} k", x / 1e3),
        x => format!("{x:.0}"),
    }
}

/// Figures of methods (`rows`) over widths (`columns`), a line per method, on a logarithmic axis;
/// as an SVG. Missing values leave gaps.
///
/// # Errors
/// Nothing to draw; it cannot be drawn, a fault of this program.
pub fn table_plot(
    rows: &[String],
    columns: &[String],
    values: &[Vec<Option<f64>>],
    y: &str,
) -> Result<String> {
    let there = || values.iter().flatten().flatten().copied().filter(|v| v.is_finite());
    if there().next().is_none() || columns.is_empty() {
        return Err(EvalError::Report { what: "there are no figures to draw".into() });
    }
    let scale = Scale::log(there());
    to_svg(|out| draw_table(out, rows, columns, values, (&scale, y)))
}

fn draw_table(
    out: &mut String,
    rows: &[String],
    columns: &[String],
    values: &[Vec<Option<f64>>],
    (scale, y): (&Scale, &str),
) -> Drawn {
    let last = columns.len() as i32 - 1;
    let root = SVGBackend::with_string(out, (880, 460)).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(80)
        .build_cartesian_2d(
        (-30..last * 100 + 160).with_key_points((0..=last).map(|c| c * 100).collect()),
        scale.range().with_key_points(scale.ticks()),
    )?;
    chart
        .configure_mesh()
        .y_desc(y)
        .axis_style(GREY)
        .bold_line_style(GREY.mix(0.3))
        .label_style(font(15.0))
        .x_label_formatter(&|x: &i32| columns.get(*x as usize / 100).cloned().unwrap_or_default())
        .y_label_formatter(&|y: &i32| scale.label(*y))
        .draw()?;
    for (i, (name, values)) in rows.iter().zip(values).enumerate() {
        let style =
            PALETTE[i % PALETTE.len()].filled().stroke_width(if i < PALETTE.len() { 2 } else { 1 });
        let points = values.iter().enumerate().filter_map(|(c, value)| {
            let value = value.filter(|v| v.is_finite())?;
            Some((c as i32 * 100, scale.place(value)))
        });
        chart
            .draw_series(LineSeries::new(points, style).point_size(3))?
            .label(name)
            .legend(move |at| stroke(at, style));
    }
    legend(&mut chart)?;
    root.present()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_drawn_without_what_is_no_number() {
        let line: Vec<(f64, f64)> =
            (0..200).map(|i| (i as f64 * 1e4, 6.0 / (1.0 + i as f64 * 0.1))).collect();
        let mut marked = vec![(5e5, 4.0), (1e6, f64::NAN), (1.9e6, 2.0)];
        let curve = |name: &str, points: Vec<(f64, f64)>, markers| Curve {
            name: name.into(),
            points,
            markers,
        };
        let curves = [curve("training", line, false), curve("validation", marked.clone(), true)];
        let svg = loss_plot(&curves).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("training, mean over 4 points"));
        assert!(svg.contains("tokens") && svg.contains("loss, nats per token"));
        assert_eq!(svg.matches("<circle").count(), 2);
        assert_eq!(svg, loss_plot(&curves).unwrap());
        marked.retain(|p| p.1.is_nan());
        assert!(loss_plot(&[curve("none", marked, true)]).is_err());
    }

    #[test]
    fn tables_are_drawn_with_gaps() {
        let names = |all: &[&str]| all.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let (rows, columns) = (names(&["rtn", "gptq"]), names(&["2 bits", "3 bits"]));
        let values = vec![vec![Some(1.0), Some(0.1)], vec![None, Some(0.05)]];
        let svg = table_plot(&rows, &columns, &values, "KL divergence").unwrap();
        assert!(svg.contains("gptq") && svg.contains("3 bits") && svg.contains("KL divergence"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(table_plot(&rows, &columns, &[vec![None]], "y").is_err());
    }
}
