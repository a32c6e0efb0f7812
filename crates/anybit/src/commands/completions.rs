//! `anybit completions`.

use anybit::Result;
use clap::CommandFactory;
use clap_complete::Shell;

/// Print a completion script for a shell.
///
/// Example: anybit completions bash > ~/.local/share/bash-completion/completions/anybit
#[derive(clap::Args)]
pub struct Args {
    /// The shell.
    shell: Shell,
}

pub fn run(args: Args) -> Result<()> {
    let mut command = super::Cli::command();
    clap_complete::generate(args.shell, &mut command, "anybit", &mut std::io::stdout());
    Ok(())
}
