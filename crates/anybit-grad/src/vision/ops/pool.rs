//! Global average pooling: `y_bc = 1/P Σ_p x_bpc` over the `P` pixels of an image,
//! `dx_bpc = dy_bc / P`.

use rayon::prelude::*;

use crate::{Tape, Tensor, Var};

impl Tape {
    /// The mean over the pixels of every image, `[images, channels]`; `x` is
    /// `[images · pixels, channels]`.
    ///
    /// # Panics
    /// When `x` is not made of whole images.
    pub fn mean_over_pixels(&mut self, x: Var, pixels: usize) -> Var {
        let (rows, channels) = self.dims(x);
        assert!(pixels > 0 && rows.is_multiple_of(pixels), "not whole images");
        let (images, share) = (rows / pixels, 1.0 / pixels as f32);
        let mut y = self.buffer(images * channels);
        let inputs = self.data(x).par_chunks(pixels * channels);
        y.par_chunks_mut(channels).zip(inputs).for_each(|(y, x)| {
            y.fill(0.0);
            for x in x.chunks_exact(channels) {
                y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
            }
            y.iter_mut().for_each(|y| *y *= share);
        });
        self.custom(&[x], Tensor::new([images, channels], y), move |pass| {
            let dy = pass.grad();
            let mut dx = pass.take(x);
            let tasks = dx.ready().par_chunks_mut(pixels * channels).zip(dy.par_chunks(channels));
            tasks.for_each(|(dx, dy)| {
                for dx in dx.chunks_exact_mut(channels) {
                    dx.iter_mut().zip(dy).for_each(|(d, g)| *d += share * g);
                }
            });
            pass.put(x, dx);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        check_gradients(&[random(1, [12, 5])], |t, v| t.mean_over_pixels(v[0], 4));
    }
}
