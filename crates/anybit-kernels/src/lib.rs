//! The loops that inference spends its time in: linears over any weight storage, linears in
//! integers, online transforms, RMSNorm, rotary embedding, SwiGLU, softmax, attention over plain or
//! packed keys and values.
//!
//! Every function splits its work into tiles whose size does not depend on the number of threads
//! and sums in a fixed order inside a tile: the same input gives the same bits on any machine
//! with the same instruction set, on any number of threads.

pub mod activation;
pub mod attention;
pub mod dot;
pub mod gemv;
pub mod integer;
pub mod isa;
pub mod kv;
pub mod linear;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod transform;

pub use activation::{add, softmax, swiglu};
pub use attention::{AttentionShape, attend_one, attention, attention_decode};
pub use gemv::{PackedWeight, gemv};
pub use integer::{BinaryWeight, CodedWeight, IntegerWeight, QuantizedRows};
pub use kv::{KvRows, PlainType};
pub use linear::linear;
pub use norm::rms_norm;
pub use pool::SpinPool;
pub use rope::RopeTable;
pub use transform::{fake_rows, quantize_rows, transform_rows};

/// Pointer to a buffer of which every task writes its own disjoint part.
pub struct DisjointMut<T = f32>(*mut T);

impl<T> Clone for DisjointMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for DisjointMut<T> {}

impl<T> DisjointMut<T> {
    /// Points to the start of `buffer`, which nothing else may touch meanwhile.
    pub fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr())
    }

    /// Address of element `index`.
    ///
    /// # Safety
    /// `index` must lie inside the buffer; what is written through the result must belong to the
    /// calling task alone.
    pub unsafe fn at(self, index: usize) -> *mut T {
        // SAFETY: inside the buffer by the caller's contract.
        unsafe { self.0.add(index) }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// They must lie inside the buffer and belong to the calling task alone while they are used.
    pub unsafe fn slice<'a>(self, first: usize, len: usize) -> &'a mut [T] {
        // SAFETY: by the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(first), len) }
    }
}

// SAFETY: the constructors' tasks write disjoint elements and read none of the others'.
unsafe impl<T: Send> Send for DisjointMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for DisjointMut<T> {}

/// Runs `f` with this thread's scratch buffer, `len` values of no meaning. Grown once, reused for
/// ever. `f` must not start parallel work: this thread could take up a task that asks for the
/// scratch again.
pub fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
    }
    SCRATCH.with_borrow_mut(|buffer| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        f(&mut buffer[..len])
    })
}
