//! A log of one JSON object a line. A resumed run first drops what came after its checkpoint, so
//! that no step is there twice.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anybit_io::atomic::write_bytes;
use anybit_io::{IoError, Result};

use super::Record;

/// An open log.
#[derive(Debug)]
pub struct JsonLines {
    file: File,
    path: PathBuf,
}

impl JsonLines {
    /// Opens the log at `path`: a new one, or one that goes on after step `resumed`.
    ///
    /// # Errors
    /// What the operating system refuses; a log that is none.
    pub fn open(path: &Path, resumed: Option<u64>) -> Result<Self> {
        let mut kept = String::new();
        if let Some(step) = resumed.filter(|_| path.exists()) {
            for record in Self::read(path)?.into_iter().filter(|r| r.step <= step) {
                kept.push_str(&line(&record, path)?);
            }
        }
        write_bytes(path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(|e| IoError::file("write", path, e))?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Adds a record.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let text = line(record, &self.path)?;
        // One call: a line is there whole, or it is the last one.
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|e| IoError::file("write", &self.path, e))
    }

    /// All records of a log. A last line that a killed run left unfinished is dropped.
    ///
    /// # Errors
    /// A file that cannot be read; a line that is no record.
    pub fn read(path: &Path) -> Result<Vec<Record>> {
        let text = fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let parse = |(number, line): (usize, &str)| {
            serde_json::from_str(line)
                .map_err(|e| IoError::damaged(path, format!("line {}: {e}", number + 1)))
        };
        complete.lines().enumerate().map(parse).collect()
    }
}

fn line(record: &Record, path: &Path) -> Result<String> {
    let text = serde_json::to_string(record);
    let mut text = text.map_err(|e| IoError::damaged(path, e.to_string()))?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::log::Kind;

    #[test]
    fn a_resumed_log_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let record = |step: u64| Record::new(Kind::Step, step, step * 10, 3.0 - step as f64 * 0.1);
        let mut log = JsonLines::open(&path, None).unwrap();
        (1..=5).for_each(|step| log.write(&record(step)).unwrap());
        // Killed in the middle of a line.
        log.file.write_all(b"{\"kind\":\"st").unwrap();
        drop(log);
        let mut log = JsonLines::open(&path, Some(3)).unwrap();
        (4..=6).for_each(|step| log.write(&record(step)).unwrap());
        let read = JsonLines::read(&path).unwrap();
        assert_eq!(read, (1..=6).map(record).collect::<Vec<_>>());
        fs::write(&path, "{}\n").unwrap();
        assert!(JsonLines::read(&path).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn a_loss_that_is_no_number_does_not_make_the_log_unreadable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let mut record = Record::new(Kind::Validation, 7, 70, f64::NAN);
        record.extra.insert("kl".into(), f64::INFINITY);
        JsonLines::open(&path, None).unwrap().write(&record).unwrap();
        drop(JsonLines::open(&path, Some(7)).unwrap());
        let read = JsonLines::read(&path).unwrap();
        assert!(read[0].loss.is_nan() && read[0].extra["kl"].is_nan());
    }
}
