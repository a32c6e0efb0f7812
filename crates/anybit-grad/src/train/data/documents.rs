//! Files to documents, in pieces of about a mebibyte. A piece of plain text ends at a line end that
//! stands alone between visible characters, where byte-level tokenizers cut anyway. Where there is
//! none near, it ends after a run of white space, whose tokens may then differ from the whole's.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use anybit_io::IoError;

use super::{DataError, Result};

/// Bytes that a piece has at least, unless the file ends.
const PIECE: usize = 1 << 20;

/// A part of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Its text.
    pub text: String,
    /// Whether a document begins with it.
    pub starts_document: bool,
    /// Bytes read from files when it was complete.
    pub bytes_read: u64,
}

/// Texts of one file.
type Source = Box<dyn Iterator<Item = Result<(String, bool, u64)>> + Send>;

/// The documents of several files, one after another. Documents of white space alone are left out.
pub struct Documents {
    /// Those not begun, the next one last.
    files: Vec<PathBuf>,
    text_key: String,
    source: Option<Source>,
    /// Bytes of the files that are done.
    done: u64,
    current: u64,
    skipped: u64,
}

impl Documents {
    /// Looks at all `files` first.
    ///
    /// # Errors
    /// A file that is not there, or a folder.
    pub fn open(files: &[PathBuf], text_key: &str) -> Result<Self> {
        for path in files {
            total_bytes(std::slice::from_ref(path))?;
        }
        let files = files.iter().rev().cloned().collect();
        let text_key = text_key.to_string();
        Ok(Self { files, text_key, source: None, done: 0, current: 0, skipped: 0 })
    }

    /// Documents that were left out so far.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    fn open_file(&self, path: &Path) -> Result<Source> {
        let extension = path.extension().map(|e| e.to_string_lossy().to_lowercase());
        match extension.as_deref() {
            Some("jsonl" | "ndjson") => Ok(Box::new(Lines::open(path, &self.text_key)?)),
            #[cfg(feature = "parquet")]
            Some("parquet") => Ok(Box::new(super::parquet::Rows::open(path, &self.text_key)?)),
            #[cfg(not(feature = "parquet"))]
            Some("parquet") => Err(DataError::Parquet {
                path: path.to_owned(),
                what: "this program was built without parquet: build with --features parquet"
                    .into(),
            }),
            _ => Ok(Box::new(Text::open(path)?)),
        }
    }

    fn advance(&mut self) -> Result<Option<Piece>> {
        loop {
            let Some(source) = &mut self.source else {
                let Some(path) = self.files.pop() else { return Ok(None) };
                self.source = Some(self.open_file(&path)?);
                continue;
            };
            let Some(found) = source.next() else {
                (self.source, self.done, self.current) = (None, self.done + self.current, 0);
                continue;
            };
            let (text, starts_document, bytes) = found?;
            self.current = bytes;
            if starts_document && text.trim().is_empty() {
                self.skipped += 1;
                continue;
            }
            return Ok(Some(Piece { text, starts_document, bytes_read: self.done + bytes }));
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Result<Piece>> {
        self.advance().transpose()
    }
}

/// Bytes of all files.
///
/// # Errors
/// A file that is not there, or a folder.
pub(super) fn total_bytes(files: &[PathBuf]) -> Result<u64> {
    let mut total = 0;
    for path in files {
        let found = std::fs::metadata(path).map_err(|e| IoError::file("read", path, e))?;
        if found.is_dir() {
            return Err(IoError::unsupported(path, "is a folder; name the files in it").into());
        }
        total += found.len();
    }
    Ok(total)
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(|e| IoError::file("read", path, e))?;
    Ok(BufReader::with_capacity(PIECE, file))
}

/// A file of plain text: one document.
struct Text {
    reader: BufReader<File>,
    path: PathBuf,
    /// Bytes read and not handed out.
    buffer: Vec<u8>,
    handed_out: u64,
    ended: bool,
    /// Whether a piece was handed out: an empty file is one empty document.
    begun: bool,
}

impl Text {
    fn open(path: &Path) -> Result<Self> {
        let reader = open(path)?;
        let path = path.to_owned();
        Ok(Self { reader, path, buffer: Vec::new(), handed_out: 0, ended: false, begun: false })
    }

    fn piece(&mut self) -> Result<Option<(String, bool, u64)>> {
        let mut searched = PIECE;
        let end = loop {
            if !self.ended && self.buffer.len() <= searched {
                let mut more = (&mut self.reader).take(PIECE as u64);
                let read = more.read_to_end(&mut self.buffer);
                let read = read.map_err(|e| IoError::file("read", &self.path, e))?;
                self.ended = read < PIECE;
                continue;
            }
            if self.ended && self.buffer.len() <= searched {
                break self.buffer.len();
            }
            let loose = |t: &[u8]| t[1] == b'\n' && !t[2].is_ascii_whitespace();
            let exact = |t: &[u8]| loose(t) && !t[0].is_ascii_whitespace();
            // The bytes before are looked at again: a line may have ended just there.
            let tail = &self.buffer[searched - 2..];
            let found = tail.windows(3).position(exact);
            match found.or_else(|| tail.windows(3).position(loose)) {
                Some(at) => break searched + at,
                None => searched = self.buffer.len(),
            }
        };
        if end == 0 && self.begun {
            return Ok(None);
        }
        let starts_document = !std::mem::replace(&mut self.begun, true);
        let rest = self.buffer.split_off(end);
        let bytes = std::mem::replace(&mut self.buffer, rest);
        let first = self.handed_out;
        self.handed_out += end as u64;
        let text = String::from_utf8(bytes).map_err(|e| DataError::Utf8 {
            path: self.path.clone(),
            offset: first + e.utf8_error().valid_up_to() as u64,
        })?;
        Ok(Some((text, starts_document, self.handed_out)))
    }
}

impl Iterator for Text {
    type Item = Result<(String, bool, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.piece().transpose()
    }
}

/// A file of JSON lines: a document each.
struct Lines {
    reader: BufReader<File>,
    path: PathBuf,
    key: String,
    line: u64,
    read: u64,
}

impl Lines {
    fn open(path: &Path, key: &str) -> Result<Self> {
        let reader = open(path)?;
        Ok(Self { reader, path: path.to_owned(), key: key.into(), line: 0, read: 0 })
    }

    fn document(&mut self) -> Result<Option<(String, bool, u64)>> {
        let mut bytes = Vec::new();
        let read = self.reader.read_until(b'\n', &mut bytes);
        let read = read.map_err(|e| IoError::file("read", &self.path, e))?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        self.read += read as u64;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return Ok(Some((String::new(), true, self.read)));
        }
        let fail =
            |what: String| DataError::Line { path: self.path.clone(), line: self.line, what };
        let value: serde_json::Value = serde_json::from_slice(&bytes)
            .map_err(|e| fail(format!("is no JSON ({e}); mend or remove the line")))?;
        let Some(object) = value.as_object() else {
            return Err(fail("is no JSON object; mend or remove the line".into()));
        };
        match object.get(&self.key) {
            Some(serde_json::Value::String(text)) => Ok(Some((text.clone(), true, self.read))),
            Some(_) => Err(fail(format!("{:?} is no string", self.key))),
            None => {
                let keys: Vec<&str> = object.keys().map(String::as_str).collect();
                let keys = keys.join(", ");
                Err(fail(format!("has no {:?}, but {keys}: set data.text_key", self.key)))
            }
        }
    }
}

impl Iterator for Lines {
    type Item = Result<(String, bool, u64)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.document().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(name: &str, bytes: &[u8]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        (folder, vec![path])
    }

    fn all(files: &[PathBuf]) -> Result<Vec<Piece>> {
        Documents::open(files, "text")?.collect()
    }

    #[test]
    fn pieces_of_a_text_are_the_text() {
        let mut text = String::new();
        while text.len() < 3 * PIECE + 1000 {
            text.push_str("Ein Fluß fließt,\n\n  und das Wasser\nist tief.\n");
        }
        let (_folder, files) = written("a.txt", text.as_bytes());
        let pieces = all(&files).unwrap();
        assert!(pieces.len() >= 3, "{}", pieces.len());
        assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), text);
        assert_eq!(pieces.iter().filter(|p| p.starts_document).count(), 1);
        assert_eq!(pieces.last().unwrap().bytes_read, text.len() as u64);
        for pair in pieces.windows(2) {
            assert!(pair[0].text.ends_with('\n'));
            assert!(!pair[1].text.starts_with(char::is_whitespace));
        }
        // Paragraphs are left whole where a line end stands alone.
        let paragraphs = "one line\n\nand another\nand more\n".repeat(PIECE / 16);
        let (_folder, files) = written("c.txt", paragraphs.as_bytes());
        let pieces = all(&files).unwrap();
        assert_eq!(pieces.iter().map(|p| p.text.as_str()).collect::<String>(), paragraphs);
        assert!(pieces.len() >= 2 && !pieces[0].text.ends_with("\n\n"));
        // A line end never comes: one piece.
        let (_folder, files) = written("b.txt", &vec![b'x'; 2 * PIECE + 5]);
        assert_eq!(all(&files).unwrap().len(), 1);
    }

    #[test]
    fn lines_are_documents_and_empty_ones_are_left_out() {
        let lines = "{\"text\": \"one\"}\n\n{\"text\": \"  \"}\n{\"id\": 1, \"text\": \"two\"}";
        let (_folder, files) = written("a.jsonl", lines.as_bytes());
        let mut documents = Documents::open(&files, "text").unwrap();
        let texts: Vec<String> = documents.by_ref().map(|p| p.unwrap().text).collect();
        assert_eq!(texts, ["one", "two"]);
        assert_eq!(documents.skipped(), 2);
        let (_folder, files) = written("empty.txt", b"");
        let mut documents = Documents::open(&files, "text").unwrap();
        assert!(documents.next().is_none());
        assert_eq!(documents.skipped(), 1);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        for (name, bytes, words) in [
            ("a.jsonl", &b"{\"text\": \"one\"}\n{\"body\": \"x\"}\n"[..], ["line 2", "body"]),
            ("a.jsonl", b"{\"text\": 4}\n", ["line 1", "no string"]),
            ("a.jsonl", b"{\"text\"\n", ["line 1", "JSON"]),
            ("a.txt", b"good\n\xff\xfe", ["byte 5", "UTF-8"]),
            ("a.parquet", b"PAR1", ["a.parquet", ""]),
        ] {
            let (_folder, files) = written(name, bytes);
            let error = all(&files).unwrap_err().to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
        }
        let folder = tempfile::tempdir().unwrap();
        assert!(all(&[folder.path().join("none.txt")]).is_err());
        assert!(all(&[folder.path().to_owned()]).unwrap_err().to_string().contains("folder"));
    }
}
