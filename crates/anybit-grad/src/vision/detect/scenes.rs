//! Images with boxes: a folder of
//!
//! | file | what |
//! |---|---|
//! | `set.json` | `format` (`anybit-boxes`), `format_version`, names of the `classes` |
//! | `train-images-idx4-ubyte`, `test-…` | IDX of bytes, `[count, height, width, channels]` |
//! | `train-boxes.jsonl`, `test-…` | a line per image: `[{"class": 0, "box": [left, top, right, bottom]}, …]` |
//!
//! Edges are in pixels from the upper left corner; a box of the pixels 3 to 5 of a row is from 3 to
//! 6. Everything is checked when it is read. The format is ours: small, and readable in two lines of
//! any language.

use std::path::{Path, PathBuf};

use anybit_io::IoError;
use anybit_io::atomic::{PartialFolder, check_space, write_bytes};
use serde::{Deserialize, Serialize};

use super::boxes::Object;
use crate::vision::data::{Images, idx};
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

const SET: &str = "set.json";
const FORMAT: &str = "anybit-boxes";
const VERSION: u32 = 1;

/// Images and what is in each.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenes {
    /// The images; their labels have no meaning, their classes are those of the objects.
    pub images: Images,
    /// The objects of every image.
    pub objects: Vec<Vec<Object>>,
}

/// The images of a recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScenesSpec {
    /// Folder of the files.
    pub folder: PathBuf,
    /// Training images, the first ones; by default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_images: Option<usize>,
    /// Test images, the first ones; by default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub test_images: Option<usize>,
}

/// What `set.json` says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    format: String,
    format_version: u32,
    classes: Vec<String>,
}

impl Scenes {
    /// Checks and wraps images with their objects; `path` is named where boxes are wrong.
    ///
    /// # Errors
    /// No image, no object in any image, classes that do not exist, boxes without an area or beyond
    /// the image, numbers that differ.
    pub fn new(
        path: &Path,
        shape: Shape,
        classes: usize,
        pixels: Vec<u8>,
        objects: Vec<Vec<Object>>,
    ) -> Result<Self> {
        let images = Images::new(path, shape, classes, pixels, vec![0; objects.len()])?;
        for (index, objects) in objects.iter().enumerate() {
            let check = |object: &Object| check_object(object, shape, classes);
            let named = |what: String| VisionError::data(path, format!("image {index}: {what}"));
            objects.iter().try_for_each(check).map_err(named)?;
        }
        if objects.iter().all(Vec::is_empty) {
            let what = "no image has a box in it: there is nothing to learn; give labelled images";
            return Err(VisionError::data(path, what));
        }
        Ok(Self { images, objects })
    }

    /// Number of images.
    pub fn count(&self) -> usize {
        self.objects.len()
    }

    /// Reads one part of a set of `classes`.
    fn read(folder: &Path, part: &str, classes: usize) -> Result<Self> {
        let ([count, height, width, channels], pixels) =
            idx::read(&folder.join(images_name(part)))?;
        let path = folder.join(boxes_name(part));
        let objects = read_boxes(&path)?;
        if objects.len() != count {
            let what = format!(
                "{} lines for the {count} images of {}; take files of the same set",
                objects.len(),
                images_name(part)
            );
            return Err(VisionError::data(&path, what));
        }
        Self::new(&path, Shape { height, width, channels }, classes, pixels, objects)
    }

    /// The first `count` of them.
    fn first(self, count: Option<usize>, folder: &Path) -> Result<Self> {
        let Some(count) = count else { return Ok(self) };
        if count == 0 || count > self.count() {
            let what = format!("{count} images of {}; ask for 1 to all of them", self.count());
            return Err(VisionError::data(folder, what));
        }
        let Self { images, mut objects } = self;
        let Images { shape, classes, mut pixels, .. } = images;
        objects.truncate(count);
        pixels.truncate(count * shape.values());
        Self::new(folder, shape, classes, pixels, objects)
    }
}

/// What is wrong with an object of an image of `shape`.
fn check_object(object: &Object, shape: Shape, classes: usize) -> std::result::Result<(), String> {
    let rect = object.rect;
    if usize::from(object.class) >= classes {
        return Err(format!("class {} of {classes}; they count from 0", object.class));
    }
    let (width, height) = (shape.width as f32, shape.height as f32);
    let along = |from: f32, to: f32, end: f32| from >= 0.0 && from < to && to <= end;
    // Written so that edges which are no numbers fail too.
    match along(rect.left, rect.right, width) && along(rect.top, rect.bottom, height) {
        true => Ok(()),
        false => Err(format!(
            "the box {:?}; left < right and top < bottom are needed, within {width}×{height} pixels",
            <[f32; 4]>::from(rect)
        )),
    }
}

fn images_name(part: &str) -> String {
    format!("{part}-images-idx4-ubyte")
}

fn boxes_name(part: &str) -> String {
    format!("{part}-boxes.jsonl")
}

fn read_boxes(path: &Path) -> Result<Vec<Vec<Object>>> {
    let text = std::fs::read_to_string(path).map_err(|e| IoError::file("read", path, e))?;
    let line = |(index, line): (usize, &str)| {
        let fail =
            |e: serde_json::Error| VisionError::data(path, format!("line {}: {e}", index + 1));
        serde_json::from_str(line).map_err(fail)
    };
    text.lines().enumerate().map(line).collect()
}

impl ScenesSpec {
    /// Training and test images.
    ///
    /// # Errors
    /// Files that cannot be read or are not what they should be; parts of other shapes; more images
    /// than there are.
    pub fn read(&self) -> Result<(Scenes, Scenes)> {
        let path = self.folder.join(SET);
        let text = std::fs::read_to_string(&path).map_err(|e| IoError::file("read", &path, e))?;
        let set: Set =
            serde_json::from_str(&text).map_err(|e| VisionError::data(&path, e.to_string()))?;
        if set.format != FORMAT || set.format_version > VERSION {
            let what = format!(
                "format {} {}; this reads {FORMAT} up to {VERSION}",
                set.format, set.format_version
            );
            return Err(VisionError::data(&path, what));
        }
        let part = |part: &str, count: Option<usize>| {
            Scenes::read(&self.folder, part, set.classes.len())?.first(count, &self.folder)
        };
        let (train, test) = (part("train", self.train_images)?, part("test", self.test_images)?);
        if train.images.shape != test.images.shape {
            let what = format!(
                "training images are {:?}, test images {:?}; take files of the same set",
                train.images.shape, test.images.shape
            );
            return Err(VisionError::data(&self.folder, what));
        }
        Ok((train, test))
    }
}

/// Writes a set of classes with these names as the folder `target`, whole or not at all.
///
/// # Errors
/// An output that exists, unless `force`; what the operating system refuses.
pub fn write(
    train: &Scenes,
    test: &Scenes,
    names: &[&str],
    target: &Path,
    force: bool,
) -> Result<()> {
    let folder = PartialFolder::create(target, false, force)?;
    check_space(target, (train.images.pixels.len() + test.images.pixels.len()) as u64)?;
    let set = Set {
        format: FORMAT.into(),
        format_version: VERSION,
        classes: names.iter().map(|name| String::from(*name)).collect(),
    };
    let json = |text: serde_json::Result<String>| {
        text.map(|text| text + "\n").map_err(|e| IoError::damaged(target, e.to_string()))
    };
    let place = |name: &str| folder.path().join(name);
    write_bytes(&place(SET), json(serde_json::to_string_pretty(&set))?.as_bytes())?;
    for (part, scenes) in [("train", train), ("test", test)] {
        let Shape { height, width, channels } = scenes.images.shape;
        let dims = [scenes.count(), height, width, channels];
        let bytes = idx::encode(dims, &scenes.images.pixels);
        write_bytes(&place(&images_name(part)), &bytes)?;
        let mut text = String::new();
        for objects in &scenes.objects {
            text.push_str(&json(serde_json::to_string(objects))?);
        }
        write_bytes(&place(&boxes_name(part)), text.as_bytes())?;
    }
    Ok(folder.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { height: 4, width: 6, channels: 3 };

    fn scenes(count: usize) -> Scenes {
        let pixels = (0..count * SHAPE.values()).map(|i| i as u8).collect();
        let object = |class, right| Object { class, rect: [1.0, 0.0, right, 4.0].into() };
        let mut objects = vec![vec![object(0, 6.0), object(1, 2.5)]; count];
        objects[count - 1].clear();
        Scenes::new(Path::new("x"), SHAPE, 2, pixels, objects).unwrap()
    }

    fn spec(folder: &Path) -> ScenesSpec {
        ScenesSpec { folder: folder.to_owned(), train_images: None, test_images: None }
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("set");
        let (train, test) = (scenes(5), scenes(3));
        write(&train, &test, &["a", "b"], &target, false).unwrap();
        assert!(write(&train, &test, &["a", "b"], &target, false).is_err(), "it is there");
        write(&train, &test, &["a", "b"], &target, true).unwrap();
        let (again, other) = spec(&target).read().unwrap();
        assert!(again == train && other == test);
        let (few, _) = ScenesSpec { train_images: Some(2), ..spec(&target) }.read().unwrap();
        assert_eq!((few.count(), few.images.count()), (2, 2));
        assert_eq!(few.objects, train.objects[..2]);
        let many = ScenesSpec { test_images: Some(4), ..spec(&target) }.read().unwrap_err();
        assert!(many.to_string().contains("4 images of 3"), "{many}");
    }

    #[test]
    fn what_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("set");
        assert!(spec(&target).read().unwrap_err().to_string().contains("set.json"));
        write(&scenes(2), &scenes(2), &["a", "b"], &target, false).unwrap();
        let says = |name: &str, change: &dyn Fn(&[u8]) -> Vec<u8>, part: &str| {
            let path = target.join(name);
            let good = std::fs::read(&path).unwrap();
            std::fs::write(&path, change(&good)).unwrap();
            let error = spec(&target).read().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(name), "{error}");
            std::fs::write(&path, good).unwrap();
        };
        let images = "train-images-idx4-ubyte";
        says(images, &|b| b[..b.len() - 1].to_vec(), "do not fit");
        says(images, &|b| b[..7].to_vec(), "no IDX file");
        says(images, &|b| [&[0, 0, 8, 3][..], &b[4..]].concat(), "no IDX file");
        let boxes = "train-boxes.jsonl";
        let text = |change: &dyn Fn(&str) -> String, part: &str| {
            let bytes = |b: &[u8]| change(std::str::from_utf8(b).unwrap()).into_bytes();
            says(boxes, &bytes, part);
        };
        text(&|t| t.replace("\"class\":1", "\"class\":2"), "class 2 of 2");
        text(&|t| t.replace("6.0", "7.0"), "image 0: the box [1.0, 0.0, 7.0, 4.0]");
        text(&|t| t.replace("2.5", "0.5"), "left < right");
        text(&|t| t.replace("2.5", "null"), "line 1");
        text(&|t| t.replace("class", "kind"), "line 1");
        text(&|t| format!("{t}[]\n"), "3 lines for the 2 images");
        text(&|_| "[]\n[]\n".into(), "nothing to learn");
        says("set.json", &|b| [b, b].concat(), "trailing");
        let set = target.join("set.json");
        let good = std::fs::read_to_string(&set).unwrap();
        std::fs::write(&set, good.replace("anybit-boxes", "coco")).unwrap();
        assert!(spec(&target).read().unwrap_err().to_string().contains("format coco 1"));
    }
}
