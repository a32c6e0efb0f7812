//! [`IntegerNetwork`]: a trained network computed in integers.
//!
//! With weights `ŵ = (u − z_w) s_w`, inputs `x̂ = (q − z_a) s_a + β_a` and the normalization
//! `a y + b`, `a = γ/√(v + ε)`, `b = β − μ a`, folded in:
//!
//! ```text
//! y_c = (a_c s_w) s_a Σ_k (u_ck − z_w)(q_k − z_a)  +  b_c + a_c β_a Σ_k ŵ_ck
//! ```
//!
//! The sum is [`IntegerWeight`]'s on patches of codes; the second part is a bias. An input grid has
//! one step per tensor (LSQ and its kin), or one per pixel (QuEST), and then every pixel of a window
//! is a segment of its own. Codes are the training graph's; sums of floats run in another order, so
//! that values agree to rounding. Called by [`mod@super::run`].

mod codes;

use anybit_kernels::{IntegerWeight, QuantizedRows};
use rayon::prelude::*;

use self::codes::{Codes, InputGrid, PixelCodes};
use super::data::{Images, Normalization};
use super::model::{Architecture, ConvLayer, End, Step};
use super::network::{EVALUATION_BATCH, Network};
use super::ops::{Conv, NORM_EPSILON, Shape, Window, pad};
use super::quantize::Operand;
use super::{Result, VisionError};
use crate::{EstimatorSpec, Tensor};

/// Values that one task of a loop over pixels handles.
const TASK: usize = 1 << 14;

/// What a layer multiplies its codes with.
#[derive(Debug, Clone)]
enum Product {
    /// All channels of a window with all outputs.
    Dense { weight: IntegerWeight, segments: Vec<usize> },
    /// A window per channel.
    Depthwise {
        /// `2u − 2z_w`, `[taps, channels]`.
        codes: Vec<i32>,
        /// A quarter of the scales.
        quarter_scales: Vec<f32>,
    },
}

/// A layer in integers.
#[derive(Debug, Clone)]
struct IntegerLayer {
    input: InputGrid,
    product: Product,
    bias: Vec<f32>,
}

/// A trained network in integers.
#[derive(Debug, Clone)]
pub struct IntegerNetwork {
    architecture: Architecture,
    normalization: Normalization,
    /// The convolutions, then the head.
    layers: Vec<IntegerLayer>,
}

/// What is in the way of integers.
fn refusal(layer: &str, operand: &str, spec: &EstimatorSpec) -> VisionError {
    let what = format!(
        "{} of {operand} has no integer codes here; use lsq (weights: with raise_zero), \
         lsq_plus_weight, lsq_plus_activation (inputs), or quest, ste, clip or absmax with \
         hadamard = 0",
        spec.name()
    );
    VisionError::NoIntegers { layer: layer.into(), what }
}

impl IntegerNetwork {
    /// Folds the normalizations of a quantized network and turns its weights into codes.
    ///
    /// # Errors
    /// A network in full precision, or with grids that integers cannot compute with.
    pub fn new(network: &Network) -> Result<Self> {
        let layers = (0..=network.head()).map(|layer| integer_layer(network, layer));
        Ok(Self {
            architecture: network.architecture.clone(),
            normalization: network.normalization.clone(),
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Logits of all images, in the shape of [`Network::logits`].
    pub fn logits(&self, images: &Images) -> Tensor {
        let indices: Vec<usize> = (0..images.count()).collect();
        let batches = indices.chunks(EVALUATION_BATCH);
        let logits =
            batches.flat_map(|part| self.forward(&images.batch(part, &self.normalization).0));
        let logits: Vec<f32> = logits.collect();
        Tensor::new([logits.len() / self.architecture.classes, self.architecture.classes], logits)
    }

    /// Logits of `images`, a matrix of pixels.
    ///
    /// # Panics
    /// When it is not made of whole images.
    pub fn forward(&self, images: &Tensor) -> Vec<f32> {
        let count = images.len() / self.architecture.input.values();
        assert_eq!(images.len(), count * self.architecture.input.values(), "not whole images");
        let mut values = vec![images.data().to_vec()];
        for step in &self.architecture.steps {
            let value = match *step {
                Step::Conv { layer, input, relu } => {
                    let spec = &self.architecture.layers[layer];
                    let mut y = self.layers[layer].convolve(spec, &values[input]);
                    if relu {
                        y.par_chunks_mut(TASK).for_each(|y| y.iter_mut().for_each(rectify));
                    }
                    y
                }
                Step::Add { a, b } => {
                    let mut sum = values[a].clone();
                    sum.par_chunks_mut(TASK).zip(values[b].par_chunks(TASK)).for_each(|(s, b)| {
                        s.iter_mut().zip(b).for_each(|(s, b)| *s += b);
                        s.iter_mut().for_each(rectify);
                    });
                    sum
                }
            };
            values.push(value);
        }
        let last = values.pop().unwrap_or_default();
        let seen = match self.architecture.end {
            End::Pooled => mean_over_pixels(&last, self.architecture.last),
            End::Cells => last,
        };
        self.layers[self.architecture.layers.len()].convolve(&self.architecture.head(), &seen)
    }
}

fn rectify(x: &mut f32) {
    *x = if *x < 0.0 { 0.0 } else { *x };
}

/// The mean over the pixels of every image, as the training graph takes it.
fn mean_over_pixels(x: &[f32], shape: Shape) -> Vec<f32> {
    let (channels, share) = (shape.channels, 1.0 / shape.pixels() as f32);
    let mut y = vec![0f32; x.len() / shape.pixels()];
    for (y, x) in y.chunks_exact_mut(channels).zip(x.chunks_exact(shape.values())) {
        for x in x.chunks_exact(channels) {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
        }
        y.iter_mut().for_each(|y| *y *= share);
    }
    y
}

/// Pixels as rows of their own.
fn whole_rows(pixels: PixelCodes, channels: usize) -> QuantizedRows {
    QuantizedRows {
        cols: channels,
        segments: vec![channels],
        codes: pixels.codes,
        doubled_zeros: vec![pixels.doubled_zero; pixels.scales.len()],
        scales: pixels.scales,
    }
}

/// A layer of `network`, or its head.
fn integer_layer(network: &Network, layer: usize) -> Result<IntegerLayer> {
    let name = network.layer_name(layer);
    let Some(quantizer) = &network.quantizer else {
        let what = "it is in full precision; integers need a quantizer".into();
        return Err(VisionError::NoIntegers { layer: name.into(), what });
    };
    let grids = &quantizer.layers[layer];
    let learned = |operand: &Operand| -> Vec<f32> {
        let all = &network.parameters[operand.learned.clone()];
        all.iter().flat_map(|p| p.value.data().iter().copied()).collect()
    };
    let input = InputGrid::new(&grids.input.spec, &learned(&grids.input))
        .ok_or_else(|| refusal(name, "inputs", &grids.input.spec))?;
    let at = network.weight_at(layer);
    let value = &network.parameters[at].value;
    let mut codes = Codes::new(&grids.weight.spec, &learned(&grids.weight), value)
        .ok_or_else(|| refusal(name, "weights", &grids.weight.spec))?;
    let (factors, mut bias) = folded(network, layer);
    for (row, bias) in bias.iter_mut().enumerate() {
        codes.scales[row] *= factors[row];
        *bias += input.offset() * codes.row_sum(row);
    }
    let head = network.architecture.head();
    let spec = network.architecture.layers.get(layer).unwrap_or(&head);
    let product = product(&codes, spec, &input)
        .map_err(|source| VisionError::Pack { layer: name.into(), source })?;
    let product = product.ok_or_else(|| refusal(name, "weights", &grids.weight.spec))?;
    Ok(IntegerLayer { input, product, bias })
}

/// `a` and `b` of a convolution's normalization; ones and the bias for the head.
fn folded(network: &Network, layer: usize) -> (Vec<f32>, Vec<f32>) {
    let value = |place: usize| network.parameters[network.weight_at(layer) + place].value.data();
    let Some(running) = network.running.get(layer) else {
        return (vec![1.0; value(1).len()], value(1).to_vec());
    };
    let root = |v: &f32| 1.0 / (v + NORM_EPSILON).sqrt();
    let factors: Vec<f32> =
        running.variance.iter().zip(value(1)).map(|(v, gamma)| gamma * root(v)).collect();
    let means = running.mean.iter().zip(&factors);
    let shift = |(beta, (mean, factor)): (&f32, (&f32, &f32))| beta - mean * factor;
    let bias = value(2).iter().zip(means).map(shift).collect();
    (factors, bias)
}

/// What the codes are multiplied through; `None` when the kernel refuses them.
fn product(
    codes: &Codes,
    spec: &ConvLayer,
    input: &InputGrid,
) -> anybit_core::Result<Option<Product>> {
    let [rows, cols] = codes.shape;
    if spec.depthwise {
        let doubled = |tap: usize, row: usize| {
            2 * i32::from(codes.codes[row * cols + tap]) - (2.0 * codes.zero()) as i32
        };
        let all = (0..cols).flat_map(|tap| (0..rows).map(move |row| (tap, row)));
        return Ok(Some(Product::Depthwise {
            codes: all.map(|(tap, row)| doubled(tap, row)).collect(),
            quarter_scales: codes.scales.iter().map(|s| 0.25 * s).collect(),
        }));
    }
    let segments = match input {
        InputGrid::Pixels(_) => vec![spec.input.channels; spec.window.taps()],
        InputGrid::Tensor(_) => vec![cols],
    };
    let weight = IntegerWeight::new(&codes.packed(&segments)?, &segments);
    Ok(weight.map(|weight| Product::Dense { weight, segments }))
}

impl IntegerLayer {
    /// The convolution of images `x`.
    fn convolve(&self, spec: &ConvLayer, x: &[f32]) -> Vec<f32> {
        let images = x.len() / spec.input.values();
        let channels = spec.input.channels;
        let codes = match spec.padding {
            0 => self.input.encode(x, channels),
            by => {
                let mut wide = vec![0f32; images * spec.padded().values()];
                pad(x, &mut wide, spec.input, by);
                self.input.encode(&wide, channels)
            }
        };
        let mut y = vec![0f32; images * spec.output.values()];
        match &self.product {
            Product::Dense { weight, segments } => {
                let rows = match spec.is_linear() {
                    true => whole_rows(codes, channels),
                    false => patches(spec, &codes, segments, &self.input),
                };
                weight.forward(&rows, Some(&self.bias), &mut y);
            }
            Product::Depthwise { codes: weight, quarter_scales } => {
                let weight = (weight.as_slice(), quarter_scales.as_slice());
                depthwise(spec, &codes, weight, &self.bias, &mut y);
            }
        }
        y
    }
}

/// Patches of codes. With one step for all a patch is one segment, else every pixel of it is.
fn patches(
    spec: &ConvLayer,
    pixels: &PixelCodes,
    segments: &[usize],
    input: &InputGrid,
) -> QuantizedRows {
    let conv = Conv::new(spec.padded(), spec.window, spec.output.channels);
    let images = pixels.codes.len() / conv.input.values();
    let (rows, inner) = (images * spec.output.pixels(), conv.inner());
    let mut codes = vec![0i8; rows * inner];
    let inputs = pixels.codes.par_chunks(conv.input.values());
    codes
        .par_chunks_mut(spec.output.pixels() * inner)
        .zip(inputs)
        .for_each(|(patches, image)| conv.patches(image, patches));
    let mut scales = vec![pixels.scales.first().copied().unwrap_or(0.0); rows * segments.len()];
    if let InputGrid::Pixels(_) = input {
        // The scales are an image of one channel.
        let one = Conv::new(Shape { channels: 1, ..conv.input }, spec.window, 1);
        let inputs = pixels.scales.par_chunks(one.input.values());
        let outputs = scales.par_chunks_mut(spec.output.pixels() * segments.len());
        outputs.zip(inputs).for_each(|(patches, image)| one.patches(image, patches));
    }
    QuantizedRows {
        cols: inner,
        segments: segments.to_vec(),
        codes,
        scales,
        doubled_zeros: vec![pixels.doubled_zero; rows * segments.len()],
    }
}

/// `y_pc = ¼ s_c Σ_t s_t (2u − 2z_w)(2q − 2z_a) + bias_c`.
fn depthwise(
    spec: &ConvLayer,
    pixels: &PixelCodes,
    (weight, quarter_scales): (&[i32], &[f32]),
    bias: &[f32],
    y: &mut [f32],
) {
    let (channels, input) = (spec.input.channels, spec.padded());
    let Window { kernel, .. } = spec.window;
    let conv = Conv::new(input, spec.window, channels);
    let codes = pixels.codes.par_chunks(input.values());
    let inputs = codes.zip(pixels.scales.par_chunks(input.pixels()));
    y.par_chunks_mut(spec.output.values()).zip(inputs).for_each(|(y, (codes, scales))| {
        for (index, start) in conv.window_rows().enumerate() {
            let (pixel, row) = (index / kernel, index % kernel);
            let y = &mut y[pixel * channels..][..channels];
            for column in 0..kernel {
                let at = start + column * channels;
                let (codes, scale) = (&codes[at..at + channels], scales[at / channels]);
                let weight = &weight[(row * kernel + column) * channels..][..channels];
                for (y, (q, w)) in y.iter_mut().zip(codes.iter().zip(weight)) {
                    let integer = (2 * i32::from(*q) - pixels.doubled_zero) * w;
                    *y += scale * integer as f32;
                }
            }
        }
        for y in y.chunks_exact_mut(channels) {
            let each = quarter_scales.iter().zip(bias);
            y.iter_mut().zip(each).for_each(|(y, (scale, bias))| *y = *y * scale + bias);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::vision::model::{Family, ModelSpec};
    use crate::vision::network::{Mode, predictions};
    use crate::vision::quantize::QuantizerSpec;
    use crate::{Form, Tape};

    const INPUT: Shape = Shape { height: 8, width: 7, channels: 2 };

    /// A network whose normalizations have seen something, and images.
    fn trained(family: Family, spec: &QuantizerSpec) -> (Network, Tensor) {
        let architecture = ModelSpec { family, width: 4 }.build(INPUT, 5).unwrap();
        let normalization = Normalization { mean: vec![0.0; 2], deviation: vec![1.0; 2] };
        let mut network = Network::new(architecture, normalization, 3);
        let images = random(1, [40 * 56, 2]);
        for parameter in &mut network.parameters {
            if parameter.name.contains("norm") {
                let noise = random(2, [parameter.value.len()]);
                let values = parameter.value.data_mut().iter_mut().zip(noise.data());
                values.for_each(|(v, n)| *v += 0.3 * n);
            }
        }
        for _ in 0..30 {
            let mut tape = Tape::default();
            let moments = network.forward(&mut tape, &images, Mode::Train).moments;
            network.follow(&moments);
        }
        network.quantize(spec, &images).unwrap();
        (network, images)
    }

    fn fake_logits(network: &Network, images: &Tensor) -> Vec<f32> {
        let mut tape = Tape::default();
        let logits = network.forward(&mut tape, images, Mode::Evaluate).logits;
        tape.data(logits).to_vec()
    }

    #[test]
    fn integers_compute_what_training_simulates() {
        let quest =
            |bits| EstimatorSpec::Quest { bits, hadamard: 0, form: Form::Full, clip_scale: None };
        let specs = [
            QuantizerSpec::lsq(2, 2),
            QuantizerSpec::lsq(1, 1),
            QuantizerSpec { weights: quest(2), activations: quest(4), ends: 8 },
            QuantizerSpec {
                weights: EstimatorSpec::LsqPlusWeight { bits: 3 },
                activations: EstimatorSpec::Lsq { bits: 4, raise_zero: false },
                ends: 6,
            },
        ];
        for family in [Family::Tiny, Family::Resnet20, Family::Mobilenet] {
            for spec in &specs {
                let (network, images) = trained(family, spec);
                let want = fake_logits(&network, &images);
                let got = IntegerNetwork::new(&network).unwrap().forward(&images);
                let size = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                // A sum that falls on the other side of a level by its rounding moves an image's
                // logits by more; nearly all of them agree.
                let far = want.iter().zip(&got).filter(|(a, b)| (**a - **b).abs() > 1e-3 * size);
                assert!(far.count() <= want.len() / 20, "{family:?} {spec:?}");
                let [a, b] = [want, got].map(|l| predictions(&Tensor::new([40, 5], l)));
                let differ = a.iter().zip(&b).filter(|(a, b)| a != b).count();
                assert!(differ <= 1, "{family:?} {spec:?}: {differ} of 40");
            }
        }
    }

    /// Invariant 21: codes decode to the bits of the training graph.
    #[test]
    fn invariant_21_codes_are_the_trained_weights() {
        for bits in [1, 2, 3, 8] {
            let (network, _) = trained(Family::Tiny, &QuantizerSpec::lsq(bits, 2));
            let grids = &network.quantizer.as_ref().unwrap().layers[1].weight;
            let weight = &network.parameters[network.weight_at(1)].value;
            let step = network.parameters[grids.learned.start].value.data()[0];
            let codes = Codes::new(&grids.spec, &[step], weight).unwrap();
            let mut tape = Tape::default();
            let vars: Vec<_> =
                network.parameters.iter().map(|p| tape.constant(p.value.clone())).collect();
            let rounded = grids.record(&mut tape, vars[network.weight_at(1)], &vars);
            let decoded = codes.packed(&[weight.shape()[1]]).unwrap().dequantize();
            assert_eq!(decoded.data, tape.data(rounded), "{bits} bits");
        }
    }

    #[test]
    fn threads_do_not_matter_and_what_cannot_be_is_named() {
        let (mut network, images) = trained(Family::Mobilenet, &QuantizerSpec::lsq(2, 2));
        let integers = IntegerNetwork::new(&network).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| integers.forward(&images))
        };
        assert_eq!(run(1), run(3));
        network.quantizer = None;
        let error = IntegerNetwork::new(&network).unwrap_err().to_string();
        assert!(error.contains("conv1") && error.contains("full precision"), "{error}");
        let spec = QuantizerSpec {
            activations: EstimatorSpec::Pact { bits: 2 },
            ..QuantizerSpec::lsq(2, 2)
        };
        let (network, _) = trained(Family::Tiny, &spec);
        let error = IntegerNetwork::new(&network).unwrap_err().to_string();
        assert!(error.contains("conv2") && error.contains("pact of inputs"), "{error}");
    }
}
