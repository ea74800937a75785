//! Cutting layers and experts out of a GGUF file without loading it: the header is read, the new
//! file is planned as pieces of the old one, and copied in constant memory. Tensors keep their
//! bytes, quantised or not; of the metadata only what speaks of layers or experts changes (see
//! `rules`).

mod cut;
mod error;
mod experts;
mod header;
mod input;
mod kept;
mod label;
mod metadata;
mod model;
mod piece;
mod place;
mod quirks;
mod record;
mod rules;
mod share;
mod tensors;
mod told;
mod types;
mod write;

pub use cut::Cut;
pub use error::GgufError;
pub use experts::Experts;
pub use header::Header;
pub use model::{Gguf, open};
pub use record::{Entry, Tensor, Value};
pub use told::Told;
pub use types::{Kind, Scalar};
