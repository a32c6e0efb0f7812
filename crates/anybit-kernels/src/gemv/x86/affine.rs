//! Products of tiles of affine codes, and their values.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::affine::{AffinePlane, COLUMNS, Scales, TILE, Zeros};
use super::super::operand::{BLOCK, Operand};
use super::{join, load};

/// Pairs of columns that are packed together.
pub(super) const PAIRS: usize = COLUMNS / 2;
/// Eight columns that follow each other in half a block.
pub(super) const STEPS: usize = BLOCK / 2 / COLUMNS;
/// Lanes of a vector of 256 bits: a tile has two *sides*.
const LANES: usize = 8;

/// An operand for a plane, and what its integers start from, as [`AffinePlane::starts`] makes it.
#[derive(Clone, Copy)]
pub(in super::super) struct Input<'a> {
    pub plane: &'a AffinePlane,
    pub x: &'a Operand,
    pub starts: &'a [i32],
}

impl Input<'_> {
    /// Where a token's codes begin.
    #[inline(always)]
    pub(super) fn codes(&self, token: usize) -> *const i16 {
        assert!(token < self.x.tokens && self.x.blocks == self.plane.blocks, "no such token");
        self.x.codes[token * self.x.blocks * BLOCK..].as_ptr()
    }

    /// Where a token's starts begin, one for each part.
    #[inline(always)]
    pub(super) fn starts(&self, token: usize) -> *const i32 {
        self.starts[token * self.plane.parts..][..self.plane.parts].as_ptr()
    }
}

/// Scales and zero points of a tile's groups, one after the other.
pub(super) struct Groups {
    pub scales: Pointer,
    /// Of stored ones.
    pub zeros: *const u8,
    /// Parts of the group that are left.
    left: usize,
    parts: usize,
}

/// Scales of a tile's group.
#[derive(Clone, Copy)]
pub(super) enum Pointer {
    Half(*const half::f16),
    Single(*const f32),
}

impl Groups {
    /// Those of a tile, from the first on.
    #[inline(always)]
    pub fn of(plane: &AffinePlane, tile: usize) -> Self {
        let own = tile * plane.groups * TILE..(tile + 1) * plane.groups * TILE;
        let scales = match &plane.scales {
            Scales::Half(s) => Pointer::Half(s[own.clone()].as_ptr()),
            Scales::Single(s) => Pointer::Single(s[own.clone()].as_ptr()),
        };
        let zeros = match &plane.zeros {
            Zeros::Fixed(_) => std::ptr::null(),
            Zeros::Stored(z) => z[own].as_ptr(),
        };
        Self { scales, zeros, left: plane.group_parts, parts: plane.group_parts }
    }

    /// Goes on to the next part; behind the last group nothing may be read.
    #[inline(always)]
    pub fn advance(&mut self) {
        self.left -= 1;
        if self.left == 0 {
            self.left = self.parts;
            self.scales = match self.scales {
                Pointer::Half(at) => Pointer::Half(at.wrapping_add(TILE)),
                Pointer::Single(at) => Pointer::Single(at.wrapping_add(TILE)),
            };
            self.zeros = self.zeros.wrapping_add(TILE);
        }
    }

    /// The scales of a side.
    ///
    /// # Safety
    /// The rows must have a group here.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn scales(&self, side: usize) -> __m256 {
        // SAFETY: by the caller's contract.
        unsafe {
            match self.scales {
                Pointer::Half(at) => _mm256_cvtph_ps(_mm_loadu_si128(at.add(LANES * side).cast())),
                Pointer::Single(at) => _mm256_loadu_ps(at.add(LANES * side)),
            }
        }
    }

    /// Stored zero points of a side.
    ///
    /// # Safety
    /// The rows must have a group here, and zero points be stored.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn stored_zeros(&self, side: usize) -> __m256i {
        // SAFETY: by the caller's contract.
        _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(self.zeros.add(LANES * side).cast()) })
    }

    /// What a part's integers start from.
    ///
    /// # Safety
    /// The rows must have a group here, and `STORED` say whether zero points are stored.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn start<const STORED: bool>(&self, side: usize, start: i32) -> __m256i {
        let start = _mm256_set1_epi32(start);
        if !STORED {
            return start;
        }
        // SAFETY: by the caller's contract.
        _mm256_mullo_epi32(start, unsafe { self.stored_zeros(side) })
    }

    /// Zero points of a side, of either kind.
    ///
    /// # Safety
    /// The rows must have a group here.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn zeros(&self, side: usize, plane: &AffinePlane) -> __m256 {
        match &plane.zeros {
            Zeros::Fixed(doubled) => _mm256_set1_ps(*doubled as f32 * 0.5),
            // SAFETY: by the caller's contract.
            Zeros::Stored(_) => _mm256_cvtepi32_ps(unsafe { self.stored_zeros(side) }),
        }
    }
}

/// # Safety
/// 64 bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(at: *const u8, side: usize) -> [__m256i; 2] {
    // SAFETY: by the caller's contract.
    super::four(unsafe { load(at.add(32 * side)) })
}

/// # Safety
/// 32 bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn two(at: *const u8, side: usize) -> [__m256i; 2] {
    // SAFETY: by the caller's contract.
    let v = unsafe { load(at) };
    let (mask, shift) = (_mm256_set1_epi8(3), 2 * side as i32);
    let e0 = _mm256_srlv_epi32(v, _mm256_set1_epi32(shift));
    let e1 = _mm256_srlv_epi32(v, _mm256_set1_epi32(4 + shift));
    [_mm256_and_si256(e0, mask), _mm256_and_si256(e1, mask)]
}

/// # Safety
/// Sixteen bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn one(at: *const u8, side: usize) -> [__m256i; 2] {
    // SAFETY: by the caller's contract.
    let v = unsafe { super::sixteen(at) };
    let (mask, shift) = (_mm256_set1_epi8(1), 2 * side as i64);
    let e0 = _mm256_srlv_epi64(v, _mm256_setr_epi64x(shift, shift, shift + 1, shift + 1));
    let e1 = _mm256_srlv_epi64(v, _mm256_setr_epi64x(shift + 4, shift + 4, shift + 5, shift + 5));
    [_mm256_and_si256(e0, mask), _mm256_and_si256(e1, mask)]
}

/// The bytes `E₀` and `E₁` of a side.
///
/// # Safety
/// `16·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn unpack<const BITS: usize>(at: *const u8, side: usize) -> [__m256i; 2] {
    // SAFETY: the slices take `16·BITS` bytes together.
    unsafe {
        match BITS {
            1 => one(at, side),
            2 => two(at, side),
            3 => join::<2>(two(at, side), one(at.add(32), side)),
            4 => four(at, side),
            5 => join::<4>(four(at, side), one(at.add(64), side)),
            6 => join::<4>(four(at, side), two(at.add(64), side)),
            7 => {
                let upper = join::<2>(two(at.add(64), side), one(at.add(96), side));
                join::<4>(four(at, side), upper)
            }
            _ => [load(at.add(32 * side)), load(at.add(64 + 32 * side))],
        }
    }
}

/// Eight columns of a side, as pairs of 16-bit numbers: a vector for each two columns.
///
/// # Safety
/// `16·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pairs<const BITS: usize>(at: *const u8, side: usize) -> [__m256i; PAIRS] {
    if BITS == 4 {
        // SAFETY: as of this function.
        let v = unsafe { load(at.add(32 * side)) };
        let mask = _mm256_set1_epi16(15);
        return [
            _mm256_and_si256(v, mask),
            _mm256_and_si256(_mm256_srli_epi16::<8>(v), mask),
            _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask),
            _mm256_srli_epi16::<12>(v),
        ];
    }
    // SAFETY: as of this function.
    let [e0, e1] = unsafe { unpack::<BITS>(at, side) };
    let low = _mm256_set1_epi16(255);
    [
        _mm256_and_si256(e0, low),
        _mm256_srli_epi16::<8>(e0),
        _mm256_and_si256(e1, low),
        _mm256_srli_epi16::<8>(e1),
    ]
}

/// A pair of neighbouring activations, in every lane.
///
/// # Safety
/// Both must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn broadcast(at: *const i16) -> __m256i {
    // SAFETY: by the caller's contract.
    _mm256_set1_epi32(unsafe { at.cast::<i32>().read_unaligned() })
}

/// Adds the products of a tile with `T` tokens to `out`.
///
/// # Safety
/// The machine must have AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn tile<const T: usize>(
    input: Input<'_>,
    tile: usize,
    tokens: [usize; T],
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function; the bits are the plane's.
    unsafe {
        with_bits!(input.plane.bits, BITS => match input.plane.zeros {
            Zeros::Fixed(_) => of_bits::<BITS, T, false>(input, tile, tokens, out),
            Zeros::Stored(_) => of_bits::<BITS, T, true>(input, tile, tokens, out),
        })
    }
}

/// Both sides at once for one token, one after the other for more: there are sixteen registers.
///
/// # Safety
/// As [`tile`], and the plane must have `BITS` bits, and `STORED` say whether zero points are stored.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn of_bits<const BITS: usize, const T: usize, const STORED: bool>(
    input: Input<'_>,
    tile: usize,
    tokens: [usize; T],
    out: &mut [[f32; TILE]; T],
) {
    // SAFETY: as of this function.
    unsafe {
        if T == 1 {
            sides::<BITS, T, 2, STORED>(input, tile, 0, tokens, out);
        } else {
            sides::<BITS, T, 1, STORED>(input, tile, 0, tokens, out);
            sides::<BITS, T, 1, STORED>(input, tile, 1, tokens, out);
        }
    }
}

/// `S` sides of a tile, from `first` on.
///
/// # Safety
/// As [`of_bits`]; there are two sides.
// A function of its own for each: registers are allotted within functions.
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn sides<const BITS: usize, const T: usize, const S: usize, const STORED: bool>(
    input: Input<'_>,
    tile: usize,
    first: usize,
    tokens: [usize; T],
    out: &mut [[f32; TILE]; T],
) {
    let (plane, x) = (input.plane, input.x);
    let bytes = plane.tile_bytes();
    let mut codes = plane.codes[tile * bytes..][..bytes].as_ptr();
    let (mut a, mut starts) = ([std::ptr::null(); T], [std::ptr::null(); T]);
    let mut sums = [[_mm256_setzero_ps(); S]; T];
    for t in 0..T {
        (a[t], starts[t]) = (input.codes(tokens[t]), input.starts(tokens[t]));
        for s in 0..S {
            // SAFETY: a side has eight sums.
            sums[t][s] = unsafe { _mm256_loadu_ps(out[t].as_ptr().add(LANES * (first + s))) };
        }
    }
    let mut groups = Groups::of(plane, tile);
    for run in 0..x.runs {
        let mut products = [[_mm256_setzero_ps(); S]; T];
        for part in plane.parts_of_run(run) {
            let mut totals = [[_mm256_setzero_si256(); S]; T];
            for t in 0..T {
                for s in 0..S {
                    // SAFETY: rows and tokens have this part.
                    totals[t][s] =
                        unsafe { groups.start::<STORED>(first + s, *starts[t].add(part)) };
                }
            }
            for _ in plane.halves(part) {
                for step in 0..STEPS {
                    let mut w = [[_mm256_setzero_si256(); PAIRS]; S];
                    for s in 0..S {
                        // SAFETY: the tile has these columns.
                        w[s] = unsafe { pairs::<BITS>(codes.add(step * 16 * BITS), first + s) };
                    }
                    for t in 0..T {
                        for p in 0..PAIRS {
                            // SAFETY: tokens have these columns.
                            let a = unsafe { broadcast(a[t].add(step * COLUMNS + 2 * p)) };
                            for s in 0..S {
                                let products = _mm256_madd_epi16(w[s][p], a);
                                totals[t][s] = _mm256_add_epi32(totals[t][s], products);
                            }
                        }
                    }
                }
                codes = codes.wrapping_add(STEPS * 16 * BITS);
                for t in 0..T {
                    a[t] = a[t].wrapping_add(BLOCK / 2);
                }
            }
            for s in 0..S {
                // SAFETY: as above.
                let scales = unsafe { groups.scales(first + s) };
                for t in 0..T {
                    let total = _mm256_cvtepi32_ps(totals[t][s]);
                    products[t][s] = _mm256_fmadd_ps(total, scales, products[t][s]);
                }
            }
            groups.advance();
        }
        for t in 0..T {
            let scale = _mm256_set1_ps(x.scales[tokens[t] * x.runs + run]);
            for s in 0..S {
                sums[t][s] = _mm256_fmadd_ps(products[t][s], scale, sums[t][s]);
            }
        }
    }
    for t in 0..T {
        for s in 0..S {
            // SAFETY: room for the eight sums of a side.
            unsafe {
                _mm256_storeu_ps(out[t].as_mut_ptr().add(LANES * (first + s)), sums[t][s]);
            }
        }
    }
}

/// Writes the values of a tile's rows `lanes` to `out`, row by row at a distance of `stride`.
///
/// # Safety
/// The machine must have AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub(in super::super) unsafe fn decode(
    plane: &AffinePlane,
    tile: usize,
    lanes: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    for side in 0..2 {
        let all = LANES * side..LANES * (side + 1);
        let own = lanes.start.max(all.start)..lanes.end.min(all.end);
        if own.is_empty() {
            continue;
        }
        let out = &mut out[(own.start - lanes.start) * stride..];
        let own = own.start - all.start..own.end - all.start;
        // SAFETY: as of this function; the bits are the plane's.
        unsafe {
            with_bits!(plane.bits, BITS => {
                decode_side::<BITS>(plane, tile, side, own, out, stride)
            });
        }
    }
}

/// # Safety
/// As [`decode`], and the plane must have `BITS` bits.
#[target_feature(enable = "avx2,f16c")]
unsafe fn decode_side<const BITS: usize>(
    plane: &AffinePlane,
    tile: usize,
    side: usize,
    lanes: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let bytes = plane.tile_bytes();
    let codes = &plane.codes[tile * bytes..][..bytes];
    let mut groups = Groups::of(plane, tile);
    for part in 0..plane.parts {
        // SAFETY: rows have this part.
        let (zero, scale) = unsafe { (groups.zeros(side, plane), groups.scales(side)) };
        groups.advance();
        let halves = plane.halves(part);
        for step in STEPS * halves.start..(STEPS * halves.end).min(plane.cols.div_ceil(COLUMNS)) {
            // SAFETY: the tile has these columns.
            let w = unsafe { pairs::<BITS>(codes.as_ptr().add(step * 16 * BITS), side) };
            let mut columns = [_mm256_setzero_ps(); COLUMNS];
            for p in 0..PAIRS {
                let even = _mm256_and_si256(w[p], _mm256_set1_epi32(0xffff));
                let odd = _mm256_srli_epi32::<16>(w[p]);
                for (at, code) in [even, odd].into_iter().enumerate() {
                    let value = _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
                    columns[2 * p + at] = _mm256_mul_ps(value, scale);
                }
            }
            let mut values = [[0f32; COLUMNS]; LANES];
            for (row, values) in transpose(columns).into_iter().zip(&mut values) {
                // SAFETY: room for eight numbers.
                unsafe { _mm256_storeu_ps(values.as_mut_ptr(), row) };
            }
            let first = step * COLUMNS;
            let count = COLUMNS.min(plane.cols - first);
            for (row, values) in values[lanes.clone()].iter().enumerate() {
                out[row * stride + first..][..count].copy_from_slice(&values[..count]);
            }
        }
    }
}

/// Rows of eight columns.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(c: [__m256; 8]) -> [__m256; 8] {
    let mut pairs = c;
    for i in 0..4 {
        pairs[2 * i] = _mm256_unpacklo_ps(c[2 * i], c[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(c[2 * i], c[2 * i + 1]);
    }
    let mut fours = c;
    for i in 0..2 {
        let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
        fours[4 * i] = _mm256_shuffle_ps::<0b01_00_01_00>(a, c);
        fours[4 * i + 1] = _mm256_shuffle_ps::<0b11_10_11_10>(a, c);
        fours[4 * i + 2] = _mm256_shuffle_ps::<0b01_00_01_00>(b, d);
        fours[4 * i + 3] = _mm256_shuffle_ps::<0b11_10_11_10>(b, d);
    }
    let mut rows = c;
    for i in 0..4 {
        rows[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[4 + i]);
        rows[4 + i] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[4 + i]);
    }
    rows
}
