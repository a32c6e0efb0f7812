//! The methods, one folder each. A method is a name, a citation and a rule that rounds the
//! linears of one site; adding one touches its folder and one line of [`ALL`].

pub mod gptq;
pub mod rtn;

use anybit_core::{CoreError, Gram, Matrix, QuantizedMatrix};

use crate::LinearSettings;

/// A linear to be rounded.
pub struct SiteLinear<'a> {
    /// Its weight, `[out, in]`.
    pub weights: &'a Matrix,
    /// Its settings.
    pub settings: LinearSettings,
}

/// Where a method comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Citation {
    /// Authors, title, venue.
    pub reference: &'static str,
    /// Link to the proceedings.
    pub link: &'static str,
}

/// A way to put weights on a grid.
pub trait Method: Send + Sync {
    /// Its name in recipes.
    fn name(&self) -> &'static str;

    /// One line for `--help` and reports.
    fn summary(&self) -> &'static str;

    /// Its paper; none for what is common knowledge.
    fn citation(&self) -> Option<Citation>;

    /// Whether it needs the Gram matrix of the inputs, and with it calibration text.
    fn needs_gram(&self) -> bool;

    /// Rounds the linears that share one input. `gram` is there when [`Self::needs_gram`] says so.
    ///
    /// # Errors
    /// The index of the linear that cannot be rounded, and the reason.
    fn round(
        &self,
        linears: &[SiteLinear<'_>],
        gram: Option<&Gram>,
    ) -> Result<Vec<QuantizedMatrix>, (usize, CoreError)>;
}

/// Every method there is.
pub const ALL: [&dyn Method; 2] = [&rtn::Rtn, &gptq::Gptq];

/// The method of a name.
pub fn find(name: &str) -> Option<&'static dyn Method> {
    ALL.into_iter().find(|m| m.name() == name)
}

/// The names of all methods.
pub fn names() -> Vec<&'static str> {
    ALL.iter().map(|m| m.name()).collect()
}
