//! [`CachedTeacher`]: the teachers' outputs for all sequences of a training, computed before its
//! first step or read from an earlier run.
//!
//! ```text
//! sequences    those that training comes to, by their numbers, ascending
//! key          blake3 of the teachers' weights, the tokens, mixture, temperature, k, number format
//! file         DIR/KEY.teacher, see [`super::teacher_cache`]; DIR/KEY.lock is locked meanwhile
//! ```
//!
//! Whether the file fits its limit is known from the number of sequences, before anything is hashed
//! or computed. With several ranks each computes a part of every group of sequences, rank 0 writes,
//! and all read the same file; each takes its own sequences from it. Called by the trainer where a
//! recipe has `distill.cache`.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anybit_io::IoError;
use anybit_io::atomic::check_space;
use anybit_io::native::MANIFEST;
use anybit_io::safetensors_file::map_file;
use anybit_io::size;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::{DistillError, Result};
use super::teachers::{self, Teachers};
use super::{CacheSpec, DistillRecipe, StoredAs, TeacherCache, TopK};
use crate::train::corpus::Corpus;
use crate::train::data::Order;
use crate::train::distributed::{Communicator, same_everywhere};

/// Tokens that a rank runs through the teachers at a time, in whole sequences.
const GROUP: usize = 1024;
/// Bytes of a file that are hashed as one.
const HASHED: usize = 1 << 24;

/// The key `cache` of the section `distill`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheRecipe {
    /// Folder of caches; runs may share it.
    pub dir: PathBuf,
    /// Most bytes of a cache, as a number or a text such as "2GiB".
    #[serde(default = "four_gib", deserialize_with = "size::deserialize")]
    pub max_bytes: u64,
    /// Likeliest tokens that are kept of every position; the others are kept as one.
    #[serde(default = "sixty_four")]
    pub top_k: usize,
    /// Number format of log-probabilities.
    #[serde(default)]
    pub stored_as: StoredAs,
}

fn four_gib() -> u64 {
    4 << 30
}

fn sixty_four() -> usize {
    64
}

/// Numbers of the sequences that the first `positions` of training come to, ascending.
fn sequences(order: &mut Order, positions: u64) -> Vec<u32> {
    let windows = order.windows() as u64;
    if positions >= windows {
        return (0..windows as u32).collect();
    }
    let mut all: Vec<u32> = (0..positions).map(|position| order.at(position) as u32).collect();
    all.sort_unstable();
    all
}

/// Hash of a file, by pieces on all threads.
fn hash_file(path: &Path) -> Result<blake3::Hash> {
    let map = map_file(path)?;
    let pieces: Vec<blake3::Hash> = map.par_chunks(HASHED).map(blake3::hash).collect();
    let mut hash = blake3::Hasher::new();
    pieces.iter().for_each(|piece| {
        hash.update(piece.as_bytes());
    });
    Ok(hash.finalize())
}

/// Hash of what a checkpoint's outputs depend on: its weights and its configuration.
fn hash_checkpoint(path: &Path) -> Result<blake3::Hash> {
    if !path.is_dir() {
        return hash_file(path);
    }
    let fail = |e| IoError::file("read", path, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(fail)? {
        let name = entry.map_err(fail)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") || name == "config.json" || name == MANIFEST {
            names.push(name);
        }
    }
    names.sort_unstable();
    let mut hash = blake3::Hasher::new();
    for name in names {
        hash.update(name.as_bytes());
        hash.update(hash_file(&path.join(name))?.as_bytes());
    }
    Ok(hash.finalize())
}

/// What a training needs of a cache that may not be there yet.
pub(crate) struct CachePlan<'a> {
    recipe: &'a DistillRecipe,
    cache: &'a CacheRecipe,
    corpus: &'a Corpus,
    spec: CacheSpec,
    sequences: Vec<u32>,
    order: Order,
    vocab: usize,
    seqlen: usize,
}

impl<'a> CachePlan<'a> {
    /// The plan for `positions` sequences of `seqlen` tokens; `None` for a recipe without a cache.
    /// Takes no longer than to read the header of a teacher.
    ///
    /// # Errors
    /// A cache over its limit; a teacher that cannot be opened.
    pub fn new(
        recipe: &'a DistillRecipe,
        corpus: &'a Corpus,
        positions: u64,
        seqlen: usize,
    ) -> crate::train::Result<Option<Self>> {
        let (Some(cache), Some(first)) = (&recipe.cache, recipe.teachers.first()) else {
            return Ok(None);
        };
        let vocab = anybit_io::Checkpoint::open(first)?.config.vocab_size;
        let mut order = corpus.order();
        let sequences = sequences(&mut order, positions);
        let spec = CacheSpec {
            key: String::new(),
            k: cache.top_k.min(vocab),
            positions: sequences.len() as u64 * seqlen as u64,
            stored_as: cache.stored_as,
            temperature: recipe.loss.temperature(),
        };
        spec.check_size(&cache.dir, cache.max_bytes)?;
        Ok(Some(Self { recipe, cache, corpus, spec, sequences, order, vocab, seqlen }))
    }

    /// Opens the cache; makes it first when it is not there. `watch` hears of sequences whose
    /// outputs were computed, and of how many there are; of none when the cache was there.
    /// Called by all ranks.
    ///
    /// # Errors
    /// Teachers that do not fit a student of `vocab` tokens; a cache that is damaged or foreign; a
    /// disk that is full; ranks with other files.
    pub fn prepare(
        mut self,
        vocab: usize,
        comm: &mut dyn Communicator,
        watch: &mut dyn FnMut(u64, u64),
    ) -> crate::train::Result<CachedTeacher> {
        for path in &self.recipe.teachers {
            teachers::open(path, vocab)?;
        }
        let key = self.key()?;
        same_everywhere(comm, "what distill.cache is of", *key.as_bytes())?;
        self.spec.key = key.to_hex().to_string();
        let file = |end: &str| self.cache.dir.join(format!("{}.{end}", &self.spec.key[..16]));
        let (path, lock_path) = (file("teacher"), file("lock"));
        let lock = match comm.rank() {
            0 => Some(self.lock(&lock_path)?),
            _ => None,
        };
        // What rank 0 sees counts: it alone writes, and another run may have been faster.
        let found = comm.gather(&[u8::from(lock.is_some() && path.exists())])?;
        if found.first() == Some(&0) {
            self.make(&path, comm, watch)?;
            comm.barrier()?;
        }
        let cache = TeacherCache::open_of(&path, &self.spec)?;
        drop(lock);
        let Self { order, sequences, seqlen, .. } = self;
        Ok(CachedTeacher { cache, order, sequences, seqlen })
    }

    /// Waits until no other run makes this cache.
    fn lock(&self, path: &Path) -> Result<File> {
        let dir = &self.cache.dir;
        fs::create_dir_all(dir).map_err(|e| IoError::file("create", dir, e))?;
        let fail = |e| IoError::file("create", path, e);
        let lock = File::create(path).map_err(fail)?;
        lock.lock().map_err(fail)?;
        Ok(lock)
    }

    /// Hash of all that the contents depend on.
    fn key(&self) -> Result<blake3::Hash> {
        let mut hash = blake3::Hasher::new();
        hash.update(b"anybit teacher cache 1");
        for path in &self.recipe.teachers {
            hash.update(hash_checkpoint(path)?.as_bytes());
        }
        hash.update(&self.corpus.inputs_key(&self.sequences));
        let settings = serde_json::to_vec(&(self.recipe.mixture, &self.spec))
            .map_err(|e| DistillError::input("cache", e.to_string()))?;
        hash.update(&settings);
        Ok(hash.finalize())
    }

    /// Computes the cache at `path`, with all ranks.
    fn make(
        &self,
        path: &Path,
        comm: &mut dyn Communicator,
        watch: &mut dyn FnMut(u64, u64),
    ) -> crate::train::Result<()> {
        let limit = self.cache.max_bytes;
        if comm.rank() == 0 {
            // Before the teachers are loaded, not after.
            check_space(path, self.spec.check_size(path, limit)?)?;
        }
        let teachers = Teachers::load(self.recipe, self.vocab, self.seqlen)?;
        let writes = comm.rank() == 0;
        let pending = TopK::with_capacity(0, self.spec.k, self.spec.temperature);
        let mut filling = Filling { plan: self, teachers, comm, watch, done: 0, pending };
        let mut fill = |range: Range<u64>| filling.rows((range.end - range.start) as usize);
        match writes {
            true => TeacherCache::write(path, &self.spec, limit, &mut fill)?,
            false => self.spec.chunks().try_for_each(|range| fill(range).map(|_| ()))?,
        }
        Ok(())
    }
}

/// A cache being computed.
struct Filling<'a> {
    plan: &'a CachePlan<'a>,
    teachers: Teachers,
    comm: &'a mut dyn Communicator,
    watch: &'a mut dyn FnMut(u64, u64),
    /// Sequences that were run through the teachers.
    done: usize,
    /// Their outputs that were not asked for yet.
    pending: TopK,
}

impl Filling<'_> {
    /// The outputs of the next `tokens` positions.
    fn rows(&mut self, tokens: usize) -> Result<TopK> {
        while self.pending.tokens() < tokens && self.done < self.plan.sequences.len() {
            self.group()?;
        }
        Ok(self.pending.take_front(tokens))
    }

    /// Runs the next group of sequences, each rank its part.
    fn group(&mut self) -> Result<()> {
        let CachePlan { corpus, sequences, seqlen, spec, .. } = self.plan;
        let left = sequences.len() - self.done;
        let (rank, ranks) = (self.comm.rank(), self.comm.size());
        let part = (GROUP / seqlen).max(1).min(left.div_ceil(ranks));
        let first = self.done + rank * part;
        // Parts are of one size for all ranks: what is beyond the end repeats the last sequence.
        let at = |i: usize| sequences[i.min(sequences.len() - 1)];
        let own: Vec<u32> = (first..first + part).map(at).collect();
        let top = self.teachers.top_k(&corpus.inputs(&own), spec.k)?;
        let mut all = gather(self.comm, top)?;
        let new = left.min(ranks * part);
        self.pending.extend(&all.take_front(new * seqlen));
        self.done += new;
        (self.watch)(self.done as u64, sequences.len() as u64);
        Ok(())
    }
}

/// The positions of all ranks, in their order; as many from each.
fn gather(comm: &mut dyn Communicator, top: TopK) -> Result<TopK> {
    if comm.size() == 1 {
        return Ok(top);
    }
    let ids = comm.gather(bytemuck::cast_slice(&top.ids))?;
    let ids = ids.chunks_exact(4).map(bytemuck::pod_read_unaligned::<u32>).collect();
    let mut floats = |values: &[f32]| -> Result<Vec<f32>> {
        let all = comm.gather(bytemuck::cast_slice(values))?;
        Ok(all.chunks_exact(4).map(bytemuck::pod_read_unaligned::<f32>).collect())
    };
    let (log_probs, tail) = (floats(&top.log_probs)?, floats(&top.tail)?);
    Ok(TopK { ids, log_probs, tail, ..top })
}

/// The teachers' outputs on disk.
pub(crate) struct CachedTeacher {
    cache: TeacherCache,
    order: Order,
    /// Numbers of the sequences in the cache, ascending.
    sequences: Vec<u32>,
    seqlen: usize,
}

impl CachedTeacher {
    /// Outputs for the sequences at these positions of training.
    ///
    /// # Errors
    /// Positions beyond the training that the cache was made for.
    pub fn outputs(&mut self, positions: Range<u64>) -> Result<TopK> {
        let CacheSpec { k, temperature, .. } = *self.cache.spec();
        let seqlen = self.seqlen as u64;
        let tokens = (positions.end - positions.start) as usize * self.seqlen;
        let mut all = TopK::with_capacity(tokens, k, temperature);
        for position in positions {
            let sequence = self.order.at(position) as u32;
            let Ok(slot) = self.sequences.binary_search(&sequence) else {
                let what = format!("sequence {sequence} is not in the cache; make it again");
                return Err(DistillError::input("teacher", what));
            };
            let first = slot as u64 * seqlen;
            all.extend(&self.cache.read(first..first + seqlen)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::train::distributed::ThreadGroup;

    #[test]
    fn sizes_are_numbers_or_texts() {
        let read = |text: &str| serde_json::from_str::<CacheRecipe>(text);
        let cache = read(r#"{"dir": "c"}"#).unwrap();
        assert_eq!((cache.max_bytes, cache.top_k), (4 << 30, 64));
        assert_eq!(read(r#"{"dir": "c", "max_bytes": 17}"#).unwrap().max_bytes, 17);
        let text = read(r#"{"dir": "c", "max_bytes": "2GiB", "stored_as": "f32"}"#).unwrap();
        assert_eq!((text.max_bytes, text.stored_as), (2 << 30, StoredAs::F32));
        assert_eq!(read(&serde_json::to_string(&text).unwrap()).unwrap(), text);
        let error = read(r#"{"dir": "c", "max_bytes": "2TB"}"#).unwrap_err().to_string();
        assert!(error.contains("unknown unit"), "{error}");
        assert!(read(r#"{"dir": "c", "bytes": 1}"#).is_err());
    }

    #[test]
    fn only_what_training_comes_to_is_cached() {
        let mut order = Order::new(50, 3);
        let some = sequences(&mut order, 20);
        assert!(some.len() == 20 && some.is_sorted());
        for position in 0..20 {
            assert!(some.binary_search(&(order.at(position) as u32)).is_ok());
        }
        let all: Vec<u32> = (0..50).collect();
        assert_eq!(sequences(&mut order, 50), all);
        assert_eq!(sequences(&mut order, 5000), all);
    }

    #[test]
    fn parts_of_ranks_come_in_their_order() {
        let part = |rank: usize| TopK::from_logits(&random(rank as u64, [3, 8]), 2, 1.0);
        let mut ranks = ThreadGroup::ranks(3);
        let found: Vec<TopK> = std::thread::scope(|scope| {
            let one = |rank: &mut crate::train::distributed::ThreadRank| {
                let own = part(rank.rank());
                gather(rank, own).unwrap()
            };
            let threads: Vec<_> =
                ranks.iter_mut().map(|rank| scope.spawn(move || one(rank))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let mut want = part(0);
        want.extend(&part(1));
        want.extend(&part(2));
        assert!(found.iter().all(|top| *top == want));
    }

    #[test]
    fn what_a_checkpoint_computes_is_hashed() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("config.json", "{}");
        write("model.safetensors", "weights");
        let first = hash_checkpoint(dir.path()).unwrap();
        write("README.md", "words");
        assert_eq!(hash_checkpoint(dir.path()).unwrap(), first);
        write("model.safetensors", "Weights");
        assert_ne!(hash_checkpoint(dir.path()).unwrap(), first);
        assert!(hash_checkpoint(&dir.path().join("none.gguf")).is_err());
    }
}
