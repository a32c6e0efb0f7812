//! Zeros around every image. They are values like others: a quantizer behind puts them on its grid.

use rayon::prelude::*;

use super::Shape;
use crate::{Tape, Tensor, Var};

/// Calls `f` with the range of each row of an image in the padded one.
fn rows(shape: Shape, by: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (wide, length) = (shape.padded(by), shape.width * shape.channels);
    (0..shape.height).map(move |row| {
        let start = ((row + by) * wide.width + by) * shape.channels;
        start..start + length
    })
}

/// Fills `y` with the images `x` and zeros around them.
pub(in crate::vision) fn pad(x: &[f32], y: &mut [f32], shape: Shape, by: usize) {
    let (wide, length) = (shape.padded(by), shape.width * shape.channels);
    let inputs = x.par_chunks(shape.values());
    y.par_chunks_mut(wide.values()).zip(inputs).for_each(|(y, x)| {
        y.fill(0.0);
        for (at, x) in rows(shape, by).zip(x.chunks_exact(length)) {
            y[at].copy_from_slice(x);
        }
    });
}

impl Tape {
    /// `x`, images of `shape`, with `by` pixels of zeros on each side: `dx` is the inside of `dy`.
    ///
    /// # Panics
    /// When `x` is not made of whole images.
    pub fn pad_images(&mut self, x: Var, shape: Shape, by: usize) -> Var {
        let (wide, length) = (shape.padded(by), shape.width * shape.channels);
        let images = self.value(x).len() / shape.values();
        assert_eq!(self.value(x).len(), images * shape.values(), "not whole images");
        let mut y = self.buffer(images * wide.values());
        pad(self.data(x), &mut y, shape, by);
        let y = Tensor::new([images * wide.pixels(), wide.channels], y);
        self.custom(&[x], y, move |pass| {
            let dy = pass.grad();
            let mut dx = pass.take(x);
            let dx_all = dx.ready();
            let tasks = dx_all.par_chunks_mut(shape.values()).zip(dy.par_chunks(wide.values()));
            tasks.for_each(|(dx, dy)| {
                for (at, dx) in rows(shape, by).zip(dx.chunks_exact_mut(length)) {
                    dx.iter_mut().zip(&dy[at]).for_each(|(d, g)| *d += g);
                }
            });
            pass.put(x, dx);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn the_image_is_in_the_middle() {
        let shape = Shape { height: 1, width: 2, channels: 1 };
        let mut tape = Tape::default();
        let x = tape.constant(Tensor::new([2, 1], vec![5.0, 7.0]));
        let y = tape.pad_images(x, shape, 1);
        let want = [0.0, 0.0, 0.0, 0.0, 0.0, 5.0, 7.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(tape.data(y), want);
    }

    #[test]
    fn gradients() {
        let shape = Shape { height: 3, width: 4, channels: 2 };
        check_gradients(&[random(1, [24, 2])], |t, v| t.pad_images(v[0], shape, 2));
    }
}
