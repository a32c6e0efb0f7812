//! Training runs in CSV or JSON.
//!
//! Columns are `params`, `tokens`, `precision`, `loss` and, where it cannot be told from the
//! precision's name, `bits`. The columns of the runs published with QuEST are understood as well.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::{EvalError, Result};

/// Result with what is wrong with the text.
type Parsed<T> = std::result::Result<T, String>;

/// Columns that a run may be read from.
const COLUMNS: [&str; 10] = [
    "params",
    "non_embedding_parameters",
    "tokens",
    "precision",
    "bits",
    "loss",
    "w_bits",
    "a_bits",
    "w_quant",
    "a_quant",
];

/// What QuEST's runs call an operand that is not quantized.
const UNQUANTIZED: &str = "NoQuantizer";

/// What QuEST itself quantizes with, without the prefix for its transform: names of other methods
/// become families of their own.
const QUEST: [&str; 4] = ["Trust", "Clip", "FP4Trust", "FourEightTrust"];

/// One model that was trained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Parameters without embeddings.
    pub params: f64,
    /// Tokens it was trained on.
    pub tokens: f64,
    /// Name of its precision, such as `QuEST W4A4`: what is before the last space is the family
    /// within which precisions are compared.
    pub precision: String,
    /// Bits of a weight.
    pub bits: Option<f64>,
    /// Final loss, nats per token.
    pub loss: f64,
}

/// What a file of runs holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Runs {
    /// The runs, in their order.
    pub runs: Vec<Run>,
    /// Columns that were not used.
    pub unused: Vec<String>,
}

/// Reads runs from a CSV file with a header row, or from JSON: a list of objects, or an object with
/// that list as `runs`.
///
/// # Errors
/// The file cannot be read; a column is missing; a value is no number, not finite or not above 0.
pub fn read_runs(path: &Path) -> Result<Runs> {
    let fail = |what: String| EvalError::Runs { path: path.to_owned(), what };
    let bytes = std::fs::read(path).map_err(|e| fail(e.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        fail(format!("byte {at} is not UTF-8; convert the file to UTF-8"))
    })?;
    parse_runs(&text).map_err(fail)
}

/// The same from a text: CSV, or JSON where it starts with a bracket. Lines of CSV that start with
/// `#` are comments.
///
/// # Errors
/// As for [`read_runs`]: line (or number of the run) and column, and what is wrong there.
pub fn parse_runs(text: &str) -> std::result::Result<Runs, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let records = match text.trim_start().starts_with(['[', '{']) {
        true => json_records(text)?,
        false => csv_records(text)?,
    };
    if records.is_empty() {
        return Err("it has no runs".into());
    }
    let names: BTreeSet<&String> = records.iter().flat_map(|r| r.cells.keys()).collect();
    let unused = names.into_iter().filter(|n| !COLUMNS.contains(&n.as_str())).cloned().collect();
    let runs = records.iter().map(Record::run).collect::<Parsed<_>>()?;
    Ok(Runs { runs, unused })
}

/// One run as it was written.
struct Record {
    /// Where, for messages.
    place: String,
    /// Its cells by column.
    cells: BTreeMap<String, String>,
}

impl Record {
    fn has(&self, column: &str) -> bool {
        self.cells.get(column).is_some_and(|cell| !cell.is_empty())
    }

    fn text(&self, column: &str) -> Parsed<&str> {
        let Some(cell) = self.cells.get(column) else {
            let names: Vec<&str> = self.cells.keys().map(String::as_str).collect();
            let place = &self.place;
            return Err(format!("{place}: no column {column}; there are {}", names.join(", ")));
        };
        match cell.is_empty() {
            true => Err(format!("{}, column {column}: it is empty", self.place)),
            false => Ok(cell),
        }
    }

    fn number(&self, column: &str) -> Parsed<f64> {
        let text = self.text(column)?;
        let fail = |what: &str| Err(format!("{}, column {column}: {text:?} {what}", self.place));
        match text.parse::<f64>() {
            Ok(number) if number.is_finite() && number > 0.0 => Ok(number),
            Ok(_) => fail("is not finite and above 0"),
            Err(_) => fail("is no number"),
        }
    }

    fn run(&self) -> Parsed<Run> {
        let published = self.has("non_embedding_parameters") && !self.has("params");
        let params = self.number(if published { "non_embedding_parameters" } else { "params" })?;
        let tokens = self.number("tokens")?;
        let (precision, bits) = match self.has("w_quant") && !self.has("precision") {
            true => self.quest_precision()?,
            false => {
                let name = self.text("precision")?;
                let known = if self.has("bits") { Some(self.number("bits")?) } else { None };
                (name.to_string(), known.or_else(|| bits_of(name)))
            }
        };
        Ok(Run { params, tokens, precision, bits, loss: self.number("loss")? })
    }

    /// Name and bits of a weight for a pair of quantizers of QuEST's repository. Variants of one
    /// forward pass, with and without "Half", are one precision.
    fn quest_precision(&self) -> Parsed<(String, Option<f64>)> {
        let (weights, inputs) = (self.text("w_quant")?, self.text("a_quant")?);
        let (bits, input_bits) = (self.number("w_bits")?, self.number("a_bits")?);
        if weights == UNQUANTIZED && inputs == UNQUANTIZED {
            return Ok(("BF16".into(), Some(16.0)));
        }
        let full = if weights == UNQUANTIZED { inputs } else { weights };
        let name = full.strip_suffix("Quantizer").unwrap_or(full);
        let name = name.strip_prefix("Half").unwrap_or(name);
        let (rotated, kind) = match name.strip_prefix("Hadamard") {
            Some(kind) => (true, kind),
            None => (false, name),
        };
        let method = match (QUEST.contains(&kind), rotated) {
            (true, true) => "QuEST",
            (true, false) => "no-HT",
            (false, _) => name,
        };
        let family = match (inputs == UNQUANTIZED, method) {
            (true, "QuEST") => "weight-only".to_string(),
            (true, _) => format!("{method} weight-only"),
            (false, _) => method.to_string(),
        };
        let (precision, stored) = if kind.starts_with("FP4") {
            // These runs are filed under 16 bits.
            ("FP4".to_string(), 4.0)
        } else if kind.starts_with("FourEight") {
            // Half of the codes, and a bit per pair for which half.
            (format!("INT{bits}-2:4"), bits / 2.0 + 0.5)
        } else {
            (format!("W{bits}A{input_bits}"), bits)
        };
        Ok((format!("{family} {precision}"), Some(stored)))
    }
}

/// The first number in the last word of a name: 4 in `QuEST W4A8`, `int4` or `4`.
fn bits_of(name: &str) -> Option<f64> {
    let word = name.rsplit(' ').next()?;
    let word = word.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let end = word.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(word.len());
    word[..end].parse().ok().filter(|bits| *bits > 0.0)
}

fn csv_records(text: &str) -> Parsed<Vec<Record>> {
    let lines = text.lines().enumerate().map(|(i, line)| (format!("line {}", i + 1), line));
    let mut lines = lines.filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    let row = |place: &str, line: &str| csv_row(line).map_err(|what| format!("{place}: {what}"));
    let Some((place, first)) = lines.next() else { return Err("it is empty".into()) };
    let columns = row(&place, first)?;
    for (i, column) in columns.iter().enumerate() {
        if columns[..i].contains(column) {
            return Err(format!("{place}: two columns are called {column:?}"));
        }
    }
    let mut records = Vec::new();
    for (place, line) in lines {
        let cells = row(&place, line)?;
        if cells.len() != columns.len() {
            let (found, expected) = (cells.len(), columns.len());
            return Err(format!("{place}: {found} cells, but the header has {expected}"));
        }
        let cells = columns.iter().cloned().zip(cells).collect();
        records.push(Record { place, cells });
    }
    Ok(records)
}

/// The cells of a line. Commas may stand inside quotes, line breaks may not.
fn csv_row(line: &str) -> Parsed<Vec<String>> {
    let mut cells = Vec::new();
    let mut rest = line;
    loop {
        let (cell, after) = match rest.trim_start().strip_prefix('"') {
            Some(quoted) => quoted_cell(quoted)?,
            None => {
                let end = rest.find(',').unwrap_or(rest.len());
                (rest[..end].trim().to_string(), &rest[end..])
            }
        };
        cells.push(cell);
        match after.strip_prefix(',') {
            Some(next) => rest = next,
            None => return Ok(cells),
        }
    }
}

/// The cell behind an opening quote, and what follows its closing one. Two quotes stand for one.
fn quoted_cell(text: &str) -> Parsed<(String, &str)> {
    let mut cell = String::new();
    let mut rest = text;
    loop {
        let Some((part, after)) = rest.split_once('"') else {
            return Err("a quote is not closed".into());
        };
        cell.push_str(part);
        if let Some(next) = after.strip_prefix('"') {
            cell.push('"');
            rest = next;
            continue;
        }
        let after = after.trim_start();
        return match after.is_empty() || after.starts_with(',') {
            true => Ok((cell, after)),
            false => Err("a closing quote is not followed by a comma".into()),
        };
    }
}

fn json_records(text: &str) -> Parsed<Vec<Record>> {
    let value: Value = serde_json::from_str(text).map_err(|e| format!("it is no JSON: {e}"))?;
    let list = value.as_array().or_else(|| value.get("runs")?.as_array());
    let Some(list) = list else {
        return Err("expected a list of runs, or an object with that list as \"runs\"".into());
    };
    let record = |(i, run): (usize, &Value)| {
        let place = format!("run {}", i + 1);
        let Some(object) = run.as_object() else { return Err(format!("{place} is no object")) };
        let mut cells = BTreeMap::new();
        for (column, value) in object {
            let cell = match value {
                Value::Null => String::new(),
                Value::Bool(flag) => flag.to_string(),
                Value::Number(number) => number.to_string(),
                Value::String(text) => text.trim().to_string(),
                Value::Array(_) | Value::Object(_) if COLUMNS.contains(&column.as_str()) => {
                    return Err(format!("{place}, column {column}: expected a number or a text"));
                }
                Value::Array(_) | Value::Object(_) => String::new(),
            };
            cells.insert(column.clone(), cell);
        }
        Ok(Record { place, cells })
    };
    list.iter().enumerate().map(record).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_and_json_say_the_same() {
        let csv = "\u{feff}# a comment\nloss,params,tokens,precision,bits,seed\r\n\r\n\
                   3.5, 1e6 ,100000000,\"my, \"\"own\"\" W4A4\",,1\n2.75,2000000,2e8,x,2.5,2\n";
        let json = r#"{"runs": [
            {"params": 1e6, "tokens": 100000000, "precision": "my, \"own\" W4A4", "loss": 3.5},
            {"params": 2000000, "tokens": 2e8, "precision": "x", "bits": 2.5, "loss": 2.75,
             "seed": [1]}]}"#;
        let read = parse_runs(csv).unwrap();
        assert_eq!(read, parse_runs(json).unwrap());
        assert_eq!(read.unused, ["seed"]);
        let first = &read.runs[0];
        assert_eq!((first.precision.as_str(), first.bits), ("my, \"own\" W4A4", Some(4.0)));
        assert_eq!((first.params, first.tokens, first.loss), (1e6, 1e8, 3.5));
        assert_eq!(read.runs[1].bits, Some(2.5));
    }

    #[test]
    fn names_of_precisions() {
        for (name, bits) in [("4", 4.0), ("QuEST W2A16", 2.0), ("int1.58", 1.58), ("BF16", 16.0)] {
            assert_eq!(bits_of(name), Some(bits), "{name}");
        }
        assert_eq!(bits_of("full"), None);
        assert_eq!(bits_of(""), None);
        let csv = "non_embedding_parameters,tokens,w_bits,a_bits,w_quant,a_quant,loss\n\
                   1,1,16,16,NoQuantizer,NoQuantizer,1\n\
                   1,1,4,4,HalfHadamardTrustQuantizer,HalfHadamardTrustQuantizer,1\n\
                   1,1,1,1,ClipQuantizer,ClipQuantizer,1\n\
                   1,1,3,16,HalfHadamardTrustQuantizer,NoQuantizer,1\n\
                   1,1,16,16,HalfHadamardFP4TrustQuantizer,HalfHadamardFP4TrustQuantizer,1\n\
                   1,1,4,4,HadamardFourEightTrustQuantizer,HadamardTrustQuantizer,1\n\
                   1,1,2,2,LSQQuantizer,LSQQuantizer,1\n";
        let runs = parse_runs(csv).unwrap().runs;
        let found: Vec<(&str, Option<f64>)> =
            runs.iter().map(|r| (r.precision.as_str(), r.bits)).collect();
        let expected = [
            ("BF16", 16.0),
            ("QuEST W4A4", 4.0),
            ("no-HT W1A1", 1.0),
            ("weight-only W3A16", 3.0),
            ("QuEST FP4", 4.0),
            ("QuEST INT4-2:4", 2.5),
            ("LSQ W2A2", 2.0),
        ];
        assert_eq!(found, expected.map(|(name, bits)| (name, Some(bits))));
    }

    #[test]
    fn errors_name_line_and_column() {
        let header = "params,tokens,precision,loss";
        for (text, words) in [
            ("", vec!["empty"]),
            ("# only a comment\n", vec!["empty"]),
            (header, vec!["no runs"]),
            ("[]", vec!["no runs"]),
            ("[1]", vec!["run 1 is no object"]),
            ("{\"run\": []}", vec!["\"runs\""]),
            ("[{]", vec!["no JSON"]),
            ("[{\"params\": [1]}]", vec!["run 1, column params"]),
            ("params,loss,params\n", vec!["line 1", "\"params\""]),
            ("params,tokns,precision,loss\n1,2,a,3", vec!["column tokens", "tokns"]),
            ("params,tokens,loss\n1,2,3", vec!["line 2", "column precision"]),
        ] {
            let error = parse_runs(text).unwrap_err();
            for word in words {
                assert!(error.contains(word), "{text:?}: {error}");
            }
        }
        for (row, words) in [
            ("1,2,a", vec!["3 cells", "has 4"]),
            ("1,2,\"a,3", vec!["not closed"]),
            ("1,2,\"a\"b,3", vec!["closing quote"]),
            ("1,2,,3", vec!["column precision", "empty"]),
            ("1,many,a,3", vec!["column tokens", "\"many\" is no number"]),
            ("1,2,a,NaN", vec!["column loss", "not finite"]),
            ("1,2,a,-3", vec!["column loss", "above 0"]),
            ("0,2,a,3", vec!["column params", "above 0"]),
            ("inf,2,a,3", vec!["column params", "not finite"]),
        ] {
            let error = parse_runs(&format!("{header}\n1,2,a,3\n{row}\n")).unwrap_err();
            assert!(error.starts_with("line 3"), "{row:?}: {error}");
            for word in words {
                assert!(error.contains(word), "{row:?}: {error}");
            }
        }
    }
}
