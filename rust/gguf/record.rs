//! The records of a header: entries of metadata and tensors, by their place in the file.

use super::types::{Kind, Scalar};

/// A metadata value, as far as it is kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A value of a fixed size, its little-endian bytes widened with zeros.
    Scalar(Scalar, u64),
    /// A string of so many bytes.
    Text(u64),
    /// Elements of one type.
    Array {
        /// Their type.
        kind: Kind,
        /// Their number.
        count: u64,
    },
}

/// A key and its value, by their place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// The start of the entry, with the length of its key.
    pub start: u64,
    /// The start of the value, or of an array's first element, or of a string's bytes.
    pub payload: u64,
    /// The end of the entry.
    pub end: u64,
    /// The value.
    pub value: Value,
}

/// A tensor by its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name.
    pub name: String,
    /// Dimensions, the contiguous one first.
    pub dims: Vec<u64>,
    /// Ggml type.
    pub ggml_type: u32,
    /// The start of its data, from the start of the file.
    pub start: u64,
    /// Bytes of its data, without padding.
    pub size: u64,
}

/// A tensor as the header describes it.
pub(super) struct Info {
    pub name: String,
    pub dims: Vec<u64>,
    pub ggml_type: u32,
    /// The start of its data, from the start of all data.
    pub offset: u64,
    /// The start of its description.
    pub at: u64,
}

impl Entry {
    /// The value, if it is a whole number from 0.
    pub(super) fn count(&self) -> Option<u64> {
        match self.value {
            Value::Scalar(scalar, bits) => scalar.count(bits),
            _ => None,
        }
    }
}
