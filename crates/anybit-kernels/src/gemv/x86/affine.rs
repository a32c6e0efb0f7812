//! Products of tiles of affine codes, and their values.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::affine::{AffinePlane, COLUMNS, Scales, TILE, Zeros};
use super::super::operand::{BLOCK, Operand};
use super::{load, unpack};

/// Pairs of columns that are packed together.
const PAIRS: usize = COLUMNS / 2;
/// Eight columns that follow each other in half a block.
const STEPS: usize = BLOCK / 2 / COLUMNS;

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
    fn codes(&self, token: usize) -> *const i16 {
        assert!(token < self.x.tokens && self.x.blocks == self.plane.blocks, "no such token");
        self.x.codes[token * self.x.blocks * BLOCK..].as_ptr()
    }
}

/// Scales and zero points of a tile's groups, one after the other.
struct Groups {
    scales: Pointer,
    /// Of stored ones.
    zeros: *const u8,
    /// Parts of the group that are left.
    left: usize,
    parts: usize,
}

/// Scales of a tile's group.
#[derive(Clone, Copy)]
enum Pointer {
    Half(*const half::f16),
    Single(*const f32),
}

impl Groups {
    /// Those of a tile, from the first on.
    #[inline(always)]
    fn of(plane: &AffinePlane, tile: usize) -> Self {
        let at = tile * plane.groups * TILE;
        let scales = match &plane.scales {
            Scales::Half(s) => Pointer::Half(s[at..(tile + 1) * plane.groups * TILE].as_ptr()),
            Scales::Single(s) => Pointer::Single(s[at..(tile + 1) * plane.groups * TILE].as_ptr()),
        };
        let zeros = match &plane.zeros {
            Zeros::Fixed(_) => std::ptr::null(),
            Zeros::Stored(z) => z[at..(tile + 1) * plane.groups * TILE].as_ptr(),
        };
        let parts = plane.group_parts;
        Self { scales, zeros, left: parts, parts }
    }

    /// What a part's integers start from.
    ///
    /// # Safety
    /// The row must have a group here, and `STORED` say whether zero points are stored.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn start<const STORED: bool>(&self, start: i32) -> __m256i {
        let start = _mm256_set1_epi32(start);
        if !STORED {
            return start;
        }
        // SAFETY: by the caller's contract.
        _mm256_mullo_epi32(start, unsafe { self.stored_zeros() })
    }

    /// Stored zero points of a part.
    ///
    /// # Safety
    /// The row must have a group here, and zero points be stored.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn stored_zeros(&self) -> __m256i {
        // SAFETY: by the caller's contract.
        _mm256_cvtepu8_epi32(unsafe { _mm_loadl_epi64(self.zeros.cast()) })
    }

    /// Zero points of a part, of either kind.
    ///
    /// # Safety
    /// The row must have a group here.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn zero(&self, plane: &AffinePlane) -> __m256 {
        match &plane.zeros {
            Zeros::Fixed(doubled) => _mm256_set1_ps(*doubled as f32 * 0.5),
            // SAFETY: by the caller's contract.
            Zeros::Stored(_) => _mm256_cvtepi32_ps(unsafe { self.stored_zeros() }),
        }
    }

    /// The scales of a part, after which the next one comes.
    ///
    /// # Safety
    /// The row must have a group here.
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn next(&mut self) -> __m256 {
        // SAFETY: by the caller's contract; behind the last group nothing is read.
        unsafe {
            let scales = match self.scales {
                Pointer::Half(at) => _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                Pointer::Single(at) => _mm256_loadu_ps(at),
            };
            self.left -= 1;
            if self.left == 0 {
                self.left = self.parts;
                self.scales = match self.scales {
                    Pointer::Half(at) => Pointer::Half(at.wrapping_add(TILE)),
                    Pointer::Single(at) => Pointer::Single(at.wrapping_add(TILE)),
                };
                self.zeros = self.zeros.wrapping_add(TILE);
            }
            scales
        }
    }
}

/// Eight columns of eight rows, as pairs of 16-bit numbers: a vector for each two columns.
///
/// # Safety
/// `8·BITS` bytes must be there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn pairs<const BITS: usize>(at: *const u8) -> [__m256i; PAIRS] {
    if BITS == 4 {
        // SAFETY: as of this function.
        let v = unsafe { load(at) };
        let mask = _mm256_set1_epi16(15);
        return [
            _mm256_and_si256(v, mask),
            _mm256_and_si256(_mm256_srli_epi16::<8>(v), mask),
            _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask),
            _mm256_srli_epi16::<12>(v),
        ];
    }
    // SAFETY: as of this function.
    let [e0, e1] = unsafe { unpack::<BITS>(at) };
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

/// The kernels of one instruction set.
macro_rules! kernels {
    ($module:ident, $features:literal, |$sum:ident, $w:ident, $a:ident| $add:expr) => {
        pub(in super::super) mod $module {
            use super::*;

            #[inline]
            #[target_feature(enable = $features)]
            fn multiply_add($sum: __m256i, $w: __m256i, $a: __m256i) -> __m256i {
                $add
            }

            /// Adds the products of a tile with `T` tokens to `out`.
            ///
            /// # Safety
            /// The machine must have the instructions of this module.
            #[target_feature(enable = $features)]
            pub unsafe fn tile<const T: usize>(
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

            /// # Safety
            /// As [`tile`], and the plane must have `BITS` bits, and `STORED` say whether zero points
            /// are stored.
            // A function of its own for each: registers are allotted within functions.
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn of_bits<const BITS: usize, const T: usize, const STORED: bool>(
                input: Input<'_>,
                tile: usize,
                tokens: [usize; T],
                out: &mut [[f32; TILE]; T],
            ) {
                let (plane, x) = (input.plane, input.x);
                let bytes = plane.tile_bytes();
                let mut codes = plane.codes[tile * bytes..][..bytes].as_ptr();
                let (mut a, mut starts) = ([std::ptr::null(); T], [std::ptr::null(); T]);
                let mut sums = [_mm256_setzero_ps(); T];
                for t in 0..T {
                    a[t] = input.codes(tokens[t]);
                    starts[t] = input.starts[tokens[t] * plane.parts..][..plane.parts].as_ptr();
                    // SAFETY: eight numbers are there.
                    sums[t] = unsafe { _mm256_loadu_ps(out[t].as_ptr()) };
                }
                let mut groups = Groups::of(plane, tile);
                for run in 0..x.runs {
                    let mut scales = [_mm256_setzero_ps(); T];
                    for t in 0..T {
                        scales[t] = _mm256_set1_ps(x.scales[tokens[t] * x.runs + run]);
                    }
                    for part in plane.parts_of_run(run) {
                        // Two sums of one token, so that none waits for the one before.
                        let mut totals = [[_mm256_setzero_si256(); 2]; T];
                        for t in 0..T {
                            // SAFETY: rows and tokens have this part.
                            let start = unsafe { groups.start::<STORED>(*starts[t].add(part)) };
                            totals[t][0] = start;
                        }
                        for _ in plane.halves(part) {
                            for step in 0..STEPS {
                                // SAFETY: tile and tokens have these columns.
                                unsafe {
                                    let w = pairs::<BITS>(codes.add(step * 8 * BITS));
                                    for t in 0..T {
                                        for p in 0..PAIRS {
                                            let a = broadcast(a[t].add(step * COLUMNS + 2 * p));
                                            let own = &mut totals[t][if T == 1 { p % 2 } else { 0 }];
                                            *own = multiply_add(*own, w[p], a);
                                        }
                                    }
                                }
                            }
                            codes = codes.wrapping_add(STEPS * 8 * BITS);
                            for t in 0..T {
                                a[t] = a[t].wrapping_add(BLOCK / 2);
                            }
                        }
                        // SAFETY: as above.
                        let scale = unsafe { groups.next() };
                        for t in 0..T {
                            let [mut total, other] = totals[t];
                            if T == 1 {
                                total = _mm256_add_epi32(total, other);
                            }
                            let scale = _mm256_mul_ps(scales[t], scale);
                            sums[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, sums[t]);
                        }
                    }
                }
                for t in 0..T {
                    // SAFETY: room for eight numbers.
                    unsafe { _mm256_storeu_ps(out[t].as_mut_ptr(), sums[t]) };
                }
            }
        }
    };
}

instruction_sets!(kernels);

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
    // SAFETY: as of this function; the bits are the plane's.
    unsafe { with_bits!(plane.bits, BITS => decode_bits::<BITS>(plane, tile, lanes, out, stride)) }
}

/// # Safety
/// As [`decode`], and the plane must have `BITS` bits.
#[target_feature(enable = "avx2,f16c")]
unsafe fn decode_bits<const BITS: usize>(
    plane: &AffinePlane,
    tile: usize,
    lanes: Range<usize>,
    out: &mut [f32],
    stride: usize,
) {
    let bytes = plane.tile_bytes();
    let codes = &plane.codes[tile * bytes..][..bytes];
    let mut groups = Groups::of(plane, tile);
    for part in 0..plane.parts {
        // SAFETY: rows have this part.
        let (zero, scale) = unsafe { (groups.zero(plane), groups.next()) };
        let halves = plane.halves(part);
        for step in STEPS * halves.start..(STEPS * halves.end).min(plane.cols.div_ceil(COLUMNS)) {
            // SAFETY: the tile has these columns.
            let w = unsafe { pairs::<BITS>(codes.as_ptr().add(step * 8 * BITS)) };
            let mut columns = [_mm256_setzero_ps(); COLUMNS];
            for p in 0..PAIRS {
                let even = _mm256_and_si256(w[p], _mm256_set1_epi32(0xffff));
                let odd = _mm256_srli_epi32::<16>(w[p]);
                for (at, code) in [even, odd].into_iter().enumerate() {
                    let value = _mm256_sub_ps(_mm256_cvtepi32_ps(code), zero);
                    columns[2 * p + at] = _mm256_mul_ps(value, scale);
                }
            }
            let mut values = [[0f32; COLUMNS]; TILE];
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
