//! The pieces of a new file: ranges of the old one, new bytes and zeros.

use std::io::{Read, Seek, SeekFrom};

use super::error::{Result, refused, unreadable};
use super::header::elements;
use super::kept::New;
use super::record::{Entry, Value};
use super::types::Scalar;

/// A part of the new file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// A range of the old file.
    Copy(u64, u64),
    /// New bytes.
    Bytes(Vec<u8>),
    /// So many zeros.
    Zeros(u64),
}

impl Piece {
    pub fn size(&self) -> u64 {
        match self {
            Self::Copy(start, end) => end - start,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(size) => *size,
        }
    }

    /// Fill the buffer with the bytes of the piece from `at` on.
    pub fn fill(&self, at: u64, source: &mut (impl Read + Seek), buffer: &mut [u8]) -> Result<()> {
        match self {
            Self::Bytes(bytes) => buffer.copy_from_slice(&bytes[at as usize..][..buffer.len()]),
            Self::Zeros(_) => buffer.fill(0),
            Self::Copy(start, _) => source
                .seek(SeekFrom::Start(start + at))
                .and_then(|_| source.read_exact(buffer))
                .map_err(|error| unreadable(&error))?,
        }
        Ok(())
    }
}

/// An entry with another number, of the same type.
pub(super) fn recounted(entry: &Entry, number: u64) -> Result<Vec<Piece>> {
    let Value::Scalar(scalar @ (Scalar::Unsigned(_) | Scalar::Signed(_)), _) = entry.value else {
        return Err(refused(&entry.key, "is not a whole number"));
    };
    let bytes = number.to_le_bytes();
    let (value, rest) = bytes.split_at(scalar.size());
    if rest.iter().any(|&byte| byte > 0) {
        return Err(refused(&entry.key, &format!("has no room for {number}")));
    }
    Ok(vec![
        Piece::Copy(entry.start, entry.payload),
        Piece::Bytes(value.to_vec()),
    ])
}

/// An entry with another text.
pub(super) fn retold(entry: &Entry, text: &str) -> Vec<Piece> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    vec![
        Piece::Copy(entry.start, entry.payload - 8),
        Piece::Bytes(bytes),
    ]
}

/// An array with the elements of `kept` alone.
pub(super) fn filtered(
    source: &mut (impl Read + Seek),
    entry: &Entry,
    kept: &[u64],
) -> Result<Vec<Piece>> {
    let bounds = elements(source, entry)?;
    let mut pieces = vec![
        Piece::Copy(entry.start, entry.payload - 8),
        Piece::Bytes((kept.len() as u64).to_le_bytes().to_vec()),
    ];
    for &element in kept {
        let element = element as usize;
        pieces.push(Piece::Copy(bounds[element], bounds[element + 1]));
    }
    Ok(pieces)
}

/// A tensor's entry in the header.
pub(super) fn info(tensor: &New, offset: u64) -> Vec<u8> {
    let mut bytes = (tensor.name.len() as u64).to_le_bytes().to_vec();
    bytes.extend(tensor.name.as_bytes());
    bytes.extend((tensor.dims.len() as u32).to_le_bytes());
    for dim in &tensor.dims {
        bytes.extend(dim.to_le_bytes());
    }
    bytes.extend(tensor.ggml_type.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// The same pieces, neighbours joined.
pub(super) fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Copy(_, end)), Piece::Copy(start, stop)) if *end == start => *end = stop,
            (Some(Piece::Bytes(bytes)), Piece::Bytes(more)) => bytes.extend(more),
            (_, piece) if piece.size() == 0 => {}
            (_, piece) => joined.push(piece),
        }
    }
    joined
}
