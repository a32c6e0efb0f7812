//! Checkpoints in and out: Hugging Face folders, GGUF, the native packed format; tokenizers and
//! chat templates.
//!
//! [`Checkpoint::open`] reads any of them into one view: a [`ModelConfig`] and tensors by their
//! Hugging Face names, memory-mapped and decoded as they are read.

pub mod atomic;
pub mod checkpoint;
pub mod config;
pub mod convert;
pub mod error;
pub mod gguf;
pub mod native;
pub mod off_grid;
pub mod safetensors_file;
pub mod size;
pub mod synth;
pub mod tensor;
pub mod tokenizer;

pub use checkpoint::{Checkpoint, Format, Weight};
pub use config::{Architecture, ModelConfig, RopeScaling};
pub use error::{IoError, Result, nearest_name};
pub use tensor::{Dtype, StoredTensor};
