//! [`Recipe`]: the declarative whole of a quantization. A command-line flag is the same thing as a
//! key here, and the resolved recipe is stored in the output.
//!
//! ```toml
//! method = "gptq"
//! bits = 4
//! group_size = 128
//!
//! [calibration]
//! data = ["my-text.txt"]
//! tokens = 65536
//!
//! [layers."*.down_proj"]
//! bits = 6
//! ```

mod validate;

use std::collections::BTreeMap;
use std::path::Path;

use anybit_core::{GridSpec, ScaleFit, Site};
use anybit_io::{nearest_name, size};
use serde::{Deserialize, Serialize};

use crate::activations::UNQUANTIZED;
use crate::transforms::{self, ActivationDefaults, Transformer};
use crate::{PtqError, Result, methods};

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// Name of the method: one of [`methods::names`], or a transform, which stands for itself with
    /// weights, activations and cache at 4 bits and weights rounded by GPTQ.
    pub method: String,
    /// Name of the transform before rounding: one of [`transforms::names`], or `none`.
    #[serde(skip_serializing_if = "is_none")]
    pub transform: String,
    /// Bits of a weight, 1 to 8; a fraction for methods that allocate rows; 16 leaves weights as
    /// they are.
    pub bits: f64,
    /// Bits of the inputs of linears, 2 to 8; 16 leaves them as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a_bits: Option<u8>,
    /// Bits of keys and values in the cache, 2 to 8; 16 leaves them as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_bits: Option<u8>,
    /// Bits of the channels that a transform gathers most of the energy in.
    #[serde(skip_serializing_if = "is_eight")]
    pub high_bits: u8,
    /// Symmetric grids for the inputs of linears; the transform's own way when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a_symmetric: Option<bool>,
    /// Factor of the range of the inputs of linears; the transform's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub a_clip: Option<f32>,
    /// Factor of the range of keys and values; the transform's own when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_clip: Option<f32>,
    /// Bits of the inputs at some sites, by pattern of their names (`*.down_input`).
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub sites: BTreeMap<String, u8>,
    /// What `bits` counts.
    #[serde(skip_serializing_if = "Count::is_codes")]
    pub count: Count,
    /// Most bytes of the weight files, everything in them counted, as a number or a text such as
    /// `"60MiB"`; in the place of `bits`.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "size::deserialize")]
    pub max_bytes: Option<u64>,
    /// Columns that share a scale, a multiple of 8; −1 for the whole row. 128 when absent, the
    /// whole row where activations are quantized too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<i64>,
    /// Symmetric grids; asymmetric ones store a zero point per group.
    pub symmetric: bool,
    /// How a group's scale is fitted: min-max when absent, by search behind a transform that has no
    /// clips of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<ScaleFit>,
    /// GPTQ: round columns in order of falling activation energy. On by default: groups are
    /// static, so it costs nothing at run time.
    pub act_order: bool,
    /// GPTQ: damping as a fraction of the mean diagonal of the Gram matrix.
    pub damp: f64,
    /// Bits of the embedding; none leaves it as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embed_bits: Option<u8>,
    /// Bits of an untied head; none leaves it as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub head_bits: Option<u8>,
    /// Linears to leave unquantized, by pattern (`*` matches anything).
    pub skip: Vec<String>,
    /// Seed of everything random.
    pub seed: u64,
    /// What is observed.
    pub calibration: CalibrationRecipe,
    /// Options of the method, by name.
    #[serde(skip_serializing_if = "toml::Table::is_empty")]
    pub options: toml::Table,
    /// Options of the transform, by name.
    #[serde(skip_serializing_if = "toml::Table::is_empty")]
    pub transform_options: toml::Table,
    /// Settings of some linears, by pattern; later patterns (in alphabetical order) win.
    pub layers: BTreeMap<String, LayerOverride>,
}

fn is_none(transform: &String) -> bool {
    transform == transforms::NONE
}

fn is_eight(bits: &u8) -> bool {
    *bits == 8
}

/// What `bits` counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Count {
    /// Bits of codes: what papers quote.
    #[default]
    Codes,
    /// Everything that is stored for the linears of the blocks.
    Total,
}

impl Count {
    fn is_codes(&self) -> bool {
        *self == Self::Codes
    }
}

/// What is observed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CalibrationRecipe {
    /// Text files, or names of texts: see [`crate::CalibrationText::load`].
    pub data: Vec<String>,
    /// Tokens, rounded up to whole sequences.
    pub tokens: usize,
    /// Tokens of a sequence.
    pub seqlen: usize,
    /// Tokens that gradients are taken on, for methods that need them: the first sequences.
    pub gradient_tokens: usize,
}

/// Settings of some linears; what is absent comes from the recipe.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerOverride {
    /// Bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u8>,
    /// Group size; −1 for the whole row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<i64>,
    /// Symmetric grid.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<bool>,
}

/// The settings of one linear.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearSettings {
    /// Its grid.
    pub grid: GridSpec,
    /// How scales are fitted.
    pub scale: ScaleFit,
    /// GPTQ's column order.
    pub act_order: bool,
    /// GPTQ's damping.
    pub damp: f64,
    /// The last columns that have a grid of their own: how many, and their bits.
    pub tier: Option<(usize, u8)>,
}

impl LinearSettings {
    /// Grids of the column tiers of rows of `cols`, with their columns. A tier that is narrower than
    /// a group of the row is one group.
    pub fn tiers(&self, cols: usize) -> Vec<(GridSpec, usize)> {
        let Some((high, bits)) = self.tier else { return vec![(self.grid, cols)] };
        let tier = |grid: GridSpec, own: usize| match grid.group_size() {
            Some(group) if group > own && group <= cols => (grid.ungrouped(), own),
            _ => (grid, own),
        };
        vec![tier(self.grid, cols - high), tier(self.grid.with_bits(bits), high)]
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            method: "gptq".into(),
            transform: transforms::NONE.into(),
            bits: 4.0,
            a_bits: None,
            kv_bits: None,
            high_bits: 8,
            a_symmetric: None,
            a_clip: None,
            kv_clip: None,
            sites: BTreeMap::new(),
            count: Count::Codes,
            max_bytes: None,
            group_size: None,
            symmetric: true,
            scale: None,
            act_order: true,
            damp: 0.01,
            embed_bits: None,
            head_bits: None,
            skip: Vec::new(),
            seed: 0,
            calibration: CalibrationRecipe::default(),
            options: toml::Table::new(),
            transform_options: toml::Table::new(),
            layers: BTreeMap::new(),
        }
    }
}

impl Default for CalibrationRecipe {
    fn default() -> Self {
        let data = vec!["builtin".into()];
        Self { data, tokens: 128 * 512, seqlen: 512, gradient_tokens: 100 * 512 }
    }
}

impl Recipe {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// Broken TOML, an unknown key (with its line and the nearest name), a value out of range.
    pub fn read(path: &Path) -> Result<Self> {
        let recipe = Self::parse(path)?;
        recipe.validate()?;
        Ok(recipe)
    }

    /// [`Self::read`] for a recipe that is not whole yet: other settings will be put over it.
    ///
    /// # Errors
    /// Broken TOML, an unknown key.
    pub fn parse(path: &Path) -> Result<Self> {
        let fail = |what: String| PtqError::RecipeFile { path: path.to_owned(), what };
        let text = std::fs::read_to_string(path).map_err(|e| fail(e.to_string()))?;
        toml::from_str(&text).map_err(|e| fail(with_nearest(&e.to_string())))
    }

    /// The transform that the method's name stands for.
    fn preset(&self) -> Option<&'static dyn transforms::TransformMethod> {
        transforms::find(&self.method)
    }

    /// The method with its options.
    ///
    /// # Errors
    /// An unknown method, or a setting or option that it cannot use.
    pub fn rounding(&self) -> Result<Box<dyn methods::Rounding>> {
        let weights = self.bits != UNQUANTIZED as f64;
        let name = match self.preset() {
            _ if !weights => "rtn",
            Some(_) => "gptq",
            None => &self.method,
        };
        let method = methods::find(name)
            .ok_or_else(|| PtqError::Recipe(format!("unknown method {}", self.method)))?;
        method.build(self).map_err(PtqError::Recipe)
    }

    /// The transform with its options; none when there is none.
    ///
    /// # Errors
    /// An unknown transform, or a setting or option that it cannot use.
    pub fn transformer(&self) -> Result<Option<Box<dyn Transformer>>> {
        let method = self.preset().or_else(|| transforms::find(&self.transform));
        method.map(|m| m.build(self).map_err(PtqError::Recipe)).transpose()
    }

    /// The recipe with everything filled in that methods, transforms and presets imply.
    ///
    /// # Errors
    /// As [`Self::rounding`] and [`Self::transformer`].
    pub fn resolved(&self) -> Result<Self> {
        let mut recipe = self.clone();
        let transformer = self.transformer()?;
        let default_bits = if self.preset().is_some() { 4 } else { UNQUANTIZED };
        recipe.a_bits = Some(self.a_bits.unwrap_or(default_bits));
        recipe.kv_bits = Some(self.kv_bits.unwrap_or(default_bits));
        let quantizes = recipe.a_bits != Some(UNQUANTIZED) || !self.sites.is_empty();
        let group = if quantizes { -1 } else { 128 };
        recipe.group_size = Some(self.group_size.unwrap_or(group));
        let defaults =
            transformer.as_ref().map_or(ActivationDefaults::default(), |t| t.activations());
        recipe.scale = Some(self.scale.unwrap_or(defaults.scale));
        if quantizes {
            recipe.a_symmetric = Some(self.a_symmetric.unwrap_or(defaults.symmetric));
            recipe.a_clip = Some(self.a_clip.unwrap_or(defaults.clip));
        }
        if recipe.kv_bits != Some(UNQUANTIZED) {
            recipe.kv_clip = Some(self.kv_clip.unwrap_or(defaults.kv_clip));
        }
        if let Some(transformer) = transformer {
            recipe.transform_options = transformer.options();
        }
        recipe.options = self.rounding()?.options();
        if self.preset().is_some() {
            recipe.transform.clone_from(&self.method);
            recipe.method = "gptq".into();
        }
        if self.bits == UNQUANTIZED as f64 {
            recipe.method = "rtn".into();
        }
        Ok(recipe)
    }

    /// Bits of the cache.
    pub fn kv_bits(&self) -> u8 {
        self.kv_bits.unwrap_or(UNQUANTIZED)
    }

    /// Bits of what flows at `site` of block `layer`: of an input, its own or those of all; of keys
    /// and values, those of the cache. [`UNQUANTIZED`] where there is no quantizer.
    pub fn site_bits(&self, layer: usize, site: Site) -> u8 {
        match site {
            Site::Query => UNQUANTIZED,
            Site::Key | Site::Value => self.kv_bits(),
            _ => {
                let name = site.full_name(layer);
                let own = self.sites.iter().rfind(|(pattern, _)| matches(pattern, &name));
                own.map(|(_, bits)| *bits).or(self.a_bits).unwrap_or(UNQUANTIZED)
            }
        }
    }

    /// Parses `KEY=VALUE` of `--set` into the method's options, `transform.KEY=VALUE` into those of
    /// the transform.
    ///
    /// # Errors
    /// No `=`, or a value that is no TOML value.
    pub fn add_option(&mut self, text: &str) -> Result<()> {
        let fail = |what: String| Err(PtqError::Recipe(format!("--set {text}: {what}")));
        let Some((key, value)) = text.split_once('=') else {
            return fail("expected KEY=VALUE".into());
        };
        // A bare word is a name.
        let parsed = value.parse::<toml::Value>();
        let value = parsed.unwrap_or_else(|_| toml::Value::String(value.into()));
        match key.trim().strip_prefix("transform.") {
            Some(key) => self.transform_options.insert(key.to_string(), value),
            None => self.options.insert(key.trim().to_string(), value),
        };
        Ok(())
    }

    /// The recipe as it is published: texts by the names of their files, since their folders say
    /// more about a machine than about a model.
    pub fn published(&self) -> Self {
        let mut recipe = self.clone();
        for data in &mut recipe.calibration.data {
            if let Some(name) = Path::new(data.as_str()).file_name() {
                *data = name.to_string_lossy().into_owned();
            }
        }
        recipe
    }

    /// Settings of the linear `name` (without `.weight`), or `None` when it is skipped.
    pub fn settings(&self, name: &str) -> Option<LinearSettings> {
        let own = self.layers.iter().any(|(p, o)| o.bits.is_some() && matches(p, name));
        let unquantized = self.bits == UNQUANTIZED as f64 && !own;
        if unquantized || self.skip.iter().any(|p| matches(p, name)) {
            return None;
        }
        let (mut bits, mut group, mut symmetric) =
            (self.bits.round() as u8, self.group(), self.symmetric);
        for (_, o) in self.layers.iter().filter(|(p, _)| matches(p, name)) {
            bits = o.bits.unwrap_or(bits);
            group = o.group_size.unwrap_or(group);
            symmetric = o.symmetric.unwrap_or(symmetric);
        }
        Some(self.with_grid(bits, group, symmetric))
    }

    /// Settings of embedding or head at `bits`.
    pub fn settings_at(&self, bits: u8) -> LinearSettings {
        self.with_grid(bits, self.group(), self.symmetric)
    }

    fn with_grid(&self, bits: u8, group: i64, symmetric: bool) -> LinearSettings {
        let group = usize::try_from(group).ok();
        LinearSettings {
            grid: GridSpec::affine(bits, symmetric, group),
            scale: self.scale.unwrap_or_default(),
            act_order: self.act_order,
            damp: self.damp,
            tier: None,
        }
    }

    /// Columns that share a scale; −1 for the whole row.
    pub fn group(&self) -> i64 {
        self.group_size.unwrap_or(128)
    }

    /// Parses `PATTERN=BITS` of `--site`.
    ///
    /// # Errors
    /// Anything else.
    pub fn add_site(&mut self, text: &str) -> Result<()> {
        let parsed = text.split_once('=').and_then(|(p, b)| Some((p, b.trim().parse().ok()?)));
        let Some((pattern, bits)) = parsed else {
            return Err(PtqError::Recipe(format!("--site {text}: expected PATTERN=BITS")));
        };
        self.sites.insert(pattern.to_string(), bits);
        Ok(())
    }

    /// Parses `PATTERN=bits:3,group_size:64,symmetric:false` of `--layer`.
    ///
    /// # Errors
    /// Anything else, with what is expected.
    pub fn add_layer(&mut self, text: &str) -> Result<()> {
        let fail = |what: String| {
            let form = "expected PATTERN=bits:N[,group_size:N][,symmetric:true|false]";
            Err(PtqError::Recipe(format!("--layer {text}: {what}; {form}")))
        };
        let Some((pattern, settings)) = text.split_once('=') else { return fail("no =".into()) };
        let entry = self.layers.entry(pattern.to_string()).or_default();
        for setting in settings.split(',') {
            let (key, value) = setting.split_once(':').unwrap_or((setting, ""));
            let parsed = match key.trim() {
                "bits" => value.trim().parse().map(|v| entry.bits = Some(v)).is_ok(),
                "group_size" => value.trim().parse().map(|v| entry.group_size = Some(v)).is_ok(),
                "symmetric" => value.trim().parse().map(|v| entry.symmetric = Some(v)).is_ok(),
                other => {
                    let keys = ["bits", "group_size", "symmetric"];
                    return fail(format!(
                        "unknown key {other:?}{}",
                        nearest_name(other, keys.into_iter())
                    ));
                }
            };
            if !parsed {
                return fail(format!("{value:?} is no value of {key}"));
            }
        }
        Ok(())
    }
}

/// Whether `pattern`, in which `*` stands for any run of characters, matches all of `name`.
pub fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else { return false };
    let mut parts: Vec<&str> = parts.collect();
    let Some(last) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

/// Adds the nearest of the expected names to serde's "unknown field" message.
pub(crate) fn with_nearest(message: &str) -> String {
    let quoted =
        |s: &str| -> Vec<String> { s.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let Some(at) = message.find("unknown field") else { return message.to_string() };
    let names = quoted(&message[at..]);
    match names.split_first() {
        Some((unknown, known)) => {
            let near = nearest_name(unknown, known.iter().map(String::as_str));
            format!("{}{near}", message.trim_end())
        }
        None => message.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(matches("*", "anything"));
        assert!(matches("*.down_proj", "model.layers.3.mlp.down_proj"));
        assert!(matches("model.layers.0.*", "model.layers.0.mlp.up_proj"));
        assert!(matches("*.layers.1.*.q_proj", "model.layers.1.self_attn.q_proj"));
        assert!(!matches("*.down_proj", "model.layers.3.mlp.down_proj.x"));
        assert!(!matches("lm_head", "model.lm_head") && matches("lm_head", "lm_head"));
    }

    #[test]
    fn unknown_keys_name_their_line_and_the_nearest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.toml");
        std::fs::write(&path, "method = \"gptq\"\ngroup_sise = 64\n").unwrap();
        let text = Recipe::read(&path).unwrap_err().to_string();
        assert!(text.contains("line 2") && text.contains("did you mean group_size?"), "{text}");
        std::fs::write(&path, "method = \"gptk\"\n").unwrap();
        let text = Recipe::read(&path).unwrap_err().to_string();
        assert!(text.contains("did you mean gptq?"), "{text}");
    }

    /// The usual groups of 128 with an eighth of 576 columns on top: 72 are one group.
    #[test]
    fn narrow_tiers_are_one_group() {
        let mut settings = Recipe::default().settings_at(4);
        assert_eq!(settings.tiers(576), [(GridSpec::affine(4, true, Some(128)), 576)]);
        settings.tier = Some((72, 8));
        let (low, high) = (GridSpec::affine(4, true, Some(128)), GridSpec::affine(8, true, None));
        assert_eq!(settings.tiers(576), [(low, 504), (high, 72)]);
        // A group wider than the row stays what it is: an error.
        assert!(settings.tiers(120).iter().all(|(grid, cols)| grid.validate(*cols).is_err()));
    }

    #[test]
    fn overrides_and_round_trip() {
        let mut recipe = Recipe { skip: vec!["*.o_proj".into()], ..Default::default() };
        recipe.add_layer("*.v_proj=bits:6,group_size:-1").unwrap();
        let v = recipe.settings("model.layers.0.self_attn.v_proj").unwrap();
        assert_eq!(v.grid, GridSpec::affine(6, true, None));
        assert!(recipe.settings("model.layers.0.self_attn.o_proj").is_none());
        let text = toml::to_string(&recipe).unwrap();
        assert_eq!(toml::from_str::<Recipe>(&text).unwrap(), recipe);
        for bad in ["x", "a=bits:x", "a=bit:3"] {
            assert!(recipe.add_layer(bad).is_err(), "{bad}");
        }
        recipe.group_size = Some(100);
        assert!(recipe.validate().is_err());
        let sizes = ["max_bytes = 60_000_000", "max_bytes = '60MB'"].map(toml::from_str::<Recipe>);
        assert!(sizes.into_iter().all(|r| r.unwrap().max_bytes == Some(60_000_000)));
        let bad = toml::from_str::<Recipe>("max_bytes = '60MX'").unwrap_err().to_string();
        assert!(bad.contains("unknown unit"), "{bad}");
    }
}
