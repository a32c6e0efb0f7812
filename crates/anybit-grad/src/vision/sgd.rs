//! Stochastic gradient descent with momentum, as PyTorch has it:
//! `v = m v + g + λ w`, `w = w − lr v`. Elementwise, so that threads do not matter.

use crate::Update;

/// The optimizer and its velocities, made at the first step.
#[derive(Debug, Clone, Default)]
pub(super) struct Sgd {
    momentum: f32,
    weight_decay: f32,
    velocities: Vec<Vec<f32>>,
}

impl Sgd {
    /// One that has seen nothing yet.
    pub fn new(momentum: f64, weight_decay: f64) -> Self {
        let (momentum, weight_decay) = (momentum as f32, weight_decay as f32);
        Self { momentum, weight_decay, velocities: Vec::new() }
    }

    /// Moves every parameter one step; gradients are multiplied by `grad_factor` first.
    pub fn step(&mut self, updates: &mut [Update<'_>], grad_factor: f32) {
        if self.velocities.is_empty() {
            self.velocities = updates.iter().map(|u| vec![0.0; u.value.len()]).collect();
        }
        for (update, velocity) in updates.iter_mut().zip(&mut self.velocities) {
            let decay = if update.decay { self.weight_decay } else { 0.0 };
            let lr = update.lr as f32;
            let values = update.value.iter_mut().zip(update.grad);
            for ((w, g), v) in values.zip(velocity) {
                *v = self.momentum * *v + g * grad_factor + decay * *w;
                *w -= lr * *v;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_steps_by_hand() {
        let (mut value, mut sgd) = ([1.0f32], Sgd::new(0.5, 0.1));
        let mut step = |lr: f64| {
            let update = Update { value: &mut value, grad: &[2.0], lr, decay: true };
            sgd.step(&mut [update], 0.5);
            value[0]
        };
        // v = 1 + 0.1, w = 1 − 0.11; v = 0.55 + 1 + 0.089, w = 0.89 − 0.1639.
        approx::assert_abs_diff_eq!(step(0.1), 0.89, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(step(0.1), 0.7261, epsilon = 1e-6);
    }
}
