//! Reading the fields of a header one after the other: every length is held against the file
//! before it is followed.

use std::io::{BufReader, Read, Seek, SeekFrom};

use super::error::{GgufError, Result, damaged, unreadable};
use super::record::{Entry, Info, Value};
use super::types::{Kind, Scalar};

const MAX_HEADER: u64 = 1 << 28;
const MAX_KEY: u64 = (1 << 16) - 1;
const MAX_DIMS: u32 = 4;
const MAX_DEPTH: u32 = 8;
pub(super) const MAX_NAME: u64 = 1 << 10;

/// A file that is read on from a position, up to a limit.
pub(super) struct Input<'a, R> {
    inner: BufReader<&'a mut R>,
    pub position: u64,
    limit: u64,
    file_size: u64,
}

impl<'a, R: Read + Seek> Input<'a, R> {
    pub fn new(source: &'a mut R, position: u64, file_size: u64) -> Self {
        Self {
            inner: BufReader::new(source),
            position,
            limit: file_size.min(position.saturating_add(MAX_HEADER)),
            file_size,
        }
    }

    pub fn jump(&mut self) -> Result<()> {
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

    pub fn version(&mut self) -> Result<u32> {
        let magic: [u8; 4] = self.bytes("the magic")?;
        if magic != *b"GGUF" {
            return Err(GgufError::Format(format!(
                "is not a GGUF file: it begins with {:?}, expected \"GGUF\"",
                String::from_utf8_lossy(&magic)
            )));
        }
        let version = self.u32("the version")?;
        match version {
            2 | 3 => Ok(version),
            1 => Err(GgufError::Format(
                "is a GGUF file of version 1, expected 2 or 3: convert the model again".into(),
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

    pub fn counted(&mut self, what: &str, least: u64, most: u64) -> Result<u64> {
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

    pub fn utf8(&mut self, length: u64, most: u64, what: &str) -> Result<String> {
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

    pub fn scalar(&mut self, scalar: Scalar) -> Result<u64> {
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

    pub fn skip_value(&mut self, kind: Kind, depth: u32) -> Result<()> {
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

    pub fn entry(&mut self) -> Result<Entry> {
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

    pub fn tensor(&mut self) -> Result<Info> {
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

pub(super) fn repeat<T>(count: u64, mut read: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    (0..count).map(|_| read()).collect()
}
