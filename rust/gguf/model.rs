//! A model's file: its header, and what that says of the layers.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use super::error::{GgufError, Result, damaged, unreadable};
use super::header::{Header, text};
use super::record::{Entry, Tensor};
use super::tensors::block_of;

/// The header of a model's file, with what it says of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gguf {
    pub(super) header: Header,
    pub(super) architecture: String,
    pub(super) blocks: u64,
    pub(super) layers: u64,
}

/// Open a file for reading.
///
/// # Errors
///
/// [`GgufError::Read`] where it is not there, or is not a regular file.
pub fn open(path: &Path) -> Result<File> {
    // Asked first: opening a pipe would wait for its other end.
    let found = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
    if !found.is_file() {
        return Err(GgufError::Read("it is not a regular file".into()));
    }
    File::open(path).map_err(|error| unreadable(&error))
}

impl Gguf {
    /// Read a file's header and count its layers.
    ///
    /// # Errors
    ///
    /// [`GgufError::Read`], [`GgufError::Format`], [`GgufError::Damaged`];
    /// [`GgufError::Split`] for a part of a model, and [`GgufError::NoLayers`] where the
    /// blocks are not `blk.0` to the last one.
    pub fn read(source: &mut (impl Read + Seek)) -> Result<Self> {
        let header = Header::read(source)?;
        match header.find("split.count").map(Entry::count) {
            Some(Some(0 | 1)) | None => {}
            Some(Some(files)) => return Err(GgufError::Split(files)),
            Some(None) => return Err(damaged(0, "split.count: expected a whole number")),
        }
        let no_layers = |what: String| GgufError::NoLayers(what);
        let named = header.find("general.architecture");
        let named = named.ok_or_else(|| no_layers("general.architecture is missing".into()))?;
        let architecture = text(source, named)?;
        let key = format!("{architecture}.block_count");
        let blocks = header.find(&key).and_then(Entry::count);
        let blocks =
            blocks.ok_or_else(|| no_layers(format!("{key} is missing, or not a whole number")))?;
        check_blocks(&header.tensors, blocks)?;
        let key = format!("{architecture}.nextn_predict_layers");
        let extra = header.find(&key).and_then(Entry::count).unwrap_or(0);
        if extra >= blocks {
            return Err(no_layers(format!("{key} is {extra}, of {blocks} blocks")));
        }
        Ok(Self {
            header,
            architecture,
            blocks,
            layers: blocks - extra,
        })
    }

    /// The architecture, as llama.cpp names it.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The number of decoder layers; blocks that predict further tokens are not among them.
    pub fn num_layers(&self) -> usize {
        self.layers as usize
    }

    /// The header as it was read.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The entry of a key of this architecture.
    pub(super) fn value(&self, suffix: &str) -> Option<&Entry> {
        self.header.find(&format!("{}.{suffix}", self.architecture))
    }

    /// The survivors among the decoder layers.
    pub(super) fn layers_of<'a>(&self, kept: &'a [u64]) -> &'a [u64] {
        &kept[..kept.partition_point(|&block| block < self.layers)]
    }
}

/// Refuse blocks beyond the count, blocks without tensors, and numbers with leading zeros.
fn check_blocks(tensors: &[Tensor], blocks: u64) -> Result<()> {
    let mut found = BTreeSet::new();
    for tensor in tensors {
        let Some((number, _)) = block_of(&tensor.name) else {
            continue;
        };
        match number.parse::<u64>() {
            Ok(block) if block < blocks && block.to_string() == number => found.insert(block),
            _ => {
                return Err(GgufError::NoLayers(format!(
                    "tensor {} is not in one of its {blocks} blocks",
                    tensor.name
                )));
            }
        };
    }
    match (0..=found.len() as u64).find(|block| !found.contains(block)) {
        Some(block) if block < blocks => Err(GgufError::NoLayers(format!(
            "no tensor is named blk.{block}, of {blocks} blocks"
        ))),
        _ if blocks == 0 => Err(GgufError::NoLayers("it counts 0 blocks".into())),
        _ => Ok(()),
    }
}
