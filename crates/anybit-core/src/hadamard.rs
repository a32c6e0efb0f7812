//! Hadamard maps: orthogonal rotations that cost additions only and store nothing.
//!
//! For `n = K·m`, `m = 2^t`, a row maps to `x T = (H_K ⊗ H_m) x / √n`: as `[K, m]`, a fast
//! Walsh–Hadamard transform along `m`, then `H_K` along `K`. `H_m` is Sylvester's matrix; `H_K` has
//! entries ±1 with `H_K H_Kᵀ = K·I` and one of these forms, `χ` the quadratic character mod `q`:
//!
//! | construction | order | matrix |
//! |---|---|---|
//! | Paley I, prime `q ≡ 3 mod 4` | `q + 1` | `[[0, 1], [−1, Q]] + I`, `Q_ij = χ(i − j)` |
//! | Paley II, prime `q ≡ 1 mod 4` | `2(q + 1)` | `[[0, 1], [1, Q]] ⊗ [[1, 1], [1, −1]] + I ⊗ [[1, −1], [−1, −1]]` |
//! | Williamson, tabulated | `4·{13, 25, 39, 43}` | `[[A, B, C, D], [−B, A, −D, C], [−C, D, A, −B], [−D, −C, B, A]]` |
//!
//! The use of such maps on activations is QuaRot's (Ashkboos et al., NeurIPS 2024); the
//! constructions are Paley's (1933) and Williamson's (1944).

use crate::scratch::with_scratch;
use crate::{CoreError, Result};

/// Largest order of `H_K`. Above it the `K²` signs and the `n·K` additions per row would cost more
/// than the map is worth; a prime just below a large size would otherwise ask for terabytes.
const MAX_ORDER: usize = 4096;

/// First rows of the symmetric circulants A, B, C, D; their length is a quarter of the order.
const WILLIAMSON: [[&str; 4]; 4] = [
    ["++++-+--+-+++", "++---+--+---+", "++---+--+---+", "+---+-++-+---"],
    [
        "++++++---+-+--+-+---+++++",
        "+++-+--+++--++--+++--+-++",
        "++-+--++-+-++++-+-++--+-+",
        "+-+++--+--++++++--+--+++-",
    ],
    [
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ],
    [
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ],
];

/// The normalized Hadamard map of rows of `n = K·2^t` channels, or of blocks of channels that lie
/// one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Hadamard {
    n: usize,
    block: usize,
    /// `K`.
    order: usize,
    /// `H_K`, row-major; empty for `K = 1`.
    signs: Vec<i8>,
}

impl Hadamard {
    /// The map that mixes all `n` channels.
    ///
    /// # Errors
    /// [`CoreError::NoHadamard`] when no construction gives a matrix of that order.
    pub fn new(n: usize) -> Result<Self> {
        Self::build(n, n).ok_or(CoreError::NoHadamard { n })
    }

    /// The map that mixes all `n` channels where one is known, else the one whose blocks are the
    /// largest divisor of `n` that has a matrix. For odd sizes that is often the identity.
    pub fn largest(n: usize) -> Self {
        // With a block its double has a matrix too, so all factors of two belong to the block.
        let power = 1usize << n.max(1).trailing_zeros();
        let odd = n / power;
        let divisors = (1..=odd).rev().step_by(2).filter(|d| odd.is_multiple_of(*d));
        let identity = Self { n, block: 1, order: 1, signs: Vec::new() };
        divisors.map(|d| d * power).find_map(|block| Self::build(n, block)).unwrap_or(identity)
    }

    /// The map that mixes every `block` consecutive channels.
    ///
    /// # Errors
    /// [`CoreError::NoHadamard`] when no construction gives a matrix of the order `block`, and
    /// [`CoreError::Shape`] when rows of `n` channels are not whole blocks.
    pub fn blocks(n: usize, block: usize) -> Result<Self> {
        let map = Self::build(n, block).ok_or(CoreError::NoHadamard { n: block })?;
        if n == 0 || !n.is_multiple_of(block) {
            let (expected, found) = (format!("a divisor of {n}"), block.to_string());
            return Err(CoreError::Shape { what: "block of a Hadamard map", expected, found });
        }
        Ok(map)
    }

    fn build(n: usize, block: usize) -> Option<Self> {
        let (order, construction) = core_of(block)?;
        let signs = if order == 1 { Vec::new() } else { construction.signs() };
        Some(Self { n, block, order, signs })
    }

    /// Channels of a row.
    pub fn size(&self) -> usize {
        self.n
    }

    /// Channels that are mixed with each other: [`size`](Self::size) unless block-diagonal.
    pub fn block(&self) -> usize {
        self.block
    }

    /// Replaces every row `x` by `x T`, where `T = (H_K ⊗ H_m)ᵀ / √(K·m)` on each block.
    ///
    /// # Panics
    /// When `rows` is not whole rows.
    pub fn apply(&self, rows: &mut [f32]) {
        self.map(rows, false);
    }

    /// Replaces every row `x` by `x Tᵀ`, which undoes [`apply`](Self::apply).
    ///
    /// # Panics
    /// When `rows` is not whole rows.
    pub fn apply_transpose(&self, rows: &mut [f32]) {
        self.map(rows, true);
    }

    /// Floating-point operations per row: `n·log₂ m + n·K` (the `n` of `K = 1` is the scaling).
    pub fn flops(&self) -> usize {
        self.n * ((self.block / self.order).ilog2() as usize + self.order)
    }

    fn map(&self, rows: &mut [f32], transposed: bool) {
        assert!(rows.len().is_multiple_of(self.n), "rows are not whole");
        let (k, m) = (self.order, self.block / self.order);
        let scale = (1.0 / (self.block as f64).sqrt()) as f32;
        with_scratch(if k == 1 { 0 } else { self.block }, |scratch| {
            for x in rows.chunks_exact_mut(self.block) {
                // `H_m` is symmetric and acts on the other axis, so only `H_K` has a transpose to
                // take.
                x.chunks_exact_mut(m).for_each(walsh);
                if k == 1 {
                    x.iter_mut().for_each(|x| *x *= scale);
                    continue;
                }
                for (i, out) in scratch.chunks_exact_mut(m).enumerate() {
                    out.fill(0.0);
                    for (j, row) in x.chunks_exact(m).enumerate() {
                        let at = if transposed { j * k + i } else { i * k + j };
                        // A product instead of a branch: the signs are as good as random.
                        let sign = self.signs[at] as f32;
                        for (out, x) in out.iter_mut().zip(row) {
                            *out += sign * x;
                        }
                    }
                }
                for (x, sum) in x.iter_mut().zip(&*scratch) {
                    *x = sum * scale;
                }
            }
        });
    }
}

/// The Hadamard matrix of order `k`, row-major with entries ±1: the matrix `H_K ⊗ H_m` that
/// [`Hadamard::apply`] stands for. `None` when no construction gives one, or above order 4096.
pub fn signs(k: usize) -> Option<Vec<i8>> {
    let (order, construction) = core_of(k).filter(|_| k <= MAX_ORDER)?;
    let (core, m) = (construction.signs(), k / order);
    Some(matrix(k, |i, j| {
        let odd = ((i % m) & (j % m)).count_ones() % 2 == 1;
        let sign = core[i / m * order + j / m];
        if odd { -sign } else { sign }
    }))
}

/// Where the signs of `H_K` come from.
#[derive(Clone, Copy)]
enum Construction {
    /// `[1]`, which leaves everything to Sylvester's matrix.
    One,
    /// The prime.
    PaleyOne(usize),
    /// The prime.
    PaleyTwo(usize),
    /// The first rows.
    Williamson([&'static str; 4]),
}

impl Construction {
    /// The construction of order `k`, a multiple of 4, without doubling.
    fn of(k: usize) -> Option<Self> {
        let half = k / 2 - 1;
        if is_prime(k - 1) {
            return Some(Self::PaleyOne(k - 1));
        }
        if half % 4 == 1 && is_prime(half) {
            return Some(Self::PaleyTwo(half));
        }
        WILLIAMSON.into_iter().find(|rows| 4 * rows[0].len() == k).map(Self::Williamson)
    }

    fn signs(self) -> Vec<i8> {
        match self {
            Self::One => vec![1],
            Self::PaleyOne(q) => {
                let character = quadratic_character(q);
                matrix(q + 1, |i, j| match (i, j) {
                    (0, _) => 1,
                    _ if i == j => 1,
                    (_, 0) => -1,
                    _ => character[(i + q - j) % q],
                })
            }
            Self::PaleyTwo(q) => {
                let character = quadratic_character(q);
                matrix(2 * (q + 1), |row, col| {
                    let (i, j, a, b) = (row / 2, col / 2, row % 2, col % 2);
                    let conference = match (i, j) {
                        _ if i == j => return [[1, -1], [-1, -1]][a][b],
                        (0, _) | (_, 0) => 1,
                        _ => character[(i + q - j) % q],
                    };
                    conference * [[1, 1], [1, -1]][a][b]
                })
            }
            Self::Williamson(rows) => {
                const SIGNS: [[i8; 4]; 4] =
                    [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]];
                let n = rows[0].len();
                matrix(4 * n, |i, j| {
                    let (a, b) = (i / n, j / n);
                    // The blocks lie as in the addition table of two bits: ABCD, BADC, CDAB, DCBA.
                    let plus = rows[a ^ b].as_bytes()[(j % n + n - i % n) % n] == b'+';
                    if plus { SIGNS[a][b] } else { -SIGNS[a][b] }
                })
            }
        }
    }
}

/// The least `K` with `n = K·2^t` that has a construction, and that construction.
fn core_of(n: usize) -> Option<(usize, Construction)> {
    if n == 0 {
        return None;
    }
    let twos = n.trailing_zeros();
    let odd = n >> twos;
    if odd == 1 {
        return Some((1, Construction::One));
    }
    let mut orders = (2..=twos).map(|t| odd << t).take_while(|&k| k <= MAX_ORDER);
    orders.find_map(|k| Some((k, Construction::of(k)?)))
}

fn matrix(k: usize, entry: impl Fn(usize, usize) -> i8) -> Vec<i8> {
    (0..k * k).map(|at| entry(at / k, at % k)).collect()
}

fn is_prime(q: usize) -> bool {
    q > 1 && (2usize..).take_while(|d| d * d <= q).all(|d| !q.is_multiple_of(d))
}

/// `χ(0) = 0`, 1 for the squares modulo the prime `q` and −1 for the rest.
fn quadratic_character(q: usize) -> Vec<i8> {
    let mut character = vec![-1; q];
    (1..q).for_each(|x| character[x * x % q] = 1);
    character[0] = 0;
    character
}

/// `x ← H_m x` for a power of two `m`, not normalized, in Sylvester's order.
fn walsh(x: &mut [f32]) {
    let mut half = x.len() / 2;
    while half >= 8 {
        butterflies(x, half);
        half /= 2;
    }
    // Strides below a vector: as constants they unroll.
    if half >= 4 {
        butterflies(x, 4);
    }
    if half >= 2 {
        butterflies(x, 2);
    }
    if half >= 1 {
        butterflies(x, 1);
    }
}

#[inline(always)]
fn butterflies(x: &mut [f32], half: usize) {
    for pair in x.chunks_exact_mut(2 * half) {
        let (low, high) = pair.split_at_mut(half);
        for (a, b) in low.iter_mut().zip(high) {
            (*a, *b) = (*a + *b, *a - *b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use proptest::prelude::*;

    fn normals(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
    }

    fn applied(map: &Hadamard, x: &[f32]) -> Vec<f32> {
        let mut y = x.to_vec();
        map.apply(&mut y);
        y
    }

    fn assert_close(found: &[f32], want: &[f32]) {
        assert_eq!(found.len(), want.len());
        for (found, want) in found.iter().zip(want) {
            approx::assert_abs_diff_eq!(*found, *want, epsilon = 2e-5);
        }
    }

    #[test]
    fn rows_are_orthogonal_in_integers() {
        let orders = [
            1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 44, 52, 60, 68, 76, 100, 104, 108, 140, 148, 156,
            172, 924,
        ];
        for k in orders {
            let h = signs(k).unwrap();
            assert!(h.len() == k * k && h.iter().all(|s| s.abs() == 1), "{k}");
            for (i, a) in h.chunks(k).enumerate() {
                for (j, b) in h.chunks(k).enumerate().take(i + 1) {
                    let product: i64 = a.iter().zip(b).map(|(a, b)| (a * b) as i64).sum();
                    assert_eq!(product, if i == j { k as i64 } else { 0 }, "order {k}: {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn sizes_of_models_mix_all_channels() {
        let sizes = [
            (14336, 28),
            (28672, 28),
            (3584, 28),
            (896, 28),
            (11008, 172),
            (13824, 108),
            (27648, 108),
            (8960, 140),
            (17920, 140),
            (4864, 76),
            (9728, 76),
            (18944, 148),
            (29568, 924),
            (17408, 68),
            (25600, 100),
            (3072, 12),
            (12288, 12),
            (1536, 12),
            (6144, 12),
            (5120, 20),
            (2560, 20),
            (6656, 52),
            (5632, 44),
            (576, 36),
            (960, 60),
            (64, 1),
            (128, 1),
            (1, 1),
        ];
        for (n, order) in sizes {
            let map = Hadamard::new(n).unwrap();
            assert_eq!((map.size(), map.block(), map.order), (n, n, order));
            assert_eq!(map.flops(), n * ((n / order).ilog2() as usize + order));
            assert_eq!(Hadamard::largest(n), map);
            assert_eq!(Hadamard::blocks(n, n).unwrap(), map);
        }
    }

    /// The last one is a prime plus one, but too large to write down.
    #[test]
    fn sizes_without_a_matrix_fall_back_to_blocks() {
        for n in [0, 3, 6, 9, 428, 13696, 1_000_002, 1_000_004] {
            assert_eq!(Hadamard::new(n), Err(CoreError::NoHadamard { n }));
            assert_eq!(signs(n), None);
            assert!(Hadamard::largest(n).block() < n.max(2));
        }
        for (n, block) in [(13696, 128), (9, 1), (6, 2), (580, 20), (0, 1)] {
            let map = Hadamard::largest(n);
            assert_eq!((map.size(), map.block()), (n, block));
        }
        let x = normals(9, 1);
        assert_eq!(applied(&Hadamard::largest(9), &x), x);
        assert_eq!(Hadamard::blocks(24, 6), Err(CoreError::NoHadamard { n: 6 }));
        assert!(matches!(Hadamard::blocks(24, 16), Err(CoreError::Shape { .. })));
        assert!(matches!(Hadamard::blocks(0, 8), Err(CoreError::Shape { .. })));
    }

    #[test]
    fn golden_vectors() {
        let x: Vec<f32> = (1..=8).map(|i| i as f32).collect();
        let y = applied(&Hadamard::new(8).unwrap(), &x);
        assert_close(
            &y,
            &[12.727922, -std::f32::consts::SQRT_2, -2.828427, 0.0, -5.656854, 0.0, 0.0, 0.0],
        );

        let x: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let y = applied(&Hadamard::new(24).unwrap(), &x);
        assert_close(&y[..6], &[56.338264, -2.44949, 9.797959, 0.0, 1.632993, 0.0]);
        approx::assert_relative_eq!(dot(&y, &y).sqrt(), 65.757129, max_relative = 1e-6);
    }

    /// Both directions against the matrix written out.
    #[test]
    fn the_map_is_its_matrix() {
        for n in [1, 2, 4, 8, 12, 24, 28, 52, 56, 64, 160, 200] {
            let (map, h, x) = (Hadamard::new(n).unwrap(), signs(n).unwrap(), normals(n, n as u64));
            let (y, mut back) = (applied(&map, &x), x.clone());
            map.apply_transpose(&mut back);
            let product = |at: &dyn Fn(usize) -> usize| -> f32 {
                let terms = x.iter().enumerate().map(|(j, x)| *x as f64 * h[at(j)] as f64);
                (terms.sum::<f64>() / (n as f64).sqrt()) as f32
            };
            let forth: Vec<f32> = (0..n).map(|i| product(&|j| i * n + j)).collect();
            let transposed: Vec<f32> = (0..n).map(|i| product(&|j| j * n + i)).collect();
            assert_close(&y, &forth);
            assert_close(&back, &transposed);
        }
    }

    #[test]
    fn rows_and_blocks_do_not_mix() {
        for (n, block) in [(72, 24), (64, 8), (56, 28), (48, 48), (15, 1)] {
            let (map, part) = (Hadamard::blocks(n, block).unwrap(), Hadamard::new(block).unwrap());
            let x = normals(5 * n, 3);
            let together = applied(&map, &x);
            let by_row: Vec<f32> = x.chunks(n).flat_map(|row| applied(&map, row)).collect();
            let by_block: Vec<f32> = x.chunks(block).flat_map(|x| applied(&part, x)).collect();
            assert_eq!(together, by_row);
            assert_eq!(together, by_block);
        }
    }

    proptest! {
        /// Orthogonality: the transpose is the inverse, lengths and angles stay.
        #[test]
        fn maps_are_orthogonal(
            k in prop::sample::select(vec![1usize, 12, 20, 28, 36, 52, 76, 100, 156, 172]),
            power in 0u32..7,
            repeats in 1usize..4,
            seed in any::<u64>(),
        ) {
            let block = k << power;
            let n = block * repeats;
            let map = Hadamard::blocks(n, block).unwrap();
            let (x, w) = (normals(n, seed), normals(n, seed ^ 1));
            let (y, v) = (applied(&map, &x), applied(&map, &w));
            let (square, area) = (dot(&x, &x), (dot(&x, &x) * dot(&w, &w)).sqrt());
            prop_assert!((dot(&y, &y) - square).abs() <= 1e-5 * square);
            prop_assert!((dot(&y, &v) - dot(&x, &w)).abs() <= 1e-5 * area);
            let mut back = y;
            map.apply_transpose(&mut back);
            let error: f64 = x.iter().zip(&back).map(|(a, b)| ((a - b) as f64).powi(2)).sum();
            prop_assert!(error <= 1e-10 * square);
        }
    }
}
