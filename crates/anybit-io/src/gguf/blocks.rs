//! Decoding of ggml's quantized blocks to f32.
//!
//! One function per type, each on one block and with the arithmetic of ggml's
//! `dequantize_row_*` (`ggml-quants.c`) in the same order of operations, so that results agree to
//! the last bit. Symbols as there: `d` a block's scale, `m` or `dmin` its minimum (or the scale of
//! its minima), `qs` packed codes, `qh` and `hmask` their upper bits, `sc` integer scales of
//! sub-blocks. [`Dtype::decode`] is the caller.

use crate::tensor::Dtype;

/// Decodes whole blocks of `bytes` into `out`; a rest shorter than a block is left alone.
///
/// The float types have no blocks and are decoded by [`Dtype::decode`]: given one of them, this
/// leaves `out` as it is.
pub fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    debug_assert!(dtype.block_len() > 1, "{dtype:?} has no blocks");
    match dtype {
        Dtype::F32 | Dtype::F16 | Dtype::BF16 => {}
        Dtype::Q4_0 => each(bytes, out, q4_0),
        Dtype::Q4_1 => each(bytes, out, q4_1),
        Dtype::Q5_0 => each(bytes, out, q5_0),
        Dtype::Q5_1 => each(bytes, out, q5_1),
        Dtype::Q8_0 => each(bytes, out, q8_0),
        Dtype::Q2_K => each(bytes, out, q2_k),
        Dtype::Q3_K => each(bytes, out, q3_k),
        Dtype::Q4_K => each(bytes, out, q4_k),
        Dtype::Q5_K => each(bytes, out, q5_k),
        Dtype::Q6_K => each(bytes, out, q6_k),
        Dtype::IQ4_NL => each(bytes, out, iq4_nl),
    }
}

/// Runs `decode` over blocks of `B` bytes that hold `N` weights.
fn each<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (block, out) in bytes.as_chunks::<B>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        decode(block, out);
    }
}

fn f16(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Decodes 32 codes of 4 bits, given as `(index, code)` to `value`: low nibbles are the first 16
/// weights, high nibbles the rest.
fn nibbles(qs: &[u8], out: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = out.split_at_mut(16);
    for (j, ((low, high), &q)) in low.iter_mut().zip(high).zip(qs).enumerate() {
        *low = value(j, q & 15);
        *high = value(j + 16, q >> 4);
    }
}

/// Layout: `d` f16, `qs` 16.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    nibbles(&block[2..], out, |_, q| (i32::from(q) - 8) as f32 * d);
}

/// Layout: `d` f16, `m` f16, `qs` 16.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (f16(block, 0), f16(block, 2));
    nibbles(&block[4..], out, |_, q| f32::from(q) * d + m);
}

/// The fifth bit of code `i`, in its place.
fn fifth_bit(qh: u32, i: usize) -> u8 {
    (((qh >> i) & 1) as u8) << 4
}

/// Layout: `d` f16, `qh` 4, `qs` 16.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    let qh = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(&block[6..], out, |i, q| (i32::from(q | fifth_bit(qh, i)) - 16) as f32 * d);
}

/// Layout: `d` f16, `m` f16, `qh` 4, `qs` 16.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (f16(block, 0), f16(block, 2));
    let qh = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    nibbles(&block[8..], out, |i, q| f32::from(q | fifth_bit(qh, i)) * d + m);
}

/// Layout: `d` f16, `qs` 32 × i8.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    for (o, &q) in out.iter_mut().zip(&block[2..]) {
        *o = f32::from(q as i8) * d;
    }
}

/// Where the 2-bit codes of sub-block `i` (16 weights) lie: first byte and shift. Each half of
/// 128 weights takes 32 bytes, and each pair of bits in them 32 consecutive weights.
fn two_bit_codes(i: usize) -> (usize, usize) {
    (i / 8 * 32 + i % 2 * 16, i % 8 / 2 * 2)
}

/// Layout: `scales` 16 (low nibble scale, high nibble minimum), `qs` 64, `d` f16, `dmin` f16.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, qs) = (&block[..16], &block[16..80]);
    let (d, dmin) = (f16(block, 80), f16(block, 82));
    for (i, (out, &sc)) in out.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
        let (dl, ml) = (d * f32::from(sc & 15), dmin * f32::from(sc >> 4));
        let (from, shift) = two_bit_codes(i);
        for (o, &q) in out.iter_mut().zip(&qs[from..]) {
            *o = dl * f32::from((q >> shift) & 3) - ml;
        }
    }
}

/// Layout: `hmask` 32, `qs` 64, `scales` 12, `d` f16. A code is two bits of `qs` less 4 unless its
/// bit of `hmask` is set; bit `b` of the mask bytes belongs to weights `32b..32b + 32`.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (hmask, qs, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = f16(block, 108);
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let dl = d * (i32::from(q3_k_scale(scales, i)) - 32) as f32;
        let (from, shift) = two_bit_codes(i);
        let codes = qs[from..].iter().zip(&hmask[i % 2 * 16..]);
        for (o, (&q, &h)) in out.iter_mut().zip(codes) {
            let offset = if (h >> (i / 2)) & 1 == 1 { 0 } else { 4 };
            *o = dl * (i32::from((q >> shift) & 3) - offset) as f32;
        }
    }
}

/// The 6-bit scale of sub-block `i`: four low bits in bytes 0..8, two high bits in bytes 8..12.
fn q3_k_scale(scales: &[u8], i: usize) -> u8 {
    let low = (scales[i % 8] >> (i / 8 * 4)) & 15;
    let high = (scales[8 + i % 4] >> (i / 4 * 2)) & 3;
    low | (high << 4)
}

/// The 6-bit scale and minimum of sub-block `j` (32 weights) of Q4_K and Q5_K.
fn scale_min(scales: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (scales[j] & 63, scales[j + 4] & 63)
    } else {
        let both = scales[j + 4];
        ((both & 15) | ((scales[j - 4] >> 6) << 4), (both >> 4) | ((scales[j] >> 6) << 4))
    }
}

/// Layout: `d` f16, `dmin` f16, `scales` 12, `qs` 128; each 32 bytes of `qs` hold 64 weights, low
/// nibbles first.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (f16(block, 0), f16(block, 2));
    let (scales, qs) = (&block[4..16], &block[16..]);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, m) = scale_min(scales, j);
        let (dl, ml) = (d * f32::from(sc), dmin * f32::from(m));
        for (o, &q) in out.iter_mut().zip(&qs[j / 2 * 32..]) {
            *o = dl * f32::from((q >> (j % 2 * 4)) & 15) - ml;
        }
    }
}

/// Layout: `d` f16, `dmin` f16, `scales` 12, `qh` 32, `qs` 128. As Q4_K, with bit `j` of the `qh`
/// bytes as the fifth bit of sub-block `j`.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (f16(block, 0), f16(block, 2));
    let (scales, qh, qs) = (&block[4..16], &block[16..48], &block[48..]);
    for (j, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (sc, m) = scale_min(scales, j);
        let (dl, ml) = (d * f32::from(sc), dmin * f32::from(m));
        for (o, (&q, &h)) in out.iter_mut().zip(qs[j / 2 * 32..].iter().zip(qh)) {
            let code = ((q >> (j % 2 * 4)) & 15) | (((h >> j) & 1) << 4);
            *o = dl * f32::from(code) - ml;
        }
    }
}

/// Layout: `ql` 128, `qh` 64, `scales` 16 × i8, `d` f16. In a half of 128 weights, quarter `p`
/// takes its low bits from nibble `p / 2` of 32 bytes of `ql`, its high bits from pair `p` of `qh`.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (ql, qh, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = f16(block, 208);
    for (i, (out, &sc)) in out.as_chunks_mut::<16>().0.iter_mut().zip(scales).enumerate() {
        let dl = d * f32::from(sc as i8);
        let (half, p, within) = (i / 8, i % 8 / 2, i % 2 * 16);
        let low = &ql[half * 64 + p % 2 * 32 + within..];
        let high = &qh[half * 32 + within..];
        for (o, (&l, &h)) in out.iter_mut().zip(low.iter().zip(high)) {
            let code = ((l >> (p / 2 * 4)) & 15) | (((h >> (p * 2)) & 3) << 4);
            *o = dl * (i32::from(code) - 32) as f32;
        }
    }
}

/// ggml's `kvalues_iq4nl`.
const IQ4_NL_VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// Layout: `d` f16, `qs` 16 indices into [`IQ4_NL_VALUES`].
fn iq4_nl(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = f16(block, 0);
    nibbles(&block[2..], out, |_, q| d * IQ4_NL_VALUES[usize::from(q)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `tests/fixtures/make_gguf_blocks.py` with the reference implementation.
    const GOLDEN: &str = include_str!("testdata/blocks.json");

    const TYPES: [Dtype; 11] = [
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

    fn unhex(text: &str) -> Vec<u8> {
        let digits = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap());
        digits.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
    }

    #[test]
    fn blocks_decode_as_the_reference_does() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        for dtype in TYPES {
            let entry = &golden[format!("{dtype:?}")];
            let block = unhex(entry["block"].as_str().unwrap());
            assert_eq!(block.len(), dtype.block_bytes(), "{dtype:?}");
            let want = unhex(entry["values"].as_str().unwrap());
            let mut got = vec![f32::NAN; dtype.block_len()];
            decode(dtype, &block, &mut got);
            let got: Vec<u8> = got.iter().flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!(got, want, "{dtype:?}");
        }
    }

    #[test]
    fn consecutive_blocks_do_not_mix() {
        let golden: serde_json::Value = serde_json::from_str(GOLDEN).unwrap();
        for dtype in TYPES {
            let entry = &golden[format!("{dtype:?}")];
            let block = unhex(entry["block"].as_str().unwrap());
            let mut one = vec![0.0; dtype.block_len()];
            decode(dtype, &block, &mut one);
            let mut three = vec![0.0; 3 * dtype.block_len()];
            decode(dtype, &block.repeat(3), &mut three);
            assert_eq!(three, one.repeat(3), "{dtype:?}");
        }
    }
}
