//! `y = x P` for a fixed transform of the last channels.

use std::sync::Arc;

use anybit_core::Transform;
use rayon::prelude::*;

use crate::{Tape, Tensor, Var};

/// Values that one task handles.
const TASK: usize = 1 << 14;

impl Tape {
    /// `y = x Pᵀ`: [`Self::transform`] undone, for orthogonal transforms. `dx = dy P`.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn transform_back(&mut self, x: Var, transform: &Arc<Transform>) -> Var {
        self.transform_either(x, transform, true)
    }

    /// `y = x P`, rows of `transform.size()` values whatever the shape of `x`: `dx = dy Pᵀ`.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn transform(&mut self, x: Var, transform: &Arc<Transform>) -> Var {
        self.transform_either(x, transform, false)
    }

    fn transform_either(&mut self, x: Var, transform: &Arc<Transform>, back: bool) -> Var {
        let n = transform.size();
        assert!(self.value(x).len().is_multiple_of(n), "rows are not whole");
        let task = (TASK / n).max(1) * n;
        let shape = self.value(x).shape().to_vec();
        let mut y = self.buffer(self.value(x).len());
        y.copy_from_slice(self.data(x));
        y.par_chunks_mut(task).for_each(|rows| apply(transform, back, rows));
        let transform = transform.clone();
        self.custom(&[x], Tensor::new(shape, y), move |pass| {
            let mut dx = pass.buffer(pass.grad().len());
            dx.copy_from_slice(pass.grad());
            dx.par_chunks_mut(task).for_each(|rows| apply(&transform, !back, rows));
            pass.accumulate(x, &dx, |g| g);
            pass.recycle(dx);
        })
    }
}

fn apply(transform: &Transform, back: bool, rows: &mut [f32]) {
    match back {
        false => transform.apply(rows),
        true => transform.apply_transpose(rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, normals, random};
    use anybit_core::{Hadamard, Matrix};

    #[test]
    fn gradients() {
        let matrix = |n: usize, seed| Matrix { rows: n, cols: n, data: normals(seed, n * n) };
        let kinds = [
            Transform::Hadamard(Hadamard::new(24).unwrap()),
            Transform::Kronecker {
                sizes: (4, 6),
                left: Some(matrix(4, 1)),
                right: Some(matrix(6, 2)),
            },
            Transform::HeadSplit { heads: 3, head_dim: 8, high: 2 },
        ];
        for kind in kinds {
            let kind = Arc::new(kind);
            check_gradients(&[random(3, [5, 48])], |t, v| t.transform(v[0], &kind));
            check_gradients(&[random(3, [5, 48])], |t, v| t.transform_back(v[0], &kind));
        }
    }
}
