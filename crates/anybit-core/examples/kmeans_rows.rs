//! Exact weighted k-means of every row of a matrix, timed on one thread: the program's half of
//! `runs/kmeans-sklearn.sh`.
//!
//!   kmeans_rows ROWS COLS BITS < values-then-weights.f32
//!
//! Prints one JSON object: seconds, and the cost of each row.

use std::io::Read;
use std::time::Instant;

use anybit_core::kmeans::Exact1d;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<usize> =
        std::env::args().skip(1).map(|a| a.parse()).collect::<Result<_, _>>()?;
    let [rows, cols, bits] = arguments[..] else { return Err("expected ROWS COLS BITS".into()) };
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    let numbers: Vec<f32> =
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    if numbers.len() != 2 * rows * cols {
        return Err(format!("expected {} numbers, found {}", 2 * rows * cols, numbers.len()).into());
    }
    let (values, weights) = numbers.split_at(rows * cols);
    let started = Instant::now();
    let solved: Vec<Exact1d> = values
        .chunks(cols)
        .zip(weights.chunks(cols))
        .map(|(x, w)| Exact1d::new(x, w, 1 << bits))
        .collect::<Result<_, _>>()?;
    let labels: usize = solved.iter().map(|s| s.solution(1 << bits).labels.len()).sum();
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(labels, rows * cols);
    let costs: Vec<String> = solved.iter().map(|s| format!("{:e}", s.cost(1 << bits))).collect();
    println!("{{\"seconds\": {seconds}, \"costs\": [{}]}}", costs.join(", "));
    Ok(())
}
