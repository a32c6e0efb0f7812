//! [`StoredTensor`]: one tensor in a memory-mapped file, decoded to f32 as it is read.

use std::ops::Range;
use std::sync::Arc;

use anybit_core::{HalfRow, RowSource};
use memmap2::Mmap;

use crate::gguf::blocks;

/// Element types that weights are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)] // the names are the file formats' own
pub enum Dtype {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
}

impl Dtype {
    /// Weights per block: 1 for the float types.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4_NL => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K => 256,
        }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// Bits of a weight's code alone, without the scales of its block.
    pub fn code_bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::BF16 => 16,
            Self::Q4_0 | Self::Q4_1 | Self::Q4_K | Self::IQ4_NL => 4,
            Self::Q5_0 | Self::Q5_1 | Self::Q5_K => 5,
            Self::Q8_0 => 8,
            Self::Q2_K => 2,
            Self::Q3_K => 3,
            Self::Q6_K => 6,
        }
    }

    /// Bytes of `len` weights; `len` must be a multiple of the block.
    pub fn bytes(self, len: usize) -> usize {
        len / self.block_len() * self.block_bytes()
    }

    /// Decodes whole blocks to f32.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Self::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Self::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = half::f16::from_le_bytes(*b).to_f32();
                }
            }
            Self::BF16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *o = f32::from_bits((u16::from_le_bytes(*b) as u32) << 16);
                }
            }
            quantized => blocks::decode(quantized, bytes, out),
        }
    }
}

/// How the rows in the file are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// As in a Hugging Face checkpoint.
    Natural,
    /// Rotary pairs adjacent, as GGUF stores q and k of the llama architecture: within a head,
    /// file row `2i + c` is natural row `c·head_dim/2 + i`.
    RotaryPairs {
        /// Rows of a head.
        head_dim: usize,
    },
}

/// Drops resident pages of `len` bytes from `offset`; the next access reads them again.
pub(crate) fn release_pages(map: &Mmap, offset: usize, len: usize) {
    #[cfg(unix)]
    {
        let page = 4096;
        let start = offset / page * page;
        let len = (offset + len).min(map.len()) - start;
        // SAFETY: the mapping is read-only and backed by a file: dropped pages are read again
        // from it on the next access.
        let _ =
            unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) };
    }
}

/// A tensor in a memory-mapped file.
#[derive(Clone)]
pub struct StoredTensor {
    map: Arc<Mmap>,
    offset: usize,
    /// Element type in the file.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    order: RowOrder,
}

impl std::fmt::Debug for StoredTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{:?} at {}", self.dtype, self.shape, self.offset)
    }
}

impl StoredTensor {
    /// A view of `map` from `offset`, or `None` when it does not fit or a row is not a whole
    /// number of blocks.
    pub fn new(
        map: Arc<Mmap>,
        offset: usize,
        dtype: Dtype,
        shape: Vec<usize>,
        order: RowOrder,
    ) -> Option<Self> {
        let len = shape.iter().try_fold(1usize, |a, &d| a.checked_mul(d))?;
        let row = shape.last().copied().unwrap_or(1);
        if row % dtype.block_len() != 0 {
            return None;
        }
        let bytes = (len / dtype.block_len()).checked_mul(dtype.block_bytes())?;
        (offset.checked_add(bytes)? <= map.len()).then_some(Self {
            map,
            offset,
            dtype,
            shape,
            order,
        })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes as stored.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.offset..self.offset + self.dtype.bytes(self.len())]
    }

    /// All elements as f32, in natural order.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        let (rows, _) = self.shape();
        self.read_rows(0..rows, &mut out);
        out
    }

    /// Tells the kernel that these pages are not needed for now, so that resident memory is what
    /// is being worked on and not the whole file.
    pub fn release(&self) {
        release_pages(&self.map, self.offset, self.bytes().len());
    }

    fn file_row(&self, row: usize) -> usize {
        match self.order {
            RowOrder::Natural => row,
            RowOrder::RotaryPairs { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let half = head_dim / 2;
                head * head_dim + 2 * (within % half) + within / half
            }
        }
    }
}

impl RowSource for StoredTensor {
    fn shape(&self) -> (usize, usize) {
        match self.shape.split_last() {
            None => (1, 1),
            Some((cols, rows)) => (rows.iter().product(), *cols),
        }
    }

    fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let (_, cols) = RowSource::shape(self);
        let row_bytes = self.dtype.bytes(cols);
        let bytes = self.bytes();
        if self.order == RowOrder::Natural {
            let range = rows.start * row_bytes..rows.end * row_bytes;
            return self.dtype.decode(&bytes[range], out);
        }
        for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
            let start = self.file_row(row) * row_bytes;
            self.dtype.decode(&bytes[start..start + row_bytes], out);
        }
    }

    fn stored_bytes(&self) -> usize {
        self.bytes().len()
    }

    fn half_row(&self, row: usize) -> Option<HalfRow<'_>> {
        let form = match self.dtype {
            Dtype::F16 => HalfRow::F16,
            Dtype::BF16 => HalfRow::Bf16,
            _ => return None,
        };
        let row_bytes = self.dtype.bytes(RowSource::shape(self).1);
        let start = self.file_row(row) * row_bytes;
        Some(form(self.bytes()[start..start + row_bytes].as_chunks().0))
    }
}
