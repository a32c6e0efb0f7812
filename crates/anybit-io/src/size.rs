//! Numbers of bytes as people write them: `2GiB`. Called by the command line and by recipes.

use serde::de::Error;
use serde::{Deserialize, Deserializer};

/// Bytes, with a unit of 1000 (kB, MB, GB) or 1024 (KiB, MiB, GiB) if wanted.
///
/// # Errors
/// What is no number, an unknown unit, less than a byte.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("unknown unit {unit:?}; use B, kB, MB, GB, KiB, MiB or GiB")),
    };
    let number: f64 = number.trim().parse().map_err(|_| format!("{number:?} is no number"))?;
    let bytes = number * factor;
    match (1.0..1e18).contains(&bytes) {
        true => Ok(bytes as u64),
        false => Err("a size is at least one byte".into()),
    }
}

/// A number of bytes, or a text of one, as a key of a recipe; for `deserialize_with`.
///
/// # Errors
/// As [`parse_size`].
pub fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: From<u64>,
{
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number of bytes or a text such as \"2GiB\"")]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    let bytes = match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => bytes,
        Size::Text(text) => parse_size(&text).map_err(D::Error::custom)?,
    };
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_faults() {
        for (text, bytes) in [("17", 17), ("1.5kB", 1500), ("2 GiB", 2 << 30), ("60MiB", 60 << 20)]
        {
            assert_eq!(parse_size(text), Ok(bytes));
        }
        for text in ["", "GiB", "2TiB", "0", "-1", "1e30GB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
