//! Choosing the next token: penalty, then temperature, then top-k, top-p and min-p, then a draw.
//! The order is that of Hugging Face's logits processors.

use std::cmp::Ordering;

use anybit_core::rng::SplitMix64;
use serde::{Deserialize, Serialize};

use crate::{Result, RuntimeError};

/// How tokens are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplerOptions {
    /// Logits are divided by this; 0 takes the most probable token (greedy).
    pub temperature: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the most probable tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with at least this share of the largest probability; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens seen before are divided by this when positive, multiplied when negative;
    /// 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    fn validate(&self) -> Result<()> {
        let checks = [
            ("temperature", self.temperature, self.temperature >= 0.0, "must be 0 or above"),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "must be in (0, 1]"),
            ("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "must be in [0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0,
                "must be above 0",
            ),
        ];
        for (option, value, valid, range) in checks {
            if !(valid && value.is_finite()) {
                return Err(RuntimeError::Option { option, value, range });
            }
        }
        Ok(())
    }
}

/// Chooses tokens; owns its candidate buffer and its random stream.
pub struct Sampler {
    options: SamplerOptions,
    rng: SplitMix64,
    candidates: Vec<(f32, u32)>,
    seen: Vec<bool>,
}

impl Sampler {
    /// A sampler for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// An option out of its range.
    pub fn new(options: SamplerOptions, vocab: usize) -> Result<Self> {
        options.validate()?;
        let rng = SplitMix64::new(options.seed);
        Ok(Self { options, rng, candidates: Vec::with_capacity(vocab), seen: vec![false; vocab] })
    }

    /// Tells the repetition penalty of a token in the context.
    pub fn observe(&mut self, token: u32) {
        if let Some(seen) = self.seen.get_mut(token as usize) {
            *seen = true;
        }
    }

    /// Chooses the next token; changes `logits` where a penalty applies.
    pub fn sample(&mut self, logits: &mut [f32]) -> u32 {
        let o = self.options;
        if o.repetition_penalty != 1.0 {
            for (logit, _) in logits.iter_mut().zip(&self.seen).filter(|(_, seen)| **seen) {
                *logit = match *logit > 0.0 {
                    true => *logit / o.repetition_penalty,
                    false => *logit * o.repetition_penalty,
                };
            }
        }
        if o.temperature == 0.0 {
            return argmax(logits);
        }
        self.candidates.clear();
        // Relative to the largest, which no temperature takes beyond what f32 holds.
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let scaled = logits.iter().enumerate().map(|(i, l)| ((l - max) / o.temperature, i as u32));
        self.candidates.extend(scaled);
        self.keep_top_k();
        if o.top_p < 1.0 || o.min_p > 0.0 {
            self.candidates.sort_unstable_by(by_logit);
        }
        self.exponentiate();
        self.keep_top_p();
        self.draw()
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_logit);
            self.candidates.truncate(k);
            self.candidates.sort_unstable_by(by_logit);
        }
    }

    fn exponentiate(&mut self) {
        let max = self.candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.0));
        self.candidates.iter_mut().for_each(|c| c.0 = (c.0 - max).exp());
        let sum: f32 = self.candidates.iter().map(|c| c.0).sum();
        self.candidates.iter_mut().for_each(|c| c.0 /= sum);
    }

    /// Candidates are sorted here whenever one of the two cuts is active.
    fn keep_top_p(&mut self) {
        let o = self.options;
        if o.top_p < 1.0 {
            let mut total = 0.0;
            let below = |c: &(f32, u32)| {
                let keep = total < o.top_p;
                total += c.0;
                keep
            };
            let keep = self.candidates.iter().map(below).take_while(|k| *k).count();
            self.candidates.truncate(keep.max(1));
        }
        if o.min_p > 0.0 {
            let floor = self.candidates[0].0 * o.min_p;
            let keep = self.candidates.iter().take_while(|c| c.0 >= floor).count();
            self.candidates.truncate(keep.max(1));
        }
    }

    fn draw(&mut self) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.0 as f64).sum();
        let mut left = self.rng.uniform() * total;
        for &(p, token) in &self.candidates {
            left -= p as f64;
            if left < 0.0 {
                return token;
            }
        }
        // Only rounding leads here: the last candidate holds the rest.
        self.candidates.last().map_or(0, |c| c.1)
    }
}

/// Most probable first, ties by token.
fn by_logit(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Index of the largest value, the first of equals.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(options: SamplerOptions, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(options, logits.len()).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&mut logits.to_vec()) as usize] += 1;
        }
        counts
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.0f32, 1.0, 2.0, -1.0];
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        let n = 40_000;
        let got = counts(SamplerOptions { temperature: 1.0, ..Default::default() }, &logits, n);
        for (count, logit) in got.iter().zip(logits) {
            let p = logit.exp() / sum;
            let sigma = (p * (1.0 - p) / n as f32).sqrt();
            assert!((*count as f32 / n as f32 - p).abs() < 4.0 * sigma);
        }
    }

    #[test]
    fn cuts_keep_what_they_say() {
        let logits = [3.0f32, 2.9, 0.0, -2.0, 2.0];
        let base = SamplerOptions { temperature: 1.0, ..Default::default() };
        let kept = |o| counts(o, &logits, 3000).iter().map(|c| *c > 0).collect::<Vec<_>>();
        let yes = |list: &[usize]| (0..5).map(|i| list.contains(&i)).collect::<Vec<_>>();
        assert_eq!(kept(SamplerOptions { top_k: 2, ..base }), yes(&[0, 1]));
        assert_eq!(kept(SamplerOptions { top_p: 0.5, ..base }), yes(&[0, 1]));
        assert_eq!(kept(SamplerOptions { min_p: 0.3, ..base }), yes(&[0, 1, 4]));
        assert_eq!(kept(SamplerOptions { temperature: 0.0, ..base }), yes(&[0]));
        assert_eq!(kept(SamplerOptions { top_k: 1, ..base }), yes(&[0]));
    }

    #[test]
    fn penalty_and_bad_options() {
        let options = SamplerOptions { repetition_penalty: 2.0, ..Default::default() };
        let mut sampler = Sampler::new(options, 2).unwrap();
        sampler.observe(0);
        assert_eq!(sampler.sample(&mut [3.0, 2.0]), 1);
        for bad in [
            SamplerOptions { temperature: -1.0, ..Default::default() },
            SamplerOptions { temperature: f32::NAN, ..Default::default() },
            SamplerOptions { top_p: 0.0, ..Default::default() },
            SamplerOptions { repetition_penalty: 0.0, ..Default::default() },
        ] {
            assert!(Sampler::new(bad, 2).is_err(), "{bad:?}");
        }
    }
}
