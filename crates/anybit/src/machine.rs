//! What this machine is: instruction sets, cores, memory, and how fast memory really is.

use std::time::Instant;

use serde::Serialize;

use crate::stream;

/// What `anybit doctor` prints.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Processor architecture.
    pub arch: &'static str,
    /// Instruction-set extensions that are present and matter here.
    pub isa: Vec<&'static str>,
    /// Threads that will be used.
    pub threads: usize,
    /// Physical memory, in bytes.
    pub ram_bytes: Option<u64>,
    /// Memory that is free for use, in bytes.
    pub ram_available_bytes: Option<u64>,
    /// Measured read bandwidth over all threads, in bytes per second.
    pub read_bytes_per_s: f64,
    /// Measured f32 matrix product, in operations per second.
    pub gemm_flops: f64,
}

impl Machine {
    /// Looks and measures; takes about a second.
    pub fn measure() -> Self {
        Self {
            arch: std::env::consts::ARCH,
            isa: isa(),
            threads: rayon::current_num_threads(),
            ram_bytes: proc_value("/proc/meminfo", "MemTotal:"),
            ram_available_bytes: proc_value("/proc/meminfo", "MemAvailable:"),
            read_bytes_per_s: stream::read_bytes_per_s(rayon::current_num_threads()),
            gemm_flops: gemm_flops(),
        }
    }
}

/// Instruction-set extensions of this processor.
pub fn isa() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        macro_rules! probe {
            ($($name:tt),*) => { $(if is_x86_feature_detected!($name) { found.push($name); })* };
        }
        probe!(
            "sse4.2",
            "avx",
            "avx2",
            "fma",
            "f16c",
            "avx512f",
            "avx512bw",
            "avx512vl",
            "avx512vbmi",
            "avx512vnni",
            "avx512bf16",
            "avx512vpopcntdq"
        );
    }
    #[cfg(target_arch = "aarch64")]
    found.push("neon");
    found
}

/// A product of the shape of a prefill, best of five.
pub fn gemm_flops() -> f64 {
    let (tokens, inp, out) = (256, 576, 1536);
    let x = vec![0.5f32; tokens * inp];
    let weight = anybit_core::Matrix { rows: out, cols: inp, data: vec![0.25; out * inp] };
    let mut y = vec![0f32; tokens * out];
    let mut pass = || {
        let started = Instant::now();
        anybit_kernels::linear(&x, &weight, None, &mut y);
        (2 * tokens * inp * out) as f64 / started.elapsed().as_secs_f64()
    };
    (0..5).map(|_| pass()).fold(0.0, f64::max)
}

/// Largest resident memory of this process so far, in bytes.
pub fn peak_rss_bytes() -> Option<u64> {
    proc_value("/proc/self/status", "VmHWM:")
}

/// Resident memory of this process now, in bytes.
pub fn rss_bytes() -> Option<u64> {
    proc_value("/proc/self/status", "VmRSS:")
}

/// A "KEY: N kB" line of a proc file, in bytes.
fn proc_value(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find(|l| l.starts_with(key))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kb| kb * 1024)
}
