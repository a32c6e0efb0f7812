//! A set of images with boxes made from a seed: one to four filled circles, squares and triangles of
//! random size, place and colour on a noisy ground (`anybit synth shapes`).
//!
//! The detection data of the paper are unknown to us, and real sets are large. This one is small
//! enough to train on two cores in minutes, and hard enough that rounding costs something: colours
//! say nothing about classes, and noise hides edges. Everything is computed in integers, each image
//! from a stream of its own, so that a seed means the same bytes on every machine and the first
//! images of a larger set are those of a smaller one.

use std::path::Path;

use anybit_core::rng::{SplitMix64, stream};
use anybit_io::atomic::check_absent;

use super::boxes::{Object, Rect};
use super::scenes::{Scenes, write};
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

/// Names of the classes.
pub const CLASSES: [&str; 3] = ["circle", "square", "triangle"];
/// Values of a pixel.
const CHANNELS: usize = 3;
/// Most objects of an image.
const MOST: usize = 4;
/// Places that are tried for an object before it is left out.
const TRIES: usize = 20;
/// Largest overlap of two objects.
const OVERLAP: f32 = 0.1;
/// Least distance of an object's colour from the ground's, in every channel.
const CONTRAST: usize = 64;
/// Half the range of one of the two draws that noise is the sum of.
const NOISE: usize = 24;
/// Most bytes of pixels of a set.
const MOST_BYTES: usize = 1 << 31;

/// How large a set is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShapesSpec {
    /// Training images.
    pub train: usize,
    /// Test images.
    pub test: usize,
    /// Pixels of a side.
    pub size: usize,
    /// Seed of everything.
    pub seed: u64,
}

/// A shape in whole pixels.
#[derive(Debug, Clone, Copy)]
struct Placed {
    class: usize,
    left: usize,
    top: usize,
    side: usize,
}

impl Placed {
    fn rect(&self) -> Rect {
        let Self { left, top, side, .. } = *self;
        [left, top, left + side, top + side].map(|edge| edge as f32).into()
    }

    /// Whether the pixel belongs to it. Distances are twice as long, so that centres of pixels are
    /// whole numbers.
    fn covers(&self, x: usize, y: usize) -> bool {
        let inside = |at: usize, from: usize| (from..from + self.side).contains(&at);
        if !inside(x, self.left) || !inside(y, self.top) {
            return false;
        }
        let from_centre = |at: usize, from: usize| (2 * at + 1).abs_diff(2 * from + self.side);
        let (across, down) = (from_centre(x, self.left), from_centre(y, self.top));
        match self.class {
            0 => across * across + down * down <= self.side * self.side,
            1 => true,
            // As wide as it is deep, from a tip above.
            _ => across <= y - self.top + 1,
        }
    }
}

/// Shapes that do not hide each other.
fn placed(rng: &mut SplitMix64, size: usize) -> Vec<Placed> {
    let count = 1 + rng.below(MOST);
    let (least, most) = (size / 5, 2 * size / 5);
    let mut all: Vec<Placed> = Vec::new();
    for _ in 0..count {
        let (class, side) = (rng.below(CLASSES.len()), least + rng.below(most - least + 1));
        for _ in 0..TRIES {
            let (left, top) = (rng.below(size - side + 1), rng.below(size - side + 1));
            let shape = Placed { class, left, top, side };
            if all.iter().all(|other| other.rect().iou(&shape.rect()) <= OVERLAP) {
                all.push(shape);
                break;
            }
        }
    }
    all
}

/// A step around the circle of 256 values that ends far from where it began, either way round.
fn step(rng: &mut SplitMix64) -> usize {
    CONTRAST + rng.below(256 - 2 * CONTRAST + 1)
}

/// Draws an image behind `pixels` and returns what is in it.
fn draw(rng: &mut SplitMix64, size: usize, pixels: &mut Vec<u8>) -> Vec<Object> {
    let ground: [usize; CHANNELS] = std::array::from_fn(|_| rng.below(256));
    let shapes = placed(rng, size);
    let colours: Vec<[usize; CHANNELS]> =
        shapes.iter().map(|_| ground.map(|value| (value + step(rng)) % 256)).collect();
    for (y, x) in (0..size).flat_map(|y| (0..size).map(move |x| (y, x))) {
        let above = shapes.iter().zip(&colours).rev().find(|(shape, _)| shape.covers(x, y));
        for value in above.map_or(ground, |(_, colour)| *colour) {
            let noise = rng.below(2 * NOISE + 1) + rng.below(2 * NOISE + 1);
            pixels.push((value + noise).saturating_sub(2 * NOISE).min(255) as u8);
        }
    }
    let object = |shape: &Placed| Object { class: shape.class as u8, rect: shape.rect() };
    shapes.iter().map(object).collect()
}

impl ShapesSpec {
    /// `count` images of a part.
    ///
    /// # Errors
    /// Numbers out of range.
    pub fn part(&self, part: &str, count: usize) -> Result<Scenes> {
        self.check()?;
        let (mut pixels, mut objects) = (Vec::new(), Vec::with_capacity(count));
        for index in 0..count {
            let mut rng = SplitMix64::new(stream(self.seed, &format!("shapes {part} {index}")));
            objects.push(draw(&mut rng, self.size, &mut pixels));
        }
        let shape = Shape { height: self.size, width: self.size, channels: CHANNELS };
        Scenes::new(Path::new("shapes"), shape, CLASSES.len(), pixels, objects)
    }

    fn check(&self) -> Result<()> {
        if !(16..=512).contains(&self.size) {
            let what = format!("images of {} pixels a side; use 16 to 512", self.size);
            return Err(VisionError::recipe("size", what));
        }
        let image = self.size * self.size * CHANNELS;
        let most = MOST_BYTES / image;
        let fits = self.train.checked_add(self.test).is_some_and(|sum| sum <= most);
        if self.train == 0 || self.test == 0 || !fits {
            let what = format!(
                "{} images to train and {} to test; use at least 1 of each and at most {most} in all",
                self.train, self.test
            );
            return Err(VisionError::recipe("train, test", what));
        }
        Ok(())
    }

    /// Writes the set as the folder `target`.
    ///
    /// # Errors
    /// Numbers out of range; an output that exists, unless `force`; what the operating system
    /// refuses.
    pub fn write(&self, target: &Path, force: bool) -> Result<()> {
        check_absent(target, force)?;
        let (train, test) = (self.part("train", self.train)?, self.part("test", self.test)?);
        write(&train, &test, &CLASSES, target, force)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: ShapesSpec = ShapesSpec { train: 40, test: 10, size: 48, seed: 3 };

    #[test]
    fn a_seed_is_a_set() {
        let (a, b) = (SPEC.part("train", 40).unwrap(), SPEC.part("train", 40).unwrap());
        assert!(a == b && a.count() == 40);
        let other = ShapesSpec { seed: 4, ..SPEC };
        assert!(a != other.part("train", 40).unwrap() && a != SPEC.part("test", 40).unwrap());
        // The first images of a larger set are those of a smaller one.
        let few = SPEC.part("train", 7).unwrap();
        assert_eq!(few.objects, a.objects[..7]);
        assert_eq!(few.images.pixels, a.images.pixels[..few.images.pixels.len()]);
        // The first image as a program in Python made it, which shares no code with this one.
        let object = |class, left: f32, top: f32, side: f32| Object {
            class,
            rect: [left, top, left + side, top + side].into(),
        };
        let want =
            [object(0, 25.0, 33.0, 9.0), object(2, 35.0, 16.0, 11.0), object(0, 0.0, 16.0, 13.0)];
        assert_eq!(a.objects[0], want);
        let first = &a.images.pixels[..48 * 48 * CHANNELS];
        assert_eq!(first[..6], [217, 96, 31, 182, 76, 36]);
        assert_eq!(first.iter().map(|v| u32::from(*v)).sum::<u32>(), 826_617);
    }

    #[test]
    fn objects_are_where_their_boxes_are() {
        let set = ShapesSpec { size: 40, ..SPEC }.part("train", 60).unwrap();
        let mut of_class = [0; 3];
        for objects in &set.objects {
            assert!((1..=MOST).contains(&objects.len()));
            for (index, object) in objects.iter().enumerate() {
                of_class[usize::from(object.class)] += 1;
                let [width, height] = object.rect.sides();
                assert!(width == height && (8.0..=16.0).contains(&width), "{object:?}");
                let overlaps = |o: &Object| o.rect.iou(&object.rect) > OVERLAP;
                assert!(!objects[..index].iter().any(overlaps));
            }
        }
        assert!(of_class.iter().all(|count| *count > 20), "{of_class:?}");
    }

    #[test]
    fn shapes_fill_their_boxes() {
        for class in 0..3 {
            for side in [8, 13, 15] {
                let shape = Placed { class, left: 2, top: 3, side };
                let covered = |x: usize, y: usize| shape.covers(x, y);
                let all: Vec<(usize, usize)> = (0..20)
                    .flat_map(|y| (0..20).map(move |x| (x, y)))
                    .filter(|(x, y)| covered(*x, *y))
                    .collect();
                let edges = |values: Vec<usize>| {
                    (values.iter().min().copied().unwrap(), values.iter().max().copied().unwrap())
                };
                let xs = edges(all.iter().map(|p| p.0).collect());
                let ys = edges(all.iter().map(|p| p.1).collect());
                assert_eq!((xs, ys), ((2, 1 + side), (3, 2 + side)), "{shape:?}");
                // π/4, 1 and 1/2 of the square.
                let share = all.len() as f64 / (side * side) as f64;
                let want = [0.785, 1.0, 0.5][class];
                assert!((share - want).abs() < 0.15, "{shape:?}: {share}");
            }
        }
    }

    #[test]
    fn sizes_are_bounded() {
        let says = |spec: ShapesSpec, part: &str| {
            let error = spec.write(Path::new("/no/such/folder"), false).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        says(ShapesSpec { size: 8, ..SPEC }, "16 to 512");
        says(ShapesSpec { test: 0, ..SPEC }, "at least 1");
        says(ShapesSpec { train: usize::MAX, ..SPEC }, "at most");
    }
}
