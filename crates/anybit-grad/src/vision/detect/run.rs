//! A detector's recipe from images to a report.
//!
//! | in `out/` | what |
//! |---|---|
//! | `full-precision/HASH/` | the teacher, and the student before it is quantized; made once for the same images and settings |
//! | `model/` | the quantized student, see [`crate::vision::checkpoint`] |
//! | `report.json` | what was reached |

use anybit_core::rng::stream;
use anybit_io::IoError;
use anybit_io::atomic::{check_absent, write_bytes};
use serde::{Deserialize, Serialize};

use super::grid::{Grid, architecture};
use super::loss::train_detector;
use super::metric::map50;
use super::recipe::DetectorRecipe;
use super::scenes::Scenes;
use crate::Tensor;
use crate::vision::checkpoint::save;
use crate::vision::infer::IntegerNetwork;
use crate::vision::model::ModelSpec;
use crate::vision::network::{EVALUATION_BATCH, Network};
use crate::vision::run::{Watch, finite, stored};
use crate::vision::train::{EpochFigures, Teaching};
use crate::vision::{Result, VisionError};

/// mAP@0.5 on the test images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Map50 {
    /// Of the teacher.
    pub teacher: Option<f64>,
    /// Of the student in full precision.
    pub full_precision: f64,
    /// Of the student when it was rounded and not trained yet.
    pub rounded: f64,
    /// Of the student when it was trained.
    pub trained: f64,
    /// Of the same in integers; none where the grids do not allow it.
    pub integers: Option<f64>,
}

/// What a run reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DetectorReport {
    /// The recipe.
    pub recipe: DetectorRecipe,
    /// Training images.
    pub train_images: usize,
    /// Test images.
    pub test_images: usize,
    /// Objects in the test images.
    pub test_objects: usize,
    /// Parameters of the student.
    pub parameters: usize,
    /// What was found.
    pub map50: Map50,
    /// Losses, weights and gradients of every epoch of the quantized student.
    pub epochs: Vec<EpochFigures>,
}

/// What is there before the student is quantized.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Training images.
    pub train: Scenes,
    /// Test images.
    pub test: Scenes,
    /// The student in full precision.
    pub start: Network,
    /// The teacher's outputs for the training images.
    pub teacher: Option<Tensor>,
    /// What was found so far.
    pub map50: Map50,
}

impl Network {
    /// mAP@0.5 of a detector.
    ///
    /// # Errors
    /// Outputs that are no numbers.
    pub fn map50(&self, scenes: &Scenes) -> Result<f64> {
        Ok(map50(&self.detect(scenes)?, &scenes.objects, scenes.images.classes))
    }
}

/// Trains as `recipe` says and writes what came of it.
///
/// # Errors
/// A recipe that cannot be used; images that cannot be read; an output that exists, unless `force`;
/// losses that are no numbers.
pub fn run(recipe: &DetectorRecipe, force: bool, watch: Watch<'_>) -> Result<DetectorReport> {
    recipe.check()?;
    let report_path = recipe.out.join("report.json");
    check_absent(&report_path, force)?;
    let prepared = prepare(recipe, watch)?;
    let (network, map50, epochs) = student(recipe, &prepared, watch)?;
    save(&network, &recipe.out.join("model"))?;
    let Prepared { train, test, .. } = prepared;
    let report = DetectorReport {
        recipe: recipe.clone(),
        train_images: train.count(),
        test_images: test.count(),
        test_objects: test.objects.iter().map(Vec::len).sum(),
        parameters: network.size(),
        map50,
        epochs,
    };
    let text = serde_json::to_string_pretty(&report);
    let text = text.map_err(|e| IoError::damaged(&report_path, e.to_string()))? + "\n";
    write_bytes(&report_path, text.as_bytes())?;
    Ok(report)
}

/// Reads the images and trains, or reads, all that is in full precision.
///
/// # Errors
/// As [`run`]; a teacher with other cells than the student, or whose outputs are no numbers.
pub fn prepare(recipe: &DetectorRecipe, watch: Watch<'_>) -> Result<Prepared> {
    let (train, test) = recipe.data.read()?;
    if let Some(spec) = teacher_spec(recipe) {
        check_cells(spec, recipe.model, &train)?;
    }
    let start = full_precision(recipe, &train, recipe.model, "student", watch)?;
    let mut map50 = Map50 { full_precision: start.map50(&test)?, ..Map50::default() };
    let mut teacher = None;
    if recipe.distill.is_some() {
        let outputs = match teacher_spec(recipe) {
            Some(spec) => {
                let network = full_precision(recipe, &train, spec, "teacher", watch)?;
                map50.teacher = Some(network.map50(&test)?);
                network.logits(&train.images)
            }
            None => {
                map50.teacher = Some(map50.full_precision);
                start.logits(&train.images)
            }
        };
        teacher = Some(finite(outputs, "the teacher")?);
    }
    Ok(Prepared { train, test, start, teacher, map50 })
}

/// The teacher of a recipe, unless that is the student itself.
fn teacher_spec(recipe: &DetectorRecipe) -> Option<ModelSpec> {
    recipe.distill.as_ref().and_then(|distill| distill.teachers.first().copied())
}

/// Fails unless both networks have the same cells: their outputs are compared cell by cell.
fn check_cells(teacher: ModelSpec, student: ModelSpec, scenes: &Scenes) -> Result<()> {
    let grid = |spec: ModelSpec| {
        architecture(spec, scenes.images.shape, scenes.images.classes).map(|a| Grid::of(&a))
    };
    let (teacher, student) = (grid(teacher)?, grid(student)?);
    match teacher == student {
        true => Ok(()),
        false => {
            let what = format!(
                "its {}×{} cells are not the student's {}×{}; take a family of the same stride",
                teacher.rows, teacher.cols, student.rows, student.cols
            );
            Err(VisionError::recipe("distill.teachers", what))
        }
    }
}

/// A trained network in full precision; read where it is there already.
fn full_precision(
    recipe: &DetectorRecipe,
    scenes: &Scenes,
    spec: ModelSpec,
    name: &str,
    watch: Watch<'_>,
) -> Result<Network> {
    let (settings, images) = (&recipe.full_precision, &scenes.images);
    let seed = stream(recipe.seed, name);
    let how =
        format!("detector {spec:?} {settings:?} {seed} {:?} {}", images.shape, images.classes);
    let boxes = format!("{:?}", scenes.objects);
    let facts = [how.as_bytes(), boxes.as_bytes(), &images.pixels[..]];
    stored(&recipe.out, &facts, || {
        let architecture = architecture(spec, images.shape, images.classes)?;
        let mut network = Network::new(architecture, images.normalization(), seed);
        let mut seen = |epoch: u64, _: &EpochFigures| watch(name, epoch + 1, settings.epochs);
        train_detector(&mut network, scenes, settings, None, seed, &mut seen)?;
        Ok(network)
    })
}

/// The quantized student, what it finds, and the figures of its epochs.
///
/// # Errors
/// As [`run`].
pub fn student(
    recipe: &DetectorRecipe,
    prepared: &Prepared,
    watch: Watch<'_>,
) -> Result<(Network, Map50, Vec<EpochFigures>)> {
    let Prepared { train, test, start, teacher, map50 } = prepared;
    let mut network = start.clone();
    let first: Vec<usize> = (0..train.count().min(4 * EVALUATION_BATCH)).collect();
    let (first, _) = train.images.batch(&first, &network.normalization);
    network.quantize(&recipe.quantizer, &first)?;
    let rounded = network.map50(test)?;
    let teaching = teacher.as_ref().zip(recipe.distill.as_ref()).map(|(logits, distill)| {
        Teaching { logits, loss: &distill.loss, balancer: &distill.balancer, scale: distill.scale }
    });
    let mut seen = |epoch: u64, _: &EpochFigures| {
        watch("quantized student", epoch + 1, recipe.train.epochs);
    };
    let order = stream(recipe.seed, "quantized");
    let epochs = train_detector(&mut network, train, &recipe.train, teaching, order, &mut seen)?;
    let trained = network.map50(test)?;
    let map50 = Map50 { rounded, trained, integers: in_integers(&network, test)?, ..*map50 };
    Ok((network, map50, epochs))
}

/// mAP@0.5 in integers, where the grids allow them.
fn in_integers(network: &Network, scenes: &Scenes) -> Result<Option<f64>> {
    let integers = match IntegerNetwork::new(network) {
        Ok(integers) => integers,
        Err(VisionError::NoIntegers { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let found = Grid::of(&network.architecture).detections(&integers.logits(&scenes.images))?;
    Ok(Some(map50(&found, &scenes.objects, scenes.images.classes)))
}
