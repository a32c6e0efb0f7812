//! [`Tensor`]: a shape and shared contiguous f32 values. Cloning is cheap; parameters are cloned
//! onto a tape and updated in place after the tape let go of them.

use std::sync::Arc;

use anybit_core::Matrix;

/// A dense row-major tensor whose values are shared between clones.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Arc<Vec<f32>>,
}

impl Tensor {
    /// Wraps `data`.
    ///
    /// # Panics
    /// When the length is not the product of `shape`.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(data.len(), shape.iter().product::<usize>(), "length does not fit {shape:?}");
        Self { shape, data: Arc::new(data) }
    }

    /// A tensor without dimensions.
    pub fn scalar(value: f32) -> Self {
        Self { shape: Vec::new(), data: Arc::new(vec![value]) }
    }

    /// Lengths of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values, row-major.
    pub fn data(&self) -> &[f32] {
        &self.data
    }

    /// The values, to be changed; copied first when another clone shares them.
    pub fn data_mut(&mut self) -> &mut [f32] {
        let data: &mut Vec<f32> = Arc::make_mut(&mut self.data);
        data
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The same values in another shape.
    ///
    /// # Panics
    /// When the number of values differs.
    pub fn reshaped(&self, shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        assert_eq!(self.len(), shape.iter().product::<usize>(), "cannot be shaped as {shape:?}");
        Self { shape, data: self.data.clone() }
    }

    /// The buffer, if no other clone shares it.
    pub(crate) fn into_data(self) -> Option<Vec<f32>> {
        Arc::into_inner(self.data)
    }
}

impl From<Matrix> for Tensor {
    fn from(matrix: Matrix) -> Self {
        Self::new([matrix.rows, matrix.cols], matrix.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_share_until_one_is_changed() {
        let mut a = Tensor::new([2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        let b = a.clone();
        a.data_mut()[0] = 9.0;
        assert_eq!((a.data()[0], b.data()[0]), (9.0, 1.0));
        assert_eq!(b.reshaped([4]).shape(), [4]);
        assert_eq!(Tensor::scalar(2.0).len(), 1);
    }
}
