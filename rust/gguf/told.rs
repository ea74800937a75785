//! The few values of a file that are told to people: its name, its license, its languages.

use std::io::{Read, Seek, SeekFrom};

use super::header::elements;
use super::model::Gguf;
use super::record::{Entry, Value};
use super::types::Kind;

const MAX_TEXT: u64 = 1 << 12;
const MAX_TEXTS: u64 = 1 << 10;

/// A value that is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// A whole number.
    Number(u64),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
}

impl Gguf {
    /// The value of a key; none where it is missing, of another type, very long or not UTF-8.
    pub fn told(&self, source: &mut (impl Read + Seek), key: &str) -> Option<Told> {
        let entry = self.header.find(key)?;
        match entry.value {
            Value::Scalar(scalar, bits) => scalar.count(bits).map(Told::Number),
            Value::Text(_) => text_of(source, entry).map(Told::Text),
            Value::Array {
                kind: Kind::Text,
                count,
            } if count <= MAX_TEXTS => {
                let bounds = elements(source, entry).ok()?;
                let texts = bounds.windows(2).map(|at| read(source, at[0] + 8, at[1]));
                texts.collect::<Option<_>>().map(Told::Texts)
            }
            Value::Array { .. } => None,
        }
    }
}

/// The string of an entry, if it is of a length that is told.
pub(super) fn text_of(source: &mut (impl Read + Seek), entry: &Entry) -> Option<String> {
    read(source, entry.payload, entry.end)
}

fn read(source: &mut (impl Read + Seek), start: u64, end: u64) -> Option<String> {
    let length = end
        .checked_sub(start)
        .filter(|&length| length <= MAX_TEXT)?;
    source.seek(SeekFrom::Start(start)).ok()?;
    let mut bytes = vec![0; length as usize];
    source.read_exact(&mut bytes).ok()?;
    String::from_utf8(bytes).ok()
}
