//! Files as lists of tokens, and changes to them.

use std::ops::Range;

use proptest::prelude::*;
use proptest::sample::{Index as Place, select};

pub type Tokens = Vec<Vec<u8>>;

/// A change to a list of tokens.
#[derive(Debug, Clone)]
pub enum Strike {
    Replace(Place, Vec<u8>),
    Add(Place, i8),
    Copy(Place, Place, Place),
    Delete(Place, Place),
    Swap(Place, Place),
    Byte(Place, Place, u8),
}

pub fn strikes(words: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<Strike>> {
    let place = any::<Place>;
    let strike = prop_oneof![
        4 => (place(), select(words)).prop_map(|(at, word)| Strike::Replace(at, word)),
        2 => (place(), any::<i8>()).prop_map(|(at, more)| Strike::Add(at, more)),
        1 => (place(), place(), place()).prop_map(|(a, b, to)| Strike::Copy(a, b, to)),
        1 => (place(), place()).prop_map(|(a, b)| Strike::Delete(a, b)),
        1 => (place(), place()).prop_map(|(a, b)| Strike::Swap(a, b)),
        2 => (place(), place(), any::<u8>()).prop_map(|(at, in_it, byte)| Strike::Byte(at, in_it, byte)),
    ];
    prop::collection::vec(strike, 0..4)
}

/// A short stretch of tokens from one place, at most up to another.
pub fn stretch(from: Place, to: Place, len: usize) -> Range<usize> {
    let start = from.index(len);
    start..len.min(start + 1 + to.index(12))
}

pub fn struck(mut tokens: Tokens, strikes: &[Strike]) -> Vec<u8> {
    for strike in strikes {
        let len = tokens.len();
        if len == 0 {
            break;
        }
        match strike {
            Strike::Replace(at, word) => tokens[at.index(len)].clone_from(word),
            Strike::Add(at, more) => add(&mut tokens[at.index(len)], *more),
            Strike::Copy(a, b, to) => {
                let copied = tokens[stretch(*a, *b, len)].to_vec();
                let to = to.index(len);
                tokens.splice(to..to, copied);
            }
            Strike::Delete(a, b) => drop(tokens.drain(stretch(*a, *b, len))),
            Strike::Swap(a, b) => tokens.swap(a.index(len), b.index(len)),
            Strike::Byte(at, in_it, byte) => {
                let token = &mut tokens[at.index(len)];
                if !token.is_empty() {
                    let place = in_it.index(token.len());
                    token[place] = *byte;
                }
            }
        }
    }
    tokens.concat()
}

/// Adds to a number, in digits or little-endian.
pub fn add(token: &mut Vec<u8>, more: i8) {
    let text = std::str::from_utf8(token).ok();
    if let Some(number) = text.and_then(|text| text.parse::<u64>().ok()) {
        *token = number.wrapping_add_signed(more.into()).to_string().into();
    } else if token.len() <= 8 {
        let mut bytes = [0; 8];
        bytes[..token.len()].copy_from_slice(token);
        let sum = u64::from_le_bytes(bytes).wrapping_add_signed(more.into());
        let len = token.len();
        token.copy_from_slice(&sum.to_le_bytes()[..len]);
    }
}

pub const NUMBERS: [u64; 14] = [
    0,
    1,
    8,
    9,
    255,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 61,
    1 << 63,
    u64::MAX,
    u64::MAX - 7,
    i64::MAX as u64,
    u64::MAX / 8,
];
