//! The decoder for inference: any supported family, any weight storage, one forward pass.
//!
//! [`Decoder`] holds the weights, [`Session`] the state of one sequence (KV cache and the buffers
//! of the forward pass, allocated once), [`BatchSession`] that of several which advance together,
//! [`generate()`] turns a session into text.

pub mod decoder;
pub mod error;
pub mod generate;
pub mod kv;
pub mod layer;
pub mod linear;
pub mod sampler;
pub mod session;

pub use anybit_kernels::PlainType;
pub use decoder::{BLOCK_CHUNK, Buffers, Decoder};
pub use error::{Result, RuntimeError};
pub use generate::{Finish, GenerateOptions, Generated, generate};
pub use kv::{KvCache, LayerKv};
pub use layer::{DecoderLayer, LayerBuffers};
pub use linear::Linear;
pub use sampler::{Sampler, SamplerOptions};
pub use session::{BatchSession, Session};
