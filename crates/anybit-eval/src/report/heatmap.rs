//! Divergence by block and cause: where a quantized model loses what it loses.

use plotters::prelude::{Color, IntoDrawingArea, RGBColor, Rectangle, SVGBackend};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use serde::Serialize;

use super::plots::{GREY, font};
use crate::{EvalError, Result};

/// KL divergence from the unquantized model when one cause in one block is quantized alone.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Attribution {
    /// Name of the model.
    pub base_model: String,
    /// Tokens scored.
    pub tokens: usize,
    /// The causes, in the order of `kl`.
    pub causes: Vec<String>,
    /// `[cause][block]`, nats per token.
    pub kl: Vec<Vec<f64>>,
    /// The same with nothing quantized: exactly 0, or the measurement is broken.
    pub control: f64,
    /// The same with everything quantized.
    pub all: f64,
}

/// Sizes of a cell, and of the margins for labels.
const CELL: (i32, i32) = (24, 28);
const LEFT: i32 = 110;
const TOP: i32 = 34;

impl Attribution {
    /// The heat map, darker for more on a logarithmic scale; a file of its own.
    ///
    /// # Errors
    /// It cannot be drawn: a fault of this program.
    pub fn to_svg(&self) -> Result<String> {
        let mut svg = String::new();
        self.draw(&mut svg).map_err(|e| EvalError::Report { what: e.to_string() })?;
        Ok(svg)
    }

    fn draw(
        &self,
        out: &mut String,
    ) -> std::result::Result<(), plotters::prelude::DrawingAreaErrorKind<std::io::Error>> {
        let blocks = self.kl.first().map_or(0, Vec::len) as i32;
        let causes = self.causes.len() as i32;
        let width = (LEFT + CELL.0 * blocks + 12).max(320);
        let height = TOP + CELL.1 * causes + 44;
        let root = SVGBackend::with_string(out, (width as u32, height as u32)).into_drawing_area();
        let values = self.kl.iter().flatten().copied().filter(|v| *v > 0.0);
        let (low, high) = values.fold((f64::MAX, 0f64), |(l, h), v| (l.min(v), h.max(v)));
        let span = (high / low).ln();
        let shade = |value: f64| match value > 0.0 && span > 0.0 {
            true => (value / low).ln() / span,
            false => 0.0,
        };
        let title = format!("{}: KL divergence of each cause alone", self.base_model);
        root.draw_text(&title, &font(15.0), (8, 8))?;
        let right = font(14.0).pos(Pos::new(HPos::Right, VPos::Center));
        let center = font(12.0).pos(Pos::new(HPos::Center, VPos::Top));
        for (row, (cause, line)) in self.causes.iter().zip(&self.kl).enumerate() {
            let y = TOP + CELL.1 * row as i32;
            root.draw_text(cause, &right, (LEFT - 8, y + CELL.1 / 2))?;
            for (block, value) in line.iter().enumerate() {
                let x = LEFT + CELL.0 * block as i32;
                let cell = [(x, y), (x + CELL.0 - 1, y + CELL.1 - 1)];
                root.draw(&Rectangle::new(cell, colour(shade(*value)).filled()))?;
            }
        }
        let below = TOP + CELL.1 * causes + 4;
        for block in (0..blocks).step_by(if blocks > 16 { 5 } else { 1 }) {
            let x = LEFT + CELL.0 * block + CELL.0 / 2;
            root.draw_text(&block.to_string(), &center, (x, below))?;
        }
        if high > 0.0 {
            let range =
                format!("block; from {low:.1e} (light) to {high:.1e} (dark) nats per token");
            root.draw_text(&range, &font(12.0).color(&GREY), (8, below + 18))?;
        }
        root.present()
    }
}

/// From nearly white at 0 to dark blue at 1.
fn colour(shade: f64) -> RGBColor {
    let mix = |light: f64, dark: f64| (light + (dark - light) * shade.clamp(0.0, 1.0)) as u8;
    RGBColor(mix(240.0, 8.0), mix(246.0, 48.0), mix(252.0, 107.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_for_every_block_and_cause() {
        let attribution = Attribution {
            base_model: "tiny".into(),
            tokens: 10,
            causes: vec!["weights".into(), "cache".into()],
            kl: vec![vec![0.1, 0.01, 0.0], vec![1e-4, 2e-4, 3e-4]],
            control: 0.0,
            all: 0.2,
        };
        let svg = attribution.to_svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("tiny") && svg.contains("weights"));
        assert_eq!(svg.matches("<rect").count(), 6);
        assert_eq!(svg, attribution.to_svg().unwrap());
    }
}
