//! Cells, and what a detector says about each.
//!
//! The last value of a network is a grid of cells `c` pixels apart. A cell answers for the object
//! whose centre lies in it; there are no anchors. Its outputs are
//!
//! ```text
//! z_0 … z_{C−1}, z_C      logits of the classes and of "nothing here"
//! x, y                    centre of the object from the cell's own, in cells: −1/2 to 1/2
//! u, v                    ln(width / c), ln(height / c)
//! ```
//!
//! Of several objects with their centres in one cell the smallest counts.

use super::boxes::{Detection, Object, Rect, suppress};
use super::scenes::Scenes;
use crate::Tensor;
use crate::vision::model::{Architecture, End, ModelSpec};
use crate::vision::network::Network;
use crate::vision::ops::Shape;
use crate::vision::{Result, VisionError};

/// Numbers of a box.
pub const BOX: usize = 4;
/// Least probability of a find; lower ones move mAP by next to nothing and cost time.
const LEAST_SCORE: f32 = 0.02;
/// Largest logarithm of a side in cells: what has not learned yet must not overflow.
const LARGEST_LOG: f32 = 6.0;

/// The detector `spec` for images of `input`: every pixel of its last value is a cell.
///
/// # Errors
/// As [`ModelSpec::build`]; more classes than labels can name.
pub fn architecture(spec: ModelSpec, input: Shape, classes: usize) -> Result<Architecture> {
    if !(1..=256).contains(&classes) {
        let what = format!("{classes} classes; a detector has 1 to 256");
        return Err(VisionError::recipe("data", what));
    }
    Ok(Architecture { end: End::Cells, ..spec.build(input, classes + 1 + BOX)? })
}

/// Where the cells are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// Cells from top to bottom.
    pub rows: usize,
    /// Cells of a row.
    pub cols: usize,
    /// Classes of objects.
    pub classes: usize,
    /// Width and height of the images, in pixels.
    image: [f32; 2],
}

/// What the cells of images are to say.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// Class of every cell; the number of classes where there is nothing.
    pub classes: Vec<u32>,
    /// Box of every cell, zeros where there is nothing.
    pub boxes: Vec<f32>,
}

impl Grid {
    /// The cells of a detector.
    pub fn of(architecture: &Architecture) -> Self {
        let Architecture { input, last, classes, .. } = architecture;
        Self {
            rows: last.height,
            cols: last.width,
            classes: classes - 1 - BOX,
            image: [input.width as f32, input.height as f32],
        }
    }

    /// Number of cells.
    pub fn cells(&self) -> usize {
        self.rows * self.cols
    }

    /// Outputs of a cell.
    pub fn outputs(&self) -> usize {
        self.classes + 1 + BOX
    }

    /// Width and height of a cell, in pixels.
    fn cell(&self) -> [f32; 2] {
        [self.image[0] / self.cols as f32, self.image[1] / self.rows as f32]
    }

    /// The cell that answers for a box, and what it is to say.
    pub fn encode(&self, rect: &Rect) -> (usize, [f32; BOX]) {
        let ([width, height], [x, y]) = (self.cell(), rect.centre());
        let (x, y) = (x / width, y / height);
        let within = |at: f32, count: usize| (at.max(0.0) as usize).min(count - 1);
        let (col, row) = (within(x, self.cols), within(y, self.rows));
        let sides = rect.sides();
        let numbers = [
            x - col as f32 - 0.5,
            y - row as f32 - 0.5,
            (sides[0] / width).ln(),
            (sides[1] / height).ln(),
        ];
        (row * self.cols + col, numbers)
    }

    /// The box that a cell names, as far as it lies in the image.
    pub fn decode(&self, cell: usize, numbers: &[f32]) -> Rect {
        let [width, height] = self.cell();
        let (row, col) = (cell / self.cols, cell % self.cols);
        let x = (col as f32 + 0.5 + numbers[0]) * width;
        let y = (row as f32 + 0.5 + numbers[1]) * height;
        let half = |log: f32, side: f32| log.min(LARGEST_LOG).exp() * side / 2.0;
        let (half_width, half_height) = (half(numbers[2], width), half(numbers[3], height));
        let [right, bottom] = self.image;
        Rect {
            left: (x - half_width).clamp(0.0, right),
            top: (y - half_height).clamp(0.0, bottom),
            right: (x + half_width).clamp(0.0, right),
            bottom: (y + half_height).clamp(0.0, bottom),
        }
    }

    /// What all cells of all images are to say.
    pub fn targets(&self, objects: &[Vec<Object>]) -> Targets {
        let cells = objects.len() * self.cells();
        let mut classes = vec![self.classes as u32; cells];
        let mut boxes = vec![0f32; cells * BOX];
        for (image, objects) in objects.iter().enumerate() {
            let mut order: Vec<&Object> = objects.iter().collect();
            order.sort_by(|a, b| b.rect.area().total_cmp(&a.rect.area()));
            for object in order {
                let (cell, numbers) = self.encode(&object.rect);
                let at = image * self.cells() + cell;
                classes[at] = u32::from(object.class);
                boxes[at * BOX..][..BOX].copy_from_slice(&numbers);
            }
        }
        Targets { classes, boxes }
    }

    /// What the outputs of all cells of an image say.
    fn read(&self, outputs: &[f32]) -> Vec<Detection> {
        let mut found = Vec::new();
        for (cell, outputs) in outputs.chunks_exact(self.outputs()).enumerate() {
            let (logits, numbers) = outputs.split_at(self.classes + 1);
            let rect = self.decode(cell, numbers);
            for (class, score) in softmax(logits).into_iter().take(self.classes).enumerate() {
                if score >= LEAST_SCORE {
                    found.push(Detection { class: class as u8, score, rect });
                }
            }
        }
        suppress(found)
    }

    /// What the outputs of all cells of all images say, image by image.
    ///
    /// # Errors
    /// Outputs that are no numbers.
    pub fn detections(&self, outputs: &Tensor) -> Result<Vec<Vec<Detection>>> {
        if let Some(at) = outputs.data().iter().position(|v| !v.is_finite()) {
            let image = at / (self.cells() * self.outputs());
            let what = format!("its outputs for image {image} are no numbers");
            return Err(VisionError::NotFinite { place: "the detector".into(), what });
        }
        let images = outputs.data().chunks_exact(self.cells() * self.outputs());
        Ok(images.map(|outputs| self.read(outputs)).collect())
    }
}

/// `e^z / Σ e^z`.
pub(super) fn softmax(logits: &[f32]) -> Vec<f32> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = logits.iter().map(|z| (z - largest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

impl Network {
    /// What a detector sees in every image.
    ///
    /// # Errors
    /// Outputs that are no numbers.
    pub fn detect(&self, scenes: &Scenes) -> Result<Vec<Vec<Detection>>> {
        Grid::of(&self.architecture).detections(&self.logits(&scenes.images))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vision::model::Family;

    /// 6 × 3 cells of 8 × 8 pixels.
    fn grid() -> Grid {
        let input = Shape { height: 24, width: 48, channels: 3 };
        let spec = ModelSpec { family: Family::Plain, width: 1 };
        Grid::of(&architecture(spec, input, 3).unwrap())
    }

    fn object(class: u8, rect: [f32; 4]) -> Object {
        Object { class, rect: rect.into() }
    }

    #[test]
    fn boxes_survive_a_round_trip() {
        let grid = grid();
        assert_eq!((grid.rows, grid.cols, grid.classes, grid.outputs()), (3, 6, 3, 8));
        for rect in [[0.0, 0.0, 48.0, 24.0], [3.0, 5.0, 14.0, 13.0], [40.0, 16.0, 48.0, 24.0]] {
            let rect = Rect::from(rect);
            let (cell, numbers) = grid.encode(&rect);
            assert!(numbers[..2].iter().all(|n| (-0.5..=0.5).contains(n)), "{numbers:?}");
            let back = <[f32; 4]>::from(grid.decode(cell, &numbers));
            for (a, b) in back.iter().zip(<[f32; 4]>::from(rect)) {
                approx::assert_abs_diff_eq!(*a, b, epsilon = 1e-4);
            }
        }
        // Centre (8.5, 9) is in the second column and the second row.
        let (cell, numbers) = grid.encode(&[3.0, 5.0, 14.0, 13.0].into());
        assert_eq!((cell, numbers[0], numbers[1]), (7, -0.4375, -0.375));
        approx::assert_relative_eq!(numbers[2], (11f32 / 8.0).ln());
        // A centre on the far corner belongs to the last cell, and no box leaves the image.
        assert_eq!(grid.encode(&[48.0, 24.0, 48.0, 24.0].into()).0, 17);
        let wild = grid.decode(0, &[-1e9, 1e9, 1e9, -1e9]);
        assert!(<[f32; 4]>::from(wild).iter().all(|v| v.is_finite()), "{wild:?}");
    }

    #[test]
    fn the_cell_of_the_centre_answers() {
        let grid = grid();
        let first = vec![object(2, [0.0, 0.0, 6.0, 6.0]), object(1, [16.0, 8.0, 32.0, 24.0])];
        // Both centres in cell 0: the smaller wins, whatever the order.
        let (small, large) = (object(0, [2.0, 2.0, 6.0, 6.0]), object(1, [0.0, 0.0, 10.0, 10.0]));
        let targets = grid.targets(&[first, vec![small, large], vec![]]);
        assert_eq!(targets.classes.len(), 3 * 18);
        assert_eq!(targets.boxes.len(), 3 * 18 * BOX);
        let filled = targets.classes.iter().enumerate().filter(|(_, class)| **class != 3);
        // Centre (24, 16) begins the fourth column and the third row: cell 2 · 6 + 3.
        let filled: Vec<(usize, u32)> = filled.map(|(cell, class)| (cell, *class)).collect();
        assert_eq!(filled, [(0, 2), (15, 1), (18, 0)]);
        assert_eq!(
            targets,
            grid.targets(&[
                vec![object(2, [0.0, 0.0, 6.0, 6.0]), object(1, [16.0, 8.0, 32.0, 24.0])],
                vec![large, small],
                vec![],
            ])
        );
        assert_eq!(targets.boxes[15 * BOX..][..2], [-0.5, -0.5]);
        assert_eq!(targets.boxes[BOX..2 * BOX], [0.0; BOX]);
    }

    #[test]
    fn outputs_are_read() {
        let grid = grid();
        let mut outputs = [0.0, 0.0, 0.0, 20.0, 0.0, 0.0, 0.0, 0.0].repeat(2 * 18);
        // The second image has class 1 in cell 9, a box of two cells by one.
        let at = (18 + 9) * 8;
        outputs[at..at + 8].copy_from_slice(&[0.0, 20.0, 0.0, 0.0, 0.0, 0.0, 2f32.ln(), 0.0]);
        let outputs = Tensor::new([2 * 18, 8], outputs);
        let found = grid.detections(&outputs).unwrap();
        assert!(found[0].is_empty() && found[1].len() == 1, "{found:?}");
        let Detection { class, score, rect } = found[1][0];
        assert!(class == 1 && score > 0.99);
        // Cell 9 is 24 to 32 by 8 to 16.
        for (a, b) in <[f32; 4]>::from(rect).iter().zip([20.0, 8.0, 36.0, 16.0]) {
            approx::assert_abs_diff_eq!(*a, b, epsilon = 1e-4);
        }
        let mut broken = outputs;
        broken.data_mut()[18 * 8 + 3] = f32::NAN;
        let error = grid.detections(&broken).unwrap_err().to_string();
        assert!(error.contains("image 1"), "{error}");
    }

    #[test]
    fn classes_are_bounded() {
        let spec = ModelSpec { family: Family::Plain, width: 1 };
        let input = Shape { height: 24, width: 48, channels: 3 };
        for classes in [0, 257] {
            assert!(architecture(spec, input, classes).unwrap_err().to_string().contains("256"));
        }
    }
}
