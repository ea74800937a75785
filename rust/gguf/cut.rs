//! A cut as data: the pieces that the new file is made of, most of them ranges of the old
//! one. It is complete, and every refusal made, before a byte is written.

use std::io::{Read, Seek};

use super::error::{GgufError, Result};
use super::model::Gguf;
use super::piece::{Piece, info, joined};
use super::place::pad;
use super::record::Tensor;
use super::tensors::renamed;

/// A new file, planned and not yet written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub(super) pieces: Vec<Piece>,
    pub(super) old_size: u64,
}

impl Gguf {
    /// Plan the file that keeps the layers `survivors` alone.
    ///
    /// # Errors
    ///
    /// [`GgufError::Survivors`]; [`GgufError::Refused`] where the metadata cannot describe
    /// them; [`GgufError::Read`] and [`GgufError::Damaged`].
    pub fn cut(&self, source: &mut (impl Read + Seek), survivors: &[usize]) -> Result<Cut> {
        let kept = self.kept(survivors)?;
        self.check_quirks(&kept)?;
        let mut pieces = vec![Piece::Bytes(self.preamble(&kept))];
        for entry in &self.header.entries {
            pieces.extend(self.entry(source, entry, &kept)?);
        }
        let tensors: Vec<(String, &Tensor)> = self
            .header
            .tensors
            .iter()
            .filter_map(|tensor| Some((renamed(&tensor.name, &kept)?, tensor)))
            .collect();
        let mut offset = 0;
        for (name, tensor) in &tensors {
            pieces.push(Piece::Bytes(info(name, tensor, offset)));
            offset = pad(offset + tensor.size, self.header.alignment);
        }
        let header_size = pieces.iter().map(Piece::size).sum();
        pieces.push(self.padding(header_size));
        for (_, tensor) in &tensors {
            pieces.push(Piece::Copy(tensor.start, tensor.start + tensor.size));
            pieces.push(self.padding(tensor.size));
        }
        Ok(Cut {
            pieces: joined(pieces),
            old_size: self.header.file_size,
        })
    }

    /// The surviving blocks: the survivors, and the blocks beyond the layers.
    fn kept(&self, survivors: &[usize]) -> Result<Vec<u64>> {
        let ascending = survivors.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = survivors
            .last()
            .is_some_and(|&last| last < self.num_layers());
        if !ascending || !inside || survivors.len() == self.num_layers() {
            return Err(GgufError::Survivors {
                survivors: survivors.to_vec(),
                num_layers: self.num_layers(),
            });
        }
        let layers = survivors.iter().map(|&layer| layer as u64);
        Ok(layers.chain(self.layers..self.blocks).collect())
    }

    fn preamble(&self, kept: &[u64]) -> Vec<u8> {
        let names = self.header.tensors.iter();
        let tensors = names.filter(|t| renamed(&t.name, kept).is_some()).count();
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.header.version.to_le_bytes());
        bytes.extend((tensors as u64).to_le_bytes());
        bytes.extend((self.header.entries.len() as u64).to_le_bytes());
        bytes
    }

    fn padding(&self, size: u64) -> Piece {
        Piece::Zeros(pad(size, self.header.alignment) - size)
    }
}
