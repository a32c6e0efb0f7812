//! The weight file of a model whose configuration and tokenizer are valid.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use anybit_fuzz::{folder, read_model};
use libfuzzer_sys::fuzz_target;

static MODEL: LazyLock<PathBuf> = LazyLock::new(|| folder().join("model"));

fuzz_target!(|data: &[u8]| {
    fs::write(MODEL.join("model.safetensors"), data).expect("a file");
    read_model(&MODEL);
});
