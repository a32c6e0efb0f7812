//! IDX, the format of MNIST and its kin, big-endian: two zeros, the type (8: bytes), the number of
//! dimensions, each of them as u32, the values. Images are `[count, height, width]`, labels
//! `[count]`.

use std::path::Path;

use super::{Images, read_file};
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

/// Bytes of a value of this type.
const UNSIGNED_BYTES: u8 = 8;
/// First bytes of a gzip file.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Dimensions and values of a file of bytes with `N` dimensions.
///
/// # Errors
/// A file that cannot be read, or that is compressed, truncated or something else.
pub(in crate::vision) fn read<const N: usize>(path: &Path) -> Result<([usize; N], Vec<u8>)> {
    let bytes = read_file(path)?;
    let fail = |what: String| Err(VisionError::data(path, what));
    if bytes.starts_with(&GZIP) {
        return fail("it is compressed; unpack it with gunzip --keep".into());
    }
    let (header, magic) = (4 + 4 * N, [0, 0, UNSIGNED_BYTES, N as u8]);
    if bytes.len() >= 4 && bytes[..4] != magic {
        return fail(format!(
            "it is no IDX file of bytes with {N} dimensions: it begins with {:?}, such a file begins \
             with {magic:?}; are images and labels in the right places?",
            &bytes[..4]
        ));
    }
    if bytes.len() < header {
        return fail(format!(
            "it is no IDX file: {} bytes are less than an IDX header of {header}; get it again",
            bytes.len()
        ));
    }
    let mut dims = [0usize; N];
    for (dim, bytes) in dims.iter_mut().zip(bytes[4..header].chunks_exact(4)) {
        *dim = bytes.iter().fold(0, |value, byte| (value << 8) | usize::from(*byte));
    }
    let values = dims.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
    let found = bytes.len() - header;
    if values != Some(found) {
        return fail(format!(
            "dimensions {dims:?} do not fit: they need {} values, there are {found}; it is \
             truncated or damaged, get it again",
            values.map_or("too many".into(), |v| v.to_string())
        ));
    }
    Ok((dims, bytes[header..].to_vec()))
}

/// The file of bytes with these dimensions.
pub(in crate::vision) fn encode<const N: usize>(dims: [usize; N], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, UNSIGNED_BYTES, N as u8];
    dims.iter().for_each(|dim| bytes.extend((*dim as u32).to_be_bytes()));
    bytes.extend(values);
    bytes
}

/// Images and their labels, of `classes` classes.
///
/// # Errors
/// Files that cannot be read, that are compressed, truncated or something else; numbers of images
/// and labels that differ; labels out of range; no image at all.
pub fn read_idx(images: &Path, labels: &Path, classes: usize) -> Result<Images> {
    let ([count, height, width], pixels) = read::<3>(images)?;
    let ([label_count], values) = read::<1>(labels)?;
    if count != label_count {
        return Err(VisionError::data(
            labels,
            format!(
                "{label_count} labels for the {count} images of {}; take files of the same set",
                images.display()
            ),
        ));
    }
    Images::new(labels, Shape { height, width, channels: 1 }, classes, pixels, values)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IDX file.
    fn idx(dims: &[u32], values: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, UNSIGNED_BYTES, dims.len() as u8];
        dims.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes.extend(values);
        bytes
    }

    fn read_both(images: &[u8], labels: &[u8]) -> Result<Images> {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("images"), folder.path().join("labels"));
        std::fs::write(&a, images).unwrap();
        std::fs::write(&b, labels).unwrap();
        read_idx(&a, &b, 10)
    }

    #[test]
    fn reads_what_it_should() {
        let pixels: Vec<u8> = (0..12).collect();
        let set = read_both(&idx(&[2, 2, 3], &pixels), &idx(&[2], &[9, 0])).unwrap();
        assert_eq!((set.count(), set.shape.height, set.shape.width), (2, 2, 3));
        assert_eq!((&set.pixels, &set.labels), (&pixels, &vec![9, 0]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let (images, labels) = (idx(&[2, 1, 1], &[1, 2]), idx(&[2], &[9, 0]));
        let says = |images: &[u8], labels: &[u8], part: &str| {
            let error = read_both(images, labels).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says(&images[..7], &labels, "less than an IDX header of 16");
        says(&images[..17], &labels, "there are 1");
        says(&labels, &images, "begins with [0, 0, 8, 1]");
        says(&[&GZIP[..], &images].concat(), &labels, "gunzip");
        says(&images, &idx(&[3], &[0, 1, 2]), "3 labels for the 2 images");
        says(&images, &idx(&[2], &[0, 10]), "label 1 is 10");
        says(&idx(&[0, 1, 1], &[]), &idx(&[0], &[]), "no image");
        says(&idx(&[u32::MAX; 3], &[]), &labels, "too many");
        for cut in 0..images.len() {
            assert!(read_both(&images[..cut], &labels).is_err(), "cut at {cut}");
        }
        let missing = read_idx(Path::new("/no/images"), Path::new("/no/labels"), 10).unwrap_err();
        assert!(missing.to_string().contains("/no/images"));
    }
}
