//! Rotary position embedding on half-split pairs: channel `i` turns with channel `i + d/2`.

/// Cosines and sines for every position and pair.
#[derive(Debug, Clone, Default)]
pub struct RopeTable {
    frequencies: Vec<f64>,
    /// `[positions, pairs]` of (cos, sin).
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// A table for `frequencies` (radians per position, one per pair) and `positions` positions.
    pub fn new(frequencies: Vec<f64>, positions: usize) -> Self {
        let mut table = Self { frequencies, turns: Vec::new() };
        table.grow(positions);
        table
    }

    /// Extends the table to at least `positions`.
    pub fn grow(&mut self, positions: usize) {
        for position in self.positions()..positions {
            self.turns.extend(self.frequencies.iter().map(|f| {
                let (sin, cos) = (position as f64 * f).sin_cos();
                (cos as f32, sin as f32)
            }));
        }
    }

    /// Positions that the table has.
    pub fn positions(&self) -> usize {
        self.turns.len() / self.frequencies.len().max(1)
    }

    /// Turns every head of one token in place; `x` is `[heads, 2·pairs]`.
    ///
    /// # Panics
    /// When the table is shorter than `position`.
    pub fn rotate(&self, x: &mut [f32], position: usize) {
        let pairs = self.frequencies.len();
        let turns = &self.turns[position * pairs..(position + 1) * pairs];
        for head in x.chunks_exact_mut(2 * pairs) {
            let (a, b) = head.split_at_mut(pairs);
            for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_core::rng::SplitMix64;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn equals_the_scalar_twin(pairs in 1usize..40, heads in 0usize..4, position in 0usize..5000,
                                  grown in 0usize..5000, seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let frequencies: Vec<f64> = (0..pairs).map(|_| rng.uniform()).collect();
            let x: Vec<f32> = (0..heads * 2 * pairs).map(|_| rng.normal() as f32).collect();
            // A table that grows is the one that was large from the start.
            let mut table = RopeTable::new(frequencies.clone(), grown);
            table.grow(position + 1);
            let mut y = x.clone();
            table.rotate(&mut y, position);
            let mut other = x.clone();
            RopeTable::new(frequencies.clone(), position + 1).rotate(&mut other, position);
            prop_assert_eq!(&y, &other);
            for (x, y) in x.chunks(2 * pairs).zip(y.chunks(2 * pairs)) {
                for (i, frequency) in frequencies.iter().enumerate() {
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    let (a, b) = (x[i] as f64, x[pairs + i] as f64);
                    let bound = 3e-7 * (a.abs() + b.abs());
                    let (first, second) = (y[i] as f64, y[pairs + i] as f64);
                    prop_assert!((first - (a * cos - b * sin)).abs() <= bound, "{first}");
                    prop_assert!((second - (b * cos + a * sin)).abs() <= bound, "{second}");
                }
            }
        }
    }

    #[test]
    fn dot_products_depend_on_the_distance_alone() {
        let table = RopeTable::new(vec![1.0, 0.1, 0.01], 50);
        let dot = |p: usize, q: usize| -> f32 {
            let mut a = [0.3, -1.0, 2.0, 0.5, 0.25, -0.75];
            let mut b = [1.0, 0.5, -0.3, 0.9, 2.0, 0.1];
            table.rotate(&mut a, p);
            table.rotate(&mut b, q);
            a.iter().zip(&b).map(|(x, y)| x * y).sum()
        };
        approx::assert_abs_diff_eq!(dot(3, 7), dot(43, 47), epsilon = 1e-5);
        assert!((dot(3, 7) - dot(3, 9)).abs() > 1e-3);
    }
}
