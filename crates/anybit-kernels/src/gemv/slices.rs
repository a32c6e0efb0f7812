//! How 64 codes of `b` bits lie in `8·b` bytes, and 128 in `16·b`.
//!
//! Codes are split into *slices* of 4, 2 and 1 bits (`b` = 5 is 4 + 1, lowest bits first; 8 bits stay
//! whole), stored one after the other. With `E₀` and `E₁` either half of 64 codes:
//!
//! | slice | bytes | byte `j` holds |
//! |---|---|---|
//! | 8 | 64 | `E₀[j]`, then `E₁[j]` |
//! | 4 | 32 | `E₀[j]`, `E₁[j]` |
//! | 2 | 16 | `E₀[j]`, `E₀[16 + j]`, `E₁[j]`, `E₁[16 + j]` |
//! | 1 | 8 | `E₀[8l + j]` for `l` = 0 … 3, then `E₁[8l + j]` |
//!
//! and twice as many bytes, with twice these numbers, for 128. One load, shifts and masks give `E₀`
//! and `E₁` in bytes.

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

/// Code of a slice's byte `j`, as part `l` of it, among `count` codes.
const fn place(count: usize, width: usize, l: usize, j: usize) -> usize {
    count / 8 * width * l + j
}

/// Packs `E₀` and `E₁`, one after the other, into `N·bits / 8` bytes.
pub(super) fn pack<const N: usize>(codes: &[u8; N], bits: usize, mut out: &mut [u8]) {
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = out.split_at_mut(N / 8 * width);
        let mask = (0xffu32 >> (8 - width)) as u8;
        for (j, byte) in own.iter_mut().enumerate() {
            let part = |l| ((codes[place(N, width, l, j)] >> shift) & mask) << (width * l);
            *byte = (0..8 / width).fold(0, |b, l| b | part(l));
        }
        out = rest;
    }
}

/// The reverse of [`pack`].
pub(super) fn unpack<const N: usize>(mut bytes: &[u8], bits: usize, codes: &mut [u8; N]) {
    codes.fill(0);
    for (width, shift) in slices(bits).into_iter().flatten() {
        let (own, rest) = bytes.split_at(N / 8 * width);
        let mask = (0xffu32 >> (8 - width)) as u8;
        for (j, byte) in own.iter().enumerate() {
            for l in 0..8 / width {
                codes[place(N, width, l, j)] |= ((byte >> (width * l)) & mask) << shift;
            }
        }
        bytes = rest;
    }
}

/// [`unpack`] of 64 codes with the best instructions.
pub(super) fn unpack_fast(bytes: &[u8], bits: usize, codes: &mut [u8; 64]) {
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

    fn come_back<const N: usize>() {
        let mut rng = SplitMix64::new(1);
        for bits in 1..=8usize {
            let mask = (0xffu32 >> (8 - bits)) as u8;
            let codes: [u8; N] = std::array::from_fn(|_| rng.next_u64() as u8 & mask);
            let mut bytes = vec![0; N / 8 * bits];
            pack(&codes, bits, &mut bytes);
            let mut back = [0; N];
            unpack(&bytes, bits, &mut back);
            assert_eq!(back, codes, "{bits} bits");
        }
    }

    #[test]
    fn codes_come_back_and_are_where_the_table_says() {
        come_back::<64>();
        come_back::<128>();
        let packed = |at: usize, code: u8, bits: usize| {
            let mut codes = [0; 64];
            codes[at] = code;
            let mut bytes = vec![0; 8 * bits];
            pack(&codes, bits, &mut bytes);
            bytes
        };
        assert_eq!(packed(33, 5, 4)[1], 5 << 4);
        assert_eq!(packed(32 + 16 + 3, 3, 2)[3], 3 << 6);
        assert_eq!(packed(8 * 5 + 7, 1, 1)[7], 1 << 5);
    }
}
