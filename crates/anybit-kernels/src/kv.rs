//! Keys and values of a cache, plain or packed: `[kv_heads, capacity, head_dim]`.
//!
//! A packed row is the codes of each segment as a dense little-endian bit stream, every segment
//! starting at a byte, with an f16 scale and a zero point of one byte beside it. A head of 64
//! channels at 4 bits takes 32 + 3 bytes; in f16 it would take 128.

use std::ops::Range;

use anybit_core::ActivationQuantizer;
use half::f16;

/// Rows of one layer's keys or values.
#[derive(Debug, Clone)]
pub enum KvRows {
    /// As f32.
    Plain(Vec<f32>),
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
    /// Room for `rows` rows of `cols` channels.
    pub fn new(rows: usize, cols: usize, quantizer: Option<&ActivationQuantizer>) -> Self {
        let Some(quantizer) = quantizer else { return Self::Plain(vec![0.0; rows * cols]) };
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

    /// Whether rows are stored as `quantizer` says, clips aside: the same memory can hold them and
    /// they decode alike.
    pub fn fits(&self, quantizer: Option<&ActivationQuantizer>) -> bool {
        match (self, quantizer) {
            (Self::Plain(_), None) => true,
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
            Self::Packed(rows) => rows.store(row, values),
        }
    }

    /// The values of `rows` of `cols` channels: borrowed where they are plain, else decoded into
    /// `scratch`.
    pub fn read<'a>(
        &'a self,
        rows: Range<usize>,
        cols: usize,
        scratch: &'a mut [f32],
    ) -> &'a [f32] {
        match self {
            Self::Plain(data) => &data[rows.start * cols..rows.end * cols],
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
            Self::Packed(rows) => rows.codes.len() + rows.scales.len() * 2 + rows.zeros.len(),
        }
    }

    /// Whether reading decodes.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
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
        8 => {
            let pairs = out.iter_mut().zip(stream);
            pairs.for_each(|(out, u)| *out = (*u as f32 - zero) * scale);
        }
        4 => {
            // Sixteen values of one table: cheaper than converting each code.
            let table: [f32; 16] = std::array::from_fn(|u| (u as f32 - zero) * scale);
            let (pairs, last) = out.as_chunks_mut::<2>();
            for ([low, high], byte) in pairs.iter_mut().zip(stream) {
                *low = table[(byte & 15) as usize];
                *high = table[(byte >> 4) as usize];
            }
            if let [out] = last {
                *out = table[(stream[stream.len() - 1] & 15) as usize];
            }
        }
        _ => {
            let mask = (1u32 << bits) - 1;
            for (j, out) in out.iter_mut().enumerate() {
                let at = j * bits as usize;
                let low = stream[at / 8] as u32;
                let high = stream.get(at / 8 + 1).copied().unwrap_or(0) as u32;
                let code = ((low | high << 8) >> (at % 8)) & mask;
                *out = (code as f32 - zero) * scale;
            }
        }
    }
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
            cols in 1usize..70, bits in 2u8..=8, high in 0usize..9, kind in 0usize..4,
            seed in any::<u64>(),
        ) {
            let high = high.min(cols - 1);
            let mut q = ActivationQuantizer::tiered(cols, bits, high, 8, kind != 0);
            q.half = true;
            q.row_scale = [None, None, Some(RowScale::Largest), Some(RowScale::Rms)][kind];
            if q.row_scale.is_none() {
                q.clip = (0.9, 0.8);
            }
            let mut rng = SplitMix64::new(seed);
            let mut values: Vec<f32> = (0..5 * cols).map(|_| rng.normal() as f32).collect();
            values[..cols].fill(0.0);
            let mut rows = KvRows::new(5, cols, Some(&q));
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
        let rows = KvRows::new(100, 64, Some(&q));
        assert_eq!(rows.bytes(), 100 * (32 + 3));
        assert!(rows.fits(Some(&q)) && !rows.fits(None));
    }
}
