//! Training of a network, with or without a teacher: on labelled images ([`train`]), or towards any
//! two losses of its logits (`train_towards`; detectors).
//!
//! ```text
//! every step   z = logits of the batch
//!              g₀ = ∂L_task/∂z,  g₁ = scale · ∂L_teacher/∂z,  from the logits alone
//!              w = balancer(losses, norms of the gradients)
//!              one backward pass of w₀ g₀ + w₁ g₁, one step of the optimizer, one of the balancer
//! ```
//!
//! The teacher's logits are made once for all images; there is no augmentation. Which images a step
//! takes follows from its number and the seed. Called by [`mod@super::run`] and
//! [`super::detect`].

use serde::{Deserialize, Serialize};

use super::data::Images;
use super::network::{Forward, Kind, Mode, Network};
use super::sgd::Sgd;
use super::{Result, VisionError};
use crate::distill::{
    Balancer, BalancerSpec, DistillLoss, Distillation, Needs, Observed, Pair, Teacher,
};
use crate::tiles::{Operand, product};
use crate::train::data::Order;
use crate::{AdamW, AdamWOptions, OneCycle, Tape, Tensor, Update, Var, clip_factor, global_norm};

/// Momentum of stochastic gradient descent.
const MOMENTUM: f64 = 0.9;

/// How parameters are moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// AdamW.
    #[default]
    Adamw,
    /// Gradient descent with momentum 0.9.
    Sgd,
}

/// How long and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Times that every image is seen.
    pub epochs: u64,
    /// Images of a step.
    pub batch: usize,
    /// Largest learning rate; it falls along half a cosine to nearly 0.
    pub lr: f64,
    /// Share of the steps in which it rises.
    #[serde(default = "twentieth")]
    pub warmup: f64,
    /// How parameters are moved.
    #[serde(default)]
    pub optimizer: OptimizerKind,
    /// Decay of the weights; by default 0.01 for AdamW, 1e-4 for gradient descent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
    /// Learning rate of what estimators learn, as a share of `lr`.
    #[serde(default = "tenth")]
    pub lr_grids: f64,
    /// Largest norm of a step's gradients.
    #[serde(default = "ten")]
    pub clip: f64,
}

fn twentieth() -> f64 {
    0.05
}

fn tenth() -> f64 {
    0.1
}

fn ten() -> f64 {
    10.0
}

impl Settings {
    /// Settings with everything else by default.
    pub fn new(epochs: u64, batch: usize, lr: f64) -> Self {
        Self {
            epochs,
            batch,
            lr,
            warmup: twentieth(),
            optimizer: OptimizerKind::Adamw,
            weight_decay: None,
            lr_grids: tenth(),
            clip: ten(),
        }
    }

    /// Checks every setting; `key` is the section's name.
    ///
    /// # Errors
    /// What is out of range.
    pub fn check(&self, key: &'static str) -> Result<()> {
        let fail = |what: String| Err(VisionError::recipe(key, what));
        if self.epochs == 0 || self.batch < 2 {
            let (epochs, batch) = (self.epochs, self.batch);
            return fail(format!(
                "{epochs} epochs of batches of {batch}; at least 1 and 2 are needed"
            ));
        }
        let positive = [("lr", self.lr), ("clip", self.clip)];
        if let Some((name, value)) = positive.iter().find(|(_, v)| !(*v > 0.0 && v.is_finite())) {
            return fail(format!("{name} = {value}; it must be above 0"));
        }
        let decay = self.weight_decay.unwrap_or(0.0);
        let others = [("weight_decay", decay), ("lr_grids", self.lr_grids)];
        if let Some((name, value)) = others.iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            return fail(format!("{name} = {value}; it must not be negative"));
        }
        match (0.0..1.0).contains(&self.warmup) {
            true => Ok(()),
            false => fail(format!("warmup = {}; it must be in [0, 1)", self.warmup)),
        }
    }

    /// Steps for so many images.
    pub fn steps(&self, images: usize) -> u64 {
        self.epochs * images.div_ceil(self.batch) as u64
    }

    fn optimizer(&self) -> Optimizer {
        let decay = |usual: f64| self.weight_decay.unwrap_or(usual);
        match self.optimizer {
            OptimizerKind::Adamw => {
                let options = AdamWOptions { weight_decay: decay(0.01), ..Default::default() };
                Optimizer::Adamw(AdamW::new(options))
            }
            OptimizerKind::Sgd => Optimizer::Sgd(Sgd::new(MOMENTUM, decay(1e-4))),
        }
    }
}

enum Optimizer {
    Adamw(AdamW),
    Sgd(Sgd),
}

impl Optimizer {
    fn step(&mut self, updates: &mut [Update<'_>], factor: f32) {
        match self {
            Self::Adamw(adam) => adam.step(updates, factor),
            Self::Sgd(sgd) => sgd.step(updates, factor),
        }
    }
}

/// What a student learns from.
#[derive(Debug, Clone, Copy)]
pub struct Teaching<'a> {
    /// The teacher's logits of all training images.
    pub logits: &'a Tensor,
    /// What the student is to have in common with it.
    pub loss: &'a DistillLoss,
    /// How that is weighed against the labels.
    pub balancer: &'a BalancerSpec,
    /// What the teacher's loss is multiplied by before the balancer sees it.
    pub scale: f64,
}

/// A loss of the images with these numbers, recorded from their logits alone.
pub(super) type Loss<'a> = &'a dyn Fn(&mut Tape, Var, &[usize]) -> Result<Var>;

/// What a network is trained towards.
#[derive(Clone, Copy)]
pub(super) struct Goals<'a> {
    /// The task's loss.
    pub task: Loss<'a>,
    /// The teacher's, if there is one.
    pub teacher: Option<TeacherGoal<'a>>,
}

/// The teacher's loss beside the task's.
#[derive(Clone, Copy)]
pub(super) struct TeacherGoal<'a> {
    /// Before it is scaled.
    pub loss: Loss<'a>,
    /// How both are weighed.
    pub balancer: &'a BalancerSpec,
    /// What it is multiplied by before the balancer sees it.
    pub scale: f64,
}

/// Means over the steps of an epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochFigures {
    /// The task's loss: of labels their cross-entropy, in nats.
    pub task_loss: f64,
    /// The teacher's loss, scaled; 0 without one.
    pub teacher_loss: f64,
    /// Weights of both.
    pub weights: Pair,
    /// Norms of the gradients of both at the logits, before weights.
    pub norms: Pair,
    /// Cosine between these gradients.
    pub cosine: f64,
}

impl EpochFigures {
    /// Adds a share of another's.
    fn add(&mut self, other: &Self, share: f64) {
        self.task_loss += share * other.task_loss;
        self.teacher_loss += share * other.teacher_loss;
        self.cosine += share * other.cosine;
        for i in 0..2 {
            self.weights[i] += share * other.weights[i];
            self.norms[i] += share * other.norms[i];
        }
    }
}

/// A training under way.
struct Trainer<'a> {
    network: &'a mut Network,
    images: &'a Images,
    settings: Settings,
    goals: Goals<'a>,
    /// Of both losses, if there is a teacher.
    balancer: Option<Box<dyn Balancer>>,
    optimizer: Optimizer,
    schedule: OneCycle,
    order: Order,
    step: u64,
    tape: Tape,
    /// Of the losses, which start at the logits.
    losses: Tape,
}

/// Trains `network`; `watch` is told of every epoch. Returns the figures of all epochs.
///
/// # Errors
/// Settings out of range; teachers of other classes or numbers of images; losses or gradients that
/// are no numbers.
pub fn train(
    network: &mut Network,
    images: &Images,
    settings: &Settings,
    teaching: Option<Teaching<'_>>,
    seed: u64,
    watch: &mut dyn FnMut(u64, &EpochFigures),
) -> Result<Vec<EpochFigures>> {
    let labels = |indices: &[usize]| -> Vec<u32> {
        indices.iter().map(|index| u32::from(images.labels[*index])).collect()
    };
    let task = |tape: &mut Tape, z: Var, indices: &[usize]| -> Result<Var> {
        Ok(tape.cross_entropy(z, &labels(indices)))
    };
    let Some(teaching) = teaching else {
        let goals = Goals { task: &task, teacher: None };
        return train_towards(network, images, goals, settings, seed, watch);
    };
    let Teaching { logits, loss, balancer, scale } = teaching;
    let loss = |tape: &mut Tape, z: Var, indices: &[usize]| -> Result<Var> {
        let (teacher, targets) = (gathered(logits, indices, 1), labels(indices));
        let teacher = Teacher::Logits(&teacher);
        Ok(tape.distill(z, &Distillation { loss, teacher, targets: &targets, seqlen: 1 })?)
    };
    let teacher = Some(TeacherGoal { loss: &loss, balancer, scale });
    train_towards(network, images, Goals { task: &task, teacher }, settings, seed, watch)
}

/// The rows of some images in a matrix that has `rows` for each.
pub(super) fn gathered(all: &Tensor, indices: &[usize], rows: usize) -> Tensor {
    let columns = all.shape()[1];
    let size = rows * columns;
    let values = indices.iter().flat_map(|index| &all.data()[index * size..][..size]);
    Tensor::new([indices.len() * rows, columns], values.copied().collect())
}

/// Trains `network` towards losses of its logits; labels of `images` are not looked at.
///
/// # Errors
/// As [`train`].
pub(super) fn train_towards(
    network: &mut Network,
    images: &Images,
    goals: Goals<'_>,
    settings: &Settings,
    seed: u64,
    watch: &mut dyn FnMut(u64, &EpochFigures),
) -> Result<Vec<EpochFigures>> {
    settings.check("train")?;
    let steps = settings.steps(images.count());
    let balancer = goals.teacher.map(|teacher| teacher.balancer.build(steps)).transpose()?;
    let schedule =
        OneCycle { warmup: settings.warmup, ..OneCycle::new(settings.lr, steps as usize) };
    let mut trainer = Trainer {
        network,
        images,
        settings: *settings,
        goals,
        balancer,
        optimizer: settings.optimizer(),
        schedule,
        order: Order::new(images.count(), seed),
        step: 0,
        tape: Tape::default(),
        losses: Tape::default(),
    };
    let per_epoch = steps / settings.epochs;
    let mut all = Vec::new();
    for epoch in 0..settings.epochs {
        let mut figures = EpochFigures::default();
        for _ in 0..per_epoch {
            figures.add(&trainer.step()?, 1.0 / per_epoch as f64);
        }
        watch(epoch, &figures);
        all.push(figures);
    }
    Ok(all)
}

/// A loss of `logits` and its gradient with respect to them.
fn loss_and_gradient(
    tape: &mut Tape,
    logits: &Tensor,
    record: Loss<'_>,
    indices: &[usize],
) -> Result<(f64, Vec<f32>)> {
    tape.reset();
    let z = tape.leaf(logits.clone(), true);
    let loss = record(tape, z, indices)?;
    tape.backward(loss);
    let value = f64::from(tape.data(loss)[0]);
    Ok((value, tape.take_grad(z).unwrap_or_default()))
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Norm of `gᵀ x`, the gradient of the head's weight, for a gradient `g` at the logits.
fn head_norm(gradient: &[f32], features: &[f32], rows: usize) -> f64 {
    let (classes, channels) = (gradient.len() / rows, features.len() / rows);
    let mut dw = vec![0f32; classes * channels];
    let gradient = Operand::new(gradient, rows, classes).t();
    product(&mut dw, false, gradient, Operand::new(features, rows, channels));
    dot(&dw, &dw).sqrt()
}

impl Trainer<'_> {
    /// Takes a step. Nothing has changed when it fails.
    fn step(&mut self) -> Result<EpochFigures> {
        let first = self.step * self.settings.batch as u64;
        let positions = first..first + self.settings.batch as u64;
        let indices: Vec<usize> = positions.map(|p| self.order.at(p)).collect();
        let (batch, _) = self.images.batch(&indices, &self.network.normalization);
        let forward = self.network.forward(&mut self.tape, &batch, Mode::Train);
        let (figures, pull) = self.pull(&forward, &indices)?;
        self.tape.backward_from(forward.logits, &pull);
        let values = self.network.parameters.iter().map(|p| p.value.len());
        let grads: Vec<Vec<f32>> = forward
            .vars
            .iter()
            .zip(values)
            .map(|(var, length)| self.tape.take_grad(*var).unwrap_or_else(|| vec![0.0; length]))
            .collect();
        self.tape.reset();
        self.update(&grads)?;
        self.network.follow(&forward.moments);
        grads.into_iter().for_each(|g| self.tape.recycle(g));
        self.step += 1;
        Ok(figures)
    }

    /// The gradient at the logits, with what it is made of.
    fn pull(&mut self, forward: &Forward, indices: &[usize]) -> Result<(EpochFigures, Vec<f32>)> {
        let logits = self.tape.value(forward.logits).clone();
        let goals = self.goals;
        let (task_loss, mut pull) =
            loss_and_gradient(&mut self.losses, &logits, goals.task, indices)?;
        let norm = dot(&pull, &pull).sqrt();
        let mut figures = EpochFigures {
            task_loss,
            weights: [1.0, 0.0],
            norms: [norm, 0.0],
            ..EpochFigures::default()
        };
        if let (Some(teacher), Some(balancer)) = (goals.teacher, &mut self.balancer) {
            let (loss, mut other) =
                loss_and_gradient(&mut self.losses, &logits, teacher.loss, indices)?;
            other.iter_mut().for_each(|g| *g *= teacher.scale as f32);
            figures.teacher_loss = teacher.scale * loss;
            figures.norms[1] = dot(&other, &other).sqrt();
            let size = figures.norms[0] * figures.norms[1];
            figures.cosine = if size > 0.0 { dot(&pull, &other) / size } else { 0.0 };
            let features = self.tape.data(forward.features);
            let at_head = |g: &[f32]| head_norm(g, features, logits.shape()[0]);
            let norms = match balancer.needs() {
                Needs::ParameterNorms => [at_head(&pull), at_head(&other)],
                Needs::Losses | Needs::LogitNorms => figures.norms,
            };
            let losses = [figures.task_loss, figures.teacher_loss];
            let observed = Observed { losses, norms: Some(norms) };
            figures.weights = balancer.weights(&observed);
            if observed.is_finite() {
                balancer.step(&observed);
            }
            let [task, teacher] = figures.weights.map(|w| w as f32);
            pull.iter_mut().zip(&other).for_each(|(p, o)| *p = task * *p + teacher * o);
        }
        let sum = figures.task_loss + figures.teacher_loss;
        if !sum.is_finite() || !pull.iter().all(|g| g.is_finite()) {
            return Err(self.not_finite(format!(
                "the losses are {} and {}",
                figures.task_loss, figures.teacher_loss
            )));
        }
        Ok((figures, pull))
    }

    fn update(&mut self, grads: &[Vec<f32>]) -> Result<()> {
        let norm = global_norm(grads.iter().map(|g| &g[..]));
        if !norm.is_finite() {
            let bad = grads.iter().position(|g| g.iter().any(|v| !v.is_finite()));
            let name = bad.map_or("some", |at| self.network.parameters[at].name.as_str());
            return Err(self.not_finite(format!("the gradient of {name} is no number")));
        }
        let lr = self.schedule.lr(self.step as usize);
        let grid_lr = lr * self.settings.lr_grids;
        let mut updates: Vec<Update<'_>> = self
            .network
            .parameters
            .iter_mut()
            .zip(grads)
            .map(|(parameter, grad)| Update {
                value: parameter.value.data_mut(),
                grad,
                lr: if parameter.kind == Kind::Grid { grid_lr } else { lr },
                decay: parameter.kind == Kind::Weight,
            })
            .collect();
        self.optimizer.step(&mut updates, clip_factor(norm, self.settings.clip));
        Ok(())
    }

    fn not_finite(&self, what: String) -> VisionError {
        VisionError::NotFinite { place: format!("step {}", self.step), what }
    }
}
