//! Generation: a prompt in, text out as it comes.

use std::time::Instant;

use anybit_io::tokenizer::{StopMatcher, StreamDecoder, Tokenizer};

use crate::{Decoder, Result, RuntimeError, Sampler, SamplerOptions, Session};

/// What to generate.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampler: SamplerOptions,
    /// Strings that end the text; they are not part of it.
    pub stop: Vec<String>,
    /// Go on after the model's end tokens.
    pub ignore_eos: bool,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// `max_tokens` were generated.
    Length,
    /// The model ended it.
    EndOfText,
    /// A stop string appeared.
    Stop,
    /// The context is full.
    ContextFull,
}

/// What was generated.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Generated {
    /// The text.
    pub text: String,
    /// Its tokens, the end token not among them.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Seconds to read the prompt.
    pub prefill_s: f64,
    /// Seconds to generate; the first token comes from the prompt's own pass.
    pub decode_s: f64,
}

/// Continues `prompt` in `session`; `emit` hears each complete piece of text.
///
/// # Errors
/// An empty prompt, a prompt longer than the context, a bad sampling option, broken weights.
pub fn generate(
    decoder: &Decoder,
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    emit: &mut dyn FnMut(&str),
) -> Result<Generated> {
    if prompt.is_empty() {
        return Err(RuntimeError::EmptyPrompt);
    }
    let mut sampler = Sampler::new(options.sampler, decoder.config.vocab_size)?;
    prompt.iter().for_each(|t| sampler.observe(*t));
    let mut stream = StreamDecoder::new(tokenizer);
    let mut stops = StopMatcher::new(&options.stop);
    let mut text = String::new();
    let mut tokens = Vec::with_capacity(options.max_tokens.min(session.capacity()));
    let started = Instant::now();
    let mut logits = session.step(prompt)?;
    let prefill_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let finish = loop {
        if options.max_tokens == 0 {
            break Finish::Length;
        }
        let token = sampler.sample(logits);
        if !options.ignore_eos && decoder.config.eos_token_ids.contains(&token) {
            break Finish::EndOfText;
        }
        tokens.push(token);
        sampler.observe(token);
        if let Some(piece) = stream.push(token)? {
            let outcome = stops.push(&piece);
            text.push_str(&outcome.emit);
            emit(&outcome.emit);
            if outcome.stopped {
                break Finish::Stop;
            }
        }
        if tokens.len() == options.max_tokens {
            break Finish::Length;
        }
        if session.len() == session.capacity() {
            break Finish::ContextFull;
        }
        logits = session.step(&[token])?;
    };
    if finish != Finish::Stop {
        let outcome = stops.push(&stream.finish()?);
        let mut rest = outcome.emit;
        if !outcome.stopped {
            rest.push_str(&stops.finish());
        }
        text.push_str(&rest);
        emit(&rest);
    }
    let decode_s = started.elapsed().as_secs_f64();
    Ok(Generated { text, tokens, prompt_tokens: prompt.len(), finish, prefill_s, decode_s })
}
