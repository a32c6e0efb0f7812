//! Buffers of one step, kept for the next: the steps of a training run ask for the same lengths
//! over and over, and fresh memory from the system costs a page fault per 4 KiB.

use std::collections::BTreeMap;

/// Idle buffers of one capacity.
#[derive(Default)]
struct Shelf {
    buffers: Vec<Vec<f32>>,
    /// Fewest idle buffers since the last [`Pool::trim`]: so many were not needed.
    unused: usize,
}

/// Idle buffers by capacity.
#[derive(Default)]
pub(crate) struct Pool {
    shelves: BTreeMap<usize, Shelf>,
}

impl Pool {
    /// A buffer of `len` values of no meaning: zeros or whatever the last user left.
    pub fn take(&mut self, len: usize) -> Vec<f32> {
        let fitting = self.shelves.range_mut(len..=2 * len).find(|(_, s)| !s.buffers.is_empty());
        let Some((_, shelf)) = fitting else { return vec![0.0; len] };
        let mut buffer = shelf.buffers.pop().unwrap_or_default();
        shelf.unused = shelf.unused.min(shelf.buffers.len());
        buffer.resize(len, 0.0);
        buffer
    }

    /// Takes a buffer back.
    pub fn give(&mut self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            self.shelves.entry(buffer.capacity()).or_default().buffers.push(buffer);
        }
    }

    /// Frees what lay idle since the last call, so that the pool never outgrows one step.
    pub fn trim(&mut self) {
        self.shelves.retain(|_, shelf| {
            shelf.buffers.drain(..std::mem::take(&mut shelf.unused));
            !shelf.buffers.is_empty()
        });
    }

    /// Starts counting what lies idle.
    pub fn mark(&mut self) {
        self.shelves.values_mut().for_each(|shelf| shelf.unused = shelf.buffers.len());
    }

    #[cfg(test)]
    fn idle(&self) -> usize {
        self.shelves.values().map(|shelf| shelf.buffers.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_surplus_goes() {
        let mut pool = Pool::default();
        let (a, b) = (pool.take(100), pool.take(100));
        let at = a.as_ptr();
        pool.give(b);
        pool.give(a);
        pool.mark();
        let again = pool.take(70);
        assert_eq!((again.len(), again.as_ptr()), (70, at));
        assert!(pool.take(300).len() == 300 && pool.take(0).is_empty());
        pool.trim();
        assert_eq!(pool.idle(), 0);
        pool.give(again);
        pool.mark();
        assert_eq!(pool.idle(), 1);
    }
}
