//! Boxes, what they hold, and their overlap:
//!
//! ```text
//! IoU(a, b) = area(a ∩ b) / area(a ∪ b)
//! ```
//!
//! A detector names an object several times, from cells beside each other and in several classes;
//! [`suppress`] keeps the best of those that overlap (greedy non-maximum suppression, class by
//! class).

use serde::{Deserialize, Serialize};

/// Overlap beyond which two finds of a class are the same object.
const SAME_OBJECT: f32 = 0.5;
/// Finds that are kept in an image: far more than there are objects.
const MOST_FINDS: usize = 100;

/// A rectangle in pixels; `left` and `top` are the smaller edges. In files it is
/// `[left, top, right, bottom]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "[f32; 4]", into = "[f32; 4]")]
pub struct Rect {
    /// Left edge.
    pub left: f32,
    /// Upper edge.
    pub top: f32,
    /// Right edge.
    pub right: f32,
    /// Lower edge.
    pub bottom: f32,
}

impl From<[f32; 4]> for Rect {
    fn from([left, top, right, bottom]: [f32; 4]) -> Self {
        Self { left, top, right, bottom }
    }
}

impl From<Rect> for [f32; 4] {
    fn from(rect: Rect) -> Self {
        [rect.left, rect.top, rect.right, rect.bottom]
    }
}

impl Rect {
    /// Width and height.
    pub fn sides(&self) -> [f32; 2] {
        [self.right - self.left, self.bottom - self.top]
    }

    /// Its middle, from left and top.
    pub fn centre(&self) -> [f32; 2] {
        [(self.left + self.right) / 2.0, (self.top + self.bottom) / 2.0]
    }

    /// Its area; 0 when an edge is on the wrong side.
    pub fn area(&self) -> f32 {
        let [width, height] = self.sides();
        width.max(0.0) * height.max(0.0)
    }

    /// Intersection over union; 0 when neither has an area.
    pub fn iou(&self, other: &Self) -> f32 {
        let common = Self {
            left: self.left.max(other.left),
            top: self.top.max(other.top),
            right: self.right.min(other.right),
            bottom: self.bottom.min(other.bottom),
        };
        let common = common.area();
        let union = self.area() + other.area() - common;
        if union > 0.0 { common / union } else { 0.0 }
    }
}

/// An object of an image, as its labels have it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its class.
    pub class: u8,
    /// Where it is.
    #[serde(rename = "box")]
    pub rect: Rect,
}

/// What a detector believes to see.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// The class.
    pub class: u8,
    /// Its probability.
    pub score: f32,
    /// Where.
    pub rect: Rect,
}

/// The best finds first, without those that overlap a better one of their class.
pub fn suppress(mut found: Vec<Detection>) -> Vec<Detection> {
    // A stable order: equal scores stay in the order of the cells.
    found.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut kept: Vec<Detection> = Vec::new();
    for find in found {
        let same = |k: &Detection| k.class == find.class && k.rect.iou(&find.rect) > SAME_OBJECT;
        if kept.len() < MOST_FINDS && !kept.iter().any(same) {
            kept.push(find);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(class: u8, score: f32, rect: [f32; 4]) -> Detection {
        Detection { class, score, rect: rect.into() }
    }

    #[test]
    fn overlaps_by_hand() {
        let square = Rect::from([0.0, 0.0, 4.0, 4.0]);
        assert_eq!(square.iou(&square), 1.0);
        // 8 of 16 + 16 − 8.
        approx::assert_relative_eq!(square.iou(&[2.0, 0.0, 6.0, 4.0].into()), 1.0 / 3.0);
        assert_eq!(square.iou(&[4.0, 0.0, 8.0, 4.0].into()), 0.0);
        // An edge on the wrong side has no area, and nothing is divided by 0.
        let inside_out = Rect::from([3.0, 3.0, 1.0, 1.0]);
        assert_eq!((inside_out.area(), inside_out.iou(&inside_out)), (0.0, 0.0));
        assert_eq!((square.centre(), square.sides()), ([2.0, 2.0], [4.0, 4.0]));
    }

    #[test]
    fn the_best_of_a_class_is_kept() {
        let (a, b) = ([0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0]);
        let far = [20.0, 20.0, 30.0, 30.0];
        let all = vec![find(0, 0.5, a), find(0, 0.9, b), find(1, 0.4, a), find(0, 0.3, far)];
        let kept = suppress(all);
        // The first is the second again (IoU 9/11), of another class it is another object.
        assert_eq!(kept, [find(0, 0.9, b), find(1, 0.4, a), find(0, 0.3, far)]);
        // Exactly half is not beyond the bound.
        let half = [0.0, 0.0, 10.0, 5.0];
        assert_eq!(suppress(vec![find(0, 0.9, a), find(0, 0.8, half)]).len(), 2);
        let many =
            (0..300).map(|i| find(0, 0.5, [20.0 * i as f32, 0.0, 20.0 * i as f32 + 9.0, 9.0]));
        assert_eq!(suppress(many.collect()).len(), MOST_FINDS);
        assert!(suppress(Vec::new()).is_empty());
    }

    #[test]
    fn files_have_four_numbers() {
        let object = Object { class: 2, rect: [1.0, 2.0, 3.5, 4.0].into() };
        let text = serde_json::to_string(&object).unwrap();
        assert_eq!(text, r#"{"class":2,"box":[1.0,2.0,3.5,4.0]}"#);
        assert_eq!(serde_json::from_str::<Object>(&text).unwrap(), object);
        assert!(serde_json::from_str::<Object>(r#"{"class":2,"box":[1,2,3]}"#).is_err());
    }
}
