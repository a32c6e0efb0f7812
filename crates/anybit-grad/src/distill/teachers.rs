//! [`Teachers`]: decoders of full precision on the student's tokens, and what they say as one.
//!
//! Run beside the student by [`super::live`], or once for all sequences by [`super::cached`].

use std::ops::Range;
use std::path::Path;

use anybit_io::Checkpoint;

use super::error::{DistillError, Result};
use super::{DistillRecipe, Mixture, Teacher, TopK, mix};
use crate::tiles::{Operand, product};
use crate::train::refuse_rounded;
use crate::{Tape, Tensor, TrainDecoder};

/// Logits of a tile when only the likeliest tokens are kept (64 MiB).
const LOGITS: usize = 1 << 24;

/// Outputs for the tokens of a batch.
pub(super) enum Outputs {
    /// Of the only teacher: final hidden states and head.
    Hidden {
        /// `[tokens, hidden]`.
        x: Tensor,
        /// `[vocab, hidden]`.
        head: Tensor,
    },
    /// Of several as one: `[tokens, vocab]`.
    Logits(Tensor),
    /// Read from a cache.
    TopK(TopK),
}

impl Outputs {
    /// As losses take them.
    pub fn teacher(&self) -> Teacher<'_> {
        match self {
            Self::Hidden { x, head } => Teacher::Hidden { x, head },
            Self::Logits(logits) => Teacher::Logits(logits),
            Self::TopK(top) => Teacher::TopK(top),
        }
    }
}

/// Teachers in memory.
pub(super) struct Teachers {
    all: Vec<TrainDecoder>,
    tape: Tape,
    seqlen: usize,
    mixture: Mixture,
    temperature: f64,
}

/// Opens a teacher for a student with `vocab` tokens.
///
/// # Errors
/// A checkpoint that cannot be read, has another vocabulary or rounds its activations.
pub(super) fn open(path: &Path, vocab: usize) -> crate::train::Result<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    let found = checkpoint.config.vocab_size;
    if found != vocab {
        return Err(DistillError::Vocabulary {
            what: format!("the teacher {}", path.display()),
            found,
            other: "the student",
            expected: vocab,
        }
        .into());
    }
    refuse_rounded(&checkpoint, "distill.teachers")?;
    Ok(checkpoint)
}

fn head(teacher: &TrainDecoder) -> &Tensor {
    teacher.head.as_ref().unwrap_or(&teacher.embedding)
}

/// Logits of some rows of a teacher's hidden states.
fn logits(teacher: &TrainDecoder, hidden: &Tensor, rows: Range<usize>) -> Tensor {
    let head = head(teacher);
    let (vocab, width) = (teacher.config.vocab_size, teacher.config.hidden_size);
    let x = &hidden.data()[rows.start * width..rows.end * width];
    let mut logits = vec![0f32; rows.len() * vocab];
    let weight = Operand::new(head.data(), vocab, width);
    product(&mut logits, false, Operand::new(x, rows.len(), width), weight.t());
    Tensor::new([rows.len(), vocab], logits)
}

impl Teachers {
    /// Loads the teachers of a student with `vocab` tokens for sequences of `seqlen`.
    ///
    /// # Errors
    /// As [`open`]; weights that are no numbers.
    pub fn load(recipe: &DistillRecipe, vocab: usize, seqlen: usize) -> crate::train::Result<Self> {
        let mut all = Vec::new();
        for path in &recipe.teachers {
            all.push(TrainDecoder::load(&open(path, vocab)?, seqlen)?);
        }
        Ok(Self::of(all, recipe, seqlen))
    }

    /// Teachers that are loaded already.
    pub fn of(all: Vec<TrainDecoder>, recipe: &DistillRecipe, seqlen: usize) -> Self {
        let (mixture, temperature) = (recipe.mixture, recipe.loss.temperature());
        Self { all, tape: Tape::default(), seqlen, mixture, temperature }
    }

    /// Outputs for `inputs`, whole sequences.
    ///
    /// # Errors
    /// Tokens outside the vocabulary; outputs that cannot be mixed.
    pub fn outputs(&mut self, inputs: &[u32]) -> Result<Outputs> {
        let mut hidden = self.hidden(inputs)?;
        if let [only] = &self.all[..] {
            let head = head(only).clone();
            return Ok(Outputs::Hidden { x: hidden.swap_remove(0), head });
        }
        Ok(Outputs::Logits(self.mixed(&hidden, 0..inputs.len())?))
    }

    /// The `k` likeliest tokens, at most all, after each of `inputs`, whole sequences. Logits exist
    /// for a tile of tokens at a time.
    ///
    /// # Errors
    /// As [`Self::outputs`]; outputs that are no numbers.
    pub fn top_k(&mut self, inputs: &[u32], k: usize) -> Result<TopK> {
        let hidden = self.hidden(inputs)?;
        let vocab = self.all.first().map_or(1, |teacher| teacher.config.vocab_size);
        let tile = (LOGITS / vocab).clamp(16, 256);
        let mut all = TopK::with_capacity(inputs.len(), k.min(vocab), self.temperature);
        for start in (0..inputs.len()).step_by(tile) {
            let logits = self.mixed(&hidden, start..(start + tile).min(inputs.len()))?;
            all.extend(&TopK::from_logits(&logits, k, self.temperature));
        }
        match all.log_probs.iter().chain(&all.tail).all(|log| log.is_finite()) {
            true => Ok(all),
            false => {
                let what = "its outputs are no numbers; check it with anybit eval";
                Err(DistillError::input("teacher", what))
            }
        }
    }

    /// Final hidden states of every teacher.
    fn hidden(&mut self, inputs: &[u32]) -> Result<Vec<Tensor>> {
        let mut all = Vec::with_capacity(self.all.len());
        for teacher in &self.all {
            let vars = teacher.vars(&mut self.tape, &|_| false);
            let hidden = teacher.forward(&mut self.tape, &vars, inputs, self.seqlen)?.hidden;
            all.push(self.tape.value(hidden).clone());
            self.tape.reset();
        }
        Ok(all)
    }

    /// Logits of all teachers as one, for some rows.
    fn mixed(&self, hidden: &[Tensor], rows: Range<usize>) -> Result<Tensor> {
        let of =
            |(teacher, hidden): (&TrainDecoder, &Tensor)| logits(teacher, hidden, rows.clone());
        let mut each: Vec<Tensor> = self.all.iter().zip(hidden).map(of).collect();
        if each.len() == 1 {
            return Ok(each.swap_remove(0));
        }
        let weights = vec![1.0 / each.len() as f64; rows.len() * each.len()];
        let each: Vec<&Tensor> = each.iter().collect();
        mix(&each, &weights, self.mixture, self.temperature)
    }
}
