//! A cut as data: the pieces that the new file is made of, most of them ranges of the old
//! one. It is complete, and every refusal made, before a byte is written.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use super::error::{GgufError, Result, damaged, unreadable};
use super::parse::{Entry, Header, Tensor, Value, elements, integers, pad, text};
use super::rules::{
    INDICES, Meaning, NOT_PER_LAYER, OTHER_TOWERS, PER_LAYER_PREFIX, QUIRKS, Quirk, SCALARS,
    UNCUTTABLE,
};
use super::types::{Kind, Scalar};

const CHUNK: usize = 1 << 22;

/// The header of a model's file, with what it says of its layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gguf {
    header: Header,
    architecture: String,
    blocks: u64,
    layers: u64,
}

/// Open a file for reading.
///
/// # Errors
///
/// [`GgufError::Read`] where it is not there, or is no regular file.
pub fn open(path: &Path) -> Result<File> {
    // Asked first: opening a pipe would wait for its other end.
    let found = std::fs::metadata(path).map_err(|error| unreadable(&error))?;
    if !found.is_file() {
        return Err(GgufError::Read("it is not a regular file".into()));
    }
    File::open(path).map_err(|error| unreadable(&error))
}

/// A part of the new file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    /// A range of the old file.
    Copy(u64, u64),
    /// New bytes.
    Bytes(Vec<u8>),
    /// So many zeros.
    Zeros(u64),
}

/// A new file, planned and not yet written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    pieces: Vec<Piece>,
    old_size: u64,
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
        match header.find("split.count").map(count) {
            Some(Some(0 | 1)) | None => {}
            Some(Some(files)) => return Err(GgufError::Split(files)),
            Some(None) => return Err(damaged(0, "split.count is no number")),
        }
        let no_layers = |what: String| GgufError::NoLayers(what);
        let named = header.find("general.architecture");
        let named = named.ok_or_else(|| no_layers("general.architecture is missing".into()))?;
        let architecture = text(source, named)?;
        let key = format!("{architecture}.block_count");
        let blocks = header.find(&key).and_then(count);
        let blocks = blocks.ok_or_else(|| no_layers(format!("{key} is missing, or no number")))?;
        check_blocks(&header.tensors, blocks)?;
        let key = format!("{architecture}.nextn_predict_layers");
        let extra = header.find(&key).and_then(count).unwrap_or(0);
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

    /// The surviving blocks: the survivors, and the blocks that are no layers.
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

    fn value(&self, suffix: &str) -> Option<&Entry> {
        self.header.find(&format!("{}.{suffix}", self.architecture))
    }

    /// The survivors among the decoder layers.
    fn layers_of<'a>(&self, kept: &'a [u64]) -> &'a [u64] {
        &kept[..kept.partition_point(|&block| block < self.layers)]
    }

    fn check_quirks(&self, kept: &[u64]) -> Result<()> {
        let layers = self.layers_of(kept);
        let number = layers.len() as u64;
        let has = |key| self.value(key).is_some();
        let set = |key| {
            self.value(key)
                .and_then(count)
                .is_some_and(|value| value > 0)
        };
        for (_, quirk) in QUIRKS.iter().filter(|(name, _)| *name == self.architecture) {
            let obstacle = match *quirk {
                Quirk::Every(period) => out_of_step(layers, period),
                Quirk::EveryUnless(period, key) if !has(key) => out_of_step(layers, period),
                Quirk::EveryIf(period, key) if set(key) && !has(PATTERN) => {
                    out_of_step(layers, period)
                }
                Quirk::Count(special) if self.layers == special || number == special => Some(
                    format!("takes other constants at {special} layers than at any other number"),
                ),
                Quirk::First if layers[0] != 0 => Some("needs its first layer".into()),
                Quirk::CountUnless(key) if !has(key) => Some(format!(
                    "makes a constant of the number of layers where {key} is missing"
                )),
                Quirk::Lite(key) if has(key) == matches!(number, 26 | 27) => Some(format!(
                    "takes 26 or 27 layers for the variant without {key}, and only them"
                )),
                Quirk::Never(why) => Some(why.into()),
                _ => None,
            };
            if let Some(why) = obstacle {
                return Err(refused(
                    &self.architecture,
                    &format!("is an architecture that {why}"),
                ));
            }
        }
        Ok(())
    }

    fn entry(
        &self,
        source: &mut (impl Read + Seek),
        entry: &Entry,
        kept: &[u64],
    ) -> Result<Vec<Piece>> {
        let whole = vec![Piece::Copy(entry.start, entry.end)];
        if entry.key == "split.tensors.count" {
            let names = self.header.tensors.iter();
            let tensors = names.filter(|t| renamed(&t.name, kept).is_some()).count();
            return recounted(entry, tensors as u64);
        }
        let prefix = format!("{}.", self.architecture);
        let suffix = match entry.key.strip_prefix(&prefix) {
            Some(suffix) if !OTHER_TOWERS.iter().any(|tower| suffix.starts_with(tower)) => suffix,
            _ if entry.key.starts_with(PER_LAYER_PREFIX) => &entry.key,
            _ => return Ok(whole),
        };
        match entry.value {
            Value::Scalar(..) => match SCALARS.iter().find(|(name, _)| *name == suffix) {
                Some((_, meaning)) => self.scalar(entry, *meaning, kept),
                None => Ok(whole),
            },
            Value::Text(_) | Value::Array { count: 0, .. } => Ok(whole),
            Value::Array { .. } if NOT_PER_LAYER.contains(&suffix) => Ok(whole),
            Value::Array { .. } if UNCUTTABLE.contains(&suffix) => Err(refused(
                &entry.key,
                "speaks of single layers in a way that a cut cannot keep",
            )),
            Value::Array { .. } if INDICES.contains(&suffix) => self.indices(source, entry, kept),
            Value::Array { count, .. } if count == self.blocks => filtered(source, entry, kept),
            Value::Array { count, .. } if count == self.layers => {
                filtered(source, entry, self.layers_of(kept))
            }
            Value::Array {
                kind: Kind::Text, ..
            } => Ok(whole),
            Value::Array { count, .. } => Err(refused(
                &entry.key,
                &format!(
                    "is an array of {count} elements, which has not one a layer and might name \
                     layers: cut the model in memory instead, with a folder as --out"
                ),
            )),
        }
    }

    fn scalar(&self, entry: &Entry, meaning: Meaning, kept: &[u64]) -> Result<Vec<Piece>> {
        let whole = Ok(vec![Piece::Copy(entry.start, entry.end)]);
        let value = count(entry).ok_or_else(|| refused(&entry.key, "is not a whole number"))?;
        let below = kept.partition_point(|&block| block < value) as u64;
        let obstacle = match meaning {
            Meaning::Blocks => return recounted(entry, kept.len() as u64),
            Meaning::Leading => return recounted(entry, below),
            Meaning::LeadingStay if below < value.min(self.blocks) => Some(format!(
                "is {value}: the first {value} layers must stay, they take in images by their place"
            )),
            Meaning::Period => out_of_step(self.layers_of(kept), value)
                .map(|why| format!("is {value}, which {why}")),
            Meaning::Zero(what) if value > 0 => Some(format!(
                "is {value}, which {what}: no value describes the model without some layers"
            )),
            Meaning::Trailing | Meaning::LeadingStay | Meaning::Zero(_) => None,
        };
        obstacle.map_or(whole, |why| Err(refused(&entry.key, &why)))
    }

    fn indices(
        &self,
        source: &mut (impl Read + Seek),
        entry: &Entry,
        kept: &[u64],
    ) -> Result<Vec<Piece>> {
        let named = integers(source, entry)?;
        if let Some(wrong) = named.iter().find(|&&index| index >= self.blocks) {
            return Err(refused(
                &entry.key,
                &format!("names layer {wrong}, of {}", self.blocks),
            ));
        }
        let new: Vec<u64> = named
            .iter()
            .filter_map(|index| place_of(*index, kept))
            .collect();
        let Value::Array {
            kind: Kind::Scalar(scalar),
            ..
        } = entry.value
        else {
            return Err(damaged(entry.start, format!("{} is no list", entry.key)));
        };
        let mut bytes = (new.len() as u64).to_le_bytes().to_vec();
        for index in new {
            bytes.extend(&index.to_le_bytes()[..scalar.size()]);
        }
        Ok(vec![
            Piece::Copy(entry.start, entry.payload - 8),
            Piece::Bytes(bytes),
        ])
    }
}

impl Cut {
    /// Bytes of the new file.
    pub fn size(&self) -> u64 {
        self.pieces.iter().map(Piece::size).sum()
    }

    /// Write the new file, telling `progress` the bytes that are done until it says stop.
    ///
    /// # Errors
    ///
    /// [`GgufError::Read`], [`GgufError::Write`]; [`GgufError::Stopped`] when `progress`
    /// gives false.
    pub fn write(
        &self,
        source: &mut (impl Read + Seek),
        out: &mut impl Write,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut done, mut told) = (0, 0);
        for piece in &self.pieces {
            let mut at = 0;
            while at < piece.size() {
                let size = (piece.size() - at).min(CHUNK as u64);
                piece.fill(at, source, &mut buffer[..size as usize])?;
                out.write_all(&buffer[..size as usize])
                    .map_err(|error| unwritable(&error))?;
                at += size;
                done += size;
                if done - told >= CHUNK as u64 {
                    told = done;
                    go_on(progress(done))?;
                }
            }
        }
        go_on(progress(done))
    }

    /// Write the new file to a path that is free, flush it to disk, and leave nothing there
    /// if that fails.
    ///
    /// # Errors
    ///
    /// As [`Cut::write`]; [`GgufError::Write`] where something is there.
    pub fn save(
        &self,
        source: &mut File,
        path: &Path,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let size = source.metadata().map_err(|error| unreadable(&error))?.len();
        if size != self.old_size {
            return Err(GgufError::Read("it was changed in the meantime".into()));
        }
        let mut options = OpenOptions::new();
        let opened = options.write(true).create_new(true).open(path);
        let mut out = opened.map_err(|error| unwritable(&error))?;
        let written = self
            .write(source, &mut out, progress)
            .and_then(|()| out.sync_all().map_err(|error| unwritable(&error)));
        if written.is_err() {
            // The error that is on its way says more than one of the removal would.
            let _ = std::fs::remove_file(path);
        }
        written
    }
}

impl Piece {
    fn size(&self) -> u64 {
        match self {
            Self::Copy(start, end) => end - start,
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::Zeros(size) => *size,
        }
    }

    /// Fill the buffer with the bytes of the piece from `at` on.
    fn fill(&self, at: u64, source: &mut (impl Read + Seek), buffer: &mut [u8]) -> Result<()> {
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

fn go_on(wanted: bool) -> Result<()> {
    if wanted {
        Ok(())
    } else {
        Err(GgufError::Stopped)
    }
}

const PATTERN: &str = "attention.sliding_window_pattern";

fn unwritable(error: &std::io::Error) -> GgufError {
    GgufError::Write(error.to_string())
}

fn refused(key: &str, reason: &str) -> GgufError {
    GgufError::Refused {
        key: key.into(),
        reason: reason.into(),
    }
}

/// The value of a scalar that is a whole number.
fn count(entry: &Entry) -> Option<u64> {
    match entry.value {
        Value::Scalar(scalar, bits) => scalar.count(bits),
        _ => None,
    }
}

/// The block of a tensor, if it belongs to one, and the rest of its name.
fn block_of(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("blk.")?.split_once('.')
}

/// A tensor's new name; none if it goes.
fn renamed(name: &str, kept: &[u64]) -> Option<String> {
    let Some((block, rest)) = block_of(name) else {
        return Some(name.into());
    };
    let place = place_of(block.parse().ok()?, kept)?;
    Some(format!("blk.{place}.{rest}"))
}

fn place_of(block: u64, kept: &[u64]) -> Option<u64> {
    kept.binary_search(&block).ok().map(|place| place as u64)
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

/// Why the layers would not keep their places in a period, if so.
fn out_of_step(layers: &[u64], period: u64) -> Option<String> {
    let moved = (0..)
        .zip(layers)
        .find(|(new, old)| period > 1 && new % period != *old % period);
    moved.map(|(new, old)| {
        format!(
            "makes one layer in {period} of another kind by its place: layer {old} would become \
             layer {new}, of the wrong kind; drop {period} layers in a row, or a multiple of it"
        )
    })
}

/// An entry with another number, of the same type.
fn recounted(entry: &Entry, number: u64) -> Result<Vec<Piece>> {
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

/// An array with the elements of `kept` alone.
fn filtered(source: &mut (impl Read + Seek), entry: &Entry, kept: &[u64]) -> Result<Vec<Piece>> {
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
fn info(name: &str, tensor: &Tensor, offset: u64) -> Vec<u8> {
    let mut bytes = (name.len() as u64).to_le_bytes().to_vec();
    bytes.extend(name.as_bytes());
    bytes.extend((tensor.dims.len() as u32).to_le_bytes());
    for dim in &tensor.dims {
        bytes.extend(dim.to_le_bytes());
    }
    bytes.extend(tensor.ggml_type.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// The same pieces, neighbours joined.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
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
