//! The losses of a detector.
//!
//! ```text
//! L_task    = 1/n Σ_cells CE(z, class) + λ/n Σ_objects h(box − target)
//! L_teacher = 1/m Σ_cells D(z_teacher, z) + λ/m Σ_sure cells p h(box − box_teacher)
//! h(d)      = Σ_4 (d²/2δ within δ, |d| − δ/2 beyond)        smooth L1, of numbers in cells
//! ```
//!
//! `n` is the number of objects of the batch, `m` of the cells in which the teacher is sure that
//! something is (`p`, its probability, at least ½); both at least 1. `CE` and `D` are over the
//! classes and "nothing here", `D` any divergence of [`DistillLoss`] at its temperature. The two
//! parts of each are one number, so that balancers weigh two losses as everywhere.
//!
//! INFERRED: of GoR's paper only the abstract was at hand, which names detection; its detector, its
//! data and its losses for this task are unknown. These are our own choice of simple ones, and no
//! number is comparable with the paper's.

use super::boxes::Object;
use super::grid::{BOX, Grid, Targets, softmax};
use super::scenes::Scenes;
use crate::distill::{DistillLoss, Distillation, Teacher};
use crate::vision::Result;
use crate::vision::network::Network;
use crate::vision::train::{
    EpochFigures, Goals, Settings, TeacherGoal, Teaching, gathered, train_towards,
};
use crate::{Tape, Tensor, Var};

/// `λ`: boxes against classes.
const BOX_SHARE: f32 = 2.0;
/// `δ`, in cells or in logarithms of sides: errors below it hardly change an overlap.
const KNEE: f32 = 0.1;
/// Least probability of an object in a cell whose box is learned from the teacher.
const SURE: f32 = 0.5;

/// `h` of one difference, and its derivative.
fn smooth(d: f32) -> (f32, f32) {
    match d.abs() <= KNEE {
        true => (d * d / (2.0 * KNEE), d / KNEE),
        false => (d.abs() - KNEE / 2.0, d.signum()),
    }
}

impl Tape {
    /// `Σ_r w_r Σ_k h(x_rk − t_rk)` of `x: [rows, 4]`, a scalar. Rows of weight 0 do not count, not
    /// even with targets that are no numbers.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    fn box_distance(&mut self, x: Var, targets: &[f32], weights: &[f32]) -> Var {
        let (rows, cols) = self.dims(x);
        assert_eq!((cols, rows), (BOX, weights.len()), "one weight per row of 4 is needed");
        assert_eq!(targets.len(), rows * BOX, "one target per value is needed");
        let mut gradient = self.buffer(rows * BOX);
        gradient.fill(0.0);
        let mut sum = 0f64;
        let values = self.data(x).chunks_exact(BOX).zip(targets.chunks_exact(BOX));
        for ((g, weight), (x, t)) in gradient.chunks_exact_mut(BOX).zip(weights).zip(values) {
            if *weight == 0.0 {
                continue;
            }
            for (g, (x, t)) in g.iter_mut().zip(x.iter().zip(t)) {
                let (value, slope) = smooth(x - t);
                sum += f64::from(weight * value);
                *g = weight * slope;
            }
        }
        let gradient = self.constant(Tensor::new([rows, BOX], gradient));
        self.custom(&[x], Tensor::scalar(sum as f32), move |pass| {
            let (dy, gradient) = (pass.grad()[0], pass.value(gradient));
            pass.accumulate(x, gradient, |g| dy * g);
        })
    }
}

/// The rows of a batch of images among those of all images.
fn rows<V: Copy>(all: &[V], images: &[usize], size: usize) -> Vec<V> {
    images.iter().flat_map(|image| &all[image * size..][..size]).copied().collect()
}

/// What the losses of a detector are made from.
struct Lessons {
    grid: Grid,
    targets: Targets,
}

impl Lessons {
    fn new(network: &Network, objects: &[Vec<Object>]) -> Self {
        let grid = Grid::of(&network.architecture);
        Self { targets: grid.targets(objects), grid }
    }

    /// Logits of the classes, and boxes.
    fn parts(&self, tape: &mut Tape, z: Var) -> (Var, Var) {
        let split = self.grid.classes + 1;
        (tape.select_columns(z, 0..split), tape.select_columns(z, split..split + BOX))
    }

    fn classes(&self, images: &[usize]) -> Vec<u32> {
        rows(&self.targets.classes, images, self.grid.cells())
    }

    /// `L_task`.
    fn task(&self, tape: &mut Tape, z: Var, images: &[usize]) -> Var {
        let classes = self.classes(images);
        let boxes = rows(&self.targets.boxes, images, self.grid.cells() * BOX);
        let nothing = self.grid.classes as u32;
        let weights: Vec<f32> =
            classes.iter().map(|class| if *class == nothing { 0.0 } else { 1.0 }).collect();
        let objects = weights.iter().sum::<f32>().max(1.0);
        let (logits, found) = self.parts(tape, z);
        let class = tape.cross_entropy(logits, &classes);
        let distance = tape.box_distance(found, &boxes, &weights);
        per_object(tape, class, distance, classes.len(), objects)
    }

    /// `L_teacher`, for the teacher's outputs of the same images.
    fn teacher(
        &self,
        tape: &mut Tape,
        z: Var,
        images: &[usize],
        outputs: &Tensor,
        loss: &DistillLoss,
    ) -> Result<Var> {
        let split = self.grid.classes + 1;
        let (mut theirs, mut boxes, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for row in outputs.data().chunks_exact(self.grid.outputs()) {
            let (logits, numbers) = row.split_at(split);
            let object = 1.0 - softmax(logits)[split - 1];
            theirs.extend_from_slice(logits);
            boxes.extend_from_slice(numbers);
            weights.push(if object >= SURE { object } else { 0.0 });
        }
        let sure = weights.iter().filter(|w| **w > 0.0).count().max(1) as f32;
        let theirs = Tensor::new([weights.len(), split], theirs);
        let (teacher, targets) = (Teacher::Logits(&theirs), self.classes(images));
        let seqlen = self.grid.cells();
        let (logits, found) = self.parts(tape, z);
        let class =
            tape.distill(logits, &Distillation { loss, teacher, targets: &targets, seqlen })?;
        let distance = tape.box_distance(found, &boxes, &weights);
        Ok(per_object(tape, class, distance, weights.len(), sure))
    }
}

/// Both parts as one number per object: a mean over `cells`, and a sum.
fn per_object(tape: &mut Tape, class: Var, distance: Var, cells: usize, objects: f32) -> Var {
    tape.weighted_sum(&[(cells as f32 / objects, class), (BOX_SHARE / objects, distance)])
}

/// Trains a detector on `scenes`, with or without a teacher, whose `logits` are the outputs of all
/// cells of all images; `watch` is told of every epoch.
///
/// # Errors
/// As [`crate::vision::train::train`].
pub fn train_detector(
    network: &mut Network,
    scenes: &Scenes,
    settings: &Settings,
    teaching: Option<Teaching<'_>>,
    seed: u64,
    watch: &mut dyn FnMut(u64, &EpochFigures),
) -> Result<Vec<EpochFigures>> {
    let lessons = Lessons::new(network, &scenes.objects);
    let task = |tape: &mut Tape, z: Var, images: &[usize]| -> Result<Var> {
        Ok(lessons.task(tape, z, images))
    };
    let Some(teaching) = teaching else {
        let goals = Goals { task: &task, teacher: None };
        return train_towards(network, &scenes.images, goals, settings, seed, watch);
    };
    let Teaching { logits, loss, balancer, scale } = teaching;
    let loss = |tape: &mut Tape, z: Var, images: &[usize]| -> Result<Var> {
        let outputs = gathered(logits, images, lessons.grid.cells());
        lessons.teacher(tape, z, images, &outputs, loss)
    };
    let teacher = Some(TeacherGoal { loss: &loss, balancer, scale });
    train_towards(network, &scenes.images, Goals { task: &task, teacher }, settings, seed, watch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};
    use crate::vision::data::Normalization;
    use crate::vision::detect::grid::architecture;
    use crate::vision::model::{Family, ModelSpec};
    use crate::vision::ops::Shape;

    const LOSS: DistillLoss = DistillLoss::ForwardKl { temperature: 2.0 };

    /// Lessons of two images of 2 × 2 cells, with an object in the first and in the last cell.
    fn lessons() -> Lessons {
        let input = Shape { height: 16, width: 16, channels: 1 };
        let spec = ModelSpec { family: Family::Plain, width: 1 };
        let normalization = Normalization { mean: vec![0.0], deviation: vec![1.0] };
        let network = Network::new(architecture(spec, input, 2).unwrap(), normalization, 1);
        let object = |class, rect: [f32; 4]| vec![Object { class, rect: rect.into() }];
        let objects = [object(1, [1.0, 2.0, 6.0, 5.0]), object(0, [9.0, 8.0, 15.0, 16.0])];
        Lessons::new(&network, &objects)
    }

    #[test]
    fn distances_by_hand() {
        let mut tape = Tape::default();
        // Within the knee, beyond it, nothing; and a row that does not count.
        let x = Tensor::new([2, 4], vec![0.05, -1.0, 0.0, 0.0, 9.0, 9.0, 9.0, 9.0]);
        let x = tape.leaf(x, true);
        let targets = [0.0, 0.0, 0.0, 0.0, f32::NAN, f32::NAN, f32::NAN, f32::NAN];
        let y = tape.box_distance(x, &targets, &[2.0, 0.0]);
        // 2 (0.05² / 0.2 + 1 − 0.05)
        approx::assert_relative_eq!(tape.data(y)[0], 1.925, max_relative = 1e-6);
        tape.backward(y);
        let gradient = tape.grad(x).unwrap();
        approx::assert_relative_eq!(gradient[0], 1.0, max_relative = 1e-6);
        assert_eq!(gradient[1..], [-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn gradients() {
        // Far from the knee's two sides at once: small values, and large ones.
        let (mut x, targets) = (random(1, [6, 4]), random(2, [6, 4]));
        let values = x.data_mut().iter_mut().zip(targets.data()).enumerate();
        values.for_each(|(at, (x, t))| {
            let by = if at % 2 == 0 { 0.03 } else { 1.0 };
            *x = t + by * x.signum();
        });
        let weights = [1.0, 0.5, 0.0, 2.0, 1.0, 1.0];
        check_gradients(&[x], |t, v| t.box_distance(v[0], targets.data(), &weights));
        let lessons = lessons();
        let (z, outputs) = (random(3, [8, 7]), random(4, [8, 7]));
        check_gradients(std::slice::from_ref(&z), |t, v| lessons.task(t, v[0], &[1, 0]));
        check_gradients(&[z], |t, v| lessons.teacher(t, v[0], &[0, 1], &outputs, &LOSS).unwrap());
    }

    #[test]
    fn nothing_is_left_to_learn_from_an_equal_teacher() {
        let lessons = lessons();
        let outputs = random(5, [8, 7]);
        let mut tape = Tape::default();
        let z = tape.leaf(outputs.clone(), true);
        let loss = lessons.teacher(&mut tape, z, &[0, 1], &outputs, &LOSS).unwrap();
        approx::assert_abs_diff_eq!(tape.data(loss)[0], 0.0, epsilon = 1e-5);
        // Outputs that say what the labels do have nearly no loss.
        let mut outputs = [0.0, 0.0, 20.0, 0.0, 0.0, 0.0, 0.0].repeat(8);
        for (cell, class) in [(0, 1), (7, 0)] {
            let row = &mut outputs[cell * 7..][..7];
            row[2] = 0.0;
            row[class] = 20.0;
            row[3..].copy_from_slice(&lessons.targets.boxes[cell * BOX..][..BOX]);
        }
        tape.reset();
        let z = tape.leaf(Tensor::new([8, 7], outputs), true);
        let loss = lessons.task(&mut tape, z, &[0, 1]);
        approx::assert_abs_diff_eq!(tape.data(loss)[0], 0.0, epsilon = 1e-5);
    }
}
