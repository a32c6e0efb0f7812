//! Transforms: invertible maps `x → x P` of the activations at a site, undone in the weights.
//!
//! For any invertible `P`, `(x P)(W P⁻ᵀ)ᵀ = x Wᵀ`: the function stays, the numbers that are rounded
//! change. A transform is folded into what comes before where that is linear, and applied online
//! where it is not (`docs/transforms.md` says which is which).
//!
//! | transform | `x P` | cost per row of `n` |
//! |---|---|---|
//! | diagonal | `x_j · c_j` | `n` |
//! | Hadamard | [`Hadamard`] | `n · log₂ m + n · K` |
//! | Kronecker `P₁ ⊗ P₂`, `n = n₁·n₂` | `P₁ᵀ V P₂`, `V` the row as `[n₁, n₂]` | `2n(n₁ + n₂)` |
//! | head split | channels of all heads, low parts first | – |
//! | composition | one after the other | the sum |
//!
//! A dense matrix is the Kronecker product with `n₁ = 1`. The Kronecker form is FlatQuant's (Sun et
//! al., ICML 2025, section 3.2).

use faer::linalg::solvers::DenseSolveCore;
use serde::{Deserialize, Serialize};

use crate::error::check_len;
use crate::kronecker::Factors;
use crate::scratch::with_scratch;
use crate::{CoreError, Hadamard, Matrix, Result};

/// Reciprocal condition below which a factor counts as singular.
const SINGULAR: f64 = 1e-6;

/// An invertible map of rows.
#[derive(Debug, Clone, PartialEq)]
pub enum Transform {
    /// A factor per channel.
    Diagonal(Vec<f32>),
    /// A normalized Hadamard map, orthogonal.
    Hadamard(Hadamard),
    /// `P₁ ⊗ P₂`; a side that is absent is the identity of its size.
    Kronecker {
        /// `n₁` and `n₂`.
        sizes: (usize, usize),
        /// `P₁`, `[n₁, n₁]`.
        left: Option<Matrix>,
        /// `P₂`, `[n₂, n₂]`.
        right: Option<Matrix>,
    },
    /// Puts the last `high` channels of every head behind those of all heads before, in order.
    HeadSplit {
        /// Heads.
        heads: usize,
        /// Channels of a head.
        head_dim: usize,
        /// Channels of a head that go to the end.
        high: usize,
    },
    /// One after the other.
    Compose(Vec<Transform>),
}

/// What a stored transform is made of: everything but its numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum TransformSpec {
    /// See [`Transform::Diagonal`].
    Diagonal {
        /// Channels.
        size: usize,
    },
    /// See [`Hadamard`].
    Hadamard {
        /// Channels.
        size: usize,
        /// Channels of a block.
        block: usize,
    },
    /// See [`Transform::Kronecker`].
    Kronecker {
        /// `n₁` and `n₂`.
        sizes: (usize, usize),
        /// Whether `P₁` is stored.
        left: bool,
        /// Whether `P₂` is stored.
        right: bool,
    },
    /// See [`Transform::HeadSplit`].
    HeadSplit {
        /// Heads.
        heads: usize,
        /// Channels of a head.
        head_dim: usize,
        /// Channels of a head that go to the end.
        high: usize,
    },
    /// One after the other.
    Compose {
        /// The steps.
        steps: Vec<TransformSpec>,
    },
}

/// A stored part of a transform: name below the transform's own, shape.
pub type TransformPart = (String, Vec<usize>);

impl Transform {
    /// `x → x P` for a dense `P`, `[n, n]`.
    pub fn dense(matrix: Matrix) -> Self {
        Self::Kronecker { sizes: (1, matrix.rows), left: None, right: Some(matrix) }
    }

    /// Channels of a row.
    pub fn size(&self) -> usize {
        match self {
            Self::Diagonal(factors) => factors.len(),
            Self::Hadamard(map) => map.size(),
            Self::Kronecker { sizes, .. } => sizes.0 * sizes.1,
            Self::HeadSplit { heads, head_dim, .. } => heads * head_dim,
            Self::Compose(steps) => steps.first().map_or(0, Self::size),
        }
    }

    /// Replaces every row of `x` by `x P`.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn apply(&self, x: &mut [f32]) {
        assert!(x.len().is_multiple_of(self.size().max(1)), "rows are not whole");
        match self {
            Self::Diagonal(factors) => scale_rows(x, factors),
            Self::Hadamard(map) => map.apply(x),
            Self::Kronecker { sizes, left, right } => {
                factors(*sizes, left, right).apply(x, false);
            }
            Self::HeadSplit { heads, head_dim, high } => {
                split_heads(x, (*heads, *head_dim, *high), false);
            }
            Self::Compose(steps) => steps.iter().for_each(|step| step.apply(x)),
        }
    }

    /// Replaces every row of `x` by `x Pᵀ`: the inverse of an orthogonal transform, and what
    /// passes a gradient back.
    ///
    /// # Panics
    /// When `x` is not whole rows.
    pub fn apply_transpose(&self, x: &mut [f32]) {
        assert!(x.len().is_multiple_of(self.size().max(1)), "rows are not whole");
        match self {
            Self::Diagonal(factors) => scale_rows(x, factors),
            Self::Hadamard(map) => map.apply_transpose(x),
            Self::Kronecker { sizes, left, right } => {
                factors(*sizes, left, right).apply(x, true);
            }
            Self::HeadSplit { heads, head_dim, high } => {
                split_heads(x, (*heads, *head_dim, *high), true);
            }
            Self::Compose(steps) => steps.iter().rev().for_each(|step| step.apply_transpose(x)),
        }
    }

    /// `P⁻ᵀ`: what the rows of a weight are multiplied with so that the function stays.
    ///
    /// # Errors
    /// [`CoreError::Singular`] when a factor has no inverse that f32 can hold.
    pub fn inverse_transpose(&self) -> Result<Self> {
        Ok(match self {
            Self::Diagonal(factors) => {
                if let Some(index) = factors.iter().position(|c| !(1.0 / c).is_finite()) {
                    let found = factors[index].to_string();
                    return Err(CoreError::Singular { what: "factor of a channel", index, found });
                }
                Self::Diagonal(factors.iter().map(|c| 1.0 / c).collect())
            }
            Self::Hadamard(_) | Self::HeadSplit { .. } => self.clone(),
            Self::Kronecker { sizes, left, right } => Self::Kronecker {
                sizes: *sizes,
                left: left.as_ref().map(inverse_transpose).transpose()?,
                right: right.as_ref().map(inverse_transpose).transpose()?,
            },
            Self::Compose(steps) => {
                Self::Compose(steps.iter().map(Self::inverse_transpose).collect::<Result<_>>()?)
            }
        })
    }

    /// Floating-point operations per row.
    pub fn flops(&self) -> usize {
        match self {
            Self::Diagonal(factors) => factors.len(),
            Self::Hadamard(map) => map.flops(),
            Self::Kronecker { sizes: (n1, n2), left, right } => {
                let side = |present: bool, n: usize| if present { 2 * n1 * n2 * n } else { 0 };
                side(left.is_some(), *n1) + side(right.is_some(), *n2)
            }
            Self::HeadSplit { .. } => 0,
            Self::Compose(steps) => steps.iter().map(Self::flops).sum(),
        }
    }

    /// What it is made of.
    pub fn spec(&self) -> TransformSpec {
        match self {
            Self::Diagonal(factors) => TransformSpec::Diagonal { size: factors.len() },
            Self::Hadamard(map) => TransformSpec::Hadamard { size: map.size(), block: map.block() },
            Self::Kronecker { sizes, left, right } => TransformSpec::Kronecker {
                sizes: *sizes,
                left: left.is_some(),
                right: right.is_some(),
            },
            Self::HeadSplit { heads, head_dim, high } => {
                TransformSpec::HeadSplit { heads: *heads, head_dim: *head_dim, high: *high }
            }
            Self::Compose(steps) => {
                TransformSpec::Compose { steps: steps.iter().map(Self::spec).collect() }
            }
        }
    }

    /// Its numbers, in the order of [`TransformSpec::parts`].
    pub fn values(&self) -> Vec<&[f32]> {
        match self {
            Self::Diagonal(factors) => vec![factors],
            Self::Hadamard(_) | Self::HeadSplit { .. } => Vec::new(),
            Self::Kronecker { left, right, .. } => {
                left.iter().chain(right).map(|m| &m.data[..]).collect()
            }
            Self::Compose(steps) => steps.iter().flat_map(Self::values).collect(),
        }
    }
}

impl TransformSpec {
    /// The stored parts, all f32.
    pub fn parts(&self) -> Vec<TransformPart> {
        let mut parts = Vec::new();
        self.add_parts("", &mut parts);
        parts
    }

    fn add_parts(&self, prefix: &str, parts: &mut Vec<TransformPart>) {
        let mut part =
            |name: &str, shape: Vec<usize>| parts.push((format!("{prefix}{name}"), shape));
        match self {
            Self::Diagonal { size } => part("factors", vec![*size]),
            Self::Hadamard { .. } | Self::HeadSplit { .. } => {}
            Self::Kronecker { sizes: (n1, n2), left, right } => {
                if *left {
                    part("left", vec![*n1, *n1]);
                }
                if *right {
                    part("right", vec![*n2, *n2]);
                }
            }
            Self::Compose { steps } => {
                for (i, step) in steps.iter().enumerate() {
                    step.add_parts(&format!("{prefix}{i}."), parts);
                }
            }
        }
    }

    /// Channels of a row; `None` when the sizes of a composition differ or overflow.
    pub fn size(&self) -> Option<usize> {
        match self {
            Self::Diagonal { size } | Self::Hadamard { size, .. } => Some(*size),
            Self::Kronecker { sizes: (a, b), .. } => a.checked_mul(*b),
            Self::HeadSplit { heads, head_dim, .. } => heads.checked_mul(*head_dim),
            Self::Compose { steps } => {
                let size = steps.first()?.size()?;
                steps.iter().all(|s| s.size() == Some(size)).then_some(size)
            }
        }
    }

    /// Builds the transform from its numbers, in the order of [`Self::parts`].
    ///
    /// # Errors
    /// Sizes that do not fit together, a Hadamard size that does not exist, missing numbers or
    /// numbers that are not finite.
    pub fn build(&self, values: &mut dyn Iterator<Item = Vec<f32>>) -> Result<Transform> {
        let shape = |expected: &str, found: String| {
            Err(CoreError::Shape { what: "transform", expected: expected.into(), found })
        };
        if self.size().is_none_or(|n| n == 0) {
            return shape("sizes that agree", format!("{self:?}"));
        }
        let mut take = |len: usize| {
            let values = values.next().unwrap_or_default();
            check_len("numbers of a transform", len, values.len())?;
            match values.iter().position(|v| !v.is_finite()) {
                None => Ok(values),
                Some(col) => Err(CoreError::NotFinite {
                    what: "a transform",
                    row: 0,
                    col,
                    value: values[col].to_string(),
                }),
            }
        };
        Ok(match self {
            Self::Diagonal { size } => Transform::Diagonal(take(*size)?),
            Self::Hadamard { size, block } => Transform::Hadamard(Hadamard::blocks(*size, *block)?),
            Self::Kronecker { sizes, left, right } => {
                let mut side = |present: bool, n: usize| {
                    let read = present.then(|| Matrix::from_vec(n, n, take(n * n)?));
                    read.transpose()
                };
                let (left, right) = (side(*left, sizes.0)?, side(*right, sizes.1)?);
                Transform::Kronecker { sizes: *sizes, left, right }
            }
            Self::HeadSplit { heads, head_dim, high } => {
                if high > head_dim {
                    return shape("high channels within a head", format!("{high} of {head_dim}"));
                }
                Transform::HeadSplit { heads: *heads, head_dim: *head_dim, high: *high }
            }
            Self::Compose { steps } => Transform::Compose(
                steps.iter().map(|step| step.build(values)).collect::<Result<_>>()?,
            ),
        })
    }
}

fn scale_rows(x: &mut [f32], factors: &[f32]) {
    for row in x.chunks_exact_mut(factors.len().max(1)) {
        row.iter_mut().zip(factors).for_each(|(x, c)| *x *= c);
    }
}

/// The factors of [`Transform::Kronecker`].
pub fn factors<'a>(
    sizes: (usize, usize),
    left: &'a Option<Matrix>,
    right: &'a Option<Matrix>,
) -> Factors<'a> {
    Factors { sizes, left: left.as_ref(), right: right.as_ref() }
}

fn split_heads(x: &mut [f32], (heads, head_dim, high): (usize, usize, usize), inverse: bool) {
    let (n, low) = (heads * head_dim, head_dim - high);
    with_scratch(n, |copy| {
        for row in x.chunks_exact_mut(n.max(1)) {
            copy.copy_from_slice(row);
            for head in 0..heads {
                let whole = head * head_dim..(head + 1) * head_dim;
                let (a, b) = (head * low, heads * low + head * high);
                if inverse {
                    row[whole.start..whole.start + low].copy_from_slice(&copy[a..a + low]);
                    row[whole.start + low..whole.end].copy_from_slice(&copy[b..b + high]);
                } else {
                    row[a..a + low].copy_from_slice(&copy[whole.start..whole.start + low]);
                    row[b..b + high].copy_from_slice(&copy[whole.start + low..whole.end]);
                }
            }
        }
    });
}

/// `Mᵀ`.
pub fn transpose(m: &Matrix) -> Matrix {
    let mut out = Matrix::zeros(m.cols, m.rows);
    for (i, row) in m.data.chunks_exact(m.cols.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(j, v)| out.data[j * m.rows + i] = *v);
    }
    out
}

fn inverse_transpose(m: &Matrix) -> Result<Matrix> {
    let n = m.rows;
    let wide = faer::Mat::<f64>::from_fn(n, n, |i, j| m.data[i * n + j] as f64);
    let singular = |found: f64| {
        let found = format!("reciprocal condition {found:e}");
        Err(CoreError::Singular { what: "factor of a transform", index: n, found })
    };
    let inverse = wide.partial_piv_lu().inverse();
    let norm = |f: &dyn Fn(usize, usize) -> f64| {
        (0..n).map(|i| (0..n).map(|j| f(i, j).abs()).sum::<f64>()).fold(0.0, f64::max)
    };
    let condition = norm(&|i, j| wide[(i, j)]) * norm(&|i, j| inverse[(i, j)]);
    if condition.is_nan() || 1.0 / condition <= SINGULAR {
        return singular(1.0 / condition);
    }
    let mut out = Matrix::zeros(n, n);
    for i in 0..n {
        for j in 0..n {
            out.data[i * n + j] = inverse[(j, i)] as f32;
        }
    }
    Ok(out)
}

/// `(n₁, n₂)` with `n₁·n₂ = n`, `n₁ ≤ n₂` and `n₁ + n₂` least: the sizes of FlatQuant's factors.
pub fn kronecker_sizes(n: usize) -> (usize, usize) {
    let root = n.isqrt().max(1);
    let n1 = (1..=root).rev().find(|d| n.is_multiple_of(*d)).unwrap_or(1);
    (n1, n / n1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::SplitMix64;
    use proptest::prelude::*;

    fn normals(n: usize, rng: &mut SplitMix64) -> Vec<f32> {
        (0..n).map(|_| rng.normal() as f32).collect()
    }

    /// A well-conditioned random factor.
    fn factor(n: usize, rng: &mut SplitMix64) -> Matrix {
        let mut m = Matrix::from_vec(n, n, normals(n * n, rng)).unwrap();
        m.data.iter_mut().for_each(|v| *v *= 0.3 / (n as f32).sqrt());
        (0..n).for_each(|i| m.data[i * n + i] += 1.0);
        m
    }

    fn every_kind(rng: &mut SplitMix64) -> Vec<Transform> {
        let n = 24;
        let diagonal = Transform::Diagonal((0..n).map(|i| 0.5 + i as f32 * 0.1).collect());
        let (left, right) = (factor(4, rng), factor(6, rng));
        let kronecker = |left: Option<Matrix>, right: Option<Matrix>| Transform::Kronecker {
            sizes: (4, 6),
            left,
            right,
        };
        let split = Transform::HeadSplit { heads: 3, head_dim: 8, high: 2 };
        let both = kronecker(Some(left.clone()), Some(right.clone()));
        vec![
            diagonal.clone(),
            Transform::Hadamard(Hadamard::new(n).unwrap()),
            both.clone(),
            kronecker(Some(left), None),
            kronecker(None, Some(right)),
            Transform::dense(factor(n, rng)),
            split.clone(),
            Transform::Compose(vec![diagonal, both, split]),
        ]
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| *a as f64 * *b as f64).sum()
    }

    /// The property that everything rests on: `(x P)(w P⁻ᵀ)ᵀ = x wᵀ`; and `x Pᵀ · y = x · y P`.
    #[test]
    fn products_are_kept() {
        let mut rng = SplitMix64::new(1);
        for transform in every_kind(&mut rng) {
            let inverse = transform.inverse_transpose().unwrap();
            let (x, w) = (normals(24, &mut rng), normals(24, &mut rng));
            let (mut tx, mut tw) = (x.clone(), w.clone());
            transform.apply(&mut tx);
            inverse.apply(&mut tw);
            approx::assert_abs_diff_eq!(dot(&tx, &tw), dot(&x, &w), epsilon = 1e-4);
            let mut back = w.clone();
            transform.apply_transpose(&mut back);
            approx::assert_abs_diff_eq!(dot(&x, &back), dot(&tx, &w), epsilon = 1e-4);
            let again = transform.spec().build(&mut transform.values().iter().map(|v| v.to_vec()));
            assert_eq!(again.unwrap(), transform);
        }
    }

    proptest! {
        /// Against the Kronecker product written out.
        #[test]
        fn kronecker_is_the_kronecker_product(n1 in 1usize..6, n2 in 1usize..7, seed in any::<u64>()) {
            let mut rng = SplitMix64::new(seed);
            let (p1, p2) = (factor(n1, &mut rng), factor(n2, &mut rng));
            let x = normals(2 * n1 * n2, &mut rng);
            let mut got = x.clone();
            let sizes = (n1, n2);
            let (left, right) = (Some(p1.clone()), Some(p2.clone()));
            Transform::Kronecker { sizes, left, right }.apply(&mut got);
            for (x, got) in x.chunks(n1 * n2).zip(got.chunks(n1 * n2)) {
                for (j, got) in got.iter().enumerate() {
                    let want: f64 = (0..n1 * n2).map(|i| {
                        let (a, b) = (p1.row(i / n2)[j / n2], p2.row(i % n2)[j % n2]);
                        x[i] as f64 * a as f64 * b as f64
                    }).sum();
                    prop_assert!((want - *got as f64).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn sizes_of_the_specification() {
        let known = [
            (576, (24, 24)),
            (768, (24, 32)),
            (896, (28, 32)),
            (960, (30, 32)),
            (1536, (32, 48)),
            (1568, (32, 49)),
            (2048, (32, 64)),
            (4864, (64, 76)),
            (11008, (86, 128)),
            (6, (2, 3)),
            (10, (2, 5)),
            (13, (1, 13)),
            (1, (1, 1)),
            (14336, (112, 128)),
        ];
        for (n, sizes) in known {
            assert_eq!(kronecker_sizes(n), sizes, "{n}");
        }
    }

    #[test]
    fn singular_factors_and_broken_sizes_are_errors() {
        let zero = Transform::Diagonal(vec![1.0, 0.0]);
        assert!(matches!(zero.inverse_transpose(), Err(CoreError::Singular { index: 1, .. })));
        let rank_one = Matrix::from_vec(2, 2, vec![1.0, 2.0, 2.0, 4.0]).unwrap();
        let error = Transform::dense(rank_one).inverse_transpose().unwrap_err();
        assert!(matches!(error, CoreError::Singular { .. }), "{error}");
        let none = &mut std::iter::empty();
        assert!(TransformSpec::Hadamard { size: 9, block: 9 }.build(none).is_err());
        assert!(TransformSpec::HeadSplit { heads: 2, head_dim: 4, high: 5 }.build(none).is_err());
        assert!(TransformSpec::Diagonal { size: 3 }.build(none).is_err());
        let steps = vec![TransformSpec::Diagonal { size: 3 }, TransformSpec::Diagonal { size: 4 }];
        assert!(TransformSpec::Compose { steps }.build(none).is_err());
    }
}
