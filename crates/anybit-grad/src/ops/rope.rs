//! Rotary position embedding: pair `(x_i, x_{i + d/2})` of every head turns by `position · f_i`.
//! A rotation's gradient is the rotation back.

use std::sync::Arc;

use anybit_kernels::RopeTable;
use rayon::prelude::*;

use crate::{Tape, Tensor, Var};

/// Tokens that one task turns.
const ROWS: usize = 16;

/// Tables of both directions; made once, shared by all layers.
#[derive(Debug)]
pub struct Rope {
    ahead: RopeTable,
    back: RopeTable,
    head_dim: usize,
    positions: usize,
}

impl Rope {
    /// Tables for `frequencies` (radians per position, one per pair) and `positions` positions.
    pub fn new(frequencies: Vec<f64>, positions: usize) -> Self {
        let head_dim = 2 * frequencies.len();
        let back = RopeTable::new(frequencies.iter().map(|f| -f).collect(), positions);
        Self { ahead: RopeTable::new(frequencies, positions), back, head_dim, positions }
    }

    /// Positions that the tables hold.
    pub fn positions(&self) -> usize {
        self.positions
    }
}

/// `y (+)= R(position) x` for every token; the backward is the same with the table of angles
/// negated.
fn turn(
    x: &[f32],
    table: &RopeTable,
    width: usize,
    seqlen: usize,
    y: &mut [f32],
    accumulate: bool,
) {
    let tasks = y.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width));
    tasks.enumerate().for_each(|(task, (y, x))| {
        let mut turned = vec![0f32; width];
        for (i, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
            turned.copy_from_slice(x);
            table.rotate(&mut turned, (task * ROWS + i) % seqlen);
            if accumulate {
                y.iter_mut().zip(&turned).for_each(|(y, t)| *y += t);
            } else {
                y.copy_from_slice(&turned);
            }
        }
    });
}

impl Tape {
    /// Turns every head of every row of `x: [rows, heads · head_dim]`; row `r` stands at position
    /// `r mod seqlen`.
    ///
    /// # Panics
    /// When rows are no whole heads or `seqlen` is beyond the tables.
    pub fn rope(&mut self, x: Var, rope: &Arc<Rope>, seqlen: usize) -> Var {
        let (rows, width) = self.dims(x);
        assert!(width.is_multiple_of(rope.head_dim), "rows are not made of whole heads");
        assert!(seqlen <= rope.positions, "{seqlen} positions, the table has {}", rope.positions);
        let mut y = self.buffer(rows * width);
        turn(self.data(x), &rope.ahead, width, seqlen, &mut y, false);
        let rope = rope.clone();
        self.custom(&[x], Tensor::new([rows, width], y), move |pass| {
            let dy = pass.grad();
            let mut dx = pass.take(x);
            turn(dy, &rope.back, width, seqlen, &mut dx.data, dx.accumulate);
            pass.put(x, dx);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        let rope = Arc::new(Rope::new(vec![1.0, 0.3, 0.02], 20));
        check_gradients(&[random(1, [36, 12])], |t, v| t.rope(v[0], &rope, 18));
        check_gradients(&[random(2, [5, 6])], |t, v| {
            let y = t.rope(v[0], &rope, 5);
            t.mul(y, v[0])
        });
    }

    #[test]
    fn sequences_start_at_position_zero() {
        let rope = Arc::new(Rope::new(vec![1.0, 0.3], 4));
        let mut tape = Tape::default();
        let one = random(3, [3, 4]);
        let two = Tensor::new([6, 4], [one.data(), one.data()].concat());
        let (one, two) = (tape.constant(one), tape.constant(two));
        let (one, two) = (tape.rope(one, &rope, 3), tape.rope(two, &rope, 3));
        assert_eq!(tape.data(two), [tape.data(one), tape.data(one)].concat());
    }
}
