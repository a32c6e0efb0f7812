//! [`EstimatorSpec`]: an estimator as a recipe names it.
//!
//! ```toml
//! [weights]
//! type = "quest"
//! bits = 4
//! hadamard = 128
//! ```

use serde::{Deserialize, Serialize};

use super::dorefa::{DorefaActivation, DorefaWeight};
use super::lsq::Lsq;
use super::pact::Pact;
use super::rotation::Rotation;
use super::rows::{RowEstimator, RowGrid};
use super::sparse_pairs::SparsePairs;
use super::uniform::{UniformGrid, trust};
use super::{Estimator, EstimatorError, Form, Fp4Trust, GaussianGradient, fp4, gaussian, ternary};

/// Settings of an estimator. `hadamard` is the number of columns of a block of the rotation in
/// front, a power of two that divides `K`, or 0 for none; `form` says in which basis the operand is
/// returned. What is left out is as the paper of the method has it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum EstimatorSpec {
    /// QuEST: trust on the uniform grid of the row's root mean square.
    Quest {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns of a block.
        #[serde(default = "rotated")]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
        /// Gradient passes up to so many times the end of the grid. By default `n/(n − 1)`, half a
        /// step beyond it; at one bit 1.30, or 1.25 without rotation.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clip_scale: Option<f64>,
    },
    /// Trust on three levels.
    Ternary {
        /// Columns of a block.
        #[serde(default = "rotated")]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
        /// Gradient passes up to so many times the end of the grid; by default 1.5, half a step
        /// beyond it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        clip_scale: Option<f64>,
    },
    /// Trust on the levels of E2M1.
    Fp4 {
        /// Columns of a block.
        #[serde(default = "rotated")]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
        /// Which errors pass gradient.
        #[serde(default)]
        trust: Fp4Trust,
    },
    /// Trust on the uniform grid with half of the pairs of columns zero: for weights. `K` is a
    /// multiple of 8.
    SparsePairs {
        /// Bits of a code, 2 to 8.
        #[serde(default = "four")]
        bits: u8,
        /// Columns of a block.
        #[serde(default = "rotated")]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
    },
    /// The grid of `quest`, gradient everywhere: the straight-through estimator.
    Ste {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns of a block.
        #[serde(default)]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
    },
    /// The grid of `quest`, gradient up to `clip_scale` times its end.
    Clip {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns of a block.
        #[serde(default)]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
        /// 1: the clipped straight-through estimator.
        #[serde(default = "one")]
        clip_scale: f64,
    },
    /// Equal steps up to the row's largest magnitude, gradient everywhere. With a rotation this is
    /// what QuEST's table 1 calls QuaRot-QAT.
    Absmax {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns of a block.
        #[serde(default)]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
    },
    /// The levels of Lloyd and Max for N(0, 1).
    Gaussian {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Columns of a block.
        #[serde(default)]
        hadamard: usize,
        /// Basis of the result.
        #[serde(default)]
        form: Form,
        /// Which entries pass gradient.
        #[serde(default)]
        gradient: GaussianGradient,
    },
    /// LSQ: a learned step.
    Lsq {
        /// Bits of a code, 1 to 8; from 2 without `raise_zero`.
        bits: u8,
        /// Whether the grid is shifted by half a step, so that it is symmetric.
        #[serde(default = "yes")]
        raise_zero: bool,
    },
    /// LSQ+ for weights: a learned step, at first that of N(0, 1).
    LsqPlusWeight {
        /// Bits of a code, 1 to 8.
        bits: u8,
    },
    /// LSQ+ for activations: a learned step and offset.
    LsqPlusActivation {
        /// Bits of a code, 1 to 8.
        bits: u8,
    },
    /// PACT: a learned clip.
    Pact {
        /// Bits of a code, 1 to 8.
        bits: u8,
    },
    /// DoReFa for weights.
    DorefaWeight {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Whether the quantized weights keep the size of `tanh` of the weights, instead of filling
        /// `[−1, 1]` as the paper's networks with batch normalization can afford.
        #[serde(default = "yes")]
        rescale: bool,
    },
    /// DoReFa for activations.
    DorefaActivation {
        /// Bits of a code, 1 to 8.
        bits: u8,
        /// Whether the range is `[−1, 1]`, instead of the paper's `[0, 1]`.
        #[serde(default = "yes")]
        signed: bool,
    },
    /// The grids and codes of a packed checkpoint stay, and what codes stand for is trained: for
    /// weights of a model whose `model.init` is one ([`crate::train::kept`]).
    Kept {
        /// Whether factors of columns are trained too, where there are any.
        #[serde(default)]
        column_scale: bool,
    },
}

fn rotated() -> usize {
    128
}

fn four() -> u8 {
    4
}

fn one() -> f64 {
    1.0
}

fn yes() -> bool {
    true
}

fn rows<G: RowGrid + 'static>(
    name: &'static str,
    grid: G,
    rotation: Rotation,
) -> Box<dyn Estimator> {
    Box::new(RowEstimator { name, grid, rotation })
}

impl EstimatorSpec {
    /// Its name in recipes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Quest { .. } => "quest",
            Self::Ternary { .. } => "ternary",
            Self::Fp4 { .. } => "fp4",
            Self::SparsePairs { .. } => "sparse_pairs",
            Self::Ste { .. } => "ste",
            Self::Clip { .. } => "clip",
            Self::Absmax { .. } => "absmax",
            Self::Gaussian { .. } => "gaussian",
            Self::Lsq { .. } => "lsq",
            Self::LsqPlusWeight { .. } => "lsq_plus_weight",
            Self::LsqPlusActivation { .. } => "lsq_plus_activation",
            Self::Pact { .. } => "pact",
            Self::DorefaWeight { .. } => "dorefa_weight",
            Self::DorefaActivation { .. } => "dorefa_activation",
            Self::Kept { .. } => "kept",
        }
    }

    /// Columns of a block of the rotation, and the basis of the result.
    fn rotation(&self) -> (usize, Form) {
        match *self {
            Self::Quest { hadamard, form, .. }
            | Self::Ternary { hadamard, form, .. }
            | Self::Fp4 { hadamard, form, .. }
            | Self::SparsePairs { hadamard, form, .. }
            | Self::Ste { hadamard, form, .. }
            | Self::Clip { hadamard, form, .. }
            | Self::Absmax { hadamard, form, .. }
            | Self::Gaussian { hadamard, form, .. } => (hadamard, form),
            Self::Lsq { .. }
            | Self::LsqPlusWeight { .. }
            | Self::LsqPlusActivation { .. }
            | Self::Pact { .. }
            | Self::DorefaWeight { .. }
            | Self::DorefaActivation { .. }
            | Self::Kept { .. } => (0, Form::Full),
        }
    }

    /// Columns of a block of the basis in which the operand is returned, 0 for its own. Both
    /// operands of a product must agree: one that is still rotated beside one that is not is
    /// another function.
    pub fn basis(&self) -> usize {
        match self.rotation() {
            (block, Form::Half) => block,
            (_, Form::Full) => 0,
        }
    }

    /// The bits of a code, where they are a setting, and the fewest possible.
    fn bits(&self) -> Option<(u8, u8)> {
        match *self {
            Self::Ternary { .. } | Self::Fp4 { .. } | Self::Kept { .. } => None,
            Self::SparsePairs { bits, .. } | Self::Lsq { bits, raise_zero: false } => {
                Some((bits, 2))
            }
            Self::Quest { bits, .. }
            | Self::Ste { bits, .. }
            | Self::Clip { bits, .. }
            | Self::Absmax { bits, .. }
            | Self::Gaussian { bits, .. }
            | Self::Lsq { bits, .. }
            | Self::LsqPlusWeight { bits }
            | Self::LsqPlusActivation { bits }
            | Self::Pact { bits }
            | Self::DorefaWeight { bits, .. }
            | Self::DorefaActivation { bits, .. } => Some((bits, 1)),
        }
    }

    /// Checks everything, and that rows of `cols` can be quantized.
    ///
    /// # Errors
    /// What [`Self::build`] and [`Estimator::check`] find.
    pub fn validate(&self, cols: usize) -> Result<(), EstimatorError> {
        self.build()?.check(cols)
    }

    /// The estimator.
    ///
    /// # Errors
    /// [`EstimatorError`] for bits without a grid, a block that is no power of two, a clip scale
    /// that is not positive, or kept codes, which are no estimator's.
    pub fn build(&self) -> Result<Box<dyn Estimator>, EstimatorError> {
        let name = self.name();
        if let Some((bits, min)) = self.bits().filter(|(bits, min)| !(*min..=8).contains(bits)) {
            return Err(EstimatorError::Bits { estimator: name, bits, min, max: 8 });
        }
        let (block, form) = self.rotation();
        let rotation = Rotation::new(block, form)?;
        let positive = |value: f64| match value > 0.0 {
            true => Ok(value),
            false => Err(EstimatorError::ClipScale { value }),
        };
        Ok(match *self {
            Self::Quest { bits, clip_scale, .. } => {
                let default = match (bits, block) {
                    (1, 0) => 1.25,
                    (1, _) => 1.30,
                    _ => trust(bits) as f64,
                };
                let reach = positive(clip_scale.unwrap_or(default))? as f32;
                rows(name, UniformGrid::gaussian(bits, reach), rotation)
            }
            Self::Ternary { clip_scale, .. } => {
                let reach = positive(clip_scale.unwrap_or(ternary::TRUST))?;
                rows(name, ternary::grid(reach), rotation)
            }
            Self::Fp4 { trust, .. } => rows(name, fp4::grid(trust), rotation),
            Self::SparsePairs { bits, .. } => {
                let kept = UniformGrid::gaussian(bits, trust(bits));
                rows(name, SparsePairs { kept }, rotation)
            }
            Self::Ste { bits, .. } => {
                rows(name, UniformGrid::gaussian(bits, f32::INFINITY), rotation)
            }
            Self::Clip { bits, clip_scale, .. } => {
                let reach = positive(clip_scale)? as f32;
                rows(name, UniformGrid::gaussian(bits, reach), rotation)
            }
            Self::Absmax { bits, .. } => rows(name, UniformGrid::largest(bits), rotation),
            Self::Gaussian { bits, gradient, .. } => {
                rows(name, gaussian::grid(bits, gradient), rotation)
            }
            Self::Lsq { bits, raise_zero } => Box::new(Lsq::new(bits, raise_zero)),
            Self::LsqPlusWeight { bits } => Box::new(Lsq::plus_weight(bits)),
            Self::LsqPlusActivation { bits } => Box::new(Lsq::plus_activation(bits)),
            Self::Pact { bits } => Box::new(Pact::new(bits)),
            Self::DorefaWeight { bits, rescale } => Box::new(DorefaWeight { bits, rescale }),
            Self::DorefaActivation { bits, signed } => Box::new(DorefaActivation { bits, signed }),
            Self::Kept { .. } => return Err(EstimatorError::Kept),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<EstimatorSpec, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn settings_are_read_with_the_defaults_of_the_papers() {
        let quest = parse(r#"{"type": "quest", "bits": 4}"#).unwrap();
        let want =
            EstimatorSpec::Quest { bits: 4, hadamard: 128, form: Form::Half, clip_scale: None };
        assert_eq!((quest, quest.basis()), (want, 128));
        let full =
            parse(r#"{"type": "quest", "bits": 1, "hadamard": 32, "form": "full"}"#).unwrap();
        assert_eq!(full.basis(), 0);
        let ste = parse(r#"{"type": "ste", "bits": 4}"#).unwrap();
        assert_eq!(ste, EstimatorSpec::Ste { bits: 4, hadamard: 0, form: Form::Half });
        assert!(parse(r#"{"type": "quest", "bits": 4, "block": 64}"#).is_err());
        assert!(parse(r#"{"type": "quest"}"#).is_err());
    }

    #[test]
    fn every_estimator_has_a_name_and_survives_a_round_trip() {
        let texts = [
            r#"{"type": "quest", "bits": 1, "clip_scale": 2.0}"#,
            r#"{"type": "ternary"}"#,
            r#"{"type": "fp4", "trust": "released"}"#,
            r#"{"type": "sparse_pairs"}"#,
            r#"{"type": "ste", "bits": 2}"#,
            r#"{"type": "clip", "bits": 2, "hadamard": 64}"#,
            r#"{"type": "absmax", "bits": 4, "hadamard": 128}"#,
            r#"{"type": "gaussian", "bits": 3, "gradient": "clip"}"#,
            r#"{"type": "lsq", "bits": 4, "raise_zero": false}"#,
            r#"{"type": "lsq_plus_weight", "bits": 4}"#,
            r#"{"type": "lsq_plus_activation", "bits": 4}"#,
            r#"{"type": "pact", "bits": 4}"#,
            r#"{"type": "dorefa_weight", "bits": 2}"#,
            r#"{"type": "dorefa_activation", "bits": 2, "signed": false}"#,
        ];
        for text in texts {
            let spec = parse(text).unwrap();
            assert_eq!(spec.build().unwrap().name(), spec.name());
            assert!(text.contains(&format!("\"{}\"", spec.name())), "{text}");
            assert_eq!(parse(&serde_json::to_string(&spec).unwrap()).unwrap(), spec);
            spec.validate(640).unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let quest = |bits, hadamard| EstimatorSpec::Quest {
            bits,
            hadamard,
            form: Form::Half,
            clip_scale: None,
        };
        for bits in [0, 9] {
            let error = quest(bits, 128).build().unwrap_err();
            assert_eq!(error, EstimatorError::Bits { estimator: "quest", bits, min: 1, max: 8 });
        }
        assert!(EstimatorSpec::Lsq { bits: 1, raise_zero: false }.build().is_err());
        assert!(EstimatorSpec::Lsq { bits: 1, raise_zero: true }.build().is_ok());
        assert_eq!(quest(4, 96).build().unwrap_err(), EstimatorError::Block { block: 96 });
        let error = quest(4, 128).validate(1000).unwrap_err().to_string();
        assert!(error.contains("K = 1000") && error.contains("128"), "{error}");
        let pairs = EstimatorSpec::SparsePairs { bits: 4, hadamard: 0, form: Form::Half };
        assert!(pairs.validate(12).unwrap_err().to_string().contains("K = 12"));
        let clip = EstimatorSpec::Clip { bits: 4, hadamard: 0, form: Form::Half, clip_scale: -1.0 };
        assert!(clip.validate(8).is_err());
        let kept = parse(r#"{"type": "kept"}"#).unwrap();
        assert_eq!(kept, EstimatorSpec::Kept { column_scale: false });
        assert_eq!(kept.build().unwrap_err(), EstimatorError::Kept);
        assert!(parse(r#"{"type": "kept", "bits": 3}"#).is_err());
    }
}
