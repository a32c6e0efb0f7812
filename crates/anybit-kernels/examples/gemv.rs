//! Products from packed codes at each width, as a share of the memory's bandwidth.
//!
//! `cargo run --release -p anybit-kernels --example gemv [ROWS COLS TOKENS]`; medians of 9.

use std::time::Instant;

use anybit_core::rng::SplitMix64;
use anybit_core::{GridSpec, Plane, QuantizedMatrix};
use anybit_kernels::SpinPool;
use anybit_kernels::gemv::{Input, PackedWeight, Product, Scratch, gemv};

/// Bytes per second that the pool's threads read together.
fn bandwidth() -> f64 {
    let words = vec![1u64; 32 << 20];
    let pool = SpinPool::global();
    let mut best = 0f64;
    for _ in 0..5 {
        let started = Instant::now();
        pool.run(&|worker| {
            let share = words.len() / pool.threads();
            let own = &words[worker * share..(worker + 1) * share];
            let mut sums = [0u64; 16];
            for chunk in own.as_chunks::<16>().0 {
                sums.iter_mut().zip(chunk).for_each(|(s, w)| *s = s.wrapping_add(*w));
            }
            std::hint::black_box(sums);
        });
        best = best.max(8.0 * words.len() as f64 / started.elapsed().as_secs_f64());
    }
    best
}

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let size = |i: usize, default| sizes.get(i).copied().unwrap_or(default);
    let (rows, cols, tokens) = (size(0, 49152), size(1, 2048), size(2, 1));
    let stream = bandwidth();
    println!("{} threads, {:.1} GB/s", SpinPool::global().threads(), stream / 1e9);
    println!("{:<22} {:>8} {:>10} {:>8} {:>8}", "grid", "MB", "us", "GB/s", "share");
    let mut rng = SplitMix64::new(1);
    let x: Vec<f32> = (0..cols * tokens).map(|_| rng.normal() as f32).collect();
    let mut y = vec![0.0; rows * tokens];
    let mut scratch = Scratch::default();
    let uniform = |bits, group_size| GridSpec::affine(bits, true, group_size);
    let grids = (1..=8)
        .map(|bits| (format!("uniform {bits}, rows"), uniform(bits, None)))
        .chain(
            (2..=8).step_by(2).map(|bits| (format!("uniform {bits}, 64"), uniform(bits, Some(64)))),
        )
        .chain([("uniform 4, 32".to_string(), uniform(4, Some(32)))])
        .chain((1..=8).map(|bits| (format!("codebook {bits}"), GridSpec::Codebook { bits })));
    for (name, grid) in grids {
        let mut plane = Plane::empty(grid, rows, cols).expect("a grid");
        plane.codes.iter_mut().for_each(|word| *word = rng.next_u64() as u32);
        plane.scales.iter_mut().for_each(|s| *s = half::f16::from_f64(rng.normal()));
        let weight = PackedWeight::new(&QuantizedMatrix::single(plane)).expect("a known grouping");
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                let mut products = [Product { weight: &weight, bias: None, y: &mut y }];
                let started = Instant::now();
                gemv(Input::Values(&x), &mut products, &mut scratch);
                started.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let (bytes, seconds) = (weight.pass_bytes() as f64, times[4]);
        println!(
            "{name:<22} {:>8.1} {:>10.0} {:>8.2} {:>7.0}%",
            bytes / 1e6,
            seconds * 1e6,
            bytes / seconds / 1e9,
            100.0 * bytes / seconds / stream
        );
    }
}
