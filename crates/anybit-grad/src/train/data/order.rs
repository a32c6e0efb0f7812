//! Which sequence comes when: all of them once per epoch, in a permutation (Fisher, Yates) that
//! follows from the seed and the epoch. A position alone tells where to go on.

use std::ops::Range;

use anybit_core::rng::SplitMix64;

use super::{DataError, Result};

/// The order of sequences.
#[derive(Debug, Clone)]
pub struct Order {
    windows: usize,
    seed: u64,
    /// The epoch whose permutation is at hand.
    epoch: Option<u64>,
    permutation: Vec<u32>,
}

impl Order {
    /// The order of `windows` sequences.
    pub fn new(windows: usize, seed: u64) -> Self {
        Self { windows, seed, epoch: None, permutation: Vec::new() }
    }

    /// How many there are.
    pub fn windows(&self) -> usize {
        self.windows
    }

    /// The sequence at a position of training.
    pub fn at(&mut self, position: u64) -> usize {
        let windows = self.windows.max(1) as u64;
        let epoch = position / windows;
        if self.epoch != Some(epoch) {
            let mut rng =
                SplitMix64::new(SplitMix64::new(self.seed ^ epoch.rotate_left(32)).next_u64());
            self.permutation = (0..self.windows as u32).collect();
            for i in (1..self.windows).rev() {
                self.permutation.swap(i, rng.below(i + 1));
            }
            self.epoch = Some(epoch);
        }
        self.permutation.get((position % windows) as usize).map_or(0, |w| *w as usize)
    }
}

/// Positions of the sequences that one of `ranks` takes at a step of `batch` sequences.
///
/// # Errors
/// [`DataError::Batch`].
pub fn slice(step: u64, batch: usize, rank: usize, ranks: usize) -> Result<Range<u64>> {
    if !batch.is_multiple_of(ranks) {
        return Err(DataError::Batch { batch, ranks });
    }
    let own = (batch / ranks) as u64;
    let first = step * batch as u64 + rank as u64 * own;
    Ok(first..first + own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn epoch(order: &mut Order, epoch: u64) -> Vec<usize> {
        let n = order.windows() as u64;
        (epoch * n..(epoch + 1) * n).map(|p| order.at(p)).collect()
    }

    #[test]
    fn every_epoch_is_a_permutation_of_its_own() {
        let (mut a, mut b) = (Order::new(97, 1), Order::new(97, 2));
        let (first, second) = (epoch(&mut a, 0), epoch(&mut a, 1));
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..97).collect::<Vec<_>>());
        assert!(first != second && first != epoch(&mut b, 0));
        // Going back gives the same again.
        assert_eq!(first, epoch(&mut a, 0));
        assert_eq!(Order::new(1, 0).at(5), 0);
    }

    #[test]
    fn ranks_share_a_batch() {
        let parts: Vec<u64> = (0..4).flat_map(|rank| slice(3, 8, rank, 4).unwrap()).collect();
        assert_eq!(parts, (24..32).collect::<Vec<_>>());
        assert!(slice(0, 8, 0, 3).unwrap_err().to_string().contains("multiple of 3"));
    }
}
