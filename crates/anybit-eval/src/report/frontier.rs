//! The frontier of a method: what it predicts to lose at every size.

use plotters::prelude::{
    BindKeyPoints, ChartBuilder, Color, IntoDrawingArea, LineSeries, SVGBackend,
};
use serde::Serialize;

use super::plots::{GREY, PALETTE, Scale, UNIT, font};
use crate::{EvalError, Result};

/// Predicted errors of one method over sizes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Frontier {
    /// Name of the model.
    pub base_model: String,
    /// The method.
    pub method: String,
    /// The points, in the order asked for.
    pub points: Vec<FrontierPoint>,
}

/// One goal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FrontierPoint {
    /// Bits asked for.
    pub bits: f64,
    /// Bits of codes per weight of the blocks' linears.
    pub bits_per_weight_codes: f64,
    /// Bits per weight with everything that is stored.
    pub bits_per_weight_total: f64,
    /// Size of the weight files.
    pub weight_file_bytes: u64,
    /// The sum of the errors that the method's tables give for its choice, in its own units.
    pub predicted_error: f64,
}

impl Frontier {
    /// The curve of predicted errors over total bits, a file of its own.
    ///
    /// # Errors
    /// It cannot be drawn: a fault of this program.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        let fail = |e: String| EvalError::Report { what: e };
        self.draw(&mut svg).map_err(|e| fail(e.to_string()))?;
        Ok(svg)
    }

    fn draw(
        &self,
        out: &mut String,
    ) -> std::result::Result<(), plotters::prelude::DrawingAreaErrorKind<std::io::Error>> {
        let thousandths = |bits: f64| (bits * f64::from(UNIT)).round() as i32;
        let errors = self.points.iter().map(|p| p.predicted_error);
        let scale = Scale::log(errors);
        let bits = self.points.iter().map(|p| p.bits_per_weight_total);
        let (low, high) = bits.fold((f64::MAX, 0f64), |(l, h), b| (l.min(b), h.max(b)));
        let quarter = UNIT / 4;
        let (low, high) = (thousandths(low) / quarter, thousandths(high) / quarter + 1);
        let step = ((high - low) / 12 + 1) as usize;
        let ticks: Vec<i32> = (low..=high).step_by(step).map(|q| q * quarter).collect();
        let root = SVGBackend::with_string(out, (880, 420)).into_drawing_area();
        let caption = format!("{} of {}", self.method, self.base_model);
        let mut chart = ChartBuilder::on(&root)
            .caption(caption, font(17.0))
            .margin(8)
            .x_label_area_size(44)
            .y_label_area_size(80)
            .build_cartesian_2d(
                (low * quarter..high * quarter).with_key_points(ticks),
                scale.range().with_key_points(scale.ticks()),
            )?;
        chart
            .configure_mesh()
            .x_desc("bits per weight, everything stored")
            .y_desc("predicted error")
            .axis_style(GREY)
            .bold_line_style(GREY.mix(0.3))
            .label_style(font(15.0))
            .x_label_formatter(&|x: &i32| format!("{:.2}", f64::from(*x) / f64::from(UNIT)))
            .y_label_formatter(&|y: &i32| scale.label(*y))
            .draw()?;
        let place = |p: &FrontierPoint| {
            (thousandths(p.bits_per_weight_total), scale.place(p.predicted_error))
        };
        let mut points: Vec<(i32, i32)> = self.points.iter().map(place).collect();
        points.sort_unstable();
        let style = PALETTE[0].filled().stroke_width(2);
        chart.draw_series(LineSeries::new(points, style).point_size(3))?;
        root.present()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_drawn_and_an_exact_one_lies_on_the_edge() {
        let point = |bits: f64, predicted_error: f64| FrontierPoint {
            bits,
            bits_per_weight_codes: bits,
            bits_per_weight_total: bits + 0.2,
            weight_file_bytes: 1000,
            predicted_error,
        };
        let points = vec![point(2.0, 0.3), point(3.0, 0.05), point(4.0, 0.0)];
        let frontier = Frontier { base_model: "tiny".into(), method: "skim".into(), points };
        let svg = frontier.to_svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("skim of tiny"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert_eq!(svg, frontier.to_svg().unwrap());
    }
}
