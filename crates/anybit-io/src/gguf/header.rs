//! The header of a GGUF file, parsed from untrusted bytes.
//!
//! Little-endian (ggml `docs/gguf.md`; versions 2 and 3 differ only in that 3 allows big-endian
//! files, which we reject): `"GGUF"`, u32 version, u64 number of tensors, u64 number of keys;
//! per key its name, a u32 type and the value; per tensor its name, u32 number of dimensions, u64
//! each (the fastest first), u32 type and a u64 offset into the data, which starts at the next
//! multiple of `general.alignment`. A string is a u64 length and UTF-8; an array a u32 type, a u64
//! length and its values. Every count and length is checked against a limit or the bytes left
//! before anything is allocated.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Metadata, Value};
use crate::tensor::Dtype;
use crate::{IoError, Result};

/// First bytes of every GGUF file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of the data where `general.alignment` does not say otherwise.
pub const DEFAULT_ALIGNMENT: usize = 32;

/// Most tensors in a file; the largest known models have a few thousand.
const MAX_TENSORS: u64 = 1 << 20;
/// Most metadata keys.
const MAX_KEYS: u64 = 1 << 16;
/// Most array elements in all metadata together; vocabularies and merges stay below a million.
const MAX_ELEMENTS: u64 = 1 << 24;
/// Deepest nesting of arrays.
const MAX_DEPTH: usize = 4;
/// Longest key or tensor name.
const MAX_NAME: u64 = 1 << 16;
/// Longest string value; chat templates take some kilobytes.
const MAX_STRING: u64 = 1 << 24;
/// Most dimensions of a tensor (ggml's `GGML_MAX_DIMS`).
const MAX_DIMS: u32 = 4;
/// Largest alignment.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Where a tensor lies.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// GGUF name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

/// What stands before the data.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Keys and values.
    pub metadata: Metadata,
    /// Tensors in the file's order; within the file, apart from each other, names unique.
    pub tensors: Vec<TensorInfo>,
    /// First byte of the data.
    pub data_start: usize,
}

/// The type's number in the file.
pub fn type_id(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q4_1 => 3,
        Dtype::Q5_0 => 6,
        Dtype::Q5_1 => 7,
        Dtype::Q8_0 => 8,
        Dtype::Q2_K => 10,
        Dtype::Q3_K => 11,
        Dtype::Q4_K => 12,
        Dtype::Q5_K => 13,
        Dtype::Q6_K => 14,
        Dtype::IQ4_NL => 20,
        Dtype::BF16 => 30,
    }
}

const SUPPORTED: [Dtype; 14] = [
    Dtype::F32,
    Dtype::F16,
    Dtype::BF16,
    Dtype::Q4_0,
    Dtype::Q4_1,
    Dtype::Q5_0,
    Dtype::Q5_1,
    Dtype::Q8_0,
    Dtype::Q2_K,
    Dtype::Q3_K,
    Dtype::Q4_K,
    Dtype::Q5_K,
    Dtype::Q6_K,
    Dtype::IQ4_NL,
];

/// ggml's types that we do not read: id, name, elements and bytes of a block.
const FOREIGN: [(u32, &str, usize, usize); 13] = [
    (9, "Q8_1", 32, 36),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (29, "IQ1_M", 256, 56),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
];

/// Elements and bytes of a block of a type, read by us or not.
fn block(id: u32) -> Option<(usize, usize)> {
    let ours = SUPPORTED.into_iter().find(|d| type_id(*d) == id);
    let ours = ours.map(|d| (d.block_len(), d.block_bytes()));
    ours.or_else(|| FOREIGN.iter().find(|t| t.0 == id).map(|t| (t.2, t.3)))
}

/// Bytes of all tensors of a file, whatever their types; arguments as of [`parse`].
///
/// # Errors
/// As [`parse`]; types whose size is unknown too.
pub fn tensor_bytes(bytes: &[u8], path: &Path) -> Result<u64> {
    let mut cursor = Cursor { bytes, pos: 0, path, elements_left: MAX_ELEMENTS };
    cursor.version()?;
    let n_tensors = cursor.count("tensors", MAX_TENSORS)?;
    let n_keys = cursor.count("metadata keys", MAX_KEYS)?;
    cursor.metadata(n_keys)?;
    let mut total = 0u64;
    for _ in 0..n_tensors {
        let (name, shape) = cursor.tensor_shape()?;
        let id = cursor.u32(&name)?;
        cursor.u64(&name)?;
        let (len, size) = block(id).ok_or_else(|| {
            let what = format!("tensor {name} is of type {id}, whose size is unknown");
            IoError::unsupported(path, what)
        })?;
        let bytes = bytes_of(&shape, len, size).ok_or_else(|| {
            cursor.damaged(format!("tensor {name}: shape {shape:?} does not fit"))
        })?;
        total += bytes as u64;
    }
    Ok(total)
}

/// Bytes of a tensor of blocks; `None` when rows are no whole number of them or memory cannot hold
/// it.
fn bytes_of(shape: &[usize], block_len: usize, block_bytes: usize) -> Option<usize> {
    let row = shape.last().copied().unwrap_or(1);
    let len = shape.iter().try_fold(1usize, |product, &d| product.checked_mul(d))?;
    row.is_multiple_of(block_len).then_some(())?;
    (len / block_len).checked_mul(block_bytes)
}

/// Parses the header of the file whose bytes, data included, are `bytes`; `path` is for messages.
///
/// # Errors
/// [`IoError::Damaged`] when the bytes break the format, [`IoError::Unsupported`] for other
/// versions, big-endian files and element types that we do not read.
pub fn parse(bytes: &[u8], path: &Path) -> Result<Header> {
    let mut cursor = Cursor { bytes, pos: 0, path, elements_left: MAX_ELEMENTS };
    let version = cursor.version()?;
    let n_tensors = cursor.count("tensors", MAX_TENSORS)?;
    let n_keys = cursor.count("metadata keys", MAX_KEYS)?;
    let metadata = cursor.metadata(n_keys)?;
    let alignment = alignment(&metadata, path)?;
    let mut tensors = Vec::new();
    let mut names = BTreeSet::new();
    for _ in 0..n_tensors {
        let tensor = cursor.tensor_info()?;
        if !names.insert(tensor.name.clone()) {
            return Err(cursor.damaged(format!("two tensors are called {}", tensor.name)));
        }
        tensors.push(tensor);
    }
    let data_start = cursor
        .pos
        .checked_next_multiple_of(alignment)
        .ok_or_else(|| cursor.damaged("the header is too long".into()))?;
    place(&mut tensors, data_start, alignment, bytes.len(), path)?;
    Ok(Header { version, metadata, tensors, data_start })
}

fn alignment(metadata: &Metadata, path: &Path) -> Result<usize> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    value
        .as_u64()
        .filter(|a| a.is_power_of_two() && *a <= MAX_ALIGNMENT)
        .and_then(|a| usize::try_from(a).ok())
        .ok_or_else(|| {
            let what = format!("general.alignment is {value:?}, not a power of two up to 2^20");
            IoError::damaged(path, what)
        })
}

/// Turns offsets into the data into offsets into the file, and checks that each tensor lies
/// within the file and apart from the others.
fn place(
    tensors: &mut [TensorInfo],
    data_start: usize,
    alignment: usize,
    file_len: usize,
    path: &Path,
) -> Result<()> {
    let damaged = |what: String| Err(IoError::damaged(path, what));
    let mut spans = Vec::with_capacity(tensors.len());
    for (index, t) in tensors.iter_mut().enumerate() {
        let (name, offset) = (&t.name, t.offset);
        if !offset.is_multiple_of(alignment) {
            return damaged(format!(
                "tensor {name}: offset {offset} is no multiple of {alignment}"
            ));
        }
        let start = data_start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(t.bytes));
        let (Some(start), Some(end)) = (start, end) else {
            return damaged(format!("tensor {name}: offset {offset} is beyond any file"));
        };
        if end > file_len {
            return damaged(format!(
                "truncated: tensor {name} needs bytes {start}..{end}, the file has {file_len}"
            ));
        }
        t.offset = start;
        spans.push((start, end, index));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if pair[1].0 < pair[0].1 {
            let (a, b) = (&tensors[pair[0].2].name, &tensors[pair[1].2].name);
            return damaged(format!("tensors {a} and {b} overlap"));
        }
    }
    Ok(())
}

/// Reads forward through `bytes`; `pos` never passes their end.
struct Cursor<'a> {
    bytes: &'a [u8],
    pos: usize,
    path: &'a Path,
    /// Array elements that may still be read: a byte in the file becomes a [`Value`] many times as
    /// large.
    elements_left: u64,
}

impl<'a> Cursor<'a> {
    fn damaged(&self, what: String) -> IoError {
        IoError::damaged(self.path, what)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.pos
    }

    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8]> {
        let rest: &'a [u8] = &self.bytes[self.pos..];
        let taken = usize::try_from(n).ok().and_then(|n| rest.get(..n)).ok_or_else(|| {
            let (at, len) = (self.pos, self.bytes.len());
            self.damaged(format!(
                "truncated in {what}: {n} bytes needed at {at}, the file has {len}"
            ))
        })?;
        self.pos += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    fn string(&mut self, limit: u64, what: &str) -> Result<String> {
        let len = self.u64(what)?;
        if len > limit {
            return Err(self.damaged(format!("{what} claims {len} bytes, the limit is {limit}")));
        }
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| self.damaged(format!("{what} holds text that is not UTF-8")))
    }

    fn version(&mut self) -> Result<u32> {
        if self.array::<4>("the magic number")? != MAGIC {
            return Err(self.damaged("it does not start with \"GGUF\"".into()));
        }
        let version = self.u32("the version")?;
        let what = match version {
            2 | 3 => return Ok(version),
            _ if (1..=3).contains(&version.swap_bytes()) => {
                "a big-endian GGUF file; convert it with gguf_convert_endian.py of llama.cpp"
                    .to_string()
            }
            _ => format!(
                "GGUF version {version} is not supported; supported: 2, 3; convert the model \
                 again with a current llama.cpp"
            ),
        };
        Err(IoError::unsupported(self.path, what))
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64> {
        let n = self.u64(what)?;
        if n > limit {
            return Err(self.damaged(format!("it claims {n} {what}, the limit is {limit}")));
        }
        Ok(n)
    }

    fn metadata(&mut self, n_keys: u64) -> Result<Metadata> {
        let mut values = BTreeMap::new();
        for _ in 0..n_keys {
            let key = self.string(MAX_NAME, "a metadata key")?;
            let kind = self.u32(&key)?;
            let value = self.value(kind, 0, &key)?;
            if values.contains_key(&key) {
                return Err(self.damaged(format!("metadata key {key} appears twice")));
            }
            values.insert(key, value);
        }
        Ok(Metadata { values })
    }

    fn value(&mut self, kind: u32, depth: usize, key: &str) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(key)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(key)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(key)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(key)?)),
            4 => Value::U32(u32::from_le_bytes(self.array(key)?)),
            5 => Value::I32(i32::from_le_bytes(self.array(key)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(key)?)),
            7 => match self.array::<1>(key)? {
                [v @ 0..=1] => Value::Bool(v == 1),
                [v] => return Err(self.damaged(format!("{key} is the truth value {v}"))),
            },
            8 => Value::String(self.string(MAX_STRING, key)?),
            9 => Value::Array(self.values(depth, key)?),
            10 => Value::U64(u64::from_le_bytes(self.array(key)?)),
            11 => Value::I64(i64::from_le_bytes(self.array(key)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(self.damaged(format!("{key} has the unknown value type {kind}"))),
        })
    }

    fn values(&mut self, depth: usize, key: &str) -> Result<Vec<Value>> {
        let kind = self.u32(key)?;
        let n = self.u64(key)?;
        if depth == MAX_DEPTH {
            return Err(self.damaged(format!("{key} nests arrays deeper than {MAX_DEPTH}")));
        }
        // What the shortest value of the type takes: an empty string is a length, an empty array
        // a type and a length.
        let least = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            9 => 12,
            _ => 8,
        };
        let left = self.left();
        if n > left as u64 / least {
            return Err(self.damaged(format!("{key} claims {n} values, {left} bytes are left")));
        }
        self.elements_left = self.elements_left.checked_sub(n).ok_or_else(|| {
            let limit = MAX_ELEMENTS;
            self.damaged(format!("{key} brings the metadata above {limit} array values"))
        })?;
        (0..n).map(|_| self.value(kind, depth + 1, key)).collect()
    }

    /// A tensor's name and shape, with which its record starts.
    fn tensor_shape(&mut self) -> Result<(String, Vec<usize>)> {
        let name = self.string(MAX_NAME, "a tensor name")?;
        let n_dims = self.u32(&name)?;
        if n_dims > MAX_DIMS {
            return Err(self.damaged(format!("tensor {name} claims {n_dims} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let dim = self.u64(&name)?;
            let dim = usize::try_from(dim).ok().filter(|d| *d > 0);
            shape.push(dim.ok_or_else(|| {
                self.damaged(format!("tensor {name} has a dimension that is 0 or above any memory"))
            })?);
        }
        shape.reverse();
        Ok((name, shape))
    }

    /// A tensor's name, shape and type, with its offset into the data.
    fn tensor_info(&mut self) -> Result<TensorInfo> {
        let (name, shape) = self.tensor_shape()?;
        let dtype = self.dtype(&name)?;
        let offset = usize::try_from(self.u64(&name)?)
            .map_err(|_| self.damaged(format!("tensor {name}: its offset is beyond any file")))?;
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(dtype.block_len()) {
            return Err(self.damaged(format!(
                "tensor {name}: rows of {row} are no whole number of {dtype:?} blocks"
            )));
        }
        let bytes = bytes_of(&shape, dtype.block_len(), dtype.block_bytes())
            .ok_or_else(|| self.damaged(format!("tensor {name}: shape {shape:?} is too large")))?;
        Ok(TensorInfo { name, dtype, shape, offset, bytes })
    }

    fn dtype(&mut self, tensor: &str) -> Result<Dtype> {
        let id = self.u32(tensor)?;
        SUPPORTED.into_iter().find(|d| type_id(*d) == id).ok_or_else(|| {
            let foreign = FOREIGN.iter().find(|t| t.0 == id);
            let what = format!(
                "tensor {tensor} is stored as {} (type {id}), which is not supported; supported: \
                 {}; take another file of this model, or convert it again to one of these",
                foreign.map_or("an unknown type", |t| t.1),
                SUPPORTED.map(|d| format!("{d:?}")).join(", "),
            );
            IoError::unsupported(self.path, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Dimensions, type and offset.
    type Tensor = (&'static [u64], u32, u64);

    fn start(n_tensors: u64, n_keys: u64) -> Vec<u8> {
        let mut b = MAGIC.to_vec();
        b.extend(3u32.to_le_bytes());
        b.extend(n_tensors.to_le_bytes());
        b.extend(n_keys.to_le_bytes());
        b
    }

    fn text(b: &mut Vec<u8>, s: &str) {
        b.extend((s.len() as u64).to_le_bytes());
        b.extend(s.as_bytes());
    }

    fn tensor(b: &mut Vec<u8>, name: &str, dims: &[u64], kind: u32, offset: u64) {
        text(b, name);
        b.extend((dims.len() as u32).to_le_bytes());
        for d in dims {
            b.extend(d.to_le_bytes());
        }
        b.extend(kind.to_le_bytes());
        b.extend(offset.to_le_bytes());
    }

    fn parsed(b: &[u8]) -> Result<Header> {
        parse(b, Path::new("x.gguf"))
    }

    fn message(b: &[u8]) -> String {
        parsed(b).unwrap_err().to_string()
    }

    #[test]
    fn a_header_written_by_hand() {
        let mut b = start(1, 2);
        text(&mut b, "general.name");
        b.extend(8u32.to_le_bytes());
        text(&mut b, "tiny");
        text(&mut b, "list");
        b.extend(9u32.to_le_bytes());
        b.extend(5u32.to_le_bytes());
        b.extend(2u64.to_le_bytes());
        b.extend((-1i32).to_le_bytes());
        b.extend(7i32.to_le_bytes());
        tensor(&mut b, "w", &[32, 3], 8, 0);
        b.resize(b.len().next_multiple_of(32) + 3 * 34, 0);
        let header = parsed(&b).unwrap();
        assert_eq!(header.metadata.get_str("general.name"), Some("tiny"));
        assert_eq!(header.metadata.get_i64s("list"), Some(vec![-1, 7]));
        assert_eq!(header.metadata.get_u64("list"), None);
        let t = &header.tensors[0];
        assert_eq!((t.dtype, &t.shape[..], t.bytes), (Dtype::Q8_0, &[3, 32][..], 102));
        assert_eq!(t.offset, header.data_start);
        for n in 0..b.len() {
            assert!(parsed(&b[..n]).is_err(), "{n} bytes");
        }
    }

    #[test]
    fn absurd_counts_fail_before_anything_is_allocated() {
        assert!(message(&start(1 << 60, 0)).contains("tensors"));
        assert!(message(&start(0, 1 << 60)).contains("metadata keys"));
        for kind in 0..=12u32 {
            let mut b = start(0, 1);
            text(&mut b, "huge");
            b.extend(9u32.to_le_bytes());
            b.extend(kind.to_le_bytes());
            b.extend((1u64 << 60).to_le_bytes());
            assert!(message(&b).contains("huge claims"), "{kind}");
        }
        let mut b = start(0, 1);
        b.extend(u64::MAX.to_le_bytes());
        assert!(message(&b).contains("metadata key"));
    }

    #[test]
    fn deep_nesting_is_refused() {
        let mut b = start(0, 1);
        text(&mut b, "deep");
        b.extend(9u32.to_le_bytes());
        for _ in 0..1000 {
            b.extend(9u32.to_le_bytes());
            b.extend(1u64.to_le_bytes());
        }
        assert!(message(&b).contains("nests"));
    }

    #[test]
    fn other_versions_and_byte_orders_are_named() {
        for (version, says) in [(1u32, "version 1"), (4, "version 4"), (3 << 24, "big-endian")] {
            let mut b = start(0, 0);
            b[4..8].copy_from_slice(&version.to_le_bytes());
            assert!(message(&b).contains(says), "{version}");
        }
        assert!(message(b"not a model at all, sorry").contains("GGUF"));
        assert!(parsed(&start(0, 0)).is_ok());
    }

    #[test]
    fn broken_tensors_are_named() {
        let cases: [(&[Tensor], &str); 7] = [
            (&[(&[4], 0, 0), (&[4], 0, 0)], "overlap"),
            (&[(&[4], 0, 8)], "no multiple of 32"),
            (&[(&[4], 0, 1 << 40)], "truncated: tensor t0"),
            (&[(&[1 << 62, 1 << 62], 0, 0)], "too large"),
            (&[(&[0, 4], 0, 0)], "dimension"),
            (&[(&[33], 8, 0)], "blocks"),
            (&[(&[256], 23, 0)], "IQ4_XS (type 23)"),
        ];
        for (tensors, says) in cases {
            let mut b = start(tensors.len() as u64, 0);
            for (i, (dims, kind, offset)) in tensors.iter().enumerate() {
                tensor(&mut b, &format!("t{i}"), dims, *kind, *offset);
            }
            b.resize(b.len() + 512, 0);
            assert!(message(&b).contains(says), "{says}: {}", message(&b));
        }
        let mut b = start(2, 0);
        tensor(&mut b, "same", &[8], 0, 0);
        tensor(&mut b, "same", &[8], 0, 32);
        b.resize(b.len() + 512, 0);
        assert!(message(&b).contains("two tensors are called same"));
    }

    #[test]
    fn bytes_of_types_that_cannot_be_read_are_known() {
        let mut b = start(3, 0);
        tensor(&mut b, "a", &[256, 2], 21, 0);
        tensor(&mut b, "b", &[32, 3], 8, 0);
        tensor(&mut b, "c", &[5], 0, 0);
        let path = Path::new("x.gguf");
        assert_eq!(tensor_bytes(&b, path).unwrap(), 2 * 110 + 3 * 34 + 5 * 4);
        for (dims, kind, says) in [(&[255u64][..], 21, "does not fit"), (&[256], 99, "type 99")] {
            let mut b = start(1, 0);
            tensor(&mut b, "t", dims, kind, 0);
            assert!(tensor_bytes(&b, path).unwrap_err().to_string().contains(says), "{says}");
        }
    }

    #[test]
    fn alignment_must_be_a_power_of_two() {
        for (alignment, good) in
            [(0u32, false), (1, true), (24, false), (64, true), (1 << 30, false)]
        {
            let mut b = start(0, 1);
            text(&mut b, "general.alignment");
            b.extend(4u32.to_le_bytes());
            b.extend(alignment.to_le_bytes());
            assert_eq!(parsed(&b).is_ok(), good, "{alignment}");
        }
    }
}
