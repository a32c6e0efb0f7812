//! `anybit distill-detector` and `anybit synth shapes`: detectors of objects in images, and a set of
//! such images made from a seed.

use std::path::Path;

use anybit_grad::vision::detect::{DetectorRecipe, DetectorReport, ShapesSpec};
use anybit_grad::vision::run::Watch;

use crate::Result;
use crate::train::read_toml;

/// Reads a recipe; `sets` are `KEY=VALUE` with dotted keys and TOML values, which win over the file.
///
/// # Errors
/// A file that cannot be read, TOML that is none, unknown keys, values of another type.
pub fn read_recipe(path: &Path, sets: &[String]) -> Result<DetectorRecipe> {
    read_toml(path, sets)
}

/// One run.
///
/// # Errors
/// As [`anybit_grad::vision::detect::run()`].
pub fn run(recipe: &DetectorRecipe, force: bool, watch: Watch<'_>) -> Result<DetectorReport> {
    Ok(anybit_grad::vision::detect::run(recipe, force, watch)?)
}

/// Writes a set of images with boxes as the folder `out`.
///
/// # Errors
/// As [`ShapesSpec::write`].
pub fn shapes(spec: &ShapesSpec, out: &Path, force: bool) -> Result<()> {
    Ok(spec.write(out, force)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The recipe that comes with the program, on a set of a few images.
    #[test]
    fn the_example_runs() {
        let folder = tempfile::tempdir().unwrap();
        let set = folder.path().join("shapes");
        let spec = ShapesSpec { train: 16, test: 6, size: 32, seed: 1 };
        shapes(&spec, &set, false).unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../runs/gor-shapes.toml");
        let sets = [
            format!("out={:?}", folder.path().join("out")),
            format!("data.folder={set:?}"),
            "full_precision.epochs=2".into(),
            "train.epochs=2".into(),
            "model.width=2".into(),
        ];
        let recipe = read_recipe(&path, &sets).unwrap();
        let report = run(&recipe, false, &mut |_, _, _| {}).unwrap();
        assert_eq!((report.train_images, report.test_images), (16, 6));
        assert!(report.map50.teacher.is_some());
        let error = read_recipe(&path, &["data.format=\"idx\"".into()]).unwrap_err().to_string();
        assert!(error.contains("format"), "{error}");
    }
}
