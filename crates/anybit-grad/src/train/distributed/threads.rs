//! Ranks that are threads of one process, to test what several processes do. A rank that is dropped
//! while others wait for it makes them fail instead of hang.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{CommunicationError, Communicator, Result};

/// What the ranks share.
#[derive(Debug, Default)]
struct Table {
    /// What was given in this round.
    given: Vec<Option<Vec<u8>>>,
    /// The round's result, until all have taken it.
    result: Option<Vec<u8>>,
    taken: usize,
    lost: Option<usize>,
}

/// Makes ranks.
#[derive(Debug)]
pub struct ThreadGroup;

impl ThreadGroup {
    /// `size` ranks, each for a thread of its own.
    pub fn ranks(size: usize) -> Vec<ThreadRank> {
        let table = Table { given: vec![None; size], ..Table::default() };
        let shared = Arc::new((Mutex::new(table), Condvar::new()));
        (0..size).map(|rank| ThreadRank { rank, size, shared: shared.clone() }).collect()
    }
}

/// One of them.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    size: usize,
    shared: Arc<(Mutex<Table>, Condvar)>,
}

impl ThreadRank {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, table: MutexGuard<'a, Table>) -> MutexGuard<'a, Table> {
        self.shared.1.wait(table).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Communicator for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut table = self.lock();
        // The round before may not have ended for all.
        while table.given[self.rank].is_some() || table.result.is_some() {
            if let Some(rank) = table.lost.filter(|_| table.result.is_none()) {
                return Err(CommunicationError::RankLost { rank });
            }
            table = self.wait(table);
        }
        table.given[self.rank] = Some(bytes.to_vec());
        if table.given.iter().all(Option::is_some) {
            table.result =
                Some(table.given.iter_mut().flat_map(|g| g.take().unwrap_or_default()).collect());
            self.shared.1.notify_all();
        }
        while table.result.is_none() {
            if let Some(rank) = table.lost {
                return Err(CommunicationError::RankLost { rank });
            }
            table = self.wait(table);
        }
        let result = table.result.clone().unwrap_or_default();
        table.taken += 1;
        if table.taken == self.size {
            (table.result, table.taken) = (None, 0);
            self.shared.1.notify_all();
        }
        Ok(result)
    }

    fn abort(&mut self, _message: &str) {
        self.lock().lost = Some(self.rank);
        self.shared.1.notify_all();
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        let mut table = self.lock();
        table.lost = table.lost.or(Some(self.rank));
        drop(table);
        self.shared.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::super::{same_everywhere, sum_f64, sum_gradients};
    use super::*;

    /// What every rank of three comes to.
    fn together<T: Send>(f: impl Fn(&mut ThreadRank) -> T + Send + Sync) -> Vec<T> {
        let mut ranks = ThreadGroup::ranks(3);
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| f(rank))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_the_same_bits_everywhere() {
        let value = |rank: usize, i: usize| ((rank * 31 + i) as f32 * 0.37).sin() * 1e3;
        let sizes = [5usize, 1 << 20, 3, 70_000];
        let sums = together(|rank| {
            let mut at = 0;
            let mut grads: Vec<Vec<f32>> = Vec::new();
            for size in sizes {
                grads.push((at..at + size).map(|i| value(rank.rank(), i)).collect());
                at += size;
            }
            sum_gradients(rank, &mut grads).unwrap();
            let mut loss = [rank.rank() as f64, 1.0];
            sum_f64(rank, &mut loss).unwrap();
            assert_eq!(loss, [3.0, 3.0]);
            grads.concat()
        });
        assert!(sums[0] == sums[1] && sums[1] == sums[2]);
        for (i, sum) in sums[0].iter().enumerate() {
            let want: f64 = (0..3).map(|rank| f64::from(value(rank, i))).sum();
            assert_eq!(*sum, want as f32);
        }
    }

    #[test]
    fn two_runs_are_the_same_bits() {
        let run = || {
            together(|rank| {
                let value = |i: usize| ((i * (rank.rank + 2)) as f32 * 0.61).cos() * 1e-3;
                let mut grads: Vec<Vec<f32>> =
                    vec![(0..1000).map(value).collect(), Vec::new(), vec![-0.0, 1e30]];
                sum_gradients(rank, &mut grads).unwrap();
                grads.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
            })
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn the_odd_rank_is_named() {
        let found = together(|rank| {
            let hash = if rank.rank() == 1 { [7; 32] } else { [0; 32] };
            same_everywhere(rank, "the recipe", hash).unwrap_err()
        });
        let want = CommunicationError::Differs { what: "the recipe".into(), ranks: vec![1] };
        assert!(found.iter().all(|e| *e == want));
    }

    #[test]
    fn a_lost_rank_is_no_deadlock() {
        let mut ranks = ThreadGroup::ranks(3);
        let lost = ranks.pop().unwrap();
        let found: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                ranks.iter_mut().map(|rank| scope.spawn(|| rank.barrier())).collect();
            drop(lost);
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(found.iter().all(|f| *f == Err(CommunicationError::RankLost { rank: 2 })));
    }
}
