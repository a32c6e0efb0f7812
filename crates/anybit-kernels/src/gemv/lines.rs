//! [`Lines`]: numbers that begin at a cache line, so that no vector of theirs lies in two.

use std::ops::{Deref, DerefMut};

use bytemuck::Pod;

/// Bytes of a cache line.
const LINE: usize = 64;

#[derive(Debug, Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
struct Line([u8; LINE]);

/// A buffer of numbers, aligned to cache lines.
#[derive(Debug, Clone)]
pub(super) struct Lines<T> {
    lines: Vec<Line>,
    len: usize,
    of: std::marker::PhantomData<T>,
}

impl<T> Default for Lines<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), len: 0, of: std::marker::PhantomData }
    }
}

impl<T: Pod> Lines<T> {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        let mut lines = Self::default();
        lines.resize(len);
        lines
    }

    /// Changes the length; what is new is zero, or what stood there before.
    pub fn resize(&mut self, len: usize) {
        let lines = (len * size_of::<T>()).div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines.resize(lines, Line([0; LINE]));
        }
        self.len = len;
    }
}

impl<T: Pod> Deref for Lines<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: Pod> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_at_a_line_and_stay_when_it_grows() {
        let mut lines = Lines::<i16>::zeros(3);
        lines.copy_from_slice(&[1, 2, 3]);
        lines.resize(100);
        assert_eq!((lines.as_ptr() as usize % LINE, lines.len()), (0, 100));
        assert_eq!(lines[..4], [1, 2, 3, 0]);
        assert!(Lines::<i32>::default().is_empty());
    }
}
