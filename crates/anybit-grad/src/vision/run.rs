//! A recipe from images to a report.
//!
//! | in `out/` | what |
//! |---|---|
//! | `full-precision/HASH/` | teachers and the student before it is quantized; made once for the same images and settings |
//! | `model/` | the quantized student, see [`super::checkpoint`] |
//! | `report.json` | what was reached |
//!
//! A sweep calls [`prepare`] once per seed and [`student`] for each of its cells.

use std::path::Path;
use std::time::Instant;

use anybit_core::rng::stream;
use anybit_io::IoError;
use anybit_io::atomic::{check_absent, write_bytes};
use serde::{Deserialize, Serialize};

use super::checkpoint::{load, save};
use super::data::{Images, Normalization};
use super::infer::IntegerNetwork;
use super::model::ModelSpec;
use super::network::{EVALUATION_BATCH, Mode, Network, accuracy, predictions};
use super::recipe::{DistillSpec, VisionRecipe};
use super::train::{EpochFigures, Teaching, train};
use super::{Result, VisionError};
use crate::distill::{TeacherWeights, mix, row_weights};
use crate::{Tape, Tensor};

/// Rounds of the timing; the median counts.
const ROUNDS: usize = 15;

/// Is told what is trained, and the epochs that are done, of how many.
pub type Watch<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// What all students of a seed have in common.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Training images.
    pub train: Images,
    /// Test images.
    pub test: Images,
    /// The student in full precision.
    pub start: Network,
    /// The teachers' logits of the training images, as one teacher.
    pub teacher: Option<Tensor>,
    /// Accuracy of the student in full precision on the test images.
    pub full_precision: f64,
    /// Of the teachers, one by one.
    pub teachers: Vec<f64>,
    /// Of the teachers as one.
    pub ensemble: Option<f64>,
}

/// What a student reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StudentFigures {
    /// Accuracy on the test images when it was rounded and not trained yet.
    pub rounded: f64,
    /// When it was trained.
    pub accuracy: f64,
    /// Losses, weights and gradients of every epoch.
    pub epochs: Vec<EpochFigures>,
}

/// What integers computed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct IntegerFigures {
    /// Accuracy on the test images.
    pub accuracy: f64,
    /// Share of the test images whose class is that of the training graph.
    pub agreement: f64,
}

/// What a run reached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VisionReport {
    /// The recipe.
    pub recipe: VisionRecipe,
    /// Training images.
    pub train_images: usize,
    /// Test images.
    pub test_images: usize,
    /// Parameters of the student.
    pub parameters: usize,
    /// Accuracy of the student in full precision.
    pub full_precision: f64,
    /// Of the teachers.
    pub teachers: Vec<f64>,
    /// Of the teachers as one.
    pub ensemble: Option<f64>,
    /// Of the student.
    pub student: StudentFigures,
    /// In integers; none where the grids do not allow it.
    pub integers: Option<IntegerFigures>,
}

/// Time of an image, in milliseconds: medians of rounds in which both take turns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// The student in full precision on the tape, without gradients.
    pub full_precision: f64,
    /// The student in integers.
    pub integers: f64,
}

/// Trains as `recipe` says and writes what came of it.
///
/// # Errors
/// A recipe that cannot be used; images that cannot be read; an output that exists, unless `force`;
/// losses that are no numbers.
pub fn run(
    recipe: &VisionRecipe,
    force: bool,
    watch: Watch<'_>,
) -> Result<(VisionReport, Option<Speed>)> {
    recipe.check()?;
    let report_path = recipe.out.join("report.json");
    check_absent(&report_path, force)?;
    let prepared = prepare(recipe, recipe.seed, watch)?;
    let (network, student) =
        student(recipe, &prepared, recipe.distill.as_ref(), recipe.seed, watch)?;
    save(&network, &recipe.out.join("model"))?;
    let integers = match IntegerNetwork::new(&network) {
        Ok(integers) => Some(integers),
        Err(VisionError::NoIntegers { .. }) => None,
        Err(error) => return Err(error),
    };
    let Prepared { train, test, start, full_precision, teachers, ensemble, .. } = prepared;
    let report = VisionReport {
        recipe: recipe.clone(),
        train_images: train.count(),
        test_images: test.count(),
        parameters: network.size(),
        full_precision,
        teachers,
        ensemble,
        student,
        integers: integers.as_ref().map(|i| compared(&network, i, &test)),
    };
    let text = serde_json::to_string_pretty(&report);
    let text = text.map_err(|e| IoError::damaged(&report_path, e.to_string()))? + "\n";
    write_bytes(&report_path, text.as_bytes())?;
    Ok((report, integers.map(|integers| speed(&start, &integers, &test))))
}

/// Reads the images of a seed and trains, or reads, all that is in full precision.
///
/// # Errors
/// As [`run`].
pub fn prepare(recipe: &VisionRecipe, seed: u64, watch: Watch<'_>) -> Result<Prepared> {
    let (train, test) = recipe.data.read(seed)?;
    let normalization = train.normalization();
    let maker = Maker { recipe, train: &train, normalization };
    let start = maker.network(recipe.model, stream(seed, "student"), "student", watch)?;
    let full_precision = accuracy(&start.logits(&test), &test.labels);
    let (mut teacher, mut teachers, mut ensemble) = (None, Vec::new(), None);
    if let Some(distill) = &recipe.distill {
        let (mut of_train, mut of_test) = (Vec::new(), Vec::new());
        for (index, spec) in distill.teachers.iter().enumerate() {
            let name = format!("teacher {index}");
            let network = maker.network(*spec, stream(seed, &name), &name, watch)?;
            of_train.push(finite(network.logits(&train), &name)?);
            of_test.push(network.logits(&test));
        }
        if of_train.is_empty() {
            of_train.push(finite(start.logits(&train), "student")?);
            of_test.push(start.logits(&test));
        }
        teachers = of_test.iter().map(|logits| accuracy(logits, &test.labels)).collect();
        ensemble = Some(accuracy(&as_one(distill, of_test, &test)?, &test.labels));
        teacher = Some(as_one(distill, of_train, &train)?);
    }
    Ok(Prepared { train, test, start, teacher, full_precision, teachers, ensemble })
}

/// Fails when a teacher's output is no number.
pub(super) fn finite(logits: Tensor, name: &str) -> Result<Tensor> {
    match logits.data().iter().all(|v| v.is_finite()) {
        true => Ok(logits),
        false => {
            let what = "its logits of the training images are no numbers".into();
            Err(VisionError::NotFinite { place: name.into(), what })
        }
    }
}

/// Logits of several teachers as those of one.
fn as_one(distill: &DistillSpec, mut logits: Vec<Tensor>, images: &Images) -> Result<Tensor> {
    if logits.len() == 1 {
        return Ok(logits.remove(0));
    }
    let all: Vec<&Tensor> = logits.iter().collect();
    let targets: Vec<u32> = images.labels.iter().map(|l| u32::from(*l)).collect();
    let weights = row_weights(&TeacherWeights::Uniform, &all, &targets)?;
    Ok(mix(&all, &weights, distill.mixture, distill.loss.temperature())?)
}

/// The network in full precision that `facts` stand for, everything that it depends on: read from
/// `out` where it is there already, else made and stored.
pub(super) fn stored(
    out: &Path,
    facts: &[&[u8]],
    make: impl FnOnce() -> Result<Network>,
) -> Result<Network> {
    let mut hash = blake3::Hasher::new();
    for fact in facts {
        hash.update(fact);
    }
    let name = hash.finalize().to_hex();
    let path = out.join("full-precision").join(&name.as_str()[..16]);
    if path.exists() {
        return load(&path);
    }
    let network = make()?;
    save(&network, &path)?;
    Ok(network)
}

/// Makes networks of full precision.
struct Maker<'a> {
    recipe: &'a VisionRecipe,
    train: &'a Images,
    normalization: Normalization,
}

impl Maker<'_> {
    /// A trained network; read where it is there already.
    fn network(&self, spec: ModelSpec, seed: u64, name: &str, watch: Watch<'_>) -> Result<Network> {
        let (settings, images) = (&self.recipe.full_precision, self.train);
        let how = format!("{spec:?} {settings:?} {seed}");
        let of = format!("{:?} {}", images.shape, images.classes);
        let facts = [how.as_bytes(), of.as_bytes(), &images.pixels[..], &images.labels[..]];
        stored(&self.recipe.out, &facts, || {
            let architecture = spec.build(images.shape, images.classes)?;
            let mut network = Network::new(architecture, self.normalization.clone(), seed);
            let mut seen = |epoch: u64, _: &EpochFigures| watch(name, epoch + 1, settings.epochs);
            train(&mut network, images, settings, None, seed, &mut seen)?;
            Ok(network)
        })
    }
}

/// A quantized student, trained with what `distill` says and the teacher of `prepared`.
///
/// # Errors
/// As [`run`].
pub fn student(
    recipe: &VisionRecipe,
    prepared: &Prepared,
    distill: Option<&DistillSpec>,
    seed: u64,
    watch: Watch<'_>,
) -> Result<(Network, StudentFigures)> {
    let Prepared { train: images, test, start, teacher, .. } = prepared;
    let mut network = start.clone();
    let count = images.count().min(4 * EVALUATION_BATCH);
    let indices: Vec<usize> = (0..count).collect();
    let (first, _) = images.batch(&indices, &network.normalization);
    network.quantize(&recipe.quantizer, &first)?;
    let rounded = accuracy(&network.logits(test), &test.labels);
    let teaching = teacher.as_ref().zip(distill).map(|(logits, distill)| Teaching {
        logits,
        loss: &distill.loss,
        balancer: &distill.balancer,
        scale: distill.scale,
    });
    let mut seen = |epoch: u64, _: &EpochFigures| {
        watch("quantized student", epoch + 1, recipe.train.epochs);
    };
    let order = stream(seed, "quantized");
    let epochs = train(&mut network, images, &recipe.train, teaching, order, &mut seen)?;
    let accuracy = accuracy(&network.logits(test), &test.labels);
    Ok((network, StudentFigures { rounded, accuracy, epochs }))
}

/// Integers beside the training graph.
fn compared(network: &Network, integers: &IntegerNetwork, test: &Images) -> IntegerFigures {
    let (graph, found) = (network.logits(test), integers.logits(test));
    let (a, b) = (predictions(&graph), predictions(&found));
    let same = a.iter().zip(&b).filter(|(a, b)| a == b).count();
    IntegerFigures {
        accuracy: accuracy(&found, &test.labels),
        agreement: same as f64 / a.len().max(1) as f64,
    }
}

/// Times both in turns on a batch of test images.
fn speed(full: &Network, integers: &IntegerNetwork, test: &Images) -> Speed {
    let indices: Vec<usize> = (0..test.count().min(EVALUATION_BATCH)).collect();
    let (batch, _) = test.batch(&indices, &full.normalization);
    let (mut tape, mut times) = (Tape::default(), [Vec::new(), Vec::new()]);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        full.forward(&mut tape, &batch, Mode::Evaluate);
        tape.reset();
        times[0].push(start.elapsed().as_secs_f64());
        let start = Instant::now();
        std::hint::black_box(integers.forward(&batch));
        times[1].push(start.elapsed().as_secs_f64());
    }
    let [full_precision, integers] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        1e3 * times[ROUNDS / 2] / indices.len().max(1) as f64
    });
    Speed { full_precision, integers }
}
