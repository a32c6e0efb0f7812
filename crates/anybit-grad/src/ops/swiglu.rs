//! `y = silu(g) · u` with `silu(g) = g σ(g)`: the activation of the MLP, between gate and up.

use anybit_kernels::activation::exp;
use rayon::prelude::*;

use crate::tape::Pass;
use crate::tiles::CHUNK;
use crate::{Tape, Tensor, Var};

/// `dg = dy · u · σ (1 + g (1 − σ))`, `du = dy · g σ`, both added.
fn backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
    let inputs = gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)).zip(dy.par_chunks(CHUNK));
    let outputs = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
    outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dy))| {
        let inputs = gate.iter().zip(up).zip(dy);
        for ((dg, du), ((g, u), dy)) in dgate.iter_mut().zip(dup).zip(inputs) {
            let sigma = 1.0 / (1.0 + exp(-g));
            *dg += dy * u * sigma * (1.0 + g * (1.0 - sigma));
            *du += dy * g * sigma;
        }
    });
}

/// Runs [`backward`] between the tape's buffers.
fn pass_back(pass: &mut Pass<'_>, gate: Var, up: Var) {
    let (mut dgate, mut dup) = (pass.take(gate), pass.take(up));
    let (g, u, dy) = (pass.value(gate), pass.value(up), pass.grad());
    backward(g, u, dy, dgate.ready(), dup.ready());
    pass.put(gate, dgate);
    pass.put(up, dup);
}

impl Tape {
    /// `silu(gate) · up`, elementwise.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn swiglu(&mut self, gate: Var, up: Var) -> Var {
        let shape = self.value(gate).shape().to_vec();
        assert_eq!(self.value(up).len(), self.value(gate).len(), "gate and up differ");
        let mut y = self.buffer(self.value(gate).len());
        y.copy_from_slice(self.data(gate));
        anybit_kernels::swiglu(&mut y, self.data(up));
        self.custom(&[gate, up], Tensor::new(shape, y), move |pass| pass_back(pass, gate, up))
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        check_gradients(&[random(1, [9, 7]), random(2, [9, 7])], |t, v| t.swiglu(v[0], v[1]));
        check_gradients(&[random(3, [8])], |t, v| t.swiglu(v[0], v[0]));
    }
}
