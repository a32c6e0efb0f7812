//! Rows of a table, picked by token: the first operation of a decoder.

use crate::tape::Pass;
use crate::{Tape, Tensor, Var};

/// `y_t = W[token_t]`.
fn forward(weight: &[f32], tokens: &[u32], y: &mut [f32]) {
    let width = y.len() / tokens.len().max(1);
    for (token, y) in tokens.iter().zip(y.chunks_exact_mut(width.max(1))) {
        let start = *token as usize * width;
        y.copy_from_slice(&weight[start..start + width]);
    }
}

/// `dW[token_t] += dy_t`, in the order of `t`: sequential, since tokens repeat and each addition is
/// one short row.
fn backward(pass: &mut Pass<'_>, weight: Var, tokens: &[u32], width: usize) {
    let dy = pass.grad();
    let mut slot = pass.take(weight);
    let dw = slot.ready();
    for (token, dy) in tokens.iter().zip(dy.chunks_exact(width)) {
        let start = *token as usize * width;
        dw[start..start + width].iter_mut().zip(dy).for_each(|(d, g)| *d += g);
    }
    pass.put(weight, slot);
}

impl Tape {
    /// The rows `tokens` of `weight: [vocab, hidden]`, as `[tokens, hidden]`.
    ///
    /// # Panics
    /// When a token is outside the vocabulary.
    pub fn embedding(&mut self, weight: Var, tokens: &[u32]) -> Var {
        let (_, width) = self.dims(weight);
        let mut y = self.buffer(tokens.len() * width);
        forward(self.data(weight), tokens, &mut y);
        let shape = [tokens.len(), width];
        let tokens = tokens.to_vec();
        self.custom(&[weight], Tensor::new(shape, y), move |pass| {
            backward(pass, weight, &tokens, width);
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{check_gradients, random};

    #[test]
    fn gradients() {
        check_gradients(&[random(1, [6, 4])], |t, v| t.embedding(v[0], &[2, 0, 2, 5, 2]));
    }
}
