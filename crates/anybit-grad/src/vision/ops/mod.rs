//! Operations of convolutional networks. Images lie one after another as matrices of pixels:
//! `[images · height · width, channels]`, so that a 1×1 convolution is a linear, batch
//! normalization works on columns, and every estimator takes an activation as it is.
//!
//! | file | operation | reads in its backward |
//! |---|---|---|
//! | `pad` | zeros around every image | – |
//! | `conv` | `y = patches(x) Wᵀ` | `x`, `W` |
//! | `depthwise` | a window per channel | `x`, `W` |
//! | `norm` | batch normalization | `x`, `γ`, moments |
//! | `relu` | `max(x, 0)` | `x` |
//! | `pool` | mean over the pixels of an image | – |
//! | `select` | some of the columns | – |
//!
//! Work is cut by images, as many as fit a cache, and partial sums are added in their order: the
//! same bits on any number of threads.

mod conv;
mod depthwise;
mod norm;
mod pad;
mod pool;
mod relu;
mod select;

pub(super) use conv::Conv;
pub use norm::{Moments, NORM_EPSILON};
pub(super) use pad::pad;

/// Values of the patches that one task handles: what fits the second-level cache.
const TASK: usize = 1 << 16;

/// Height, width and channels of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of pixels.
    pub height: usize,
    /// Pixels of a row.
    pub width: usize,
    /// Values of a pixel.
    pub channels: usize,
}

impl Shape {
    /// Pixels of an image.
    pub fn pixels(&self) -> usize {
        self.height * self.width
    }

    /// Values of an image.
    pub fn values(&self) -> usize {
        self.pixels() * self.channels
    }

    /// With `by` pixels more on each side.
    pub fn padded(&self, by: usize) -> Self {
        Self { height: self.height + 2 * by, width: self.width + 2 * by, ..*self }
    }
}

/// What a convolution looks at: `kernel × kernel` pixels, `stride` pixels apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Height and width.
    pub kernel: usize,
    /// Distance between neighbours.
    pub stride: usize,
}

impl Window {
    /// Pixels that it looks at.
    pub fn taps(&self) -> usize {
        self.kernel * self.kernel
    }

    /// What comes of `input`, padded already, with so many channels.
    ///
    /// # Panics
    /// When the input is smaller than the window.
    pub fn output(&self, input: Shape, channels: usize) -> Shape {
        let along = |length: usize| {
            assert!(length >= self.kernel, "an image smaller than the window");
            (length - self.kernel) / self.stride + 1
        };
        Shape { height: along(input.height), width: along(input.width), channels }
    }
}

/// Images of a task, whose patches have `values` values each.
fn task_images(values: usize) -> usize {
    (TASK / values.max(1)).max(1)
}
