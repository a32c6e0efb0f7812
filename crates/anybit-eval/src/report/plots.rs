//! The plots of a report: one SVG each, to stand inside the page.
//!
//! Before it is drawn a value becomes a whole number of thousandths (of a decade or of a bit), so
//! that the axes have exactly the ticks they are given and no last digit of a logarithm shows.
//! Lines have colors of Okabe and Ito's palette, which the colorblind can tell apart; grey and
//! transparency are readable on light and dark paper, and the page gives texts its own color.

use std::collections::BTreeMap;
use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::{
    BindKeyPoints, ChartBuilder, Color, DrawingArea, DrawingAreaErrorKind, FontFamily,
    IntoDrawingArea, LineSeries, PathElement, RGBColor, SVGBackend, TextStyle,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::{BlockRow, MatrixRow};
use crate::{EvalError, Result};

const WIDTH: u32 = 880;
const LEGEND_WIDTH: i32 = 140;
const PANEL_HEIGHT: u32 = 290;
/// About the height of a panel between its axes.
const PLOT_HEIGHT: i32 = 210;
/// Layers beyond which points are no longer marked.
const MARKED_LAYERS: i32 = 64;
/// Longest name in a legend.
const NAME_CHARS: usize = 15;

/// Units of an axis per decade or bit.
pub(super) const UNIT: i32 = 1000;
/// Values below are drawn on the lower edge of a logarithmic axis.
const FLOOR: f64 = 1e-12;
const FLOOR_DECADE: i32 = -12;

/// The linears of most decoders, in the order of the legend; others follow as they come.
const KINDS: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];
pub(super) const PALETTE: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(213, 94, 0),
    RGBColor(204, 121, 167),
    RGBColor(128, 128, 128),
];
pub(super) const GREY: RGBColor = RGBColor(128, 128, 128);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// A drawn plot and what has to be said about it.
pub(super) struct Plot {
    pub(super) svg: String,
    pub(super) notes: Vec<String>,
}

/// Errors of weights and outputs of each linear; `None` without any.
pub(super) fn errors(matrices: &[MatrixRow]) -> Result<Option<Plot>> {
    let weights = by_kind(matrices, |m| Some(m.relative_error));
    let outputs = by_kind(matrices, |m| m.output_error);
    let mut notes = Vec::new();
    if !weights.is_empty() && matrices.iter().all(|m| m.output_error.is_none()) {
        notes.push("Output errors were not measured: there were no calibration inputs.".into());
    }
    let panels = vec![
        Panel::log("error of the weights", weights),
        Panel::log("error of the outputs", outputs),
    ];
    plot(panels, "Relative squared error of each linear over the layers", notes)
}

/// Bits per weight of each linear; `None` without any.
pub(super) fn bits(matrices: &[MatrixRow]) -> Result<Option<Plot>> {
    let lines = by_kind(matrices, |m| Some(m.bits));
    let most = lines.values().fold(0f64, f64::max).min(63.0);
    let scale = Scale::Linear { top: most as i32 + 1 };
    let panel = Panel { title: "bits per weight", y_label: "bits", scale, lines, apart: true };
    let notes = vec!["Lines are drawn two pixels apart, so that equal bits stay visible.".into()];
    plot(vec![panel], "Bits per weight of each linear over the layers", notes)
}

/// Errors of the hidden states after each block; `None` when they were not followed.
pub(super) fn hidden(blocks: &[BlockRow]) -> Result<Option<Plot>> {
    let mut lines = Lines::default();
    let mut points = Vec::new();
    for block in blocks {
        match (u16::try_from(block.block), block.hidden_error) {
            (Ok(index), Some(error)) if error.is_finite() => points.push((index, error)),
            (_, Some(_)) => lines.left_out += 1,
            (_, None) => {}
        }
    }
    points.sort_by_key(|(index, _)| *index);
    if !points.is_empty() {
        lines.series.push(Series { kind: 0, name: String::new(), points });
    }
    let panel = Panel::log("error of the hidden states after each block", lines);
    plot(vec![panel], "Relative squared error of the hidden states over the blocks", Vec::new())
}

/// One line: a value per layer.
struct Series {
    kind: usize,
    name: String,
    points: Vec<(u16, f64)>,
}

impl Series {
    fn color(&self) -> RGBColor {
        PALETTE[self.kind % PALETTE.len()]
    }
}

/// The lines of a panel, and what they do not show.
#[derive(Default)]
struct Lines {
    series: Vec<Series>,
    /// Values that are not finite.
    left_out: usize,
    /// Whether a point is a mean over several matrices.
    averaged: bool,
}

impl Lines {
    fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    fn values(&self) -> impl Iterator<Item = f64> {
        self.series.iter().flat_map(|s| &s.points).map(|(_, value)| *value)
    }

    fn last_layer(&self) -> i32 {
        let layers = self.series.iter().flat_map(|s| &s.points).map(|(layer, _)| *layer);
        i32::from(layers.max().unwrap_or(0))
    }
}

/// `model.layers.3.mlp.up_proj.weight` as (`up`, 3); `None` outside of the layers.
fn kind_and_layer(tensor: &str) -> Option<(&str, u16)> {
    let layer = tensor.split('.').find_map(|part| part.parse::<u16>().ok())?;
    let linear = tensor.strip_suffix(".weight").unwrap_or(tensor);
    let kind = linear.rsplit('.').next()?;
    Some((kind.strip_suffix("_proj").unwrap_or(kind), layer))
}

/// A line per kind of linear.
fn by_kind(matrices: &[MatrixRow], value: impl Fn(&MatrixRow) -> Option<f64>) -> Lines {
    let mut kinds: Vec<&str> = KINDS.to_vec();
    let mut sums: BTreeMap<(usize, u16), (f64, usize)> = BTreeMap::new();
    let mut lines = Lines::default();
    for matrix in matrices {
        let Some((kind, layer)) = kind_and_layer(&matrix.tensor) else { continue };
        // Counted before values are looked at: a kind has the same color in every panel.
        let known = kinds.iter().position(|k| *k == kind);
        let index = known.unwrap_or_else(|| {
            kinds.push(kind);
            kinds.len() - 1
        });
        match value(matrix) {
            Some(v) if v.is_finite() => {
                let sum = sums.entry((index, layer)).or_default();
                *sum = (sum.0 + v, sum.1 + 1);
            }
            Some(_) => lines.left_out += 1,
            None => {}
        }
    }
    for ((kind, layer), (sum, count)) in sums {
        lines.averaged |= count > 1;
        if lines.series.last().is_none_or(|s| s.kind != kind) {
            let name = kinds[kind].to_string();
            lines.series.push(Series { kind, name, points: Vec::new() });
        }
        if let Some(series) = lines.series.last_mut() {
            series.points.push((layer, sum / count as f64));
        }
    }
    lines
}

/// A vertical axis.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scale {
    /// Powers of ten.
    Log { low: i32, high: i32 },
    /// From 0.
    Linear { top: i32 },
}

impl Scale {
    /// The decades of `values`, and one below for those under the floor.
    pub(super) fn log(values: impl Iterator<Item = f64>) -> Self {
        let (mut least, mut most, mut floored) = (f64::MAX, 0f64, false);
        for value in values {
            if value < FLOOR {
                floored = true;
            } else {
                least = least.min(value);
                most = most.max(value.min(f64::MAX));
            }
        }
        if most == 0.0 {
            return Self::Log { low: FLOOR_DECADE, high: 0 };
        }
        let low = least.log10().floor() as i32 - i32::from(floored);
        let high = (most.log10().ceil() as i32).max(low + 1);
        Self::Log { low, high }
    }

    pub(super) fn range(self) -> Range<i32> {
        match self {
            Self::Log { low, high } => low * UNIT..high * UNIT,
            Self::Linear { top } => 0..top * UNIT,
        }
    }

    pub(super) fn ticks(self) -> Vec<i32> {
        match self {
            Self::Log { low, high } => {
                // 1, 2 and 5 where there is room.
                let digits: &[i32] = if high - low <= 2 { &[0, 301, 699] } else { &[0] };
                let mut ticks: Vec<i32> = Vec::new();
                for decade in (low..=high).step_by(tick_step(high - low, 8)) {
                    ticks.extend(digits.iter().map(|digit| decade * UNIT + digit));
                }
                ticks.retain(|tick| *tick <= high * UNIT);
                ticks
            }
            Self::Linear { top } => {
                (0..=top).step_by(tick_step(top, 8)).map(|tick| tick * UNIT).collect()
            }
        }
    }

    pub(super) fn place(self, value: f64) -> i32 {
        let at = match self {
            Self::Log { low, .. } if value < FLOOR => f64::from(low),
            Self::Log { .. } => value.log10(),
            Self::Linear { .. } => value,
        };
        let range = self.range();
        ((at * f64::from(UNIT)).round() as i32).clamp(range.start, range.end)
    }

    pub(super) fn label(self, at: i32) -> String {
        if let Self::Linear { .. } = self {
            return (at / UNIT).to_string();
        }
        let decade = at.div_euclid(UNIT);
        let digit = match at.rem_euclid(UNIT) {
            301 => 2,
            699 => 5,
            _ => 1,
        };
        match decade {
            -4..=-1 => {
                let places = decade.unsigned_abs() as usize;
                format!("{:.places$}", f64::from(digit) * 10f64.powi(decade))
            }
            0..=3 => (digit * 10i32.pow(decade.unsigned_abs())).to_string(),
            _ => format!("{digit}e{decade}"),
        }
    }
}

/// The smallest of 1, 2, 5, 10, 20 … that cuts `span` into at most `most` parts.
fn tick_step(span: i32, most: i32) -> usize {
    let mut scale = 1;
    loop {
        for step in [scale, 2 * scale, 5 * scale] {
            if span / step <= most {
                return step as usize;
            }
        }
        scale *= 10;
    }
}

/// One pair of axes.
struct Panel {
    title: &'static str,
    y_label: &'static str,
    scale: Scale,
    lines: Lines,
    /// Whether lines are moved apart by two pixels.
    apart: bool,
}

impl Panel {
    fn log(title: &'static str, lines: Lines) -> Self {
        let scale = Scale::log(lines.values());
        Self { title, y_label: "relative squared error", scale, lines, apart: false }
    }

    fn floored(&self) -> usize {
        match self.scale {
            Scale::Log { .. } => self.lines.values().filter(|v| *v < FLOOR).count(),
            Scale::Linear { .. } => 0,
        }
    }

    /// Where `value` of the line with index `line` is drawn.
    fn place(&self, line: usize, value: f64) -> i32 {
        let at = self.scale.place(value);
        if !self.apart {
            return at;
        }
        let range = self.scale.range();
        let pixel = (range.end - range.start) / PLOT_HEIGHT;
        let pixels = 2 * line as i32 - (self.lines.series.len() as i32 - 1);
        (at + pixels * pixel).clamp(range.start, range.end)
    }
}

/// Draws what panels have something to draw, one below the other.
fn plot(panels: Vec<Panel>, label: &str, mut notes: Vec<String>) -> Result<Option<Plot>> {
    let left_out: usize = panels.iter().map(|p| p.lines.left_out).sum();
    let floored: usize = panels.iter().map(Panel::floored).sum();
    let averaged = panels.iter().any(|p| p.lines.averaged);
    let panels: Vec<Panel> = panels.into_iter().filter(|p| !p.lines.is_empty()).collect();
    if panels.is_empty() {
        return Ok(None);
    }
    if floored > 0 {
        notes.push(format!("Values of zero or below 1e-12, drawn on the lower edge: {floored}."));
    }
    if left_out > 0 {
        notes.push(format!("Values left out because they are not finite: {left_out}."));
    }
    if averaged {
        notes.push("Where a layer has several linears of a kind, their mean is drawn.".into());
    }
    let mut svg = String::new();
    draw(&mut svg, &panels).map_err(|e| EvalError::Report { what: e.to_string() })?;
    Ok(Some(Plot { svg: embed(&svg, label), notes }))
}

/// The drawing as a part of a page: it needs a label there and no namespace.
fn embed(svg: &str, label: &str) -> String {
    let label = format!(" role=\"img\" aria-label=\"{label}\"");
    svg.replacen(" xmlns=\"http://www.w3.org/2000/svg\"", &label, 1).trim_end().to_string()
}

fn draw(out: &mut String, panels: &[Panel]) -> Drawn {
    let size = (WIDTH, PANEL_HEIGHT * panels.len() as u32);
    let root = SVGBackend::with_string(out, size).into_drawing_area();
    let (charts, legend) = root.split_horizontally(WIDTH as i32 - LEGEND_WIDTH);
    let last = panels.iter().map(|p| p.lines.last_layer()).max().unwrap_or(0);
    for (area, panel) in charts.split_evenly((panels.len(), 1)).iter().zip(panels) {
        draw_panel(area, panel, last)?;
    }
    draw_legend(&legend, panels)?;
    root.present()
}

fn draw_panel(area: &Area<'_>, panel: &Panel, last: i32) -> Drawn {
    // A layer is two units wide, so that half of one stays free at either end.
    let layers: Vec<i32> = (0..=last).step_by(tick_step(last, 16)).map(|l| 2 * l).collect();
    let x = (-1..2 * last + 1).with_key_points(layers);
    let y = panel.scale.range().with_key_points(panel.scale.ticks());
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, font(17.0))
        .margin(6)
        .x_label_area_size(42)
        .y_label_area_size(74)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc("layer")
        .y_desc(panel.y_label)
        .axis_style(GREY)
        .bold_line_style(GREY.mix(0.3))
        .label_style(font(15.0))
        .x_label_formatter(&|x: &i32| (x / 2).to_string())
        .y_label_formatter(&|y: &i32| panel.scale.label(*y))
        .draw()?;
    for (i, series) in panel.lines.series.iter().enumerate() {
        let dot = if last <= MARKED_LAYERS || series.points.len() == 1 { 3 } else { 0 };
        let place = |(layer, value): &(u16, f64)| (2 * i32::from(*layer), panel.place(i, *value));
        let points: Vec<(i32, i32)> = series.points.iter().map(place).collect();
        let style = series.color().filled().stroke_width(2);
        chart.draw_series(LineSeries::new(points, style).point_size(dot))?;
    }
    Ok(())
}

/// The kinds of all panels; nothing when lines have no names.
fn draw_legend(area: &Area<'_>, panels: &[Panel]) -> Drawn {
    let lines = panels.iter().flat_map(|p| &p.lines.series).filter(|s| !s.name.is_empty());
    let kinds: BTreeMap<usize, &Series> = lines.map(|s| (s.kind, s)).collect();
    let style = font(15.0).pos(Pos::new(HPos::Left, VPos::Center));
    for (row, series) in kinds.values().enumerate() {
        let y = 40 + 20 * row as i32;
        let mark = PathElement::new(vec![(8, y), (32, y)], series.color().stroke_width(3));
        area.draw(&mark)?;
        let name: String = series.name.chars().take(NAME_CHARS).collect();
        area.draw_text(&name, &style, (38, y))?;
    }
    Ok(())
}

pub(super) fn font(size: f64) -> TextStyle<'static> {
    TextStyle::from((FontFamily::SansSerif, size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let found = kind_and_layer("model.layers.31.self_attn.q_proj.weight");
        assert_eq!(found, Some(("q", 31)));
        assert_eq!(kind_and_layer("blk.2.ffn_up"), Some(("ffn_up", 2)));
        assert_eq!(kind_and_layer("model.embed_tokens.weight"), None);
        assert_eq!(kind_and_layer("model.layers.99999999.up_proj.weight"), None);
        assert_eq!(kind_and_layer(""), None);
    }

    #[test]
    fn axes() {
        let scale = |values: &[f64]| Scale::log(values.iter().copied());
        assert_eq!(scale(&[0.02, 0.05]), Scale::Log { low: -2, high: -1 });
        assert_eq!(scale(&[0.0, 0.02, 3.0]), Scale::Log { low: -3, high: 1 });
        assert_eq!(scale(&[0.0]), Scale::Log { low: FLOOR_DECADE, high: 0 });
        assert_eq!(scale(&[]), Scale::Log { low: FLOOR_DECADE, high: 0 });
        let Scale::Log { high, .. } = scale(&[1.0, f64::INFINITY]) else { panic!() };
        assert_eq!(high, 309);

        let short = Scale::Log { low: -2, high: -1 };
        let labels: Vec<String> = short.ticks().into_iter().map(|t| short.label(t)).collect();
        assert_eq!(labels, ["0.01", "0.02", "0.05", "0.1"]);
        let long = Scale::Log { low: -12, high: 4 };
        let labels: Vec<String> = long.ticks().into_iter().map(|t| long.label(t)).collect();
        let expected = ["1e-12", "1e-10", "1e-8", "1e-6", "0.0001", "0.01", "1", "100", "1e4"];
        assert_eq!(labels, expected);
        assert_eq!([long.place(0.0), long.place(1.0), long.place(1e9)], [-12_000, 0, 4000]);
        assert_eq!(Scale::Linear { top: 8 }.ticks().len(), 9);
        assert_eq!(Scale::Linear { top: 8 }.place(4.5), 4500);
    }

    #[test]
    fn steps() {
        let steps = [0, 1, 8, 9, 16, 17, 100, 65_535].map(|span| tick_step(span, 8));
        assert_eq!(steps, [1, 1, 1, 2, 2, 2, 20, 10_000]);
    }

    #[test]
    fn equal_lines_stay_apart() {
        let series = |kind| Series { kind, name: "x".into(), points: vec![(0, 4.0)] };
        let lines = Lines { series: vec![series(0), series(1), series(2)], ..Lines::default() };
        let scale = Scale::Linear { top: 4 };
        let panel = Panel { title: "", y_label: "", scale, lines, apart: true };
        let pixel = 4000 / PLOT_HEIGHT;
        let places = [0, 1, 2].map(|line| panel.place(line, 2.0));
        assert_eq!(places, [2000 - 2 * pixel, 2000, 2000 + 2 * pixel]);
    }
}
