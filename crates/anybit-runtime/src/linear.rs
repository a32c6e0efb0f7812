//! Linears of a layer, and how their shared input reaches them.
//!
//! Of few tokens, products come straight from packed codes ([`anybit_kernels::gemv`]); of many,
//! quantized inputs multiply in integers with affine weights, and everything else goes through
//! GEMM on decoded rows. Signs multiply with signs by popcount, however many tokens there are. A
//! quantizer stands directly before the linears of its site, so what they share is quantized once.

use std::sync::Arc;

use anybit_core::{RowSource, SiteState};
use anybit_io::{Checkpoint, Weight};
use anybit_kernels::gemv::{Input, Product, Scratch, gemv, most_tokens};
use anybit_kernels::{CodedWeight, PackedWeight, QuantizedRows, fake_rows, linear, quantize_rows};

use crate::Result;

/// `y = x Wᵀ + b` with a weight in any storage.
#[derive(Clone)]
pub struct Linear {
    /// The weight, `[out, in]`.
    pub weight: Arc<dyn RowSource>,
    /// The bias, `[out]`.
    pub bias: Option<Vec<f32>>,
    /// The weight in kernel order, where it is packed in groups that kernels know.
    packed: Option<Arc<PackedWeight>>,
    /// The weight for products with quantized inputs, where it is packed on affine grids.
    integer: Option<Arc<CodedWeight>>,
    /// Whether products of packed codes with quantized inputs are exact integers.
    coded: bool,
}

impl Linear {
    /// Loads `NAME.weight` and, when the architecture has one, `NAME.bias`.
    ///
    /// # Errors
    /// What the checkpoint reports.
    pub fn load(checkpoint: &Checkpoint, name: &str, bias: bool) -> Result<Self> {
        Self::load_at(checkpoint, name, bias, &SiteState::default())
    }

    /// [`Self::load`] behind a site: with a quantizer there, packed weights multiply in integers.
    pub(crate) fn load_at(
        checkpoint: &Checkpoint,
        name: &str,
        bias: bool,
        site: &SiteState,
    ) -> Result<Self> {
        let weight = checkpoint.weight(&format!("{name}.weight"))?;
        let bias = bias.then(|| checkpoint.vector(&format!("{name}.bias"))).transpose()?;
        let matrix = match &weight {
            Weight::Quantized(matrix) => Some(matrix.clone()),
            Weight::Stored(_) => None,
        };
        let mut linear = Self { bias, ..Self::of(weight) };
        if let (Some(matrix), Some(quantizer)) = (matrix, &site.quantizer) {
            let takes_codes = |packed: &PackedWeight| {
                packed.takes_codes(&quantizer.segments) && packed.is_affine()
            };
            linear.coded = linear.packed.as_deref().is_some_and(takes_codes);
            // Where products come from packed codes however many tokens there are, there is no
            // need of another copy.
            linear.integer = match linear.coded && most_tokens() == usize::MAX {
                true => CodedWeight::binary(&matrix, quantizer),
                false => CodedWeight::new(&matrix, quantizer),
            }
            .map(Arc::new);
        }
        Ok(linear)
    }

    /// A linear of a checkpoint's weight, without bias.
    pub(crate) fn of(weight: Weight) -> Self {
        let packed = match &weight {
            Weight::Quantized(matrix) => PackedWeight::new(matrix).map(Arc::new),
            Weight::Stored(_) => None,
        };
        let weight: Arc<dyn RowSource> = match &packed {
            Some(packed) => packed.clone(),
            None => Arc::new(weight),
        };
        Self { weight, bias: None, packed, integer: None, coded: false }
    }

    /// A linear of these parts.
    pub fn new(weight: Arc<dyn RowSource>, bias: Option<Vec<f32>>) -> Self {
        Self { weight, bias, packed: None, integer: None, coded: false }
    }

    /// Puts another weight of the same shape in place.
    pub fn set_weight(&mut self, weight: Arc<dyn RowSource>) {
        *self = Self::new(weight, self.bias.take());
    }

    /// Whether products with quantized inputs are taken in integers.
    pub fn is_integer(&self) -> bool {
        self.integer.is_some() || self.coded
    }

    /// Whether products are taken by counting signs.
    fn is_binary(&self) -> bool {
        matches!(self.integer.as_deref(), Some(CodedWeight::Binary(_)))
    }

    /// Takes products with the values that codes stand for, in f32, from here on.
    pub fn without_integers(&mut self) {
        (self.integer, self.packed, self.coded) = (None, None, false);
    }

    /// Bytes that a product with one token reads.
    pub fn pass_bytes(&self) -> usize {
        match &self.packed {
            Some(packed) => packed.pass_bytes(),
            None => self.weight.stored_bytes(),
        }
    }

    /// Bytes of the weight in memory, all forms of it.
    pub fn held_bytes(&self) -> usize {
        let packed = self.packed.as_ref().map(|packed| packed.held_bytes());
        let coded = self.integer.as_ref().map_or(0, |coded| coded.stored_bytes());
        packed.unwrap_or_else(|| self.weight.stored_bytes()) + coded
    }

    /// Applies it to `x`, `[tokens, in]`.
    pub fn forward(&self, x: &[f32], scratch: &mut Scratch, y: &mut [f32]) {
        forward_values([self], x, scratch, [y]);
    }

    /// Rows of the weight.
    pub fn out_size(&self) -> usize {
        self.weight.shape().0
    }
}

/// A site's input as its linears take it; grown once.
#[derive(Debug, Clone, Default)]
pub(crate) struct InputBuffers {
    values: Vec<f32>,
    codes: QuantizedRows,
    pub(crate) scratch: Scratch,
}

impl InputBuffers {
    /// Applies the linears of a site to `x`, which goes through the site's quantizer first.
    pub(crate) fn project<const N: usize>(
        &mut self,
        site: &SiteState,
        linears: [&Linear; N],
        x: &[f32],
        outputs: [&mut [f32]; N],
    ) {
        let Some(quantizer) = &site.quantizer else {
            return forward_values(linears, x, &mut self.scratch, outputs);
        };
        let few = x.len() / quantizer.cols() <= most_tokens();
        let takes_codes = |linear: &Linear| {
            let packed = linear.packed.as_deref();
            packed.is_some_and(|p| p.takes_codes(&quantizer.segments)) && !linear.is_binary()
        };
        if few && linears.iter().all(|l| takes_codes(l)) {
            quantize_rows(quantizer, x, &mut self.codes);
            return products(linears, Input::Codes(&self.codes), &mut self.scratch, outputs);
        }
        if linears.iter().all(|l| l.integer.is_some()) {
            quantize_rows(quantizer, x, &mut self.codes);
            for (linear, y) in linears.into_iter().zip(outputs) {
                let integer = linear.integer.as_ref().expect("seen above");
                integer.forward(&self.codes, linear.bias.as_deref(), y);
            }
            return;
        }
        if self.values.len() < x.len() {
            self.values.resize(x.len(), 0.0);
        }
        let values = &mut self.values[..x.len()];
        values.copy_from_slice(x);
        fake_rows(quantizer, values);
        forward_values(linears, values, &mut self.scratch, outputs);
    }
}

fn forward_values<const N: usize>(
    linears: [&Linear; N],
    x: &[f32],
    scratch: &mut Scratch,
    outputs: [&mut [f32]; N],
) {
    let few = x.len() / linears[0].weight.shape().1 <= most_tokens();
    if few && linears.iter().all(|l| l.packed.is_some()) {
        return products(linears, Input::Values(x), scratch, outputs);
    }
    for (own, y) in linears.into_iter().zip(outputs) {
        match &own.packed {
            Some(_) if few => products([own], Input::Values(x), scratch, [y]),
            _ => linear(x, &*own.weight, own.bias.as_deref(), y),
        }
    }
}

/// Products from packed codes, in one pass over all weights.
fn products<const N: usize>(
    linears: [&Linear; N],
    input: Input<'_>,
    scratch: &mut Scratch,
    outputs: [&mut [f32]; N],
) {
    let mut outputs = outputs.into_iter();
    let mut products = linears.map(|linear| Product {
        weight: linear.packed.as_ref().expect("the caller has looked"),
        bias: linear.bias.as_deref(),
        y: outputs.next().expect("an output for each linear"),
    });
    gemv(input, &mut products, scratch);
}
