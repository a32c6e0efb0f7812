//! How fast memory can be read: the bound of decoding, whose every token reads every weight.
//!
//! Plain threads, each summing its own contiguous part of a buffer that no cache holds. What is
//! isolated is the read stream alone: the sums take less time than the memory, and no thread waits
//! for another before the end.

use std::hint::black_box;
use std::thread;
use std::time::Instant;

/// Bytes of the buffer; several times the last-level cache of nearly every machine.
const BYTES: usize = 256 << 20;

/// Reads of the whole buffer in one try, so that starting threads does not count.
const PASSES: usize = 4;

/// Tries, of which the best counts: others use the memory too.
const TRIES: usize = 3;

/// Bytes per second that so many threads read together.
pub fn read_bytes_per_s(threads: usize) -> f64 {
    // Ones: pages of zeros that were never written would all be one page.
    let data = vec![1u64; BYTES / size_of::<u64>()];
    let part = data.len().div_ceil(threads.max(1));
    let attempt = || {
        let started = Instant::now();
        let total = thread::scope(|scope| {
            let workers: Vec<_> =
                data.chunks(part).map(|part| scope.spawn(move || sum(part))).collect();
            workers.into_iter().map(|w| w.join().unwrap_or_default()).fold(0, u64::wrapping_add)
        });
        black_box(total);
        (PASSES * BYTES) as f64 / started.elapsed().as_secs_f64()
    };
    (0..TRIES).map(|_| attempt()).fold(0.0, f64::max)
}

/// Sums `part` [`PASSES`] times. Behind the black box it could have changed since the last pass, so
/// the compiler can neither merge passes nor drop them.
fn sum(part: &[u64]) -> u64 {
    let pass = |total, _| black_box(part).iter().fold(total, |sum: u64, v| sum.wrapping_add(*v));
    (0..PASSES).fold(0, pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_reads_everything() {
        assert_eq!(sum(&[1, 2, 3]), 6 * PASSES as u64);
        assert_eq!(sum(&[u64::MAX]), 0u64.wrapping_sub(PASSES as u64));
    }

    #[test]
    fn a_rate_that_memory_can_have() {
        let rate = read_bytes_per_s(2);
        assert!(rate > 1e8 && rate < 1e13, "{rate}");
    }
}
