//! Quantizes a model through the library and says what became of it.
//!
//! ```sh
//! cargo run --release --example quantize -- MODEL OUT METHOD BITS
//! ```
//!
//! MODEL is a Hugging Face folder or a GGUF file, OUT a folder that does not exist yet, METHOD
//! `rtn` or `gptq`, BITS a number from 1 to 8.

use std::process::ExitCode;

use anybit::io::Checkpoint;
use anybit::ptq::{Event, Plan, Recipe};
use anybit::{Error, Result, quantize};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let [model, out, method, bits] = args else {
        return Err(Error::Usage("expected MODEL OUT METHOD BITS".into()));
    };
    let bits = bits.parse().map_err(|_| Error::Usage(format!("{bits} is no number of bits")))?;
    let checkpoint = Checkpoint::open(model.as_ref())?;

    // A recipe is what `--recipe` reads from TOML. What is not set here has its default.
    let mut recipe = Recipe { method: method.clone(), bits, ..Default::default() };
    recipe.calibration.tokens = 16384;

    // The plan comes from the headers alone, to the byte: what `--dry-run` prints.
    let options = quantize::Options::new(out);
    let plan = Plan::new(&checkpoint, &recipe, Some(&options.out))?;
    if !plan.problems.is_empty() {
        return Err(Error::Usage(plan.problems.join("\n")));
    }
    println!("{} matrices to pack, {} bytes planned", plan.matrices.len(), plan.weight_bytes());

    let outcome = quantize::run(&checkpoint, &recipe, &options, &mut |event| {
        if let Event::Block(block, blocks) = event {
            eprintln!("{block} of {blocks} blocks done");
        }
    })?;

    let report = &outcome.report;
    let (bytes, bits) = (report.weight_file_bytes, report.bits_per_weight_total);
    println!("{bytes} bytes written, {bits:.3} bits per weight with everything that is stored");
    if let Some(q) = &report.quality {
        let (before, after) = (q.original_perplexity, q.quantized_perplexity);
        println!("perplexity {before:.3} before, {after:.3} after ({})", q.convention);
        println!("KL divergence from the original: {:.5} nats per token", q.kl_mean);
    }
    Ok(())
}
