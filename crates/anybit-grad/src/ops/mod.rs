//! The operations, one file per family: a forward function, a backward function, their formula,
//! and the method of [`crate::Tape`] that records them. Called by [`crate::decoder`] and by
//! methods.
//!
//! | file | operation | reads in its backward |
//! |---|---|---|
//! | `linear` | `x Wᵀ + b` | `x`, `W` |
//! | `matmul` | `A B` | `A`, `B` |
//! | `embedding` | rows of a table | tokens |
//! | `norm` | RMSNorm | `x`, `w` |
//! | `rope` | rotary embedding | – |
//! | `attention` | causal attention, grouped keys | `q`, `k`, `v`, `y`, `ln Σ e^s` |
//! | `swiglu` | `silu(g) · u` | `g`, `u` |
//! | `cross_entropy` | mean cross-entropy, also through a head | its gradient, made before |
//! | `elementwise` | `+`, `−`, `·`, scaling | inputs |
//! | `reduce` | sum, mean, mean squared error | inputs |
//! | `shape` | another shape | – |
//! | `transform` | `x P` for a fixed transform | – |
//! | `straight_through` | any function with the identity's gradient | – |
//! | `transpose` | `xᵀ` | – |
//! | `columns` | `x · c`, `x / c`, a factor per column | `x`, `c` |
//! | `kronecker` | `x (L ⊗ R)` | `x`, `L`, `R` |
//! | `cayley` | orthogonal matrix of a skew one | `X`, `U` |
//! | `fake_quant` | values on a grid, with learned clips | `x`, clips |

mod attention;
mod cayley;
mod columns;
mod cross_entropy;
mod elementwise;
mod embedding;
mod fake_quant;
mod kronecker;
mod linear;
mod matmul;
mod norm;
mod reduce;
mod rope;
mod shape;
mod straight_through;
mod swiglu;
mod transform;
mod transpose;

pub use attention::AttentionSpec;
pub use cross_entropy::IGNORE;
pub use fake_quant::FakeQuant;
pub use rope::Rope;
