//! [`Distiller`]: what a training step asks of distillation: what teachers say about the same
//! tokens, the two losses of a micro-batch, and the balancer's own step.
//!
//! ```text
//! every micro-batch        w = balancer(losses, norms),   L = w₀ · task + w₁ · teacher
//! every optimizer step     the balancer learns from the means over micro-batches and ranks
//! ```
//!
//! Teachers run beside the student, or were run before it ([`super::cached`]). GradNorm asks for
//! the norms of both gradients at the last layer that the losses share: the last block, whose
//! weights count as they are multiplied. Two passes from the losses back through that block alone
//! find them.
//!
//! Called by the trainer where a recipe has a section `distill`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cached::{CacheRecipe, CachedTeacher};
use super::teachers::{Outputs, Teachers};
use super::{
    Balancer, BalancerSpec, DistillLoss, Distillation, Joint, Mixture, Needs, Observed, Pair,
};
use crate::train::distributed::{Communicator, sum_f64};
use crate::train::trainer::Batch;
use crate::train::{Result, TrainError};
use crate::{DecoderOutput, DecoderVars, Tape, Var};

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
    /// Where their outputs are kept; without it they are computed at every step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheRecipe>,
}

impl DistillRecipe {
    /// Checks what needs no file.
    ///
    /// # Errors
    /// Settings out of range; losses that language models have no use for.
    pub fn check(&self) -> Result<()> {
        if self.teachers.is_empty() {
            return Err(TrainError::recipe("distill.teachers", "give at least one checkpoint"));
        }
        if !self.loss.on_logits() {
            let what = format!("{} is no loss of logits", self.loss.name());
            return Err(TrainError::recipe("distill.loss", what));
        }
        if self.cache.as_ref().is_some_and(|cache| cache.top_k == 0) {
            let what = "at least 1 token is needed; the size of the vocabulary keeps all";
            return Err(TrainError::recipe("distill.cache.top_k", what));
        }
        self.loss.validate()?;
        Ok(self.balancer.validate()?)
    }
}

/// Sums over the micro-batches of a step.
#[derive(Debug, Default)]
struct Sums {
    losses: Pair,
    /// Norms at the logits.
    norms: Pair,
    /// What the balancer is told.
    told: Pair,
    cosine: f64,
    weights: Pair,
    count: f64,
}

/// Where teachers' outputs come from.
enum Source {
    /// Teachers that run beside the student.
    Live(Teachers),
    /// Their outputs on disk.
    Cached(CachedTeacher),
}

/// Teachers, loss and balancer of a run.
pub struct Distiller {
    recipe: DistillRecipe,
    source: Source,
    /// The balancer, whose state checkpoints hold.
    pub balancer: Box<dyn Balancer>,
    seqlen: usize,
    sums: Sums,
}

impl Distiller {
    /// Loads the teachers of a run of `steps` steps for sequences of `seqlen` tokens; `vocab` is
    /// the student's. They are run at every step, whatever the recipe says of a cache.
    ///
    /// # Errors
    /// A checkpoint that cannot be read, or with another vocabulary.
    pub fn new(recipe: &DistillRecipe, vocab: usize, seqlen: usize, steps: u64) -> Result<Self> {
        recipe.check()?;
        let source = Source::Live(Teachers::load(recipe, vocab, seqlen)?);
        Self::with(recipe, source, seqlen, steps)
    }

    /// [`Self::new`] with the outputs of teachers that were run before.
    pub(crate) fn cached(
        recipe: &DistillRecipe,
        teacher: CachedTeacher,
        seqlen: usize,
        steps: u64,
    ) -> Result<Self> {
        Self::with(recipe, Source::Cached(teacher), seqlen, steps)
    }

    fn with(recipe: &DistillRecipe, source: Source, seqlen: usize, steps: u64) -> Result<Self> {
        let (balancer, sums) = (recipe.balancer.build(steps)?, Sums::default());
        Ok(Self { recipe: recipe.clone(), source, balancer, seqlen, sums })
    }

    /// Records the weighed loss of a micro-batch.
    ///
    /// # Errors
    /// Outputs of teachers that cannot be mixed or read.
    pub fn objective(
        &mut self,
        tape: &mut Tape,
        output: &DecoderOutput,
        vars: &DecoderVars,
        batch: &Batch<'_>,
    ) -> Result<Var> {
        let outputs = match &mut self.source {
            Source::Live(teachers) => teachers.outputs(batch.inputs)?,
            Source::Cached(teacher) => Outputs::TopK(teacher.outputs(batch.positions.clone())?),
        };
        let (loss, seqlen, targets) = (&self.recipe.loss, self.seqlen, batch.targets);
        let distillation = Distillation { loss, teacher: outputs.teacher(), targets, seqlen };
        let joint = tape.linear_distill_joint(output.hidden, vars.head, &distillation)?;
        let losses = [joint.task, joint.teacher].map(|v| f64::from(tape.data(v)[0]));
        let told = match self.balancer.needs() {
            Needs::ParameterNorms => block_norms(tape, output, vars, &joint),
            Needs::Losses | Needs::LogitNorms => joint.norms,
        };
        let weights = self.balancer.weights(&Observed { losses, norms: Some(told) });
        let sums = &mut self.sums;
        for i in 0..2 {
            sums.losses[i] += losses[i];
            sums.norms[i] += joint.norms[i];
            sums.told[i] += told[i];
            sums.weights[i] += weights[i];
        }
        sums.cosine += joint.cosine;
        sums.count += 1.0;
        let [task, teacher] = weights.map(|w| w as f32);
        Ok(tape.weighted_sum(&[(task, joint.task), (teacher, joint.teacher)]))
    }

    /// Ends an optimizer step: the balancer learns. Returns the figures of the step: both losses,
    /// weights, norms of gradients at the logits, their cosine, and for GradNorm the norms at the
    /// last block.
    ///
    /// # Errors
    /// Ranks that lost each other.
    pub fn finish_step(&mut self, comm: &mut dyn Communicator) -> Result<BTreeMap<String, f64>> {
        let Sums { losses, norms, told, cosine, weights, count } = std::mem::take(&mut self.sums);
        let [l, n, w, t] = [losses, norms, weights, told];
        let mut all = [l[0], l[1], n[0], n[1], w[0], w[1], cosine, t[0], t[1], count];
        sum_f64(comm, &mut all)?;
        let count = all[9].max(1.0);
        let mean = all.map(|v| v / count);
        let (losses, norms) = ([mean[0], mean[1]], Some([mean[7], mean[8]]));
        self.balancer.step(&Observed { losses, norms });
        let names = [
            "task_loss",
            "teacher_loss",
            "task_norm",
            "teacher_norm",
            "task_weight",
            "teacher_weight",
            "cosine",
            "task_block_norm",
            "teacher_block_norm",
        ];
        // The last two are at the last block for GradNorm alone.
        let shown = if self.balancer.needs() == Needs::ParameterNorms { 9 } else { 7 };
        let figures = names.iter().zip(mean).take(shown);
        let figures = figures.map(|(name, value)| (name.to_string(), value));
        let state = self.balancer.state().into_iter().map(|(n, v)| (format!("balancer.{n}"), v));
        Ok(figures.chain(state).collect())
    }
}

/// Norms of the gradients of both losses with respect to the parameters of the last block.
fn block_norms(tape: &mut Tape, output: &DecoderOutput, vars: &DecoderVars, joint: &Joint) -> Pair {
    let last = vars.blocks.last();
    let leaves: Vec<Var> = last.map_or(Vec::new(), |b| b.vars.values().copied().collect());
    // What the last block reads; with one block all is passed back.
    let below = output.blocks.len().checked_sub(2).map(|block| output.blocks[block].y);
    [joint.task, joint.teacher].map(|loss| tape.gradient_norm(loss, &leaves, below))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::global_norm;
    use crate::testing::random;
    use crate::train::distributed::Alone;
    use crate::train::model::{initialize, preset};
    use crate::{IGNORE, TrainDecoder};

    const VOCAB: usize = 40;
    const SEQLEN: usize = 8;

    fn recipe(balancer: &str) -> DistillRecipe {
        let text = format!(r#"{{"teachers": ["teacher"], "balancer": {balancer}}}"#);
        let recipe: DistillRecipe = serde_json::from_str(&text).unwrap();
        recipe.check().unwrap();
        recipe
    }

    fn tiny(seed: u64) -> TrainDecoder {
        initialize(&preset("tiny", VOCAB, SEQLEN).unwrap(), seed, SEQLEN)
    }

    /// A distiller whose teacher is another random model.
    fn distiller(balancer: &str) -> Distiller {
        let recipe = recipe(balancer);
        let source = Source::Live(Teachers::of(vec![tiny(2)], &recipe, SEQLEN));
        Distiller::with(&recipe, source, SEQLEN, 100).unwrap()
    }

    fn tokens() -> (Vec<u32>, Vec<u32>) {
        let inputs: Vec<u32> = (0..16).map(|i| (i * 17 % VOCAB) as u32).collect();
        let mut targets: Vec<u32> = inputs.iter().map(|t| (t + 1) % VOCAB as u32).collect();
        targets[3] = IGNORE;
        (inputs, targets)
    }

    /// Records a micro-batch of a random student and its objective.
    fn record(distiller: &mut Distiller, tape: &mut Tape) -> (DecoderVars, Var) {
        let (student, (inputs, targets)) = (tiny(1), tokens());
        let vars = student.vars(tape, &|_| true);
        let output = student.forward(tape, &vars, &inputs, SEQLEN).unwrap();
        let batch = Batch { positions: 0..2, inputs: &inputs, targets: &targets };
        let loss = distiller.objective(tape, &output, &vars, &batch).unwrap();
        (vars, loss)
    }

    /// GradNorm hears the norms of whole backward passes at the last block, its weights sum to 2,
    /// and asking for norms does not touch the gradient.
    #[test]
    fn gradnorm_hears_the_norms_at_the_last_block() {
        let mut distiller = distiller(r#"{"type": "gradnorm", "batches": 2}"#);
        let fixed = r#"{"type": "fixed"}"#;
        let mut tape = Tape::default();
        let (vars, loss) = record(&mut distiller, &mut tape);
        tape.backward(loss);
        let grads: Vec<Vec<f32>> =
            vars.named().iter().map(|(_, var)| tape.grad(*var).unwrap().to_vec()).collect();
        let mut plain = Tape::default();
        let (vars, loss) = record(&mut self::distiller(fixed), &mut plain);
        plain.backward(loss);
        for ((name, var), grad) in vars.named().iter().zip(&grads) {
            assert_eq!(plain.grad(*var).unwrap(), grad, "{name}");
        }
        let told = distiller.sums.told;
        for (which, told) in told.into_iter().enumerate() {
            // The weights (1, 0) and (0, 1) leave the gradient of one loss.
            let one = [r#""task": 1.0, "teacher": 0.0"#, r#""task": 0.0, "teacher": 1.0"#][which];
            let mut alone = self::distiller(&format!(r#"{{"type": "fixed", {one}}}"#));
            let mut tape = Tape::default();
            let (vars, loss) = record(&mut alone, &mut tape);
            tape.backward(loss);
            let block = vars.blocks.last().unwrap();
            let norm = global_norm(block.vars.values().map(|var| tape.grad(*var).unwrap()));
            approx::assert_relative_eq!(norm, told, max_relative = 1e-5);
        }
        let mut weights = Vec::new();
        for _ in 0..6 {
            let mut tape = Tape::default();
            record(&mut distiller, &mut tape);
            let figures = distiller.finish_step(&mut Alone).unwrap();
            assert!(figures["task_block_norm"] > 0.0);
            let pair = [figures["task_weight"], figures["teacher_weight"]];
            approx::assert_relative_eq!(pair[0] + pair[1], 2.0, max_relative = 1e-9);
            weights.push(pair);
        }
        assert!(weights[0] == [1.0, 1.0] && weights[5] != [1.0, 1.0], "{weights:?}");
    }

    /// The likeliest tokens that a cache would hold are those of the logits that losses see.
    #[test]
    fn all_tokens_of_a_cache_are_the_live_teacher() {
        let (inputs, targets) = tokens();
        for teachers in [vec![tiny(2)], vec![tiny(2), tiny(3)]] {
            let recipe = recipe(r#"{"type": "gor"}"#);
            let mut teachers = Teachers::of(teachers, &recipe, SEQLEN);
            let all = Outputs::TopK(teachers.top_k(&inputs, 1000).unwrap());
            let few = Outputs::TopK(teachers.top_k(&inputs, 5).unwrap());
            let live = teachers.outputs(&inputs).unwrap();
            let [live, all, few] = [live, all, few].map(|outputs| {
                let mut tape = Tape::default();
                let logits = tape.leaf(random(4, [inputs.len(), VOCAB]), true);
                let (loss, teacher) = (&recipe.loss, outputs.teacher());
                let given = Distillation { loss, teacher, targets: &targets, seqlen: SEQLEN };
                let loss = tape.distill(logits, &given).unwrap();
                tape.data(loss)[0]
            });
            approx::assert_relative_eq!(live, all, max_relative = 1e-4);
            assert!(few <= all && few > 0.0);
        }
    }
}
