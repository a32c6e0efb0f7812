//! What `anybit distill-vision` reads.
//!
//! ```toml
//! out = "runs/fashion"
//! data = { format = "idx", folder = ".cache/fashion-mnist", train_images = 5000 }
//! model = { family = "tiny", width = 8 }
//! full_precision = { epochs = 20, batch = 64, lr = 3e-3 }   # of teachers and of the student's start
//! train = { epochs = 20, batch = 64, lr = 1e-3 }            # of the quantized student
//! [quantizer]
//! weights = { type = "lsq", bits = 2 }
//! activations = { type = "lsq_plus_activation", bits = 2 }
//! [distill]
//! teachers = [{ family = "resnet20", width = 8 }]
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::data::{Images, read_cifar10, read_folder, read_idx};
use super::model::ModelSpec;
use super::quantize::QuantizerSpec;
use super::train::Settings;
use super::{Result, VisionError};
use crate::distill::{BalancerSpec, DistillLoss, Mixture};

/// A run, and maybe a sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionRecipe {
    /// Folder of the run.
    pub out: PathBuf,
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// The images.
    pub data: DataSpec,
    /// The student.
    pub model: ModelSpec,
    /// How teachers, and the student before it is quantized, are trained.
    pub full_precision: Settings,
    /// The student's grids.
    pub quantizer: QuantizerSpec,
    /// How the quantized student is trained.
    pub train: Settings,
    /// Teachers; none for training on the labels alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distill: Option<DistillSpec>,
    /// What a sweep goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepSpec>,
}

/// Format of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same with `t10k`: MNIST and its
    /// kin.
    Idx,
    /// `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.
    Cifar10,
    /// `train/CLASS/*.png` and `test/CLASS/*.png`.
    Folder,
}

/// The images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSpec {
    /// Their format.
    pub format: Format,
    /// Folder of the files, under their usual names.
    pub folder: PathBuf,
    /// Classes of an IDX set.
    #[serde(default = "ten")]
    pub classes: usize,
    /// Training images, drawn with the seed; by default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_images: Option<usize>,
    /// Test images, the same for all seeds; by default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_images: Option<usize>,
    /// Share of the training labels that are redrawn evenly among the classes.
    #[serde(default)]
    pub label_noise: f64,
}

/// Teachers and how the student learns from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillSpec {
    /// Trained in full precision first; without any, the student before it is quantized is its own.
    #[serde(default)]
    pub teachers: Vec<ModelSpec>,
    /// What the student is to have in common with them.
    #[serde(default = "hinton")]
    pub loss: DistillLoss,
    /// How that is weighed against the labels.
    #[serde(default)]
    pub balancer: BalancerSpec,
    /// What the teacher's loss is multiplied by before the balancer sees it: its unit.
    #[serde(default = "one")]
    pub scale: f64,
    /// How several teachers become one.
    #[serde(default)]
    pub mixture: Mixture,
}

/// Every balancer at every scale with every seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SweepSpec {
    /// Balancers by name.
    pub balancers: BTreeMap<String, BalancerSpec>,
    /// Scales of the teacher's loss.
    #[serde(default = "scales")]
    pub scales: Vec<f64>,
    /// Seeds; balancers are compared seed by seed.
    #[serde(default = "seeds")]
    pub seeds: Vec<u64>,
}

fn ten() -> usize {
    10
}

fn one() -> f64 {
    1.0
}

fn hinton() -> DistillLoss {
    DistillLoss::ForwardKl { temperature: 4.0 }
}

fn scales() -> Vec<f64> {
    vec![0.01, 0.1, 1.0, 10.0, 100.0]
}

fn seeds() -> Vec<u64> {
    (0..5).collect()
}

impl DistillSpec {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Settings out of range.
    pub fn check(&self) -> Result<()> {
        if !self.loss.on_logits() {
            let what = format!("{} is no loss of logits", self.loss.name());
            return Err(VisionError::recipe("distill.loss", what));
        }
        check_scale("distill.scale", self.scale)?;
        self.loss.validate()?;
        Ok(self.balancer.validate()?)
    }
}

fn check_scale(key: &'static str, scale: f64) -> Result<()> {
    match scale > 0.0 && scale.is_finite() {
        true => Ok(()),
        false => Err(VisionError::recipe(key, format!("{scale}; it must be above 0"))),
    }
}

impl SweepSpec {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Nothing to go through, settings out of range.
    pub fn check(&self) -> Result<()> {
        if self.balancers.is_empty() || self.scales.is_empty() || self.seeds.is_empty() {
            let what = "name at least one of balancers, scales and seeds each";
            return Err(VisionError::recipe("sweep", what));
        }
        self.scales.iter().try_for_each(|scale| check_scale("sweep.scales", *scale))?;
        Ok(self.balancers.values().try_for_each(BalancerSpec::validate)?)
    }
}

impl VisionRecipe {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Settings that are out of range or contradict each other.
    pub fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.data.label_noise) {
            let what = format!("{}; it must be in [0, 1]", self.data.label_noise);
            return Err(VisionError::recipe("data.label_noise", what));
        }
        if !(2..=256).contains(&self.data.classes) {
            let what = format!("{}; it must be 2 to 256", self.data.classes);
            return Err(VisionError::recipe("data.classes", what));
        }
        self.full_precision.check("full_precision")?;
        self.train.check("train")?;
        self.quantizer.check()?;
        self.distill.as_ref().map_or(Ok(()), DistillSpec::check)?;
        self.sweep.as_ref().map_or(Ok(()), SweepSpec::check)
    }
}

impl DataSpec {
    /// Training images, drawn and with their noise, and test images.
    ///
    /// # Errors
    /// Files that cannot be read or are not what they should be; sets of other shapes; a subset of
    /// nothing.
    pub fn read(&self, seed: u64) -> Result<(Images, Images)> {
        let file = |name: &str| self.folder.join(name);
        let idx = |part: &str| {
            let images = file(&format!("{part}-images-idx3-ubyte"));
            read_idx(&images, &file(&format!("{part}-labels-idx1-ubyte")), self.classes)
        };
        let (mut train, mut test) = match self.format {
            Format::Idx => (idx("train")?, idx("t10k")?),
            Format::Cifar10 => {
                let batches = (1..=5).map(|index| file(&format!("data_batch_{index}.bin")));
                let train = read_cifar10(&batches.collect::<Vec<_>>())?;
                (train, read_cifar10(&[file("test_batch.bin")])?)
            }
            Format::Folder => read_folder(&self.folder)?,
        };
        if train.shape != test.shape {
            let what = format!(
                "training images are {:?}, test images {:?}; take files of the same set",
                train.shape, test.shape
            );
            return Err(VisionError::data(&self.folder, what));
        }
        draw(&mut train, self.train_images, seed, &self.folder)?;
        draw(&mut test, self.test_images, 0, &self.folder)?;
        train.add_label_noise(self.label_noise, seed);
        Ok((train, test))
    }
}

/// Keeps `count` of the images.
fn draw(images: &mut Images, count: Option<usize>, seed: u64, folder: &Path) -> Result<()> {
    let Some(count) = count else { return Ok(()) };
    if count == 0 || count > images.count() {
        let what = format!("{count} images of {}; ask for 1 to all of them", images.count());
        return Err(VisionError::data(folder, what));
    }
    *images = images.subset(count, seed);
    Ok(())
}
