//! Grids, rounding of one matrix, packing, statistics and linear algebra: everything about
//! quantizing a matrix that needs neither a model nor a file.
//!
//! Symbols used throughout, defined once here:
//!
//! | symbol | meaning |
//! |---|---|
//! | `W` | a linear's weight, `[out, in]`, row-major; `y = x Wᵀ` |
//! | `n`, `m` | rows (`out`) and columns (`in`) of `W` |
//! | `Q` | the dequantized weight: the values that codes stand for |
//! | `X` | calibration activations, `[tokens, in]` |
//! | `H` | the Gram matrix `XᵀX`, `[in, in]` |
//! | `u` | a code, an unsigned integer below `2^bits` |
//! | `s`, `z` | a group's scale (step) and zero point: the value of `u` is `(u − z)·s` |

pub mod activation;
pub mod allocate;
pub mod bitstream;
pub mod column_scale;
pub mod error;
pub mod gram;
pub mod grid;
pub mod hadamard;
pub mod half_integer;
pub mod kmeans;
pub mod kronecker;
pub mod linalg;
pub mod lnq;
pub mod matrix;
pub mod quantized;
pub mod rng;
pub mod rounding;
pub mod scratch;
pub mod shared_codebook;
pub mod sites;
pub mod sparse;
pub mod transform;

pub use activation::{ActivationQuantizer, Segment};
pub use error::{CoreError, Result};
pub use gram::Gram;
pub use grid::{GridSpec, GroupGrid, ScaleFit};
pub use hadamard::Hadamard;
pub use half_integer::{HalfIntegerGrid, RowScale};
pub use matrix::{HalfRow, Matrix, RowSource};
pub use quantized::{Plane, PlaneLengths, QuantizedMatrix};
pub use sites::{BlockSites, Site, SiteState};
pub use sparse::Sparse;
pub use transform::{Transform, TransformSpec};
