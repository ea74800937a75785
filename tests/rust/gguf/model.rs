//! Models to test with, written naively, and the slow twin of a cut: the model built anew.

use std::collections::BTreeMap;
use std::io::Cursor;

use shallower_core::gguf::{Experts, Gguf, GgufError};

/// A value as the tests write and read it.
#[derive(Debug, Clone, PartialEq)]
pub enum V {
    U8(u8),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Array(u32, Vec<V>),
}

impl V {
    fn code(&self) -> u32 {
        match self {
            V::U8(_) => 0,
            V::U32(_) => 4,
            V::I32(_) => 5,
            V::F32(_) => 6,
            V::Bool(_) => 7,
            V::Text(_) => 8,
            V::Array(..) => 9,
            V::U64(_) => 10,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            V::U8(v) => out.push(*v),
            V::U32(v) => out.extend(v.to_le_bytes()),
            V::I32(v) => out.extend(v.to_le_bytes()),
            V::U64(v) => out.extend(v.to_le_bytes()),
            V::F32(v) => out.extend(v.to_le_bytes()),
            V::Bool(v) => out.push((*v).into()),
            V::Text(v) => text(out, v),
            V::Array(code, values) => {
                out.extend(code.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                for value in values {
                    value.write(out);
                }
            }
        }
    }
}

pub fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

pub fn u32s(values: &[u32]) -> V {
    V::Array(4, values.iter().map(|&v| V::U32(v)).collect())
}

pub fn bools(values: &[bool]) -> V {
    V::Array(7, values.iter().map(|&v| V::Bool(v)).collect())
}

/// A tensor as the tests write and read it: type, dimensions, bytes.
pub type T = (u32, Vec<u64>, Vec<u8>);

#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    alignment: usize,
    pub entries: Vec<(String, V)>,
    pub tensors: Vec<(String, T)>,
}

impl Model {
    /// A model of the architecture `llama` whose tensors tell their block.
    pub fn new(blocks: u32) -> Self {
        Self::of("llama", blocks)
    }

    pub fn of(architecture: &str, blocks: u32) -> Self {
        let mut tensors = vec![("token_embd.weight".into(), (0, vec![3], vec![7; 12]))];
        for block in 0..blocks {
            let (byte, size) = (block as u8, 34 * (1 + block as usize % 2));
            let dims = vec![32, 1 + u64::from(block % 2)];
            tensors.push((
                format!("blk.{block}.ffn.weight"),
                (8, dims, vec![byte; size]),
            ));
            tensors.push((
                format!("blk.{block}.norm.weight"),
                (1, vec![5], vec![byte; 10]),
            ));
        }
        tensors.push(("output.weight".into(), (30, vec![1, 2], vec![9; 4])));
        let entries = vec![
            ("general.architecture".into(), V::Text(architecture.into())),
            (format!("{architecture}.block_count"), V::U32(blocks)),
        ];
        Self {
            alignment: 32,
            entries,
            tensors,
        }
    }

    pub fn with(mut self, key: &str, value: V) -> Self {
        self.entries.push((key.into(), value));
        self
    }

    pub fn aligned(mut self, alignment: u32) -> Self {
        self.alignment = alignment as usize;
        self.with("general.alignment", V::U32(alignment))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            text(&mut out, key);
            out.extend(value.code().to_le_bytes());
            value.write(&mut out);
        }
        let mut data = Vec::new();
        for (name, (ggml_type, dims, bytes)) in &self.tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(ggml_type.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    /// The slow twin of a cut: the model is built anew.
    pub fn without(&self, kept: &[usize], edits: &BTreeMap<String, V>) -> Self {
        let mut cut = self.clone();
        for (key, value) in &mut cut.entries {
            if let Some(edit) = edits.get(key) {
                *value = edit.clone();
            }
        }
        cut.tensors.retain_mut(|(name, _)| {
            let Some(rest) = name.strip_prefix("blk.") else {
                return true;
            };
            let (block, rest) = rest.split_once('.').unwrap();
            let block: usize = block.parse().unwrap();
            let Some(place) = kept.iter().position(|&kept| kept == block) else {
                return false;
            };
            *name = format!("blk.{place}.{rest}");
            true
        });
        cut
    }
}

pub fn cut(file: &[u8], survivors: &[usize]) -> Result<Vec<u8>, GgufError> {
    written(file, survivors, None)
}

/// A cut that keeps some of so many experts, by layer.
pub fn cut_experts(
    file: &[u8],
    survivors: &[usize],
    (number, kept): (u64, &BTreeMap<u64, Vec<u64>>),
) -> Result<Vec<u8>, GgufError> {
    written(file, survivors, Some(&Experts::new(number, kept.clone())?))
}

fn written(
    file: &[u8],
    survivors: &[usize],
    experts: Option<&Experts>,
) -> Result<Vec<u8>, GgufError> {
    let mut source = Cursor::new(file);
    let planned = Gguf::read(&mut source)?.cut(&mut source, survivors, experts)?;
    let mut out = Vec::new();
    planned.write(&mut source, &mut out, &mut |_| true)?;
    assert_eq!(out.len() as u64, planned.size());
    Ok(out)
}

pub fn read(file: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(&mut Cursor::new(file))
}

pub fn edits(pairs: &[(&str, V)]) -> BTreeMap<String, V> {
    pairs
        .iter()
        .map(|(k, v)| ((*k).into(), v.clone()))
        .collect()
}

#[track_caller]
pub fn refused(model: &Model, survivors: &[usize], words: &str) {
    let error = cut(&model.bytes(), survivors).unwrap_err();
    assert!(matches!(error, GgufError::Refused { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[track_caller]
pub fn becomes(model: &Model, kept: &[usize], pairs: &[(&str, V)]) {
    let arch = match &model.entries[0].1 {
        V::Text(arch) => arch.clone(),
        other => panic!("{other:?}"),
    };
    let mut edits = edits(pairs);
    edits.insert(format!("{arch}.block_count"), V::U32(kept.len() as u32));
    let expected = model.without(kept, &edits).bytes();
    assert!(cut(&model.bytes(), kept).unwrap() == expected);
}

/// A file that consists of a header's beginning and whatever follows.
pub fn hostile(entries: u64, tensors: u64, rest: &[u8]) -> Vec<u8> {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest);
    file
}
