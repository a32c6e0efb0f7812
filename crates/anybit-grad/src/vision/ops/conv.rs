//! Convolution as a product: a patch is what the window sees, `kernel² · C` values in the order of
//! rows, pixels, channels, and
//!
//! ```text
//! y = P Wᵀ        dW = Σ_tasks dyᵀ P        dP = dy W,  dx = Σ of dP where patches overlap
//! ```
//!
//! for patches `P: [pixels of y, kernel² · C]` and `W: [out, kernel² · C]`. Patches exist for the
//! images of one task at a time, in the forward pass and again in the backward one: stored, they
//! would take `kernel²` times the memory of the activations. Their gradients likewise.

use anybit_core::linalg::{View, matmul};
use anybit_kernels::with_scratch;
use rayon::prelude::*;

use super::{Shape, Window, task_images};
use crate::tape::Pass;
use crate::{Tape, Tensor, Var};

/// Sizes of a convolution.
#[derive(Debug, Clone, Copy)]
pub(in crate::vision) struct Conv {
    /// Padded already.
    pub input: Shape,
    /// What is looked at.
    pub window: Window,
    /// What comes of it.
    pub output: Shape,
}

impl Conv {
    /// A convolution of `input` to `channels`.
    pub fn new(input: Shape, window: Window, channels: usize) -> Self {
        Self { input, window, output: window.output(input, channels) }
    }

    /// Values of a patch.
    pub fn inner(&self) -> usize {
        self.window.taps() * self.input.channels
    }

    /// For every row of the window at every pixel of the output, in the order of patches: where it
    /// starts in the image. Its `kernel · C` values are contiguous.
    pub fn window_rows(&self) -> impl Iterator<Item = usize> + use<> {
        let Self { input, window, output } = *self;
        (0..output.pixels()).flat_map(move |pixel| {
            let (y, x) = (pixel / output.width, pixel % output.width);
            (0..window.kernel).map(move |row| {
                let top = y * window.stride + row;
                (top * input.width + x * window.stride) * input.channels
            })
        })
    }

    /// Values of a row of the window.
    pub fn row_values(&self) -> usize {
        self.window.kernel * self.input.channels
    }

    /// Writes the patches of one image.
    pub fn patches<V: Copy>(&self, image: &[V], patches: &mut [V]) {
        let length = self.row_values();
        for (patch, at) in patches.chunks_exact_mut(length).zip(self.window_rows()) {
            patch.copy_from_slice(&image[at..at + length]);
        }
    }

    /// Adds the gradients of the patches of one image to the image's.
    fn add_patches(&self, patches: &[f32], image: &mut [f32]) {
        let length = self.row_values();
        for (patch, at) in patches.chunks_exact(length).zip(self.window_rows()) {
            image[at..at + length].iter_mut().zip(patch).for_each(|(i, p)| *i += p);
        }
    }

    /// Values of the patches of one image.
    fn patch_values(&self) -> usize {
        self.output.pixels() * self.inner()
    }

    /// Values that a task has of the input and of the output.
    fn task(&self) -> (usize, usize) {
        let images = task_images(self.patch_values());
        (images * self.input.values(), images * self.output.values())
    }

    /// Patches of the images of a task.
    fn all_patches(&self, x: &[f32], patches: &mut [f32]) {
        let images = x.chunks_exact(self.input.values());
        for (patches, x) in patches.chunks_exact_mut(self.patch_values()).zip(images) {
            self.patches(x, patches);
        }
    }

    fn forward(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let (inner, out) = (self.inner(), self.output.channels);
        let (x_task, y_task) = self.task();
        let weight = View::rows(weight, out, inner, inner);
        y.par_chunks_mut(y_task).zip(x.par_chunks(x_task)).for_each(|(y, x)| {
            let rows = y.len() / out;
            with_scratch(rows * inner, |patches| {
                self.all_patches(x, patches);
                matmul(y, out, false, 1.0, View::rows(patches, rows, inner, inner), weight.t());
            });
        });
    }

    /// `dx += …`; `dx` holds values already.
    fn backward_input(&self, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
        let (inner, out) = (self.inner(), self.output.channels);
        let (x_task, y_task) = self.task();
        let weight = View::rows(weight, out, inner, inner);
        dx.par_chunks_mut(x_task).zip(dy.par_chunks(y_task)).for_each(|(dx, dy)| {
            let rows = dy.len() / out;
            with_scratch(rows * inner, |patches| {
                matmul(patches, inner, false, 1.0, View::rows(dy, rows, out, out), weight);
                let images = dx.chunks_exact_mut(self.input.values());
                for (patches, dx) in patches.chunks_exact(self.patch_values()).zip(images) {
                    self.add_patches(patches, dx);
                }
            });
        });
    }

    /// `dW` of every task, in order.
    fn backward_weight(&self, dy: &[f32], x: &[f32]) -> Vec<Vec<f32>> {
        let (inner, out) = (self.inner(), self.output.channels);
        let (x_task, y_task) = self.task();
        let of_task = |(x, dy): (&[f32], &[f32])| {
            let rows = dy.len() / out;
            let mut dw = vec![0f32; out * inner];
            with_scratch(rows * inner, |patches| {
                self.all_patches(x, patches);
                let (dy, patches) =
                    (View::rows(dy, rows, out, out), View::rows(patches, rows, inner, inner));
                matmul(&mut dw, inner, false, 1.0, dy.t(), patches);
            });
            dw
        };
        x.par_chunks(x_task).zip(dy.par_chunks(y_task)).map(of_task).collect()
    }

    fn backward(&self, pass: &mut Pass<'_>, x: Var, weight: Var) {
        let (dy, x_values, w_values) = (pass.grad(), pass.value(x), pass.value(weight));
        if pass.wants(x) {
            let mut dx = pass.take(x);
            self.backward_input(dy, w_values, dx.ready());
            pass.put(x, dx);
        }
        if pass.wants(weight) {
            let mut dw = pass.take(weight);
            let sum = dw.ready();
            for part in self.backward_weight(dy, x_values) {
                sum.iter_mut().zip(&part).for_each(|(s, p)| *s += p);
            }
            pass.put(weight, dw);
        }
    }
}

impl Tape {
    /// The convolution of `x`, images of `input` (padded already), with `weight: [out, kernel² · C]`,
    /// whose columns run over rows, pixels and channels of the window: `[pixels, out]`.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    pub fn conv2d(&mut self, x: Var, weight: Var, input: Shape, window: Window) -> Var {
        let (out, inner) = self.dims(weight);
        let conv = Conv::new(input, window, out);
        let images = self.value(x).len() / input.values();
        assert_eq!(inner, conv.inner(), "a weight of another window");
        assert_eq!(self.value(x).len(), images * input.values(), "not whole images");
        let mut y = self.buffer(images * conv.output.values());
        conv.forward(self.data(x), self.data(weight), &mut y);
        let y = Tensor::new([images * conv.output.pixels(), out], y);
        self.custom(&[x, weight], y, move |pass| conv.backward(pass, x, weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    const INPUT: Shape = Shape { height: 6, width: 5, channels: 3 };

    /// Seven loops.
    fn direct(x: &[f32], w: &[f32], window: Window, out: usize) -> Vec<f32> {
        let output = window.output(INPUT, out);
        let mut y = Vec::new();
        for image in x.chunks(INPUT.values()) {
            for (top, left) in
                (0..output.height).flat_map(|t| (0..output.width).map(move |l| (t, l)))
            {
                for w in w.chunks(window.taps() * INPUT.channels) {
                    let mut sum = 0.0;
                    for (index, w) in w.iter().enumerate() {
                        let (tap, channel) = (index / INPUT.channels, index % INPUT.channels);
                        let row = top * window.stride + tap / window.kernel;
                        let col = left * window.stride + tap % window.kernel;
                        sum += w * image[(row * INPUT.width + col) * INPUT.channels + channel];
                    }
                    y.push(sum);
                }
            }
        }
        y
    }

    #[test]
    fn values_and_gradients() {
        for (kernel, stride) in [(3, 1), (3, 2), (1, 2), (2, 1)] {
            let window = Window { kernel, stride };
            let (x, w) = (random(1, [2 * 30, 3]), random(2, [4, kernel * kernel * 3]));
            let mut tape = Tape::default();
            let (xv, wv) = (tape.constant(x.clone()), tape.constant(w.clone()));
            let y = tape.conv2d(xv, wv, INPUT, window);
            for (got, want) in tape.data(y).iter().zip(direct(x.data(), w.data(), window, 4)) {
                approx::assert_abs_diff_eq!(*got, want, epsilon = 1e-4);
            }
            check_gradients(&[x, w], |t, v| t.conv2d(v[0], v[1], INPUT, window));
        }
    }

    #[test]
    fn threads_do_not_matter() {
        // Several tasks: a patch of 27 values at 12 pixels, 300 images.
        let (x, w) = (random(3, [300 * 30, 3]), random(4, [4, 27]));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut tape = Tape::default();
                let (x, w) = (tape.leaf(x.clone(), true), tape.leaf(w.clone(), true));
                let y = tape.conv2d(x, w, INPUT, Window { kernel: 3, stride: 1 });
                let dy = tape.data(y).to_vec();
                tape.backward_from(y, &dy);
                [dy, tape.grad(x).unwrap().to_vec(), tape.grad(w).unwrap().to_vec()]
            })
        };
        assert!(run(1) == run(3));
    }
}
