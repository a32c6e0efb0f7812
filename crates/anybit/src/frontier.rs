//! `anybit plan`: what a method that allocates predicts to lose at every size, without writing a
//! model.

use std::path::Path;

use anybit_eval::report::{Frontier, FrontierPoint};
use anybit_io::Checkpoint;
use anybit_ptq::{Event, Measured, Plan, Recipe, goal, journal, methods, transforms};

use crate::{Error, Result};

/// Bits asked for, from `low` to `high` in steps.
///
/// # Errors
/// No such range.
pub fn parse_range(text: &str) -> std::result::Result<Vec<f64>, String> {
    let form = "expected LOW:HIGH:STEP, such as 2:4:0.25, or one number";
    let numbers: Vec<f64> = text
        .split(':')
        .map(|part| part.trim().parse().map_err(|_| format!("{part:?} is no number; {form}")))
        .collect::<std::result::Result<_, _>>()?;
    let (low, high, step) = match numbers[..] {
        [one] => (one, one, 1.0),
        [low, high, step] => (low, high, step),
        _ => return Err(form.into()),
    };
    let valid = 1.0 <= low && low <= high && high <= 8.0 && step >= 0.001;
    if !valid {
        return Err(format!("bits are 1 to 8 in steps of at least 0.001; {form}"));
    }
    let count = ((high - low) / step + 1e-9) as usize;
    Ok((0..=count).map(|i| low + i as f64 * step).collect())
}

/// The frontier of `recipe`'s method over `bits`; what is measured is kept in `cache`.
///
/// # Errors
/// A method that does not allocate, and whatever measuring reports.
pub fn frontier(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    bits: &[f64],
    cache: &Path,
    observe: &mut dyn FnMut(Event),
) -> Result<Frontier> {
    if recipe.rounding()?.allocation().is_none() {
        return Err(Error::Usage(format!(
            "{} has one width per linear, so there is nothing to allocate; methods with a frontier: \
             {}",
            recipe.method,
            methods::allocating().join(", ")
        )));
    }
    let calibration = crate::quantize::calibrate(checkpoint, recipe)?;
    let transformed = transforms::prepare(checkpoint, recipe, &calibration, cache, observe)?;
    let checkpoint = transformed.as_ref().map_or(checkpoint, |t| &t.checkpoint);
    let source = journal::hash_source(checkpoint)?;
    let mut points = Vec::new();
    let mut known: Option<(toml::Table, Measured)> = None;
    for bits in bits {
        let recipe = Recipe { bits: *bits, max_bytes: None, ..recipe.clone() };
        let rounding = recipe.rounding()?;
        let mut plan = Plan::new(checkpoint, &recipe, None)?;
        if known.is_none() {
            checkpoint.check_finite()?;
        }
        // Options may depend on the bits: the range of widths, say.
        let options = rounding.options();
        let measured = match known.take().filter(|(same, _)| *same == options) {
            Some((_, measured)) => measured,
            None => {
                let asked = (source.as_str(), &recipe);
                Measured::take(checkpoint, &plan, asked, &calibration, cache, observe)?
            }
        };
        let predicted_error = goal::allocate(&mut plan, &recipe, &*rounding, &measured.tables)?;
        let (bits_per_weight_codes, bits_per_weight_total) = plan.bits_per_weight();
        points.push(FrontierPoint {
            bits: *bits,
            bits_per_weight_codes,
            bits_per_weight_total,
            weight_file_bytes: plan.weight_bytes(),
            predicted_error,
        });
        known = Some((options, measured));
    }
    let base_model = anybit_ptq::assemble::base_name(checkpoint);
    Ok(Frontier { base_model, method: recipe.method.clone(), points })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        assert_eq!(parse_range("2:3:0.25").unwrap(), [2.0, 2.25, 2.5, 2.75, 3.0]);
        assert_eq!(parse_range("3.2").unwrap(), [3.2]);
        for bad in ["", "2:3", "3:2:0.5", "0:2:1", "2:9:1", "2:3:0", "a:b:c"] {
            assert!(parse_range(bad).is_err(), "{bad}");
        }
        assert_eq!(methods::allocating(), ["skim", "anybit"]);
    }
}
