//! The likeliest tokens of a teacher for every position of a token stream, computed once and stored.
//!
//! ```text
//! 8 bytes    "ABTEACH1"
//! position   k × u32 ids, k × f16 or f32 log-probabilities, f32 logarithm of the tail's mass
//! JSON       the header: key, k, positions, number format, temperature, blake3 of every chunk
//! 40 bytes   length of the header as u64, its blake3
//! ```
//!
//! All little-endian; a chunk is [`CHUNK`] positions. The header stands at the end, so that a file
//! of any size is written in one pass, beside its place, and renamed. Opening it reads all of it
//! once and compares every hash. Log-probabilities that were rounded to f16 are scaled to sum to 1
//! with their tail again when they are read. Called by `cached`.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anybit_io::IoError;
use anybit_io::atomic::{check_space, write_file};
use anybit_io::safetensors_file::map_file;
use half::f16;
use memmap2::Mmap;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::error::{DistillError, Result};
use super::losses::TopK;

const MAGIC: &[u8; 8] = b"ABTEACH1";
/// Positions of a chunk.
pub const CHUNK: u64 = 4096;
/// Bytes after the header.
const FOOTER: usize = 40;
/// A header is longer by its hashes alone: more than this is none.
const HEADER_LIMIT: u64 = 1 << 28;

/// Number format of stored log-probabilities.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StoredAs {
    /// Two bytes, 11 bits of precision.
    #[default]
    F16,
    /// Four bytes, as computed.
    F32,
}

impl StoredAs {
    fn bytes(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// What a cache holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CacheSpec {
    /// Hash of all that its contents depend on: teacher, tokens, context.
    pub key: String,
    /// Tokens per position.
    pub k: usize,
    /// Positions.
    pub positions: u64,
    /// Number format of log-probabilities.
    pub stored_as: StoredAs,
    /// Temperature of the probabilities.
    pub temperature: f64,
}

impl CacheSpec {
    /// Bytes of a position.
    fn record(&self) -> usize {
        self.k * (4 + self.stored_as.bytes()) + 4
    }

    /// Bytes of all positions, `None` when no number holds them.
    fn body(&self) -> Option<u64> {
        let width = 4 + self.stored_as.bytes() as u64;
        let record = (self.k as u64).checked_mul(width)?.checked_add(4)?;
        self.positions.checked_mul(record)
    }

    /// Bytes of the file at most, `u64::MAX` when no number holds them.
    fn file_bytes(&self) -> u64 {
        // A hash takes less than 80 bytes of the header, the rest of it less than 4096.
        let hashes = self.positions.div_ceil(CHUNK).saturating_mul(80);
        self.body().map_or(u64::MAX, |body| body.saturating_add(hashes + 4096))
    }

    /// Fails when a file at `path` would take more than `max_bytes`; returns what it would take.
    ///
    /// # Errors
    /// [`DistillError::CacheSize`].
    pub fn check_size(&self, path: &Path, max_bytes: u64) -> Result<u64> {
        let needed = self.file_bytes();
        match needed > max_bytes {
            true => {
                let path = path.to_owned();
                Err(DistillError::CacheSize { path, needed, limit: max_bytes })
            }
            false => Ok(needed),
        }
    }

    /// The ranges of positions that are filled together, in order.
    pub(super) fn chunks(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let positions = self.positions;
        (0..positions.div_ceil(CHUNK)).map(move |c| c * CHUNK..((c + 1) * CHUNK).min(positions))
    }
}

/// The end of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    spec: CacheSpec,
    /// blake3 of the chunks, in hexadecimal.
    chunks: Vec<String>,
}

/// What of two caches differs, as a phrase.
fn difference(found: &CacheSpec, wanted: &CacheSpec) -> Option<String> {
    let differ = |name: &str, found: String, wanted: String| {
        (found != wanted).then(|| format!("its {name} is {found}, {wanted} is wanted"))
    };
    let stored = |spec: &CacheSpec| format!("{:?}", spec.stored_as).to_lowercase();
    let text = |value: &dyn std::fmt::Display| value.to_string();
    differ("k", text(&found.k), text(&wanted.k))
        .or_else(|| differ("number of positions", text(&found.positions), text(&wanted.positions)))
        .or_else(|| differ("temperature", text(&found.temperature), text(&wanted.temperature)))
        .or_else(|| differ("number format", stored(found), stored(wanted)))
        .or_else(|| differ("key", text(&found.key), text(&wanted.key)))
}

/// Outputs of a teacher on disk, mapped into memory.
#[derive(Debug)]
pub struct TeacherCache {
    path: PathBuf,
    spec: CacheSpec,
    map: Arc<Mmap>,
}

impl TeacherCache {
    /// The cache at `path` when it holds just `spec`; otherwise one is written there. `fill` computes
    /// a range of positions; it is called in order, for whole chunks.
    ///
    /// # Errors
    /// What [`Self::open`] finds in a file that is there, what [`Self::write`] reports.
    pub fn prepare(
        path: &Path,
        spec: &CacheSpec,
        max_bytes: u64,
        fill: &mut dyn FnMut(Range<u64>) -> Result<TopK>,
    ) -> Result<Self> {
        if path.exists() {
            let found = Self::open(path)?;
            if found.spec == *spec {
                return Ok(found);
            }
        }
        Self::write(path, spec, max_bytes, fill)?;
        Self::open(path)
    }

    /// Writes the cache at `path`, whole or not at all, in at most `max_bytes`; `fill` as in
    /// [`Self::prepare`].
    ///
    /// # Errors
    /// A cache over its limit, a full disk, what `fill` reports, outputs that do not fit `spec`.
    pub fn write(
        path: &Path,
        spec: &CacheSpec,
        max_bytes: u64,
        fill: &mut dyn FnMut(Range<u64>) -> Result<TopK>,
    ) -> Result<()> {
        let needed = spec.check_size(path, max_bytes)?;
        check_space(path, needed)?;
        let mut failed = None;
        let written = write_file(path, |out| {
            let mut write =
                |bytes: &[u8]| out.write_all(bytes).map_err(|e| IoError::file("write", path, e));
            write(MAGIC)?;
            let mut hashes = Vec::new();
            for range in spec.chunks() {
                let bytes = match fill(range.clone()).and_then(|top| encode(spec, &range, &top)) {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        let what = error.to_string();
                        failed = Some(error);
                        return Err(IoError::unsupported(path, what));
                    }
                };
                hashes.push(blake3::hash(&bytes).to_hex().to_string());
                write(&bytes)?;
            }
            let header = Header { spec: spec.clone(), chunks: hashes };
            let json =
                serde_json::to_vec(&header).map_err(|e| IoError::damaged(path, e.to_string()))?;
            write(&json)?;
            write(&(json.len() as u64).to_le_bytes())?;
            write(blake3::hash(&json).as_bytes())
        });
        match failed {
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    /// Opens the cache at `path` and compares every hash.
    ///
    /// # Errors
    /// [`DistillError::Cache`] for a file that is truncated or was changed, with the chunk;
    /// [`DistillError::Io`] for one that cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let damaged = |what: String| DistillError::Cache { path: path.to_owned(), what };
        let length = std::fs::metadata(path).map_err(|e| IoError::file("read", path, e))?.len();
        if length < (MAGIC.len() + FOOTER) as u64 {
            return Err(damaged(format!("it has only {length} bytes")));
        }
        let map = map_file(path)?;
        let header = read_header(&map).map_err(damaged)?;
        let (record, spec) = (header.spec.record(), header.spec);
        let check = |(index, hash): (usize, &String)| {
            let first = index as u64 * CHUNK;
            let last = (first + CHUNK).min(spec.positions);
            let start = MAGIC.len() + first as usize * record;
            let bytes = &map[start..start + (last - first) as usize * record];
            match blake3::hash(bytes).to_hex().as_str() == hash {
                true => Ok(()),
                false => Err(damaged(format!(
                    "chunk {index} (positions {first} to {last}) does not match its hash"
                ))),
            }
        };
        let found: Vec<Result<()>> = header.chunks.par_iter().enumerate().map(check).collect();
        // The first in the order of the file, on any number of threads.
        found.into_iter().collect::<Result<()>>()?;
        Ok(Self { path: path.to_owned(), spec, map })
    }

    /// [`Self::open`], of a cache that must hold just `spec`.
    ///
    /// # Errors
    /// As there; [`DistillError::CacheForeign`].
    pub fn open_of(path: &Path, spec: &CacheSpec) -> Result<Self> {
        let found = Self::open(path)?;
        match difference(&found.spec, spec) {
            None => Ok(found),
            Some(what) => Err(DistillError::CacheForeign { path: path.to_owned(), what }),
        }
    }

    /// What it holds.
    pub fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    /// The outputs at some positions.
    ///
    /// # Errors
    /// Positions beyond the last.
    pub fn read(&self, positions: Range<u64>) -> Result<TopK> {
        let CacheSpec { k, positions: all, temperature, stored_as, .. } = self.spec;
        if positions.start > positions.end || positions.end > all {
            let what = format!(
                "{}: positions {positions:?} of a teacher cache with {all}; cache more of them",
                self.path.display()
            );
            return Err(DistillError::input("teacher", what));
        }
        let count = (positions.end - positions.start) as usize;
        let record = self.spec.record();
        let start = MAGIC.len() + positions.start as usize * record;
        let mut top = TopK::with_capacity(count, k, temperature);
        for bytes in self.map[start..start + count * record].chunks_exact(record) {
            decode(bytes, k, stored_as, &mut top);
        }
        Ok(top)
    }
}

/// The bytes of the positions `range`.
fn encode(spec: &CacheSpec, range: &Range<u64>, top: &TopK) -> Result<Vec<u8>> {
    let tokens = (range.end - range.start) as usize;
    let fits = top.k == spec.k && top.tail.len() == tokens && top.temperature == spec.temperature;
    let values = tokens * spec.k;
    if !fits || top.ids.len() != values || top.log_probs.len() != values {
        let what = format!(
            "outputs for positions {range:?} are of {} tokens, k = {}, temperature {}; {tokens}, {} \
             and {} are needed",
            top.tail.len(),
            top.k,
            top.temperature,
            spec.k,
            spec.temperature
        );
        return Err(DistillError::input("teacher", what));
    }
    let mut bytes = Vec::with_capacity(tokens * spec.record());
    for token in 0..tokens {
        let part = token * spec.k..(token + 1) * spec.k;
        bytes.extend(top.ids[part.clone()].iter().flat_map(|id| id.to_le_bytes()));
        let logs = top.log_probs[part].iter();
        match spec.stored_as {
            StoredAs::F16 => bytes.extend(logs.flat_map(|l| f16::from_f32(*l).to_le_bytes())),
            StoredAs::F32 => bytes.extend(logs.flat_map(|l| l.to_le_bytes())),
        }
        bytes.extend(top.tail[token].to_le_bytes());
    }
    Ok(bytes)
}

fn f32_at(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// Adds one position.
fn decode(bytes: &[u8], k: usize, stored_as: StoredAs, top: &mut TopK) {
    let (ids, rest) = bytes.split_at(4 * k);
    let (logs, tail) = rest.split_at(stored_as.bytes() * k);
    top.ids.extend(ids.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    let tail = f32_at(tail);
    match stored_as {
        StoredAs::F32 => {
            top.log_probs.extend(logs.chunks_exact(4).map(f32_at));
            top.tail.push(tail);
        }
        StoredAs::F16 => {
            let logs = logs.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32());
            let sum: f64 = logs.clone().chain([tail]).map(|l| (l as f64).exp()).sum();
            let log = sum.ln() as f32;
            top.log_probs.extend(logs.map(|l| l - log));
            top.tail.push(tail - log);
        }
    }
}

/// The header, checked against the file's length.
fn read_header(file: &[u8]) -> std::result::Result<Header, String> {
    if !file.starts_with(MAGIC) {
        return Err("it does not begin as a teacher cache does".into());
    }
    let (rest, footer) = file.split_at(file.len() - FOOTER);
    let (length, hash) = footer.split_at(8);
    let length = length.iter().rev().fold(0u64, |n, byte| (n << 8) | u64::from(*byte));
    if length > HEADER_LIMIT || length as usize > rest.len() - MAGIC.len() {
        return Err(format!("its header would be of {length} bytes"));
    }
    let (body, json) = rest.split_at(rest.len() - length as usize);
    if blake3::hash(json).as_bytes().as_slice() != hash {
        return Err("its header does not match its hash".into());
    }
    let header: Header =
        serde_json::from_slice(json).map_err(|e| format!("its header cannot be read: {e}"))?;
    let body = (body.len() - MAGIC.len()) as u64;
    let chunks = header.spec.positions.div_ceil(CHUNK);
    if header.spec.body() != Some(body) || header.chunks.len() as u64 != chunks {
        return Err(format!("it has {body} bytes of outputs, its header says otherwise"));
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    fn spec(positions: u64, stored_as: StoredAs) -> CacheSpec {
        CacheSpec { key: "a".into(), k: 3, positions, stored_as, temperature: 1.0 }
    }

    fn outputs(range: Range<u64>) -> TopK {
        let rows = (range.end - range.start) as usize;
        TopK::from_logits(&random(range.start, [rows, 10]), 3, 1.0)
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("teacher");
        // More than a chunk.
        for stored_as in [StoredAs::F32, StoredAs::F16] {
            let spec = spec(CHUNK + 100, stored_as);
            let mut calls = 0;
            let mut fill = |range| {
                calls += 1;
                Ok(outputs(range))
            };
            let cache = TeacherCache::prepare(&path, &spec, 1 << 30, &mut fill).unwrap();
            let again = TeacherCache::prepare(&path, &spec, 1 << 30, &mut fill).unwrap();
            assert_eq!((calls, again.spec()), (2, &spec));
            let want = outputs(CHUNK..CHUNK + 100);
            let got = cache.read(CHUNK..CHUNK + 100).unwrap();
            assert_eq!(got.ids, want.ids);
            if stored_as == StoredAs::F32 {
                assert_eq!(got, want);
            }
            for (token, tail) in got.tail.iter().enumerate() {
                let logs = &got.log_probs[token * 3..][..3];
                let sum: f32 = logs.iter().map(|l| l.exp()).sum();
                approx::assert_abs_diff_eq!(sum + tail.exp(), 1.0, epsilon = 1e-5);
            }
            for (a, b) in got.log_probs.iter().zip(&want.log_probs) {
                approx::assert_abs_diff_eq!(*a, *b, epsilon = 5e-3);
            }
            assert!(cache.read(CHUNK..CHUNK + 101).is_err());
            assert_eq!(cache.read(5..5).unwrap().tokens(), 0);
        }
    }

    #[test]
    fn another_key_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("teacher");
        let first = spec(5, StoredAs::F16);
        let second = CacheSpec { key: "b".into(), ..first.clone() };
        for spec in [&first, &second] {
            let cache =
                TeacherCache::prepare(&path, spec, 1 << 30, &mut |r| Ok(outputs(r))).unwrap();
            assert_eq!(cache.spec(), spec);
        }
    }

    #[test]
    fn what_is_foreign_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("teacher");
        let own = spec(5, StoredAs::F16);
        TeacherCache::write(&path, &own, 1 << 30, &mut |r| Ok(outputs(r))).unwrap();
        TeacherCache::open_of(&path, &own).unwrap();
        for (wanted, part) in [
            (CacheSpec { key: "b".into(), ..own.clone() }, "its key is a, b is wanted"),
            (CacheSpec { k: 4, ..own.clone() }, "its k is 3, 4 is wanted"),
            (CacheSpec { positions: 6, ..own.clone() }, "positions is 5, 6"),
            (CacheSpec { temperature: 2.0, ..own.clone() }, "temperature is 1, 2"),
            (CacheSpec { stored_as: StoredAs::F32, ..own.clone() }, "format is f16, f32"),
        ] {
            let error = TeacherCache::open_of(&path, &wanted).unwrap_err();
            assert!(matches!(error, DistillError::CacheForeign { .. }));
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn damage_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("teacher");
        let spec = spec(CHUNK + 100, StoredAs::F32);
        TeacherCache::write(&path, &spec, 1 << 30, &mut |r| Ok(outputs(r))).unwrap();
        let good = std::fs::read(&path).unwrap();
        let error = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            let error = TeacherCache::open(&path).unwrap_err().to_string();
            assert!(error.contains("delete this file") && error.contains("teacher"), "{error}");
            error
        };
        for cut in [0, 20, 1000, good.len() / 2, good.len() - 1] {
            error(&good[..cut]);
        }
        let changed = |at: usize| {
            let mut bytes = good.clone();
            bytes[at] ^= 4;
            bytes
        };
        assert!(error(&changed(100)).contains("chunk 0"));
        let second = MAGIC.len() + CHUNK as usize * spec.record() + 9;
        assert!(error(&changed(second)).contains("chunk 1"));
        assert!(error(&changed(0)).contains("begin"));
        for at in [good.len() - 1, good.len() - 36, good.len() - 60] {
            assert!(error(&changed(at)).contains("header"));
        }
        std::fs::write(&path, &good).unwrap();
        TeacherCache::open(&path).unwrap();
    }

    #[test]
    fn a_failed_or_too_large_cache_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("teacher");
        let spec = spec(CHUNK * 2, StoredAs::F16);
        let error = TeacherCache::write(&path, &spec, 1000, &mut |r| Ok(outputs(r))).unwrap_err();
        assert!(error.to_string().contains("limit of 1000"), "{error}");
        let mut fail = |range: Range<u64>| match range.start {
            0 => Ok(outputs(range)),
            _ => Err(DistillError::input("teacher", "on purpose")),
        };
        let error = TeacherCache::write(&path, &spec, 1 << 30, &mut fail).unwrap_err();
        assert!(error.to_string().contains("on purpose"), "{error}");
        let mut short = |_: Range<u64>| Ok(outputs(0..7));
        let error = TeacherCache::write(&path, &spec, 1 << 30, &mut short).unwrap_err();
        assert!(error.to_string().contains("7 tokens"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let huge = CacheSpec { positions: u64::MAX, ..spec };
        let error = TeacherCache::write(&path, &huge, u64::MAX - 1, &mut short).unwrap_err();
        assert!(matches!(error, DistillError::CacheSize { .. }));
    }
}
