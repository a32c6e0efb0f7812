//! The flags that make a recipe, shared by the commands that take one.

use std::path::PathBuf;

use anybit::Result;
use anybit::ptq::Recipe;
use clap::ValueEnum;

/// Flags of a recipe; each is a key of the same name and wins over --recipe.
#[derive(clap::Args)]
pub struct RecipeArgs {
    /// Recipe file (TOML).
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// How weights are rounded [default: gptq].
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(anybit::ptq::methods::names()))]
    method: Option<String>,

    /// Columns that share a scale, a multiple of 8; -1 for the whole row [default: 128].
    #[arg(long, value_name = "G", allow_negative_numbers = true)]
    group_size: Option<i64>,

    /// Asymmetric grids, with a zero point per group.
    #[arg(long)]
    asym: bool,

    /// How a group's scale is fitted [default: min-max].
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

    /// Option of the method; may be repeated. docs/methods.md lists them.
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
        r.group_size = self.group_size.unwrap_or(r.group_size);
        r.symmetric &= !self.asym;
        r.act_order = self.act_order.unwrap_or(r.act_order);
        r.damp = self.damp.unwrap_or(r.damp);
        r.embed_bits = self.embed_bits.or(r.embed_bits);
        r.head_bits = self.head_bits.or(r.head_bits);
        r.seed = self.seed.unwrap_or(r.seed);
        r.skip.extend(self.skip.iter().cloned());
        if let Some(scale) = self.scale {
            r.scale = match scale {
                ScaleArg::MinMax => anybit::core::ScaleFit::MinMax,
                ScaleArg::Mse => anybit::core::ScaleFit::Mse,
            };
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
