//! AdamW, the one-cycle learning rate, and clipping by the global norm; all as PyTorch has them
//! (`AdamW`, `OneCycleLR`, `clip_grad_norm_`). Elementwise in place, sums in fixed order. Called
//! by the training loops of methods.

use rayon::prelude::*;

use crate::tiles::{CHUNK, total};

/// Constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWOptions {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub eps: f64,
    /// Pull towards zero, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// One parameter with its gradient.
pub struct Update<'a> {
    /// The parameter.
    pub value: &'a mut [f32],
    /// Its gradient.
    pub grad: &'a [f32],
    /// Its learning rate.
    pub lr: f64,
    /// Whether weight decay applies to it.
    pub decay: bool,
}

/// `m` and `v` of a parameter.
pub type Moments = (Vec<f32>, Vec<f32>);

/// AdamW (Loshchilov and Hutter, 2019).
///
/// ```text
/// m = β₁ m + (1 − β₁) g        v = β₂ v + (1 − β₂) g²
/// w = w − lr λ w − lr · m / (1 − β₁ᵗ) / (√(v / (1 − β₂ᵗ)) + ε)
/// ```
#[derive(Debug, Clone, Default)]
pub struct AdamW {
    /// Its constants.
    pub options: AdamWOptions,
    steps: i32,
    /// `m` and `v` per parameter, made at the first step.
    moments: Vec<Moments>,
}

/// The constants of one step for one parameter, in f32.
#[derive(Clone, Copy)]
struct Step {
    beta1: f32,
    beta2: f32,
    keep: f32,
    size: f32,
    eps: f32,
    root: f32,
    grad_factor: f32,
}

impl AdamW {
    /// An optimizer that has seen nothing yet.
    pub fn new(options: AdamWOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Steps taken and `(m, v)` per parameter, to be stored; empty before the first step.
    pub fn state(&self) -> (i32, &[Moments]) {
        (self.steps, &self.moments)
    }

    /// An optimizer that continues from what [`Self::state`] gave.
    pub fn resume(options: AdamWOptions, steps: i32, moments: Vec<Moments>) -> Self {
        Self { options, steps, moments }
    }

    /// Moves every parameter one step. Gradients are multiplied by `grad_factor` first (see
    /// [`clip_factor`]). The parameters must be the same, in the same order, at every step.
    ///
    /// # Panics
    /// When the number of parameters or a length changes.
    pub fn step(&mut self, updates: &mut [Update<'_>], grad_factor: f32) {
        if self.steps == 0 {
            let zeros = |u: &Update<'_>| (vec![0.0; u.value.len()], vec![0.0; u.value.len()]);
            self.moments = updates.iter().map(zeros).collect();
        }
        assert_eq!(updates.len(), self.moments.len(), "the number of parameters changed");
        self.steps += 1;
        let AdamWOptions { beta1, beta2, eps, weight_decay } = self.options;
        let (bias1, bias2) = (1.0 - beta1.powi(self.steps), 1.0 - beta2.powi(self.steps));
        for (update, (m, v)) in updates.iter_mut().zip(&mut self.moments) {
            let decay = if update.decay { weight_decay } else { 0.0 };
            let step = Step {
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                keep: (1.0 - update.lr * decay) as f32,
                size: (update.lr / bias1) as f32,
                eps: eps as f32,
                root: (1.0 / bias2.sqrt()) as f32,
                grad_factor,
            };
            adam_step(update, m, v, step);
        }
    }
}

fn adam_step(update: &mut Update<'_>, m: &mut [f32], v: &mut [f32], s: Step) {
    assert!(
        update.value.len() == m.len() && update.grad.len() == m.len(),
        "a parameter and its gradient or moments differ in length"
    );
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    let tasks = update.value.par_chunks_mut(CHUNK).zip(update.grad.par_chunks(CHUNK)).zip(moments);
    tasks.for_each(|((value, grad), (m, v))| {
        let moments = m.iter_mut().zip(v);
        for ((w, g), (m, v)) in value.iter_mut().zip(grad).zip(moments) {
            let g = g * s.grad_factor;
            *m += (1.0 - s.beta1) * (g - *m);
            *v = s.beta2 * *v + (1.0 - s.beta2) * g * g;
            *w = s.keep * *w - s.size * *m / (v.sqrt() * s.root + s.eps);
        }
    });
}

/// The one-cycle schedule (Smith and Topin, 2018): the learning rate rises from `max / div` to
/// `max` in the first `warmup` of the steps and falls to `max / div / final_div` in the rest,
/// along half cosines.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycle {
    /// Largest learning rate.
    pub max: f64,
    /// Steps in all.
    pub steps: usize,
    /// Fraction of the steps in which it rises.
    pub warmup: f64,
    /// The first learning rate is `max / div`.
    pub div: f64,
    /// The last is `max / div / final_div`.
    pub final_div: f64,
}

impl OneCycle {
    /// PyTorch's defaults: 30% warm-up, from `max / 25`, to `max / 250,000`.
    pub fn new(max: f64, steps: usize) -> Self {
        Self { max, steps, warmup: 0.3, div: 25.0, final_div: 1e4 }
    }

    /// The learning rate of step `step`, counted from 0; past the end it stays at the last.
    pub fn lr(&self, step: usize) -> f64 {
        let first = self.max / self.div;
        let last = first / self.final_div;
        let peak = self.warmup * self.steps as f64 - 1.0;
        let end = self.steps as f64 - 1.0;
        let step = (step as f64).min(end);
        // A warm-up of less than a step starts at the peak.
        if step <= peak && peak > 0.0 {
            half_cosine(first, self.max, step / peak)
        } else {
            let peak = peak.max(0.0);
            half_cosine(self.max, last, (step - peak) / (end - peak).max(f64::MIN_POSITIVE))
        }
    }
}

/// From `a` at 0 to `b` at 1.
fn half_cosine(a: f64, b: f64, at: f64) -> f64 {
    b + (a - b) / 2.0 * (1.0 + (std::f64::consts::PI * at).cos())
}

/// `√(Σ g²)` over all gradients.
pub fn global_norm<'a>(grads: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    let squares = |g: &[f32]| total(g.len(), |r| g[r].iter().map(|v| (*v as f64).powi(2)).sum());
    grads.into_iter().map(squares).sum::<f64>().sqrt()
}

/// What gradients of norm `norm` must be multiplied by to have at most the norm `max`.
pub fn clip_factor(norm: f64, max: f64) -> f32 {
    (max / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normals;

    #[test]
    fn finds_the_minimum_of_a_bowl_on_any_number_of_threads() {
        let target = normals(1, 40_000);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut w = vec![0f32; target.len()];
                let mut adam = AdamW::new(AdamWOptions { weight_decay: 0.0, ..Default::default() });
                let schedule = OneCycle::new(0.5, 150);
                for step in 0..150 {
                    let grad: Vec<f32> = w.iter().zip(&target).map(|(w, t)| w - t).collect();
                    let factor = clip_factor(global_norm([&grad[..]]), 100.0);
                    let (lr, decay) = (schedule.lr(step), true);
                    let update = Update { value: &mut w, grad: &grad, lr, decay };
                    adam.step(&mut [update], factor);
                }
                w
            })
        };
        let w = run(1);
        assert!(w.iter().zip(&target).all(|(w, t)| (w - t).abs() < 0.05));
        assert!(w == run(3));
    }

    #[test]
    fn clipping_brings_the_norm_to_its_bound() {
        let grads = [[3.0f32, 0.0], [0.0, 4.0]];
        let norm = global_norm(grads.iter().map(|g| &g[..]));
        assert_eq!(norm, 5.0);
        approx::assert_relative_eq!(clip_factor(norm, 1.0), 0.2, max_relative = 1e-6);
        assert_eq!(clip_factor(norm, 10.0), 1.0);
    }

    #[test]
    fn short_schedules_are_finite() {
        for steps in 1..6 {
            let schedule = OneCycle::new(1.0, steps);
            for step in 0..steps + 2 {
                let lr = schedule.lr(step);
                assert!(lr.is_finite() && (0.0..=1.0).contains(&lr), "{steps} {step}: {lr}");
            }
        }
    }
}
