//! Networks in training, and whole runs on small sets of images made here.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anybit_core::rng::SplitMix64;

use super::VisionReport;
use super::data::Images;
use super::infer::IntegerNetwork;
use super::model::{Family, ModelSpec};
use super::network::{Network, accuracy, predictions};
use super::ops::Shape;
use super::quantize::QuantizerSpec;
use super::recipe::{DataSpec, DistillSpec, Format, SweepSpec, VisionRecipe};
use super::run::{prepare, run, student};
use super::train::{OptimizerKind, Settings, Teaching, train};
use crate::Tensor;
use crate::distill::balance::fixed::FixedOptions;
use crate::distill::balance::gradnorm::GradNormOptions;
use crate::distill::balance::logit_gradient::LogitGradientOptions;
use crate::distill::{BalancerSpec, DistillLoss};
use crate::testing::random;

const SHAPE: Shape = Shape { height: 8, width: 8, channels: 1 };
const CLASSES: usize = 4;
const KL: DistillLoss = DistillLoss::ForwardKl { temperature: 4.0 };

/// Noisy images of a bright bar, whose direction and half are the class.
fn bars(count: usize, seed: u64) -> Images {
    let mut rng = SplitMix64::new(seed);
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let (class, place) = (rng.below(CLASSES), rng.below(4));
        labels.push(class as u8);
        for pixel in 0..SHAPE.pixels() {
            let (row, col) = (pixel / 8, pixel % 8);
            let along = if class < 2 { row } else { col };
            let bar = along == place + 4 * (class % 2);
            let value = if bar { 200.0 } else { 60.0 } + 25.0 * rng.normal();
            pixels.push(value.clamp(0.0, 255.0) as u8);
        }
    }
    Images::new(Path::new("bars"), SHAPE, CLASSES, pixels, labels).unwrap()
}

fn fresh(family: Family, images: &Images) -> Network {
    let architecture = ModelSpec { family, width: 8 }.build(SHAPE, CLASSES).unwrap();
    Network::new(architecture, images.normalization(), 11)
}

/// Rounds the operands of `network`.
fn quantize(network: &mut Network, images: &Images, spec: &QuantizerSpec) {
    let indices: Vec<usize> = (0..images.count().min(64)).collect();
    let (first, _) = images.batch(&indices, &network.normalization);
    network.quantize(spec, &first).unwrap();
}

fn trained(
    network: &mut Network,
    images: &Images,
    settings: &Settings,
    teaching: Option<Teaching<'_>>,
) -> Vec<Vec<f32>> {
    train(network, images, settings, teaching, 5, &mut |_, _| {}).unwrap();
    network.parameters.iter().map(|p| p.value.data().to_vec()).collect()
}

fn reached(network: &Network, images: &Images) -> f64 {
    accuracy(&network.logits(images), &images.labels)
}

#[test]
fn thirty_two_images_are_learned_by_heart() {
    let images = bars(32, 1);
    for family in [Family::Tiny, Family::Resnet20, Family::Mobilenet] {
        let mut network = fresh(family, &images);
        trained(&mut network, &images, &Settings::new(60, 16, 5e-3), None);
        assert!(reached(&network, &images) > 0.96, "{family:?}");
        // Nine weights of a depthwise filter make little of four values.
        let bits = if family == Family::Mobilenet { 4 } else { 2 };
        quantize(&mut network, &images, &QuantizerSpec::lsq(bits, bits));
        trained(&mut network, &images, &Settings::new(60, 16, 2e-3), None);
        assert!(reached(&network, &images) > 0.9, "{family:?}, quantized");
    }
    let mut network = fresh(Family::Tiny, &images);
    let sgd = Settings { optimizer: OptimizerKind::Sgd, ..Settings::new(100, 16, 0.05) };
    trained(&mut network, &images, &sgd, None);
    assert!(reached(&network, &images) > 0.96);
}

/// Invariant 24: the same seed gives the same bits on any number of threads.
#[test]
fn invariant_24_threads_do_not_matter() {
    let images = bars(100, 2);
    let teacher = random(3, [100, CLASSES]);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut network = fresh(Family::Mobilenet, &images);
            quantize(&mut network, &images, &QuantizerSpec::lsq(2, 2));
            let balancer = BalancerSpec::default();
            let teaching =
                Teaching { logits: &teacher, loss: &KL, balancer: &balancer, scale: 1.0 };
            let settings = Settings::new(2, 16, 1e-3);
            let values = trained(&mut network, &images, &settings, Some(teaching));
            (values, network.logits(&images))
        })
    };
    assert!(run(1) == run(3));
}

/// Invariant 8: fixed weights (1, 0) are training without a teacher, to the bit; and every balancer
/// trains to finite values, at any scale.
#[test]
fn invariant_8_no_weight_is_no_teacher() {
    let images = bars(64, 3);
    let teacher = random(4, [64, CLASSES]);
    let settings = Settings::new(2, 16, 1e-3);
    let with = |balancer: Option<BalancerSpec>, scale: f64| {
        let mut network = fresh(Family::Tiny, &images);
        quantize(&mut network, &images, &QuantizerSpec::lsq(2, 2));
        let teaching = balancer.as_ref().map(|balancer| Teaching {
            logits: &teacher,
            loss: &KL,
            balancer,
            scale,
        });
        trained(&mut network, &images, &settings, teaching)
    };
    let fixed = |task: f64, teacher: f64| BalancerSpec::Fixed(FixedOptions { task, teacher });
    assert!(with(Some(fixed(1.0, 0.0)), 1.0) == with(None, 1.0));
    let all = [
        fixed(0.0, 1.0),
        BalancerSpec::default(),
        BalancerSpec::Gradnorm(GradNormOptions::default()),
        BalancerSpec::LogitGradient(LogitGradientOptions::default()),
    ];
    for balancer in all {
        for scale in [0.01, 1.0, 100.0] {
            let values = with(Some(balancer), scale);
            assert!(values.iter().flatten().all(|v| v.is_finite()), "{balancer:?} {scale}");
        }
    }
}

#[test]
fn integers_see_the_classes_of_the_training_graph() {
    let (images, test) = (bars(200, 5), bars(300, 6));
    for (family, bits) in [(Family::Tiny, 2), (Family::Mobilenet, 2), (Family::Tiny, 1)] {
        let mut network = fresh(family, &images);
        trained(&mut network, &images, &Settings::new(5, 20, 5e-3), None);
        quantize(&mut network, &images, &QuantizerSpec::lsq(bits, bits));
        trained(&mut network, &images, &Settings::new(5, 20, 2e-3), None);
        let integers = IntegerNetwork::new(&network).unwrap();
        let (a, b) = (predictions(&network.logits(&test)), predictions(&integers.logits(&test)));
        let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        assert!(differ <= 1, "{family:?} at {bits} bits: {differ} of 300");
    }
}

/// Writes a set as IDX files.
fn write_idx(folder: &Path, part: &str, images: &Images) {
    let file = |kind: &str, dims: &[usize], values: &[u8]| {
        let mut bytes = vec![0, 0, 8, dims.len() as u8];
        dims.iter().for_each(|d| bytes.extend((*d as u32).to_be_bytes()));
        bytes.extend(values);
        std::fs::write(folder.join(format!("{part}-{kind}-ubyte")), bytes).unwrap();
    };
    file("images-idx3", &[images.count(), SHAPE.height, SHAPE.width], &images.pixels);
    file("labels-idx1", &[images.count()], &images.labels);
}

fn recipe(folder: &Path) -> VisionRecipe {
    write_idx(folder, "train", &bars(120, 7));
    write_idx(folder, "t10k", &bars(80, 8));
    VisionRecipe {
        out: folder.join("out"),
        seed: 3,
        data: DataSpec {
            format: Format::Idx,
            folder: folder.to_owned(),
            classes: CLASSES,
            train_images: Some(100),
            test_images: None,
            label_noise: 0.1,
        },
        model: ModelSpec { family: Family::Tiny, width: 4 },
        full_precision: Settings::new(4, 20, 5e-3),
        quantizer: QuantizerSpec::lsq(2, 2),
        train: Settings::new(3, 20, 2e-3),
        distill: Some(DistillSpec {
            teachers: vec![
                ModelSpec { family: Family::Tiny, width: 8 },
                ModelSpec { family: Family::Mobilenet, width: 4 },
            ],
            loss: KL,
            balancer: BalancerSpec::default(),
            scale: 1.0,
            mixture: Default::default(),
        }),
        sweep: None,
    }
}

#[test]
fn a_run_reports_and_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let runs = |force: bool| {
        let mut heard = Vec::new();
        let mut watch = |name: &str, done: u64, of: u64| heard.push((name.to_string(), done, of));
        run(&recipe, force, &mut watch).map(|(report, speed)| (report, speed, heard))
    };
    let (report, speed, heard) = runs(false).unwrap();
    assert_eq!(heard.len(), 3 * 4 + 3);
    assert_eq!(heard[heard.len() - 1], ("quantized student".to_string(), 3, 3));
    assert_eq!((report.train_images, report.test_images), (100, 80));
    assert_eq!((report.teachers.len(), report.student.epochs.len()), (2, 3));
    assert!(report.integers.unwrap().agreement > 0.98 && speed.is_some());
    let text = std::fs::read_to_string(recipe.out.join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<VisionReport>(&text).unwrap(), report);
    assert!(runs(false).is_err(), "the output is there");
    // Again: what is in full precision is read, and the student is the same.
    let (again, _, heard) = runs(true).unwrap();
    assert_eq!((&again, heard.len()), (&report, 3));
    let stored = super::checkpoint::load(&recipe.out.join("model")).unwrap();
    let test = recipe.data.read(recipe.seed).unwrap().1;
    assert_eq!(reached(&stored, &test), report.student.accuracy);
}

#[test]
fn without_teachers_the_student_is_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = recipe(folder.path());
    if let Some(distill) = &mut recipe.distill {
        distill.teachers.clear();
    }
    let prepared = prepare(&recipe, 1, &mut |_, _, _| {}).unwrap();
    let logits = prepared.start.logits(&prepared.train);
    assert_eq!(prepared.teacher.as_ref().map(Tensor::data), Some(logits.data()));
    let mut broken = prepared.clone();
    if let Some(teacher) = &mut broken.teacher {
        teacher.data_mut()[7] = f32::NAN;
    }
    let distill = recipe.distill.as_ref();
    let error = student(&recipe, &broken, distill, 1, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("step") && error.contains("NaN"), "{error}");
}

#[test]
fn what_is_wrong_in_a_recipe_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = recipe(folder.path());
    good.check().unwrap();
    let says = |change: &dyn Fn(&mut VisionRecipe), part: &str| {
        let mut recipe = good.clone();
        change(&mut recipe);
        let error = run(&recipe, true, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    says(&|r| r.train.lr = 0.0, "train: lr = 0");
    says(&|r| r.full_precision.batch = 1, "full_precision: 4 epochs of batches of 1");
    says(&|r| r.data.label_noise = 1.5, "data.label_noise");
    says(&|r| r.data.train_images = Some(121), "121 images of 120");
    says(&|r| r.data.classes = 2, "there are classes 0 to 1");
    says(&|r| r.data.folder = PathBuf::from("/no/images"), "/no/images");
    says(&|r| r.quantizer.ends = 9, "quantizer.ends");
    let distill = |r: &mut VisionRecipe, change: &dyn Fn(&mut DistillSpec)| {
        r.distill.iter_mut().for_each(change);
    };
    says(&|r| distill(r, &|d| d.scale = 0.0), "distill.scale");
    let feature = DistillLoss::FeatureMse { normalise: false };
    says(&|r| distill(r, &|d| d.loss = feature), "feature_mse is no loss of logits");
    let (balancers, seeds) = (BTreeMap::new(), vec![0]);
    let sweep = SweepSpec { balancers, scales: vec![1.0], seeds };
    says(&|r| r.sweep = Some(sweep.clone()), "sweep");
}
