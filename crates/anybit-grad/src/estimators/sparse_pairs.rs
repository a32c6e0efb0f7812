//! Half of the pairs kept: of every 8 consecutive entries, as 4 pairs, the 2 pairs of the largest
//! norm are put on the uniform grid of the whole row, and the other 2 become zero. (QuEST's "2:4
//! INT4", in truth the hardware's 4:8 format of pairs.) For weights: 2.5 bits each at 4 bits.
//!
//! The error of a zeroed entry is its magnitude, so trust lets it pass when `|a| ≤ Δ/2`.

use super::rows::RowGrid;
use super::uniform::UniformGrid;

/// Entries from which pairs are chosen.
const GROUP: usize = 8;

/// The grid.
#[derive(Debug, Clone, Copy)]
pub(super) struct SparsePairs {
    /// The grid of what is kept.
    pub kept: UniformGrid,
}

/// Which of 4 pairs are kept: the 2 of the largest norm, earlier ones of equals.
fn kept_pairs(group: &[f32]) -> [bool; 4] {
    let norm: [f32; 4] =
        std::array::from_fn(|p| group[2 * p] * group[2 * p] + group[2 * p + 1] * group[2 * p + 1]);
    std::array::from_fn(|p| {
        let larger = |q: &usize| norm[*q] > norm[p] || (norm[*q] == norm[p] && *q < p);
        (0..4).filter(larger).count() < 2
    })
}

impl RowGrid for SparsePairs {
    fn columns(&self) -> usize {
        GROUP
    }

    fn quantize(&self, row: &mut [f32], mask: &mut [u64]) {
        let end = self.kept.end(row);
        let (step, limit) = (self.kept.step(end), self.kept.limit(end));
        for (index, group) in row.chunks_exact_mut(GROUP).enumerate() {
            let kept = kept_pairs(group);
            let mut bits = 0;
            for (i, a) in group.iter_mut().enumerate() {
                let (value, limit) = match kept[i / 2] {
                    true => (self.kept.value(*a, step), limit),
                    false => (0.0, 0.5 * step),
                };
                bits |= u64::from(a.abs() <= limit) << i;
                *a = value;
            }
            mask[index / 8] |= bits << (index % 8 * GROUP);
        }
    }
}
