//! Detectors in training, and whole runs on small sets made here.

use std::path::{Path, PathBuf};

use super::grid::{Grid, architecture};
use super::loss::train_detector;
use super::recipe::DetectorRecipe;
use super::run::{DetectorReport, Prepared, prepare, run, student};
use super::scenes::{Scenes, ScenesSpec};
use super::shapes::ShapesSpec;
use crate::Tensor;
use crate::distill::balance::fixed::FixedOptions;
use crate::distill::balance::gradnorm::GradNormOptions;
use crate::distill::balance::logit_gradient::LogitGradientOptions;
use crate::distill::{BalancerSpec, DistillLoss};
use crate::vision::checkpoint::load;
use crate::vision::model::{Family, ModelSpec};
use crate::vision::network::Network;
use crate::vision::quantize::QuantizerSpec;
use crate::vision::recipe::DistillSpec;
use crate::vision::train::{Settings, Teaching};

const SHAPES: ShapesSpec = ShapesSpec { train: 24, test: 8, size: 32, seed: 5 };
const PLAIN: ModelSpec = ModelSpec { family: Family::Plain, width: 4 };
const LOSS: DistillLoss = DistillLoss::ForwardKl { temperature: 2.0 };

fn fresh(scenes: &Scenes) -> Network {
    let images = &scenes.images;
    let architecture = architecture(PLAIN, images.shape, images.classes).unwrap();
    Network::new(architecture, images.normalization(), 11)
}

fn quantize(network: &mut Network, scenes: &Scenes, bits: u8) {
    let all: Vec<usize> = (0..scenes.count()).collect();
    let (first, _) = scenes.images.batch(&all, &network.normalization);
    network.quantize(&QuantizerSpec::lsq(bits, bits), &first).unwrap();
}

fn trained(
    network: &mut Network,
    scenes: &Scenes,
    settings: &Settings,
    teaching: Option<Teaching<'_>>,
) -> Vec<Vec<f32>> {
    train_detector(network, scenes, settings, teaching, 5, &mut |_, _| {}).unwrap();
    network.parameters.iter().map(|p| p.value.data().to_vec()).collect()
}

#[test]
fn eight_images_are_learned_by_heart() {
    let scenes = SHAPES.part("train", 8).unwrap();
    let mut network = fresh(&scenes);
    assert!(network.map50(&scenes).unwrap() < 0.5);
    // All images at once: the moments of a batch are those of the evaluation.
    trained(&mut network, &scenes, &Settings::new(250, 8, 1e-2), None);
    let reached = network.map50(&scenes).unwrap();
    assert!(reached > 0.9, "{reached}");
    quantize(&mut network, &scenes, 4);
    trained(&mut network, &scenes, &Settings::new(60, 8, 3e-3), None);
    let reached = network.map50(&scenes).unwrap();
    assert!(reached > 0.8, "{reached}");
}

/// Invariant 24: the same seed gives the same bits on any number of threads.
#[test]
fn invariant_24_threads_do_not_matter() {
    let scenes = SHAPES.part("train", 24).unwrap();
    let teacher = fresh(&scenes).logits(&scenes.images);
    let balancer = BalancerSpec::default();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut network = fresh(&scenes);
            quantize(&mut network, &scenes, 2);
            let teaching =
                Teaching { logits: &teacher, loss: &LOSS, balancer: &balancer, scale: 1.0 };
            trained(&mut network, &scenes, &Settings::new(2, 8, 1e-3), Some(teaching))
        })
    };
    assert!(run(1) == run(3));
}

/// Invariant 8: fixed weights (1, 0) are training without a teacher, to the bit; and every balancer
/// trains to finite values.
#[test]
fn invariant_8_no_weight_is_no_teacher() {
    let scenes = SHAPES.part("train", 16).unwrap();
    let teacher = fresh(&scenes).logits(&scenes.images);
    let with = |balancer: Option<BalancerSpec>| {
        let mut network = fresh(&scenes);
        quantize(&mut network, &scenes, 4);
        let teaching = balancer.as_ref().map(|balancer| Teaching {
            logits: &teacher,
            loss: &LOSS,
            balancer,
            scale: 1.0,
        });
        trained(&mut network, &scenes, &Settings::new(2, 8, 1e-3), teaching)
    };
    let fixed = |task: f64, teacher: f64| BalancerSpec::Fixed(FixedOptions { task, teacher });
    assert!(with(Some(fixed(1.0, 0.0))) == with(None));
    let all = [
        fixed(0.0, 1.0),
        BalancerSpec::default(),
        BalancerSpec::Gradnorm(GradNormOptions::default()),
        BalancerSpec::LogitGradient(LogitGradientOptions::default()),
    ];
    for balancer in all {
        let values = with(Some(balancer));
        assert!(values.iter().flatten().all(|v| v.is_finite()), "{balancer:?}");
    }
}

fn recipe(folder: &Path) -> DetectorRecipe {
    let set = folder.join("set");
    SHAPES.write(&set, true).unwrap();
    DetectorRecipe {
        out: folder.join("out"),
        seed: 3,
        data: ScenesSpec { folder: set, train_images: Some(20), test_images: None },
        model: PLAIN,
        full_precision: Settings::new(6, 10, 1e-2),
        quantizer: QuantizerSpec::lsq(4, 4),
        train: Settings::new(3, 10, 3e-3),
        distill: Some(DistillSpec {
            teachers: vec![ModelSpec { width: 8, ..PLAIN }],
            loss: LOSS,
            balancer: BalancerSpec::default(),
            scale: 1.0,
            mixture: Default::default(),
        }),
    }
}

#[test]
fn a_run_reports_and_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = recipe(folder.path());
    let runs = |force: bool| {
        let mut heard = Vec::new();
        let mut watch = |name: &str, done: u64, of: u64| heard.push((name.to_string(), done, of));
        run(&recipe, force, &mut watch).map(|report| (report, heard))
    };
    let (report, heard) = runs(false).unwrap();
    assert_eq!(heard.len(), 2 * 6 + 3);
    assert_eq!((report.train_images, report.test_images, report.epochs.len()), (20, 8, 3));
    assert!(report.map50.teacher.is_some() && report.map50.integers.is_some());
    assert!(report.epochs.iter().all(|e| e.teacher_loss > 0.0 && e.weights[1] > 0.0));
    let text = std::fs::read_to_string(recipe.out.join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<DetectorReport>(&text).unwrap(), report);
    assert!(runs(false).is_err(), "the output is there");
    // Again: what is in full precision is read, and the student is the same.
    let (again, heard) = runs(true).unwrap();
    assert_eq!((&again, heard.len()), (&report, 3));
    let stored = load(&recipe.out.join("model")).unwrap();
    let (_, test) = recipe.data.read().unwrap();
    assert_eq!(stored.map50(&test).unwrap(), report.map50.trained);
}

#[test]
fn integers_see_what_the_training_graph_sees() {
    let scenes = SHAPES.part("train", 8).unwrap();
    let mut network = fresh(&scenes);
    trained(&mut network, &scenes, &Settings::new(20, 8, 5e-3), None);
    quantize(&mut network, &scenes, 4);
    trained(&mut network, &scenes, &Settings::new(5, 8, 1e-3), None);
    let integers = crate::vision::IntegerNetwork::new(&network).unwrap();
    let (a, b) = (network.logits(&scenes.images), integers.logits(&scenes.images));
    let cells = 8 * Grid::of(&network.architecture).cells();
    assert_eq!((a.shape(), b.shape()), (&[cells, 8][..], &[cells, 8][..]));
    let size = a.data().iter().fold(0f32, |most, v| most.max(v.abs()));
    let near = a.data().iter().zip(b.data()).filter(|(a, b)| (*a - *b).abs() < 0.05 * size);
    // A value on the border of two codes may fall to either side.
    assert!(near.count() > a.len() * 9 / 10);
}

#[test]
fn a_teacher_that_is_no_number_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let mut recipe = recipe(folder.path());
    // Without teachers the student before it is quantized is its own.
    if let Some(distill) = &mut recipe.distill {
        distill.teachers.clear();
    }
    let prepared = prepare(&recipe, &mut |_, _, _| {}).unwrap();
    let outputs = prepared.start.logits(&prepared.train.images);
    assert_eq!(prepared.teacher.as_ref().map(Tensor::data), Some(outputs.data()));
    assert_eq!(prepared.map50.teacher, Some(prepared.map50.full_precision));
    let mut broken = outputs;
    broken.data_mut()[7 * 8] = f32::NAN;
    let broken = Prepared { teacher: Some(broken), ..prepared };
    let error = student(&recipe, &broken, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("step") && error.contains("NaN"), "{error}");
    // A stored network with such a weight is not even read.
    let stored = recipe.out.join("full-precision");
    let network = std::fs::read_dir(&stored).unwrap().next().unwrap().unwrap().path();
    let path = network.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    let error = prepare(&recipe, &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(error.contains("NaN"), "{error}");
}

#[test]
fn what_is_wrong_in_a_recipe_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = recipe(folder.path());
    good.check().unwrap();
    let says = |change: &dyn Fn(&mut DetectorRecipe), part: &str| {
        let mut recipe = good.clone();
        change(&mut recipe);
        let error = run(&recipe, true, &mut |_, _, _| {}).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    says(&|r| r.train.lr = 0.0, "train: lr = 0");
    says(&|r| r.quantizer.ends = 9, "quantizer.ends");
    says(&|r| r.data.folder = PathBuf::from("/no/images"), "/no/images");
    says(&|r| r.data.train_images = Some(99), "99 images of 24");
    let distill = |r: &mut DetectorRecipe, change: &dyn Fn(&mut DistillSpec)| {
        r.distill.iter_mut().for_each(change);
    };
    says(&|r| distill(r, &|d| d.scale = 0.0), "distill.scale");
    says(&|r| distill(r, &|d| d.teachers.push(PLAIN)), "2 teachers");
    let tiny = ModelSpec { family: Family::Tiny, width: 4 };
    says(&|r| distill(r, &|d| d.teachers = vec![tiny]), "8×8 cells are not the student's 4×4");
    let text = r#"{"out": "x", "date": {}}"#;
    let error = serde_json::from_str::<DetectorRecipe>(text).unwrap_err().to_string();
    assert!(error.contains("date"), "{error}");
}
