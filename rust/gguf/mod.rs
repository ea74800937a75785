//! Cutting layers out of a GGUF file without loading it: the header is read, the new file is
//! planned as pieces of the old one, and copied in constant memory. Tensors keep their bytes,
//! quantised or not; of the metadata only what speaks of layers changes (see `rules`).

mod cut;
mod error;
mod parse;
mod rules;
mod types;

pub use cut::{Cut, Gguf, open};
pub use error::GgufError;
pub use parse::{Entry, Header, Tensor, Value};
pub use types::{Kind, Scalar};
