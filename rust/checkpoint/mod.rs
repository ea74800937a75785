//! Cutting layers and experts out of a checkpoint of safetensors on disk, without loading it.
//!
//! [`Checkpoint`] reads and checks the headers, [`Cut`] says which tensors go and how the
//! others are called, [`Experts`] which parts of them stay, [`Job`] lays the output out and copies the bytes from file to file.
//! It knows files and names of tensors; configs, models and formats of quantisation it does not.

mod copy;
mod cut;
mod error;
mod experts;
mod header;
mod index;
mod job;
mod source;

pub use cut::Cut;
pub use error::Error;
pub use experts::Experts;
pub use header::{Header, MAX_HEADER_BYTES, Tensor};
pub use index::Index;
pub use job::Job;
pub use source::{Checkpoint, INDEX_FILE, SINGLE_FILE, Shard};
