//! A GGUF file.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use anybit::io::gguf::GgufFile;
use anybit_fuzz::{folder, read_model};
use libfuzzer_sys::fuzz_target;

static FILE: LazyLock<PathBuf> = LazyLock::new(|| folder().join("model.gguf"));

fuzz_target!(|data: &[u8]| {
    fs::write(&*FILE, data).expect("a file");
    if let Ok(file) = GgufFile::open(&FILE) {
        for tensor in file.tensors.values() {
            tensor.to_vec();
        }
        read_model(&FILE);
    }
});
