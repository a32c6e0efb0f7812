//! Which estimator rounds which operand of a network.
//!
//! Weights and inputs of the inner layers are rounded as the recipe says; those of the first
//! convolution and of the head by LSQ at more bits (8; LSQ, section 3). The default input grid,
//! `lsq_plus_activation`, learns its lowest level too, so that behind ReLU all `2^b` levels are
//! used; grids around zero waste half of them there. The default weight grid is LSQ without a zero,
//! one step per tensor; at one bit it is a sign times a learned step.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::network::{Kind, Mode, Network, Parameter};
use super::{Result, VisionError};
use crate::{Estimator, EstimatorSpec, Tape, Tensor, Var};

/// Estimators of a network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizerSpec {
    /// Of the weights of the inner layers.
    pub weights: EstimatorSpec,
    /// Of their inputs.
    pub activations: EstimatorSpec,
    /// Bits of the first convolution and of the head, for both operands.
    #[serde(default = "eight")]
    pub ends: u8,
}

fn eight() -> u8 {
    8
}

impl QuantizerSpec {
    /// LSQ for weights, LSQ+ for inputs.
    pub fn lsq(weights: u8, activations: u8) -> Self {
        Self {
            weights: EstimatorSpec::Lsq { bits: weights, raise_zero: true },
            activations: EstimatorSpec::LsqPlusActivation { bits: activations },
            ends: eight(),
        }
    }

    /// Estimators of weight and input of a layer; `end` for the first and the last.
    fn of(&self, end: bool) -> (EstimatorSpec, EstimatorSpec) {
        match end {
            true => {
                let Self { weights, activations, .. } = Self::lsq(self.ends, self.ends);
                (weights, activations)
            }
            false => (self.weights, self.activations),
        }
    }

    /// Checks what does not depend on the network.
    ///
    /// # Errors
    /// Estimators that do not exist, or return operands in another basis.
    pub fn check(&self) -> Result<()> {
        let (ends, _) = self.of(true);
        let all = [
            ("quantizer.weights", self.weights),
            ("quantizer.activations", self.activations),
            ("quantizer.ends", ends),
        ];
        for (key, spec) in all {
            let named = |source| VisionError::Estimator { place: key.into(), source };
            spec.build().map_err(named)?;
            if spec.basis() > 0 {
                let what = "form = \"half\" is for linears; write \"full\", or hadamard = 0";
                return Err(VisionError::recipe("quantizer", what));
            }
        }
        Ok(())
    }
}

/// The estimator of an operand.
#[derive(Debug, Clone)]
pub(super) struct Operand {
    /// Its settings.
    pub spec: EstimatorSpec,
    estimator: Arc<dyn Estimator>,
    /// Where the parameters are that it learns.
    pub learned: Range<usize>,
}

impl Operand {
    /// The estimator `spec` for `name`, an operand that starts as `first`, rows of `cols`. What it
    /// learns is added to the parameters.
    fn new(
        parameters: &mut Vec<Parameter>,
        spec: EstimatorSpec,
        name: &str,
        first: &[f32],
        cols: usize,
    ) -> Result<Self> {
        let named =
            |source| VisionError::Estimator { place: format!("quantizer at {name}"), source };
        let estimator = spec.build().map_err(named)?;
        estimator.check(cols).map_err(named)?;
        let start = parameters.len();
        for (end, value) in estimator.parameters(first, cols) {
            parameters.push(Parameter { name: format!("{name}.{end}"), value, kind: Kind::Grid });
        }
        Ok(Self { spec, estimator: estimator.into(), learned: start..parameters.len() })
    }

    /// Records the rounded operand.
    pub fn record(&self, tape: &mut Tape, x: Var, vars: &[Var]) -> Var {
        self.estimator.record(tape, x, &vars[self.learned.clone()])
    }
}

/// Estimators of both operands of a layer.
#[derive(Debug, Clone)]
pub(super) struct LayerGrids {
    /// Of the weight.
    pub weight: Operand,
    /// Of the input.
    pub input: Operand,
}

/// Estimators of all layers.
#[derive(Debug, Clone)]
pub(super) struct Quantizer {
    /// What they were made from.
    pub spec: QuantizerSpec,
    /// Of the convolutions, then of the head.
    pub layers: Vec<LayerGrids>,
}

impl Network {
    /// From here on operands are rounded. What estimators learn starts from the weights, and from
    /// the inputs that `images`, a matrix of pixels, give in full precision.
    ///
    /// # Errors
    /// Estimators that do not exist or do not fit a layer.
    ///
    /// # Panics
    /// When operands are rounded already.
    pub fn quantize(&mut self, spec: &QuantizerSpec, images: &Tensor) -> Result<()> {
        assert!(self.quantizer.is_none(), "operands are rounded already");
        spec.check()?;
        let mut tape = Tape::default();
        let inputs = self.forward(&mut tape, images, Mode::Observe).inputs;
        let (last, mut layers) = (self.head(), Vec::new());
        for (layer, input) in inputs.into_iter().enumerate() {
            let (weights, activations) = spec.of(layer == 0 || layer == last);
            let name = self.layer_name(layer).to_string();
            let value = self.parameters[self.weight_at(layer)].value.clone();
            let (all, cols) = (&mut self.parameters, value.shape()[1]);
            let weight = Operand::new(all, weights, &format!("{name}.weight"), value.data(), cols)?;
            let (first, cols) = (tape.data(input), tape.dims(input).1);
            let input = Operand::new(all, activations, &format!("{name}.input"), first, cols)?;
            layers.push(LayerGrids { weight, input });
        }
        self.quantizer = Some(Quantizer { spec: *spec, layers });
        Ok(())
    }

    /// The estimators, if there are any.
    pub fn quantizer(&self) -> Option<&QuantizerSpec> {
        self.quantizer.as_ref().map(|q| &q.spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;
    use crate::vision::data::Normalization;
    use crate::vision::model::{Family, ModelSpec};
    use crate::vision::ops::Shape;

    const INPUT: Shape = Shape { height: 6, width: 6, channels: 1 };

    fn network(family: Family) -> Network {
        let architecture = ModelSpec { family, width: 4 }.build(INPUT, 3).unwrap();
        let normalization = Normalization { mean: vec![0.0], deviation: vec![1.0] };
        Network::new(architecture, normalization, 1)
    }

    #[test]
    fn every_operand_has_its_grid() {
        let images = random(1, [5 * 36, 1]);
        for family in [Family::Tiny, Family::Resnet20, Family::Mobilenet] {
            let mut network = network(family);
            let before = network.parameters.len();
            network.quantize(&QuantizerSpec::lsq(2, 2), &images).unwrap();
            // A step per weight, a step and an offset per input.
            assert_eq!(network.parameters.len() - before, 3 * (network.head() + 1));
            let names: Vec<&str> =
                network.parameters[before..].iter().map(|p| p.name.as_str()).collect();
            assert_eq!(names[..3], ["conv1.weight.step", "conv1.input.step", "conv1.input.offset"]);
            assert_eq!(names[names.len() - 1], "head.input.offset");
            let mut tape = Tape::default();
            let forward = network.forward(&mut tape, &images, Mode::Train);
            tape.backward_from(forward.logits, &[1.0; 15]);
            for (parameter, var) in network.parameters.iter().zip(&forward.vars) {
                let grad = tape.grad(*var).unwrap_or_else(|| panic!("{}", parameter.name));
                assert!(grad.iter().all(|g| g.is_finite()), "{}", parameter.name);
            }
            assert_eq!(forward.moments.len(), network.head());
        }
    }

    /// Invariant 21: at 8 bits the logits are nearly those of full precision.
    #[test]
    fn invariant_21_eight_bits_change_little() {
        let images = random(2, [8 * 36, 1]);
        let logits = |network: &Network| {
            let mut tape = Tape::default();
            let logits = network.forward(&mut tape, &images, Mode::Train).logits;
            tape.data(logits).to_vec()
        };
        let mut network = network(Family::Tiny);
        let full = logits(&network);
        // The grid from the extremes, which clips nothing.
        let absmax = EstimatorSpec::Absmax { bits: 8, hadamard: 0, form: Default::default() };
        let spec = QuantizerSpec { weights: absmax, ..QuantizerSpec::lsq(8, 8) };
        network.quantize(&spec, &images).unwrap();
        let scale = full.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in logits(&network).iter().zip(&full) {
            assert!((a - b).abs() < 0.2 * scale, "{a} {b}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let images = random(3, [36, 1]);
        let fails = |spec: QuantizerSpec| {
            network(Family::Tiny).quantize(&spec, &images).unwrap_err().to_string()
        };
        let form = crate::Form::Full;
        let quest = EstimatorSpec::Quest { bits: 2, hadamard: 128, form, clip_scale: None };
        let error = fails(QuantizerSpec { weights: quest, ..QuantizerSpec::lsq(2, 2) });
        assert!(error.contains("conv2.weight"), "{error}");
        assert!(fails(QuantizerSpec::lsq(9, 2)).contains("quantizer.weights"));
        assert!(fails(QuantizerSpec { ends: 0, ..QuantizerSpec::lsq(2, 2) }).contains("ends"));
    }
}
