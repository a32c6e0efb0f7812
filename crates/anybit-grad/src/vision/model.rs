//! Shapes of networks: what is convolved in which order. Training and integer inference both follow
//! this list.
//!
//! | name | layers | source |
//! |---|---|---|
//! | `tiny` | three convolutions of `w`, `2w`, `4w` channels, the last two at stride 2 | – |
//! | `resnet20` | three stages of three blocks, `w`, `2w`, `4w` channels (`w` = 16 in the paper) | He et al., 2016 |
//! | `mobilenet` | a convolution and five depthwise separable ones, `w` to `8w` channels | Howard et al., 2017, shortened |
//! | `plain` | seven convolutions, `w` to `8w` channels, three of them at stride 2 | – |
//!
//! Every convolution is followed by batch normalization; the mean over all pixels and a linear end
//! a network, or the linear alone, of every pixel ([`End`]). Shortcuts that change the shape are
//! 1×1 convolutions (the paper's option B).

use serde::{Deserialize, Serialize};

use super::ops::{Shape, Window};
use super::{Result, VisionError};

/// A network by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Three convolutions.
    Tiny,
    /// The residual network of CIFAR.
    Resnet20,
    /// Depthwise separable convolutions.
    Mobilenet,
    /// 3×3 convolutions one after another, down to an eighth of the sides.
    Plain,
}

/// A family and how wide it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// The family.
    pub family: Family,
    /// Channels of the first convolution.
    pub width: usize,
}

/// A convolution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvLayer {
    /// The start of its parameters' names.
    pub name: String,
    /// Before padding.
    pub input: Shape,
    /// What comes of it.
    pub output: Shape,
    /// What it looks at.
    pub window: Window,
    /// Pixels of zeros on each side.
    pub padding: usize,
    /// Whether every channel has a window of its own.
    pub depthwise: bool,
}

impl ConvLayer {
    /// The input with its padding.
    pub fn padded(&self) -> Shape {
        self.input.padded(self.padding)
    }

    /// Shape of the weight.
    pub fn weight_shape(&self) -> [usize; 2] {
        let inputs = if self.depthwise { 1 } else { self.input.channels };
        [self.output.channels, self.window.taps() * inputs]
    }

    /// Whether it is a linear of every pixel.
    pub fn is_linear(&self) -> bool {
        !self.depthwise && self.window == Window { kernel: 1, stride: 1 } && self.padding == 0
    }
}

/// Makes value `n + 1` of a network at place `n`; value 0 is the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Convolution, normalization and maybe ReLU.
    Conv {
        /// Which of the layers; each occurs once, in order.
        layer: usize,
        /// A value.
        input: usize,
        /// Whether ReLU follows.
        relu: bool,
    },
    /// `relu(a + b)`.
    Add {
        /// A value.
        a: usize,
        /// Another.
        b: usize,
    },
}

/// What the linear at the end looks at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The mean over all pixels of the last value: one row of outputs for an image.
    #[default]
    Pooled,
    /// Every pixel of the last value: a row of outputs for each, which detectors call cells.
    Cells,
}

impl End {
    /// Whether it is the usual one, which files need not name.
    pub(super) fn is_pooled(&self) -> bool {
        *self == Self::Pooled
    }
}

/// A network without its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Architecture {
    /// What it was made from.
    pub spec: ModelSpec,
    /// The images.
    pub input: Shape,
    /// Classes, rows of the head; for a detector its outputs.
    pub classes: usize,
    /// What the head looks at.
    pub end: End,
    /// The convolutions.
    pub layers: Vec<ConvLayer>,
    /// What is computed.
    pub steps: Vec<Step>,
    /// Shape of the last value, before the head.
    pub last: Shape,
}

impl Architecture {
    /// The linear at the end, as a convolution of one pixel.
    pub fn head(&self) -> ConvLayer {
        let one = |channels: usize| Shape { height: 1, width: 1, channels };
        ConvLayer {
            name: "head".into(),
            input: one(self.last.channels),
            output: one(self.classes),
            window: Window { kernel: 1, stride: 1 },
            padding: 0,
            depthwise: false,
        }
    }
}

/// Puts steps one after another.
struct Builder {
    layers: Vec<ConvLayer>,
    steps: Vec<Step>,
    /// Of every value.
    shapes: Vec<Shape>,
}

impl Builder {
    fn push(&mut self, step: Step, shape: Shape) -> usize {
        self.steps.push(step);
        self.shapes.push(shape);
        self.steps.len()
    }

    fn layer(
        &mut self,
        name: String,
        from: usize,
        window: Window,
        to: Option<usize>,
        relu: bool,
    ) -> usize {
        let input = self.shapes[from];
        let padding = window.kernel / 2;
        let output = window.output(input.padded(padding), to.unwrap_or(input.channels));
        let depthwise = to.is_none();
        self.layers.push(ConvLayer { name, input, output, window, padding, depthwise });
        self.push(Step::Conv { layer: self.layers.len() - 1, input: from, relu }, output)
    }

    /// A 3×3 convolution.
    fn conv(&mut self, name: String, from: usize, to: usize, stride: usize, relu: bool) -> usize {
        self.layer(name, from, Window { kernel: 3, stride }, Some(to), relu)
    }

    /// A 1×1 convolution.
    fn point(&mut self, name: String, from: usize, to: usize, stride: usize, relu: bool) -> usize {
        self.layer(name, from, Window { kernel: 1, stride }, Some(to), relu)
    }

    /// Two 3×3 convolutions and a shortcut.
    fn residual(&mut self, name: &str, from: usize, to: usize, stride: usize) -> usize {
        let first = self.conv(format!("{name}.conv1"), from, to, stride, true);
        let second = self.conv(format!("{name}.conv2"), first, to, 1, false);
        let shortcut = match self.shapes[from] == self.shapes[second] {
            true => from,
            false => self.point(format!("{name}.shortcut"), from, to, stride, false),
        };
        let shape = self.shapes[second];
        self.push(Step::Add { a: second, b: shortcut }, shape)
    }

    /// A 3×3 window per channel, then a 1×1 convolution.
    fn separable(&mut self, name: &str, from: usize, to: usize, stride: usize) -> usize {
        let window = Window { kernel: 3, stride };
        let middle = self.layer(format!("{name}.depthwise"), from, window, None, true);
        self.point(format!("{name}.pointwise"), middle, to, 1, true)
    }
}

impl ModelSpec {
    /// The network for images of `input` and so many classes.
    ///
    /// # Errors
    /// No channels, no classes, no pixels, or more than anyone has.
    pub fn build(self, input: Shape, classes: usize) -> Result<Architecture> {
        let w = self.width;
        if w == 0 || w > 1024 {
            return Err(VisionError::recipe("model.width", format!("{w} channels; use 1 to 1024")));
        }
        let Shape { height, width, channels } = input;
        let sides = (1..=4096).contains(&height) && (1..=4096).contains(&width);
        if !sides || !(1..=64).contains(&channels) || !(2..=65_536).contains(&classes) {
            let what = format!(
                "{classes} classes of images of {height}×{width} pixels and {channels} channels; \
                 use 2 to 65536, 1 to 4096 on each side, 1 to 64"
            );
            return Err(VisionError::recipe("data", what));
        }
        let mut b = Builder { layers: Vec::new(), steps: Vec::new(), shapes: vec![input] };
        let mut at = b.conv("conv1".into(), 0, w, 1, true);
        match self.family {
            Family::Tiny => {
                at = b.conv("conv2".into(), at, 2 * w, 2, true);
                b.conv("conv3".into(), at, 4 * w, 2, true);
            }
            Family::Resnet20 => {
                for (stage, channels) in [w, 2 * w, 4 * w].into_iter().enumerate() {
                    for block in 0..3 {
                        let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                        let name = format!("stage{}.block{}", stage + 1, block + 1);
                        at = b.residual(&name, at, channels, stride);
                    }
                }
            }
            Family::Mobilenet => {
                let blocks = [(2 * w, 1), (4 * w, 2), (4 * w, 1), (8 * w, 2), (8 * w, 1)];
                for (index, (channels, stride)) in blocks.into_iter().enumerate() {
                    at = b.separable(&format!("block{}", index + 1), at, channels, stride);
                }
            }
            Family::Plain => {
                for (index, width) in [2 * w, 4 * w, 8 * w].into_iter().enumerate() {
                    at = b.conv(format!("conv{}", 2 * index + 2), at, width, 2, true);
                    at = b.conv(format!("conv{}", 2 * index + 3), at, width, 1, true);
                }
            }
        }
        let last = b.shapes[b.steps.len()];
        let Builder { layers, steps, .. } = b;
        let end = End::Pooled;
        Ok(Architecture { spec: self, input, classes, end, layers, steps, last })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIFAR: Shape = Shape { height: 32, width: 32, channels: 3 };

    fn weights(family: Family, width: usize) -> (Architecture, usize) {
        let built = ModelSpec { family, width }.build(CIFAR, 10).unwrap();
        let convs: usize =
            built.layers.iter().map(|l| l.weight_shape().iter().product::<usize>()).sum();
        let head = built.last.channels * built.classes + built.classes;
        (built, convs + head)
    }

    #[test]
    fn shapes_and_sizes() {
        let (resnet, count) = weights(Family::Resnet20, 16);
        // 0.27 M in the paper, whose shortcuts have no weights: these have 512 + 2048.
        assert_eq!(count, 268_346 + 2560);
        assert_eq!(resnet.layers.len(), 21);
        assert_eq!(resnet.last, Shape { height: 8, width: 8, channels: 64 });
        let (mobile, _) = weights(Family::Mobilenet, 8);
        assert_eq!(mobile.last, Shape { height: 8, width: 8, channels: 64 });
        assert_eq!(mobile.layers[1].weight_shape(), [8, 9]);
        assert!(mobile.layers[2].is_linear());
        let (tiny, _) = weights(Family::Tiny, 8);
        assert_eq!(tiny.steps.len(), 3);
        let (plain, _) = weights(Family::Plain, 8);
        assert_eq!(plain.last, Shape { height: 4, width: 4, channels: 64 });
        assert_eq!(plain.layers[6].name, "conv7");
        for built in [resnet, mobile, tiny, plain] {
            let layers = built.steps.iter().filter_map(|s| match s {
                Step::Conv { layer, .. } => Some(*layer),
                Step::Add { .. } => None,
            });
            assert!(layers.eq(0..built.layers.len()));
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        let spec = ModelSpec { family: Family::Tiny, width: 0 };
        assert!(spec.build(CIFAR, 10).unwrap_err().to_string().contains("model.width"));
        let spec = ModelSpec { family: Family::Tiny, width: 4 };
        assert!(spec.build(CIFAR, 1).is_err());
    }
}
