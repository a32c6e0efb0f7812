//! Reverse-mode differentiation for decoders: a small tape, fused operations with hand-written
//! gradients, the differentiable decoder, sensitivities of its weights, and optimizers.
//!
//! | symbol | meaning |
//! |---|---|
//! | `L` | the scalar that is differentiated: mean cross-entropy of the next token, in nats |
//! | `dy` | `∂L/∂y`, the gradient with respect to `y`; always of `y`'s shape |
//! | `x`, `W`, `y` | input `[rows, in]`, weight `[out, in]` and output `[rows, out]` of a linear |
//! | row | one token: sequences of `seqlen` tokens lie one after another |
//! | `F` | Fisher diagonal of a weight: mean over sequences of `(∂L/∂W)²` |
//! | `s_t` | mean of `(∂L/∂y_t)²` over a group of output rows, for one token |
//!
//! An operation is a method of [`Tape`] in its own file under [`ops`]: a forward function, a
//! backward function, their formula, a test against finite differences; `tests/golden.rs` compares
//! values and gradients with PyTorch. A method that needs an operation of its own records it with
//! [`Tape::custom`] in its own folder and nothing here changes.
//!
//! Work is split into tiles whose size depends on shapes alone, and partial sums are added in a
//! fixed order: the same input gives the same bits on any number of threads.

pub mod decoder;
pub mod distill;
pub mod error;
pub mod estimators;
pub mod fisher;
pub mod head;
pub mod ops;
pub mod optim;
mod pool;
mod store;
pub mod tape;
pub mod tensor;
#[cfg(test)]
mod testing;
mod tiles;
pub mod train;
pub mod vision;

pub use decoder::{
    AtLayerSite, AtSite, BlockOutput, BlockShape, BlockVars, DecoderOutput, DecoderVars,
    LinearSite, TrainBlock, TrainDecoder, block_forward, block_forward_at, next_tokens,
};
pub use error::{GradError, Result};
pub use estimators::{Estimator, EstimatorError, EstimatorSpec, Form, half_integer_codes};
pub use fisher::{
    BlockSensitivity, GRADIENT_SCALE, HeadSensitivity, Labels, Receiver, SensitivityOptions,
    sensitivities,
};
pub use head::HeadRows;
pub use ops::{AttentionSpec, FakeQuant, IGNORE, Rope};
pub use optim::{AdamW, AdamWOptions, OneCycle, Update, clip_factor, global_norm};
pub use tape::{Pass, Slot, Tape, Var};
pub use tensor::Tensor;
