//! The `anybit` command: arguments in, library calls, results out.

use std::process::ExitCode;

use clap::Parser;

mod commands;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    restore_sigpipe();
    let cli = commands::Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = error.exit_code();
            eprintln!("error: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                let text = cause.to_string();
                if !error.to_string().contains(&text) {
                    eprintln!("  because: {text}");
                }
                source = cause.source();
            }
            ExitCode::from(code)
        }
    }
}

/// A closed pipe (`anybit inspect … | head`) ends the program quietly, as it does other tools.
fn restore_sigpipe() {
    #[cfg(unix)]
    // SAFETY: called before any thread is started, with a handler that the system provides.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}
