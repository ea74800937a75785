//! The header of a GGUF file, read strictly: nothing is allocated on a file's word. Knows nothing
//! of layers.

use std::collections::HashSet;
use std::io::{Read, Seek, SeekFrom};

use super::error::{GgufError, Result, damaged, unreadable};
use super::input::{Input, MAX_NAME, repeat};
use super::place::{pad, place};
use super::record::{Entry, Tensor, Value};
use super::types::{Kind, Scalar};

const MAX_ENTRIES: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
const DEFAULT_ALIGNMENT: u64 = 32;
const LEAST_ENTRY: u64 = 8 + 4 + 1;
const LEAST_TENSOR: u64 = 8 + 4 + 4 + 8;

/// Everything but the data of the tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The number that every tensor's offset is a multiple of.
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

/// The position of each element of an array value, and the end of the last one.
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
