//! The methods, one folder each. A [`Method`] is a name, a citation and a way to build a
//! [`Rounding`] from a recipe; a rounding puts the linears of one site on their grids. Adding one
//! touches its folder and one line of [`ALL`].

pub mod anybit;
pub mod awq;
pub mod gptq;
pub mod rtn;
pub mod skim;
pub mod squeezellm;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::layout::MatrixLayout;
use crate::recipe::with_nearest;
use crate::site::{Needs, Site, SiteError, SiteKind, SiteRounding};
use crate::tables::Allocation;
use crate::{LinearSettings, Recipe};

/// Where a method comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Citation {
    /// Authors, title, venue.
    pub reference: &'static str,
    /// Link to the proceedings.
    pub link: &'static str,
}

/// An entry of the registry.
pub trait Method: Send + Sync {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// One line for `--help` and reports.
    fn summary(&self) -> &'static str;

    /// Its paper; none for what is common knowledge.
    fn citation(&self) -> Option<Citation>;

    /// The method with a recipe's settings and its table `options`.
    ///
    /// # Errors
    /// A setting or an option that it does not know or cannot use, with what it may be.
    fn build(&self, recipe: &Recipe) -> Result<Box<dyn Rounding>, String>;
}

/// A matrix whose layout is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Where it is.
    pub kind: SiteKind,
    /// Whether the norm before can take up factors of its input channels.
    pub folds: bool,
    /// Rows and columns.
    pub shape: (usize, usize),
    /// Its settings.
    pub settings: &'a LinearSettings,
}

/// A way to put weights on grids.
pub trait Rounding: Send + Sync {
    /// What has to be observed.
    fn needs(&self) -> Needs;

    /// Its options with every default filled in.
    fn options(&self) -> toml::Table;

    /// Whether it hands factors of channels to the norm before.
    fn folds(&self) -> bool;

    /// How a matrix will be stored; the least that it can be where rows are allocated later.
    fn layout(&self, place: Place<'_>) -> MatrixLayout;

    /// Rounds the linears of a site.
    ///
    /// # Errors
    /// The index of the linear that cannot be rounded, and the reason.
    fn round(&self, site: &Site<'_>) -> Result<SiteRounding, SiteError>;

    /// How grids are allocated to rows; none when the recipe fixes them.
    fn allocation(&self) -> Option<&dyn Allocation>;
}

/// Every method there is.
pub const ALL: [&dyn Method; 6] =
    [&rtn::Rtn, &gptq::Gptq, &awq::Awq, &squeezellm::SqueezeLlm, &skim::Skim, &anybit::Anybit];

/// The method of a name.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    ALL.into_iter().find(|m| m.name() == name)
}

/// The names of all methods.
pub fn names() -> Vec<&'static str> {
    ALL.iter().map(|m| m.name()).collect()
}

/// The names of the methods that allocate rows.
pub fn allocating() -> Vec<&'static str> {
    let allocates = |name: &&str| {
        let recipe = Recipe { method: (*name).into(), ..Default::default() };
        recipe.rounding().is_ok_and(|r| r.allocation().is_some())
    };
    names().into_iter().filter(allocates).collect()
}

/// Reads a method's options; what is absent has its default.
///
/// # Errors
/// An unknown key, with the nearest known one, or a value of another type.
pub(crate) fn read_options<T: DeserializeOwned>(recipe: &Recipe) -> Result<T, String> {
    let fail =
        |e: toml::de::Error| format!("options of {}: {}", recipe.method, with_nearest(e.message()));
    recipe.options.clone().try_into().map_err(fail)
}

/// Reads a transform's options; what is absent has its default.
///
/// # Errors
/// An unknown key, with the nearest known one, or a value of another type.
pub(crate) fn read_transform_options<T: DeserializeOwned>(recipe: &Recipe) -> Result<T, String> {
    let fail =
        |e: toml::de::Error| format!("options of the transform: {}", with_nearest(e.message()));
    recipe.transform_options.clone().try_into().map_err(fail)
}

/// Options as a table.
pub(crate) fn options_table<T: Serialize>(options: &T) -> toml::Table {
    // Plain structs of numbers, booleans and names: nothing that TOML cannot hold.
    toml::Table::try_from(options).unwrap_or_default()
}

/// Bits of a method that gives every weight of a linear the same width.
///
/// # Errors
/// A fraction, or a goal in bytes.
pub(crate) fn whole_bits(recipe: &Recipe) -> Result<u8, String> {
    let name = &recipe.method;
    if recipe.max_bytes.is_some() || recipe.count != Default::default() {
        return Err(format!(
            "{name} has one width per linear: a size to meet (max_bytes, count = \"total\") needs \
             a method that allocates ({})",
            allocating().join(", ")
        ));
    }
    if recipe.bits.fract() != 0.0 {
        return Err(format!(
            "{} bits: {name} takes whole bits, 1 to 8; for fractions use {}",
            recipe.bits,
            allocating().join(" or ")
        ));
    }
    Ok(recipe.bits as u8)
}

/// The options of methods that have none.
#[derive(Debug, Default, Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NoOptions {}
