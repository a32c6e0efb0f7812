//! Training texts: files to documents, documents to a file of tokens, tokens to sequences in a
//! seeded order.
//!
//! | file | its documents |
//! |---|---|
//! | `.jsonl`, `.ndjson` | one object a line, the text under a key (`text`) |
//! | `.parquet` | one row each, the text in a column (feature `parquet`) |
//! | any other | the whole file, as plain text |
//!
//! Files are read in pieces, so that memory does not grow with them. Called by
//! [`super::corpus`].

mod documents;
mod error;
mod order;
#[cfg(feature = "parquet")]
mod parquet;
mod tokens;

pub use documents::{Documents, Piece};
pub use error::DataError;
pub use order::{Order, slice};
pub use tokens::TokenFile;

/// A result of reading texts.
pub type Result<T> = std::result::Result<T, DataError>;
