//! Threads that wait for work without sleeping, for the many short parallel steps of one token.
//!
//! A decode step runs hundreds of parallel regions of some microseconds each: waking a sleeping
//! thread would cost more than the work. Threads therefore spin for a while after each region,
//! longer than the serial parts between two regions of a token, and sleep when nothing comes.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::DisjointMut;

/// How long an idle thread spins before it sleeps.
const SPIN: Duration = Duration::from_micros(300);
/// Looks at the shared counter between two looks at the clock.
const LOOKS: u32 = 64;

type Job = dyn Fn(usize) + Sync;

/// What threads share.
struct Shared {
    /// Counts regions; a change is the signal to start.
    region: AtomicUsize,
    /// Threads that are not through with the region.
    busy: AtomicUsize,
    /// The region's work. Written by the caller while no thread is busy.
    job: UnsafeCell<*const Job>,
    asleep: Vec<AtomicBool>,
    panicked: AtomicBool,
    closing: AtomicBool,
}

// SAFETY: `job` is written only while `busy` is zero and read only after `region` has changed,
// with release and acquire in between; what it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is never used outside a region, whose caller keeps its target alive.
unsafe impl Send for Shared {}

/// A pool of spinning threads; the calling thread is one of its workers.
pub struct SpinPool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// One region at a time.
    caller: Mutex<()>,
}

impl SpinPool {
    /// A pool of `threads` workers, the caller of [`Self::run`] included; at least one.
    pub fn new(threads: usize) -> Self {
        fn nothing(_: usize) {}
        let others = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            region: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            job: UnsafeCell::new(&nothing as *const Job),
            asleep: (0..others).map(|_| AtomicBool::new(false)).collect(),
            panicked: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        });
        let spawn = |index: usize| {
            let shared = shared.clone();
            let name = format!("anybit-{}", index + 1);
            let work = move || shared.work(index);
            let handle = std::thread::Builder::new().name(name).spawn(work);
            let handle = handle.expect("the system refuses to start a thread");
            (handle.thread().clone(), Some(handle))
        };
        let workers = (0..others).map(spawn).collect();
        Self { shared, workers, caller: Mutex::new(()) }
    }

    /// The pool of the process, as many threads as rayon's.
    pub fn global() -> &'static Self {
        static POOL: OnceLock<SpinPool> = OnceLock::new();
        POOL.get_or_init(|| Self::new(rayon::current_num_threads()))
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(worker)` once for each worker and waits for all. Where another thread has the
    /// pool at the moment, the caller does everything itself.
    ///
    /// # Panics
    /// When a worker's part panics.
    pub fn run(&self, job: &(dyn Fn(usize) + Sync)) {
        let threads = self.threads();
        let _caller = match self.caller.try_lock() {
            Ok(guard) => guard,
            // Some job panicked: the pool itself is whole.
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return (0..threads).for_each(job),
        };
        if threads == 1 {
            return job(0);
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; this call does not return before every worker is
        // through with the job, even when its own part panics.
        let endless =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync), *const Job>(job) };
        // SAFETY: no worker is busy, so none reads it.
        unsafe { *shared.job.get() = endless };
        // Where the caller's own part panicked too, nobody has asked about the workers'.
        shared.panicked.store(false, Ordering::Relaxed);
        shared.busy.store(threads - 1, Ordering::Relaxed);
        shared.region.fetch_add(1, Ordering::SeqCst);
        for (asleep, (thread, _)) in shared.asleep.iter().zip(&self.workers) {
            if asleep.swap(false, Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let wait = Wait(shared);
        job(0);
        drop(wait);
        if shared.panicked.swap(false, Ordering::Relaxed) {
            panic!("a worker of the pool panicked");
        }
    }
}

impl SpinPool {
    /// Runs `job(task)` once for each of `tasks`, the next one on whichever worker is free.
    ///
    /// # Panics
    /// When a task panics.
    pub fn each(&self, tasks: usize, job: impl Fn(usize) + Sync) {
        if tasks <= 1 {
            return (0..tasks).for_each(job);
        }
        let next = AtomicUsize::new(0);
        self.run(&|_| {
            loop {
                let task = next.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    return;
                }
                job(task);
            }
        });
    }

    /// Runs `job(at, chunk)` for `values` in chunks of `size`, of which the last may be shorter.
    ///
    /// # Panics
    /// When a job panics, or chunks have no elements.
    pub fn chunks<T: Send>(
        &self,
        values: &mut [T],
        size: usize,
        job: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let (len, all) = (values.len(), DisjointMut::new(values));
        self.each(len.div_ceil(size), |at| {
            let first = at * size;
            // SAFETY: chunks lie inside and do not overlap.
            job(at, unsafe { all.slice(first, size.min(len - first)) });
        });
    }
}

/// Waits for all workers when it is dropped.
struct Wait<'a>(&'a Shared);

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut looks = 0u32;
        while self.0.busy.load(Ordering::Acquire) != 0 {
            looks = looks.wrapping_add(1);
            // More threads than processors: let the others run.
            match looks.is_multiple_of(1 << 14) {
                true => std::thread::yield_now(),
                false => std::hint::spin_loop(),
            }
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut seen = 0;
        while let Some(region) = self.next(seen, index) {
            seen = region;
            // SAFETY: the region has begun, and its caller keeps the job alive until this
            // worker is no longer busy.
            let job = unsafe { &**self.job.get() };
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(index + 1)));
            if outcome.is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Waits for the region after `seen`; `None` when the pool closes.
    fn next(&self, seen: usize, index: usize) -> Option<usize> {
        let mut idle: Option<Instant> = None;
        loop {
            for _ in 0..LOOKS {
                let region = self.region.load(Ordering::Acquire);
                if region != seen {
                    return (!self.closing.load(Ordering::Acquire)).then_some(region);
                }
                std::hint::spin_loop();
            }
            if idle.get_or_insert_with(Instant::now).elapsed() < SPIN {
                continue;
            }
            self.asleep[index].store(true, Ordering::SeqCst);
            if self.region.load(Ordering::SeqCst) == seen {
                std::thread::park();
            }
            self.asleep[index].store(false, Ordering::SeqCst);
            idle = None;
        }
    }
}

impl Drop for SpinPool {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        self.shared.region.fetch_add(1, Ordering::SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                // A worker catches panics of its jobs and has none of its own.
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_worker_has_its_part_of_every_region() {
        for threads in [1, 2, 3] {
            let pool = SpinPool::new(threads);
            let sums: Vec<AtomicU64> = (0..threads).map(|_| AtomicU64::new(0)).collect();
            for round in 0..2000u64 {
                // Now and then long enough for workers to fall asleep.
                if round % 500 == 499 {
                    std::thread::sleep(Duration::from_millis(2));
                }
                pool.run(&|worker| {
                    sums[worker].fetch_add(round, Ordering::Relaxed);
                });
            }
            for sum in &sums {
                assert_eq!(sum.load(Ordering::Relaxed), 1999 * 2000 / 2);
            }
        }
    }

    #[test]
    fn tasks_and_chunks_are_done_once_each() {
        let pool = SpinPool::new(3);
        for len in [0, 1, 7, 1000] {
            for size in [1, 4, 2000] {
                let mut values = vec![0; len];
                pool.chunks(&mut values, size, |at, chunk| {
                    assert!(chunk.len() <= size);
                    chunk.iter_mut().enumerate().for_each(|(i, v)| *v += at * size + i);
                });
                assert!(values.iter().copied().eq(0..len));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = SpinPool::new(2);
        for guilty in 0..2 {
            let run = std::panic::AssertUnwindSafe(|| {
                pool.run(&|worker| assert_ne!(worker, guilty, "on purpose"));
            });
            assert!(std::panic::catch_unwind(run).is_err());
        }
        pool.run(&|_| {});
    }

    /// The caller's panic is the one that is heard; the worker's must not be heard a region later.
    #[test]
    fn a_panic_of_all_leaves_nothing_behind() {
        let pool = SpinPool::new(3);
        let run = std::panic::AssertUnwindSafe(|| {
            pool.run(&|worker| assert!(worker > 2, "on purpose"));
        });
        assert!(std::panic::catch_unwind(run).is_err());
        pool.run(&|_| {});
    }

    /// Other threads ask for the pool at the same time: whoever does not get it works alone, and
    /// nobody's parts are lost or done twice.
    #[test]
    fn regions_of_several_callers_do_not_mix() {
        let pool = SpinPool::new(2);
        std::thread::scope(|scope| {
            for caller in 0..3u64 {
                let pool = &pool;
                scope.spawn(move || {
                    for round in 0..500 {
                        let parts = [AtomicU64::new(0), AtomicU64::new(0)];
                        pool.run(&|worker| {
                            parts[worker].fetch_add(1 + caller + round, Ordering::Relaxed);
                        });
                        let done = parts.each_ref().map(|p| p.load(Ordering::Relaxed));
                        assert_eq!(done, [1 + caller + round; 2]);
                    }
                });
            }
        });
    }

    #[test]
    fn a_region_inside_a_region_is_done_by_its_caller() {
        let pool = SpinPool::new(2);
        let count = AtomicU64::new(0);
        pool.run(&|_| {
            pool.run(&|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(count.load(Ordering::Relaxed), 4);
    }
}
