//! The header of a safetensors file, parsed once and then trusted.
//!
//! Everything that the reference implementation refuses is refused, and more: names given twice,
//! unknown fields, more than [`MAX_RANK`] axes. Dtypes that are not known are taken by their
//! offsets.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Value, json};

/// The longest header that is read, as in the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Axes of a tensor at most; torch and its kin stop there too.
const MAX_RANK: usize = 64;

/// A tensor of a safetensors file; its bytes are `start .. end` after the header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name, unique in its file.
    pub name: String,
    /// Dtype, as written.
    pub dtype: String,
    /// Axes.
    pub shape: Vec<u64>,
    /// First byte, counted from the end of the header.
    pub start: u64,
    /// One past its last byte.
    pub end: u64,
}

impl Tensor {
    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// True if it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Bits a value; of an unknown dtype as its length tells.
    pub fn bits(&self) -> u64 {
        known_bits(&self.dtype).unwrap_or_else(|| {
            let values = self.num_values().unwrap_or(0).max(1);
            let bits = u128::from(self.len()) * 8;
            u64::try_from(bits / u128::from(values)).unwrap_or(8)
        })
    }

    fn num_values(&self) -> Option<u64> {
        self.shape
            .iter()
            .try_fold(1_u64, |product, &axis| product.checked_mul(axis))
    }

    fn check(&self) -> Result<(), String> {
        let Self {
            name,
            dtype,
            shape,
            start,
            end,
        } = self;
        if end < start {
            return Err(format!(
                "the tensor {name} ends at {end}, before its start {start}"
            ));
        }
        let too_many = || format!("the shape {shape:?} of the tensor {name} overflows");
        let values = self.num_values().ok_or_else(too_many)?;
        let Some(bits) = known_bits(dtype) else {
            return match (values, self.len()) {
                (0, 1..) => Err(format!(
                    "the tensor {name} has no values but {} bytes",
                    self.len()
                )),
                _ => Ok(()),
            };
        };
        let bits = values.checked_mul(bits).ok_or_else(too_many)?;
        if bits % 8 != 0 || bits / 8 != self.len() {
            return Err(format!(
                "the tensor {name} of dtype {dtype} and shape {shape:?} needs {bits} bits, its \
                 offsets give it {} bytes",
                self.len()
            ));
        }
        Ok(())
    }
}

fn known_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "C64" | "F64" | "I64" | "U64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}

/// The tensors of a file in the order of their bytes, and its free texts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Header {
    /// The free texts, such as `format`.
    pub metadata: BTreeMap<String, String>,
    /// The tensors; each starts where the one before it ends.
    pub tensors: Vec<Tensor>,
}

impl Header {
    /// Parses the JSON of a header that `data_len` bytes of tensors follow.
    ///
    /// The error says in words what is wrong, without the file.
    pub fn parse(json: &[u8], data_len: u64) -> Result<Self, String> {
        if json.first() != Some(&b'{') {
            return Err("its header does not begin with {".into());
        }
        let Parsed {
            metadata,
            mut tensors,
        } = serde_json::from_slice(json)
            .map_err(|error| format!("its header is broken: {error}"))?;
        check_unique(tensors.iter().map(|tensor| &*tensor.name))
            .map_err(|name| format!("the tensor {name} is named twice"))?;
        tensors.iter().try_for_each(Tensor::check)?;
        tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
        check_gapless(&tensors, data_len)?;
        Ok(Self { metadata, tensors })
    }

    /// The bytes of the header as a file begins with them, padded to a multiple of eight.
    pub fn to_bytes(&self) -> Vec<u8> {
        let entry = |name: &str, value: Value| format!("{}:{value}", Value::from(name));
        let mut entries = Vec::with_capacity(self.tensors.len() + 1);
        if !self.metadata.is_empty() {
            entries.push(entry("__metadata__", json!(self.metadata)));
        }
        entries.extend(self.tensors.iter().map(|tensor| {
            let Tensor {
                name,
                dtype,
                shape,
                start,
                end,
            } = tensor;
            entry(
                name,
                json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}),
            )
        }));
        let mut text = format!("{{{}}}", entries.join(",")).into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.append(&mut text);
        bytes
    }
}

fn check_gapless(tensors: &[Tensor], data_len: u64) -> Result<(), String> {
    let mut end = 0;
    let mut before = "the header";
    for Tensor {
        name,
        start,
        end: next,
        ..
    } in tensors
    {
        if *start < end {
            return Err(format!("the tensors {before} and {name} overlap"));
        }
        if *start > end {
            return Err(format!("the bytes {end} .. {start} belong to no tensor"));
        }
        (end, before) = (*next, name);
    }
    if end != data_len {
        return Err(format!("its tensors need {end} bytes, it holds {data_len}"));
    }
    Ok(())
}

/// The first name that comes twice is the error.
pub(super) fn check_unique<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), &'a str> {
    let mut sorted: Vec<&str> = names.collect();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(pair[0]),
        None => Ok(()),
    }
}

struct Parsed {
    metadata: BTreeMap<String, String>,
    tensors: Vec<Tensor>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    dtype: String,
    shape: Shape,
    data_offsets: (u64, u64),
}

struct Shape(Vec<u64>);

/// A JSON object of texts, in the order of the file, names given twice included.
pub(super) struct Texts(pub Vec<(String, String)>);

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ParsedVisitor)
    }
}

struct ParsedVisitor;

impl<'de> Visitor<'de> for ParsedVisitor {
    type Value = Parsed;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parsed, A::Error> {
        let (mut metadata, mut tensors) = (None, Vec::new());
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                if metadata.is_some() {
                    return Err(A::Error::duplicate_field("__metadata__"));
                }
                let Texts(pairs) = map
                    .next_value::<Option<Texts>>()?
                    .unwrap_or(Texts(Vec::new()));
                check_unique(pairs.iter().map(|(name, _)| &**name))
                    .map_err(|name| A::Error::custom(format!("the metadata {name} come twice")))?;
                metadata = Some(pairs.into_iter().collect());
                continue;
            }
            let Description {
                dtype,
                shape,
                data_offsets,
            } = map.next_value()?;
            let (start, end) = data_offsets;
            tensors.push(Tensor {
                name,
                dtype,
                shape: shape.0,
                start,
                end,
            });
        }
        let metadata = metadata.unwrap_or_default();
        Ok(Parsed { metadata, tensors })
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "a list of at most {MAX_RANK} axes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
        let mut axes = Vec::new();
        while let Some(axis) = seq.next_element()? {
            if axes.len() == MAX_RANK {
                return Err(A::Error::invalid_length(MAX_RANK + 1, &self));
            }
            axes.push(axis);
        }
        Ok(Shape(axes))
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TextsVisitor)
    }
}

struct TextsVisitor;

impl<'de> Visitor<'de> for TextsVisitor {
    type Value = Texts;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Texts, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(Texts(pairs))
    }
}
