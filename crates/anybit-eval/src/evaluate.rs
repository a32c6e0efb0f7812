//! Scoring models on text, window by window, against an optional reference.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anybit_core::RowSource;
use anybit_kernels::linear;
use anybit_runtime::{Decoder, RuntimeError, Session};
use rayon::prelude::*;
use serde::Serialize;

use crate::divergence::{Comparison, Position, compare, score};
use crate::statistics::{interval_95, mean_and_error, quantile};
use crate::{Convention, Result};

/// Positions whose logits are held at a time.
const TILE: usize = 64;

/// How to measure.
#[derive(Debug, Clone, Copy)]
pub struct EvalOptions {
    /// Tokens of a window.
    pub ctx: usize,
    /// Which positions are scored.
    pub convention: Convention,
}

/// Called with windows done and windows in all.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize);

/// What was measured of one model. Fields with `kl_`, `top1_` and `delta_p_` compare it with the
/// reference and are null without one.
#[derive(Debug, Clone, Serialize)]
pub struct ModelScores {
    /// The checkpoint.
    pub path: PathBuf,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Its standard error, from the spread over tokens.
    pub perplexity_se: Option<f64>,
    /// Which positions were scored.
    pub convention: &'static str,
    /// Tokens of a window.
    pub ctx: usize,
    /// Tokens scored.
    pub tokens: usize,
    /// Mean of `KL(reference ‖ model)` over positions, in nats.
    pub kl_mean: Option<f64>,
    /// Its median.
    pub kl_median: Option<f64>,
    /// Its 99th percentile.
    pub kl_p99: Option<f64>,
    /// 95% interval of the mean, from the spread over windows.
    pub kl_ci95: Option<[f64; 2]>,
    /// Share of positions where both find the same token most probable.
    pub top1_agreement: Option<f64>,
    /// Its 95% interval.
    pub top1_ci95: Option<[f64; 2]>,
    /// Mean change of the correct token's probability.
    pub delta_p_mean: Option<f64>,
    /// Root mean square of that change.
    pub delta_p_rms: Option<f64>,
    /// 95% interval of the mean change.
    pub delta_p_ci95: Option<[f64; 2]>,
    /// Bits of a weight's code, over the linears of the blocks.
    pub bits_per_weight_codes: Option<f64>,
    /// Bits of a weight with everything that is stored for it.
    pub bits_per_weight_total: Option<f64>,
    /// Size of the weight files.
    pub file_bytes: u64,
    /// Largest resident memory of this process so far.
    pub peak_rss_bytes: Option<u64>,
    /// Tokens per second through the model, logits of the scored positions included.
    pub prefill_tokens_per_s: f64,
}

/// Running sums of one model.
#[derive(Default)]
struct Tally {
    nll: Vec<f64>,
    kl: Vec<f32>,
    windows: Vec<WindowMeans>,
    same_top: usize,
    delta_p_squares: f64,
    time: Duration,
    logits: Vec<f32>,
    reference_logits: Vec<f32>,
}

struct WindowMeans {
    kl: f64,
    top1: f64,
    delta_p: f64,
}

/// Scores `models` on `windows`; `reference` is compared with each and scored too when it is among
/// them. Returns one [`ModelScores`] per model, in order, with the measured fields filled in.
///
/// # Errors
/// A token outside a vocabulary, or logits that are not finite.
pub fn evaluate(
    models: &[&Decoder],
    reference: Option<&Decoder>,
    windows: &[Vec<u32>],
    options: EvalOptions,
    progress: Progress<'_>,
) -> Result<Vec<ModelScores>> {
    let mut sessions: Vec<Session<'_>> =
        models.iter().map(|d| Session::new(d, options.ctx)).collect();
    let mut reference_session = reference.map(|d| Session::new(d, options.ctx));
    let mut tallies: Vec<Tally> = models.iter().map(|_| Tally::default()).collect();
    let scored = options.convention.scored(options.ctx);
    for (done, window) in windows.iter().enumerate() {
        let reference_hidden = match &mut reference_session {
            Some(session) => {
                session.clear();
                Some(session.hidden(window)?)
            }
            None => None,
        };
        for ((model, session), tally) in models.iter().zip(&mut sessions).zip(&mut tallies) {
            session.clear();
            let started = Instant::now();
            let hidden = session.hidden(window)?;
            tally.time += started.elapsed();
            let base = reference.zip(reference_hidden);
            let base = base.map(|(d, states)| HiddenStates { states, head: &*d.head.weight });
            let model = HiddenStates { states: hidden, head: &*model.head.weight };
            score_window(model, base, window, scored.clone(), tally);
        }
        progress(done + 1, windows.len());
    }
    tallies.into_iter().map(|t| summarize(t, windows.len(), options)).collect()
}

/// Final hidden states (normalized, ready for the head) of some tokens, and the head.
#[derive(Clone, Copy)]
pub struct HiddenStates<'a> {
    /// `[tokens, hidden]`.
    pub states: &'a [f32],
    /// `[vocab, hidden]`.
    pub head: &'a dyn RowSource,
}

impl HiddenStates<'_> {
    fn logits(&self, positions: Range<usize>, out: &mut [f32]) {
        let d = self.head.shape().1;
        linear(&self.states[positions.start * d..positions.end * d], self.head, None, out);
    }

    fn window(&self, index: usize, ctx: usize) -> Self {
        let step = ctx * self.head.shape().1;
        Self { states: &self.states[index * step..(index + 1) * step], head: self.head }
    }
}

/// Scores hidden states that were computed elsewhere, window after window: the reference by
/// itself, and the model against it.
///
/// # Errors
/// Logits that are not finite.
pub fn compare_hidden(
    reference: &HiddenStates<'_>,
    model: &HiddenStates<'_>,
    windows: &[Vec<u32>],
    convention: Convention,
) -> Result<(ModelScores, ModelScores)> {
    let ctx = windows.first().map_or(2, Vec::len);
    let options = EvalOptions { ctx, convention };
    let (mut alone, mut compared) = (Tally::default(), Tally::default());
    for (i, window) in windows.iter().enumerate() {
        let (reference, model) = (reference.window(i, ctx), model.window(i, ctx));
        let scored = convention.scored(ctx);
        score_window(reference, None, window, scored.clone(), &mut alone);
        score_window(model, Some(reference), window, scored, &mut compared);
    }
    let n = windows.len();
    Ok((summarize(alone, n, options)?, summarize(compared, n, options)?))
}

fn score_window(
    model: HiddenStates<'_>,
    reference: Option<HiddenStates<'_>>,
    window: &[u32],
    scored: Range<usize>,
    tally: &mut Tally,
) {
    let vocab = model.head.shape().0;
    tally.logits.resize(TILE * vocab, 0.0);
    tally.reference_logits.resize(if reference.is_some() { TILE * vocab } else { 0 }, 0.0);
    let (mut kl, mut top1, mut delta_p) = (0f64, 0usize, 0f64);
    let count = scored.len();
    for first in scored.clone().step_by(TILE) {
        let tile = first..(first + TILE).min(scored.end);
        let started = Instant::now();
        let logits = &mut tally.logits[..tile.len() * vocab];
        model.logits(tile.clone(), logits);
        tally.time += started.elapsed();
        let base = reference.map(|reference| {
            let out = &mut tally.reference_logits[..tile.len() * vocab];
            reference.logits(tile.clone(), out);
            &*out
        });
        for (position, comparison) in score_tile(logits, base, &window[tile.start + 1..], vocab) {
            tally.nll.push(position.nll);
            if let Some(c) = comparison {
                tally.kl.push(c.kl as f32);
                tally.delta_p_squares += c.delta_p * c.delta_p;
                kl += c.kl;
                top1 += c.same_top as usize;
                delta_p += c.delta_p;
            }
        }
    }
    if reference.is_some() {
        let n = count as f64;
        tally.same_top += top1;
        let means = WindowMeans { kl: kl / n, top1: top1 as f64 / n, delta_p: delta_p / n };
        tally.windows.push(means);
    }
}

fn score_tile(
    logits: &[f32],
    reference: Option<&[f32]>,
    targets: &[u32],
    vocab: usize,
) -> Vec<(Position, Option<Comparison>)> {
    logits
        .par_chunks_exact(vocab)
        .enumerate()
        .map(|(i, row)| {
            let target = targets[i] as usize;
            let position = score(row, target);
            let comparison = reference.map(|reference| {
                let base = &reference[i * vocab..(i + 1) * vocab];
                compare((base, score(base, target)), (row, position))
            });
            (position, comparison)
        })
        .collect()
}

fn summarize(mut tally: Tally, windows: usize, options: EvalOptions) -> Result<ModelScores> {
    if let Some(position) = tally.nll.iter().position(|n| !n.is_finite()) {
        return Err(RuntimeError::NotFinite { position }.into());
    }
    let (nll, nll_error) = mean_and_error(&tally.nll);
    let compared = !tally.kl.is_empty();
    let n = tally.nll.len() as f64;
    let window_means =
        |f: fn(&WindowMeans) -> f64| -> Vec<f64> { tally.windows.iter().map(f).collect() };
    let (kls, tops, deltas) =
        (window_means(|w| w.kl), window_means(|w| w.top1), window_means(|w| w.delta_p));
    let mean = |values: &[f64]| mean_and_error(values).0;
    let when = |value: f64| compared.then_some(value);
    let tokens_read = (windows * options.ctx) as f64;
    Ok(ModelScores {
        path: PathBuf::new(),
        perplexity: nll.exp(),
        perplexity_se: nll_error.map(|e| e * nll.exp()),
        convention: options.convention.name(),
        ctx: options.ctx,
        tokens: tally.nll.len(),
        kl_mean: when(mean(&kls)),
        kl_median: when(quantile(&mut tally.kl, 0.5)),
        kl_p99: when(quantile(&mut tally.kl, 0.99)),
        kl_ci95: interval_95(&kls).filter(|_| compared),
        top1_agreement: when(tally.same_top as f64 / n),
        top1_ci95: interval_95(&tops).filter(|_| compared),
        delta_p_mean: when(mean(&deltas)),
        delta_p_rms: when((tally.delta_p_squares / n).sqrt()),
        delta_p_ci95: interval_95(&deltas).filter(|_| compared),
        bits_per_weight_codes: None,
        bits_per_weight_total: None,
        file_bytes: 0,
        peak_rss_bytes: None,
        prefill_tokens_per_s: tokens_read / tally.time.as_secs_f64().max(1e-9),
    })
}
