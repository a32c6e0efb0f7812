//! Labelled images: readers, subsets, noise in the labels, batches.
//!
//! Pixels are bytes until a batch is made, `[count, height, width, channels]`; then every channel
//! has mean 0 and deviation 1 over the training images. Which images a subset has and which labels
//! are redrawn follows from the seed. Called by the trainer.

mod cifar;
mod folder;
pub(super) mod idx;

use std::path::Path;

use anybit_core::rng::{SplitMix64, stream};
use anybit_io::IoError;
use serde::{Deserialize, Serialize};

pub use cifar::read_cifar10;
pub use folder::read_folder;
pub use idx::read_idx;

use super::ops::Shape;
use super::{Result, VisionError};
use crate::Tensor;

/// Images and the class of each.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// Of every image.
    pub shape: Shape,
    /// Number of classes.
    pub classes: usize,
    /// `[count, height, width, channels]`.
    pub pixels: Vec<u8>,
    /// One per image.
    pub labels: Vec<u8>,
}

/// What pixels, divided by 255, are normalized with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalization {
    /// Of each channel.
    pub mean: Vec<f32>,
    /// Of each channel.
    pub deviation: Vec<f32>,
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    Ok(std::fs::read(path).map_err(|e| IoError::file("read", path, e))?)
}

impl Images {
    /// Checks and wraps images; `path` is named where labels are wrong.
    ///
    /// # Errors
    /// No image, images without pixels, labels that are no classes, numbers that differ.
    pub fn new(
        path: &Path,
        shape: Shape,
        classes: usize,
        pixels: Vec<u8>,
        labels: Vec<u8>,
    ) -> Result<Self> {
        if labels.is_empty() || shape.values() == 0 {
            return Err(VisionError::data(path, "there is no image in it; give another set"));
        }
        if pixels.len() != labels.len() * shape.values() {
            let what = format!("{} labels for {} pixels", labels.len(), pixels.len());
            return Err(VisionError::data(path, what));
        }
        if let Some(index) = labels.iter().position(|l| usize::from(*l) >= classes) {
            let what = format!(
                "label {index} is {}, there are classes 0 to {}; set data.classes, or take \
                 another file",
                labels[index],
                classes.saturating_sub(1)
            );
            return Err(VisionError::data(path, what));
        }
        Ok(Self { shape, classes, pixels, labels })
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.labels.len()
    }

    /// `count` of them, drawn without repetition; all of them when there are no more.
    pub fn subset(&self, count: usize, seed: u64) -> Self {
        let mut order: Vec<usize> = (0..self.count()).collect();
        let mut rng = SplitMix64::new(stream(seed, "subset"));
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i + 1));
        }
        order.truncate(count);
        let size = self.shape.values();
        let image = |index: &usize| &self.pixels[index * size..][..size];
        Self {
            pixels: order.iter().flat_map(image).copied().collect(),
            labels: order.iter().map(|index| self.labels[*index]).collect(),
            ..*self
        }
    }

    /// Redraws a share of the labels evenly among the classes: some stay what they were.
    pub fn add_label_noise(&mut self, share: f64, seed: u64) {
        let mut rng = SplitMix64::new(stream(seed, "label noise"));
        for label in &mut self.labels {
            // Two draws for every label: a larger share redraws the same ones and more.
            let (chance, class) = (rng.uniform(), rng.below(self.classes));
            if chance < share {
                *label = class as u8;
            }
        }
    }

    /// Mean and deviation of every channel. A channel of one value has deviation 1.
    pub fn normalization(&self) -> Normalization {
        let channels = self.shape.channels;
        let n = (self.pixels.len() / channels) as f64;
        let moments = |channel: usize| {
            let values = self.pixels.iter().skip(channel).step_by(channels);
            let (sum, squares) = values.fold((0u64, 0u64), |(sum, squares), v| {
                (sum + u64::from(*v), squares + u64::from(*v) * u64::from(*v))
            });
            let mean = sum as f64 / n;
            let deviation = (squares as f64 / n - mean * mean).max(0.0).sqrt();
            (mean / 255.0, if deviation > 0.0 { deviation / 255.0 } else { 1.0 })
        };
        let all: Vec<(f64, f64)> = (0..channels).map(moments).collect();
        Normalization {
            mean: all.iter().map(|m| m.0 as f32).collect(),
            deviation: all.iter().map(|m| m.1 as f32).collect(),
        }
    }

    /// Some images as a matrix of pixels, and their classes.
    pub fn batch(&self, indices: &[usize], norm: &Normalization) -> (Tensor, Vec<u32>) {
        let (size, channels) = (self.shape.values(), self.shape.channels);
        let mut values = Vec::with_capacity(indices.len() * size);
        for index in indices {
            for pixel in self.pixels[index * size..][..size].chunks_exact(channels) {
                let each = pixel.iter().zip(norm.mean.iter().zip(&norm.deviation));
                values.extend(each.map(|(v, (mean, dev))| (f32::from(*v) / 255.0 - mean) / dev));
            }
        }
        let labels = indices.iter().map(|index| u32::from(self.labels[*index])).collect();
        (Tensor::new([indices.len() * self.shape.pixels(), channels], values), labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images() -> Images {
        let shape = Shape { height: 1, width: 2, channels: 2 };
        let pixels = (0..40u8).map(|i| if i % 2 == 0 { i } else { 7 }).collect();
        let labels = (0..10).collect();
        Images::new(Path::new("x"), shape, 10, pixels, labels).unwrap()
    }

    #[test]
    fn subsets_and_noise_follow_the_seed() {
        let all = images();
        let (a, b) = (all.subset(4, 1), all.subset(4, 2));
        assert!(a != b && a == all.subset(4, 1) && a.count() == 4);
        for (index, label) in a.labels.iter().enumerate() {
            assert_eq!(a.pixels[4 * index], 4 * label, "image and label stay together");
        }
        let mut sorted = all.subset(99, 3).labels;
        sorted.sort_unstable();
        assert_eq!(sorted, all.labels);
        let noisy = |share: f64| {
            let mut noisy = images();
            noisy.labels = [3; 10].repeat(100);
            noisy.add_label_noise(share, 5);
            noisy.labels
        };
        let moved = |share: f64| noisy(share).iter().filter(|l| **l != 3).count();
        assert_eq!(moved(0.0), 0);
        // 0.2 · 9/10 of 1000.
        assert!((140..220).contains(&moved(0.2)), "{}", moved(0.2));
        assert_eq!(noisy(0.2), noisy(0.2));
        assert!(noisy(0.2).iter().zip(noisy(0.5)).all(|(a, b)| *a == 3 || *a == b));
    }

    #[test]
    fn channels_are_normalized() {
        let all = images();
        let norm = all.normalization();
        assert_eq!(norm.deviation[1], 1.0);
        let (batch, labels) = all.batch(&(0..10).collect::<Vec<_>>(), &norm);
        assert_eq!((batch.shape(), &labels[..3]), (&[20, 2][..], &[0, 1, 2][..]));
        let first: Vec<f64> = batch.data().iter().step_by(2).map(|v| f64::from(*v)).collect();
        let squares: f64 = first.iter().map(|v| v * v).sum();
        approx::assert_abs_diff_eq!(first.iter().sum::<f64>(), 0.0, epsilon = 1e-4);
        approx::assert_relative_eq!(squares / 20.0, 1.0, max_relative = 1e-4);
        assert!(batch.data().iter().skip(1).step_by(2).all(|v| v.abs() < 1e-6));
    }
}
