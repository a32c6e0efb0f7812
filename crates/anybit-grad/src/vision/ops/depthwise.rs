//! Depthwise convolution: a window of its own for every channel,
//!
//! ```text
//! y_pc = Σ_t x_{p,t,c} w_ct        dx_{p,t,c} += w_ct dy_pc        dw_ct = Σ_p x_{p,t,c} dy_pc
//! ```
//!
//! with `t` over the pixels of the window. Channels lie side by side, so that loops over them
//! vectorize; the weight is transposed for that.

use rayon::prelude::*;

use super::conv::Conv;
use super::{Shape, Window, task_images};
use crate::tape::Pass;
use crate::{Tape, Tensor, Var};

/// `[rows, cols]` to `[cols, rows]`.
fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| x[row * cols + col])).collect()
}

/// Sizes of a depthwise convolution: the inputs' and outputs' channels are the same.
#[derive(Debug, Clone, Copy)]
struct Depthwise(Conv);

impl Depthwise {
    /// For every pixel of the output and every pixel of the window: where that starts in the image.
    fn taps(&self) -> impl Iterator<Item = usize> + use<> {
        let (kernel, channels) = (self.0.window.kernel, self.0.input.channels);
        self.0.window_rows().flat_map(move |row| (0..kernel).map(move |tap| row + tap * channels))
    }

    /// Calls `f(pixel of the output, tap, start in the image)`.
    fn each(&self, mut f: impl FnMut(usize, usize, usize)) {
        let taps = self.0.window.taps();
        self.taps().enumerate().for_each(|(index, at)| f(index / taps, index % taps, at));
    }

    fn forward(&self, x: &[f32], weight: &[f32], y: &mut [f32]) {
        let (channels, taps) = (self.0.input.channels, self.0.window.taps());
        let weight = transposed(weight, channels, taps);
        let inputs = x.par_chunks(self.0.input.values());
        y.par_chunks_mut(self.0.output.values()).zip(inputs).for_each(|(y, x)| {
            y.fill(0.0);
            self.each(|pixel, tap, at| {
                let (x, w) = (&x[at..at + channels], &weight[tap * channels..][..channels]);
                let y = &mut y[pixel * channels..][..channels];
                y.iter_mut().zip(x.iter().zip(w)).for_each(|(y, (x, w))| *y += x * w);
            });
        });
    }

    fn backward_input(&self, dy: &[f32], weight: &[f32], dx: &mut [f32]) {
        let (channels, taps) = (self.0.input.channels, self.0.window.taps());
        let weight = transposed(weight, channels, taps);
        let grads = dy.par_chunks(self.0.output.values());
        dx.par_chunks_mut(self.0.input.values()).zip(grads).for_each(|(dx, dy)| {
            self.each(|pixel, tap, at| {
                let dy = &dy[pixel * channels..][..channels];
                let w = &weight[tap * channels..][..channels];
                let dx = &mut dx[at..at + channels];
                dx.iter_mut().zip(dy.iter().zip(w)).for_each(|(d, (g, w))| *d += g * w);
            });
        });
    }

    /// `dwᵀ` of every task, in order.
    fn backward_weight(&self, dy: &[f32], x: &[f32]) -> Vec<Vec<f32>> {
        let (channels, taps) = (self.0.input.channels, self.0.window.taps());
        let (input, output) = (self.0.input.values(), self.0.output.values());
        let images = task_images(output * taps);
        let of_task = |(x, dy): (&[f32], &[f32])| {
            let mut dw = vec![0f32; taps * channels];
            for (x, dy) in x.chunks_exact(input).zip(dy.chunks_exact(output)) {
                self.each(|pixel, tap, at| {
                    let (x, dy) = (&x[at..at + channels], &dy[pixel * channels..][..channels]);
                    let dw = &mut dw[tap * channels..][..channels];
                    dw.iter_mut().zip(x.iter().zip(dy)).for_each(|(d, (x, g))| *d += x * g);
                });
            }
            dw
        };
        x.par_chunks(images * input).zip(dy.par_chunks(images * output)).map(of_task).collect()
    }

    fn backward(&self, pass: &mut Pass<'_>, x: Var, weight: Var) {
        let (dy, x_values, w_values) = (pass.grad(), pass.value(x), pass.value(weight));
        if pass.wants(x) {
            let mut dx = pass.take(x);
            self.backward_input(dy, w_values, dx.ready());
            pass.put(x, dx);
        }
        if pass.wants(weight) {
            let (channels, taps) = (self.0.input.channels, self.0.window.taps());
            let mut dw = pass.take(weight);
            let sum = dw.ready();
            for part in self.backward_weight(dy, x_values) {
                let part = transposed(&part, taps, channels);
                sum.iter_mut().zip(&part).for_each(|(s, p)| *s += p);
            }
            pass.put(weight, dw);
        }
    }
}

impl Tape {
    /// The depthwise convolution of `x`, images of `input` (padded already), with
    /// `weight: [C, kernel²]`: `[pixels, C]`.
    ///
    /// # Panics
    /// When the shapes do not fit together.
    pub fn depthwise(&mut self, x: Var, weight: Var, input: Shape, window: Window) -> Var {
        assert_eq!(self.dims(weight), (input.channels, window.taps()), "another window");
        let conv = Conv::new(input, window, input.channels);
        let images = self.value(x).len() / input.values();
        assert_eq!(self.value(x).len(), images * input.values(), "not whole images");
        let mut y = self.buffer(images * conv.output.values());
        let depthwise = Depthwise(conv);
        depthwise.forward(self.data(x), self.data(weight), &mut y);
        let y = Tensor::new([images * conv.output.pixels(), input.channels], y);
        self.custom(&[x, weight], y, move |pass| depthwise.backward(pass, x, weight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    const INPUT: Shape = Shape { height: 5, width: 6, channels: 3 };

    /// A dense convolution whose weight is zero between different channels is the same.
    #[test]
    fn equals_a_diagonal_convolution() {
        for stride in [1, 2] {
            let window = Window { kernel: 3, stride };
            let (x, w) = (random(1, [2 * 30, 3]), random(2, [3, 9]));
            let mut dense = Tensor::new([3, 27], vec![0.0; 81]);
            for channel in 0..3 {
                for tap in 0..9 {
                    dense.data_mut()[channel * 27 + tap * 3 + channel] =
                        w.data()[channel * 9 + tap];
                }
            }
            let mut tape = Tape::default();
            let (xv, wv) = (tape.constant(x.clone()), tape.constant(w.clone()));
            let dense = tape.constant(dense);
            let (got, want) =
                (tape.depthwise(xv, wv, INPUT, window), tape.conv2d(xv, dense, INPUT, window));
            for (got, want) in tape.data(got).iter().zip(tape.data(want)) {
                approx::assert_abs_diff_eq!(*got, *want, epsilon = 1e-5);
            }
            check_gradients(&[x, w], |t, v| t.depthwise(v[0], v[1], INPUT, window));
        }
    }
}
