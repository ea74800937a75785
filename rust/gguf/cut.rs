//! A cut as data: the pieces that the new file is made of, most of them ranges of the old
//! one. It is complete, and every refusal made, before a byte is written.

use std::io::{Read, Seek};

use super::error::{GgufError, Result};
use super::experts::Experts;
use super::kept::{Kept, kept};
use super::model::Gguf;
use super::piece::{Piece, info, joined};
use super::place::pad;

/// A new file, planned and not yet written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pub(super) pieces: Vec<Piece>,
    pub(super) old_size: u64,
}

impl Gguf {
    /// Plan the file that keeps the layers `survivors` alone, and of them `experts` alone.
    ///
    /// # Errors
    ///
    /// [`GgufError::Survivors`] and [`GgufError::Experts`]; [`GgufError::Refused`] where the
    /// metadata cannot describe them; [`GgufError::Read`] and [`GgufError::Damaged`].
    pub fn cut(
        &self,
        source: &mut (impl Read + Seek),
        survivors: &[usize],
        experts: Option<&Experts>,
    ) -> Result<Cut> {
        let kept = self.kept(survivors, experts)?;
        if self.loses_layers(&kept) {
            self.check_quirks(&kept.blocks)?;
        }
        let mut pieces = vec![Piece::Bytes(self.preamble(&kept))];
        for entry in &self.header.entries {
            pieces.extend(self.entry(source, entry, &kept)?);
        }
        let mut offset = 0;
        for tensor in &kept.tensors {
            pieces.push(Piece::Bytes(info(tensor, offset)));
            offset = pad(offset + tensor.size(), self.header.alignment);
        }
        let header_size = pieces.iter().map(Piece::size).sum();
        pieces.push(self.padding(header_size));
        for tensor in &kept.tensors {
            let ranges = tensor.ranges.iter();
            pieces.extend(ranges.map(|&(start, end)| Piece::Copy(start, end)));
            pieces.push(self.padding(tensor.size()));
        }
        Ok(Cut {
            pieces: joined(pieces),
            old_size: self.header.file_size,
        })
    }

    fn kept(&self, survivors: &[usize], experts: Option<&Experts>) -> Result<Kept> {
        let ascending = survivors.windows(2).all(|pair| pair[0] < pair[1]);
        let inside = survivors
            .last()
            .is_some_and(|&last| last < self.num_layers());
        let all = survivors.len() == self.num_layers();
        if !ascending || !inside || (all && experts.is_none()) {
            return Err(GgufError::Survivors {
                survivors: survivors.to_vec(),
                num_layers: self.num_layers(),
            });
        }
        if let Some(experts) = experts {
            self.check_experts(experts, survivors)?;
        }
        let layers = survivors.iter().map(|&layer| layer as u64);
        let blocks: Vec<u64> = layers.chain(self.layers..self.blocks).collect();
        let tensors = self.header.tensors.iter();
        let new = tensors.filter_map(|tensor| kept(tensor, &blocks, experts).transpose());
        Ok(Kept {
            tensors: new.collect::<Result<_>>()?,
            experts: experts.map(Experts::left),
            blocks,
        })
    }

    /// Whether any layer goes.
    pub(super) fn loses_layers(&self, kept: &Kept) -> bool {
        (kept.blocks.len() as u64) < self.blocks
    }

    fn preamble(&self, kept: &Kept) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.header.version.to_le_bytes());
        bytes.extend((kept.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.header.entries.len() as u64).to_le_bytes());
        bytes
    }

    fn padding(&self, size: u64) -> Piece {
        Piece::Zeros(pad(size, self.header.alignment) - size)
    }
}
