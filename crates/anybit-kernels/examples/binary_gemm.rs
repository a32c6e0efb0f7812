//! Linears of signs, timed against linears of bytes: `[512, 2048] · [2048, 2048]ᵀ` with one bit
//! for weights and activations, by XOR and popcount, and with eight bits, in integers. The third
//! line is what the integers take for the same signs.
//!
//!   cargo run --release -p anybit-kernels --example binary_gemm [TOKENS [IN OUT]]
//!
//! Calls are interleaved, so that what else the machine does meets all of them; printed are
//! medians of seven. Activations are on their grids already: rounding them costs all the same.

use std::time::Instant;

use anybit_core::rng::SplitMix64;
use anybit_core::rounding::{half_integer, nearest};
use anybit_core::{ActivationQuantizer, GridSpec, Matrix, QuantizedMatrix, RowScale, ScaleFit};
use anybit_kernels::{BinaryWeight, IntegerWeight, QuantizedRows, quantize_rows};

const REPEATS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<usize> =
        std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let (tokens, cols, rows) = match arguments[..] {
        [] => (512, 2048, 2048),
        [tokens] => (tokens, 2048, 2048),
        [tokens, cols, rows] => (tokens, cols, rows),
        _ => return Err("expected TOKENS, or TOKENS IN OUT".into()),
    };
    let mut rng = SplitMix64::new(1);
    let w = (0..rows * cols).map(|_| 0.02 * rng.normal() as f32).collect();
    let w = Matrix::from_vec(rows, cols, w)?;
    let x: Vec<f32> = (0..tokens * cols).map(|_| rng.normal() as f32).collect();

    let signs = QuantizedMatrix::single(half_integer(&w, 1, None, RowScale::Rms)?);
    let binary = BinaryWeight::new(&signs, &[cols], &[1]).ok_or("no weight of signs")?;
    let integers = IntegerWeight::new(&signs, &[cols]).ok_or("no weight of integers")?;
    let bytes = nearest(&w, GridSpec::affine(8, true, None), ScaleFit::MinMax)?;
    let bytes = QuantizedMatrix::single(bytes);
    let bytes = IntegerWeight::new(&bytes, &[cols]).ok_or("no weight of bytes")?;

    let (mut one, mut eight) = (QuantizedRows::default(), QuantizedRows::default());
    quantize_rows(&ActivationQuantizer::half_integer(cols, 1, RowScale::Rms), &x, &mut one);
    quantize_rows(&ActivationQuantizer::plain(cols, 8, true), &x, &mut eight);

    let mut y = vec![0.0; tokens * rows];
    let mut same = vec![0.0; tokens * rows];
    let mut seconds: [Vec<f64>; 3] = Default::default();
    for round in 0..=REPEATS {
        let times = [
            time(|| binary.forward(&one, None, &mut y)),
            time(|| integers.forward(&one, None, &mut same)),
            time(|| bytes.forward(&eight, None, &mut same)),
        ];
        // The first round warms caches and threads.
        if round > 0 {
            seconds.iter_mut().zip(times).for_each(|(all, time)| all.push(time));
        }
    }
    integers.forward(&one, None, &mut same);
    let equal = y.iter().zip(&same).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(equal, "signs and integers differ");

    let [binary, integers, bytes] = seconds.map(median);
    let rate = |seconds: f64| (tokens * rows * cols) as f64 / seconds / 1e9;
    println!("[{tokens}, {cols}] · [{rows}, {cols}]ᵀ, {} threads", rayon::current_num_threads());
    for (name, seconds) in [
        ("1-bit signs, popcount", binary),
        ("8-bit integers", bytes),
        ("1-bit signs, integers", integers),
    ] {
        println!("{name:<22} {:>9.3} ms {:>8.1} GMAC/s", 1e3 * seconds, rate(seconds));
    }
    println!("signs are {:.2} times as fast as bytes", bytes / binary);
    Ok(())
}

fn time(f: impl FnOnce()) -> f64 {
    let started = Instant::now();
    f();
    started.elapsed().as_secs_f64()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
