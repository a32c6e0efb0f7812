//! One block, site by site, in the order of computation:
//!
//! | site | observed | consumers | then |
//! |---|---|---|---|
//! | 1 | attention input | q, k, v | attention with them |
//! | 2 | attention output | o | `x += o(…)` |
//! | 3 | MLP input | gate, up | |
//! | 4 | their product | down | `x += down(…)` |
//!
//! Between observing a site and going on, a callback may round its linears and put the result in
//! their place: then the later sites see inputs of the quantized block, which is true sequential
//! order. A callback that only looks leaves the stream that of the original model.
//!
//! What is observed is what the linears will see: transformed and quantized as the runtime does it.
//!
//! The product of gate and up is computed twice, once to observe it and once to pass it on:
//! storing it would take more memory than everything else together.

use std::collections::BTreeMap;
use std::ops::Range;

use anybit_core::{Gram, Matrix, Site};
use anybit_runtime::DecoderLayer;

use crate::Result;
use crate::site::{Needs, SiteKind, Statistics};
use crate::streams::{Mover, Stream};

/// Token weights of one block's linears, by name: `[groups, tokens]` of the first sequences.
pub type TokenWeights = BTreeMap<String, Matrix>;

/// What to do at each site.
pub type OnSite<'a> = &'a mut dyn FnMut(&mut DecoderLayer, SiteKind, Statistics) -> Result<()>;

/// Moves `stream` through `layer` and calls `on_site` at every site with what `needs` asks for.
///
/// # Errors
/// What `on_site` returns.
pub fn walk_block(
    layer: &mut DecoderLayer,
    stream: &mut Stream,
    mover: &mut Mover,
    (needs, tokens): (Needs, Option<&TokenWeights>),
    on_site: OnSite<'_>,
) -> Result<()> {
    if stream.is_empty() {
        let nothing = |kind| on_site(layer, kind, Statistics::default());
        return SiteKind::BLOCK.into_iter().try_for_each(nothing);
    }
    let Mover { rope, kv, buffers, normed, mixed, .. } = mover;
    let (seqlen, hidden) = (stream.seqlen, stream.hidden);
    let q_size = layer.q.out_size();
    let observer = |kind, width| Observer::new(kind, width, seqlen, needs, tokens);

    let mut seen = observer(SiteKind::AttnInput, hidden);
    if seen.looks() {
        for x in stream.sequences() {
            let normed = &mut normed[..x.len()];
            layer.attention_input(x, normed);
            layer.fake_quantize(Site::AttnInput, normed);
            seen.add(normed);
        }
    }
    on_site(layer, SiteKind::AttnInput, seen.finish())?;

    let mut seen = observer(SiteKind::AttnOutput, q_size);
    let mut attended = vec![0f32; stream.data.len() / hidden * q_size];
    for (x, attended) in stream.sequences().zip(attended.chunks_exact_mut(seqlen * q_size)) {
        let normed = &mut normed[..x.len()];
        layer.attention_input(x, normed);
        layer.attention_mix(normed, 0, rope, kv, buffers, attended);
        if seen.looks() {
            let copy = &mut mixed[..attended.len()];
            copy.copy_from_slice(attended);
            layer.fake_quantize(Site::AttnOutput, copy);
            seen.add(copy);
        }
    }
    on_site(layer, SiteKind::AttnOutput, seen.finish())?;

    let mut seen = observer(SiteKind::MlpInput, hidden);
    for (x, attended) in stream.sequences_mut().zip(attended.chunks_exact(seqlen * q_size)) {
        layer.attention_output(attended, buffers, x);
        if seen.looks() {
            let normed = &mut normed[..x.len()];
            layer.mlp_input(x, normed);
            layer.fake_quantize(Site::MlpInput, normed);
            seen.add(normed);
        }
    }
    drop(attended);
    on_site(layer, SiteKind::MlpInput, seen.finish())?;

    let ffn = layer.gate.out_size();
    let mut seen = observer(SiteKind::DownInput, ffn);
    let product = &mut mixed[..seqlen * ffn];
    if seen.looks() {
        for x in stream.sequences() {
            let normed = &mut normed[..x.len()];
            layer.mlp_input(x, normed);
            layer.mlp_mix(normed, buffers, product);
            layer.fake_quantize(Site::DownInput, product);
            seen.add(product);
        }
    }
    on_site(layer, SiteKind::DownInput, seen.finish())?;

    for x in stream.sequences_mut() {
        let normed = &mut normed[..x.len()];
        layer.mlp_input(x, normed);
        layer.mlp_mix(normed, buffers, product);
        layer.mlp_output(product, buffers, x);
    }
    Ok(())
}

/// Gathers the statistics of one site, sequence by sequence.
pub struct Observer<'a> {
    statistics: Statistics,
    /// Sums of `|x_j|`.
    magnitudes: Vec<f64>,
    /// Names and token weights of the linears whose guided Gram matrices are wanted.
    weighted: Vec<(&'a str, &'a Matrix)>,
    seqlen: usize,
    tokens: usize,
}

impl<'a> Observer<'a> {
    fn new(
        kind: SiteKind,
        width: usize,
        seqlen: usize,
        needs: Needs,
        tokens: Option<&'a TokenWeights>,
    ) -> Self {
        let own = |name: &&'static str| Some((*name, tokens?.get(*name)?));
        let weighted: Vec<_> = kind.linears().iter().filter_map(own).collect();
        Self::of(width, seqlen, needs, weighted)
    }

    /// An observer of inputs of `width` channels, for the linears of `weighted`.
    pub fn of(
        width: usize,
        seqlen: usize,
        needs: Needs,
        weighted: Vec<(&'a str, &'a Matrix)>,
    ) -> Self {
        let guided = weighted
            .iter()
            .map(|(name, weights)| (name.to_string(), vec![Gram::new(width); weights.rows]));
        let statistics = Statistics {
            gram: needs.gram.then(|| Gram::new(width)),
            magnitudes: None,
            guided: guided.collect(),
        };
        let magnitudes = if needs.magnitudes { vec![0.0; width] } else { Vec::new() };
        Self { statistics, magnitudes, weighted, seqlen, tokens: 0 }
    }

    fn looks(&self) -> bool {
        self.statistics.gram.is_some()
            || !self.magnitudes.is_empty()
            || !self.statistics.guided.is_empty()
    }

    /// Adds the next sequence.
    pub fn add(&mut self, x: &[f32]) {
        let range = self.tokens..self.tokens + self.seqlen;
        self.tokens += self.seqlen;
        if let Some(gram) = &mut self.statistics.gram {
            gram.add(x);
        }
        if !self.magnitudes.is_empty() {
            for x in x.chunks_exact(self.magnitudes.len()) {
                self.magnitudes.iter_mut().zip(x).for_each(|(sum, x)| *sum += x.abs() as f64);
            }
        }
        for (name, weights) in &self.weighted {
            // Gradients may have been taken on fewer sequences.
            if range.end <= weights.cols
                && let Some(grams) = self.statistics.guided.get_mut(*name)
            {
                add_guided(grams, weights, range.clone(), x);
            }
        }
    }

    /// What was seen.
    pub fn finish(mut self) -> Statistics {
        if !self.magnitudes.is_empty() {
            let count = self.tokens.max(1) as f64;
            let means = self.magnitudes.iter().map(|sum| (sum / count) as f32).collect();
            self.statistics.magnitudes = Some(means);
        }
        self.statistics
    }
}

fn add_guided(grams: &mut [Gram], weights: &Matrix, tokens: Range<usize>, x: &[f32]) {
    for (k, gram) in grams.iter_mut().enumerate() {
        gram.add_weighted(x, &weights.row(k)[tokens.clone()]);
    }
}
