//! Hidden states of all sequences between the layers, in memory or in a file: what lets
//! [`crate::fisher`] go back through a model one block at a time. Slot `l` of a sequence holds the
//! input of block `l`, and later the gradient with respect to it.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anybit_io::IoError;
use anybit_io::atomic::check_space;

use crate::Result;

enum Place {
    Memory(Vec<Vec<f32>>),
    File { file: File, path: PathBuf },
}

/// `[slots, sequences]` buffers, each sequence with a length of its own.
pub(crate) struct HiddenStore {
    lengths: Vec<usize>,
    place: Place,
}

impl HiddenStore {
    /// Room for `slots` buffers of each of `lengths` values: in memory, or in a file in the folder
    /// `spill` that goes with the store.
    ///
    /// # Errors
    /// The folder cannot be written to, or its disk is too small.
    pub fn new(slots: usize, lengths: Vec<usize>, spill: Option<&Path>) -> Result<Self> {
        let place = match spill {
            None => Place::Memory(vec![Vec::new(); slots * lengths.len()]),
            Some(folder) => {
                let bytes = 4 * slots * lengths.iter().sum::<usize>();
                check_space(folder, bytes as u64)?;
                create(folder)?
            }
        };
        Ok(Self { lengths, place })
    }

    /// Where a buffer starts in the file, in bytes.
    fn offset(&self, slot: usize, sequence: usize) -> u64 {
        let slot_len: usize = self.lengths.iter().sum();
        let before: usize = self.lengths[..sequence].iter().sum();
        4 * (slot * slot_len + before) as u64
    }

    /// Stores `data`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn write(&mut self, slot: usize, sequence: usize, data: &[f32]) -> Result<()> {
        assert_eq!(data.len(), self.lengths[sequence], "a sequence has another length");
        let offset = self.offset(slot, sequence);
        match &mut self.place {
            Place::Memory(buffers) => {
                let buffer = &mut buffers[slot * self.lengths.len() + sequence];
                buffer.clear();
                buffer.extend_from_slice(data);
            }
            Place::File { file, path } => {
                let bytes: &[u8] = bytemuck::cast_slice(data);
                let written =
                    file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(bytes));
                written.map_err(|e| IoError::file("write", path, e))?;
            }
        }
        Ok(())
    }

    /// Reads what was stored last into `out`.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn read(&mut self, slot: usize, sequence: usize, out: &mut [f32]) -> Result<()> {
        let offset = self.offset(slot, sequence);
        match &mut self.place {
            Place::Memory(buffers) => {
                out.copy_from_slice(&buffers[slot * self.lengths.len() + sequence]);
            }
            Place::File { file, path } => {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
                let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(bytes));
                read.map_err(|e| IoError::file("read", path, e))?;
            }
        }
        Ok(())
    }
}

fn create(folder: &Path) -> Result<Place> {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = folder.join(format!("anybit-hidden-{}-{count}.spill", std::process::id()));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .map_err(|e| IoError::file("create", &path, e))?;
    // Where an open file can lose its name, nothing stays behind even if we are killed.
    #[cfg(unix)]
    let _ = fs::remove_file(&path);
    Ok(Place::File { file, path })
}

impl Drop for HiddenStore {
    fn drop(&mut self) {
        if let Place::File { path, .. } = &self.place {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_file_hold_the_same_and_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for spill in [None, Some(folder.path())] {
            let mut store = HiddenStore::new(3, vec![2, 3], spill).unwrap();
            for slot in 0..3 {
                store.write(slot, 0, &[slot as f32, 1.0]).unwrap();
                store.write(slot, 1, &[slot as f32, 2.0, 3.0]).unwrap();
            }
            store.write(1, 0, &[7.0, 8.0]).unwrap();
            let (mut a, mut b) = ([0.0; 2], [0.0; 3]);
            store.read(1, 0, &mut a).unwrap();
            store.read(2, 1, &mut b).unwrap();
            assert_eq!((a, b), ([7.0, 8.0], [2.0, 2.0, 3.0]));
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = HiddenStore::new(1, vec![4], Some(Path::new("/no/such/folder"))).err().unwrap();
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
    }
}
