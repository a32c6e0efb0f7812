//! `anybit distill-vision`: one run of a recipe, or a sweep over balancers, scales of the teacher's
//! loss and seeds.
//!
//! A sweep isolates what the unit of the teacher's loss does: the same images, teachers, start and
//! order of batches for every balancer and scale of a seed. What must not change at all is training
//! on the labels alone, which is run at one scale for that reason. `spread` is the range of the mean
//! accuracy over the scales: near 0 for a balancer that does not care about the unit.
//!
//! `out/sweep.jsonl` has the recipe on its first line and then a line per finished cell; a sweep
//! that was interrupted goes on behind the last whole line.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use anybit_eval::statistics::mean_and_error;
use anybit_grad::distill::BalancerSpec;
use anybit_grad::vision::recipe::{DistillSpec, SweepSpec, VisionRecipe};
use anybit_grad::vision::run::{Prepared, Watch, prepare, student};
use anybit_grad::vision::{Speed, VisionReport};
use anybit_io::IoError;
use anybit_io::atomic::write_bytes;
use serde::{Deserialize, Serialize};

use crate::train::read_toml;
use crate::{Error, Result};

/// The balancer that others are compared with, seed by seed.
const REFERENCE: &str = "fixed";

/// Reads a recipe; `sets` are `KEY=VALUE` with dotted keys and TOML values, which win over the file.
///
/// # Errors
/// A file that cannot be read, TOML that is none, unknown keys, values of another type.
pub fn read_recipe(path: &Path, sets: &[String]) -> Result<VisionRecipe> {
    read_toml(path, sets)
}

/// One run.
///
/// # Errors
/// As [`anybit_grad::vision::run()`].
pub fn run(
    recipe: &VisionRecipe,
    force: bool,
    watch: Watch<'_>,
) -> Result<(VisionReport, Option<Speed>)> {
    Ok(anybit_grad::vision::run(recipe, force, watch)?)
}

/// A finished cell of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// The balancer's name in the recipe.
    pub balancer: String,
    /// What the teacher's loss was multiplied by.
    pub scale: f64,
    /// The seed.
    pub seed: u64,
    /// Accuracy of the student on the test images.
    pub accuracy: f64,
    /// The same network in full precision.
    pub full_precision: f64,
    /// The teachers, one by one.
    pub teachers: Vec<f64>,
    /// The teachers as one.
    pub ensemble: Option<f64>,
    /// Weights of task and teacher in the last epoch.
    pub weights: [f64; 2],
    /// Cosine between both gradients at the logits in the last epoch.
    pub cosine: f64,
}

/// Mean over seeds with its standard error, which a single seed has not.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Mean {
    /// The mean.
    pub mean: f64,
    /// Its standard error.
    pub error: Option<f64>,
    /// Seeds.
    pub seeds: usize,
}

impl Mean {
    fn of(values: &[f64]) -> Self {
        let (mean, error) = mean_and_error(values);
        Self { mean, error, seeds: values.len() }
    }
}

/// A balancer at a scale.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The balancer.
    pub balancer: String,
    /// The scale.
    pub scale: f64,
    /// Accuracy.
    pub accuracy: Mean,
    /// Accuracy less that of the balancer named "fixed" at the same scale, paired by seed.
    pub over_fixed: Option<Mean>,
}

/// What a sweep found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepReport {
    /// The recipe.
    pub recipe: VisionRecipe,
    /// Accuracy of the student in full precision.
    pub full_precision: Mean,
    /// Accuracy of the teachers as one.
    pub ensemble: Option<Mean>,
    /// Balancers and scales.
    pub rows: Vec<Row>,
    /// Range of the mean accuracy over the scales, by balancer.
    pub spread: BTreeMap<String, f64>,
}

/// Goes through all cells of the recipe's sweep that are not done yet and writes
/// `out/sweep.json`. `cell` is told of every cell that is done, and of how many.
///
/// # Errors
/// A recipe without a sweep or teachers, or other than the one that is on disk, unless `force`;
/// whatever a run can fail with.
pub fn sweep(
    recipe: &VisionRecipe,
    force: bool,
    watch: Watch<'_>,
    cell: &mut dyn FnMut(&Cell, usize, usize),
) -> Result<SweepReport> {
    recipe.check().map_err(Error::Vision)?;
    let (Some(sweep), Some(distill)) = (&recipe.sweep, &recipe.distill) else {
        return Err(Error::Usage("a sweep needs the sections sweep and distill".into()));
    };
    let (mut log, mut cells) = Log::open(recipe, force)?;
    let all = places(sweep);
    cells.retain(|c| all.contains(&c.place()));
    let done: BTreeSet<Place> = cells.iter().map(Cell::place).collect();
    for seed in &sweep.seeds {
        let missing: Vec<&Place> =
            all.iter().filter(|p| p.seed == *seed && !done.contains(p)).collect();
        if missing.is_empty() {
            continue;
        }
        let prepared = prepare(recipe, *seed, watch)?;
        for place in missing {
            let finished = run_cell(recipe, &prepared, distill, sweep, place, watch)?;
            log.write(&finished)?;
            cells.push(finished);
            if let Some(last) = cells.last() {
                cell(last, cells.len(), all.len());
            }
        }
    }
    let report = report(recipe, sweep, &cells);
    let path = recipe.out.join("sweep.json");
    write_bytes(&path, json(&report, &path, true)?.as_bytes())?;
    Ok(report)
}

/// Where a cell is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    balancer: String,
    /// The scale's bits, which have an order.
    scale: u64,
    seed: u64,
}

impl Cell {
    fn place(&self) -> Place {
        Place { balancer: self.balancer.clone(), scale: self.scale.to_bits(), seed: self.seed }
    }
}

/// Whether the teacher's loss has no weight, so that its scale does not matter.
fn without_teacher(balancer: &BalancerSpec) -> bool {
    matches!(balancer, BalancerSpec::Fixed(options) if options.teacher == 0.0)
}

/// All cells.
fn places(sweep: &SweepSpec) -> BTreeSet<Place> {
    let mut all = BTreeSet::new();
    for (name, balancer) in &sweep.balancers {
        let scales = match without_teacher(balancer) {
            true => &[1.0][..],
            false => &sweep.scales[..],
        };
        for scale in scales {
            all.extend(sweep.seeds.iter().map(|seed| Place {
                balancer: name.clone(),
                scale: scale.to_bits(),
                seed: *seed,
            }));
        }
    }
    all
}

fn run_cell(
    recipe: &VisionRecipe,
    prepared: &Prepared,
    distill: &DistillSpec,
    sweep: &SweepSpec,
    place: &Place,
    watch: Watch<'_>,
) -> Result<Cell> {
    let (scale, balancer) = (f64::from_bits(place.scale), sweep.balancers[&place.balancer]);
    let distill = DistillSpec { balancer, scale, ..distill.clone() };
    let (_, figures) = student(recipe, prepared, Some(&distill), place.seed, watch)?;
    let last = figures.epochs.last().copied().unwrap_or_default();
    Ok(Cell {
        balancer: place.balancer.clone(),
        scale,
        seed: place.seed,
        accuracy: figures.accuracy,
        full_precision: prepared.full_precision,
        teachers: prepared.teachers.clone(),
        ensemble: prepared.ensemble,
        weights: last.weights,
        cosine: last.cosine,
    })
}

fn json(value: &impl Serialize, path: &Path, pretty: bool) -> Result<String> {
    let text = match pretty {
        true => serde_json::to_string_pretty(value),
        false => serde_json::to_string(value),
    };
    Ok(text.map_err(|e| IoError::damaged(path, e.to_string()))? + "\n")
}

/// The lines of finished cells.
struct Log {
    path: PathBuf,
}

impl Log {
    /// Opens the log of a recipe, with the cells that are there.
    fn open(recipe: &VisionRecipe, force: bool) -> Result<(Self, Vec<Cell>)> {
        let path = recipe.out.join("sweep.jsonl");
        std::fs::create_dir_all(&recipe.out)
            .map_err(|e| IoError::file("create", &recipe.out, e))?;
        // Balancers, scales and seeds may be added later, and a folder may move.
        let (out, sweep) = (PathBuf::new(), None);
        let first = VisionRecipe { out, seed: 0, sweep, ..recipe.clone() };
        let mut cells = Vec::new();
        if path.exists() && !force {
            let text =
                std::fs::read_to_string(&path).map_err(|e| IoError::file("read", &path, e))?;
            // What a killed run left unfinished ends without a newline.
            let whole = text.rfind('\n').map_or("", |end| &text[..end]);
            let mut lines = whole.lines().enumerate();
            let fail = |line: usize, e: serde_json::Error| {
                IoError::damaged(&path, format!("line {}: {e}", line + 1))
            };
            if let Some((number, line)) = lines.next() {
                let found: VisionRecipe =
                    serde_json::from_str(line).map_err(|e| fail(number, e))?;
                if found != first {
                    return Err(Error::Usage(format!(
                        "{} was made with another recipe: use another out, or --force to begin anew",
                        path.display()
                    )));
                }
            }
            for (number, line) in lines {
                cells.push(serde_json::from_str(line).map_err(|e| fail(number, e))?);
            }
        }
        let mut text = json(&first, &path, false)?;
        for cell in &cells {
            text.push_str(&json(cell, &path, false)?);
        }
        write_bytes(&path, text.as_bytes())?;
        Ok((Self { path }, cells))
    }

    /// Adds a cell, in one call.
    fn write(&mut self, cell: &Cell) -> Result<()> {
        let text = json(cell, &self.path, false)?;
        let file = OpenOptions::new().append(true).open(&self.path);
        let written = file.and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_data()
        });
        Ok(written.map_err(|e| IoError::file("write", &self.path, e))?)
    }
}

/// Means over seeds.
fn report(recipe: &VisionRecipe, sweep: &SweepSpec, cells: &[Cell]) -> SweepReport {
    let find = |balancer: &str, scale: f64, seed: u64| {
        let same = |c: &&Cell| c.balancer == balancer && c.scale == scale && c.seed == seed;
        cells.iter().find(same).map(|c| c.accuracy)
    };
    let (mut rows, mut spread) = (Vec::new(), BTreeMap::new());
    for (name, balancer) in &sweep.balancers {
        let scales: Vec<f64> = match without_teacher(balancer) {
            true => vec![1.0],
            false => sweep.scales.clone(),
        };
        let mut means = Vec::new();
        for scale in scales {
            let each = sweep.seeds.iter().filter_map(|seed| {
                let value = find(name, scale, *seed)?;
                Some((value, find(REFERENCE, scale, *seed).map(|fixed| value - fixed)))
            });
            let (values, over): (Vec<f64>, Vec<Option<f64>>) = each.unzip();
            let over: Vec<f64> = over.into_iter().flatten().collect();
            let over_fixed = (name != REFERENCE && !over.is_empty()).then(|| Mean::of(&over));
            let accuracy = Mean::of(&values);
            means.push(accuracy.mean);
            rows.push(Row { balancer: name.clone(), scale, accuracy, over_fixed });
        }
        if means.len() > 1 {
            let largest = means.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let least = means.iter().copied().fold(f64::INFINITY, f64::min);
            spread.insert(name.clone(), largest - least);
        }
    }
    let of_seed = |f: &dyn Fn(&Cell) -> Option<f64>| -> Vec<f64> {
        let first = |seed: &u64| cells.iter().find(|c| c.seed == *seed).and_then(f);
        sweep.seeds.iter().filter_map(first).collect()
    };
    let ensemble = of_seed(&|c| c.ensemble);
    SweepReport {
        recipe: recipe.clone(),
        full_precision: Mean::of(&of_seed(&|c| Some(c.full_precision))),
        ensemble: (!ensemble.is_empty()).then(|| Mean::of(&ensemble)),
        rows,
        spread,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Images of one bright quarter, as IDX files, and a sweep over them.
    fn recipe(folder: &Path) -> VisionRecipe {
        for (part, count) in [("train", 60usize), ("t10k", 40)] {
            let labels: Vec<u8> = (0..count).map(|i| (i * 7 % 4) as u8).collect();
            let pixel = |i: usize| {
                let (image, row, col) = (i / 36, i % 36 / 6, i % 6);
                let quarter = 2 * (row / 3) + col / 3;
                let noise = (i * 2_654_435_761 % 97) as u8;
                noise + if quarter == usize::from(labels[image]) { 120 } else { 0 }
            };
            let pixels: Vec<u8> = (0..count * 36).map(pixel).collect();
            let write = |kind: &str, dims: &[usize], values: &[u8]| {
                let mut bytes = vec![0, 0, 8, dims.len() as u8];
                dims.iter().for_each(|d| bytes.extend((*d as u32).to_be_bytes()));
                bytes.extend(values);
                std::fs::write(folder.join(format!("{part}-{kind}-ubyte")), bytes).unwrap();
            };
            write("images-idx3", &[count, 6, 6], &pixels);
            write("labels-idx1", &[count], &labels);
        }
        let path = folder.join("recipe.toml");
        let text = format!(
            "out = {:?}
             data = {{ format = \"idx\", folder = {:?}, classes = 4, label_noise = 0.1 }}
             model = {{ family = \"tiny\", width = 2 }}
             full_precision = {{ epochs = 2, batch = 20, lr = 1e-2 }}
             train = {{ epochs = 2, batch = 20, lr = 1e-2 }}
             [quantizer]
             weights = {{ type = \"lsq\", bits = 2 }}
             activations = {{ type = \"lsq_plus_activation\", bits = 2 }}
             [distill]
             [sweep]
             scales = [0.1, 1, 10]
             seeds = [0, 1]
             [sweep.balancers]
             fixed = {{ type = \"fixed\" }}
             gor = {{ type = \"gor\", normalise = true }}
             labels = {{ type = \"fixed\", teacher = 0.0 }}",
            folder.join("out"),
            folder
        );
        std::fs::write(&path, text).unwrap();
        read_recipe(&path, &["data.test_images=30".into()]).unwrap()
    }

    #[test]
    fn an_interrupted_sweep_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let recipe = recipe(folder.path());
        assert_eq!(recipe.data.test_images, Some(30));
        let runs = |recipe: &VisionRecipe, force: bool| {
            let mut count = 0;
            let report = sweep(recipe, force, &mut |_, _, _| {}, &mut |_, _, total| {
                assert_eq!(total, 14);
                count += 1;
            });
            (report, count)
        };
        let (whole, count) = runs(&recipe, false);
        let whole = whole.unwrap();
        assert_eq!((count, whole.rows.len()), (14, 7));
        assert_eq!(whole.spread.keys().collect::<Vec<_>>(), ["fixed", "gor"]);
        let row = |name: &str| whole.rows.iter().find(|r| r.balancer == name).unwrap();
        assert!(row("gor").over_fixed.is_some() && row("fixed").over_fixed.is_none());
        assert_eq!(row("gor").accuracy.seeds, 2);
        // Killed in the middle of the fifth cell's line.
        let path = recipe.out.join("sweep.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        let end: usize = text.lines().take(5).map(|l| l.len() + 1).sum();
        std::fs::write(&path, &text[..end + 10]).unwrap();
        let (again, count) = runs(&recipe, false);
        assert_eq!((again.unwrap(), count), (whole.clone(), 10));
        let lines = |text: &str| text.lines().map(String::from).collect::<BTreeSet<_>>();
        assert_eq!(lines(&std::fs::read_to_string(&path).unwrap()), lines(&text));
        assert_eq!(runs(&recipe, false).1, 0);
        let mut other = recipe.clone();
        other.train.lr = 2e-2;
        assert!(runs(&other, false).0.unwrap_err().to_string().contains("another recipe"));
        let (bare, _) = runs(&VisionRecipe { sweep: None, ..recipe }, false);
        assert!(bare.unwrap_err().to_string().contains("sections sweep and distill"));
    }
}
