//! Safetensors: checked reading of single and sharded files, and a writer that knows every byte
//! of the layout before it writes the first.
//!
//! Layout: `u64` header length, a JSON header padded with spaces to 8 bytes, the data. Tensors
//! are ordered by falling element size, then name, so that each starts aligned.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
pub use safetensors::Dtype as FileDtype;
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

use crate::tensor::{RowOrder, release_pages};
use crate::{Dtype, IoError, Result, StoredTensor};

/// Shards grow to this many bytes.
pub const SHARD_BYTES: u64 = 4_000_000_000;

/// One tensor as it lies in a file.
#[derive(Clone, Debug)]
pub struct RawTensor {
    map: Arc<Mmap>,
    /// File that holds it.
    pub path: PathBuf,
    offset: usize,
    len: usize,
    /// Element type.
    pub dtype: FileDtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl RawTensor {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.offset..self.offset + self.len]
    }

    /// [`StoredTensor::release`].
    pub fn release(&self) {
        release_pages(&self.map, self.offset, self.len);
    }

    /// The tensor as weights.
    ///
    /// # Errors
    /// [`IoError::Unsupported`] for an element type that is not F32, F16 or BF16.
    pub fn weights(&self, name: &str) -> Result<StoredTensor> {
        let dtype = match self.dtype {
            FileDtype::F32 => Dtype::F32,
            FileDtype::F16 => Dtype::F16,
            FileDtype::BF16 => Dtype::BF16,
            other => {
                let what =
                    format!("tensor {name} has element type {other:?}; supported: F32, F16, BF16");
                return Err(IoError::unsupported(&self.path, what));
            }
        };
        let (map, shape) = (self.map.clone(), self.shape.clone());
        StoredTensor::new(map, self.offset, dtype, shape, RowOrder::Natural)
            .ok_or_else(|| IoError::damaged(&self.path, format!("tensor {name} does not fit")))
    }
}

/// Maps a file for reading.
///
/// # Errors
/// What the operating system refuses.
pub fn map_file(path: &Path) -> Result<Arc<Mmap>> {
    let file = File::open(path).map_err(|e| IoError::file("read", path, e))?;
    // SAFETY: the mapping is read-only. A file changed by another process while it is mapped can
    // change the values that are read; hashes find that, and no value is trusted as an index.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| IoError::file("read", path, e))?;
    Ok(Arc::new(map))
}

/// Reads the header of one file.
///
/// # Errors
/// [`IoError::Damaged`] for anything that is not a complete safetensors file.
pub fn open_file(path: &Path) -> Result<BTreeMap<String, RawTensor>> {
    let map = map_file(path)?;
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|e| IoError::damaged(path, format!("not a complete safetensors file ({e})")))?;
    let start = header + 8;
    let mut tensors = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let (begin, end) = info.data_offsets;
        let fits = begin <= end && start.checked_add(end).is_some_and(|end| end <= map.len());
        if !fits {
            let what = format!("tensor {name} lies at {begin}..{end}, outside the file");
            return Err(IoError::damaged(path, what));
        }
        let raw = RawTensor {
            map: map.clone(),
            path: path.to_owned(),
            offset: start + begin,
            len: end - begin,
            dtype: info.dtype,
            shape: info.shape.clone(),
        };
        tensors.insert(name, raw);
    }
    Ok(tensors)
}

/// Reads the headers of a folder: the files of `model.safetensors.index.json` when there is one,
/// otherwise every `*.safetensors`.
///
/// # Errors
/// No such files, a damaged one, an index that names missing files or tensors, or one tensor in
/// two files.
pub fn open_folder(folder: &Path) -> Result<BTreeMap<String, RawTensor>> {
    let index_path = folder.join("model.safetensors.index.json");
    let index = match index_path.exists() {
        true => Some(read_index(&index_path)?),
        false => None,
    };
    let files: Vec<PathBuf> = match &index {
        Some(index) => {
            let names: std::collections::BTreeSet<&String> = index.values().collect();
            names.into_iter().map(|n| folder.join(n)).collect()
        }
        None => list_safetensors(folder)?,
    };
    if files.is_empty() {
        let what = "it holds no *.safetensors".to_string();
        return Err(IoError::NoCheckpoint { path: folder.to_owned(), what });
    }
    let mut all = BTreeMap::new();
    for file in files {
        for (name, raw) in open_file(&file)? {
            if all.contains_key(&name) {
                return Err(IoError::damaged(&file, format!("tensor {name} is in two files")));
            }
            all.insert(name, raw);
        }
    }
    for (name, file) in index.iter().flatten() {
        if !all.contains_key(name) {
            let what = format!("the index places tensor {name} in {file}, where it is not");
            return Err(IoError::damaged(&index_path, what));
        }
    }
    Ok(all)
}

fn list_safetensors(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| IoError::file("read", folder, e))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    Ok(files)
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let bad = |what: String| IoError::damaged(path, what);
    let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
    let value: Value = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    let map = value["weight_map"].as_object().ok_or_else(|| bad("no weight_map".into()))?;
    map.iter()
        .map(|(name, file)| {
            let plain = file.as_str().filter(|f| {
                let only = Path::new(f).components().count() == 1;
                only && Path::new(f).file_name().is_some()
            });
            let file = plain
                .ok_or_else(|| bad(format!("tensor {name}: {file} is not a plain file name")))?;
            Ok((name.clone(), file.to_string()))
        })
        .collect()
}

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq)]
pub struct PlannedTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: FileDtype,
    /// Shape.
    pub shape: Vec<usize>,
}

impl PlannedTensor {
    /// A tensor to write.
    pub fn new(name: impl Into<String>, dtype: FileDtype, shape: Vec<usize>) -> Self {
        Self { name: name.into(), dtype, shape }
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * self.dtype.bitsize() as u64 / 8
    }
}

/// The layout of one file: which tensors, where, and how large the file is.
#[derive(Debug, Clone)]
pub struct FileLayout {
    /// File name.
    pub file_name: String,
    /// Tensors in file order.
    pub tensors: Vec<PlannedTensor>,
    header: Vec<u8>,
}

impl FileLayout {
    fn new(file_name: String, tensors: Vec<PlannedTensor>) -> Self {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut offset = 0u64;
        for t in &tensors {
            let end = offset + t.bytes();
            let dtype = t.dtype.to_string();
            let entry = json!({"dtype": dtype, "shape": t.shape, "data_offsets": [offset, end]});
            header.insert(t.name.clone(), entry);
            offset = end;
        }
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        Self { file_name, tensors, header }
    }

    /// Exact size of the file.
    pub fn file_bytes(&self) -> u64 {
        8 + self.header.len() as u64 + self.tensors.iter().map(PlannedTensor::bytes).sum::<u64>()
    }

    /// Writes the file into `folder`, asking `data` for each tensor's bytes in file order.
    ///
    /// # Errors
    /// The first error of `data`, a tensor of another size than planned, or what the operating
    /// system refuses.
    pub fn write(
        &self,
        folder: &Path,
        mut data: impl FnMut(&PlannedTensor, &mut dyn Write) -> Result<()>,
    ) -> Result<()> {
        let path = folder.join(&self.file_name);
        crate::atomic::write_file(&path, |out| {
            let mut out = Counted { out, written: 0 };
            let fail = |e| IoError::file("write", &path, e);
            out.write_all(&(self.header.len() as u64).to_le_bytes()).map_err(fail)?;
            out.write_all(&self.header).map_err(fail)?;
            for tensor in &self.tensors {
                let before = out.written;
                data(tensor, &mut out)?;
                let (want, found) = (tensor.bytes(), out.written - before);
                if want != found {
                    let what = format!("{}: {found} bytes given, {want} planned", tensor.name);
                    return Err(IoError::damaged(&path, what));
                }
            }
            Ok(())
        })
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
}

impl Write for Counted<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n = self.out.write(bytes)?;
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// Distributes tensors over files: one `model.safetensors`, or shards with an index.
pub fn layout(tensors: Vec<PlannedTensor>) -> Vec<FileLayout> {
    layout_in_shards(tensors, SHARD_BYTES)
}

/// [`layout`] with another shard size, for tests and for those who ask.
pub fn layout_in_shards(tensors: Vec<PlannedTensor>, shard_bytes: u64) -> Vec<FileLayout> {
    let mut shards: Vec<Vec<PlannedTensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.bytes();
        if filled + bytes > shard_bytes && filled > 0 {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    let count = shards.len();
    shards
        .into_iter()
        .enumerate()
        .map(|(i, mut tensors)| {
            tensors.sort_by(|a, b| {
                b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name))
            });
            let name = match count {
                1 => "model.safetensors".to_string(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            FileLayout::new(name, tensors)
        })
        .collect()
}

/// `model.safetensors.index.json` for more than one file; `None` for one.
pub fn index_json(layouts: &[FileLayout]) -> Option<String> {
    if layouts.len() < 2 {
        return None;
    }
    let mut map = BTreeMap::new();
    for file in layouts {
        map.extend(file.tensors.iter().map(|t| (t.name.clone(), file.file_name.clone())));
    }
    let total: u64 = layouts.iter().flat_map(|l| &l.tensors).map(PlannedTensor::bytes).sum();
    let value = json!({"metadata": {"total_size": total}, "weight_map": map});
    Some(format!("{value:#}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned() -> Vec<PlannedTensor> {
        vec![
            PlannedTensor::new("b", FileDtype::F16, vec![3]),
            PlannedTensor::new("a", FileDtype::F32, vec![2, 2]),
            PlannedTensor::new("c", FileDtype::U32, vec![5]),
        ]
    }

    fn fill(t: &PlannedTensor, out: &mut dyn Write) -> Result<()> {
        out.write_all(&vec![t.name.as_bytes()[0]; t.bytes() as usize]).unwrap();
        Ok(())
    }

    #[test]
    fn written_files_have_the_planned_size_and_read_back() {
        for shard in [10, 1 << 30] {
            let dir = tempfile::tempdir().unwrap();
            let layouts = layout_in_shards(planned(), shard);
            for l in &layouts {
                l.write(dir.path(), fill).unwrap();
                let size = fs::metadata(dir.path().join(&l.file_name)).unwrap().len();
                assert_eq!(size, l.file_bytes());
            }
            if let Some(index) = index_json(&layouts) {
                fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            }
            let tensors = open_folder(dir.path()).unwrap();
            assert_eq!(tensors.len(), 3);
            assert!(tensors["a"].bytes().iter().all(|b| *b == b'a'));
            assert_eq!(tensors["b"].shape, [3]);
        }
    }

    /// Crafted files of the attack corpus: each is an error, none a panic.
    #[test]
    fn hostile_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        layout(planned())[0].write(dir.path(), fill).unwrap();
        let good = fs::read(dir.path().join("model.safetensors")).unwrap();
        for cut in 0..good.len() {
            fs::write(&path, &good[..cut]).unwrap();
            assert!(open_file(&path).is_err(), "cut at {cut}");
        }
        let with_header = |header: &str, data: usize| {
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.as_bytes());
            file.resize(file.len() + data, 0);
            fs::write(&path, file).unwrap();
            open_file(&path)
        };
        let entry = |a: usize, b: usize| {
            format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{a},{b}]}}"#)
        };
        let (first, second, overlap) = (entry(0, 8), entry(8, 16), entry(4, 12));
        assert!(with_header(&format!(r#"{{"a":{first},"b":{second}}}"#), 16).is_ok());
        assert!(with_header(&format!(r#"{{"a":{first},"b":{overlap}}}"#), 16).is_err());
        assert!(with_header(&format!(r#"{{"a":{second}}}"#), 16).is_err(), "hole");
        assert!(with_header(&first.replace("F32", "F99"), 8).is_err(), "unknown dtype");
        let huge = r#"{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}"#;
        assert!(with_header(huge, 0).is_err());
        let mut file = (1u64 << 60).to_le_bytes().to_vec();
        file.extend(b"{}");
        fs::write(&path, file).unwrap();
        assert!(open_file(&path).is_err(), "header of 2^60 bytes");
    }

    #[test]
    fn an_index_cannot_leave_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join("model.safetensors.index.json");
        for name in ["../x.safetensors", "/etc/passwd", "missing.safetensors"] {
            fs::write(&index, json!({"weight_map": {"a": name}}).to_string()).unwrap();
            assert!(open_folder(dir.path()).is_err());
        }
    }
}
