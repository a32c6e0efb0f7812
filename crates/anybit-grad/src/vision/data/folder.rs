//! Folders of PNG files, a class each: `FOLDER/train/CLASS/*.png` and `FOLDER/test/CLASS/*.png`.
//!
//! Classes are numbered in the order of their names, images follow by class and name. All have one
//! size, and are grey or RGB; palettes and grey of fewer bits are expanded to bytes, of 16 bits the
//! upper eight are taken. Files of other names are passed over.

use std::fs;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use anybit_io::IoError;
use png::{ColorType, Decoder, Transformations};
use rayon::prelude::*;

use super::{Images, read_file};
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

/// Largest height and width.
const LARGEST: u32 = 4096;
/// Labels are bytes.
const CLASSES: usize = 256;

/// Training and test images.
///
/// # Errors
/// No folder `train` or `test`, classes that differ between them, a class without images, files
/// that are no PNG, have transparency, or another size than the first.
pub fn read_folder(folder: &Path) -> Result<(Images, Images)> {
    let (train, test) = (folder.join("train"), folder.join("test"));
    let (classes, others) = (class_names(&train)?, class_names(&test)?);
    let missing = |name: &&String, names: &[String]| !names.contains(*name);
    if let Some(name) = classes.iter().find(|name| missing(name, &others)) {
        return Err(VisionError::data(&test, format!("the class {name} of train is missing")));
    }
    if let Some(name) = others.iter().find(|name| missing(name, &classes)) {
        return Err(VisionError::data(&train, format!("the class {name} of test is missing")));
    }
    Ok((read_part(&train, &classes)?, read_part(&test, &classes)?))
}

/// Names in a folder, sorted; hidden ones are passed over.
fn names(folder: &Path) -> Result<Vec<String>> {
    let fail = |e| IoError::file("read", folder, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(fail)? {
        let Ok(name) = entry.map_err(fail)?.file_name().into_string() else {
            let what = "a name in it is no text in UTF-8; give it another";
            return Err(VisionError::data(folder, what));
        };
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn class_names(part: &Path) -> Result<Vec<String>> {
    if !part.is_dir() {
        let what = "there is no such folder; images are expected at train/CLASS/*.png and \
                    test/CLASS/*.png";
        return Err(VisionError::data(part, what));
    }
    let mut classes = names(part)?;
    classes.retain(|name| part.join(name).is_dir());
    if !(2..=CLASSES).contains(&classes.len()) {
        let what = format!("{} folders of classes; 2 to {CLASSES} are needed", classes.len());
        return Err(VisionError::data(part, what));
    }
    Ok(classes)
}

/// The images of one of `train` and `test`.
fn read_part(part: &Path, classes: &[String]) -> Result<Images> {
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for (label, class) in classes.iter().enumerate() {
        let found = png_files(&part.join(class))?;
        labels.resize(labels.len() + found.len(), label as u8);
        files.extend(found);
    }
    // The first error in the order of the files, on any number of threads.
    let decoded: Vec<Result<(Shape, Vec<u8>)>> = files.par_iter().map(|f| decode(f)).collect();
    let (mut first, mut pixels) = (None, Vec::new());
    for (file, decoded) in files.iter().zip(decoded) {
        let (shape, values) = decoded?;
        let (of_first, path) = *first.get_or_insert((shape, file));
        if shape != of_first {
            let what = format!(
                "{}, but {} has {}; bring all images to one size and kind",
                size(shape),
                path.display(),
                size(of_first)
            );
            return Err(VisionError::data(file, what));
        }
        pixels.extend(values);
    }
    let shape = first.map_or(Shape { height: 0, width: 0, channels: 1 }, |first| first.0);
    Images::new(part, shape, classes.len(), pixels, labels)
}

/// A shape in words.
fn size(shape: Shape) -> String {
    let Shape { height, width, channels } = shape;
    format!("{width}×{height} pixels of {channels} values")
}

fn png_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_png = |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("png"));
    let files: Vec<PathBuf> =
        names(folder)?.into_iter().map(|name| folder.join(name)).filter(is_png).collect();
    match files.is_empty() {
        true => {
            let what = "there is no .png in this class; remove the folder or fill it";
            Err(VisionError::data(folder, what))
        }
        false => Ok(files),
    }
}

/// Shape and pixels of a file.
fn decode(path: &Path) -> Result<(Shape, Vec<u8>)> {
    let fail = |what: String| VisionError::data(path, what);
    let broken =
        |e: png::DecodingError| fail(format!("it is no PNG, or damaged ({e}); make it again"));
    let mut decoder = Decoder::new(Cursor::new(read_file(path)?));
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let (width, height) = (reader.info().width, reader.info().height);
    if width.max(height) > LARGEST {
        let what = format!("{width}×{height} pixels; at most {LARGEST} by {LARGEST} are read");
        return Err(fail(what));
    }
    let mut pixels = vec![0; reader.output_buffer_size()];
    let frame = reader.next_frame(&mut pixels).map_err(broken)?;
    pixels.truncate(frame.buffer_size());
    let channels = match frame.color_type {
        ColorType::Grayscale => 1,
        ColorType::Rgb => 3,
        other => {
            return Err(fail(format!("its colours are {other:?}; store it as grey or RGB")));
        }
    };
    Ok((Shape { height: height as usize, width: width as usize, channels }, pixels))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A PNG of bytes.
    fn encoded(color: ColorType, width: u32, height: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(color);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        bytes
    }

    fn grey(value: u8) -> Vec<u8> {
        encoded(ColorType::Grayscale, 2, 3, &[value; 6])
    }

    fn put(folder: &Path, name: &str, bytes: &[u8]) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    /// Two classes, with two images and one to train on and one each to test.
    fn small() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in [
            ("train/b/0.png", 3),
            ("train/a/2.PNG", 2),
            ("train/a/1.png", 1),
            ("test/a/x.png", 4),
            ("test/b/x.png", 5),
        ] {
            put(dir.path(), name, &grey(value));
        }
        put(dir.path(), "train/a/notes.txt", b"mine");
        put(dir.path(), "train/README.md", b"mine");
        dir
    }

    #[test]
    fn classes_and_images_follow_their_names() {
        let dir = small();
        let (train, test) = read_folder(dir.path()).unwrap();
        let shape = Shape { height: 3, width: 2, channels: 1 };
        assert_eq!((train.shape, train.classes), (shape, 2));
        assert_eq!((train.labels, test.labels), (vec![0, 0, 1], vec![0, 1]));
        let first: Vec<u8> = train.pixels.iter().step_by(6).copied().collect();
        assert_eq!((first, train.pixels.len()), (vec![1, 2, 3], 18));
        assert_eq!(test.pixels[..7], [4, 4, 4, 4, 4, 4, 5]);
    }

    #[test]
    fn colours_lie_beside_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let pixels: Vec<u8> = (0..12).collect();
        for name in ["train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"] {
            put(dir.path(), name, &encoded(ColorType::Rgb, 2, 2, &pixels));
        }
        let (train, _) = read_folder(dir.path()).unwrap();
        assert_eq!((train.shape.channels, &train.pixels[..12]), (3, &pixels[..]));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let says = |change: &dyn Fn(&Path), parts: [&str; 2]| {
            let dir = small();
            change(dir.path());
            let error = read_folder(dir.path()).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        };
        let remove = |path: PathBuf| fs::remove_dir_all(path).unwrap();
        says(&|dir| remove(dir.join("train")), ["train: ", "no such folder"]);
        says(&|dir| remove(dir.join("test")), ["test: ", "no such folder"]);
        says(&|dir| remove(dir.join("test/b")), ["test: ", "1 folders of classes"]);
        says(&|dir| put(dir, "test/c/0.png", &grey(1)), ["train: ", "class c of test is missing"]);
        says(&|dir| put(dir, "train/c/0.png", &grey(1)), ["test: ", "class c of train is missing"]);
        let empty = |dir: &Path| fs::remove_file(dir.join("train/b/0.png")).unwrap();
        says(&empty, ["train/b: ", "no .png"]);
        let wide = encoded(ColorType::Grayscale, 3, 2, &[0; 6]);
        says(&|dir| put(dir, "train/b/0.png", &wide), ["b/0.png: 3×2 pixels", "1.png has 2×3"]);
        let colour = encoded(ColorType::Rgb, 2, 3, &[0; 18]);
        says(&|dir| put(dir, "train/b/0.png", &colour), ["b/0.png: ", "of 3 values"]);
        let alpha = encoded(ColorType::Rgba, 2, 3, &[0; 24]);
        says(&|dir| put(dir, "test/a/x.png", &alpha), ["x.png: ", "Rgba; store it as grey or RGB"]);
        says(&|dir| put(dir, "test/a/x.png", b"a text"), ["x.png: ", "no PNG"]);
        let whole = grey(9);
        says(&|dir| put(dir, "test/a/x.png", &whole[..whole.len() / 2]), ["x.png: ", "damaged"]);
        says(&|dir| put(dir, "test/a/x.png", b""), ["x.png: ", "damaged"]);
    }
}
