//! Mean average precision at an overlap of one half, mAP@0.5.
//!
//! Finds of a class, the surest first over all images, are right when they overlap an object of the
//! class that no surer find has taken, by IoU ≥ 0.5. With `p_i` the share of right ones among the
//! first `i` and `n` objects, the precision-recall curve is made monotone and its area taken at all
//! points (Pascal VOC since 2010):
//!
//! ```text
//! AP = 1/n Σ_{i right} max_{j ≥ i} p_j        mAP = mean of AP over the classes that have objects
//! ```
//!
//! Unlike VOC, and like COCO, a find takes the object of largest overlap among those still free.

use super::boxes::{Detection, Object};

/// Least overlap of a find with its object.
const RIGHT: f32 = 0.5;

/// Area under the monotone precision-recall curve of finds, the surest first: whether each was
/// right, of `objects` in all.
pub fn average_precision(right: &[bool], objects: usize) -> f64 {
    let mut hits = 0usize;
    let precisions: Vec<f64> = right
        .iter()
        .enumerate()
        .map(|(index, right)| {
            hits += usize::from(*right);
            hits as f64 / (index + 1) as f64
        })
        .collect();
    let (mut largest, mut sum) = (0f64, 0f64);
    for (right, precision) in right.iter().zip(&precisions).rev() {
        largest = largest.max(*precision);
        if *right {
            sum += largest;
        }
    }
    sum / objects.max(1) as f64
}

/// Whether each find of a class is right, the surest first; `None` when there is no such object.
fn judged(
    found: &[Vec<Detection>],
    truth: &[Vec<Object>],
    class: u8,
) -> Option<(Vec<bool>, usize)> {
    let objects = truth.iter().flatten().filter(|o| o.class == class).count();
    if objects == 0 {
        return None;
    }
    let mut finds: Vec<(usize, &Detection)> = Vec::new();
    for (image, found) in found.iter().enumerate() {
        finds.extend(found.iter().filter(|f| f.class == class).map(|f| (image, f)));
    }
    finds.sort_by(|a, b| b.1.score.total_cmp(&a.1.score));
    let mut taken: Vec<Vec<bool>> =
        truth.iter().map(|objects| vec![false; objects.len()]).collect();
    let mut right = Vec::with_capacity(finds.len());
    for (image, find) in finds {
        let mut best: Option<(usize, f32)> = None;
        for (index, object) in truth[image].iter().enumerate() {
            let overlap = find.rect.iou(&object.rect);
            let free = object.class == class && !taken[image][index] && overlap >= RIGHT;
            if free && best.is_none_or(|(_, most)| overlap > most) {
                best = Some((index, overlap));
            }
        }
        if let Some((index, _)) = best {
            taken[image][index] = true;
        }
        right.push(best.is_some());
    }
    Some((right, objects))
}

/// mAP@0.5 of what was found in each image; 0 when no image has an object.
///
/// # Panics
/// When there are not as many images in both.
pub fn map50(found: &[Vec<Detection>], truth: &[Vec<Object>], classes: usize) -> f64 {
    assert_eq!(found.len(), truth.len(), "not the same images");
    let class = |class: usize| judged(found, truth, class as u8);
    let all: Vec<f64> = (0..classes)
        .filter_map(class)
        .map(|(right, objects)| average_precision(&right, objects))
        .collect();
    all.iter().sum::<f64>() / all.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(class: u8, left: f32) -> Object {
        Object { class, rect: [left, 0.0, left + 10.0, 10.0].into() }
    }

    fn find(class: u8, score: f32, left: f32) -> Detection {
        Detection { class, score, rect: [left, 0.0, left + 10.0, 10.0].into() }
    }

    #[test]
    fn areas_by_hand() {
        assert_eq!(average_precision(&[true, true], 2), 1.0);
        assert_eq!(average_precision(&[true], 2), 0.5);
        assert_eq!(average_precision(&[false, true], 1), 0.5);
        // Precisions 1, 1/2, 2/3: the second object counts 2/3.
        approx::assert_relative_eq!(average_precision(&[true, false, true], 2), 5.0 / 6.0);
        // 0, 1/2, 2/3, 3/4: made monotone, all three count 3/4.
        approx::assert_relative_eq!(average_precision(&[false, true, true, true], 3), 0.75);
        assert_eq!(average_precision(&[], 3), 0.0);
        assert_eq!(average_precision(&[false], 1), 0.0);
    }

    #[test]
    fn two_images_by_hand() {
        let truth = vec![vec![object(0, 0.0), object(1, 40.0)], vec![object(0, 0.0)]];
        let found = vec![
            // Right; the same object again, which is wrong; another class, right.
            vec![find(0, 0.9, 1.0), find(0, 0.8, 2.0), find(1, 0.3, 40.0)],
            // Too far: IoU 5/15.
            vec![find(0, 0.7, 5.0), find(0, 0.6, 0.0)],
        ];
        // Class 0: right, wrong, wrong, right of 2: (1 + 1/2) / 2; class 1: 1; class 2 has none.
        approx::assert_relative_eq!(map50(&found, &truth, 3), (0.75 + 1.0) / 2.0);
        assert_eq!(map50(&[vec![], vec![]], &truth, 3), 0.0);
        assert_eq!(map50(&found, &[vec![], vec![]], 3), 0.0);
    }

    #[test]
    fn a_find_takes_the_free_object_of_largest_overlap() {
        let truth = vec![vec![object(0, 0.0), object(0, 3.0)]];
        // Both are nearest to the second object; the less sure one is content with the first.
        let found = vec![vec![find(0, 0.9, 3.0), find(0, 0.5, 2.0)]];
        assert_eq!(map50(&found, &truth, 1), 1.0);
    }
}
