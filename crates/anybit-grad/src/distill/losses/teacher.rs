//! [`Teacher`]: where the distribution `p` comes from: all logits, hidden states and a head, or the
//! `k` likeliest tokens.
//!
//! Of the `k` likeliest tokens and the mass of all others, `k + 1` outcomes, the divergence is at
//! most that of all tokens. Scaling the `k` up to sum to 1 instead teaches too much confidence,
//! because it gives the tail's mass to them. Called by [`super::logits`].

use std::ops::Range;

use rayon::prelude::*;

use super::divergence::{log_softmax, log_sum_exp};
use crate::Tensor;
use crate::distill::error::{DistillError, Result};
use crate::ops::IGNORE;
use crate::tiles::{Operand, product};

/// Rows of logits that exist at a time when only facts about them are wanted.
const ROWS: usize = 64;

/// The likeliest tokens at each position, and the mass of all others.
#[derive(Debug, Clone, PartialEq)]
pub struct TopK {
    /// Tokens of a position, at most the vocabulary.
    pub k: usize,
    /// `[tokens, k]`: the tokens, distinct within a position, likeliest first.
    pub ids: Vec<u32>,
    /// `[tokens, k]`: their log-probabilities, in nats.
    pub log_probs: Vec<f32>,
    /// `[tokens]`: logarithm of the probability of all other tokens, in nats.
    pub tail: Vec<f32>,
    /// The temperature at which these are probabilities; that of the tail cannot be changed later.
    pub temperature: f64,
}

impl TopK {
    /// The `k` likeliest of `logits: [tokens, vocab]` at `temperature`; equal ones in the order of
    /// their numbers. `k` is at most the vocabulary.
    ///
    /// # Panics
    /// When `logits` is no matrix, or `k` is 0.
    pub fn from_logits(logits: &Tensor, k: usize, temperature: f64) -> Self {
        let (tokens, vocab) = dims(logits);
        assert!(k > 0, "at least one token is needed");
        let k = k.min(vocab);
        let one = |row: &[f32]| {
            let mut logs = row.to_vec();
            log_softmax(&mut logs, temperature);
            let mut order: Vec<u32> = (0..vocab as u32).collect();
            let by_size =
                |a: &u32, b: &u32| logs[*b as usize].total_cmp(&logs[*a as usize]).then(a.cmp(b));
            if k < vocab {
                order.select_nth_unstable_by(k - 1, by_size);
            }
            order[..k].sort_unstable_by(by_size);
            let top: Vec<f32> = order[..k].iter().map(|id| logs[*id as usize]).collect();
            let tail = log_sum_exp(order[k..].iter().map(|id| logs[*id as usize]));
            order.truncate(k);
            (order, top, tail)
        };
        let rows: Vec<_> = logits.data().par_chunks_exact(vocab).map(one).collect();
        let mut all = Self::with_capacity(tokens, k, temperature);
        for (ids, log_probs, tail) in rows {
            all.ids.extend(ids);
            all.log_probs.extend(log_probs);
            all.tail.push(tail);
        }
        all
    }

    /// No position yet.
    pub(crate) fn with_capacity(tokens: usize, k: usize, temperature: f64) -> Self {
        let (ids, log_probs) = (Vec::with_capacity(tokens * k), Vec::with_capacity(tokens * k));
        Self { k, ids, log_probs, tail: Vec::with_capacity(tokens), temperature }
    }

    /// Adds the positions of another.
    ///
    /// # Panics
    /// When `k` or the temperature differs.
    pub(crate) fn extend(&mut self, other: &Self) {
        let same = self.k == other.k && self.temperature == other.temperature;
        assert!(same, "likeliest tokens of two kinds");
        self.ids.extend_from_slice(&other.ids);
        self.log_probs.extend_from_slice(&other.log_probs);
        self.tail.extend_from_slice(&other.tail);
    }

    /// Takes the first positions out, all when there are fewer.
    pub(crate) fn take_front(&mut self, tokens: usize) -> Self {
        let tokens = tokens.min(self.tokens());
        let tail = self.tail.split_off(tokens);
        let (ids, log_probs) =
            (self.ids.split_off(tokens * self.k), self.log_probs.split_off(tokens * self.k));
        let rest = Self { ids, log_probs, tail, ..*self };
        std::mem::replace(self, rest)
    }

    /// Positions.
    pub fn tokens(&self) -> usize {
        self.tail.len()
    }

    /// Fails unless it is of `tokens` positions and `vocab` tokens.
    fn check(&self, tokens: usize, vocab: usize, temperature: f64) -> Result<()> {
        check_rows(self.tokens(), tokens)?;
        let values = tokens * self.k;
        if self.k == 0 || self.ids.len() != values || self.log_probs.len() != values {
            let what = format!(
                "{} ids and {} log-probabilities for {tokens} tokens and k = {}",
                self.ids.len(),
                self.log_probs.len(),
                self.k
            );
            return Err(DistillError::input("teacher", what));
        }
        let largest = self.ids.iter().max().map_or(0, |id| *id as usize);
        check_vocab(self.k.max(largest + 1), vocab)?;
        if self.temperature != temperature {
            let what = format!(
                "its likeliest tokens are at temperature {}, the loss is at {temperature}; use one \
                 temperature for both",
                self.temperature
            );
            return Err(DistillError::input("teacher", what));
        }
        Ok(())
    }

    /// The tokens and log-probabilities of a position.
    pub(super) fn row(&self, token: usize) -> (&[u32], &[f32]) {
        let part = token * self.k..(token + 1) * self.k;
        (&self.ids[part.clone()], &self.log_probs[part])
    }

    /// Facts about a position; a target in the tail counts as having an even share of it.
    fn facts(&self, token: usize, target: u32, vocab: usize) -> Facts {
        let (ids, logs) = self.row(token);
        let others = (vocab - self.k).max(1) as f32;
        let label = match ids.iter().position(|id| *id == target) {
            Some(at) => logs[at],
            None => self.tail[token] - others.ln(),
        };
        Facts { label: label as f64, largest: logs.iter().fold(label, |m, l| m.max(*l)) as f64 }
    }
}

/// Fails when tokens are named that the student does not have.
fn check_vocab(found: usize, expected: usize) -> Result<()> {
    let (what, other) = ("the teacher".to_string(), "the student");
    match found <= expected {
        true => Ok(()),
        false => Err(DistillError::Vocabulary { what, found, other, expected }),
    }
}

fn check_rows(found: usize, expected: usize) -> Result<()> {
    let (what, other) = ("the teacher".to_string(), "the student");
    match found == expected {
        true => Ok(()),
        false => Err(DistillError::Rows { what, found, other, expected }),
    }
}

fn dims(matrix: &Tensor) -> (usize, usize) {
    match matrix.shape() {
        [rows, cols] => (*rows, *cols),
        other => panic!("a matrix is needed, the shape is {other:?}"),
    }
}

/// What losses ask of the teacher about one token, in nats.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    /// Log-probability of the target.
    pub label: f64,
    /// Of the likeliest token.
    pub largest: f64,
}

/// Outputs of a teacher for the tokens of a batch; constants for the student.
#[derive(Debug, Clone, Copy)]
pub enum Teacher<'a> {
    /// Logits `[tokens, vocab]`.
    Logits(&'a Tensor),
    /// Hidden states and a head, whose logits exist for one tile of tokens at a time.
    Hidden {
        /// `[tokens, hidden]`.
        x: &'a Tensor,
        /// `[vocab, hidden]`.
        head: &'a Tensor,
    },
    /// The likeliest tokens.
    TopK(&'a TopK),
}

impl Teacher<'_> {
    /// Fails unless it is of `tokens` rows, `vocab` tokens and, for the likeliest tokens, of
    /// `temperature`.
    ///
    /// # Errors
    /// [`DistillError::Rows`], [`DistillError::Vocabulary`], [`DistillError::Input`].
    ///
    /// # Panics
    /// When a tensor is no matrix.
    pub fn check(&self, tokens: usize, vocab: usize, temperature: f64) -> Result<()> {
        let (rows, found) = match self {
            Self::TopK(top) => return top.check(tokens, vocab, temperature),
            Self::Logits(logits) => dims(logits),
            Self::Hidden { x, head } => {
                let ((rows, hidden), (found, inner)) = (dims(x), dims(head));
                if hidden != inner {
                    let what = format!("hidden states of {hidden} values, a head of {inner}");
                    return Err(DistillError::input("teacher", what));
                }
                (rows, found)
            }
        };
        check_rows(rows, tokens)?;
        let (what, other, expected) = ("the teacher".into(), "the student", vocab);
        match found == vocab {
            true => Ok(()),
            false => Err(DistillError::Vocabulary { what, found, other, expected }),
        }
    }

    /// Whether it has a logit for every token.
    pub(super) fn is_full(&self) -> bool {
        !matches!(self, Self::TopK(_))
    }

    /// Writes the logits of some rows; of the likeliest tokens there are none to write.
    pub(super) fn logits(&self, rows: Range<usize>, dst: &mut [f32]) {
        match self {
            Self::TopK(_) => {}
            Self::Logits(logits) => {
                let vocab = dims(logits).1;
                dst.copy_from_slice(&logits.data()[rows.start * vocab..rows.end * vocab]);
            }
            Self::Hidden { x, head } => {
                let (vocab, hidden) = dims(head);
                let x = &x.data()[rows.start * hidden..rows.end * hidden];
                let x = Operand::new(x, rows.len(), hidden);
                product(dst, false, x, Operand::new(head.data(), vocab, hidden).t());
            }
        }
    }

    /// What it says at temperature 1 about every token with a target, `None` for the others.
    pub(super) fn facts(&self, targets: &[u32], vocab: usize) -> Vec<Option<Facts>> {
        let counted = |target: u32| target != IGNORE;
        if let Self::TopK(top) = self {
            let facts = |(token, target): (usize, &u32)| {
                counted(*target).then(|| top.facts(token, *target, vocab))
            };
            return targets.iter().enumerate().map(facts).collect();
        }
        let mut all = Vec::with_capacity(targets.len());
        let mut buffer = vec![0f32; ROWS.min(targets.len()) * vocab];
        for (index, targets) in targets.chunks(ROWS).enumerate() {
            let rows = index * ROWS..index * ROWS + targets.len();
            let logits = &mut buffer[..targets.len() * vocab];
            self.logits(rows, logits);
            let facts = |(row, target): (&mut [f32], &u32)| {
                counted(*target).then(|| {
                    log_softmax(row, 1.0);
                    let largest = row.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l)) as f64;
                    Facts { label: row[*target as usize] as f64, largest }
                })
            };
            let rows = logits.par_chunks_exact_mut(vocab).zip(targets);
            all.extend(rows.map(facts).collect::<Vec<_>>());
        }
        all
    }

    /// Mean over the tokens with a target of the largest probability: the `gamma` of BitDistiller,
    /// and the number of these tokens, for a mean over batches.
    ///
    /// # Errors
    /// As [`Self::check`] at temperature 1.
    pub fn mean_confidence(&self, targets: &[u32], vocab: usize) -> Result<(f64, usize)> {
        self.check(targets.len(), vocab, 1.0)?;
        let facts = self.facts(targets, vocab);
        let count = facts.iter().flatten().count();
        let sum: f64 = facts.iter().flatten().map(|f| f.largest.exp()).sum();
        Ok((sum / count.max(1) as f64, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn the_likeliest_tokens_and_the_rest_sum_to_one() {
        let logits = random(1, [5, 40]);
        for (k, temperature) in [(1, 1.0), (7, 2.0), (40, 1.0), (90, 1.0)] {
            let top = TopK::from_logits(&logits, k, temperature);
            assert_eq!((top.k, top.tokens()), (k.min(40), 5));
            for token in 0..5 {
                let (ids, logs) = top.row(token);
                let sum: f32 = logs.iter().map(|l| l.exp()).sum();
                approx::assert_abs_diff_eq!(sum + top.tail[token].exp(), 1.0, epsilon = 1e-5);
                assert!(logs.windows(2).all(|w| w[0] >= w[1]));
                let row = &logits.data()[token * 40..][..40];
                let best = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                assert_eq!(row[ids[0] as usize], best);
            }
            Teacher::TopK(&top).check(5, 40, temperature).unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_is_named_with_both_sizes() {
        let logits = random(2, [5, 40]);
        let says = |teacher: Teacher<'_>, tokens, vocab, parts: [&str; 2]| {
            let error = teacher.check(tokens, vocab, 1.0).unwrap_err().to_string();
            assert!(parts.iter().all(|p| error.contains(p)), "{error}");
        };
        says(Teacher::Logits(&logits), 6, 40, ["5 rows", "6"]);
        says(Teacher::Logits(&logits), 5, 41, ["40 tokens", "41"]);
        let (x, head) = (random(3, [5, 8]), random(4, [40, 8]));
        says(Teacher::Hidden { x: &x, head: &head }, 5, 39, ["40 tokens", "39"]);
        let wrong = random(4, [40, 9]);
        says(Teacher::Hidden { x: &x, head: &wrong }, 5, 40, ["8 values", "9"]);
        let mut top = TopK::from_logits(&logits, 3, 1.0);
        says(Teacher::TopK(&top), 4, 40, ["5 rows", "4"]);
        top.ids[2] = 77;
        says(Teacher::TopK(&top), 5, 40, ["78 tokens", "40"]);
        top.temperature = 2.0;
        top.ids[2] = 7;
        says(Teacher::TopK(&top), 5, 40, ["temperature 2", "1"]);
    }

    #[test]
    fn positions_are_put_together_and_taken_apart() {
        let all = TopK::from_logits(&random(7, [9, 20]), 4, 2.0);
        let mut rest = all.clone();
        let mut parts: Vec<TopK> = [0, 2, 5].map(|tokens| rest.take_front(tokens)).to_vec();
        assert_eq!(parts.iter().map(TopK::tokens).collect::<Vec<_>>(), [0, 2, 5]);
        parts.push(rest.take_front(99));
        assert_eq!((parts[3].tokens(), rest.tokens()), (2, 0));
        parts.iter().for_each(|part| rest.extend(part));
        assert_eq!(rest, all);
    }

    #[test]
    fn facts_agree_between_the_kinds_of_teachers() {
        let (x, head) = (random(5, [100, 8]), random(6, [30, 8]));
        let mut logits = vec![0f32; 100 * 30];
        Teacher::Hidden { x: &x, head: &head }.logits(0..100, &mut logits);
        let logits = Tensor::new([100, 30], logits);
        let top = TopK::from_logits(&logits, 30, 1.0);
        let targets: Vec<u32> =
            (0..100).map(|i| if i % 9 == 0 { IGNORE } else { i % 30 }).collect();
        let teachers =
            [Teacher::Logits(&logits), Teacher::Hidden { x: &x, head: &head }, Teacher::TopK(&top)];
        let [a, b, c] = teachers.map(|t| t.facts(&targets, 30));
        for (token, ((a, b), c)) in a.into_iter().zip(b).zip(c).enumerate() {
            assert_eq!(a.is_none(), token % 9 == 0);
            let (Some(a), Some(b), Some(c)) = (a, b, c) else { continue };
            for other in [b, c] {
                approx::assert_abs_diff_eq!(a.label, other.label, epsilon = 1e-5);
                approx::assert_abs_diff_eq!(a.largest, other.largest, epsilon = 1e-5);
            }
        }
        let (gamma, count) = teachers[0].mean_confidence(&targets, 30).unwrap();
        assert!(gamma > 0.0 && gamma < 1.0 && count == 88);
    }
}
