//! Outputs appear whole or not at all: files and folders are written beside their place under a
//! `.partial` name, flushed, and renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{IoError, Result};

/// `path` with `.partial` appended to its last component.
pub fn partial_path(path: &Path) -> PathBuf {
    with_suffix(path, ".partial")
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// Writes a file through `write`; on any error nothing is left and the old file, if any, stays.
/// A link is followed, and a device or pipe (`/dev/null`, `/dev/stdout`) is written to, never
/// replaced.
///
/// # Errors
/// The first error of `write`, or what the operating system refuses.
pub fn write_file(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    if is_stream(path) {
        return write_stream(path, write);
    }
    let path = &fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let partial = partial_path(path);
    let result = (|| {
        let file = File::create(&partial).map_err(|e| IoError::file("create", path, e))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        write(&mut out)?;
        let file = out.into_inner().map_err(|e| IoError::file("write", path, e.into_error()))?;
        file.sync_all().map_err(|e| IoError::file("write", path, e))?;
        fs::rename(&partial, path).map_err(|e| IoError::file("create", path, e))
    })();
    if result.is_err() {
        let _ = fs::remove_file(&partial);
    }
    result
}

/// Whether what is at `path` takes bytes but is no file that could be renamed over.
fn is_stream(path: &Path) -> bool {
    let exists = fs::metadata(path).is_ok_and(|found| !found.is_dir());
    exists && (path.starts_with("/dev") || !fs::metadata(path).is_ok_and(|found| found.is_file()))
}

fn write_stream(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let stream = File::options().write(true).open(path);
    let mut out = BufWriter::new(stream.map_err(|e| IoError::file("open", path, e))?);
    write(&mut out)?;
    out.flush().map_err(|e| IoError::file("write", path, e))
}

/// Writes `bytes` to a file, whole or not at all.
///
/// # Errors
/// What the operating system refuses.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |out| out.write_all(bytes).map_err(|e| IoError::file("write", path, e)))
}

/// Fails when `path` is there and may not be replaced, or when it has no name of its own (`.`,
/// `..`, `/`).
///
/// # Errors
/// [`IoError::Exists`], [`IoError::Unsupported`].
pub fn check_absent(path: &Path, force: bool) -> Result<()> {
    if path.file_name().is_none() {
        return Err(IoError::unsupported(path, "not a name for an output; give it one"));
    }
    if path.exists() && !force {
        return Err(IoError::Exists { path: path.to_owned() });
    }
    Ok(())
}

/// Fails when the disk below `path` has fewer than `needed` bytes free.
///
/// # Errors
/// [`IoError::NoSpace`].
pub fn check_space(path: &Path, needed: u64) -> Result<()> {
    match free_space(path) {
        Some(free) if free < needed => {
            Err(IoError::NoSpace { path: path.to_owned(), needed, free })
        }
        _ => Ok(()),
    }
}

/// Bytes free on the disk that holds `path` or its nearest existing parent; `None` where the
/// system does not say.
#[cfg(unix)]
pub fn free_space(path: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let absolute = std::path::absolute(path).ok()?;
    let existing = absolute.ancestors().find(|p| p.exists())?;
    let name = std::ffi::CString::new(existing.as_os_str().as_bytes()).ok()?;
    // SAFETY: `name` is a valid C string and `stat` is large enough; it is read only on success.
    let stat = unsafe {
        let mut stat = std::mem::zeroed::<libc::statvfs>();
        (libc::statvfs(name.as_ptr(), &mut stat) == 0).then_some(stat)
    }?;
    Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
}

/// Bytes free on the disk: not known on this system.
#[cfg(not(unix))]
pub fn free_space(_path: &Path) -> Option<u64> {
    None
}

/// A folder under construction at `PATH.partial`; dropped without [`Self::finish`] it stays only
/// when [`Self::keep`] was called.
pub struct PartialFolder {
    path: PathBuf,
    target: PathBuf,
    force: bool,
    keep: bool,
    finished: bool,
    _lock: File,
}

impl PartialFolder {
    /// Starts (or, with `resume`, continues) the folder that will become `target`.
    ///
    /// # Errors
    /// The output exists and may not be replaced (`force`), the folder cannot be written, or
    /// another process is writing it.
    pub fn create(target: &Path, resume: bool, force: bool) -> Result<Self> {
        check_absent(target, force)?;
        let path = partial_path(target);
        let fail = |e| IoError::file("create", &path, e);
        let fresh = !path.exists();
        fs::create_dir_all(&path).map_err(fail)?;
        let lock_path = path.join("lock");
        let lock = File::create(&lock_path).map_err(fail)?;
        if lock.try_lock().is_err() {
            return Err(IoError::Busy { path });
        }
        if !resume && !fresh {
            for entry in fs::read_dir(&path).map_err(fail)?.flatten() {
                if entry.path() != lock_path {
                    let gone = match entry.path().is_dir() {
                        true => fs::remove_dir_all(entry.path()),
                        false => fs::remove_file(entry.path()),
                    };
                    gone.map_err(|e| IoError::file("remove", &entry.path(), e))?;
                }
            }
        }
        let (target, keep) = (target.to_owned(), resume && !fresh);
        Ok(Self { path, target, force, keep, finished: false, _lock: lock })
    }

    /// Where files go for now.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on the folder survives an error, to be resumed.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Whether the place is free, or may be replaced.
    ///
    /// # Errors
    /// It is taken: another run may have finished meanwhile.
    pub fn check_free(&self) -> Result<()> {
        check_absent(&self.target, self.force)
    }

    /// Moves the folder to its place, replacing what is there.
    ///
    /// # Errors
    /// What the operating system refuses.
    pub fn finish(mut self) -> Result<()> {
        self.check_free()?;
        let fail = |e| IoError::file("create", &self.target, e);
        let _ = fs::remove_file(self.path.join("lock"));
        let old = with_suffix(&self.target, ".partial-replaced");
        let replacing = self.target.exists();
        if replacing {
            fs::rename(&self.target, &old).map_err(fail)?;
        }
        if let Err(e) = fs::rename(&self.path, &self.target) {
            if replacing {
                let _ = fs::rename(&old, &self.target);
            }
            return Err(fail(e));
        }
        if replacing {
            let _ = remove_any(&old);
        }
        self.finished = true;
        Ok(())
    }
}

fn remove_any(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

impl Drop for PartialFolder {
    fn drop(&mut self) {
        if !self.finished && !self.keep {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_bytes(&path, b"old").unwrap();
        let failed = write_file(&path, |out| {
            out.write_all(b"half").unwrap();
            Err(IoError::damaged(&path, "on purpose"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_and_devices_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, sink) =
            (dir.path().join("file"), dir.path().join("link"), dir.path().join("sink"));
        write_bytes(&file, b"old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        std::os::unix::fs::symlink("/dev/null", &sink).unwrap();
        write_bytes(&link, b"new").unwrap();
        write_bytes(&sink, b"gone").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(link.is_symlink() && sink.is_symlink());
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn folders_replace_whole_or_vanish() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("out");
        let folder = PartialFolder::create(&target, false, false).unwrap();
        write_bytes(&folder.path().join("x"), b"1").unwrap();
        assert!(PartialFolder::create(&target, true, false).is_err(), "locked");
        folder.finish().unwrap();
        assert_eq!(fs::read(target.join("x")).unwrap(), b"1");
        assert!(check_absent(&target, false).is_err() && check_absent(&target, true).is_ok());
        drop(PartialFolder::create(&target, false, true).unwrap());
        assert!(!partial_path(&target).exists());
        let mut kept = PartialFolder::create(&target, false, true).unwrap();
        kept.keep();
        drop(kept);
        assert!(partial_path(&target).exists());
    }

    #[test]
    fn more_than_the_disk_has_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_space(&dir.path().join("not/yet/there"), 1).is_ok());
        assert!(matches!(check_space(dir.path(), u64::MAX), Err(IoError::NoSpace { .. })));
    }
}
