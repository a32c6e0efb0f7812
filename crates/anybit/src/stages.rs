//! The stages of a quantized model: original, transformed, quantized. The transformed one is in the
//! cache of the run that made it.

use std::path::Path;

use anybit_io::Checkpoint;
use anybit_ptq::cache_folder;

use crate::attribute::is_checkpoint;
use crate::{Error, Result};

/// The model that `packed` was rounded from, in the same basis: `given`, or the transformed model
/// in the cache (`.anybit-cache` beside `packed` unless another folder is given).
///
/// # Errors
/// It is not there, or its basis is another.
pub fn unquantized(
    packed: &Checkpoint,
    given: Option<&Path>,
    cache: Option<&Path>,
) -> Result<Checkpoint> {
    let Some(manifest) = packed.manifest() else {
        return Err(Error::Usage(format!("{} is not quantized", packed.path.display())));
    };
    let same_basis = |c: &Checkpoint| {
        c.manifest().and_then(|m| m.transform.as_ref()) == manifest.transform.as_ref()
    };
    if let Some(path) = given {
        let checkpoint = Checkpoint::open(path)?;
        if same_basis(&checkpoint) {
            return Ok(checkpoint);
        }
    }
    match (&manifest.transformed, &manifest.transform) {
        (Some(name), Some(transform)) => {
            let folder = cache_folder(cache, &packed.path).join(name);
            if !is_checkpoint(&folder) {
                return Err(Error::Usage(format!(
                    "the model in the basis of {transform} is not in the cache (no {}): repeat the \
                     quantization, or name its --cache",
                    folder.display()
                )));
            }
            Ok(Checkpoint::open(&folder)?)
        }
        _ => Err(Error::Usage(format!(
            "{} was rounded from the original model: give it with --reference",
            packed.path.display()
        ))),
    }
}
