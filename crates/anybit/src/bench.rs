//! `anybit bench`: tokens per second of a model, measured as llama.cpp's llama-bench does.
//!
//! Reading a prompt (prefill, its `pp`) and generating (decode, its `tg`) are timed apart, since
//! arithmetic bounds the one and memory the other. Tokens are random and the same in every
//! repetition; every repetition starts from an empty cache. Decoding starts from nothing: step `i`
//! reads one token at position `i`, as there, so its mean context is half of what is generated.
//! Beside the rates stands what they are a share of: the bytes of weights that a token reads, and
//! the bandwidth of the memory at the same number of threads ([`crate::stream`]).

use std::path::PathBuf;
use std::time::Instant;

use anybit_core::rng::SplitMix64;
use anybit_eval::statistics::mean_and_error;
use anybit_io::{Checkpoint, Format, ModelConfig};
use anybit_runtime::{BatchSession, Decoder, KvCache, PlainType, Session};
use serde::Serialize;

use crate::machine::{Machine, rss_bytes};
use crate::measure::bits_per_weight;
use crate::{Error, Result};

/// Sequences that can be decoded together; more is a slip of the hand that fills the memory.
const MAX_BATCH: usize = 1024;

/// Seeds of the tokens.
const PROMPT_SEED: u64 = 0;
const DECODE_SEED: u64 = 1;

/// What to time.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tokens of the prompt; 0 leaves prefill out.
    pub prompt: usize,
    /// Tokens to generate in each sequence; 0 leaves decoding out.
    pub generate: usize,
    /// Sequences decoded together, each number a test of its own; 1 is always among them.
    pub batches: Vec<usize>,
    /// Repetitions before those that are timed.
    pub warmup: usize,
    /// Repetitions that are timed.
    pub repeat: usize,
    /// How keys and values without a quantizer are cached.
    pub kv: PlainType,
}

impl Options {
    /// Tokens of the longest sequence, for which a decoder of `config` has to be loaded.
    ///
    /// # Errors
    /// Options that leave nothing to time or ask for more than the model can do.
    pub fn context(&self, config: &ModelConfig) -> Result<usize> {
        let context = self.prompt.max(self.generate);
        let out_of_range = |batch: &&usize| !(1..=MAX_BATCH).contains(*batch);
        let wrong = if self.repeat == 0 {
            "--repeat 0: at least one repetition has to be timed".to_string()
        } else if context == 0 {
            "--prompt 0 --gen 0: nothing is left to time".to_string()
        } else if let Some(batch) = self.batches.iter().find(out_of_range) {
            format!("--batch {batch}: 1 to {MAX_BATCH} sequences can be decoded together")
        } else if context > config.max_positions {
            let option = if context == self.prompt { "--prompt" } else { "--gen" };
            let most = config.max_positions;
            format!("{option} {context}: the model has a context of {most} tokens")
        } else {
            return Ok(context);
        };
        Err(Error::Usage(wrong))
    }

    /// Numbers of sequences in the order in which they are timed.
    fn rows(&self) -> Vec<usize> {
        let mut rows = vec![1];
        if self.generate > 0 {
            rows.extend(&self.batches);
        }
        rows.sort_unstable();
        rows.dedup();
        rows
    }
}

/// What a checkpoint says of itself.
#[derive(Debug, Clone, Serialize)]
pub struct Model {
    /// The folder or file.
    pub path: PathBuf,
    /// `hugging_face`, `gguf` or `anybit`.
    pub format: &'static str,
    /// Bits per weight of the blocks' linears: codes alone.
    pub bits_per_weight_codes: f64,
    /// Everything that is stored for them.
    pub bits_per_weight_total: f64,
    /// Size of the files that hold the weights.
    pub file_bytes: u64,
}

impl Model {
    /// Reads it off a checkpoint.
    ///
    /// # Errors
    /// A tensor that cannot be read.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let (codes, total) = bits_per_weight(checkpoint)?;
        Ok(Self {
            path: checkpoint.path.clone(),
            format: match checkpoint.format() {
                Format::HuggingFace => "hugging_face",
                Format::Gguf => "gguf",
                Format::Native => "anybit",
            },
            bits_per_weight_codes: codes,
            bits_per_weight_total: total,
            file_bytes: checkpoint.weight_file_bytes(),
        })
    }
}

/// Tokens per second over the repetitions of one test.
#[derive(Debug, Clone, Serialize)]
pub struct Rates {
    /// The median.
    pub median: f64,
    /// The mean.
    pub mean: f64,
    /// Standard deviation of a repetition; none with one repetition.
    pub sd: Option<f64>,
    /// Every repetition, in order.
    pub samples: Vec<f64>,
}

impl Rates {
    /// Sums up `samples`, of which there is at least one.
    fn of(samples: Vec<f64>) -> Self {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0;
        let (mean, error) = mean_and_error(&samples);
        Self { median, mean, sd: error.map(|e| e * (n as f64).sqrt()), samples }
    }
}

/// The figures of one number of sequences.
#[derive(Debug, Clone, Serialize)]
pub struct BatchReport {
    /// Sequences decoded together.
    pub batch: usize,
    /// Tokens of the prompt per second: the median. One sequence only.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens generated per second, over all sequences: the median.
    pub decode_tokens_per_s: Option<f64>,
    /// The repetitions of prefill.
    pub prefill: Option<Rates>,
    /// The repetitions of decoding.
    pub decode: Option<Rates>,
}

/// How fast a model is, and what that is a share of.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this program.
    pub version: &'static str,
    /// The checkpoint; none for a decoder that came from elsewhere.
    pub model: Option<Model>,
    /// Parameters in all, tied ones once.
    pub parameters: u64,
    /// Threads.
    pub threads: usize,
    /// Instruction set that the kernels use.
    pub isa: &'static str,
    /// The machine.
    pub machine: Machine,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens generated in each sequence.
    #[serde(rename = "gen")]
    pub generate: usize,
    /// Repetitions before those that were timed.
    pub warmup: usize,
    /// Repetitions that were timed.
    pub repeat: usize,
    /// Tokens of the prompt per second: the median of one sequence.
    pub prefill_tokens_per_s: Option<f64>,
    /// Tokens generated per second: the median of one sequence.
    pub decode_tokens_per_s: Option<f64>,
    /// One row for each number of sequences; the first is one sequence.
    pub batches: Vec<BatchReport>,
    /// Bytes of weights that a token reads when one sequence is decoded.
    pub bytes_per_token: usize,
    /// Bytes of the cache of one sequence as long as the longest that was timed.
    pub kv_bytes: usize,
    /// Measured read bandwidth of the memory with the same number of threads, in 10⁹ bytes per
    /// second.
    pub stream_gb_per_s: f64,
    /// Share of it that decoding one sequence takes for weights. More than 1 where caches hold
    /// them.
    pub stream_share: Option<f64>,
    /// Bytes of all weights in memory.
    pub weight_bytes: usize,
    /// Resident memory of this process after one sequence: weights, its cache, the scratch of a
    /// pass over the prompt, the program itself.
    pub rss_bytes: Option<u64>,
}

/// Times `decoder`, loaded for at least [`Options::context`] positions; `progress` hears
/// repetitions done and in all.
///
/// # Errors
/// As [`Options::context`]; broken weights.
pub fn run(
    decoder: &Decoder,
    options: &Options,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Report> {
    let context = options.context(&decoder.config)?;
    let kv_bytes = KvCache::new(decoder, context, options.kv).bytes();
    let rows = options.rows();
    let mut batches = Vec::with_capacity(rows.len());
    let mut timer = Timer::new(options, rows.len(), progress);
    let mut rss = None;
    for batch in rows {
        let (prefill, decode) = match batch {
            1 => one_sequence(decoder, options, context, &mut timer)?,
            _ => (None, sequences(decoder, options, batch, &mut timer)?),
        };
        rss = rss.or_else(rss_bytes);
        let median = |rates: &Option<Rates>| rates.as_ref().map(|r| r.median);
        batches.push(BatchReport {
            batch,
            prefill_tokens_per_s: median(&prefill),
            decode_tokens_per_s: median(&decode),
            prefill,
            decode,
        });
    }
    let machine = Machine::measure();
    let (prefill, decode) = (batches[0].prefill_tokens_per_s, batches[0].decode_tokens_per_s);
    let bytes_per_token = decoder.bytes_per_token();
    let shapes = decoder.config.tensors().into_iter();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        model: None,
        parameters: shapes.map(|(_, shape)| shape.iter().product::<usize>() as u64).sum(),
        threads: rayon::current_num_threads(),
        isa: anybit_kernels::isa::isa().name(),
        prompt: options.prompt,
        generate: options.generate,
        warmup: options.warmup,
        repeat: options.repeat,
        prefill_tokens_per_s: prefill,
        decode_tokens_per_s: decode,
        batches,
        bytes_per_token,
        kv_bytes,
        stream_gb_per_s: machine.read_bytes_per_s / 1e9,
        stream_share: decode.map(|d| d * bytes_per_token as f64 / machine.read_bytes_per_s),
        weight_bytes: decoder.weight_bytes(),
        rss_bytes: rss,
        machine,
    })
}

/// Prefill and decoding of one sequence.
fn one_sequence(
    decoder: &Decoder,
    options: &Options,
    context: usize,
    timer: &mut Timer<'_>,
) -> Result<(Option<Rates>, Option<Rates>)> {
    let vocab = decoder.config.vocab_size;
    let prompt = random_tokens(options.prompt, vocab, PROMPT_SEED);
    let text = random_tokens(options.generate, vocab, DECODE_SEED);
    let mut session = Session::with_cache(decoder, context, options.kv);
    let prefill = timer.rates(prompt.len(), || {
        session.clear();
        session.step(&prompt).map(|_| ())
    })?;
    let decode = timer.rates(text.len(), || {
        session.clear();
        text.iter().try_for_each(|token| session.step(&[*token]).map(|_| ()))
    })?;
    Ok((prefill, decode))
}

/// Decoding of `batch` sequences together.
fn sequences(
    decoder: &Decoder,
    options: &Options,
    batch: usize,
    timer: &mut Timer<'_>,
) -> Result<Option<Rates>> {
    let vocab = decoder.config.vocab_size;
    let text = random_tokens(batch * options.generate, vocab, DECODE_SEED);
    let mut session = BatchSession::new(decoder, batch, options.generate, options.kv);
    timer.rates(text.len(), || {
        session.clear();
        text.chunks_exact(batch).try_for_each(|tokens| session.step(tokens).map(|_| ()))
    })
}

fn random_tokens(count: usize, vocab: usize, seed: u64) -> Vec<u32> {
    let mut rng = SplitMix64::new(seed);
    (0..count).map(|_| rng.below(vocab) as u32).collect()
}

/// Runs the repetitions of every test.
struct Timer<'a> {
    warmup: usize,
    repeat: usize,
    done: usize,
    total: usize,
    progress: &'a mut dyn FnMut(usize, usize),
}

impl<'a> Timer<'a> {
    fn new(options: &Options, rows: usize, progress: &'a mut dyn FnMut(usize, usize)) -> Self {
        let &Options { prompt, generate, warmup, repeat, .. } = options;
        let tests = usize::from(prompt > 0) + if generate > 0 { rows } else { 0 };
        Self { warmup, repeat, done: 0, total: tests * (warmup + repeat), progress }
    }

    /// Rates of `once`, which reads so many tokens; none when it reads none.
    fn rates(
        &mut self,
        tokens: usize,
        mut once: impl FnMut() -> anybit_runtime::Result<()>,
    ) -> Result<Option<Rates>> {
        if tokens == 0 {
            return Ok(None);
        }
        let mut samples = Vec::new();
        for repetition in 0..self.warmup + self.repeat {
            let started = Instant::now();
            once()?;
            let seconds = started.elapsed().as_secs_f64();
            if repetition >= self.warmup {
                samples.push(tokens as f64 / seconds.max(1e-9));
            }
            self.done += 1;
            (self.progress)(self.done, self.total);
        }
        Ok(Some(Rates::of(samples)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            prompt: 16,
            generate: 8,
            batches: vec![4, 1, 4],
            warmup: 1,
            repeat: 2,
            kv: PlainType::F16,
        }
    }

    #[test]
    fn rates_of_known_samples() {
        let rates = Rates::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((rates.median, rates.mean), (2.5, 2.5));
        assert!((rates.sd.unwrap() - (5f64 / 3.0).sqrt()).abs() < 1e-12, "{rates:?}");
        assert_eq!(rates.samples, [4.0, 1.0, 3.0, 2.0]);
        let single = Rates::of(vec![7.0]);
        assert_eq!((single.median, single.mean, single.sd), (7.0, 7.0, None));
    }

    #[test]
    fn one_sequence_is_always_first() {
        assert_eq!(options().rows(), [1, 4]);
        assert_eq!(Options { batches: vec![8], ..options() }.rows(), [1, 8]);
        assert_eq!(Options { generate: 0, ..options() }.rows(), [1]);
    }

    #[test]
    fn options_that_cannot_be_timed() {
        let config = ModelConfig::llama(1, 8, 2, 8, 16, 16);
        assert_eq!(options().context(&config).unwrap(), 16);
        for (wrong, word) in [
            (Options { repeat: 0, ..options() }, "--repeat 0"),
            (Options { prompt: 0, generate: 0, ..options() }, "nothing"),
            (Options { batches: vec![1, 0], ..options() }, "--batch 0"),
            (Options { batches: vec![1025], ..options() }, "--batch 1025"),
            (Options { prompt: 17, ..options() }, "--prompt 17"),
            (Options { generate: 17, ..options() }, "--gen 17"),
        ] {
            let message = wrong.context(&config).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn progress_counts_every_repetition() {
        let mut heard = Vec::new();
        let mut progress = |done: usize, total: usize| heard.push((done, total));
        let mut timer = Timer::new(&options(), 2, &mut progress);
        assert!(timer.rates(0, || Ok(())).unwrap().is_none());
        for _ in 0..3 {
            assert_eq!(timer.rates(8, || Ok(())).unwrap().unwrap().samples.len(), 2);
        }
        assert_eq!(heard, (1..=9).map(|done| (done, 9)).collect::<Vec<_>>());
    }
}
