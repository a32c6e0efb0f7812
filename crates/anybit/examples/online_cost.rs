//! What the online transforms of a model cost: time of a 512-token prefill and of a decode step,
//! with them and with them taken out (the model then computes nonsense, at the same speed as a model
//! that needs none), interleaved. Give it an idle machine.
//!
//! ```sh
//! cargo run --release --example online_cost -- model-w4a4kv4
//! ```

use std::time::Instant;

use anybit::core::Site;
use anybit::io::Checkpoint;
use anybit::runtime::{Decoder, Session};

const PROMPT: usize = 512;
const STEPS: usize = 32;
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("give the folder of a model with transforms")?;
    let checkpoint = Checkpoint::open(path.as_ref())?;
    let whole = Decoder::load(&checkpoint, PROMPT + STEPS)?;
    let mut bare = Decoder::load(&checkpoint, PROMPT + STEPS)?;
    for layer in &mut bare.layers {
        Site::ALL.into_iter().for_each(|site| layer.sites.at_mut(site).transform = None);
    }
    let mut prefill = [f64::INFINITY; 2];
    let mut decode = [f64::INFINITY; 2];
    for _ in 0..ROUNDS {
        for (i, decoder) in [&whole, &bare].into_iter().enumerate() {
            let (p, d) = measure(decoder)?;
            prefill[i] = prefill[i].min(p);
            decode[i] = decode[i].min(d);
        }
    }
    for (what, [with, without]) in [("prefill of 512", prefill), ("decode step", decode)] {
        println!(
            "{what}: {:.2} ms with transforms, {:.2} ms without: {:.1}%",
            with * 1e3,
            without * 1e3,
            (with / without - 1.0) * 100.0
        );
    }
    Ok(())
}

/// Seconds of the prefill and of one decode step; the best of [`ROUNDS`] is what counts.
fn measure(decoder: &Decoder) -> Result<(f64, f64), Box<dyn std::error::Error>> {
    let vocab = decoder.config.vocab_size as u32;
    let tokens: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7 % vocab).collect();
    let mut session = Session::new(decoder, PROMPT + STEPS);
    let started = Instant::now();
    session.hidden(&tokens)?;
    let prefill = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for step in 0..STEPS as u32 {
        session.hidden(&[step % vocab])?;
    }
    Ok((prefill, started.elapsed().as_secs_f64() / STEPS as f64))
}
