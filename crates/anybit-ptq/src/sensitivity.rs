//! Sensitivities of a model's weights ([`anybit_grad::sensitivities`]) in the cache: computed once,
//! read back block by block.
//!
//! Units: with sequences of `T` tokens and losses multiplied by [`GRADIENT_SCALE`], token weights
//! and lookups are scaled by `T / (2 N scale²)` over `N` sequences. Then, for labels drawn from the
//! model, `r H rᵀ` is the KL divergence that the error `r` of one row causes, in nats per token. The
//! Fisher diagonal is left as it is: only its ratios within a row count.

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{Gram, Matrix};
use anybit_grad::{
    BlockSensitivity as Raw, EmbeddingSensitivity, GRADIENT_SCALE, SensitivityOptions,
    sensitivities,
};
use anybit_io::safetensors_file::{FileDtype, PlannedTensor, RawTensor, layout, open_file};
use anybit_io::{Checkpoint, IoError};
use half::bf16;
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::site::{Needs, SiteKind, Statistics};
use crate::stages::{Observer, TokenWeights};
use crate::{Calibration, Event, PtqError, Recipe, Result};

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
    loss: f64,
    sequences: usize,
    seqlen: usize,
}

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
        // What depends on all sequences, the head's Gram matrices, is kept apart below.
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
        let mut progress = |done, total| observe(Event::Gradients(done, total));
        let mut on_block =
            |index: usize, block: Raw| -> Result<()> { write_block(&cache, index, block) };
        let model = sensitivities(checkpoint, sequences, options, &mut on_block, &mut progress)?;
        if let Some(embedding) = &model.embedding {
            write_embedding(&cache, embedding)?;
        }
        let (loss, seqlen) = (model.loss, calibration.seqlen());
        let done = Done { loss, sequences: sequences.len(), seqlen };
        cache.write("done.json", &done)?;
        Ok(Some(Self { cache, done }))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.cache.folder()
    }

    /// Mean loss of the original model on the gradient sequences, in nats per token.
    pub fn loss(&self) -> f64 {
        self.done.loss
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

    /// What is known of embedding and head, if it was asked for; `normed` gives the final hidden
    /// states, normalized, of each gradient sequence, for the first time that it is needed.
    ///
    /// # Errors
    /// As [`Self::block`].
    pub fn vocabulary(&self) -> Result<Option<VocabStatistics>> {
        let path = self.cache.path("embedding.safetensors");
        if !path.exists() {
            return Ok(None);
        }
        let file = open_file(&path)?;
        let find = |name: &str| -> Result<Matrix> {
            let raw = file.get(name).ok_or_else(|| {
                IoError::damaged(&path, format!("it holds no {name}"))
            })?;
            read_matrix(raw, name, &path)
        };
        // Row weights are means over sequences already; lookups too.
        let per_sequence = self.unit() * self.done.sequences as f32;
        let rows = find("rows")?.data;
        let lookups = scaled(find("lookups")?, per_sequence);
        let head = self.head_grams()?;
        Ok(Some(VocabStatistics { head, rows, lookups }))
    }

    /// Guided Gram matrices of the head's row groups.
    fn head_grams(&self) -> Result<Vec<Gram>> {
        let path = self.cache.path("head.safetensors");
        let mut grams = Vec::new();
        for (name, raw) in open_file(&path)? {
            let matrix = read_matrix(&raw, &name, &path)?;
            let n = ((matrix.data.len() * 2) as f64).sqrt() as usize;
            grams.push(Gram::from_upper(n, &matrix.data, self.done.sequences * self.done.seqlen));
        }
        Ok(grams)
    }

    /// Whether the head's Gram matrices have yet to be taken, from final hidden states.
    pub fn wants_head(&self) -> bool {
        self.cache.path("embedding.safetensors").exists()
            && !self.cache.path("head.safetensors").exists()
    }

    /// Takes the head's Gram matrices from the final hidden states, normalized, sequence after
    /// sequence.
    ///
    /// # Errors
    /// What reading and writing report.
    pub fn write_head(&self, normed: &[f32], hidden: usize) -> Result<()> {
        let path = self.cache.path("embedding.safetensors");
        let file = open_file(&path)?;
        let raw = file.get("tokens").ok_or_else(|| IoError::damaged(&path, "it holds no tokens"))?;
        let weights = scaled(read_matrix(raw, "tokens", &path)?, self.unit());
        let seqlen = self.done.seqlen;
        let named = vec![(VOCABULARY, &weights)];
        let mut observer = Observer::of(hidden, seqlen, Needs::default(), named);
        normed.chunks_exact(seqlen * hidden).for_each(|x| observer.add(x));
        let statistics = observer.finish();
        let grams = statistics.guided.get(VOCABULARY).map(Vec::as_slice).unwrap_or_default();
        let parts = grams.iter().enumerate().map(|(k, gram)| {
            let data = gram.to_upper().0;
            (format!("{k:04}"), Matrix { rows: 1, cols: data.len(), data })
        });
        write_file(&self.cache, "head.safetensors", parts.collect(), false)
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

fn write_block(cache: &Cache, index: usize, block: Raw) -> Result<()> {
    let mut parts: Vec<(String, Matrix)> = Vec::new();
    parts.extend(block.fisher.into_iter().map(|(name, m)| (format!("fisher/{name}"), m)));
    let tokens = block.tokens.into_iter().flatten();
    parts.extend(tokens.map(|(name, m)| (format!("tokens/{name}"), m)));
    write_file(cache, &block_file(index), parts, true)
}

fn write_embedding(cache: &Cache, embedding: &EmbeddingSensitivity) -> Result<()> {
    let EmbeddingSensitivity { rows, tokens, lookups } = embedding;
    let rows = Matrix { rows: 1, cols: rows.len(), data: rows.clone() };
    let parts =
        [("rows", rows), ("tokens", tokens.clone()), ("lookups", lookups.clone())].map(|(n, m)| (n.into(), m));
    write_file(cache, "embedding.safetensors", parts.into(), false)
}

/// Writes matrices; Fisher diagonals as bf16 where `short`, since k-means needs ratios of their
/// sizes and no more digits.
fn write_file(cache: &Cache, name: &str, parts: Vec<(String, Matrix)>, short: bool) -> Result<()> {
    let dtype = |part: &str| match short && part.starts_with("fisher/") {
        true => FileDtype::BF16,
        false => FileDtype::F32,
    };
    let plan = |(name, m): &(String, Matrix)| {
        PlannedTensor::new(name.clone(), dtype(name), vec![m.rows, m.cols])
    };
    let matrices: BTreeMap<&str, &Matrix> = parts.iter().map(|(n, m)| (n.as_str(), m)).collect();
    let folder = cache.folder();
    for mut file in layout(parts.iter().map(plan).collect()) {
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
