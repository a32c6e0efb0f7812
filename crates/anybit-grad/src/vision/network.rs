//! [`Network`]: an [`Architecture`] with its parameters, and its forward pass on a tape.
//!
//! ```text
//! convolution   x = estimator(pad(x)),  y = x ∗ estimator(W),  batch normalization, maybe ReLU
//! head          x = estimator(mean over pixels),  logits = x estimator(W)ᵀ + b
//! ```
//!
//! A detector's head takes every pixel instead of their mean ([`End::Cells`]).
//!
//! Without estimators both operands are as they are. Padding comes before rounding, so that its
//! zeros are on the grid too, which need not have a zero. Called by the trainer; integer inference
//! ([`super::infer`]) computes the same.

use anybit_core::rng::{SplitMix64, stream};

use super::data::{Images, Normalization};
use super::model::{Architecture, End, Step};
use super::ops::Moments;
use super::quantize::Quantizer;
use crate::{Tape, Tensor, Var};

/// Share that the moments of a batch have in the running ones.
const MOMENTUM: f32 = 0.1;
/// Images of a forward pass without gradients.
pub(super) const EVALUATION_BATCH: usize = 64;
/// Parameters of a convolution: weight, and `γ` and `β` of its normalization.
const PER_LAYER: usize = 3;

/// What a parameter is to the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A weight, which decays.
    Weight,
    /// A bias, or part of a normalization.
    Plain,
    /// What an estimator learns.
    Grid,
}

/// A named value that is trained.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in files.
    pub name: String,
    /// Its value.
    pub value: Tensor,
    /// What it is to the optimizer.
    pub kind: Kind,
}

/// Running mean and variance of a normalization.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Of every channel.
    pub mean: Vec<f32>,
    /// Of every channel.
    pub variance: Vec<f32>,
}

/// A network with its parameters.
#[derive(Debug, Clone)]
pub struct Network {
    /// What is computed.
    pub architecture: Architecture,
    /// What images are normalized with.
    pub normalization: Normalization,
    /// Those of the convolutions in order, of the head, then what estimators learn.
    pub parameters: Vec<Parameter>,
    /// Of every convolution.
    pub running: Vec<Running>,
    /// Estimators of all operands; none in full precision.
    pub(super) quantizer: Option<Quantizer>,
}

/// How a forward pass is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Normalized by the batch, with gradients.
    Train,
    /// Normalized by the batch, in full precision: what first values of estimators come from.
    Observe,
    /// Normalized by running moments.
    Evaluate,
}

/// A recorded forward pass.
#[derive(Debug)]
pub struct Forward {
    /// `[images, classes]`; `[images · cells, classes]` of a detector.
    pub logits: Var,
    /// Inputs of the convolutions, padded and not yet rounded, and that of the head.
    pub inputs: Vec<Var>,
    /// What the head multiplies, a row for each of the logits'.
    pub features: Var,
    /// The parameters, in the order of [`Network::parameters`].
    pub vars: Vec<Var>,
    /// Of every normalization; none when running ones were used.
    pub moments: Vec<Moments>,
}

impl Network {
    /// A network with random weights (He et al., 2015); each tensor has a stream of its own.
    pub fn new(architecture: Architecture, normalization: Normalization, seed: u64) -> Self {
        let normal = |name: String, shape: [usize; 2], gain: f64| {
            let deviation = (gain / shape[1] as f64).sqrt();
            let mut rng = SplitMix64::new(stream(seed, &name));
            let values = (0..shape[0] * shape[1]).map(|_| (rng.normal() * deviation) as f32);
            Parameter { value: Tensor::new(shape, values.collect()), name, kind: Kind::Weight }
        };
        let plain = |name: String, length: usize, value: f32| {
            let value = Tensor::new([length], vec![value; length]);
            Parameter { name, value, kind: Kind::Plain }
        };
        let (mut parameters, mut running) = (Vec::new(), Vec::new());
        for layer in &architecture.layers {
            let (name, channels) = (&layer.name, layer.output.channels);
            parameters.push(normal(format!("{name}.weight"), layer.weight_shape(), 2.0));
            parameters.push(plain(format!("{name}.norm.weight"), channels, 1.0));
            parameters.push(plain(format!("{name}.norm.bias"), channels, 0.0));
            running.push(Running { mean: vec![0.0; channels], variance: vec![1.0; channels] });
        }
        let shape = [architecture.classes, architecture.last.channels];
        parameters.push(normal("head.weight".into(), shape, 1.0));
        parameters.push(plain("head.bias".into(), architecture.classes, 0.0));
        Self { architecture, normalization, parameters, running, quantizer: None }
    }

    /// Number of convolutions; the head's place behind them.
    pub(super) fn head(&self) -> usize {
        self.architecture.layers.len()
    }

    /// Place of the weight of a convolution, or of the head, among the parameters.
    pub(super) fn weight_at(&self, layer: usize) -> usize {
        PER_LAYER * layer
    }

    /// The name of a layer.
    pub(super) fn layer_name(&self, layer: usize) -> &str {
        self.architecture.layers.get(layer).map_or("head", |l| l.name.as_str())
    }

    /// Number of values that are trained.
    pub fn size(&self) -> usize {
        self.parameters.iter().map(|p| p.value.len()).sum()
    }

    /// Records a forward pass of `images`, a matrix of pixels.
    ///
    /// # Panics
    /// When it is not made of whole images.
    pub fn forward(&self, tape: &mut Tape, images: &Tensor, mode: Mode) -> Forward {
        let wanted = mode == Mode::Train;
        let leaf = |p: &Parameter| tape.leaf(p.value.clone(), wanted);
        let vars: Vec<Var> = self.parameters.iter().map(leaf).collect();
        let (inputs, moments) = (Vec::new(), Vec::new());
        let mut recorder = Recorder { network: self, mode, vars, inputs, moments };
        let mut values = vec![tape.constant(images.clone())];
        for step in &self.architecture.steps {
            let value = match *step {
                Step::Conv { layer, input, relu } => {
                    recorder.conv(tape, layer, values[input], relu)
                }
                Step::Add { a, b } => {
                    let sum = tape.add(values[a], values[b]);
                    tape.relu(sum)
                }
            };
            values.push(value);
        }
        let last = values[self.architecture.steps.len()];
        let seen = match self.architecture.end {
            End::Pooled => tape.mean_over_pixels(last, self.architecture.last.pixels()),
            End::Cells => last,
        };
        let head = self.head();
        let (features, weight) = recorder.operands(tape, head, seen);
        let Recorder { vars, inputs, moments, .. } = recorder;
        let logits = tape.linear(features, weight, Some(vars[self.weight_at(head) + 1]));
        Forward { logits, inputs, features, vars, moments }
    }

    /// Moves the running moments towards those of a batch.
    pub(super) fn follow(&mut self, moments: &[Moments]) {
        let towards = |old: &mut [f32], new: &[f32], factor: f32| {
            old.iter_mut().zip(new).for_each(|(o, n)| *o += MOMENTUM * (factor * n - *o));
        };
        for (running, moments) in self.running.iter_mut().zip(moments) {
            // The variance of what the batch is a sample of.
            let rows = moments.rows as f32;
            towards(&mut running.mean, &moments.mean, 1.0);
            towards(&mut running.variance, &moments.variance, rows / (rows - 1.0).max(1.0));
        }
    }

    /// Logits of all images, in the shape of [`Forward::logits`].
    pub fn logits(&self, images: &Images) -> Tensor {
        let (mut tape, mut all) = (Tape::default(), Vec::new());
        let indices: Vec<usize> = (0..images.count()).collect();
        for part in indices.chunks(EVALUATION_BATCH) {
            let (batch, _) = images.batch(part, &self.normalization);
            let logits = self.forward(&mut tape, &batch, Mode::Evaluate).logits;
            all.extend_from_slice(tape.data(logits));
            tape.reset();
        }
        Tensor::new([all.len() / self.architecture.classes, self.architecture.classes], all)
    }
}

/// The likeliest class of every row; the first of equals.
pub fn predictions(logits: &Tensor) -> Vec<u32> {
    let classes = logits.shape().last().copied().unwrap_or(1);
    let best = |row: &[f32]| {
        let better = |best: usize, at: usize| if row[at] > row[best] { at } else { best };
        (0..row.len()).fold(0, better) as u32
    };
    logits.data().chunks_exact(classes.max(1)).map(best).collect()
}

/// Share of the predictions that are the labels.
pub fn accuracy(logits: &Tensor, labels: &[u8]) -> f64 {
    let found = predictions(logits);
    let right = found.iter().zip(labels).filter(|(p, l)| **p == u32::from(**l)).count();
    right as f64 / labels.len().max(1) as f64
}

/// A forward pass under way.
struct Recorder<'a> {
    network: &'a Network,
    mode: Mode,
    vars: Vec<Var>,
    inputs: Vec<Var>,
    moments: Vec<Moments>,
}

impl Recorder<'_> {
    /// Both operands of a layer as they are multiplied.
    fn operands(&mut self, tape: &mut Tape, layer: usize, x: Var) -> (Var, Var) {
        self.inputs.push(x);
        let weight = self.vars[self.network.weight_at(layer)];
        match &self.network.quantizer {
            Some(quantizer) if self.mode != Mode::Observe => {
                let grids = &quantizer.layers[layer];
                let x = grids.input.record(tape, x, &self.vars);
                (x, grids.weight.record(tape, weight, &self.vars))
            }
            _ => (x, weight),
        }
    }

    fn conv(&mut self, tape: &mut Tape, layer: usize, x: Var, relu: bool) -> Var {
        let network = self.network;
        let spec = &network.architecture.layers[layer];
        let x = match spec.padding {
            0 => x,
            by => tape.pad_images(x, spec.input, by),
        };
        let (x, weight) = self.operands(tape, layer, x);
        let y = match (spec.is_linear(), spec.depthwise) {
            (true, _) => tape.linear(x, weight, None),
            (false, true) => tape.depthwise(x, weight, spec.padded(), spec.window),
            (false, false) => tape.conv2d(x, weight, spec.padded(), spec.window),
        };
        let first = network.weight_at(layer);
        let (gamma, beta) = (self.vars[first + 1], self.vars[first + 2]);
        let y = match self.mode {
            Mode::Train | Mode::Observe => {
                let (y, moments) = tape.batch_norm(y, gamma, beta);
                self.moments.push(moments);
                y
            }
            Mode::Evaluate => {
                let Running { mean, variance } = &network.running[layer];
                tape.fixed_norm(y, gamma, beta, (&mean[..], &variance[..]))
            }
        };
        if relu { tape.relu(y) } else { y }
    }
}
