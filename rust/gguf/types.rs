//! The sizes of things: metadata values by their type, tensors by their ggml type.

/// The type of a metadata value that has a fixed size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// An unsigned integer of so many bytes.
    Unsigned(u8),
    /// A signed integer of so many bytes.
    Signed(u8),
    /// A float of so many bytes.
    Float(u8),
    /// One byte, 0 or 1.
    Bool,
}

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A value of a fixed size.
    Scalar(Scalar),
    /// A length and bytes.
    Text,
    /// An element type, a count and elements.
    Array,
}

impl Kind {
    /// The type by its number in the file.
    pub fn from_code(code: u32) -> Option<Self> {
        Some(Self::Scalar(match code {
            0 => Scalar::Unsigned(1),
            1 => Scalar::Signed(1),
            2 => Scalar::Unsigned(2),
            3 => Scalar::Signed(2),
            4 => Scalar::Unsigned(4),
            5 => Scalar::Signed(4),
            6 => Scalar::Float(4),
            7 => Scalar::Bool,
            8 => return Some(Self::Text),
            9 => return Some(Self::Array),
            10 => Scalar::Unsigned(8),
            11 => Scalar::Signed(8),
            12 => Scalar::Float(8),
            _ => return None,
        }))
    }

    /// The fewest bytes that a value of this type takes.
    pub fn least_size(self) -> u64 {
        match self {
            Self::Scalar(scalar) => scalar.size() as u64,
            Self::Text => 8,
            Self::Array => 12,
        }
    }
}

impl Scalar {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::Unsigned(size) | Self::Signed(size) | Self::Float(size) => size.into(),
            Self::Bool => 1,
        }
    }

    /// The value of an integer or bool from its little-endian bytes; negative ones have none.
    pub fn count(self, bits: u64) -> Option<u64> {
        match self {
            Self::Unsigned(_) | Self::Bool => Some(bits),
            Self::Signed(size) => (bits >> (8 * u32::from(size) - 1) == 0).then_some(bits),
            Self::Float(_) => None,
        }
    }
}

/// ggml types: number, values of a block, bytes of a block. From `GGML_QUANT_SIZES` of the
/// Python package gguf 0.19; `tests/cutting/test_gguf.py` holds the two against each other.
const GGML_TYPES: [(u32, u64, u64); 34] = [
    (0, 1, 4),      // F32
    (1, 1, 2),      // F16
    (2, 32, 18),    // Q4_0
    (3, 32, 20),    // Q4_1
    (6, 32, 22),    // Q5_0
    (7, 32, 24),    // Q5_1
    (8, 32, 34),    // Q8_0
    (9, 32, 40),    // Q8_1
    (10, 256, 84),  // Q2_K
    (11, 256, 110), // Q3_K
    (12, 256, 144), // Q4_K
    (13, 256, 176), // Q5_K
    (14, 256, 210), // Q6_K
    (15, 256, 292), // Q8_K
    (16, 256, 66),  // IQ2_XXS
    (17, 256, 74),  // IQ2_XS
    (18, 256, 98),  // IQ3_XXS
    (19, 256, 50),  // IQ1_S
    (20, 32, 18),   // IQ4_NL
    (21, 256, 110), // IQ3_S
    (22, 256, 82),  // IQ2_S
    (23, 256, 136), // IQ4_XS
    (24, 1, 1),     // I8
    (25, 1, 2),     // I16
    (26, 1, 4),     // I32
    (27, 1, 8),     // I64
    (28, 1, 8),     // F64
    (29, 256, 56),  // IQ1_M
    (30, 1, 2),     // BF16
    (34, 256, 54),  // TQ1_0
    (35, 256, 66),  // TQ2_0
    (39, 32, 17),   // MXFP4
    (40, 64, 36),   // NVFP4
    (41, 128, 18),  // Q1_0
];

/// Values and bytes of a block of a ggml type, if it is known.
pub fn block(ggml_type: u32) -> Option<(u64, u64)> {
    GGML_TYPES
        .iter()
        .find(|&&(code, ..)| code == ggml_type)
        .map(|&(_, values, bytes)| (values, bytes))
}
