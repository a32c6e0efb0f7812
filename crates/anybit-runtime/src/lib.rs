//! The decoder for inference: any supported family, any weight storage, one forward pass.
//!
//! [`Decoder`] holds the weights, [`Session`] the state of one sequence (KV cache and the buffers
//! of the forward pass, allocated once), [`generate()`] turns both into text.

pub mod decoder;
pub mod error;
pub mod generate;
pub mod kv;
pub mod layer;
pub mod sampler;
pub mod session;

pub use decoder::{BLOCK_CHUNK, Buffers, Decoder};
pub use error::{Result, RuntimeError};
pub use generate::{Finish, GenerateOptions, Generated, generate};
pub use kv::{KvCache, LayerKv};
pub use layer::{DecoderLayer, LayerBuffers, Linear};
pub use sampler::{Sampler, SamplerOptions};
pub use session::Session;
