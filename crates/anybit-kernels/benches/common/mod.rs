//! What the benches share: sizes, random numbers, and the look at the instruction set.
//!
//! Every bench runs at the level that `ANYBIT_ISA` names, for the level is decided once per
//! process; `runs/kernels.sh` runs them at each. Items are multiply-adds where a bench does not say
//! otherwise.

// No bench uses all of it.
#![allow(dead_code)]

use std::fmt;

use anybit_core::rng::SplitMix64;
use anybit_core::{GridSpec, Plane};
use anybit_kernels::SpinPool;
use half::f16;

/// Columns (`in`) and rows (`out`) of a weight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Size {
    pub cols: usize,
    pub rows: usize,
}

/// The MLPs of SmolLM2-135M and of TinyLlama-1.1B.
pub const SIZES: [Size; 2] = [Size { cols: 576, rows: 1536 }, Size { cols: 2048, rows: 5632 }];

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.cols, self.rows)
    }
}

/// Rows of activations.
#[derive(Clone, Copy)]
pub struct Rows {
    pub channels: usize,
    pub tokens: usize,
}

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} channels, {} tokens", self.channels, self.tokens)
    }
}

/// One token and many of each of `channels`.
pub fn cases<const N: usize>(channels: [usize; N]) -> Vec<Rows> {
    let of = |channels| [1, 256].map(|tokens| Rows { channels, tokens });
    channels.into_iter().flat_map(of).collect()
}

/// So many numbers of a normal distribution, the same for the same seed.
pub fn normals(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..count).map(|_| rng.normal() as f32).collect()
}

/// A plane of random codes and parameters.
pub fn random_plane(grid: GridSpec, Size { cols, rows }: Size) -> Plane {
    let mut rng = SplitMix64::new(1);
    let mut plane = Plane::empty(grid, rows, cols).expect("a grid for these columns");
    let words = plane.codes.iter_mut().chain(&mut plane.zeros);
    words.for_each(|word| *word = rng.next_u64() as u32);
    let halves = plane.scales.iter_mut().chain(&mut plane.table);
    halves.for_each(|s| *s = f16::from_f64(0.02 * rng.normal()));
    plane.exact_scales.iter_mut().for_each(|s| *s = 0.02 * rng.normal() as f32);
    plane
}

/// Runs the benches of the program, if the machine has what `ANYBIT_ISA` asks for.
pub fn run() {
    if let Err(error) = anybit_kernels::isa::requested() {
        eprintln!("{error}");
        std::process::exit(2);
    }
    let isa = anybit_kernels::isa::isa();
    eprintln!("{}, {} threads", isa.name(), SpinPool::global().threads());
    divan::main();
}
