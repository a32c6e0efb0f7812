//! CIFAR-10's binary files: records of a label and 32×32 pixels, all red values first, then green,
//! then blue; no header. Pixels become `[height, width, channels]`.

use std::path::{Path, PathBuf};

use super::{Images, read_file};
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

const SHAPE: Shape = Shape { height: 32, width: 32, channels: 3 };
/// Classes of CIFAR-10.
const CLASSES: usize = 10;

/// The images of some files, one after another.
///
/// # Errors
/// Files that cannot be read or are not made of whole records; labels out of range; no image at
/// all.
pub fn read_cifar10(files: &[PathBuf]) -> Result<Images> {
    let (mut pixels, mut labels) = (Vec::new(), Vec::new());
    for path in files {
        append(path, &mut pixels, &mut labels)?;
    }
    let first = files.first().map_or(Path::new("CIFAR-10"), PathBuf::as_path);
    Images::new(first, SHAPE, CLASSES, pixels, labels)
}

fn append(path: &Path, pixels: &mut Vec<u8>, labels: &mut Vec<u8>) -> Result<()> {
    let bytes = read_file(path)?;
    let record = 1 + SHAPE.values();
    if bytes.is_empty() || !bytes.len().is_multiple_of(record) {
        let what = format!(
            "{} bytes are not whole records of {record}: it is truncated, or not the binary \
             version of CIFAR-10; download that again",
            bytes.len()
        );
        return Err(VisionError::data(path, what));
    }
    for (index, record) in bytes.chunks_exact(record).enumerate() {
        if usize::from(record[0]) >= CLASSES {
            let what = format!(
                "record {index} has the label {}, there are {CLASSES} classes; it is not the \
                 binary version of CIFAR-10, or damaged",
                record[0]
            );
            return Err(VisionError::data(path, what));
        }
        labels.push(record[0]);
        let planes = &record[1..];
        let size = SHAPE.pixels();
        pixels.extend((0..SHAPE.values()).map(|i| planes[i % 3 * size + i / 3]));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(label: u8) -> Vec<u8> {
        let planes = (0..3u8).flat_map(|plane| (0..1024).map(move |i| plane * 50 + (i % 50) as u8));
        std::iter::once(label).chain(planes).collect()
    }

    #[test]
    fn planes_become_pixels_and_faults_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data_batch_1.bin");
        let read = |bytes: Vec<u8>| {
            std::fs::write(&path, bytes).unwrap();
            read_cifar10(&[path.clone(), path.clone()])
        };
        let set = read([record(3), record(7)].concat()).unwrap();
        assert_eq!(set.labels, [3, 7, 3, 7]);
        assert_eq!(set.pixels[..6], [0, 50, 100, 1, 51, 101]);
        let says = |bytes: Vec<u8>, part: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says(record(3)[..3000].to_vec(), "3000 bytes are not whole records of 3073");
        says(Vec::new(), "0 bytes");
        says([record(1), record(10)].concat(), "record 1 has the label 10");
        assert!(read_cifar10(&[]).unwrap_err().to_string().contains("no image"));
    }
}
