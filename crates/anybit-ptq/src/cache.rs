//! What is expensive and serves many goals: sensitivities and error tables, in a folder named by a
//! hash of everything that they depend on. Files are written beside and renamed, so a run that is
//! killed leaves whole files or none, and the next run continues where they end.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anybit_io::{IoError, atomic};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Result;

/// Raised whenever the same inputs give other contents, so that those of an older program are not
/// taken for this one's.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " 2");

/// One folder of the cache.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
    /// Held while the folder may be written to.
    _lock: Arc<Lock>,
}

/// One process at a time works in a folder.
#[derive(Debug)]
struct Lock(fs::File);

impl Lock {
    fn take(folder: &Path) -> Result<Self> {
        let path = folder.join("lock");
        let file = fs::OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|e| IoError::file("create", &path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(fs::TryLockError::Error(e)) => Err(IoError::file("lock", &path, e).into()),
            Err(fs::TryLockError::WouldBlock) => {
                let what = "another process works in it: wait for that, or give another --cache";
                let busy = std::io::Error::new(std::io::ErrorKind::WouldBlock, what);
                Err(IoError::file("use", folder, busy).into())
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = self.0.unlock();
    }
}

impl Cache {
    /// The folder below `root` for what depends on `parts`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(root: &Path, kind: &str, parts: &[&str]) -> Result<Self> {
        let mut hasher = blake3::Hasher::new();
        for part in [VERSION].iter().chain(parts) {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        let key = hasher.finalize().to_hex();
        let folder = root.join(format!("{kind}-{}", &key[..24]));
        fs::create_dir_all(&folder).map_err(|e| IoError::file("create", &folder, e))?;
        let lock = Arc::new(Lock::take(&folder)?);
        Ok(Self { folder, _lock: lock })
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of a file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Reads a value; none when it is not there.
    ///
    /// # Errors
    /// A file that cannot be read, or that holds something else: delete the folder then.
    pub fn read<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let path = self.path(name);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(|e| IoError::file("read", &path, e))?;
        let value = serde_json::from_slice(&text).map_err(|e| {
            let what = format!("{e}; it is only a cache: delete {}", self.folder.display());
            IoError::damaged(&path, what)
        })?;
        Ok(Some(value))
    }

    /// Writes a value.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write<T: Serialize>(&self, name: &str, value: &T) -> Result<()> {
        let path = self.path(name);
        let text = serde_json::to_vec(value).map_err(|e| IoError::damaged(&path, e.to_string()))?;
        Ok(atomic::write_bytes(&path, &text)?)
    }
}
