//! How 64 codes of `b` bits lie in `8·b` bytes.
//!
//! Codes are split into *slices* of 4, 2 and 1 bits (`b` = 5 is 4 + 1, lowest bits first; 8 bits stay
//! whole), stored one after the other. With `E₀` and `E₁` either half of the 64 codes:
//!
//! | slice | bytes | byte `j` holds |
//! |---|---|---|
//! | 8 | 64 | `E₀[j]`, then `E₁[j]` |
//! | 4 | 32 | `E₀[j]`, `E₁[j]` |
//! | 2 | 16 | `E₀[j]`, `E₀[16 + j]`, `E₁[j]`, `E₁[16 + j]` |
//! | 1 | 8 | `E₀[8l + j]` for `l` = 0 … 3, then `E₁[8l + j]` |
//!
//! One load, shifts and masks give `E₀` and `E₁` in bytes.

/// Codes that are packed together.
pub(super) const CODES: usize = 64;

/// Slices of codes of `bits` bits: width and place of the lowest bit.
const fn slices(bits: usize) -> [Option<(usize, usize)>; 3] {
    match bits {
        1 | 2 | 4 | 8 => [Some((bits, 0)), None, None],
        3 => [Some((2, 0)), Some((1, 2)), None],
        5 => [Some((4, 0)), Some((1, 4)), None],
        6 => [Some((4, 0)), Some((2, 4)), None],
        _ => [Some((4, 0)), Some((2, 4)), Some((1, 6))],
    }
}

/// Code `at` of a slice's byte `j`, as part `l` of it.
const fn place(width: usize, l: usize, j: usize) -> usize {
    match width {
        4 => 32 * l + j,
        2 => 16 * l + j,
        _ => 8 * l + j,
    }
}

/// Packs `E₀` and `E₁`, one after the other, into `8·bits` bytes.
pub(super) fn pack(codes: &[u8; CODES], bits: usize, mut out: &mut [u8]) {
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = out.split_at_mut(8 * width);
        let mask = (0xffu32 >> (8 - width)) as u8;
        for (j, byte) in own.iter_mut().enumerate() {
            let part = |l: usize| ((codes[place(width, l, j)] >> shift) & mask) << (width * l);
            *byte = if width == 8 { codes[j] } else { (0..8 / width).fold(0, |b, l| b | part(l)) };
        }
        out = rest;
    }
}

/// The reverse of [`pack`].
pub(super) fn unpack(mut bytes: &[u8], bits: usize, codes: &mut [u8; CODES]) {
    codes.fill(0);
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = bytes.split_at(8 * width);
        let mask = (0xffu32 >> (8 - width)) as u8;
        for (j, byte) in own.iter().enumerate() {
            for l in 0..8 / width {
                let at = if width == 8 { j } else { place(width, l, j) };
                codes[at] |= ((byte >> (width * l)) & mask) << shift;
            }
        }
        bytes = rest;
    }
}

/// [`unpack`] with the best instructions.
pub(super) fn unpack_fast(bytes: &[u8], bits: usize, codes: &mut [u8; CODES]) {
    match crate::isa::isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: chosen because the machine has these instructions.
        crate::isa::Isa::Avx2 | crate::isa::Isa::Avx512 => unsafe {
            super::x86::unpack_codes(bytes, bits, codes)
        },
        _ => unpack(bytes, bits, codes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;

    #[test]
    fn codes_come_back_and_are_where_the_table_says() {
        let mut rng = SplitMix64::new(1);
        for bits in 1..=8usize {
            let mask = (0xffu32 >> (8 - bits)) as u8;
            let codes: [u8; CODES] = std::array::from_fn(|_| rng.next_u64() as u8 & mask);
            let mut bytes = vec![0; 8 * bits];
            pack(&codes, bits, &mut bytes);
            let mut back = [0; CODES];
            unpack(&bytes, bits, &mut back);
            assert_eq!(back, codes, "{bits} bits");
        }
        let mut one = [0; CODES];
        one[33] = 5;
        let mut bytes = [0; 32];
        pack(&one, 4, &mut bytes);
        assert_eq!(bytes[1], 5 << 4);
        one = [0; CODES];
        one[32 + 16 + 3] = 3;
        pack(&one, 2, &mut bytes[..16]);
        assert_eq!(bytes[3], 3 << 6);
        one = [0; CODES];
        one[8 * 5 + 7] = 1;
        pack(&one, 1, &mut bytes[..8]);
        assert_eq!(bytes[7], 1 << 5);
    }
}
