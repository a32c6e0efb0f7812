//! Which quantizers stand at the sites of a model: bits from the recipe, clips and high channels
//! from the transform, defaults from both.

use std::collections::BTreeMap;

use anybit_core::{ActivationQuantizer, Site};
use anybit_io::Checkpoint;
use anybit_io::native::SiteRecord;

use crate::{PtqError, Recipe, Result};

/// Bits that stand for no quantizer.
pub const UNQUANTIZED: u8 = 16;

/// What will stand at every site of `checkpoint`, by `model.layers.N.SITE`; sites where nothing
/// stands are left out. `recipe` is resolved.
///
/// # Errors
/// A quantizer that a site cannot have.
pub fn site_records(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
) -> Result<BTreeMap<String, SiteRecord>> {
    let mut records = BTreeMap::new();
    let tiers = recipe.rounding()?.needs().tiers;
    for layer in 0..checkpoint.config.num_layers {
        for site in Site::ALL {
            let name = site.full_name(layer);
            let fitted = checkpoint.manifest().and_then(|m| m.sites.get(&name));
            let mut record = fitted.cloned().unwrap_or_default();
            let cols = checkpoint.config.site_size(site);
            let bits = recipe.site_bits(layer, site);
            record.quantizer = quantizer(recipe, (site, cols), bits, &record, tiers);
            if let Some(quantizer) = &record.quantizer {
                let named = |e| PtqError::Recipe(format!("{name}: {e}"));
                quantizer.validate(cols).map_err(named)?;
            }
            if record.transform.is_some() || record.quantizer.is_some() || record.high > 0 {
                records.insert(name, record);
            }
        }
    }
    Ok(records)
}

/// The quantizer of a site with rows of `cols` at `bits`; `tiers`: whether weights behind it may be split.
fn quantizer(
    recipe: &Recipe,
    (site, cols): (Site, usize),
    bits: u8,
    record: &SiteRecord,
    tiers: bool,
) -> Option<ActivationQuantizer> {
    let cache = matches!(site, Site::Key | Site::Value);
    let clip = if cache { recipe.kv_clip } else { recipe.a_clip };
    if bits == UNQUANTIZED {
        return None;
    }
    let high = recipe.high_bits.max(bits);
    let symmetric = !cache && recipe.a_symmetric.unwrap_or(true);
    // Weights in tiers follow the split of their input, also where it has the same bits in both
    // parts; a cache has no weights.
    let high_cols = if high > bits || (tiers && !cache) { record.high } else { 0 };
    let mut quantizer = ActivationQuantizer::tiered(cols, bits, high_cols, high, symmetric);
    let plain = clip.unwrap_or(1.0);
    quantizer.clip = record.clip.unwrap_or((plain, plain));
    // What the cache stores is what is simulated.
    quantizer.half = cache;
    Some(quantizer)
}
