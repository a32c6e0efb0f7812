//! One block on the tape with its transforms and quantizers, and what is left of them afterwards.

use std::collections::BTreeMap;

use anybit_core::{GridSpec, Matrix, Site, Transform};
use anybit_grad::{BlockShape, BlockVars, FakeQuant, Tape, Tensor, TrainBlock, Var};

use super::parameters::Parameters;
use crate::Recipe;
use crate::activations::UNQUANTIZED;
use crate::transforms::{FittedSite, TransformedBlock};

/// Bits and grids that the fit of a block is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Bits {
    /// Grids of the linears that are rounded, by name below `model.layers.N.`.
    pub weights: BTreeMap<&'static str, GridSpec>,
    /// Bits of what flows at the sites that have a quantizer.
    pub sites: BTreeMap<Site, u8>,
    /// Symmetric grids of the inputs of linears.
    pub activations_symmetric: bool,
}

impl Bits {
    /// Those of a recipe in block `layer`; fractions are rounded.
    pub fn of(recipe: &Recipe, layer: usize) -> Self {
        let linears = Site::INPUTS.into_iter().flat_map(Site::linears);
        let grid = |linear: &&'static str| {
            let settings = recipe.settings(&format!("model.layers.{layer}.{linear}"))?;
            Some((*linear, settings.grid))
        };
        let sites = Site::ALL.into_iter().map(|site| (site, recipe.site_bits(layer, site)));
        Self {
            weights: linears.filter_map(grid).collect(),
            sites: sites.filter(|(_, bits)| *bits != UNQUANTIZED).collect(),
            activations_symmetric: recipe.a_symmetric.unwrap_or(true),
        }
    }

    /// Whether something between the transform of a site and its inverse is quantized: its flow, or
    /// the weights behind it.
    pub fn at(&self, site: Site) -> bool {
        let behind = site.linears().iter().any(|linear| self.weights.contains_key(linear));
        behind || self.sites.contains_key(&site)
    }

    /// Whether nothing is quantized.
    pub fn nothing(&self) -> bool {
        self.weights.is_empty() && self.sites.is_empty()
    }
}

/// `P` and `P⁻ᵀ` of one side of a site.
type Factor = (Var, Var);

/// The parameters of a block on a tape, and what is made of them.
pub struct Recorded<'a> {
    /// The trained leaves, in the order of [`Parameters::values`].
    pub leaves: Vec<(String, Var)>,
    /// The loss.
    pub loss: Var,
    vars: BTreeMap<String, Var>,
    factors: BTreeMap<String, Factor>,
    sizes: BTreeMap<Site, (usize, usize)>,
    original: BlockVars,
    shape: &'a BlockShape,
    bits: &'a Bits,
}

impl<'a> Recorded<'a> {
    /// Puts the parameters on `tape` and makes the factors.
    pub fn new(
        tape: &mut Tape,
        parameters: &Parameters,
        original: &TrainBlock,
        shape: &'a BlockShape,
        bits: &'a Bits,
    ) -> Self {
        let leaf =
            |(name, value): (&String, &Tensor)| (name.clone(), tape.leaf(value.clone(), true));
        let leaves: Vec<(String, Var)> = parameters.values.iter().map(leaf).collect();
        let vars: BTreeMap<String, Var> = leaves.iter().cloned().collect();
        let mut factors = BTreeMap::new();
        for (name, base) in &parameters.bases {
            let base = tape.constant(Tensor::from(base.clone()));
            let part = |part: &str| vars[&format!("{name}.{part}")];
            let (u, v) = (tape.cayley(part("u")), tape.cayley(part("v")));
            let mut side = |reciprocal: bool| {
                let scaled = tape.scale_columns(u, part("sigma"), reciprocal);
                let rotated = tape.linear(scaled, v, None);
                tape.matmul(rotated, base)
            };
            factors.insert(name.clone(), (side(false), side(true)));
        }
        let original = original.vars(tape, &|_| false);
        let loss = tape.constant(Tensor::scalar(0.0));
        let sizes = parameters.sizes.clone();
        Self { leaves, loss, vars, factors, sizes, original, shape, bits }
    }

    fn factor(&self, site: Site, side: &str) -> Option<Factor> {
        self.factors.get(&format!("{}.{side}", site.name())).copied()
    }

    fn channel_factors(&self, site: Site) -> Option<Var> {
        self.vars.get(&format!("{}.factors", site.name())).copied()
    }

    /// `x → (x ∘ c) P` at a site, or `w → (w ∘ 1/c) P⁻ᵀ` for the weights behind it.
    fn transform(&self, tape: &mut Tape, site: Site, x: Var, weight: bool) -> Var {
        let x = match self.channel_factors(site) {
            Some(factors) => tape.scale_columns(x, factors, weight),
            None => x,
        };
        let pick = |f: Factor| if weight { f.1 } else { f.0 };
        let left = self.factor(site, "left").map(pick);
        let mut right = self.factor(site, "right").map(pick);
        if weight && site == Site::AttnOutput {
            // Values come in their own basis.
            right = self.factor(Site::Value, "right").map(pick);
        }
        // Without a transform of its own the output still comes in the basis of the values.
        let heads = (self.shape.heads, self.shape.head_dim);
        let output = (site == Site::AttnOutput).then_some(heads);
        match self.sizes.get(&site).copied().or(output) {
            Some(sizes) if left.is_some() || right.is_some() => {
                tape.kronecker(x, left, right, sizes)
            }
            _ => x,
        }
    }

    /// What flows on at a site: transformed and on its grid.
    pub fn at(&self, tape: &mut Tape, site: Site, x: Var) -> Var {
        let (heads, kv_heads, hd) = (self.shape.heads, self.shape.kv_heads, self.shape.head_dim);
        let right = self.factor(Site::Key, "right");
        match site {
            Site::Query => {
                right.map_or(x, |(_, inverse)| tape.kronecker(x, None, Some(inverse), (heads, hd)))
            }
            Site::Key => {
                let x =
                    right.map_or(x, |(key, _)| tape.kronecker(x, None, Some(key), (kv_heads, hd)));
                self.on_grid(tape, site, x, vec![hd; kv_heads])
            }
            Site::Value => self.on_grid(tape, site, x, vec![hd; kv_heads]),
            _ => {
                let x = self.transform(tape, site, x, false);
                let cols = tape.dims(x).1;
                self.on_grid(tape, site, x, vec![cols])
            }
        }
    }

    fn on_grid(&self, tape: &mut Tape, site: Site, x: Var, cols: Vec<usize>) -> Var {
        let Some(&bits) = self.bits.sites.get(&site) else { return x };
        let cache = matches!(site, Site::Key | Site::Value);
        let clip = self.vars.get(&format!("{}.clip", site.name())).copied();
        let grid = FakeQuant {
            segments: cols.into_iter().map(|cols| (cols, bits)).collect(),
            symmetric: !cache && self.bits.activations_symmetric,
            weight: false,
        };
        tape.fake_quant(x, clip, &grid)
    }

    /// The weights in the bases of their inputs and outputs, and biases, by parameter name.
    fn transformed_weights(&self, tape: &mut Tape) -> BTreeMap<String, Var> {
        let mut all = BTreeMap::new();
        let (kv_heads, hd) = (self.shape.kv_heads, self.shape.head_dim);
        for site in [Site::AttnInput, Site::AttnOutput, Site::MlpInput, Site::DownInput] {
            for linear in site.linears() {
                let name = format!("{linear}.weight");
                let Some(weight) = self.original.get(&name) else { continue };
                let weight = self.transform(tape, site, weight, true);
                all.insert(name, weight);
            }
        }
        if let Some((value, _)) = self.factor(Site::Value, "right") {
            // W_v[j] ← P_vᵀ W_v[j]: the left product of every head's rows.
            let name = "self_attn.v_proj.weight".to_string();
            let weight = all[&name];
            let (rows, cols) = tape.dims(weight);
            let heads = tape.reshape(weight, [kv_heads, hd * cols]);
            let turned = tape.kronecker(heads, Some(value), None, (hd, cols));
            let weight = tape.reshape(turned, [rows, cols]);
            all.insert(name, weight);
            let name = "self_attn.v_proj.bias".to_string();
            if let Some(bias) = self.original.get(&name) {
                let heads = tape.reshape(bias, [kv_heads, hd]);
                let turned = tape.kronecker(heads, None, Some(value), (1, hd));
                let bias = tape.reshape(turned, [kv_heads * hd]);
                all.insert(name, bias);
            }
        }
        all
    }

    /// The block's parameters with every weight transformed and on its grid.
    pub fn quantized_weights(&self, tape: &mut Tape) -> BlockVars {
        let mut vars = self.original.clone();
        for (name, weight) in self.transformed_weights(tape) {
            let linear = name.strip_suffix(".weight").unwrap_or_default();
            let weight = match self.bits.weights.get(linear) {
                None => weight,
                Some(spec) => {
                    let clip = self.vars.get(&format!("{linear}.clip")).copied();
                    let cols = tape.dims(weight).1;
                    let group = spec.group_len(cols);
                    let lens = (0..cols).step_by(group).map(|start| group.min(cols - start));
                    let grid = FakeQuant {
                        segments: lens.map(|len| (len, spec.bits())).collect(),
                        symmetric: !matches!(spec, GridSpec::Uniform { symmetric: false, .. }),
                        weight: true,
                    };
                    tape.fake_quant(weight, clip, &grid)
                }
            };
            vars.set(&name, weight);
        }
        vars
    }

    /// The transformed block, unrounded: factors of channels folded into norms and the rows of up.
    ///
    /// # Errors
    /// A value that is not finite.
    pub fn materialize(
        &mut self,
        tape: &mut Tape,
        parameters: &Parameters,
        original: &TrainBlock,
    ) -> Result<TransformedBlock, String> {
        let mut tensors = original.params.clone();
        for (name, var) in self.transformed_weights(tape) {
            let value = tape.value(var).clone();
            if value.data().iter().any(|v| !v.is_finite()) {
                return Err(format!("{name} is not finite: lower transform.lr"));
            }
            tensors.insert(name, value);
        }
        let norms = [
            (Site::AttnInput, "input_layernorm.weight"),
            (Site::MlpInput, "post_attention_layernorm.weight"),
        ];
        for (site, norm) in norms {
            if let (Some(c), Some(gamma)) = (self.channel_factors(site), tensors.get_mut(norm)) {
                let pairs = gamma.data_mut().iter_mut().zip(tape.data(c));
                pairs.for_each(|(gamma, c)| *gamma *= c);
            }
        }
        if let Some(c) = self.channel_factors(Site::DownInput) {
            let factors = tape.data(c);
            for name in ["mlp.up_proj.weight", "mlp.up_proj.bias"] {
                let Some(up) = tensors.get_mut(name) else { continue };
                let cols = up.len() / factors.len();
                let rows = up.data_mut().chunks_exact_mut(cols).zip(factors);
                rows.for_each(|(row, c)| row.iter_mut().for_each(|w| *w *= c));
            }
        }
        let sigmoid = |x: &f32| 1.0 / (1.0 + (-x).exp());
        let mut sites = BTreeMap::new();
        for site in Site::ALL {
            let clip = parameters.values.get(&format!("{}.clip", site.name()));
            let clip = clip.map(|c| (sigmoid(&c.data()[0]), sigmoid(&c.data()[1])));
            let transform = self.online(tape, site);
            if transform.is_some() || clip.is_some() {
                sites.insert(site, FittedSite { transform, clip, high: 0 });
            }
        }
        let mut clips = BTreeMap::new();
        for (name, value) in &parameters.values {
            if let Some(linear) = name.strip_suffix(".clip").filter(|l| l.ends_with("_proj")) {
                let data = value.data().iter().map(sigmoid).collect();
                clips.insert(linear.to_string(), Matrix { rows: value.len() / 2, cols: 2, data });
            }
        }
        Ok(TransformedBlock { tensors, sites, clips })
    }

    /// What is applied at run time.
    fn online(&self, tape: &Tape, site: Site) -> Option<Transform> {
        let matrix = |var: Var| {
            let (rows, cols) = tape.dims(var);
            Matrix { rows, cols, data: tape.data(var).to_vec() }
        };
        match site {
            Site::Value => None,
            Site::Query => Some(Transform::dense(matrix(self.factor(Site::Key, "right")?.1))),
            Site::Key => Some(Transform::dense(matrix(self.factor(Site::Key, "right")?.0))),
            _ => {
                let sizes = *self.sizes.get(&site)?;
                let side = |side| self.factor(site, side).map(|(p, _)| matrix(p));
                let (left, right) = (side("left"), side("right"));
                Some(Transform::Kronecker { sizes, left, right })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_has_the_bits_that_the_recipe_gives_each_place() {
        let mut recipe = Recipe { a_bits: Some(4), kv_bits: Some(3), ..Default::default() };
        recipe.skip = vec!["model.layers.1.*".into()];
        recipe.add_layer("*.down_proj=bits:6,group_size:-1,symmetric:false").unwrap();
        recipe.add_site("model.layers.1.*=16").unwrap();
        recipe.add_site("*.down_input=8").unwrap();
        let (first, second) = (Bits::of(&recipe, 0), Bits::of(&recipe, 1));
        assert_eq!(first.weights["mlp.down_proj"], GridSpec::affine(6, false, None));
        assert_eq!(first.weights["mlp.up_proj"], GridSpec::affine(4, true, Some(128)));
        assert_eq!(first.sites[&Site::DownInput], 8);
        assert_eq!((first.sites[&Site::AttnInput], first.sites[&Site::Value]), (4, 3));
        // In the second block only the cache is quantized.
        assert!(second.weights.is_empty() && !second.at(Site::DownInput));
        assert_eq!(
            second.sites.into_iter().collect::<Vec<_>>(),
            [(Site::Key, 3), (Site::Value, 3)]
        );
    }
}
