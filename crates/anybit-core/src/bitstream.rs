//! Dense little-endian bit streams: code `i` of a row occupies bits `[i·b, i·b + b)` of the
//! row's stream, and rows are padded to 32-bit words (`docs/format.md`).

/// Words of one row of `cols` codes of `bits` bits.
pub fn words_per_row(cols: usize, bits: u8) -> usize {
    (cols * bits as usize).div_ceil(32)
}

/// Packs one row of codes, each below `2^bits`, into `words`.
///
/// # Panics
/// When `words` is shorter than [`words_per_row`] says (a bug of the caller).
pub fn pack_row(codes: &[u8], bits: u8, words: &mut [u32]) {
    assert!(words.len() >= words_per_row(codes.len(), bits), "row buffer too short");
    words.fill(0);
    let mut bit = 0usize;
    for &code in codes {
        let wide = (code as u64) << (bit % 32);
        words[bit / 32] |= wide as u32;
        let high = (wide >> 32) as u32;
        if high != 0 {
            words[bit / 32 + 1] |= high;
        }
        bit += bits as usize;
    }
}

/// Unpacks `codes.len()` codes starting at code `first` of a row. Fast from multiples of 32,
/// where a run of 32 codes is a whole number of words.
pub fn unpack_row(words: &[u32], bits: u8, first: usize, codes: &mut [u8]) {
    let whole = if first.is_multiple_of(32) { codes.len() / 32 * 32 } else { 0 };
    let (runs, tail) = codes.split_at_mut(whole);
    let start = first / 32 * bits as usize;
    match bits {
        1 => unpack_runs::<1>(&words[start..], runs),
        2 => unpack_runs::<2>(&words[start..], runs),
        3 => unpack_runs::<3>(&words[start..], runs),
        4 => unpack_runs::<4>(&words[start..], runs),
        5 => unpack_runs::<5>(&words[start..], runs),
        6 => unpack_runs::<6>(&words[start..], runs),
        7 => unpack_runs::<7>(&words[start..], runs),
        _ => unpack_runs::<8>(&words[start..], runs),
    }
    unpack_scalar(words, bits, first + whole, tail);
}

/// Whole runs of 32 codes of `B` bits: every 8 codes are `B` bytes, which fit a u64, so all shifts
/// are constants and the loop vectorizes.
fn unpack_runs<const B: usize>(words: &[u32], codes: &mut [u8]) {
    let mask = (1u64 << B) - 1;
    let runs = codes.as_chunks_mut::<32>().0;
    for (codes, words) in runs.iter_mut().zip(words.as_chunks::<B>().0) {
        // 4·B bytes of the run, and room to read 8 bytes from the last group on.
        let mut bytes = [0u8; 40];
        for (bytes, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        for (group, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let mut eight = [0u8; 8];
            eight.copy_from_slice(&bytes[group * B..group * B + 8]);
            let value = u64::from_le_bytes(eight);
            for (i, code) in codes.iter_mut().enumerate() {
                *code = (value >> (i * B) & mask) as u8;
            }
        }
    }
}

/// Any place, one code at a time: the twin of the fast path.
fn unpack_scalar(words: &[u32], bits: u8, first: usize, codes: &mut [u8]) {
    let mask = ((1u32 << bits) - 1) as u64;
    let mut bit = first * bits as usize;
    for code in codes {
        let word = bit / 32;
        let low = words[word] as u64;
        let high = words.get(word + 1).copied().unwrap_or(0) as u64;
        *code = (((high << 32 | low) >> (bit % 32)) & mask) as u8;
        bit += bits as usize;
    }
}

/// True when the bits behind the last code of a row are zero, as the format demands.
pub fn padding_is_zero(words: &[u32], cols: usize, bits: u8) -> bool {
    let used = cols * bits as usize;
    match used % 32 {
        0 => true,
        tail => words[used / 32] >> tail == 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Golden words of the SKIM specification (T9): codes (5i + 3) mod 2^b, i = 0..31.
    #[test]
    fn golden_words() {
        let cases: [(u8, &[u32]); 3] = [
            (2, &[0x93939393, 0x93939393]),
            (3, &[0x43c67543, 0x7543c675, 0xc67543c6]),
            (4, &[0x61c72d83, 0xe94fa50b, 0x61c72d83, 0xe94fa50b]),
        ];
        for (bits, want) in cases {
            let codes: Vec<u8> = (0..32u32).map(|i| ((5 * i + 3) % (1 << bits)) as u8).collect();
            let mut words = vec![0; words_per_row(32, bits)];
            pack_row(&codes, bits, &mut words);
            assert_eq!(words, want, "{bits} bits");
        }
    }

    proptest! {
        #[test]
        fn round_trip(bits in 1u8..=8, raw in prop::collection::vec(any::<u8>(), 0..200), first in 0usize..50) {
            let codes: Vec<u8> = raw.iter().map(|c| (*c as u32 & ((1 << bits) - 1)) as u8).collect();
            let mut words = vec![u32::MAX; words_per_row(codes.len(), bits)];
            pack_row(&codes, bits, &mut words);
            prop_assert!(padding_is_zero(&words, codes.len(), bits));
            let first = first.min(codes.len());
            let mut back = vec![0; codes.len() - first];
            unpack_row(&words, bits, first, &mut back);
            prop_assert_eq!(&back[..], &codes[first..]);
            unpack_scalar(&words, bits, first, &mut back);
            prop_assert_eq!(&back[..], &codes[first..]);
            let mut whole = vec![0; codes.len()];
            unpack_row(&words, bits, 0, &mut whole);
            prop_assert_eq!(&whole, &codes);
        }
    }
}
