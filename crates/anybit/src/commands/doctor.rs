//! `anybit doctor`.

use std::path::PathBuf;

use anybit::Result;
use anybit::kernels::isa::isa;
use anybit::machine::Machine;

use super::output::{Terminal, bytes_text, print_table, write_json};

/// Show this machine and what would be used of it: instruction sets, cores, memory, speed.
#[derive(clap::Args)]
pub struct Args {
    /// Write the figures as JSON to this file (- for standard output).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, _terminal: &Terminal) -> Result<()> {
    let machine = Machine::measure();
    if let Some(path) = &args.json {
        return write_json(path, &machine);
    }
    let memory = |bytes: Option<u64>| bytes.map_or("unknown".into(), bytes_text);
    let row = |name: &str, value: String| vec![name.to_string(), value];
    print_table(&[
        row("anybit", env!("CARGO_PKG_VERSION").to_string()),
        row("architecture", machine.arch.to_string()),
        row("instruction sets", machine.isa.join(" ")),
        row("threads", machine.threads.to_string()),
        row("memory", memory(machine.ram_bytes)),
        row("memory available", memory(machine.ram_available_bytes)),
        row("memory read", format!("{:.1} GB/s measured", machine.read_bytes_per_s / 1e9)),
        row("f32 matrix product", format!("{:.0} GFLOP/s measured", machine.gemm_flops / 1e9)),
        row("kernels used", format!("{} (ANYBIT_ISA asks for less)", isa().name())),
    ]);
    Ok(())
}
