//! [`QuantizedDecoder`]: a decoder whose blocks' linears multiply quantized operands, for training.
//!
//! ```text
//! once per optimizer step     Ŵ = estimator(W)                     on the weights' tape
//! per micro-batch             Y = estimator(X) Ŵᵀ, loss, dŴ        on the activations' tape
//! once per optimizer step     dW = estimator's gradient of Σ dŴ    on the weights' tape
//! ```
//!
//! Weights are rounded once however many micro-batches a step has, and the input of q, k and v, or
//! of gate and up, is rounded once for all of them. Embedding, head, norms, attention and the
//! residual stream are not quantized (QuEST, section 1.6 of its specification). Weights whose codes
//! are kept ([`super::kept`]) take the place of estimators'; with them some parameters are frozen.
//! Called by the trainer and by distillation.

use std::collections::BTreeMap;

use anybit_core::Site;
use half::bf16;

use super::kept::Kept;
use super::recipe::{Precision, QuantizerRecipe};
use super::{Result, TrainError};
use crate::{
    DecoderOutput, DecoderVars, Estimator, EstimatorError, EstimatorSpec, Tape, Tensor,
    TrainDecoder, Var,
};

/// What estimators learn beside the operands: for each operand the ends of the names and the
/// values, in the estimator's order.
pub type Learned = BTreeMap<String, Vec<(&'static str, Tensor)>>;

/// A decoder and the estimators of its linears' operands.
#[derive(Debug)]
pub struct QuantizedDecoder {
    /// The full-precision parameters.
    pub decoder: TrainDecoder,
    /// What the estimators learn.
    pub learned: Learned,
    /// The settings of the estimators.
    pub recipe: QuantizerRecipe,
    weights: Option<Box<dyn Estimator>>,
    activations: Option<Box<dyn Estimator>>,
    precision: Precision,
    /// Packed weights, which the decoder does not have.
    kept: Option<Kept>,
}

/// Parameters on the weights' tape.
#[derive(Debug)]
pub struct WeightVars {
    /// Full-precision parameters.
    masters: DecoderVars,
    /// What is multiplied.
    operands: DecoderVars,
    /// What the weights' estimators learn, in the order of [`Learned`].
    learned: Vec<(String, Var)>,
}

impl WeightVars {
    /// What is multiplied.
    pub fn operands(&self) -> &DecoderVars {
        &self.operands
    }
}

/// Parameters on the activations' tape.
#[derive(Debug)]
pub struct Leaves {
    /// The operands.
    pub vars: DecoderVars,
    /// What the activations' estimators learn, by operand.
    learned: BTreeMap<String, Vec<Var>>,
}

/// Gradients with respect to [`Leaves`], summed over micro-batches.
#[derive(Debug, Default)]
pub struct LeafGradients {
    operands: Vec<Vec<f32>>,
    learned: Vec<Vec<f32>>,
}

impl LeafGradients {
    /// All gradients: of the operands, and of what activations' estimators learn.
    pub fn parts_mut(&mut self) -> [&mut Vec<Vec<f32>>; 2] {
        [&mut self.operands, &mut self.learned]
    }
}

/// Gradients with respect to the parameters, in the order of [`QuantizedDecoder::parameters`].
pub type Gradients = Vec<Vec<f32>>;

/// The handles of all that a gradient is computed of, in the order of [`DecoderVars::named`].
fn wanted(vars: &DecoderVars, tape: &Tape) -> Vec<Var> {
    vars.named().into_iter().map(|(_, var)| var).filter(|var| tape.wants(*var)).collect()
}

/// Whether inputs of linears flow at a site.
fn feeds_linears(site: Site) -> bool {
    !site.linears().is_empty()
}

pub(super) fn round_to_bf16(x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = bf16::from_f32(*x).to_f32());
}

/// The name of an operand that is a weight.
fn weight_name(layer: usize, linear: &str) -> String {
    format!("model.layers.{layer}.{linear}.weight")
}

impl QuantizedDecoder {
    /// Checks that the estimators fit every linear. What they learn has its first value for the
    /// weights; that for the activations is found by [`Self::initialize_activations`].
    ///
    /// # Errors
    /// An estimator that does not exist or does not fit, with the linear.
    pub fn new(
        decoder: TrainDecoder,
        recipe: QuantizerRecipe,
        precision: Precision,
    ) -> Result<Self> {
        let build = |key: &str, spec: &Option<EstimatorSpec>| {
            let estimator = spec.as_ref().map(EstimatorSpec::build).transpose();
            estimator.map_err(|source| TrainError::Estimator { place: key.into(), source })
        };
        let weights = build("quantizer.weights", &recipe.weights)?;
        let activations = build("quantizer.activations", &recipe.activations)?;
        let both = [("quantizer.weights", &weights), ("quantizer.activations", &activations)];
        for (key, estimator) in both {
            for (linear, _, cols) in decoder.config.block_linears() {
                let named = |source: EstimatorError| TrainError::Estimator {
                    place: format!("{key} at {linear}"),
                    source,
                };
                estimator.as_ref().map_or(Ok(()), |e| e.check(cols)).map_err(named)?;
            }
        }
        let mut learned = Learned::new();
        if let Some(estimator) = &weights {
            for block in &decoder.blocks {
                for (linear, _, cols) in decoder.config.block_linears() {
                    let first = block.params[&format!("{linear}.weight")].data();
                    let values = estimator.parameters(first, cols);
                    if !values.is_empty() {
                        learned.insert(weight_name(block.layer, linear), values);
                    }
                }
            }
        }
        Ok(Self { decoder, learned, recipe, weights, activations, precision, kept: None })
    }

    /// A decoder whose packed weights are `kept`, which `decoder` does not have.
    pub(super) fn with_kept(
        decoder: TrainDecoder,
        kept: Kept,
        recipe: QuantizerRecipe,
        precision: Precision,
    ) -> Self {
        let (learned, kept) = (kept.parameters(), Some(kept));
        Self { decoder, learned, recipe, weights: None, activations: None, precision, kept }
    }

    /// The packed weights whose codes stay.
    pub fn kept(&self) -> Option<&Kept> {
        self.kept.as_ref()
    }

    /// Gives what the activations' estimators learn its first value, found in one forward pass of
    /// `tokens`.
    ///
    /// # Errors
    /// As [`TrainDecoder::forward`].
    pub fn initialize_activations(&mut self, tokens: &[u32], seqlen: usize) -> Result<()> {
        let Some(estimator) = &self.activations else { return Ok(()) };
        let mut tape = Tape::default();
        let masters = self.weights(&mut tape, false);
        let mut found = Learned::new();
        let mut at = |tape: &mut Tape, layer: usize, site: Site, x: Var| {
            if !feeds_linears(site) {
                return x;
            }
            let cols = tape.dims(x).1;
            let values = estimator.parameters(tape.data(x), cols);
            let vars: Vec<Var> =
                values.iter().map(|(_, value)| tape.constant(value.clone())).collect();
            if !values.is_empty() {
                found.insert(site.full_name(layer), values);
            }
            estimator.record(tape, x, &vars)
        };
        self.decoder.forward_at(&mut tape, &masters.operands, tokens, seqlen, &mut at)?;
        self.learned.extend(found);
        Ok(())
    }

    /// All that is trained, with names, and whether weight decay applies: the parameters of
    /// [`TrainDecoder::parameters_mut`] that are not frozen, then what is learned.
    pub fn parameters(&mut self) -> Vec<(String, &mut Tensor, bool)> {
        let linears: Vec<String> = {
            let of = |(name, ..): (&str, usize, usize)| format!(".{name}.weight");
            self.decoder.config.block_linears().map(of).to_vec()
        };
        let decays = |name: &str| linears.iter().any(|linear| name.ends_with(linear));
        // What kept codes stand for is counted from its first value: decay would undo training.
        let (kept, decay_learned) = (self.kept.as_ref(), self.kept.is_none());
        let mut all: Vec<(String, &mut Tensor, bool)> = self
            .decoder
            .parameters_mut()
            .into_iter()
            .filter(|(name, _)| kept.is_none_or(|kept| kept.trains(name)))
            .map(|(name, tensor)| {
                let decay = decays(&name);
                (name, tensor, decay)
            })
            .collect();
        for (operand, values) in &mut self.learned {
            let learned = values.iter_mut();
            all.extend(learned.map(|(end, v)| (format!("{operand}.{end}"), v, decay_learned)));
        }
        all
    }

    /// Puts the parameters on the weights' tape and rounds what is multiplied.
    pub fn weights(&self, tape: &mut Tape, wants: bool) -> WeightVars {
        let trains = |name: &str| self.kept.as_ref().is_none_or(|kept| kept.trains(name));
        let masters = self.decoder.vars(tape, &|name| wants && trains(name));
        let mut operands = masters.clone();
        if let Some(kept) = &self.kept {
            let learned = kept.record(tape, &mut operands, &self.learned, wants);
            return WeightVars { masters, operands, learned };
        }
        let mut learned = Vec::new();
        for (layer, block) in operands.blocks.iter_mut().enumerate() {
            for (linear, ..) in self.decoder.config.block_linears() {
                let key = format!("{linear}.weight");
                let Some(weight) = block.get(&key) else { continue };
                let operand = weight_name(layer, linear);
                let mut vars = Vec::new();
                for (end, value) in self.learned.get(&operand).into_iter().flatten() {
                    let var = tape.leaf(value.clone(), wants);
                    learned.push((format!("{operand}.{end}"), var));
                    vars.push(var);
                }
                block.set(&key, self.round(tape, self.weights.as_deref(), weight, &vars));
            }
        }
        WeightVars { masters, operands, learned }
    }

    /// An operand of a product.
    fn round(
        &self,
        tape: &mut Tape,
        estimator: Option<&dyn Estimator>,
        x: Var,
        learned: &[Var],
    ) -> Var {
        match (estimator, self.precision) {
            (Some(estimator), _) => estimator.record(tape, x, learned),
            (None, Precision::Bf16) => tape.straight_through(x, round_to_bf16),
            (None, Precision::F32) => x,
        }
    }

    /// Puts the operands on the activations' tape.
    pub fn leaves(
        &self,
        weights: &WeightVars,
        weights_tape: &Tape,
        tape: &mut Tape,
        wants: bool,
    ) -> Leaves {
        let source = &weights.operands;
        let mut leaf =
            |var: Var| tape.leaf(weights_tape.value(var).clone(), wants && weights_tape.wants(var));
        let embedding = leaf(source.embedding);
        let head = if source.head == source.embedding { embedding } else { leaf(source.head) };
        let norm = leaf(source.norm);
        let mut blocks = source.blocks.clone();
        for block in &mut blocks {
            block.vars.values_mut().for_each(|var| *var = leaf(*var));
        }
        let sites = self.learned.iter().filter(|(operand, _)| !operand.ends_with(".weight"));
        let learned = sites.map(|(operand, values)| {
            (operand.clone(), values.iter().map(|(_, v)| tape.leaf(v.clone(), wants)).collect())
        });
        Leaves { learned: learned.collect(), vars: DecoderVars { embedding, blocks, norm, head } }
    }

    /// Records the forward pass of `tokens`, sequences of `seqlen`.
    ///
    /// # Errors
    /// As [`TrainDecoder::forward`].
    pub fn forward(
        &self,
        tape: &mut Tape,
        leaves: &Leaves,
        tokens: &[u32],
        seqlen: usize,
    ) -> Result<DecoderOutput> {
        self.forward_seeing(tape, leaves, tokens, seqlen, &mut |_, _, _| {})
    }

    /// [`Self::forward`]; `see` is shown every input of a linear before it is rounded, with the
    /// name of the operand.
    fn forward_seeing(
        &self,
        tape: &mut Tape,
        leaves: &Leaves,
        tokens: &[u32],
        seqlen: usize,
        see: &mut dyn FnMut(&Tape, &str, Var),
    ) -> Result<DecoderOutput> {
        let mut at = |tape: &mut Tape, layer: usize, site: Site, x: Var| {
            if !feeds_linears(site) {
                return x;
            }
            let operand = site.full_name(layer);
            see(tape, &operand, x);
            let learned = leaves.learned.get(&operand).map_or(&[][..], Vec::as_slice);
            self.round(tape, self.activations.as_deref(), x, learned)
        };
        Ok(self.decoder.forward_at(tape, &leaves.vars, tokens, seqlen, &mut at)?)
    }

    /// Gradients of the right lengths that are all `value`.
    pub fn no_gradients(&self, value: f32) -> LeafGradients {
        let of = |len: usize| vec![value; len];
        let mut tape = Tape::default();
        let operands = wanted(&self.weights(&mut tape, true).operands, &tape);
        let operands = operands.into_iter().map(|var| of(tape.value(var).len())).collect();
        let sites = self.learned.iter().filter(|(operand, _)| !operand.ends_with(".weight"));
        let learned = sites.flat_map(|(_, values)| values.iter().map(|(_, v)| of(v.len())));
        LeafGradients { learned: learned.collect(), operands }
    }

    /// Adds the gradients of a micro-batch to `sum`, after the backward pass.
    pub fn collect(&self, tape: &mut Tape, leaves: &Leaves, sum: &mut LeafGradients) {
        let operands = wanted(&leaves.vars, tape);
        let learned: Vec<Var> = leaves.learned.values().flatten().copied().collect();
        for (vars, sums) in [(operands, &mut sum.operands), (learned, &mut sum.learned)] {
            let first = sums.is_empty();
            for (i, var) in vars.into_iter().enumerate() {
                let len = tape.value(var).len();
                let grad = tape.take_grad(var).unwrap_or_else(|| vec![0.0; len]);
                if first {
                    sums.push(grad);
                } else {
                    crate::tiles::map(&mut sums[i], true, &grad, |g| g);
                    tape.recycle(grad);
                }
            }
        }
    }

    /// Passes the gradients of the operands on to the parameters, in the order of
    /// [`Self::parameters`].
    pub fn finish(
        &self,
        weights: &WeightVars,
        weights_tape: &mut Tape,
        sum: LeafGradients,
    ) -> Gradients {
        let operands = wanted(&weights.operands, weights_tape).into_iter();
        let outputs: Vec<(Var, &[f32])> =
            operands.zip(&sum.operands).map(|(var, g)| (var, &g[..])).collect();
        weights_tape.backward_from_all(&outputs);
        let masters = wanted(&weights.masters, weights_tape);
        let mut take = |var: Var| {
            let len = weights_tape.value(var).len();
            weights_tape.take_grad(var).unwrap_or_else(|| vec![0.0; len])
        };
        let mut all: Gradients = masters.into_iter().map(&mut take).collect();
        let mut of_weights: BTreeMap<&str, Vec<f32>> =
            weights.learned.iter().map(|(name, var)| (name.as_str(), take(*var))).collect();
        let mut of_activations = sum.learned.into_iter();
        for (operand, values) in &self.learned {
            for (end, value) in values {
                let own = of_weights.remove(format!("{operand}.{end}").as_str());
                let grad = own.or_else(|| of_activations.next());
                all.push(grad.unwrap_or_else(|| vec![0.0; value.len()]));
            }
        }
        all
    }

    /// Share of the entries of every operand that passes gradient, by name, in one forward pass of
    /// `tokens`.
    ///
    /// # Errors
    /// As [`TrainDecoder::forward`].
    pub fn trusted_shares(&self, tokens: &[u32], seqlen: usize) -> Result<BTreeMap<String, f64>> {
        let mut shares = BTreeMap::new();
        let values = |operand: &str| -> Vec<&[f32]> {
            self.learned.get(operand).into_iter().flatten().map(|(_, v)| v.data()).collect()
        };
        if let Some(estimator) = &self.weights {
            for block in &self.decoder.blocks {
                for (linear, _, cols) in self.decoder.config.block_linears() {
                    let operand = weight_name(block.layer, linear);
                    let weight = block.params[&format!("{linear}.weight")].data();
                    let share = estimator.trusted_share(weight, cols, &values(&operand));
                    shares.insert(operand, share);
                }
            }
        }
        if let Some(estimator) = &self.activations {
            let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
            let weights = self.weights(&mut weights_tape, false);
            let leaves = self.leaves(&weights, &weights_tape, &mut tape, false);
            let mut see = |tape: &Tape, operand: &str, x: Var| {
                let cols = tape.dims(x).1;
                let share = estimator.trusted_share(tape.data(x), cols, &values(operand));
                shares.insert(operand.to_string(), share);
            };
            self.forward_seeing(&mut tape, &leaves, tokens, seqlen, &mut see)?;
        }
        Ok(shares)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::model::{initialize, preset};
    use crate::{Form, clip_factor, global_norm};

    fn quest(bits: u8) -> Option<EstimatorSpec> {
        Some(EstimatorSpec::Quest { bits, hadamard: 32, form: Form::Half, clip_scale: None })
    }

    fn student(
        weights: Option<EstimatorSpec>,
        activations: Option<EstimatorSpec>,
    ) -> QuantizedDecoder {
        let decoder = initialize(&preset("tiny", 40, 16).unwrap(), 3, 16);
        let recipe = QuantizerRecipe { weights, activations };
        QuantizedDecoder::new(decoder, recipe, Precision::F32).unwrap()
    }

    fn tokens(n: usize) -> Vec<u32> {
        (0..n).map(|i| (i * 17 % 40) as u32).collect()
    }

    /// Loss and gradients of `tokens`, `micro` sequences of 16 at a time.
    fn gradients(student: &QuantizedDecoder, tokens: &[u32], micro: usize) -> (f32, Gradients) {
        let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
        let weights = student.weights(&mut weights_tape, true);
        let (mut sum, mut total) = (LeafGradients::default(), 0.0);
        for part in tokens.chunks(micro * 16) {
            let leaves = student.leaves(&weights, &weights_tape, &mut tape, true);
            let hidden = student.forward(&mut tape, &leaves, part, 16).unwrap().hidden;
            let targets: Vec<u32> = part.iter().map(|t| (t + 1) % 40).collect();
            let loss = tape.linear_cross_entropy(hidden, leaves.vars.head, &targets);
            let share = part.len() as f32 / tokens.len() as f32;
            total += tape.data(loss)[0] * share;
            tape.backward_from(loss, &[share]);
            student.collect(&mut tape, &leaves, &mut sum);
            tape.reset();
        }
        (total, student.finish(&weights, &mut weights_tape, sum))
    }

    #[test]
    fn micro_batches_add_up_to_the_batch() {
        let lsq = Some(EstimatorSpec::Lsq { bits: 4, raise_zero: true });
        let pact = Some(EstimatorSpec::Pact { bits: 4 });
        for (weights, activations) in [(quest(4), quest(4)), (lsq, pact), (None, None)] {
            let mut student = student(weights, activations);
            student.initialize_activations(&tokens(16), 16).unwrap();
            let (loss, whole) = gradients(&student, &tokens(64), 4);
            let (again, parts) = gradients(&student, &tokens(64), 1);
            approx::assert_relative_eq!(loss, again, max_relative = 1e-5);
            let names: Vec<String> = student.parameters().into_iter().map(|p| p.0).collect();
            assert_eq!(names.len(), whole.len());
            for ((name, a), b) in names.iter().zip(&whole).zip(&parts) {
                let norm = global_norm([&a[..]]);
                assert!(norm > 0.0, "{name} has no gradient");
                let apart: Vec<f32> = a.iter().zip(b).map(|(a, b)| a - b).collect();
                assert!(global_norm([&apart[..]]) < 1e-4 * norm, "{name}");
            }
        }
    }

    /// Without estimators this is the decoder's own gradient.
    #[test]
    fn without_estimators_nothing_changes() {
        let student = student(None, None);
        let (loss, grads) = gradients(&student, &tokens(32), 2);
        let mut tape = Tape::default();
        let vars = student.decoder.vars(&mut tape, &|_| true);
        let hidden = student.decoder.forward(&mut tape, &vars, &tokens(32), 16).unwrap().hidden;
        let targets: Vec<u32> = tokens(32).iter().map(|t| (t + 1) % 40).collect();
        let want = tape.linear_cross_entropy(hidden, vars.head, &targets);
        tape.backward(want);
        assert_eq!(loss, tape.data(want)[0]);
        for ((name, var), grad) in vars.named().iter().zip(&grads) {
            assert_eq!(tape.grad(*var).unwrap(), grad, "{name}");
        }
        assert!(clip_factor(global_norm(grads.iter().map(|g| &g[..])), 1.0) > 0.0);
    }

    /// Invariant 21: at 8 bits logits are nearly those of full precision; without estimators they
    /// are those.
    #[test]
    fn invariant_21_eight_bits_change_little() {
        let absmax = Some(EstimatorSpec::Absmax { bits: 8, hadamard: 0, form: Form::Full });
        let logits = |weights, activations| {
            let student = student(weights, activations);
            let (mut weights_tape, mut tape) = (Tape::default(), Tape::default());
            let weights = student.weights(&mut weights_tape, false);
            let leaves = student.leaves(&weights, &weights_tape, &mut tape, false);
            let hidden = student.forward(&mut tape, &leaves, &tokens(32), 16).unwrap().hidden;
            let logits = student.decoder.logits(&mut tape, &leaves.vars, hidden);
            tape.data(logits).to_vec()
        };
        let (rounded, same) = (logits(absmax, absmax), logits(None, None));
        let full = {
            let decoder = student(None, None).decoder;
            let mut tape = Tape::default();
            let vars = decoder.vars(&mut tape, &|_| false);
            let hidden = decoder.forward(&mut tape, &vars, &tokens(32), 16).unwrap().hidden;
            let logits = decoder.logits(&mut tape, &vars, hidden);
            tape.data(logits).to_vec()
        };
        assert_eq!(same, full);
        let apart: Vec<f32> = rounded.iter().zip(&full).map(|(a, b)| a - b).collect();
        let share = global_norm([&apart[..]]) / global_norm([&full[..]]);
        assert!(share > 0.0 && share < 0.02, "{share}");
    }

    #[test]
    fn shares_are_those_of_the_gaussian() {
        let student = student(quest(1), quest(4));
        let shares = student.trusted_shares(&tokens(16), 16).unwrap();
        // Seven weights and four sites in each of two layers.
        assert_eq!(shares.len(), 22);
        let weight = shares["model.layers.1.mlp.up_proj.weight"];
        assert!((weight - 0.70).abs() < 0.03, "{weight}");
        assert!(shares["model.layers.0.attn_input"] > 0.97);
    }

    #[test]
    fn what_does_not_fit_names_the_linear() {
        let decoder = initialize(&preset("tiny", 40, 16).unwrap(), 3, 16);
        let weights = Some(EstimatorSpec::Quest {
            bits: 4,
            hadamard: 128,
            form: Form::Full,
            clip_scale: None,
        });
        let recipe = QuantizerRecipe { weights, activations: None };
        let error = QuantizedDecoder::new(decoder, recipe, Precision::F32).unwrap_err();
        assert!(error.to_string().contains("self_attn.q_proj"), "{error}");
    }
}
