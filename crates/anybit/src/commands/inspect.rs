//! `anybit inspect`.

use std::path::PathBuf;

use anybit::io::{Checkpoint, Format};
use anybit::{Result, measure};
use serde_json::{Value, json};

use super::output::{Terminal, bytes_text, or_dash, print_table, write_json};

/// Show what a model is made of: its tensors with bits, bytes and errors.
#[derive(clap::Args)]
#[command(after_help = "Example: anybit inspect model-4bit")]
pub struct Args {
    /// A packed folder, a Hugging Face folder or a .gguf file.
    model: PathBuf,

    /// Write the table as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, _terminal: &Terminal) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let rows = tensors(&checkpoint)?;
    let (codes, total) = measure::bits_per_weight(&checkpoint)?;
    if let Some(path) = &args.json {
        let value = json!({
            "architecture": checkpoint.config.architecture.class_name(),
            "file_bytes": checkpoint.weight_file_bytes(),
            "bits_per_weight_codes": codes,
            "bits_per_weight_total": total,
            "tensors": rows,
        });
        return write_json(path, &value);
    }
    let header =
        ["tensor", "shape", "type", "bits", "total", "bytes", "weight error", "output error"];
    let mut table = vec![header.map(String::from).to_vec()];
    table.extend(rows.iter().map(table_row));
    print_table(&table);
    let format = match checkpoint.format() {
        Format::HuggingFace => "Hugging Face folder",
        Format::Gguf => "GGUF",
        Format::Native => "packed",
    };
    println!(
        "\n{} ({format}), {} in weight files; linears of the blocks: {codes:.3} code bits, \
         {total:.3} total bits per weight",
        checkpoint.config.architecture.class_name(),
        bytes_text(checkpoint.weight_file_bytes()),
    );
    Ok(())
}

fn tensors(checkpoint: &Checkpoint) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for (name, shape) in checkpoint.config.tensors() {
        let record = checkpoint.manifest().and_then(|m| m.quantized.get(&name));
        rows.push(match record {
            Some(r) => {
                let weights = r.rows as f64 * r.cols as f64;
                json!({
                    "name": name, "shape": shape, "type": r.method,
                    "bits": r.code_bits as f64 / weights,
                    "total_bits": r.bytes as f64 * 8.0 / weights,
                    "bytes": r.bytes, "relative_error": r.relative_error,
                    "output_error": r.output_error,
                })
            }
            None => {
                let tensor = checkpoint.tensor(&name)?;
                let dtype = tensor.dtype;
                json!({
                    "name": name, "shape": shape, "type": format!("{dtype:?}"),
                    "bits": dtype.code_bits(),
                    "total_bits": dtype.block_bytes() as f64 * 8.0 / dtype.block_len() as f64,
                    "bytes": tensor.bytes().len(), "relative_error": null, "output_error": null,
                })
            }
        });
    }
    Ok(rows)
}

fn table_row(row: &Value) -> Vec<String> {
    let error = |key: &str| row[key].as_f64().map_or("-".into(), |e| format!("{e:.2e}"));
    let shape: Vec<String> =
        row["shape"].as_array().into_iter().flatten().map(Value::to_string).collect();
    vec![
        row["name"].as_str().unwrap_or_default().to_string(),
        shape.join("×"),
        row["type"].as_str().unwrap_or_default().to_string(),
        or_dash(row["bits"].as_f64(), 2),
        or_dash(row["total_bits"].as_f64(), 3),
        row["bytes"].to_string(),
        error("relative_error"),
        error("output_error"),
    ]
}
