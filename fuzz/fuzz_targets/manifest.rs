//! The manifest of a packed model whose weight file is valid.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use anybit_fuzz::{folder_with_packed, read_model};
use libfuzzer_sys::fuzz_target;

static PACKED: LazyLock<PathBuf> = LazyLock::new(|| folder_with_packed().join("packed"));

fuzz_target!(|data: &[u8]| {
    fs::write(PACKED.join("anybit.json"), data).expect("a file");
    read_model(&PACKED);
});
