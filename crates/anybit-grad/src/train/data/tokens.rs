//! Token files: texts tokenized once, mapped into memory from then on.
//!
//! `NAME.tokens` is tokens one after another, u16 where the vocabulary allows it and u32 where not,
//! little-endian; every document begins with BOS where there is one. `NAME.tokens.json` says what
//! they are of. Both are written beside and renamed, the second last.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anybit_io::IoError;
use anybit_io::atomic::{write_bytes, write_file};
use anybit_io::safetensors_file::map_file;
use anybit_io::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};

use super::documents::total_bytes;
use super::{DataError, Documents, Result};

/// What a token file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    /// Hash of the texts, the tokenizer and the settings.
    key: String,
    /// Tokens.
    tokens: usize,
    /// Bytes of a token.
    width: usize,
    /// Documents.
    documents: u64,
    /// Documents of white space alone, left out.
    skipped: u64,
    /// blake3 of the tokens.
    hash: String,
}

/// Tokens of texts.
#[derive(Debug)]
pub struct TokenFile {
    path: PathBuf,
    header: Header,
    /// `None` for no tokens, which cannot be mapped.
    map: Option<std::sync::Arc<memmap2::Mmap>>,
}

impl TokenFile {
    /// Tokenizes `files` into the file at `path`, unless it holds just that; `progress` hears bytes
    /// of text read and in all.
    ///
    /// # Errors
    /// Texts that cannot be read, a disk that is full.
    pub fn prepare(
        path: &Path,
        files: &[PathBuf],
        text_key: &str,
        tokenizer: &Tokenizer,
        bos: Option<u32>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let key = key(files, text_key, tokenizer, bos)?;
        // The key comes first: what is there of other texts is replaced, whatever its length.
        if let Some(header) = read_header(path).filter(|header| header.key == key)
            && let Some(file) = Self::open(path, header)?
        {
            file.verify()?;
            return Ok(file);
        }
        let vocab = tokenizer.vocab_size();
        let width = if vocab <= 1 << 16 { 2 } else { 4 };
        let total = total_bytes(files)?;
        let mut documents = Documents::open(files, text_key)?;
        let (mut hash, mut tokens, mut count) = (blake3::Hasher::new(), 0, 0);
        let mut failed = None;
        let written = write_file(path, |out| {
            for piece in documents.by_ref() {
                let piece = match piece {
                    Ok(piece) => piece,
                    Err(error) => {
                        let what = error.to_string();
                        failed = Some(error);
                        return Err(IoError::unsupported(path, what));
                    }
                };
                let mut ids = tokenizer.encode(&piece.text, false)?;
                if piece.starts_document {
                    count += 1;
                    ids.splice(0..0, bos);
                }
                // Vocabularies with gaps have ids beyond their size; u16 would cut them short.
                if let Some(id) = ids.iter().find(|id| **id as usize >= vocab) {
                    let what = format!(
                        "token {id} is outside the tokenizer's vocabulary of {vocab}: its ids have \
                         gaps; number them without"
                    );
                    return Err(IoError::unsupported(path, what));
                }
                let mut bytes = Vec::with_capacity(ids.len() * width);
                ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()[..width]));
                tokens += ids.len();
                hash.update(&bytes);
                out.write_all(&bytes).map_err(|e| IoError::file("write", path, e))?;
                progress(piece.bytes_read, total);
            }
            Ok(())
        });
        if let Some(error) = failed {
            return Err(error);
        }
        written?;
        let hash = hash.finalize().to_hex().to_string();
        let skipped = documents.skipped();
        let header = Header { key, tokens, width, documents: count, skipped, hash };
        let json = serde_json::to_string_pretty(&header)
            .map_err(|e| IoError::damaged(path, e.to_string()))?;
        write_bytes(&header_path(path), json.as_bytes())?;
        let map = map(path)?;
        Ok(Self { path: path.to_owned(), header, map })
    }

    /// The file at `path`, if there is one; it must be as long as its header says.
    fn open(path: &Path, header: Header) -> Result<Option<Self>> {
        let Ok(found) = fs::metadata(path) else { return Ok(None) };
        if header.tokens.checked_mul(header.width).map(|n| n as u64) != Some(found.len()) {
            return Err(DataError::Damaged { path: path.to_owned() });
        }
        Ok(Some(Self { path: path.to_owned(), map: map(path)?, header }))
    }

    fn verify(&self) -> Result<()> {
        match blake3::hash(self.bytes()).to_hex().as_str() == self.header.hash {
            true => Ok(()),
            false => Err(DataError::Damaged { path: self.path.clone() }),
        }
    }

    fn bytes(&self) -> &[u8] {
        self.map.as_deref().map_or(&[], |map| &map[..])
    }

    /// Hash of what the tokens are of.
    pub fn key(&self) -> &str {
        &self.header.key
    }

    /// blake3 of the tokens, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.header.hash
    }

    /// Tokens.
    pub fn len(&self) -> usize {
        self.header.tokens
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sequences of `context` tokens with the one after.
    pub fn windows(&self, context: usize) -> usize {
        self.len().saturating_sub(1) / context.max(1)
    }

    /// Adds the `context + 1` tokens of a sequence to `out`.
    pub fn window(&self, index: usize, context: usize, out: &mut Vec<u32>) {
        let width = self.header.width;
        let first = index * context * width;
        let tokens = self.bytes()[first..first + (context + 1) * width].chunks_exact(width);
        out.extend(tokens.map(|b| match *b {
            [low, high] => u32::from(u16::from_le_bytes([low, high])),
            _ => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        }));
    }
}

/// What stands beside the file at `path`; `None` where it says nothing that we know.
fn read_header(path: &Path) -> Option<Header> {
    let text = fs::read_to_string(header_path(path)).ok()?;
    serde_json::from_str::<Header>(&text).ok().filter(|header| matches!(header.width, 2 | 4))
}

fn header_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".json");
    path.with_file_name(name)
}

fn map(path: &Path) -> Result<Option<std::sync::Arc<memmap2::Mmap>>> {
    let empty = fs::metadata(path).is_ok_and(|m| m.len() == 0);
    Ok(if empty { None } else { Some(map_file(path)?) })
}

/// Hash of everything that the tokens depend on.
fn key(
    files: &[PathBuf],
    text_key: &str,
    tokenizer: &Tokenizer,
    bos: Option<u32>,
) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    for path in files {
        let file = File::open(path).map_err(|e| IoError::file("read", path, e))?;
        let mut own = blake3::Hasher::new();
        own.update_reader(file).map_err(|e| IoError::file("read", path, e))?;
        hash.update(own.finalize().as_bytes());
        let extension = path.extension().unwrap_or_default();
        hash.update(extension.as_encoded_bytes());
    }
    hash.update(text_key.as_bytes());
    hash.update(&bos.map_or(u64::MAX, u64::from).to_le_bytes());
    for id in 0..tokenizer.vocab_size() as u32 {
        hash.update(tokenizer.token(id).unwrap_or_default().as_bytes());
        hash.update(&[0]);
    }
    // What splits words is not in the vocabulary: a sentence tells tokenizers apart.
    let sample = "It's 12345 o'clock;\n\n  naïve — don’t\tcount: x_1==2.5e-3!  \n";
    tokenizer.encode(sample, false)?.iter().for_each(|id| {
        hash.update(&id.to_le_bytes());
    });
    Ok(hash.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anybit_io::tokenizer::{BpeOptions, train_bpe};

    struct Lab {
        folder: tempfile::TempDir,
        tokenizer: Tokenizer,
    }

    impl Lab {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut texts = ["the rain in the plain\n".repeat(20)].into_iter();
            let trained = train_bpe(&mut texts, &BpeOptions::new(270)).unwrap();
            trained.save(folder.path()).unwrap();
            let tokenizer = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
            Self { folder, tokenizer }
        }

        fn file(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        /// The tokens of `a.jsonl`, and whether texts were read for them.
        fn prepare(&self) -> Result<(TokenFile, bool)> {
            let mut read = false;
            let files = [self.file("a.jsonl")];
            let path = self.file("a.tokens");
            let bos = self.tokenizer.id_of("<s>");
            let file =
                TokenFile::prepare(&path, &files, "text", &self.tokenizer, bos, &mut |_, _| {
                    read = true;
                })?;
            Ok((file, read))
        }
    }

    #[test]
    fn texts_are_tokenized_once_and_again_when_they_change() {
        let lab = Lab::new();
        fs::write(
            lab.file("a.jsonl"),
            "{\"text\":\"the rain\"}\n{\"text\":\" \"}\n{\"text\":\"in\"}\n",
        )
        .unwrap();
        let (file, read) = lab.prepare().unwrap();
        assert!(read);
        let ids = |text: &str| lab.tokenizer.encode(text, false).unwrap();
        let want = [vec![0], ids("the rain"), vec![0], ids("in")].concat();
        let mut all = Vec::new();
        file.window(0, want.len() - 1, &mut all);
        assert_eq!(all, want);
        assert_eq!((file.len(), file.header.documents, file.header.skipped), (want.len(), 2, 1));
        assert_eq!(file.windows(2), (want.len() - 1) / 2);
        assert!(!lab.prepare().unwrap().1);
        fs::write(lab.file("a.jsonl"), "{\"text\":\"plain\"}\n").unwrap();
        assert!(lab.prepare().unwrap().1);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let lab = Lab::new();
        fs::write(lab.file("a.jsonl"), "{\"text\":\"the rain in the plain\"}\n").unwrap();
        drop(lab.prepare().unwrap());
        let mut bytes = fs::read(lab.file("a.tokens")).unwrap();
        bytes[2] ^= 1;
        fs::write(lab.file("a.tokens"), &bytes).unwrap();
        let error = lab.prepare().unwrap_err().to_string();
        assert!(error.contains("a.tokens") && error.contains("delete"), "{error}");
        fs::write(lab.file("a.tokens"), &bytes[..3]).unwrap();
        assert!(matches!(lab.prepare(), Err(DataError::Damaged { .. })));
        // Of other texts it does not matter: a run that stopped between the two files goes on.
        fs::write(lab.file("a.jsonl"), "{\"text\":\"plain\"}\n").unwrap();
        assert!(lab.prepare().unwrap().1);
        fs::remove_file(lab.file("a.tokens")).unwrap();
        assert!(lab.prepare().unwrap().1);
    }
}
