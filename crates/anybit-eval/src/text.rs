//! Reading texts.

use std::path::Path;

use crate::{EvalError, Result};

/// Public-domain prose that ships with the program, for figures on any machine: Jane Austen's
/// *Pride and Prejudice* and the Jargon File, in parts that the built-in calibration text leaves
/// out.
pub const BUILTIN_TEXT: &str = include_str!("../data/evaluation.txt");

/// Reads a UTF-8 text that is not empty.
///
/// # Errors
/// The file cannot be read, is not UTF-8 (with the byte's position) or is empty.
pub fn read_text(path: &Path) -> Result<String> {
    let fail = |what: String| EvalError::Text { path: path.to_owned(), what };
    let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        fail(format!("byte {at} is not UTF-8; convert the file to UTF-8"))
    })?;
    if text.trim().is_empty() {
        return Err(fail("it is empty".into()));
    }
    Ok(text)
}
