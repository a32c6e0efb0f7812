//! Products of tiles of affine codes, and of panels of two tiles with many tokens.

// Indices instead of iterators: what passes through a closure may end up in a function without these
// instructions.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::affine::{AffinePlane, COLUMNS, Scales, TILE, Zeros};
use super::super::operand::{AT_ONCE, BLOCK, HALVES, Operand, RUN};
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
#[derive(Clone, Copy)]
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
    /// Those of a tile from `part` on, which must lie in its rows.
    #[inline(always)]
    fn from(plane: &AffinePlane, tile: usize, part: usize) -> Self {
        let at = plane.parameters(tile, part);
        let scales = match &plane.scales {
            Scales::Half(s) => Pointer::Half(s[at..(tile + 1) * plane.groups * TILE].as_ptr()),
            Scales::Single(s) => Pointer::Single(s[at..(tile + 1) * plane.groups * TILE].as_ptr()),
        };
        let zeros = match &plane.zeros {
            Zeros::Fixed(_) => std::ptr::null(),
            Zeros::Stored(z) => z[at..(tile + 1) * plane.groups * TILE].as_ptr(),
        };
        let parts = plane.group_parts;
        Self { scales, zeros, left: parts - part % parts, parts }
    }

    /// What a part's integers start from.
    ///
    /// # Safety
    /// The row must have a group here, and zero points be stored or not.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn start<const STORED: bool>(&self, start: i32) -> __m256i {
        let start = _mm256_set1_epi32(start);
        if !STORED {
            return start;
        }
        // SAFETY: by the caller's contract.
        let zeros = unsafe { _mm_loadl_epi64(self.zeros.cast()) };
        _mm256_mullo_epi32(start, _mm256_cvtepu8_epi32(zeros))
    }

    /// The scales of a part, after which the next one comes.
    ///
    /// # Safety
    /// As [`Self::start`].
    #[inline]
    #[target_feature(enable = "avx2,f16c")]
    unsafe fn next<const STORED: bool>(&mut self) -> __m256 {
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
                if STORED {
                    self.zeros = self.zeros.wrapping_add(TILE);
                }
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

/// Rows of a panel.
pub(in super::super) const PANEL_ROWS: usize = 2 * TILE;
/// Codes of a run of two tiles, as pairs: `[pairs, 16 rows, 2]`.
pub(in super::super) const PANEL: usize = RUN * BLOCK * PANEL_ROWS;

/// Runs `$call` with `BITS` the plane's bits.
macro_rules! with_bits {
    ($plane:expr, $BITS:ident => $call:expr) => {{
        match $plane.bits {
            1 => {
                const $BITS: usize = 1;
                $call
            }
            2 => {
                const $BITS: usize = 2;
                $call
            }
            3 => {
                const $BITS: usize = 3;
                $call
            }
            4 => {
                const $BITS: usize = 4;
                $call
            }
            5 => {
                const $BITS: usize = 5;
                $call
            }
            6 => {
                const $BITS: usize = 6;
                $call
            }
            7 => {
                const $BITS: usize = 7;
                $call
            }
            _ => {
                const $BITS: usize = 8;
                $call
            }
        }
    }};
}

/// Runs `$call` with `N` the count of tokens.
macro_rules! with_count {
    ($count:expr, $N:ident => $call:expr) => {{
        match $count {
            1 => {
                const $N: usize = 1;
                $call
            }
            2 => {
                const $N: usize = 2;
                $call
            }
            3 => {
                const $N: usize = 3;
                $call
            }
            4 => {
                const $N: usize = 4;
                $call
            }
            5 => {
                const $N: usize = 5;
                $call
            }
            _ => {
                const $N: usize = AT_ONCE;
                $call
            }
        }
    }};
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
                    with_bits!(input.plane, BITS => match input.plane.zeros {
                        Zeros::Fixed(_) => of_bits::<BITS, T, false>(input, tile, tokens, out),
                        Zeros::Stored(_) => of_bits::<BITS, T, true>(input, tile, tokens, out),
                    })
                }
            }

            /// # Safety
            /// As [`tile`], and the plane must have `BITS` bits, and zero points stored or not.
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
                let mut groups = Groups::from(plane, tile, 0);
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
                        let scale = unsafe { groups.next::<STORED>() };
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

            /// Adds the products of two tiles with tokens to `sums`, in the order of [`tile`].
            ///
            /// # Safety
            /// The machine must have the instructions of this module.
            #[target_feature(enable = $features)]
            pub unsafe fn panel(
                input: Input<'_>,
                tiles: [usize; 2],
                tokens: Range<usize>,
                panel: &mut [i16],
                sums: &mut [[f32; PANEL_ROWS]],
            ) {
                assert!(sums.len() == tokens.len() && panel.len() == PANEL, "room of another size");
                for run in 0..input.x.runs {
                    // SAFETY: as of this function; the bits are the plane's.
                    unsafe {
                        with_bits!(input.plane, BITS => unpack_run::<BITS>(input, tiles, run, panel));
                        let mut first = 0;
                        for sums in sums.chunks_mut(AT_ONCE) {
                            let (zeros, token) = (&input.plane.zeros, tokens.start + first);
                            with_count!(sums.len(), N => match zeros {
                                Zeros::Fixed(_) => {
                                    multiply::<N, false>(input, tiles, run, panel, token, sums)
                                }
                                Zeros::Stored(_) => {
                                    multiply::<N, true>(input, tiles, run, panel, token, sums)
                                }
                            });
                            first += sums.len();
                        }
                    }
                }
            }

            /// # Safety
            /// As [`panel`], and the plane must have `BITS` bits and this run.
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn unpack_run<const BITS: usize>(
                input: Input<'_>,
                tiles: [usize; 2],
                run: usize,
                panel: &mut [i16],
            ) {
                let plane = input.plane;
                let bytes = plane.tile_bytes();
                let end = (2 * plane.blocks).min((run + 1) * HALVES);
                for (side, tile) in tiles.into_iter().enumerate() {
                    let codes = &plane.codes[tile * bytes..][..bytes];
                    let mut out = panel.as_mut_ptr();
                    for step in run * HALVES * STEPS..end * STEPS {
                        // SAFETY: the tile has these columns, and the panel room for a run.
                        unsafe {
                            let w = pairs::<BITS>(codes.as_ptr().add(step * 8 * BITS));
                            for p in 0..PAIRS {
                                let at = out.add((2 * p + side) * 2 * TILE);
                                _mm256_storeu_si256(at.cast(), w[p]);
                            }
                            out = out.add(PAIRS * 2 * PANEL_ROWS);
                        }
                    }
                }
            }

            /// Adds a run's products of two tiles with `N` tokens from `token` on, a multiple of
            /// [`AT_ONCE`].
            ///
            /// # Safety
            /// As [`panel`]; the panel must hold the run, and zero points be stored or not.
            #[inline(never)]
            #[target_feature(enable = $features)]
            unsafe fn multiply<const N: usize, const STORED: bool>(
                input: Input<'_>,
                tiles: [usize; 2],
                run: usize,
                panel: &[i16],
                token: usize,
                sums: &mut [[f32; PANEL_ROWS]],
            ) {
                let (plane, parts, runs) = (input.plane, input.plane.parts, input.x.runs);
                let pairs = plane.blocks * BLOCK / 2;
                let codes = &input.x.interleaved[token * pairs..(token + N) * pairs];
                let starts = &input.starts[token * parts..(token + N) * parts];
                let scales = &input.x.scales[token * runs..(token + N) * runs];
                let sums = sums.first_chunk_mut::<N>().expect("sums of the tokens");
                let first = run * HALVES;
                let mut w = panel.as_ptr();
                // SAFETY: tokens have this run.
                let mut a = unsafe { codes.as_ptr().add(first * BLOCK / 4 * N) };
                let mut groups = tiles.map(|tile| Groups::from(plane, tile, first >> plane.part_log2));
                for part in plane.parts_of_run(run) {
                    let mut totals = [[_mm256_setzero_si256(); 2]; N];
                    for _ in 0..plane.halves(part).len() * BLOCK / 4 {
                        // SAFETY: panel and tokens have these columns.
                        unsafe {
                            let own = [load(w), load(w.add(2 * TILE))];
                            for t in 0..N {
                                let a = broadcast(a.add(t).cast());
                                for side in 0..2 {
                                    totals[t][side] = multiply_add(totals[t][side], own[side], a);
                                }
                            }
                            (w, a) = (w.add(2 * PANEL_ROWS), a.add(N));
                        }
                    }
                    for side in 0..2 {
                        for t in 0..N {
                            // SAFETY: rows and tokens have this part and run, and sums eight numbers.
                            unsafe {
                                let start = *starts.get_unchecked(t * parts + part);
                                let start = groups[side].start::<STORED>(start);
                                let total = _mm256_add_epi32(totals[t][side], start);
                                totals[t][side] = _mm256_castps_si256(_mm256_cvtepi32_ps(total));
                            }
                        }
                        // SAFETY: as above.
                        let scale = unsafe { groups[side].next::<STORED>() };
                        for t in 0..N {
                            // SAFETY: as above.
                            unsafe {
                                let own = _mm256_set1_ps(*scales.get_unchecked(t * runs + run));
                                let total = _mm256_castsi256_ps(totals[t][side]);
                                let at = sums[t].as_mut_ptr().add(side * TILE);
                                let sum = _mm256_loadu_ps(at);
                                let sum = _mm256_fmadd_ps(total, _mm256_mul_ps(own, scale), sum);
                                _mm256_storeu_ps(at, sum);
                            }
                        }
                    }
                }
            }
        }
    };
}

kernels!(avx2, "avx2,fma,f16c", |sum, w, a| _mm256_add_epi32(sum, _mm256_madd_epi16(w, a)));
kernels!(avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", |sum, w, a| {
    _mm256_dpwssd_epi32(sum, w, a)
});
