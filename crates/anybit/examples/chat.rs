//! Talks with a model: each line of standard input is a message, the answers stream to standard
//! output, and the model sees the whole conversation.
//!
//! ```sh
//! cargo run --release --example chat -- MODEL
//! ```
//!
//! MODEL is anything that `anybit generate` reads, with a chat template.

use std::io::Write;
use std::process::ExitCode;

use anybit::io::Checkpoint;
use anybit::io::tokenizer::chat::Message;
use anybit::runtime::{Decoder, GenerateOptions, Session, generate};
use anybit::{Error, Result};

/// Longest conversation, in tokens.
const CONTEXT: usize = 2048;

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
    let [model] = args else { return Err(Error::Usage("expected MODEL".into())) };
    let checkpoint = Checkpoint::open(model.as_ref())?;
    let tokenizer = checkpoint.tokenizer()?;
    let template = checkpoint
        .chat_template(&tokenizer)?
        .ok_or_else(|| Error::Usage(format!("{model} has no chat template")))?;

    // The decoder holds the weights, the session what was read: cache and buffers.
    let context = CONTEXT.min(checkpoint.config.max_positions);
    let decoder = Decoder::load(&checkpoint, context)?;
    let mut session = Session::new(&decoder, context);
    let options = GenerateOptions { max_tokens: 128, ..Default::default() };

    let mut stdout = std::io::stdout();
    let mut messages = Vec::new();
    for line in std::io::stdin().lines() {
        let line = line.map_err(|e| Error::Usage(format!("cannot read a message: {e}")))?;
        messages.push(Message::new("user", line));
        // The template writes its own special tokens.
        let prompt = tokenizer.encode(&template.render(&messages, true)?, false)?;
        session.clear();
        let mut emit = |piece: &str| {
            // A closed pipe ends the printing, not the generation.
            let _ = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush());
        };
        let answer = generate(&decoder, &mut session, &tokenizer, &prompt, &options, &mut emit)?;
        emit("\n");
        messages.push(Message::new("assistant", answer.text));
    }
    Ok(())
}
