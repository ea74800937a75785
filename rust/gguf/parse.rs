//! Reading the header of a GGUF file, strictly: every length is held against the file before
//! it is followed, and nothing is allocated on a file's word. Knows nothing of layers.
//!
//! The layout that llama.cpp loads is demanded: tensors contiguous, in order and aligned.
//! It makes the size of a tensor of an unknown ggml type unambiguous.

use std::collections::HashSet;
use std::io::{BufReader, Read, Seek, SeekFrom};

use super::error::{GgufError, Result, damaged, unreadable};
use super::types::{Kind, Scalar, block};

const MAX_HEADER: u64 = 1 << 28;
const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
const MAX_KEY: u64 = (1 << 16) - 1;
const MAX_NAME: u64 = 1 << 10;
const MAX_DIMS: u32 = 4;
const MAX_DEPTH: u32 = 8;
const DEFAULT_ALIGNMENT: u64 = 32;
const LEAST_ENTRY: u64 = 8 + 4 + 1;
const LEAST_TENSOR: u64 = 8 + 4 + 4 + 8;

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
    /// Where the entry begins, with the length of its key.
    pub start: u64,
    /// Where the value begins, or the first element of an array, or a string's bytes.
    pub payload: u64,
    /// Where the entry ends.
    pub end: u64,
    /// The value.
    pub value: Value,
}

/// A tensor by its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its dimensions, the contiguous one first.
    pub dims: Vec<u64>,
    /// Its ggml type.
    pub ggml_type: u32,
    /// Where its data begins, from the start of the file.
    pub start: u64,
    /// Bytes of its data, without padding.
    pub size: u64,
}

/// Everything but the data of the tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// What every tensor's offset is a multiple of.
    pub alignment: u64,
    /// The metadata, in the file's order.
    pub entries: Vec<Entry>,
    /// The tensors, in the file's order.
    pub tensors: Vec<Tensor>,
    /// Bytes of the file.
    pub file_size: u64,
}

impl Header {
    /// Read the header from the start of a file.
    ///
    /// # Errors
    ///
    /// [`GgufError::Read`], [`GgufError::Format`] and [`GgufError::Damaged`].
    pub fn read(source: &mut (impl Read + Seek)) -> Result<Self> {
        let file_size = source
            .seek(SeekFrom::End(0))
            .and_then(|size| source.rewind().map(|()| size))
            .map_err(|error| unreadable(&error))?;
        let mut input = Input::new(source, 0, file_size);
        let version = input.version()?;
        let num_tensors = input.counted("tensors", LEAST_TENSOR, MAX_TENSORS)?;
        let num_entries = input.counted("metadata entries", LEAST_ENTRY, MAX_ENTRIES)?;
        let entries = repeat(num_entries, || input.entry())?;
        unique(
            entries
                .iter()
                .map(|entry| (entry.key.as_str(), entry.start)),
        )?;
        let alignment = alignment(&entries)?;
        let infos = repeat(num_tensors, || input.tensor())?;
        unique(infos.iter().map(|info| (info.name.as_str(), info.at)))?;
        let data = pad(input.position, alignment);
        Ok(Self {
            version,
            alignment,
            tensors: place(infos, data, alignment, file_size)?,
            entries,
            file_size,
        })
    }

    /// The entry of a key.
    pub fn find(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }
}

/// The next multiple of the alignment; positions are below 2^60, so it exists.
pub fn pad(position: u64, alignment: u64) -> u64 {
    position.next_multiple_of(alignment)
}

/// The bytes of a string value.
///
/// # Errors
///
/// [`GgufError::Damaged`] where it is longer than a name may be, or not UTF-8.
pub fn text(source: &mut (impl Read + Seek), entry: &Entry) -> Result<String> {
    let Value::Text(length) = entry.value else {
        return Err(damaged(
            entry.start,
            format!("{} is not a string", entry.key),
        ));
    };
    let mut input = Input::new(source, entry.payload, entry.end);
    input.jump()?;
    input.utf8(length, MAX_NAME, "a string that names")
}

/// Where each element of an array value begins, and where the last one ends.
///
/// # Errors
///
/// [`GgufError::Read`] and [`GgufError::Damaged`] where the file is not what it was.
pub fn elements(source: &mut (impl Read + Seek), entry: &Entry) -> Result<Vec<u64>> {
    let Value::Array { kind, count } = entry.value else {
        return Ok(vec![entry.payload, entry.end]);
    };
    let mut input = Input::new(source, entry.payload, entry.end);
    input.jump()?;
    let mut bounds = vec![entry.payload];
    for _ in 0..count {
        input.skip_value(kind, 1)?;
        bounds.push(input.position);
    }
    Ok(bounds)
}

/// The integers of an array value.
///
/// # Errors
///
/// [`GgufError::Refused`] where the elements are not integers from 0.
pub fn integers(source: &mut (impl Read + Seek), entry: &Entry) -> Result<Vec<u64>> {
    let refused = || GgufError::Refused {
        key: entry.key.clone(),
        reason: "was expected to hold the numbers of layers, and holds something else".into(),
    };
    let Value::Array {
        kind: Kind::Scalar(scalar),
        count,
    } = entry.value
    else {
        return Err(refused());
    };
    let mut input = Input::new(source, entry.payload, entry.end);
    input.jump()?;
    repeat(count, || {
        let bits = input.scalar(scalar)?;
        scalar.count(bits).ok_or_else(refused)
    })
}

struct Info {
    name: String,
    dims: Vec<u64>,
    ggml_type: u32,
    offset: u64,
    at: u64,
}

struct Input<'a, R> {
    inner: BufReader<&'a mut R>,
    position: u64,
    limit: u64,
    file_size: u64,
}

impl<'a, R: Read + Seek> Input<'a, R> {
    fn new(source: &'a mut R, position: u64, file_size: u64) -> Self {
        Self {
            inner: BufReader::new(source),
            position,
            limit: file_size.min(position.saturating_add(MAX_HEADER)),
            file_size,
        }
    }

    fn jump(&mut self) -> Result<()> {
        let target = SeekFrom::Start(self.position);
        self.inner
            .seek(target)
            .map_err(|error| unreadable(&error))?;
        Ok(())
    }

    /// Refuse to go on beyond the file, or beyond what a header may take.
    fn need(&self, bytes: u64, what: &str) -> Result<()> {
        if bytes <= self.limit - self.position {
            return Ok(());
        }
        let left = self.file_size - self.position;
        Err(damaged(
            self.position,
            if bytes > left {
                format!("{what} needs {bytes} bytes, and {left} are left: the file is cut short")
            } else {
                format!("{what} makes the header longer than {MAX_HEADER} bytes")
            },
        ))
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.need(N as u64, what)?;
        let mut bytes = [0; N];
        self.inner
            .read_exact(&mut bytes)
            .map_err(|error| unreadable(&error))?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64, what: &str) -> Result<()> {
        self.need(bytes, what)?;
        self.inner
            .seek_relative(bytes.cast_signed())
            .map_err(|error| unreadable(&error))?;
        self.position += bytes;
        Ok(())
    }

    fn version(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.bytes("the magic")?;
        if magic != *b"GGUF" {
            return Err(GgufError::Format(format!(
                "is no GGUF file: it begins with {:?}, expected \"GGUF\"",
                String::from_utf8_lossy(&magic)
            )));
        }
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(version),
            1 => Err(GgufError::Format(
                "is a GGUF file of version 1, expected 2 or 3: convert the model anew".into(),
            )),
            _ if matches!(version.swap_bytes(), 1..=3) => Err(GgufError::Format(
                "is a big-endian GGUF file, expected a little-endian one: convert it with \
                 `gguf-convert-endian FILE little` of the Python package gguf"
                    .into(),
            )),
            _ => Err(GgufError::Format(format!(
                "is a GGUF file of version {version}, expected 2 or 3"
            ))),
        }
    }

    fn counted(&mut self, what: &str, least: u64, most: u64) -> Result<u64> {
        let at = self.position;
        let count = self.u64(what)?;
        let room = (self.limit - self.position) / least;
        if count > most.min(room) {
            return Err(damaged(
                at,
                format!(
                    "{count} {what} are counted, and there is room for {}: the file is cut short",
                    most.min(room)
                ),
            ));
        }
        Ok(count)
    }

    fn utf8(&mut self, length: u64, most: u64, what: &str) -> Result<String> {
        let at = self.position;
        if length > most {
            return Err(damaged(
                at,
                format!("{what} of {length} bytes: expected at most {most}"),
            ));
        }
        self.need(length, what)?;
        let mut bytes = vec![0; length as usize];
        self.inner
            .read_exact(&mut bytes)
            .map_err(|error| unreadable(&error))?;
        self.position += length;
        String::from_utf8(bytes).map_err(|_| damaged(at, format!("{what} is not UTF-8")))
    }

    fn kind(&mut self) -> Result<Kind> {
        let at = self.position;
        let code = self.u32("a value's type")?;
        Kind::from_code(code)
            .ok_or_else(|| damaged(at, format!("unknown value type {code}: expected 0 .. 12")))
    }

    fn scalar(&mut self, scalar: Scalar) -> Result<u64> {
        let at = self.position;
        let size = scalar.size();
        self.need(size as u64, "a value")?;
        let mut bytes = [0; 8];
        self.inner
            .read_exact(&mut bytes[..size])
            .map_err(|error| unreadable(&error))?;
        self.position += size as u64;
        let bits = u64::from_le_bytes(bytes);
        if scalar == Scalar::Bool && bits > 1 {
            return Err(damaged(at, format!("a bool of {bits}: expected 0 or 1")));
        }
        Ok(bits)
    }

    fn array(&mut self) -> Result<(Kind, u64)> {
        let kind = self.kind()?;
        let count = self.counted("array elements", kind.least_size(), u64::MAX)?;
        Ok((kind, count))
    }

    fn skip_value(&mut self, kind: Kind, depth: u32) -> Result<()> {
        match kind {
            Kind::Scalar(scalar) => self.skip(scalar.size() as u64, "a value"),
            Kind::Text => {
                let length = self.u64("a string's length")?;
                self.skip(length, "a string")
            }
            Kind::Array if depth == MAX_DEPTH => Err(damaged(
                self.position,
                format!("arrays nested deeper than {MAX_DEPTH}"),
            )),
            Kind::Array => {
                let (kind, count) = self.array()?;
                self.skip_values(kind, count, depth + 1)
            }
        }
    }

    fn skip_values(&mut self, kind: Kind, count: u64, depth: u32) -> Result<()> {
        if let Kind::Scalar(scalar) = kind {
            // `array` has held the count against the file, so the product is exact.
            return self.skip(count * scalar.size() as u64, "an array");
        }
        (0..count).try_for_each(|_| self.skip_value(kind, depth))
    }

    fn entry(&mut self) -> Result<Entry> {
        let start = self.position;
        let length = self.u64("a key's length")?;
        let key = self.utf8(length, MAX_KEY, "a key")?;
        let mut payload = self.position + 4;
        let value = match self.kind()? {
            Kind::Scalar(scalar) => Value::Scalar(scalar, self.scalar(scalar)?),
            Kind::Text => {
                let length = self.u64("a string's length")?;
                payload = self.position;
                self.skip(length, "a string")?;
                Value::Text(length)
            }
            Kind::Array => {
                let (kind, count) = self.array()?;
                payload = self.position;
                self.skip_values(kind, count, 1)?;
                Value::Array { kind, count }
            }
        };
        Ok(Entry {
            key,
            start,
            payload,
            end: self.position,
            value,
        })
    }

    fn tensor(&mut self) -> Result<Info> {
        let at = self.position;
        let length = self.u64("a tensor name's length")?;
        let name = self.utf8(length, MAX_NAME, "a tensor name")?;
        let num_dims = self.u32("a number of dimensions")?;
        if num_dims > MAX_DIMS {
            return Err(damaged(
                at,
                format!("tensor {name} has {num_dims} dimensions: expected at most {MAX_DIMS}"),
            ));
        }
        Ok(Info {
            name,
            dims: repeat(num_dims.into(), || self.u64("a dimension"))?,
            ggml_type: self.u32("a tensor's type")?,
            offset: self.u64("a tensor's offset")?,
            at,
        })
    }
}

fn repeat<T>(count: u64, mut read: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    (0..count).map(|_| read()).collect()
}

fn unique<'a>(names: impl Iterator<Item = (&'a str, u64)>) -> Result<()> {
    let mut seen = HashSet::new();
    for (name, at) in names {
        if !seen.insert(name) {
            return Err(damaged(at, format!("{name:?} is there twice")));
        }
    }
    Ok(())
}

fn alignment(entries: &[Entry]) -> Result<u64> {
    let Some(entry) = entries.iter().find(|e| e.key == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match entry.value {
        Value::Scalar(Scalar::Unsigned(4), bits) if bits.is_power_of_two() => Ok(bits),
        _ => Err(damaged(
            entry.start,
            "general.alignment is not a power of two of type uint32",
        )),
    }
}

/// The tensors at their places, each where the one before it ends.
fn place(infos: Vec<Info>, data: u64, alignment: u64, file_size: u64) -> Result<Vec<Tensor>> {
    let room = file_size.saturating_sub(data);
    let mut offset = 0;
    let mut tensors = Vec::new();
    let mut infos = infos.into_iter().peekable();
    while let Some(info) = infos.next() {
        if info.offset != offset {
            return Err(damaged(
                info.at,
                format!(
                    "tensor {} is at offset {}, expected {offset}: tensors must follow one \
                     another as llama.cpp loads them; convert or quantise the model anew",
                    info.name, info.offset
                ),
            ));
        }
        let next = infos.peek().map_or(room, |next| next.offset);
        let size = size(&info, next)?;
        if size > room - offset {
            return Err(damaged(
                info.at,
                format!(
                    "the data of tensor {} ends at byte {}, and the file at {file_size}: it is \
                     cut short; fetch it again",
                    info.name,
                    (data + offset).saturating_add(size)
                ),
            ));
        }
        let start = data + offset;
        offset = pad(offset + size, alignment);
        if infos.peek().is_some() && offset > room {
            return Err(damaged(
                info.at,
                "the file ends in the padding of a tensor: it is cut short",
            ));
        }
        tensors.push(Tensor {
            name: info.name,
            dims: info.dims,
            ggml_type: info.ggml_type,
            start,
            size,
        });
    }
    if offset < room && !tensors.is_empty() {
        return Err(damaged(
            data + offset,
            format!(
                "{} bytes follow the last tensor, and belong to none: remove them with \
                 `truncate -s {} FILE`",
                room - offset,
                data + offset
            ),
        ));
    }
    Ok(tensors)
}

/// Bytes of a tensor: by its type, or for an unknown type up to where the next one begins.
fn size(info: &Info, next: u64) -> Result<u64> {
    let values = info
        .dims
        .iter()
        .try_fold(1_u64, |product, &dim| product.checked_mul(dim))
        .filter(|&values| i64::try_from(values).is_ok());
    let Some(values) = values else {
        return Err(damaged(
            info.at,
            format!("tensor {} of {:?} is too large", info.name, info.dims),
        ));
    };
    let Some((block, bytes)) = block(info.ggml_type) else {
        return next.checked_sub(info.offset).ok_or_else(|| {
            damaged(
                info.at,
                format!(
                    "tensor {} is of the unknown ggml type {}, and the next offset does not \
                     tell its size",
                    info.name, info.ggml_type
                ),
            )
        });
    };
    let row = info.dims.first().copied().unwrap_or(1);
    if row % block != 0 {
        return Err(damaged(
            info.at,
            format!(
                "tensor {} has rows of {row} values: its ggml type {} packs {block} at a time",
                info.name, info.ggml_type
            ),
        ));
    }
    (values / block)
        .checked_mul(bytes)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| damaged(info.at, format!("tensor {} is too large", info.name)))
}
