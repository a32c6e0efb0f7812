//! Keys and values of a cache, in f32, in f16 or packed: `[kv_heads, capacity, head_dim]`.
//!
//! A packed row is the codes of each segment as a dense little-endian bit stream, every segment
//! starting at a byte, with an f16 scale and a zero point of one byte beside it. A head of 64
//! channels at 4 bits takes 32 + 3 bytes; in f16 it would take 128.

use std::ops::Range;

use anybit_core::ActivationQuantizer;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// How rows without a quantizer are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PlainType {
    /// As they are.
    #[default]
    F32,
    /// Rounded to the nearest f16: half the memory; beyond ±65504 a value becomes infinite.
    F16,
}

/// Rows of one layer's keys or values.
#[derive(Debug, Clone)]
pub enum KvRows {
    /// As f32.
    Plain(Vec<f32>),
    /// As f16.
    Half(Vec<f16>),
    /// On the grids of a quantizer.
    Packed(PackedRows),
}

/// Packed rows.
#[derive(Debug, Clone)]
pub struct PackedRows {
    quantizer: ActivationQuantizer,
    /// Bytes of a row's codes.
    row_bytes: usize,
    codes: Vec<u8>,
    /// `[rows, segments]`.
    scales: Vec<f16>,
    /// `[rows, segments]`, in code units, re-centred as codes are; unused by half-integer grids,
    /// whose zero point is −½.
    zeros: Vec<i8>,
}

fn segment_bytes(cols: usize, bits: u8) -> usize {
    (cols * bits as usize).div_ceil(8)
}

impl KvRows {
    /// Room for `rows` rows of `cols` channels, packed by `quantizer` or, without one, `plain`.
    pub fn new(
        rows: usize,
        cols: usize,
        quantizer: Option<&ActivationQuantizer>,
        plain: PlainType,
    ) -> Self {
        let Some(quantizer) = quantizer else {
            return match plain {
                PlainType::F32 => Self::Plain(vec![0.0; rows * cols]),
                PlainType::F16 => Self::Half(vec![f16::ZERO; rows * cols]),
            };
        };
        let row_bytes = quantizer.segments.iter().map(|s| segment_bytes(s.cols, s.bits)).sum();
        let parts = rows * quantizer.segments.len();
        Self::Packed(PackedRows {
            quantizer: quantizer.clone(),
            row_bytes,
            codes: vec![0; rows * row_bytes],
            scales: vec![f16::ZERO; parts],
            zeros: vec![0; parts],
        })
    }

    /// Whether rows are stored as `quantizer` says, clips aside, or, without one, as `plain`: the
    /// same memory can hold them and they decode alike.
    pub fn fits(&self, quantizer: Option<&ActivationQuantizer>, plain: PlainType) -> bool {
        match (self, quantizer) {
            (Self::Plain(_), None) => plain == PlainType::F32,
            (Self::Half(_), None) => plain == PlainType::F16,
            (Self::Packed(rows), Some(q)) => {
                (&rows.quantizer.segments, rows.quantizer.row_scale) == (&q.segments, q.row_scale)
            }
            _ => false,
        }
    }

    /// Puts another quantizer of the same segments in place, for the rows that follow.
    pub fn set_quantizer(&mut self, quantizer: Option<&ActivationQuantizer>) {
        if let (Self::Packed(rows), Some(q)) = (self, quantizer)
            && rows.quantizer != *q
        {
            rows.quantizer.clone_from(q);
        }
    }

    /// Stores `values` as row `row`.
    pub fn store(&mut self, row: usize, values: &[f32]) {
        match self {
            Self::Plain(data) => {
                data[row * values.len()..(row + 1) * values.len()].copy_from_slice(values);
            }
            Self::Half(data) => {
                data[row * values.len()..(row + 1) * values.len()].convert_from_f32_slice(values);
            }
            Self::Packed(rows) => rows.store(row, values),
        }
    }

    /// The values of `rows` of `cols` channels: borrowed where they are in f32, else decoded
    /// into `scratch`.
    pub fn read<'a>(
        &'a self,
        rows: Range<usize>,
        cols: usize,
        scratch: &'a mut [f32],
    ) -> &'a [f32] {
        match self {
            Self::Plain(data) => &data[rows.start * cols..rows.end * cols],
            Self::Half(data) => {
                let scratch = &mut scratch[..rows.len() * cols];
                data[rows.start * cols..rows.end * cols].convert_to_f32_slice(scratch);
                scratch
            }
            Self::Packed(packed) => {
                let scratch = &mut scratch[..rows.len() * cols];
                for (row, out) in rows.zip(scratch.chunks_exact_mut(cols.max(1))) {
                    packed.decode(row, out);
                }
                scratch
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(data) => data.len() * 4,
            Self::Half(data) => data.len() * 2,
            Self::Packed(rows) => rows.codes.len() + rows.scales.len() * 2 + rows.zeros.len(),
        }
    }

    /// Whether [`Self::read`] decodes into its scratch.
    pub fn decodes(&self) -> bool {
        !matches!(self, Self::Plain(_))
    }
}

impl PackedRows {
    fn store(&mut self, row: usize, values: &[f32]) {
        let segments = self.quantizer.segments.len();
        let mut out = &mut self.codes[row * self.row_bytes..(row + 1) * self.row_bytes];
        let mut rest = values;
        for (i, segment) in self.quantizer.segments.iter().enumerate() {
            let (x, tail) = rest.split_at(segment.cols);
            let grid = self.quantizer.grid(x, segment.bits);
            self.scales[row * segments + i] = f16::from_f32(grid.scale);
            self.zeros[row * segments + i] = grid.zero as i8;
            let (stream, next) = out.split_at_mut(segment_bytes(segment.cols, segment.bits));
            stream.fill(0);
            for (j, x) in x.iter().enumerate() {
                let code = (grid.encode(*x) - grid.min) as u32;
                let at = j * segment.bits as usize;
                let shifted = code << (at % 8);
                stream[at / 8] |= shifted as u8;
                if at % 8 + segment.bits as usize > 8 {
                    stream[at / 8 + 1] |= (shifted >> 8) as u8;
                }
            }
            (rest, out) = (tail, next);
        }
    }

    fn decode(&self, row: usize, out: &mut [f32]) {
        let segments = self.quantizer.segments.len();
        let mut stream = &self.codes[row * self.row_bytes..(row + 1) * self.row_bytes];
        let mut out = out;
        for (i, segment) in self.quantizer.segments.iter().enumerate() {
            let scale = self.scales[row * segments + i].to_f32();
            let middle = 1i32 << (segment.bits - 1);
            let zero = match self.quantizer.row_scale {
                None => (self.zeros[row * segments + i] as i32 + middle) as f32,
                Some(_) => middle as f32 - 0.5,
            };
            let (own, next) = stream.split_at(segment_bytes(segment.cols, segment.bits));
            let (x, rest) = out.split_at_mut(segment.cols);
            decode_segment(own, segment.bits, scale, zero, x);
            (stream, out) = (next, rest);
        }
    }
}

/// `(u − zero)·scale` for each code.
fn decode_segment(stream: &[u8], bits: u8, scale: f32, zero: f32, out: &mut [f32]) {
    match bits {
        1 => decode_codes::<1>(stream, scale, zero, out),
        2 => decode_codes::<2>(stream, scale, zero, out),
        3 => decode_codes::<3>(stream, scale, zero, out),
        4 => decode_codes::<4>(stream, scale, zero, out),
        5 => decode_codes::<5>(stream, scale, zero, out),
        6 => decode_codes::<6>(stream, scale, zero, out),
        7 => decode_codes::<7>(stream, scale, zero, out),
        8 => {
            let pairs = out.iter_mut().zip(stream);
            pairs.for_each(|(out, u)| *out = (*u as f32 - zero) * scale);
        }
        _ => unreachable!("codes of a segment have 1 to 8 bits, not {bits}"),
    }
}

/// [`decode_segment`] for codes of `BITS`, of which eight fill as many bytes.
fn decode_codes<const BITS: usize>(stream: &[u8], scale: f32, zero: f32, out: &mut [f32]) {
    let (eights, last) = out.as_chunks_mut::<8>();
    let (whole, rest) = stream.split_at(eights.len() * BITS);
    for (out, bytes) in eights.iter_mut().zip(whole.as_chunks::<BITS>().0) {
        *out = decode_eight(bytes, scale, zero);
    }
    if !last.is_empty() {
        let mut bytes = [0; BITS];
        bytes[..rest.len()].copy_from_slice(rest);
        last.copy_from_slice(&decode_eight(&bytes, scale, zero)[..last.len()]);
    }
}

/// Values of eight codes: one word in every lane, shifted by a distance of the lane's own.
#[inline(always)]
fn decode_eight<const BITS: usize>(bytes: &[u8; BITS], scale: f32, zero: f32) -> [f32; 8] {
    let mut word = [0; 8];
    word[..BITS].copy_from_slice(bytes);
    let word = u64::from_le_bytes(word);
    std::array::from_fn(|i| {
        // More than 32 bits are two words of four codes.
        let (word, i) = if BITS <= 4 { (word, i) } else { (word >> (i / 4 * 4 * BITS), i % 4) };
        let code = ((word as u32) >> (i * BITS)) & ((1 << BITS) - 1);
        // From a signed integer: one instruction where an unsigned one takes several.
        (code as i32 as f32 - zero) * scale
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::RowScale;
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    proptest! {
        /// What comes back is what the quantizer simulates, bit by bit; rows do not touch.
        #[test]
        fn packed_rows_are_the_fake_values(
            cols in 1usize..70, bits in 1u8..=8, high in 0usize..9, kind in 0usize..4,
            seed in any::<u64>(),
        ) {
            let high = high.min(cols - 1);
            // Half-integer grids alone have codes of one bit.
            let bits = if kind < 2 { bits.max(2) } else { bits };
            let mut q = ActivationQuantizer::tiered(cols, bits, high, 8, kind != 0);
            q.half = true;
            q.row_scale = [None, None, Some(RowScale::Largest), Some(RowScale::Rms)][kind];
            if q.row_scale.is_none() {
                q.clip = (0.9, 0.8);
            }
            let mut rng = SplitMix64::new(seed);
            let mut values: Vec<f32> = (0..5 * cols).map(|_| rng.normal() as f32).collect();
            values[..cols].fill(0.0);
            let mut rows = KvRows::new(5, cols, Some(&q), PlainType::F32);
            for row in [4, 0, 2, 1, 3] {
                rows.store(row, &values[row * cols..(row + 1) * cols]);
            }
            let mut fake = values.clone();
            q.fake(&mut fake);
            let mut scratch = vec![0.0; 4 * cols];
            prop_assert_eq!(rows.read(1..5, cols, &mut scratch), &fake[cols..]);
        }
    }

    #[test]
    fn four_bits_take_a_quarter_and_scales() {
        let mut q = ActivationQuantizer::plain(64, 4, false);
        q.half = true;
        let rows = KvRows::new(100, 64, Some(&q), PlainType::F32);
        assert_eq!(rows.bytes(), 100 * (32 + 3));
        for plain in [PlainType::F32, PlainType::F16] {
            assert!(rows.fits(Some(&q), plain) && !rows.fits(None, plain));
        }
    }

    /// Each value comes back as the nearest f16, whatever the length of a row; rows do not touch.
    #[test]
    fn half_rows_are_the_nearest_f16() {
        let mut rng = SplitMix64::new(11);
        for cols in [1, 3, 4, 7, 8, 13, 64, 80] {
            let values: Vec<f32> = (0..5 * cols).map(|_| rng.normal() as f32 * 100.0).collect();
            let mut rows = KvRows::new(5, cols, None, PlainType::F16);
            for row in [4, 0, 2, 1, 3] {
                rows.store(row, &values[row * cols..(row + 1) * cols]);
            }
            let want: Vec<f32> = values.iter().map(|x| f16::from_f32(*x).to_f32()).collect();
            let mut scratch = vec![0.0; 4 * cols];
            assert_eq!(rows.read(1..5, cols, &mut scratch), &want[cols..]);
            assert_eq!(rows.bytes(), 5 * cols * 2);
            assert!(rows.decodes() && rows.fits(None, PlainType::F16));
            assert!(!rows.fits(None, PlainType::F32));
            assert!(!rows.fits(Some(&ActivationQuantizer::plain(cols, 4, true)), PlainType::F16));
        }
    }
}
