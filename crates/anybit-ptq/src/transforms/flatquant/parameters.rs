//! What FlatQuant trains in one block, by name, and where it starts.
//!
//! | name | shape | start |
//! |---|---|---|
//! | `SITE.left.u`, `.v`; `SITE.right.u`, `.v` | `[s, s]`, strict lower triangle | 0 |
//! | `SITE.left.sigma`, `SITE.right.sigma` | `[s]` | 1 |
//! | `SITE.factors` | channels | `max|W|^0.7 / max|X|^0.3` |
//! | `SITE.clip` | logits of the largest and smallest activation | by bits |
//! | `LINEAR.clip` | the same for each row of a weight | by bits |

use std::collections::BTreeMap;

use anybit_core::rng::SplitMix64;
use anybit_core::transform::kronecker_sizes;
use anybit_core::{Matrix, Site, hadamard};
use anybit_grad::{Tensor, TrainBlock};
use anybit_io::ModelConfig;

use super::block::Bits;
use super::{Effort, Options};
use crate::transforms::resq::random_orthogonal;
use crate::transforms::scale::{InputMaxima, weight_maxima};

/// How much of a channel's size the factors at the start take from activations (the reference's
/// `diag_alpha`).
const ALPHA: f32 = 0.3;
/// Least magnitude of a singular value: nothing else keeps it from zero.
const LEAST_SIGMA: f32 = 1e-3;

/// The parameters of one block.
#[derive(Debug, Clone)]
pub struct Parameters {
    /// Their values.
    pub values: BTreeMap<String, Tensor>,
    /// `B` of each factor, by `SITE.SIDE`.
    pub bases: BTreeMap<String, Matrix>,
    /// Sizes of the Kronecker factors of a site.
    pub sizes: BTreeMap<Site, (usize, usize)>,
}

impl Parameters {
    /// Where training starts.
    pub fn start(
        config: &ModelConfig,
        block: &TrainBlock,
        maxima: &InputMaxima,
        options: &Options,
        bits: &Bits,
    ) -> Self {
        let mut all =
            Self { values: BTreeMap::new(), bases: BTreeMap::new(), sizes: BTreeMap::new() };
        let paper = options.effort == Effort::Paper;
        let heads = (config.num_heads, config.head_dim);
        // Where nothing is quantized a transform would only cost time.
        for site in Site::INPUTS.into_iter().filter(|site| bits.at(*site)) {
            let sizes = kronecker_sizes(config.site_size(site));
            match site {
                Site::AttnOutput => all.site(site, heads, (true, false), paper),
                Site::DownInput if !options.down => {}
                _ => all.site(site, sizes, (true, true), paper),
            }
            if options.diagonal && site != Site::AttnOutput {
                all.factors(site, block, maxima);
            }
        }
        all.site(Site::Value, (1, config.head_dim), (false, true), paper);
        if bits.at(Site::Key) {
            all.site(Site::Key, (1, config.head_dim), (false, true), paper);
        }
        if options.clips {
            all.clips(config, bits, paper);
        }
        all
    }

    /// The same without the transform of `site`.
    pub fn without(&self, site: Site) -> Self {
        let mut rest = self.clone();
        let sides = ["left", "right"].map(|side| format!("{}.{side}", site.name()));
        rest.values.retain(|name, _| !sides.iter().any(|s| name.starts_with(s.as_str())));
        rest.bases.retain(|name, _| !sides.contains(name));
        rest.sizes.remove(&site);
        rest
    }

    fn site(&mut self, site: Site, sizes: (usize, usize), sides: (bool, bool), paper: bool) {
        self.sizes.insert(site, sizes);
        for (present, side, n) in [(sides.0, "left", sizes.0), (sides.1, "right", sizes.1)] {
            if !present {
                continue;
            }
            let name = format!("{}.{side}", site.name());
            for (part, seed) in [("u", 1), ("v", 2)] {
                let value = match paper {
                    true => haar(n, seed + 2 * site as u64 + 16 * (side == "left") as u64),
                    false => vec![0.0; n * n],
                };
                self.values.insert(format!("{name}.{part}"), Tensor::new([n, n], value));
            }
            self.values.insert(format!("{name}.sigma"), Tensor::new([n], vec![1.0; n]));
            self.bases.insert(name, if paper { identity(n) } else { base(n) });
        }
    }

    fn factors(&mut self, site: Site, block: &TrainBlock, maxima: &InputMaxima) {
        let (Some(inputs), weights) = (maxima.of.get(&site), weight_maxima(&block.params, site))
        else {
            return;
        };
        let factor = |(x, w): (&f32, &f32)| (w.powf(1.0 - ALPHA) / x.powf(ALPHA)).max(1e-5);
        let factors: Vec<f32> = inputs.iter().zip(&weights).map(factor).collect();
        let name = format!("{}.factors", site.name());
        self.values.insert(name, Tensor::new([factors.len()], factors));
    }

    fn clips(&mut self, config: &ModelConfig, bits: &Bits, paper: bool) {
        let start = |bits: u8, low: f32| match bits {
            _ if paper => 4.0,
            0..=4 => low,
            5..=6 => low + 1.5,
            _ => 4.0,
        };
        for (site, &bits) in &bits.sites {
            let clip = Tensor::new([2], vec![start(bits, 1.0); 2]);
            self.values.insert(format!("{}.clip", site.name()), clip);
        }
        for (linear, rows, _) in config.block_linears() {
            let Some(grid) = bits.weights.get(linear).filter(|grid| grid.bits() > 1) else {
                continue;
            };
            let logits = vec![start(grid.bits(), 2.0); 2 * rows];
            self.values.insert(format!("{linear}.clip"), Tensor::new([rows, 2], logits));
        }
    }

    /// Fails when a transform is about to become singular.
    ///
    /// # Errors
    /// The factor, by its name.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in &self.values {
            let singular = name.ends_with(".sigma") || name.ends_with(".factors");
            let bad = |v: &f32| !v.is_finite() || (singular && v.abs() < LEAST_SIGMA * 1e-2);
            if let Some(at) = value.data().iter().position(bad) {
                let found = value.data()[at];
                return Err(format!(
                    "{name} became singular (value {at} is {found:e}): lower transform.lr"
                ));
            }
        }
        Ok(())
    }
}

/// A Hadamard matrix where there is one, else the cosine transform; orthogonal.
fn base(n: usize) -> Matrix {
    if let Some(signs) = hadamard::signs(n) {
        let root = (n as f32).sqrt();
        let data = signs.iter().map(|s| *s as f32 / root).collect();
        return Matrix { rows: n, cols: n, data };
    }
    let mut cosine = Matrix::zeros(n, n);
    for (i, row) in cosine.data.chunks_exact_mut(n).enumerate() {
        let norm = (if i == 0 { 1.0 } else { 2.0 } / n as f64).sqrt();
        for (j, value) in row.iter_mut().enumerate() {
            let angle = std::f64::consts::PI * (j as f64 + 0.5) * i as f64 / n as f64;
            *value = (norm * angle.cos()) as f32;
        }
    }
    cosine
}

fn identity(n: usize) -> Matrix {
    let mut m = Matrix::zeros(n, n);
    (0..n).for_each(|i| m.data[i * n + i] = 1.0);
    m
}

/// A random orthogonal matrix, of which the Cayley map takes the lower triangle: the reference's
/// start.
fn haar(n: usize, seed: u64) -> Vec<f32> {
    let q = random_orthogonal(n, &mut SplitMix64::new(seed));
    (0..n * n).map(|at| q[(at / n, at % n)] as f32).collect()
}
