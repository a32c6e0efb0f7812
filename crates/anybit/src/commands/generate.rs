//! `anybit generate`.

use std::io::Write;
use std::path::PathBuf;

use anybit::io::Checkpoint;
use anybit::io::tokenizer::chat::Message;
use anybit::runtime::{Decoder, GenerateOptions, SamplerOptions, Session, generate};
use anybit::{Error, Result};

use super::KvType;
use super::output::{Terminal, write_json};

/// Generate text with a model, as it comes.
///
/// A model with a chat template answers the prompt as a user's message; --raw continues it as
/// plain text.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  anybit generate model-4bit --prompt \"What is the capital of France?\"
  anybit generate model.gguf --raw --prompt \"Once upon a time\" --temperature 0.8 --top-p 0.95
  echo \"Name three rivers.\" | anybit generate model-4bit --prompt -")]
pub struct Args {
    /// The model: a folder or a .gguf file.
    model: PathBuf,

    /// The prompt; - reads it from standard input.
    #[arg(long, short, value_name = "TEXT")]
    prompt: String,

    /// System message of the chat template.
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the prompt as it is, without the chat template.
    #[arg(long)]
    raw: bool,

    /// Most tokens to generate.
    #[arg(long, short = 'n', default_value_t = 256)]
    max_tokens: usize,

    /// Longest context, prompt included; the model's own by default.
    #[arg(long)]
    ctx: Option<usize>,

    /// How keys and values are cached where the model does not say it.
    #[arg(long, value_enum, default_value_t = KvType::F16)]
    kv_type: KvType,

    /// Logits are divided by this; 0 always takes the most probable token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,

    /// Keep this many most probable tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    top_k: usize,

    /// Keep the most probable tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,

    /// Keep tokens with at least this share of the largest probability.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,

    /// Divide the logits of tokens seen before by this.
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f32,

    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,

    /// End before this string; may be repeated.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on after the model's end token.
    #[arg(long)]
    ignore_eos: bool,

    /// Write text, tokens and timings as JSON to this file (- for standard output, in place of
    /// the text).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

pub fn run(args: Args, terminal: &Terminal) -> Result<()> {
    let checkpoint = Checkpoint::open(&args.model)?;
    let tokenizer = checkpoint.tokenizer()?;
    let prompt = match args.prompt.as_str() {
        "-" => std::io::read_to_string(std::io::stdin())
            .map_err(|e| Error::Usage(format!("cannot read the prompt: {e}")))?,
        text => text.to_string(),
    };
    let tokens = match checkpoint.chat_template(&tokenizer)?.filter(|_| !args.raw) {
        Some(template) => {
            let message = |role: &str, content: &str| Message {
                role: role.to_string(),
                content: content.to_string(),
            };
            let mut messages: Vec<Message> =
                args.system.iter().map(|s| message("system", s)).collect();
            messages.push(message("user", &prompt));
            // The template writes its own special tokens.
            tokenizer.encode(&template.render(&messages, true)?, false)?
        }
        None if args.system.is_some() => {
            return Err(Error::Usage("--system needs a model with a chat template".into()));
        }
        None => tokenizer.encode(&prompt, true)?,
    };
    let needed = tokens.len().saturating_add(args.max_tokens);
    let context = args.ctx.unwrap_or(checkpoint.config.max_positions).min(needed.max(1));
    let decoder = Decoder::load(&checkpoint, context)?;
    let mut session = Session::with_cache(&decoder, context, args.kv_type.into());
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampler: SamplerOptions {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            min_p: args.min_p,
            repetition_penalty: args.repetition_penalty,
            seed: args.seed,
        },
        stop: args.stop,
        ignore_eos: args.ignore_eos,
    };
    let to_stdout = args.json.as_ref().is_none_or(|p| p.as_os_str() != "-");
    let mut stdout = std::io::stdout();
    let mut emit = |piece: &str| {
        if to_stdout {
            // A closed pipe ends the printing, not the generation.
            let _ = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush());
        }
    };
    let result = generate(&decoder, &mut session, &tokenizer, &tokens, &options, &mut emit)?;
    if to_stdout {
        println!();
    }
    if let Some(path) = &args.json {
        write_json(path, &result)?;
    }
    let rate = |n: usize, seconds: f64| n as f64 / seconds.max(1e-9);
    terminal.note(&format!(
        "prompt {} tokens at {:.0}/s, generated {} at {:.1}/s, ended by {:?}",
        result.prompt_tokens,
        rate(result.prompt_tokens, result.prefill_s),
        result.tokens.len(),
        rate(result.tokens.len().saturating_sub(1), result.decode_s),
        result.finish,
    ));
    Ok(())
}
