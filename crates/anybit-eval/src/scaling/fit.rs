//! Fitting the law to runs, with intervals from resampled runs.

use std::collections::{BTreeMap, BTreeSet};

use anybit_core::rng::SplitMix64;
use rayon::prelude::*;
use serde::Serialize;

use super::solve::{E, Problem, SHARED, Sample, Solution, minimize};
use super::{Law, Run};
use crate::{EvalError, Result};

/// Exponents to start from, and shares of the least loss for `E`: there are minima that are not the
/// least, mostly where one of the terms has become a constant.
const ALPHAS: [f64; 3] = [0.05, 0.15, 0.4];
const BETAS: [f64; 3] = [0.1, 0.25, 0.6];
const E_SHARES: [f64; 3] = [0.0, 0.5, 0.9];

/// What is asked of the constant `E`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Irreducible {
    /// It is not negative, as in the paper.
    #[default]
    NonNegative,
    /// Any value that makes the fit best.
    Free,
    /// This value.
    Fixed(f64),
}

/// How to fit.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FitOptions {
    /// The constraint on `E`.
    pub irreducible: Irreducible,
    /// Residual of `ln L` from which it counts linearly (Huber); `None` for least squares.
    pub huber: Option<f64>,
    /// The precision of which `eff` is 1; the one with 16 bits or more by default.
    pub reference: Option<String>,
    /// Resamples for the intervals; 0 for none.
    pub bootstrap: usize,
    /// Seed of the resamples.
    pub seed: u64,
}

/// A law and how well it describes the runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fit {
    /// The constants.
    pub law: Law,
    /// What was asked of `E`.
    pub irreducible: Irreducible,
    /// Residual from which it counted linearly; null for least squares.
    pub huber: Option<f64>,
    /// The precision of which `eff` is 1.
    pub reference: String,
    /// Root of the mean squared residual of `ln L`.
    pub rms_residual: f64,
    /// Largest magnitude of a residual of `ln L`.
    pub max_residual: f64,
    /// 95% intervals of the constants, when they were asked for.
    pub intervals: Option<Intervals>,
    /// Seed of the resamples.
    pub seed: u64,
    /// Every precision: the reference, then by family and bits.
    pub precisions: Vec<Precision>,
    /// The precision of most `eff(P)/P` of each family with several.
    pub optima: BTreeMap<String, String>,
    /// The runs, in their order.
    pub runs: Vec<FittedRun>,
}

/// 95% intervals: 2.5th to 97.5th percentile of the fits of resampled runs. Runs are drawn with
/// replacement within each precision, so that none is ever without runs. A precision with few runs
/// has intervals that are too narrow.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Intervals {
    /// Resamples that could be fitted.
    pub resamples: usize,
    /// Of `A`.
    pub a: [f64; 2],
    /// Of `α`.
    pub alpha: [f64; 2],
    /// Of `B`.
    pub b: [f64; 2],
    /// Of `β`.
    pub beta: [f64; 2],
    /// Of `E`.
    pub e: [f64; 2],
    /// Of `eff`, for every precision but the reference.
    pub eff: BTreeMap<String, [f64; 2]>,
}

/// What one precision is worth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Precision {
    /// Its name.
    pub name: String,
    /// What is before the last space of the name: precisions are compared within it.
    pub family: String,
    /// Bits of a weight, when they are known.
    pub bits: Option<f64>,
    /// Its runs.
    pub runs: usize,
    /// What a parameter is worth, the reference's being 1.
    pub eff: f64,
    /// `eff(P)/P` over that of the reference: what a bit is worth. At a fixed budget of bits, and
    /// with data in plenty, the precision of the most gives the best model.
    pub eff_per_bit: Option<f64>,
}

/// A run beside what the law says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FittedRun {
    /// The run.
    #[serde(flatten)]
    pub run: Run,
    /// The loss by the law.
    pub predicted: f64,
    /// `ln predicted − ln loss`.
    pub residual: f64,
}

/// Fits the law to all runs jointly. The same runs and options give the same result.
///
/// # Errors
/// Runs that do not determine the law, options that do not fit them.
pub fn fit(runs: &[Run], options: &FitOptions) -> Result<Fit> {
    let study = Study::new(runs, options)?;
    let weights = vec![1.0; runs.len()];
    let found = study.solve(&weights, &study.starts());
    let found = found.ok_or_else(|| fail("no start leads to a minimum"))?;
    let law = study.law(&found.parameters);
    let fitted = |run: &Run| {
        let predicted = law.predict(run.params, run.tokens, &run.precision).unwrap_or(f64::NAN);
        FittedRun { run: run.clone(), predicted, residual: (predicted / run.loss).ln() }
    };
    let runs: Vec<FittedRun> = runs.iter().map(fitted).collect();
    let squares: f64 = runs.iter().map(|r| r.residual * r.residual).sum();
    let precisions = study.precisions(&law);
    Ok(Fit {
        rms_residual: (squares / runs.len() as f64).sqrt(),
        max_residual: runs.iter().fold(0.0, |most, r| r.residual.abs().max(most)),
        irreducible: options.irreducible,
        huber: options.huber,
        reference: study.reference.clone(),
        intervals: study.intervals(&found.parameters),
        seed: options.seed,
        optima: optima(&precisions, &study.reference),
        precisions,
        law,
        runs,
    })
}

fn fail(what: impl Into<String>) -> EvalError {
    EvalError::Scaling { what: what.into() }
}

/// `QuEST` of `QuEST W4A4`, nothing of `4`.
fn family(name: &str) -> &str {
    name.rsplit_once(' ').map_or("", |(family, _)| family)
}

/// The best `eff` per bit of each family in which there is a choice.
fn optima(precisions: &[Precision], reference: &str) -> BTreeMap<String, String> {
    let mut families: BTreeMap<&str, Vec<(f64, &str)>> = BTreeMap::new();
    for precision in precisions.iter().filter(|p| p.name != reference) {
        if let Some(value) = precision.eff_per_bit {
            families.entry(&precision.family).or_default().push((value, precision.name.as_str()));
        }
    }
    let choices = families.into_iter().filter(|(_, members)| members.len() > 1);
    let best = choices.filter_map(|(family, members)| {
        let (_, name) = members.into_iter().max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some((family.to_string(), name.to_string()))
    });
    best.collect()
}

/// Runs and options, checked and numbered.
struct Study<'a> {
    options: &'a FitOptions,
    samples: Vec<Sample>,
    least_loss: f64,
    reference: String,
    /// All precisions but the reference.
    names: Vec<String>,
    /// Bits of every precision.
    bits: BTreeMap<String, Option<f64>>,
}

impl<'a> Study<'a> {
    fn new(runs: &[Run], options: &'a FitOptions) -> Result<Self> {
        let mut bits: BTreeMap<String, Option<f64>> = BTreeMap::new();
        for (i, run) in runs.iter().enumerate() {
            let values = [run.params, run.tokens, run.loss];
            if !values.iter().all(|v| v.is_finite() && *v > 0.0) {
                let place = i + 1;
                return Err(fail(format!("run {place} has a value that is not above 0: {run:?}")));
            }
            let name = &run.precision;
            if *bits.entry(name.clone()).or_insert(run.bits) != run.bits {
                return Err(fail(format!("runs of {name:?} do not have the same bits")));
            }
        }
        let reference = reference(&bits, options.reference.as_deref())?;
        let names: Vec<String> = bits.keys().filter(|n| **n != reference).cloned().collect();
        let sample = |run: &Run| Sample {
            ln_params: run.params.ln(),
            ln_tokens: run.tokens.ln(),
            ln_loss: run.loss.ln(),
            precision: names.binary_search(&run.precision).ok(),
        };
        let samples = runs.iter().map(sample).collect();
        let least_loss = runs.iter().fold(f64::MAX, |least, run| run.loss.min(least));
        let study = Self { options, samples, least_loss, reference, names, bits };
        study.check(runs)?;
        Ok(study)
    }

    /// Whether the runs can determine what is asked for.
    fn check(&self, runs: &[Run]) -> Result<()> {
        let fixed = match self.options.irreducible {
            Irreducible::Fixed(e) if !e.is_finite() || e >= self.least_loss => {
                let least = self.least_loss;
                return Err(fail(format!("E cannot be {e}: the least loss is {least}")));
            }
            Irreducible::Fixed(_) => 1,
            Irreducible::NonNegative | Irreducible::Free => 0,
        };
        if self.options.huber.is_some_and(|delta| !delta.is_finite() || delta <= 0.0) {
            return Err(fail("the residual of Huber's loss must be above 0"));
        }
        let constants = SHARED - fixed + self.names.len();
        if runs.len() < constants {
            let found = runs.len();
            return Err(fail(format!("{found} runs cannot give {constants} constants")));
        }
        let distinct = |value: fn(&Run) -> f64| {
            runs.iter().map(|run| value(run).to_bits()).collect::<BTreeSet<_>>().len()
        };
        for (what, count) in
            [("parameters", distinct(|run| run.params)), ("tokens", distinct(|run| run.tokens))]
        {
            if count < 2 {
                return Err(fail(format!("all runs have the same number of {what}")));
            }
        }
        Ok(())
    }

    /// Points over the plausible range, with the two terms of equal size at the mean run.
    fn starts(&self) -> Vec<Vec<f64>> {
        let mean = |value: fn(&Sample) -> f64| {
            self.samples.iter().map(value).sum::<f64>() / self.samples.len() as f64
        };
        let (params, tokens) = (mean(|s| s.ln_params), mean(|s| s.ln_tokens));
        let loss = mean(|s| s.ln_loss.exp());
        let mut starts = Vec::new();
        for alpha in ALPHAS {
            for beta in BETAS {
                for share in E_SHARES {
                    let e = share * self.least_loss;
                    let half = ((loss - e) / 2.0).ln();
                    let mut start = vec![0.0; SHARED + self.names.len()];
                    let shared =
                        [half + alpha * params, alpha.ln(), half + beta * tokens, beta.ln(), e];
                    start[..SHARED].copy_from_slice(&shared);
                    starts.push(start);
                }
            }
        }
        starts
    }

    /// The least minimum that descents from `starts` end in.
    fn solve(&self, weights: &[f64], starts: &[Vec<f64>]) -> Option<Solution> {
        let descend = |fixed: Option<f64>| {
            let problem = Problem {
                samples: &self.samples,
                weights,
                precisions: self.names.len(),
                fixed_e: fixed.is_some(),
                huber: self.options.huber,
            };
            let from = |start: &Vec<f64>| {
                let mut start = start.clone();
                start[E] = fixed.unwrap_or(start[E]);
                minimize(&problem, start)
            };
            starts.iter().filter_map(from).collect::<Vec<Solution>>()
        };
        let found = match self.options.irreducible {
            Irreducible::Free => descend(None),
            Irreducible::Fixed(e) => descend(Some(e)),
            // A minimum under the constraint lies either on its edge or where one without it does.
            Irreducible::NonNegative => {
                let mut all = descend(None);
                all.retain(|solution| solution.parameters[E] >= 0.0);
                all.extend(descend(Some(0.0)));
                all
            }
        };
        found.into_iter().min_by(|a, b| a.objective.total_cmp(&b.objective))
    }

    fn law(&self, parameters: &[f64]) -> Law {
        let effs = parameters[SHARED..].iter().map(|ln| ln.exp());
        let mut eff: BTreeMap<String, f64> = self.names.iter().cloned().zip(effs).collect();
        eff.insert(self.reference.clone(), 1.0);
        Law {
            a: parameters[0].exp(),
            alpha: parameters[1].exp(),
            b: parameters[2].exp(),
            beta: parameters[3].exp(),
            e: parameters[E],
            eff,
        }
    }

    fn precisions(&self, law: &Law) -> Vec<Precision> {
        let reference_bits = self.bits.get(&self.reference).copied().flatten();
        let precision = |(name, bits): (&String, &Option<f64>)| {
            let index = self.names.binary_search(name).ok();
            let eff = law.eff.get(name).copied().unwrap_or(f64::NAN);
            Precision {
                name: name.clone(),
                family: family(name).to_string(),
                bits: *bits,
                runs: self.samples.iter().filter(|s| s.precision == index).count(),
                eff,
                eff_per_bit: bits.zip(reference_bits).map(|(own, full)| eff * full / own),
            }
        };
        let mut precisions: Vec<Precision> = self.bits.iter().map(precision).collect();
        // A stable sort: what has the same bits stays in the order of names.
        precisions.sort_by(|a, b| {
            let rank = |p: &Precision| (p.name != self.reference, p.bits.unwrap_or(f64::INFINITY));
            let ((other_a, bits_a), (other_b, bits_b)) = (rank(a), rank(b));
            let families = other_a.cmp(&other_b).then_with(|| a.family.cmp(&b.family));
            families.then(bits_a.total_cmp(&bits_b))
        });
        precisions
    }

    /// Fits of resampled runs, each from the fit of all.
    fn intervals(&self, best: &[f64]) -> Option<Intervals> {
        let mut strata: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
        for (index, sample) in self.samples.iter().enumerate() {
            strata.entry(sample.precision).or_default().push(index);
        }
        // A seed for each resample, so that threads do not matter.
        let mut rng = SplitMix64::new(self.options.seed);
        let seeds: Vec<u64> = (0..self.options.bootstrap).map(|_| rng.next_u64()).collect();
        let start = [best.to_vec()];
        let resampled = |seed: &u64| {
            let mut rng = SplitMix64::new(*seed);
            let mut weights = vec![0.0; self.samples.len()];
            for runs in strata.values() {
                for _ in runs {
                    weights[runs[rng.below(runs.len())]] += 1.0;
                }
            }
            self.solve(&weights, &start).map(|solution| self.law(&solution.parameters))
        };
        let laws: Vec<Law> = seeds.par_iter().filter_map(resampled).collect();
        if laws.is_empty() {
            return None;
        }
        let of = |value: &dyn Fn(&Law) -> f64| interval(laws.iter().map(value).collect());
        let eff = self.names.iter().map(|name| (name.clone(), of(&|law| law.eff[name]))).collect();
        Some(Intervals {
            resamples: laws.len(),
            a: of(&|law| law.a),
            alpha: of(&|law| law.alpha),
            b: of(&|law| law.b),
            beta: of(&|law| law.beta),
            e: of(&|law| law.e),
            eff,
        })
    }
}

/// The name of the reference among `bits`' names.
fn reference(bits: &BTreeMap<String, Option<f64>>, asked: Option<&str>) -> Result<String> {
    let all = || bits.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    if let Some(name) = asked {
        return match bits.contains_key(name) {
            true => Ok(name.to_string()),
            false => Err(fail(format!("no run has precision {name:?}; there are {}", all()))),
        };
    }
    let full = bits.iter().filter(|(_, bits)| bits.is_some_and(|b| b >= 16.0));
    match full.map(|(name, _)| name).collect::<Vec<_>>()[..] {
        [one] => Ok(one.clone()),
        _ => Err(fail(format!(
            "not exactly one precision has 16 bits or more: name the reference; there are {}",
            all()
        ))),
    }
}

/// 2.5th and 97.5th percentile, linearly between neighbours.
fn interval(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_unstable_by(f64::total_cmp);
    [0.025, 0.975].map(|q| {
        let at = q * values.len().saturating_sub(1) as f64;
        let (low, high) = (values[at.floor() as usize], values[at.ceil() as usize]);
        low + (high - low) * at.fract()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exact runs of a known law.
    fn runs(e: f64) -> Vec<Run> {
        let eff = [("BF16", 1.0), ("W4A4", 0.7), ("W2A2", 0.15)];
        let eff = eff.map(|(name, eff)| (name.to_string(), eff)).into();
        let law = Law { a: 406.4, alpha: 0.34, b: 410.7, beta: 0.28, e, eff };
        let mut runs = Vec::new();
        for params in [3e7, 1e8, 3e8, 1e9] {
            for ratio in [20.0, 100.0] {
                for (name, bits) in [("BF16", 16.0), ("W4A4", 4.0), ("W2A2", 2.0)] {
                    let tokens = params * ratio;
                    let loss = law.predict(params, tokens, name).unwrap();
                    let precision = name.to_string();
                    runs.push(Run { params, tokens, precision, bits: Some(bits), loss });
                }
            }
        }
        runs
    }

    fn assert_constants(law: &Law, e: f64) {
        let pairs = [
            (law.a, 406.4),
            (law.alpha, 0.34),
            (law.b, 410.7),
            (law.beta, 0.28),
            (law.eff["W4A4"], 0.7),
            (law.eff["W2A2"], 0.15),
        ];
        for (found, expected) in pairs {
            approx::assert_relative_eq!(found, expected, max_relative = 1e-6);
        }
        approx::assert_relative_eq!(law.e, e, epsilon = 1e-7, max_relative = 1e-6);
    }

    #[test]
    fn known_constants_come_back() {
        for (e, irreducible) in [
            (1.69, Irreducible::NonNegative),
            (1.69, Irreducible::Free),
            (1.69, Irreducible::Fixed(1.69)),
            (-0.5, Irreducible::Free),
            (0.0, Irreducible::NonNegative),
        ] {
            for huber in [None, Some(1e-3)] {
                let options = FitOptions { irreducible, huber, ..FitOptions::default() };
                let found = fit(&runs(e), &options).unwrap();
                assert_constants(&found.law, e);
                assert!(found.max_residual < 1e-9, "{}", found.max_residual);
            }
        }
        let bound = fit(&runs(-0.5), &FitOptions::default()).unwrap();
        assert_eq!(bound.law.e, 0.0);
    }

    #[test]
    fn precisions_are_ordered_and_compared() {
        let found = fit(&runs(1.69), &FitOptions::default()).unwrap();
        let names: Vec<&str> = found.precisions.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["BF16", "W2A2", "W4A4"]);
        assert_eq!(found.precisions[0].eff_per_bit, Some(1.0));
        let value = found.precisions[2].eff_per_bit.unwrap();
        approx::assert_relative_eq!(value, 0.7 * 4.0, max_relative = 1e-6);
        assert_eq!(found.optima, BTreeMap::from([(String::new(), "W4A4".to_string())]));
        assert!(found.precisions.iter().all(|p| p.runs == 8));
        assert_eq!((family("QuEST W4A4"), family("4")), ("QuEST", ""));
    }

    #[test]
    fn intervals_hold_the_constants_and_depend_on_the_seed_alone() {
        let mut noisy = runs(1.69);
        let mut rng = SplitMix64::new(3);
        noisy.iter_mut().for_each(|run| run.loss *= 1.0 + 0.002 * rng.normal());
        let options = FitOptions { bootstrap: 60, seed: 1, ..FitOptions::default() };
        let found = fit(&noisy, &options).unwrap();
        assert_eq!(found, fit(&noisy, &options).unwrap());
        let intervals = found.intervals.unwrap();
        assert_eq!(intervals.resamples, 60);
        let other = fit(&noisy, &FitOptions { seed: 2, ..options }).unwrap();
        assert_ne!(Some(&intervals), other.intervals.as_ref());
        for (name, [low, high]) in &intervals.eff {
            let eff = found.law.eff[name];
            assert!(low < high && *low < eff && eff < *high, "{name}: {low} {eff} {high}");
        }
        assert_eq!(interval(vec![4.0, 1.0, 3.0, 2.0, 5.0]), [1.1, 4.9]);
    }

    #[test]
    fn what_cannot_be_fitted_is_said() {
        let all = runs(1.69);
        let plain = FitOptions::default();
        let refuse = |runs: &[Run], options: &FitOptions, word: &str| {
            let error = fit(runs, options).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refuse(&all[..6], &plain, "6 runs cannot give 7 constants");
        let one_size: Vec<Run> = all.iter().map(|r| Run { params: 1e8, ..r.clone() }).collect();
        refuse(&one_size, &plain, "same number of parameters");
        let one_budget: Vec<Run> = all.iter().map(|r| Run { tokens: 1e9, ..r.clone() }).collect();
        refuse(&one_budget, &plain, "same number of tokens");
        let mut broken = all.clone();
        broken[4].loss = f64::NAN;
        refuse(&broken, &plain, "run 5");
        let mut mixed = all.clone();
        mixed[4].bits = None;
        refuse(&mixed, &plain, "same bits");
        let other = FitOptions { reference: Some("W8".into()), ..plain.clone() };
        refuse(&all, &other, "BF16, W2A2, W4A4");
        let unknown: Vec<Run> = all.iter().map(|r| Run { bits: None, ..r.clone() }).collect();
        refuse(&unknown, &plain, "name the reference");
        let high = FitOptions { irreducible: Irreducible::Fixed(9.0), ..plain.clone() };
        refuse(&all, &high, "E cannot be 9");
        let huber = FitOptions { huber: Some(0.0), ..plain.clone() };
        refuse(&all, &huber, "Huber");
        refuse(&[], &plain, "reference");
        // Without bits the law stands, and nothing is said of their worth.
        let named = FitOptions { reference: Some("BF16".into()), ..plain };
        let found = fit(&unknown, &named).unwrap();
        assert_constants(&found.law, 1.69);
        assert!(found.optima.is_empty());
    }
}
