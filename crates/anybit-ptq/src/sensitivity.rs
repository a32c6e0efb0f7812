//! Sensitivities of a model's weights ([`anybit_grad::sensitivities`]) in the cache: computed once,
//! read back block by block.
//!
//! | file | holds |
//! |---|---|
//! | `head.json`, `rows.safetensors` | loss; weights of the head's rows and of tokens for them |
//! | `block-NNN.safetensors` | Fisher diagonals and token weights of a block's linears |
//! | `lookups.safetensors` | Fisher diagonal of the embedding as a table |
//! | `done.json` | says that all of these are there |
//! | `grams.safetensors` | Gram matrices of the head's row groups |
//! | `gradient-NNNN.bin` | where an interrupted run goes on |
//!
//! Units: with sequences of `T` tokens and losses multiplied by [`GRADIENT_SCALE`], token weights
//! and lookups are scaled by `T / (2 N scale²)` over `N` sequences. Then, for labels drawn from the
//! model, `r H rᵀ` is the KL divergence that the error `r` of one row causes, in nats per token. The
//! Fisher diagonal is left as it is: only its ratios within a row count.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{Gram, Matrix};
use anybit_grad::{
    BlockSensitivity as Raw, GRADIENT_SCALE, HeadRows, HeadSensitivity, Receiver,
    SensitivityOptions, sensitivities,
};
use anybit_io::safetensors_file::{
    FileDtype, PlannedTensor, RawTensor, layout_in_shards, open_file,
};
use anybit_io::{Checkpoint, IoError};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::site::{Needs, SiteKind, Statistics};
use crate::stages::{Observer, TokenWeights};
use crate::{Calibration, Event, PtqError, Recipe, Result};

/// Share of the whole vocabulary's lookups that every row group is credited with.
const UNSEEN: f64 = 0.05;
/// Name of embedding and head as a linear.
pub const VOCABULARY: &str = "vocabulary";

/// Sensitivities of one block's linears, by name below `model.layers.N.`.
pub struct BlockSensitivity {
    /// Fisher diagonals.
    pub fisher: BTreeMap<String, Matrix>,
    /// Token weights, `[groups, tokens]`.
    pub tokens: Option<TokenWeights>,
}

/// The sensitivities of a model, in the cache.
pub struct Sensitivity {
    cache: Cache,
    done: Done,
}

/// Written last: its presence says that all else is there.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Done {
    /// Mean loss of the original model on the gradient sequences, in nats per token.
    loss: f64,
    sequences: usize,
    seqlen: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Head {
    loss: f64,
}

/// Takes up sensitivities as they come.
struct Writer<'a> {
    cache: &'a Cache,
    observe: &'a mut dyn FnMut(Event),
}

impl Receiver for Writer<'_> {
    type Error = PtqError;

    fn head(&mut self, head: HeadSensitivity) -> Result<()> {
        if let Some(HeadRows { rows, tokens }) = head.rows {
            let rows = Matrix { rows: 1, cols: rows.len(), data: rows };
            let parts = vec![("rows".to_string(), rows), ("tokens".to_string(), tokens)];
            write_file(self.cache, ROWS, parts)?;
        }
        self.cache.write("head.json", &Head { loss: head.loss })
    }

    fn block(&mut self, index: usize, block: Raw) -> Result<()> {
        let mut parts: Vec<(String, Matrix)> = Vec::new();
        parts.extend(block.fisher.into_iter().map(|(name, m)| (format!("fisher/{name}"), m)));
        let tokens = block.tokens.into_iter().flatten();
        parts.extend(tokens.map(|(name, m)| (format!("tokens/{name}"), m)));
        write_file(self.cache, &block_file(index), parts)
    }

    fn lookups(&mut self, fisher: Matrix) -> Result<()> {
        write_file(self.cache, LOOKUPS, vec![("lookups".into(), fisher)])
    }

    fn step(&mut self, done: u64, total: u64) {
        (self.observe)(Event::Gradients(done, total));
    }
}

const ROWS: &str = "rows.safetensors";
const LOOKUPS: &str = "lookups.safetensors";
const GRAMS: &str = "grams.safetensors";

/// What is known of the rows of embedding and head.
#[derive(Debug, Clone)]
pub struct VocabStatistics {
    /// Guided Gram matrices of the head's row groups.
    head: Vec<Gram>,
    /// `Σ_t dz²` of each row.
    rows: Vec<f32>,
    /// Fisher diagonal of lookups, `[vocab, hidden]`.
    lookups: Matrix,
}

impl Sensitivity {
    /// Opens what the cache holds for these needs, or computes it.
    ///
    /// # Errors
    /// What gradients, reading and writing report.
    pub fn open(
        checkpoint: &Checkpoint,
        (source, recipe, needs): (&str, &Recipe, Needs),
        calibration: &Calibration,
        root: &Path,
        observe: &mut dyn FnMut(Event),
    ) -> Result<Option<Self>> {
        let Some(labels) = needs.fisher else { return Ok(None) };
        let sequences = calibration.gradient_sequences(recipe.calibration.gradient_tokens);
        let what = format!("{labels:?} {:?} {:?}", needs.guided, needs.vocab_groups);
        let tokens = crate::journal::hash_tokens(&[sequences]);
        let cache = Cache::open(root, "sensitivity", &[source, &tokens, &what])?;
        if let Some(done) = cache.read("done.json")? {
            return Ok(Some(Self { cache, done }));
        }
        let options = SensitivityOptions {
            labels,
            guided_groups: needs.guided,
            vocab_groups: needs.vocab_groups,
            spill: Some(cache.folder()),
        };
        let mut writer = Writer { cache: &cache, observe };
        sensitivities(checkpoint, sequences, options, &mut writer)?;
        let head: Head = cache.read("head.json")?.ok_or_else(|| {
            IoError::damaged(&cache.path("head.json"), "it is gone; delete the folder")
        })?;
        let (loss, seqlen) = (head.loss, calibration.seqlen());
        let done = Done { loss, sequences: sequences.len(), seqlen };
        cache.write("done.json", &done)?;
        // Nothing goes on from here any more.
        let _ = std::fs::remove_file(cache.path("gradient-0000.bin"));
        Ok(Some(Self { cache, done }))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.cache.folder()
    }

    /// What turns squared gradients of scaled mean losses into nats per token.
    fn unit(&self) -> f32 {
        let Done { sequences, seqlen, .. } = self.done;
        let scale = GRADIENT_SCALE as f64;
        (seqlen as f64 / (2.0 * sequences as f64 * scale * scale)) as f32
    }

    /// Sensitivities of one block.
    ///
    /// # Errors
    /// A file that is missing or damaged, values that cannot be.
    pub fn block(&self, index: usize) -> Result<BlockSensitivity> {
        let path = self.cache.path(&block_file(index));
        let (mut fisher, mut tokens) = (BTreeMap::new(), BTreeMap::new());
        for (name, raw) in open_file(&path)? {
            let matrix = read_matrix(&raw, &name, &path)?;
            match name.split_once('/') {
                Some(("fisher", linear)) => fisher.insert(linear.to_string(), matrix),
                Some(("tokens", linear)) => {
                    let matrix = scaled(matrix, self.unit());
                    tokens.insert(linear.to_string(), matrix)
                }
                _ => return Err(IoError::damaged(&path, format!("it holds {name}")).into()),
            };
        }
        Ok(BlockSensitivity { fisher, tokens: (!tokens.is_empty()).then_some(tokens) })
    }

    /// What is known of embedding and head, if it was asked for.
    ///
    /// # Errors
    /// As [`Self::block`].
    pub fn vocabulary(&self) -> Result<Option<VocabStatistics>> {
        if !self.cache.path(ROWS).exists() {
            return Ok(None);
        }
        let rows = self.matrix(ROWS, "rows")?.data;
        // Lookups are means over sequences already.
        let per_sequence = self.unit() * self.done.sequences as f32;
        let lookups = scaled(self.matrix(LOOKUPS, "lookups")?, per_sequence);
        let (mut head, path) = (Vec::new(), self.cache.path(GRAMS));
        for (name, raw) in open_file(&path)? {
            let entries = read_matrix(&raw, &name, &path)?.data;
            if entries.len() != lookups.cols * (lookups.cols + 1) / 2 {
                return Err(IoError::damaged(&path, format!("{name} is no triangle")).into());
            }
            head.push(Gram::from_upper(lookups.cols, &entries, 0));
        }
        Ok(Some(VocabStatistics { head, rows, lookups }))
    }

    fn matrix(&self, file: &str, name: &str) -> Result<Matrix> {
        let path = self.cache.path(file);
        let parts = open_file(&path)?;
        let raw = parts.get(name);
        let raw = raw.ok_or_else(|| IoError::damaged(&path, format!("it holds no {name}")))?;
        read_matrix(raw, name, &path)
    }

    /// Whether the head's Gram matrices have yet to be taken, from final hidden states.
    pub fn wants_grams(&self) -> bool {
        self.cache.path(ROWS).exists() && !self.cache.path(GRAMS).exists()
    }

    /// Takes the head's Gram matrices from the final hidden states, normalized, sequence after
    /// sequence.
    ///
    /// # Errors
    /// What reading and writing report.
    pub fn write_grams(&self, normed: &[f32], hidden: usize) -> Result<()> {
        let weights = scaled(self.matrix(ROWS, "tokens")?, self.unit());
        let seqlen = self.done.seqlen;
        let named = vec![(VOCABULARY, &weights)];
        let mut observer = Observer::of(hidden, seqlen, Needs::default(), named);
        normed.chunks_exact(seqlen * hidden).for_each(|x| observer.add(x));
        let statistics = observer.finish();
        let grams = statistics.guided.get(VOCABULARY).map(Vec::as_slice).unwrap_or_default();
        let parts = grams.iter().enumerate().map(|(k, gram)| {
            let data = gram.to_upper();
            (format!("{k:04}"), Matrix { rows: 1, cols: data.len(), data })
        });
        write_file(&self.cache, GRAMS, parts.collect())
    }
}

impl VocabStatistics {
    /// The statistics of embedding or head as a site of one linear, and the factor of each row.
    ///
    /// A row's error counts `r (a_v/ā_k H_k + diag(g_v)) rᵀ`: what it does to its logit, and what it
    /// does as a lookup. The group's mean of the sum is the metric; the factor of a row is the
    /// ratio of its own to that mean, in trace. Half of it is taken from the mean of the group:
    /// tokens that calibration never saw are seen later.
    pub fn of(&self, kind: SiteKind, tied: bool) -> (Statistics, Vec<f32>) {
        let (as_head, as_lookup) = (tied || kind == SiteKind::Head, kind == SiteKind::Embedding);
        let (vocab, groups) = (self.rows.len(), self.head.len());
        let mut factors = vec![1f32; vocab];
        let mut grams = Vec::with_capacity(groups);
        let mut everywhere = vec![0f64; self.lookups.cols];
        for row in self.lookups.data.chunks_exact(self.lookups.cols.max(1)) {
            let share = row.iter().map(|g| *g as f64 / vocab as f64);
            everywhere.iter_mut().zip(share).for_each(|(sum, g)| *sum += g.max(1e-30));
        }
        for (k, head) in self.head.iter().enumerate() {
            let range = k * vocab / groups..(k + 1) * vocab / groups;
            let count = range.len().max(1) as f64;
            let mut gram = if as_head { head.clone() } else { Gram::new(head.size()) };
            let logits: f64 = gram.diagonal().iter().map(|h| *h as f64).sum();
            let energy: f64 = self.rows[range.clone()].iter().map(|a| *a as f64).sum();
            let mean_energy = (energy / count).max(f64::MIN_POSITIVE);
            let mut lookups = vec![0f64; head.size()];
            if as_lookup {
                for v in range.clone() {
                    let row = self.lookups.row(v).iter();
                    lookups.iter_mut().zip(row).for_each(|(sum, g)| *sum += *g as f64 / count);
                }
                // A group of tokens that were never looked up is not worth nothing.
                lookups.iter_mut().zip(&everywhere).for_each(|(own, all)| *own += UNSEEN * all);
            }
            let total = logits + lookups.iter().sum::<f64>();
            gram.add_diagonal(&lookups.iter().map(|g| *g as f32).collect::<Vec<_>>());
            for v in range {
                let own: f64 = match as_lookup {
                    true => self.lookups.row(v).iter().map(|g| *g as f64).sum(),
                    false => 0.0,
                };
                let ratio = (logits * self.rows[v] as f64 / mean_energy + own)
                    / total.max(f64::MIN_POSITIVE);
                factors[v] = 0.5 + 0.5 * ratio as f32;
            }
            grams.push(gram);
        }
        let guided = BTreeMap::from([(VOCABULARY.to_string(), grams)]);
        (Statistics { guided, ..Default::default() }, factors)
    }
}

fn block_file(index: usize) -> String {
    format!("block-{index:03}.safetensors")
}

/// Writes matrices; Fisher diagonals as bf16, since k-means needs ratios of their sizes and no more
/// digits.
fn write_file(cache: &Cache, name: &str, parts: Vec<(String, Matrix)>) -> Result<()> {
    let dtype = |part: &str| match part.starts_with("fisher/") {
        true => FileDtype::BF16,
        false => FileDtype::F32,
    };
    let plan = |(name, m): &(String, Matrix)| {
        PlannedTensor::new(name.clone(), dtype(name), vec![m.rows, m.cols])
    };
    let matrices: BTreeMap<&str, &Matrix> = parts.iter().map(|(n, m)| (n.as_str(), m)).collect();
    let folder = cache.folder();
    for mut file in layout_in_shards(parts.iter().map(plan).collect(), u64::MAX) {
        file.file_name = name.to_string();
        file.write(folder, |part, out| {
            let data = matrices.get(part.name.as_str()).map_or(&[][..], |m| &m.data);
            let fail = |e| IoError::file("write", folder, e);
            for chunk in data.chunks(1 << 16) {
                let bytes: Vec<u8> = match part.dtype {
                    FileDtype::BF16 => {
                        chunk.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
                    }
                    _ => chunk.iter().flat_map(|v| v.to_le_bytes()).collect(),
                };
                out.write_all(&bytes).map_err(fail)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn read_matrix(raw: &RawTensor, name: &str, path: &Path) -> Result<Matrix> {
    let data = raw.weights(name)?.to_vec();
    let [rows, cols] = raw.shape[..] else {
        return Err(IoError::damaged(path, format!("{name} is no matrix")).into());
    };
    match data.iter().position(|v| !v.is_finite()) {
        None => Ok(Matrix { rows, cols, data }),
        Some(at) => Err(PtqError::Tensor {
            tensor: format!("{name} in {}", path.display()),
            source: anybit_core::CoreError::NotFinite {
                what: "sensitivity",
                row: at / cols.max(1),
                col: at % cols.max(1),
                value: data[at].to_string(),
            },
        }),
    }
}

fn scaled(mut matrix: Matrix, factor: f32) -> Matrix {
    matrix.data.iter_mut().for_each(|v| *v *= factor);
    matrix
}
