//! The plot of a scaling law: losses over sizes, a panel for each family of precisions.

use plotters::coord::Shift;
use plotters::prelude::{
    BindKeyPoints, ChartBuilder, Circle, Color, DrawingArea, DrawingAreaErrorKind, IntoDrawingArea,
    LineSeries, PathElement, RGBColor, SVGBackend,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::plots::{GREY, PALETTE, UNIT, font};
use crate::scaling::{Fit, FittedRun, Precision};
use crate::{EvalError, Result};

const WIDTH: u32 = 880;
const LEGEND_WIDTH: i32 = 160;
const PANEL_HEIGHT: u32 = 340;
/// Units of the axis of losses per decade: losses lie close together.
const LOSS_UNIT: f64 = 10_000.0;
/// Parts that a curve is drawn in.
const PARTS: i32 = 48;
/// Longest name in a legend.
const NAME_CHARS: usize = 18;
/// Colors before they repeat; the last of the palette is the reference's.
const COLORS: usize = PALETTE.len() - 1;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

impl Fit {
    /// The losses of the runs over their parameters and the law's curves for the usual ratio of
    /// tokens to parameters, both on logarithmic axes; a file of its own. Runs of another ratio are
    /// hollow.
    ///
    /// # Errors
    /// It cannot be drawn: a fault of this program.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| EvalError::Report { what: e.to_string() })?;
        Ok(svg)
    }

    fn draw(&self, out: &mut String) -> Drawn {
        let mut families: Vec<&str> = self.others().map(|p| p.family.as_str()).collect();
        // Precisions are sorted by family.
        families.dedup();
        if families.is_empty() {
            families.push("");
        }
        let size = (WIDTH, PANEL_HEIGHT * families.len() as u32);
        let root = SVGBackend::with_string(out, size).into_drawing_area();
        let axes = Axes::of(self);
        for (area, family) in root.split_evenly((families.len(), 1)).iter().zip(families) {
            self.draw_panel(area, &axes, family)?;
        }
        root.present()
    }

    /// All precisions but the reference.
    fn others(&self) -> impl Iterator<Item = &Precision> {
        self.precisions.iter().filter(|p| p.name != self.reference)
    }

    fn draw_panel(&self, area: &Area<'_>, axes: &Axes, family: &str) -> Drawn {
        let (chart_area, legend) = area.split_horizontally(WIDTH as i32 - LEGEND_WIDTH);
        let title = match family {
            "" => format!("loss over size, curves at {:.0} tokens per parameter", axes.ratio),
            _ => format!("{family}, curves at {:.0} tokens per parameter", axes.ratio),
        };
        let (low, high) = axes.params;
        let (least, most) = axes.losses;
        let step = loss_step(least, most);
        let mut chart = ChartBuilder::on(&chart_area)
            .caption(title, font(17.0))
            .margin(8)
            .x_label_area_size(44)
            .y_label_area_size(64)
            .build_cartesian_2d(
                (low..high).with_key_points(size_ticks(low, high)),
                (least..most).with_key_points(loss_ticks(least, most, step)),
            )?;
        chart
            .configure_mesh()
            .x_desc("parameters without embeddings")
            .y_desc("loss, nats per token")
            .axis_style(GREY)
            .bold_line_style(GREY.mix(0.3))
            .label_style(font(15.0))
            .x_label_formatter(&|x: &i32| size_label(*x))
            .y_label_formatter(&|y: &i32| loss_label(*y, step))
            .draw()?;
        let reference = self.precisions.iter().filter(|p| p.name == self.reference);
        let members = self.others().filter(|p| p.family == family);
        let colors = (0..).map(|i| PALETTE[i % COLORS]);
        let lines = reference.map(|p| (p, GREY)).chain(members.zip(colors));
        for (row, (precision, color)) in lines.enumerate() {
            let curve = (0..=PARTS).filter_map(|i| {
                let x = low + (high - low) * i / PARTS;
                let params = 10f64.powf(f64::from(x) / f64::from(UNIT));
                let loss = self.law.predict(params, params * axes.ratio, &precision.name)?;
                Some((x, place_loss(loss)))
            });
            // The chart would draw beyond its own edges.
            let inside = curve.filter(|(_, y)| (least..=most).contains(y));
            chart.draw_series(LineSeries::new(inside, color.stroke_width(2)))?;
            let runs = self.runs.iter().filter(|r| r.run.precision == precision.name);
            chart.draw_series(runs.map(|r| {
                let at = (place_size(r.run.params), place_loss(r.run.loss));
                let style = match axes.is_usual(r) {
                    true => color.filled(),
                    false => color.stroke_width(1),
                };
                Circle::new(at, 3, style)
            }))?;
            draw_name(&legend, row as i32, precision, color)?;
        }
        Ok(())
    }
}

/// A line of the legend.
fn draw_name(area: &Area<'_>, row: i32, precision: &Precision, color: RGBColor) -> Drawn {
    let y = 40 + 20 * row;
    area.draw(&PathElement::new(vec![(8, y), (32, y)], color.stroke_width(3)))?;
    let name = precision.name.strip_prefix(&precision.family).unwrap_or(&precision.name);
    let name: String = name.trim().chars().take(NAME_CHARS).collect();
    let style = font(15.0).pos(Pos::new(HPos::Left, VPos::Center));
    area.draw_text(&name, &style, (38, y))
}

/// What all panels share.
struct Axes {
    /// Ends of the axis of parameters.
    params: (i32, i32),
    /// Ends of the axis of losses.
    losses: (i32, i32),
    /// Tokens per parameter of the curves: the median of the runs.
    ratio: f64,
}

impl Axes {
    fn of(fit: &Fit) -> Self {
        let ends = |values: &mut dyn Iterator<Item = i32>, margin: i32| {
            let (low, high) = values.fold((i32::MAX, i32::MIN), |(l, h), v| (l.min(v), h.max(v)));
            // Without runs there is a fit of nothing: an axis all the same.
            if low > high { (0, margin) } else { (low - margin, high + margin) }
        };
        let mut ratios: Vec<f64> = fit.runs.iter().map(|r| r.run.tokens / r.run.params).collect();
        ratios.sort_unstable_by(f64::total_cmp);
        Self {
            params: ends(&mut fit.runs.iter().map(|r| place_size(r.run.params)), UNIT / 10),
            losses: ends(&mut fit.runs.iter().map(|r| place_loss(r.run.loss)), 100),
            ratio: ratios.get(ratios.len() / 2).copied().unwrap_or(1.0),
        }
    }

    /// Whether a run has the ratio of the curves, within what rounding to whole steps does.
    fn is_usual(&self, run: &FittedRun) -> bool {
        (run.run.tokens / run.run.params / self.ratio - 1.0).abs() < 0.1
    }
}

fn place_size(params: f64) -> i32 {
    (params.log10() * f64::from(UNIT)).round() as i32
}

fn place_loss(loss: f64) -> i32 {
    (loss.log10() * LOSS_UNIT).round() as i32
}

/// 1, 2 and 5 of every decade.
fn size_ticks(low: i32, high: i32) -> Vec<i32> {
    let decades = low.div_euclid(UNIT)..=high.div_euclid(UNIT);
    let ticks = decades.flat_map(|decade| [0, 301, 699].map(|digit| decade * UNIT + digit));
    ticks.filter(|tick| (low..=high).contains(tick)).collect()
}

/// `20M` for the place of 2e7.
fn size_label(at: i32) -> String {
    let digit = match at.rem_euclid(UNIT) {
        301 => 2,
        699 => 5,
        _ => 1,
    };
    let decade = at.div_euclid(UNIT);
    let unit = match decade {
        3..=5 => "k",
        6..=8 => "M",
        9..=11 => "B",
        12..=14 => "T",
        _ => return format!("{digit}e{decade}"),
    };
    format!("{}{unit}", digit * 10i32.pow((decade % 3).unsigned_abs()))
}

/// The loss at a place.
fn loss_at(place: i32) -> f64 {
    10f64.powf(f64::from(place) / LOSS_UNIT)
}

/// The smallest of 1, 2, 5, 10, 20 … hundredths that cuts the axis into at most eight parts.
fn loss_step(least: i32, most: i32) -> f64 {
    let span = loss_at(most) - loss_at(least);
    let mut scale = 0.01;
    loop {
        for step in [scale, 2.0 * scale, 5.0 * scale] {
            // Not finite for absurd losses: any step will do.
            if span / step <= 8.0 || !span.is_finite() {
                return step;
            }
        }
        scale *= 10.0;
    }
}

fn loss_ticks(least: i32, most: i32, step: f64) -> Vec<i32> {
    let first = (loss_at(least) / step).ceil();
    let ticks = (0..10).map(|i| place_loss((first + f64::from(i)) * step));
    ticks.filter(|tick| (least..=most).contains(tick)).collect()
}

/// The loss of a tick, with the digits that the steps between ticks need.
fn loss_label(at: i32, step: f64) -> String {
    let loss = (loss_at(at) / step).round() * step;
    match step {
        s if s < 0.095 => format!("{loss:.2}"),
        s if s < 0.95 => format!("{loss:.1}"),
        _ => format!("{loss:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scaling::{FitOptions, Run, fit};

    fn runs() -> Vec<Run> {
        let mut runs = Vec::new();
        for (i, params) in [3e7, 1e8, 3e8].into_iter().enumerate() {
            for ratio in [100.0, 100.5, 20.0] {
                let precisions = [("BF16", 0.0), ("ours W4A4", 0.1), ("theirs <W4>", 0.2)];
                for (name, worse) in precisions {
                    runs.push(Run {
                        params,
                        tokens: params * ratio,
                        precision: name.into(),
                        bits: Some(if name == "BF16" { 16.0 } else { 4.0 }),
                        loss: 3.2 - 0.2 * i as f64 + worse + 1.0 / ratio,
                    });
                }
            }
        }
        runs
    }

    #[test]
    fn a_panel_for_each_family_and_a_mark_for_each_run() {
        let fitted = fit(&runs(), &FitOptions::default()).unwrap();
        let svg = fitted.to_svg().unwrap();
        assert_eq!(svg, fitted.to_svg().unwrap());
        assert!(svg.starts_with("<svg") && !svg.contains("NaN"));
        assert_eq!(svg.matches("curves at 100 tokens per parameter").count(), 2);
        // The reference's nine stand in both panels.
        assert_eq!(svg.matches("<circle").count(), 36);
        assert!(svg.contains("&lt;W4&gt;") && !svg.contains("<W4>"));
        assert_eq!(svg.matches("BF16").count(), 2);
    }

    #[test]
    fn axes() {
        let ticks = size_ticks(place_size(2.5e7), place_size(1.2e9));
        let labels: Vec<String> = ticks.into_iter().map(size_label).collect();
        assert_eq!(labels, ["50M", "100M", "200M", "500M", "1B"]);
        assert_eq!([size_label(2301), size_label(15_000)], ["2e2", "1e15"]);

        let (least, most) = (place_loss(2.41), place_loss(4.02));
        let step = loss_step(least, most);
        let ticks = loss_ticks(least, most, step);
        let labels: Vec<String> = ticks.into_iter().map(|t| loss_label(t, step)).collect();
        assert_eq!(labels, ["2.5", "3.0", "3.5", "4.0"]);
        let step = loss_step(place_loss(2.41), place_loss(2.45));
        assert_eq!(loss_label(place_loss(2.43), step), "2.43");
        assert_eq!(loss_step(0, i32::MAX), 0.01);
    }
}
