//! What the fuzz targets share: a folder to put inputs into, a tiny model for the files that are
//! not mutated, and reading all of what parses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use anybit::core::Matrix;
use anybit::io::native::verify;
use anybit::io::{Checkpoint, ModelConfig, synth};
use anybit::measure::bits_per_weight;
use anybit::ptq::Recipe;
use anybit::quantize::{self, Options};
use anybit::runtime::{Decoder, Session};

/// A folder below the temporary one, with `model`, a random model of a few kilobytes.
///
/// # Panics
/// When it cannot be written: there is nothing to fuzz then.
pub fn folder() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("anybit-fuzz-{}", process::id()));
    let config = ModelConfig {
        hidden_size: 16,
        intermediate_size: 24,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 8,
        vocab_size: 256,
        ..synth::preset("tiny").expect("a preset")
    };
    fs::create_dir_all(&folder).expect("a temporary folder");
    let model = folder.join("model");
    synth::write(&config, 1, &model, true, &mut |_, _| {}).expect("a model");
    folder
}

/// [`folder`] with `packed`, the model quantized.
///
/// # Panics
/// As [`folder`].
pub fn folder_with_packed() -> PathBuf {
    let folder = folder();
    let model = Checkpoint::open(&folder.join("model")).expect("the model just written");
    let recipe = Recipe {
        method: "rtn".into(),
        bits: 3,
        group_size: 8,
        symmetric: false,
        embed_bits: Some(2),
        ..Recipe::default()
    };
    let out = folder.join("packed");
    let options = Options { force: true, report_tokens: 0, ..Options::new(&out) };
    quantize::run(&model, &recipe, &options, &mut |_| {}).expect("a packed model");
    folder
}

/// Opens a model and, when that works, reads, verifies, measures and runs all of it.
pub fn read_model(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    for (name, _) in checkpoint.config.tensors() {
        if let Ok(weight) = checkpoint.weight(&name) {
            Matrix::from_rows(&weight);
        }
    }
    let _ = checkpoint.check_finite();
    let _ = bits_per_weight(&checkpoint);
    if checkpoint.manifest().is_some() {
        let _ = verify(&checkpoint, None, |_, _| {});
    }
    if let Ok(tokenizer) = checkpoint.tokenizer() {
        if let Ok(ids) = tokenizer.encode("Hello, world!", true) {
            let _ = tokenizer.decode(&ids, false);
        }
        let _ = checkpoint.chat_template(&tokenizer);
    }
    if let Ok(decoder) = Decoder::load(&checkpoint, 4) {
        let _ = Session::new(&decoder, 4).step(&[0, 1, 2]);
    }
}
