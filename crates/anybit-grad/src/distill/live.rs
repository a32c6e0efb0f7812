//! [`Distiller`]: what a training step asks of distillation: teachers run beside the student on the
//! same tokens, the two losses of a micro-batch, and the balancer's own step.
//!
//! ```text
//! every micro-batch        w = balancer(losses, norms),   L = w₀ · task + w₁ · teacher
//! every optimizer step     the balancer learns from the means over micro-batches and ranks
//! ```
//!
//! Called by the trainer where a recipe has a section `distill`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anybit_io::Checkpoint;
use serde::{Deserialize, Serialize};

use super::{
    Balancer, BalancerSpec, DistillError, DistillLoss, Distillation, Mixture, Needs, Observed,
    Teacher, TeacherWeights, mix, row_weights,
};
use crate::train::distributed::{Communicator, sum_f64};
use crate::train::{Result, TrainError, refuse_rounded};
use crate::{DecoderOutput, Tape, Tensor, TrainDecoder, Var};

/// The section `distill` of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillRecipe {
    /// Checkpoints with the student's tokenizer; packed ones are decoded.
    pub teachers: Vec<PathBuf>,
    /// What the student is to have in common with them; one of those of logits.
    #[serde(default)]
    pub loss: DistillLoss,
    /// How it is weighed against the task.
    #[serde(default)]
    pub balancer: BalancerSpec,
    /// How several teachers become one.
    #[serde(default)]
    pub mixture: Mixture,
}

impl DistillRecipe {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Settings out of range; losses and balancers that language models have no use for.
    pub fn check(&self) -> Result<()> {
        if self.teachers.is_empty() {
            return Err(TrainError::recipe("distill.teachers", "give at least one checkpoint"));
        }
        if !self.loss.on_logits() {
            let what = format!("{} is no loss of logits", self.loss.name());
            return Err(TrainError::recipe("distill.loss", what));
        }
        if self.balancer.needs() == Needs::ParameterNorms {
            let what = "gradnorm needs gradients of both losses at shared parameters, which this \
                        trainer does not take; logit_gradient takes them at the logits";
            return Err(TrainError::recipe("distill.balancer", what));
        }
        self.loss.validate()?;
        Ok(self.balancer.validate()?)
    }
}

/// Sums over the micro-batches of a step.
#[derive(Debug, Default)]
struct Sums {
    losses: [f64; 2],
    norms: [f64; 2],
    cosine: f64,
    weights: [f64; 2],
    count: f64,
}

/// Teachers, loss and balancer of a run.
pub struct Distiller {
    recipe: DistillRecipe,
    teachers: Vec<TrainDecoder>,
    /// The balancer, whose state checkpoints hold.
    pub balancer: Box<dyn Balancer>,
    seqlen: usize,
    tape: Tape,
    sums: Sums,
}

impl Distiller {
    /// Loads the teachers of a run of `steps` steps for sequences of `seqlen` tokens; `vocab` is
    /// the student's.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or with another vocabulary.
    pub fn new(recipe: &DistillRecipe, vocab: usize, seqlen: usize, steps: u64) -> Result<Self> {
        recipe.check()?;
        let mut teachers = Vec::new();
        for path in &recipe.teachers {
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
            teachers.push(TrainDecoder::load(&checkpoint, seqlen)?);
        }
        let (balancer, tape, sums) =
            (recipe.balancer.build(steps)?, Tape::default(), Sums::default());
        Ok(Self { recipe: recipe.clone(), teachers, balancer, seqlen, tape, sums })
    }

    /// Records the weighed loss of a micro-batch.
    ///
    /// # Errors
    /// A teacher whose output is no number.
    pub fn objective(
        &mut self,
        tape: &mut Tape,
        output: &DecoderOutput,
        head: Var,
        inputs: &[u32],
        targets: &[u32],
    ) -> Result<Var> {
        let logits = match self.teachers.len() {
            1 => None,
            _ => Some(self.mixed(inputs, targets)?),
        };
        let hidden = match &logits {
            Some(_) => None,
            None => Some(self.hidden(inputs)?),
        };
        let teacher = match (&logits, &hidden) {
            (Some(logits), _) => Teacher::Logits(logits),
            (None, Some((x, head))) => Teacher::Hidden { x, head },
            (None, None) => return Err(TrainError::recipe("distill.teachers", "is empty")),
        };
        let (loss, seqlen) = (&self.recipe.loss, self.seqlen);
        let distillation = Distillation { loss, teacher, targets, seqlen };
        let joint = tape.linear_distill_joint(output.hidden, head, &distillation)?;
        self.tape.reset();
        let losses = [joint.task, joint.teacher].map(|v| f64::from(tape.data(v)[0]));
        let weights = self.balancer.weights(&Observed { losses, norms: Some(joint.norms) });
        let sums = &mut self.sums;
        for i in 0..2 {
            sums.losses[i] += losses[i];
            sums.norms[i] += joint.norms[i];
            sums.weights[i] += weights[i];
        }
        sums.cosine += joint.cosine;
        sums.count += 1.0;
        let [task, teacher] = weights.map(|w| w as f32);
        Ok(tape.weighted_sum(&[(task, joint.task), (teacher, joint.teacher)]))
    }

    /// Final hidden states and head of the only teacher.
    fn hidden(&mut self, inputs: &[u32]) -> Result<(Tensor, Tensor)> {
        let teacher = &self.teachers[0];
        let vars = teacher.vars(&mut self.tape, &|_| false);
        let hidden = teacher.forward(&mut self.tape, &vars, inputs, self.seqlen)?.hidden;
        let head = self.tape.value(vars.head).clone();
        Ok((self.tape.value(hidden).clone(), head))
    }

    /// Logits of all teachers as one.
    fn mixed(&mut self, inputs: &[u32], targets: &[u32]) -> Result<Tensor> {
        let mut all = Vec::new();
        for teacher in &self.teachers {
            let vars = teacher.vars(&mut self.tape, &|_| false);
            let hidden = teacher.forward(&mut self.tape, &vars, inputs, self.seqlen)?.hidden;
            let logits = teacher.logits(&mut self.tape, &vars, hidden);
            all.push(self.tape.value(logits).clone());
            self.tape.reset();
        }
        let each: Vec<&Tensor> = all.iter().collect();
        let weights = row_weights(&TeacherWeights::Uniform, &each, targets)?;
        Ok(mix(&each, &weights, self.recipe.mixture, self.recipe.loss.temperature())?)
    }

    /// Ends an optimizer step: the balancer learns. Returns the figures of the step: both losses,
    /// weights, norms of gradients at the logits, and their cosine.
    ///
    /// # Errors
    /// Ranks that lost each other.
    pub fn finish_step(&mut self, comm: &mut dyn Communicator) -> Result<BTreeMap<String, f64>> {
        let Sums { losses, norms, cosine, weights, count } = std::mem::take(&mut self.sums);
        let mut all =
            [losses[0], losses[1], norms[0], norms[1], weights[0], weights[1], cosine, count];
        sum_f64(comm, &mut all)?;
        let count = all[7].max(1.0);
        let mean = all.map(|v| v / count);
        let (losses, norms) = ([mean[0], mean[1]], Some([mean[2], mean[3]]));
        self.balancer.step(&Observed { losses, norms });
        let names = [
            "task_loss",
            "teacher_loss",
            "task_norm",
            "teacher_norm",
            "task_weight",
            "teacher_weight",
            "cosine",
        ];
        let figures = names.iter().zip(mean).map(|(name, value)| (name.to_string(), value));
        let state = self.balancer.state().into_iter().map(|(n, v)| (format!("balancer.{n}"), v));
        Ok(figures.chain(state).collect())
    }
}
