//! The flags that make a recipe, shared by the commands that take one.

use std::path::PathBuf;

use anybit::Result;
use anybit::ptq::Recipe;
use clap::ValueEnum;
use clap::builder::PossibleValuesParser;

/// Flags of a recipe; each is a key of the same name and wins over --recipe.
#[derive(clap::Args)]
pub struct RecipeArgs {
    /// Recipe file (TOML).
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// How weights are rounded; or the name of a transform, for it with weights (by GPTQ),
    /// activations and cache at 4 bits [default: gptq].
    #[arg(long, value_parser = PossibleValuesParser::new(method_names()))]
    method: Option<String>,

    /// Transform before rounding: the same function in a basis that rounds better [default: none].
    #[arg(long, value_parser = PossibleValuesParser::new(transform_names()))]
    transform: Option<String>,

    /// The fast setting of a transform that is trained (flatquant).
    #[arg(long)]
    fast: bool,

    /// Leave out the transform of a site in a block where it does not lower the error (flatquant).
    #[arg(long)]
    auto_transform: bool,

    /// Bits of the inputs of linears, 2 to 8, or 16 for none [default: 16; 4 when --method names a
    /// transform].
    #[arg(long, value_name = "B")]
    pub a_bits: Option<u8>,

    /// Bits of keys and values in the cache, 2 to 8, or 16 for none [default: 16; 4 when --method
    /// names a transform].
    #[arg(long, value_name = "B")]
    pub kv_bits: Option<u8>,

    /// Asymmetric grids for the inputs of linears, or symmetric with =false [default: the
    /// transform's own].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    a_asym: Option<bool>,

    /// Factor of the range of the inputs of linears [default: the transform's own].
    #[arg(long, value_name = "F")]
    a_clip: Option<f32>,

    /// Factor of the range of keys and values [default: the transform's own].
    #[arg(long, value_name = "F")]
    kv_clip: Option<f32>,

    /// Bits of the channels that resq gathers most of the energy in [default: 8].
    #[arg(long, value_name = "B")]
    high_bits: Option<u8>,

    /// Bits of the inputs at sites that match, such as '*.down_input=8'; may be repeated.
    #[arg(long, value_name = "PATTERN=B")]
    site: Vec<String>,

    /// Columns that share a scale, a multiple of 8; -1 for the whole row [default: 128, or
    /// -1 where activations are quantized too].
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    group_size: Option<i64>,

    /// Asymmetric grids, with a zero point per group.
    #[arg(long)]
    asym: bool,

    /// How a group's scale is fitted [default: min-max, or mse behind a rotation].
    #[arg(long, value_enum)]
    scale: Option<ScaleArg>,

    /// GPTQ: round columns in order of falling activation energy; groups are static, so it costs
    /// nothing at run time [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    act_order: Option<bool>,

    /// GPTQ: damping as a fraction of the mean diagonal [default: 0.01].
    #[arg(long)]
    damp: Option<f64>,

    /// Quantize the embedding to this many bits (to nearest).
    #[arg(long, value_name = "B")]
    embed_bits: Option<u8>,

    /// Quantize an untied head to this many bits.
    #[arg(long, value_name = "B")]
    head_bits: Option<u8>,

    /// Leave linears that match the pattern unquantized; may be repeated.
    #[arg(long, value_name = "PATTERN")]
    skip: Vec<String>,

    /// Settings of linears that match: PATTERN=bits:N[,group_size:N][,symmetric:BOOL]; may be
    /// repeated.
    #[arg(long, value_name = "PATTERN=…")]
    layer: Vec<String>,

    /// Calibration text: a file (.txt, .jsonl), "builtin", or the name of a data set below the
    /// folder ANYBIT_DATA; may be repeated [default: builtin].
    #[arg(long, value_name = "TEXT")]
    calib: Vec<String>,

    /// Calibration tokens [default: 65536].
    #[arg(long, value_name = "N")]
    calib_tokens: Option<usize>,

    /// Tokens of a calibration sequence [default: 512].
    #[arg(long, value_name = "N")]
    seqlen: Option<usize>,

    /// Tokens that gradients are taken on, for methods that need them [default: 51200].
    #[arg(long, value_name = "N")]
    grad_tokens: Option<usize>,

    /// Option of the method, or of the transform as transform.KEY=VALUE; may be repeated.
    /// docs/methods.md and docs/transforms.md list them.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,

    /// Folder for what other goals of the same model and text can use again (gradients, error
    /// tables) [default: .anybit-cache beside the output].
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,

    /// Seed of everything random [default: 0].
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScaleArg {
    MinMax,
    Mse,
}

fn method_names() -> Vec<&'static str> {
    [anybit::ptq::methods::names(), anybit::ptq::transforms::names()].concat()
}

fn transform_names() -> Vec<&'static str> {
    [vec![anybit::ptq::transforms::NONE], anybit::ptq::transforms::names()].concat()
}

impl RecipeArgs {
    /// The recipe of these flags; not validated yet.
    ///
    /// # Errors
    /// A file that is no recipe, a flag that cannot be parsed.
    pub fn read(&self) -> Result<Recipe> {
        let mut r = match &self.recipe {
            Some(path) => Recipe::parse(path)?,
            None => Recipe::default(),
        };
        if let Some(method) = self.method.as_ref().filter(|m| **m != r.method) {
            // Options of another method mean nothing to this one.
            r.options.clear();
            r.method.clone_from(method);
        }
        if let Some(transform) = self.transform.as_ref().filter(|t| **t != r.transform) {
            r.transform_options.clear();
            r.transform.clone_from(transform);
        }
        if self.fast {
            r.transform_options.insert("effort".into(), "fast".into());
        }
        if self.auto_transform {
            r.transform_options.insert("auto".into(), true.into());
        }
        r.a_bits = self.a_bits.or(r.a_bits);
        r.kv_bits = self.kv_bits.or(r.kv_bits);
        r.a_symmetric = self.a_asym.map(|asym| !asym).or(r.a_symmetric);
        r.a_clip = self.a_clip.or(r.a_clip);
        r.kv_clip = self.kv_clip.or(r.kv_clip);
        r.high_bits = self.high_bits.unwrap_or(r.high_bits);
        self.site.iter().try_for_each(|site| r.add_site(site))?;
        r.group_size = self.group_size.or(r.group_size);
        r.symmetric &= !self.asym;
        r.act_order = self.act_order.unwrap_or(r.act_order);
        r.damp = self.damp.unwrap_or(r.damp);
        r.embed_bits = self.embed_bits.or(r.embed_bits);
        r.head_bits = self.head_bits.or(r.head_bits);
        r.seed = self.seed.unwrap_or(r.seed);
        r.skip.extend(self.skip.iter().cloned());
        if let Some(scale) = self.scale {
            r.scale = Some(match scale {
                ScaleArg::MinMax => anybit::core::ScaleFit::MinMax,
                ScaleArg::Mse => anybit::core::ScaleFit::Mse,
            });
        }
        if !self.calib.is_empty() {
            r.calibration.data = self.calib.clone();
        }
        r.calibration.tokens = self.calib_tokens.unwrap_or(r.calibration.tokens);
        r.calibration.seqlen = self.seqlen.unwrap_or(r.calibration.seqlen);
        r.calibration.gradient_tokens = self.grad_tokens.unwrap_or(r.calibration.gradient_tokens);
        self.layer.iter().try_for_each(|layer| r.add_layer(layer))?;
        self.set.iter().try_for_each(|option| r.add_option(option))?;
        Ok(r)
    }
}
