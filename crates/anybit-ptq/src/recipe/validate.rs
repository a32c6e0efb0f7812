//! What of a recipe can be wrong before any model is seen.

use anybit_io::nearest_name;

use super::{Count, LayerOverride, Recipe};
use crate::activations::UNQUANTIZED;
use crate::{PtqError, Result, methods, transforms};

impl Recipe {
    /// Checks everything that does not depend on a model.
    ///
    /// # Errors
    /// The first value that is out of range, with what it may be.
    pub fn validate(&self) -> Result<()> {
        let fail = |what: String| Err(PtqError::Recipe(what));
        self.check_names()?;
        let bits = self.bits;
        if !(1.0..=8.0).contains(&bits) && bits != UNQUANTIZED as f64 {
            return fail(format!(
                "{bits} bits: weights take 1 to 8 bits, or 16 to stay as they are"
            ));
        }
        self.check_activations()?;
        let overrides = self.layers.values().map(|l| l.bits);
        for bits in [self.embed_bits, self.head_bits].into_iter().chain(overrides).flatten() {
            if !(1..=8).contains(&bits) {
                return fail(format!("{bits} bits: weights take 1 to 8 bits"));
            }
        }
        if self.max_bytes.is_some_and(|most| most > 1 << 56) {
            return fail("max_bytes is beyond any file".into());
        }
        if self.max_bytes.is_some() && self.count != Count::Codes {
            return fail("max_bytes and count are two goals; give one".into());
        }
        let groups = self.layers.values().filter_map(|l| l.group_size);
        for g in self.group_size.into_iter().chain(groups) {
            if g != -1 && (g < 8 || g % 8 != 0) {
                return fail(format!(
                    "group size {g}: use a multiple of 8, or -1 for one group per row"
                ));
            }
        }
        if !(self.damp > 0.0 && self.damp.is_finite()) {
            return fail(format!("damp is {}: it must be above 0", self.damp));
        }
        let c = &self.calibration;
        let sizes = 1..=1usize << 40;
        let counts = [c.tokens, c.gradient_tokens].iter().all(|n| sizes.contains(n));
        if !(2..=1 << 20).contains(&c.seqlen) || !counts || c.data.is_empty() {
            let what = "calibration needs data, 1 to 2^40 tokens and a seqlen of 2 to 2^20";
            return fail(what.into());
        }
        let rounding = self.rounding()?;
        if rounding.needs().vocabulary && (self.embed_bits.is_some() || self.head_bits.is_some()) {
            return fail(format!(
                "{} gives embedding and head their share of max_bytes: embed_bits and head_bits \
                 do not apply",
                self.method
            ));
        }
        let allocates = rounding.allocation().is_some();
        let allocating = methods::allocating().contains(&self.method.as_str());
        if allocating && bits == UNQUANTIZED as f64 {
            return fail(format!("{}: 16 bits leave nothing to allocate", self.method));
        }
        if allocates && self.layers.values().any(|l| *l != LayerOverride::default()) {
            return fail(format!(
                "{} gives each row a grid of its own: settings of layers do not apply; use skip \
                 to leave layers unquantized",
                self.method
            ));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<()> {
        let fail = |what: String| Err(PtqError::Recipe(what));
        if self.preset().is_none() && methods::find(&self.method).is_none() {
            let names = [methods::names(), transforms::names()].concat();
            let near = nearest_name(&self.method, names.iter().copied());
            let list = names.join(", ");
            return fail(format!("unknown method {:?}{near} (there are: {list})", self.method));
        }
        let plain = self.transform == transforms::NONE;
        if !plain && transforms::find(&self.transform).is_none() {
            let names = [transforms::names(), vec![transforms::NONE]].concat();
            let near = nearest_name(&self.transform, names.iter().copied());
            let list = names.join(", ");
            let name = &self.transform;
            return fail(format!("unknown transform {name:?}{near} (there are: {list})"));
        }
        if self.preset().is_some() && !plain {
            return fail(format!(
                "method {} and transform {} are two transforms; give one, and a method that rounds",
                self.method, self.transform
            ));
        }
        Ok(())
    }

    fn check_activations(&self) -> Result<()> {
        let fail = |what: String| Err(PtqError::Recipe(what));
        let bits = [self.a_bits, self.kv_bits].into_iter().flatten();
        for bits in bits.chain(self.sites.values().copied()) {
            if !(2..=8).contains(&bits) && bits != UNQUANTIZED {
                return fail(format!(
                    "{bits} bits: activations and cache take 2 to 8 bits, or 16 to stay as they are"
                ));
            }
        }
        if !(2..=8).contains(&self.high_bits) {
            return fail(format!("high_bits is {}: 2 to 8", self.high_bits));
        }
        for clip in [self.a_clip, self.kv_clip].into_iter().flatten() {
            if !(clip > 0.0 && clip <= 1.0) {
                return fail(format!("a clip factor of {clip}: it lies in (0, 1]"));
            }
        }
        self.transformer()?;
        Ok(())
    }
}
