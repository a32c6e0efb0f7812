//! anybit: any model, any bits.
//!
//! The library behind the `anybit` command. Each command is a function here, with the same
//! defaults; the crates below are re-exported for everything finer.
//!
//! ```no_run
//! use anybit::{io::Checkpoint, ptq::Recipe, quantize};
//!
//! let model = Checkpoint::open("model".as_ref())?;
//! let recipe = Recipe { method: "gptq".into(), bits: 3.0, ..Default::default() };
//! quantize::run(&model, &recipe, &quantize::Options::new("model-3bit"), &mut |_| {})?;
//! # Ok::<(), anybit::Error>(())
//! ```

pub use anybit_core as core;
pub use anybit_eval as eval;
pub use anybit_grad as grad;
pub use anybit_io as io;
pub use anybit_kernels as kernels;
pub use anybit_ptq as ptq;
pub use anybit_runtime as runtime;

pub mod attribute;
pub mod bench;
pub mod demo;
pub mod detect;
pub mod error;
pub mod frontier;
pub mod machine;
pub mod measure;
pub mod quantize;
pub mod stages;
pub mod stream;
pub mod train;
pub mod vision;

pub use error::{Error, Result};
