//! The tape: values in the order of their computation, and for each the function that passes its
//! gradient on to what it was computed from.
//!
//! For `y = f(a, b, …)` the chain rule reads `da += (∂y/∂a)ᵀ dy`. Operations are recorded in
//! order, so one loop from the last value to the first sees every `dy` complete before it is
//! passed on. Gradients are accumulated in place; buffers go back to a pool and serve the next
//! step. Operations live in [`crate::ops`]; [`Tape::custom`] is how all of them are recorded.

use std::ops::Range;

use crate::Tensor;
use crate::pool::Pool;
use crate::tiles::{map, map2};

/// A value on a tape. Valid until that tape's [`Tape::reset`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Var(usize);

type Backward = Box<dyn Fn(&mut Pass<'_>) + Send>;

struct Node {
    value: Tensor,
    /// `None` for leaves and for what no wanted gradient depends on.
    backward: Option<Backward>,
    /// Whether a gradient with respect to it is computed.
    wanted: bool,
    /// Whether that gradient is kept although this is no leaf.
    kept: bool,
}

/// A recorded computation and its gradients.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    grads: Vec<Option<Vec<f32>>>,
    pool: Pool,
}

impl Tape {
    /// Adds an input, with or without a gradient.
    pub fn leaf(&mut self, value: Tensor, wanted: bool) -> Var {
        self.push(Node { value, backward: None, wanted, kept: false })
    }

    /// Adds an input without a gradient.
    pub fn constant(&mut self, value: Tensor) -> Var {
        self.leaf(value, false)
    }

    /// Adds `value`, computed from `inputs`. `backward` must pass [`Pass::grad`] on to every input
    /// that wants a gradient; it is dropped at once when none does.
    ///
    /// Every operation is recorded through this, and quantizers with gradients of their own are
    /// too: compute the value in a buffer of [`Self::buffer`], wrap it, record it.
    ///
    /// ```
    /// use anybit_grad::{Tape, Tensor};
    ///
    /// let mut tape = Tape::default();
    /// let x = tape.leaf(Tensor::new([3], vec![-1.0, 2.0, 3.0]), true);
    /// // The square root of the absolute value, with the gradient of the identity for x > 0 alone.
    /// let mut y = tape.buffer(3);
    /// y.iter_mut().zip(tape.data(x)).for_each(|(y, x)| *y = x.abs().sqrt());
    /// let y = tape.custom(&[x], Tensor::new([3], y), move |pass| {
    ///     let (dy, values) = (pass.grad(), pass.value(x));
    ///     pass.accumulate2(x, dy, values, |dy, x| if x > 0.0 { dy } else { 0.0 });
    /// });
    /// let loss = tape.sum(y);
    /// tape.backward(loss);
    /// assert_eq!(tape.grad(x).unwrap(), [0.0, 1.0, 1.0]);
    /// ```
    pub fn custom(
        &mut self,
        inputs: &[Var],
        value: Tensor,
        backward: impl Fn(&mut Pass<'_>) + Send + 'static,
    ) -> Var {
        let wanted = inputs.iter().any(|v| self.wants(*v));
        let backward = wanted.then(|| Box::new(backward) as Backward);
        self.push(Node { value, backward, wanted, kept: false })
    }

    fn push(&mut self, node: Node) -> Var {
        self.nodes.push(node);
        self.grads.push(None);
        Var(self.nodes.len() - 1)
    }

    /// A value.
    pub fn value(&self, v: Var) -> &Tensor {
        &self.nodes[v.0].value
    }

    /// The numbers of a value.
    pub fn data(&self, v: Var) -> &[f32] {
        self.value(v).data()
    }

    /// Rows and columns of a value.
    ///
    /// # Panics
    /// When it is no matrix.
    pub fn dims(&self, v: Var) -> (usize, usize) {
        match self.value(v).shape() {
            [rows, cols] => (*rows, *cols),
            other => panic!("a matrix is needed, the shape is {other:?}"),
        }
    }

    /// Whether a gradient with respect to `v` is computed.
    pub fn wants(&self, v: Var) -> bool {
        self.nodes[v.0].wanted
    }

    /// Keeps the gradient of `v`, which is no leaf, readable after [`Self::backward`].
    pub fn keep_grad(&mut self, v: Var) {
        self.nodes[v.0].kept = true;
    }

    /// The gradient of a leaf or of a kept value; `None` when nothing depended on it.
    pub fn grad(&self, v: Var) -> Option<&[f32]> {
        self.grads[v.0].as_deref()
    }

    /// Takes a gradient out, so that it outlives [`Self::reset`]; hand the buffer back with
    /// [`Self::recycle`].
    pub fn take_grad(&mut self, v: Var) -> Option<Vec<f32>> {
        self.grads[v.0].take()
    }

    /// A buffer of `len` values of no meaning, from the pool.
    pub fn buffer(&mut self, len: usize) -> Vec<f32> {
        self.pool.take(len)
    }

    /// Takes a buffer back into the pool.
    pub fn recycle(&mut self, buffer: Vec<f32>) {
        self.pool.give(buffer);
    }

    /// Computes the gradient of the scalar `loss` with respect to everything that wants one. Once
    /// per recording.
    ///
    /// # Panics
    /// When `loss` is no scalar.
    pub fn backward(&mut self, loss: Var) {
        self.backward_from(loss, &[1.0]);
    }

    /// Computes the gradient of `Σ dy·y`: continues a gradient `dy` that comes from elsewhere.
    /// Once per recording.
    ///
    /// # Panics
    /// When `dy` and `y` differ in length.
    pub fn backward_from(&mut self, y: Var, dy: &[f32]) {
        self.backward_from_all(&[(y, dy)]);
    }

    /// [`Self::backward_from`] of several values at once: the gradient of the sum of their
    /// `Σ dy·y`. Once per recording.
    ///
    /// # Panics
    /// When a `dy` and its `y` differ in length, or a value is named twice.
    pub fn backward_from_all(&mut self, outputs: &[(Var, &[f32])]) {
        if let Some(last) = self.seed(outputs) {
            self.pass_back(0..last + 1);
        }
    }

    /// Norm of the gradient of the scalar `loss` with respect to some leaves together. The pass goes
    /// back no further than to `floor`: give one below which no leaf of these is used, and what
    /// comes before it costs nothing. Nothing stays behind: other norms and one
    /// [`Self::backward`] may follow.
    ///
    /// # Panics
    /// When `loss` is no scalar, or gradients of a backward pass are still there.
    pub fn gradient_norm(&mut self, loss: Var, leaves: &[Var], floor: Option<Var>) -> f64 {
        assert!(self.grads.iter().all(Option::is_none), "there are gradients already");
        let one: &[f32] = &[1.0];
        if let Some(last) = self.seed(&[(loss, one)]) {
            self.pass_back(floor.map_or(0, |floor| floor.0 + 1)..last + 1);
        }
        let norm = crate::global_norm(leaves.iter().filter_map(|leaf| self.grad(*leaf)));
        for grad in self.grads.iter_mut().filter_map(Option::take) {
            self.pool.give(grad);
        }
        norm
    }

    /// Gives outputs their gradients; the index of the last that wants one.
    fn seed(&mut self, outputs: &[(Var, &[f32])]) -> Option<usize> {
        let mut last = None;
        for &(y, dy) in outputs {
            assert_eq!(self.value(y).len(), dy.len(), "the gradient does not fit the value");
            if !self.wants(y) {
                continue;
            }
            assert!(self.grads[y.0].is_none(), "a value is named twice");
            let mut seed = self.pool.take(dy.len());
            seed.copy_from_slice(dy);
            self.grads[y.0] = Some(seed);
            last = last.max(Some(y.0));
        }
        last
    }

    /// Passes on the gradients of some values, from the last to the first.
    fn pass_back(&mut self, values: Range<usize>) {
        for index in values.rev() {
            let node = &self.nodes[index];
            let Some(backward) = &node.backward else { continue };
            let Some(grad) = self.grads[index].take() else { continue };
            backward(&mut Pass {
                nodes: &self.nodes,
                grads: &mut self.grads,
                pool: &mut self.pool,
                index,
                grad: &grad,
            });
            if node.kept {
                self.grads[index] = Some(grad);
            } else {
                self.pool.give(grad);
            }
        }
    }

    /// Forgets the recording; its buffers serve the next one. Values shared with tensors outside
    /// stay theirs.
    pub fn reset(&mut self) {
        self.pool.trim();
        for node in self.nodes.drain(..) {
            if let Some(data) = node.value.into_data() {
                self.pool.give(data);
            }
        }
        for grad in self.grads.drain(..).flatten() {
            self.pool.give(grad);
        }
        self.pool.mark();
    }
}

/// What a backward function works with: the gradient of its output, the values, and the gradients
/// of its inputs.
pub struct Pass<'a> {
    nodes: &'a [Node],
    grads: &'a mut [Option<Vec<f32>>],
    pool: &'a mut Pool,
    index: usize,
    grad: &'a [f32],
}

/// A gradient being accumulated.
pub struct Slot {
    /// Its values; without meaning until written when `accumulate` is false.
    pub data: Vec<f32>,
    /// Whether to add to the values instead of replacing them.
    pub accumulate: bool,
}

impl Slot {
    /// Zeroes values without meaning, so that one can add in any case.
    pub fn ready(&mut self) -> &mut [f32] {
        if !self.accumulate {
            self.data.fill(0.0);
            self.accumulate = true;
        }
        &mut self.data
    }
}

impl<'a> Pass<'a> {
    /// The gradient of the output.
    pub fn grad(&self) -> &'a [f32] {
        self.grad
    }

    /// The output.
    pub fn output(&self) -> &'a [f32] {
        self.nodes[self.index].value.data()
    }

    /// A value that was recorded before.
    pub fn value(&self, v: Var) -> &'a [f32] {
        self.nodes[v.0].value.data()
    }

    /// Whether a gradient with respect to `v` is computed.
    pub fn wants(&self, v: Var) -> bool {
        self.nodes[v.0].wanted
    }

    /// Takes the gradient of `v` to add to it; [`Self::put`] it back.
    pub fn take(&mut self, v: Var) -> Slot {
        match self.grads[v.0].take() {
            Some(data) => Slot { data, accumulate: true },
            None => Slot { data: self.pool.take(self.value(v).len()), accumulate: false },
        }
    }

    /// Puts back what [`Self::take`] gave, fully written. A gradient that nobody wants is dropped;
    /// one that was taken twice at a time (an input used twice) is added up.
    pub fn put(&mut self, v: Var, slot: Slot) {
        if !self.wants(v) {
            return self.pool.give(slot.data);
        }
        let mut data = slot.data;
        if let Some(other) = self.grads[v.0].take() {
            map(&mut data, true, &other, |g| g);
            self.pool.give(other);
        }
        self.grads[v.0] = Some(data);
    }

    /// `dv += f(a)`, elementwise, if `v` wants a gradient.
    pub fn accumulate(&mut self, v: Var, a: &[f32], f: impl Fn(f32) -> f32 + Send + Sync) {
        if self.wants(v) {
            let mut slot = self.take(v);
            map(&mut slot.data, slot.accumulate, a, f);
            self.put(v, slot);
        }
    }

    /// `dv += f(a, b)`, elementwise, if `v` wants a gradient.
    pub fn accumulate2(
        &mut self,
        v: Var,
        a: &[f32],
        b: &[f32],
        f: impl Fn(f32, f32) -> f32 + Send + Sync,
    ) {
        if self.wants(v) {
            let mut slot = self.take(v);
            map2(&mut slot.data, slot.accumulate, a, b, f);
            self.put(v, slot);
        }
    }

    /// A buffer of `len` values of no meaning, from the pool.
    pub fn buffer(&mut self, len: usize) -> Vec<f32> {
        self.pool.take(len)
    }

    /// Takes a buffer back into the pool.
    pub fn recycle(&mut self, buffer: Vec<f32>) {
        self.pool.give(buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn a_value_used_often_collects_every_gradient() {
        let mut tape = Tape::default();
        let x = tape.leaf(Tensor::new([2], vec![3.0, -1.0]), true);
        let square = tape.mul(x, x);
        tape.keep_grad(square);
        let cube = tape.mul(square, x);
        let all = tape.add(cube, square);
        let loss = tape.sum(all);
        tape.backward(loss);
        // d(x³ + x²) = 3x² + 2x
        assert_eq!(tape.grad(x).unwrap(), [33.0, 1.0]);
        assert_eq!(tape.grad(square).unwrap(), [4.0, 0.0]);
        assert!(tape.grad(cube).is_none());
    }

    #[test]
    fn only_what_is_wanted_is_computed() {
        let mut tape = Tape::default();
        let x = tape.constant(random(1, [4, 3]));
        let w = tape.leaf(random(2, [2, 3]), true);
        let fixed = tape.scale(x, 2.0);
        assert!(!tape.wants(fixed));
        let y = tape.linear(fixed, w, None);
        tape.backward_from(y, &[1.0; 8]);
        assert!(tape.grad(x).is_none() && tape.grad(fixed).is_none());
        assert_eq!(tape.grad(w).unwrap().len(), 6);
    }

    #[test]
    fn norms_of_parts_leave_the_rest_alone() {
        let record = |tape: &mut Tape| {
            let x = tape.constant(random(1, [4, 3]));
            let (first, second) =
                (tape.leaf(random(2, [5, 3]), true), tape.leaf(random(3, [2, 5]), true));
            let below = tape.linear(x, first, None);
            let y = tape.linear(below, second, None);
            let squares = tape.mul(y, y);
            (first, second, below, tape.sum(squares), tape.mean(y))
        };
        let whole = |which: usize| {
            let mut tape = Tape::default();
            let (first, second, _, squares, mean) = record(&mut tape);
            tape.backward([squares, mean][which]);
            [first, second].map(|v| tape.grad(v).unwrap().to_vec())
        };
        let mut tape = Tape::default();
        let (first, second, below, squares, mean) = record(&mut tape);
        for (which, loss) in [squares, mean].into_iter().enumerate() {
            let [want_first, want_second] = whole(which);
            let norm = tape.gradient_norm(loss, &[second], Some(below));
            assert_eq!(norm, crate::global_norm([&want_second[..]]));
            let both = tape.gradient_norm(loss, &[first, second], None);
            assert_eq!(both, crate::global_norm([&want_first[..], &want_second[..]]));
            // What lies below the floor is not reached.
            assert_eq!(tape.gradient_norm(loss, &[first], Some(below)), 0.0);
        }
        tape.backward(squares);
        assert_eq!([first, second].map(|v| tape.grad(v).unwrap().to_vec()), whole(0));
    }

    #[test]
    fn a_long_chain_needs_no_stack() {
        let mut tape = Tape::default();
        let x = tape.leaf(Tensor::scalar(1.0), true);
        let mut y = x;
        for _ in 0..100_000 {
            y = tape.scale(y, 1.0);
        }
        tape.backward(y);
        assert_eq!(tape.grad(x).unwrap(), [1.0]);
    }

    #[test]
    fn steps_reuse_buffers_and_leave_parameters_alone() {
        let mut tape = Tape::default();
        let mut w = random(3, [20, 30]);
        let mut first = Vec::new();
        for step in 0..3 {
            let x = tape.leaf(random(4, [10, 30]), false);
            let v = tape.leaf(w.clone(), true);
            let y = tape.linear(x, v, None);
            let loss = tape.mean(y);
            tape.backward(loss);
            let grad = tape.take_grad(v).unwrap();
            if step == 0 {
                first.clone_from(&grad);
            }
            assert_eq!(grad, first);
            tape.reset();
            let at = w.data().as_ptr();
            w.data_mut()[0] += 1.0;
            assert_eq!(w.data().as_ptr(), at, "the tape still held the parameter");
            tape.recycle(grad);
        }
    }
}
