//! The share of experts in a tensor. Those of a stack lie one after the other, so what stays of it
//! is ranges of bytes.

use super::error::{Result, refused};
use super::record::Tensor;
use super::rules::{EXPERT_PARTS, NO_EXPERTS, ONE_EXPERT, SEVERAL_EXPERTS};
use super::types;

/// What a tensor of a block holds of the block's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Share<'a> {
    /// A part of every one, in order, outermost in memory.
    All,
    /// One alone: the name before its number, the number, the name behind it.
    One(&'a str, u64, &'a str),
    /// What no expert can be taken out of, and why.
    Several(&'static str),
    /// Nothing.
    Nothing,
    /// That is not known.
    Unknown,
}

/// What a tensor holds of experts, by the rest of its name behind its block.
pub(super) fn share(rest: &str) -> Share<'_> {
    let (stem, ending) = rest.split_once('.').unwrap_or((rest, ""));
    let (number, tail) = ending.split_once('.').unwrap_or((ending, ""));
    let is_part = |&(name, endings): &(&str, &[&str])| name == stem && endings.contains(&ending);
    if EXPERT_PARTS.iter().any(is_part) {
        return Share::All;
    }
    if let Some((_, why)) = SEVERAL_EXPERTS.iter().find(|(name, _)| *name == stem) {
        return Share::Several(why);
    }
    match number.parse::<u64>() {
        Ok(expert) if ONE_EXPERT.contains(&stem) && expert.to_string() == number => {
            Share::One(stem, expert, tail)
        }
        _ if NO_EXPERTS.iter().any(|name| fits(stem, name)) => Share::Nothing,
        _ => Share::Unknown,
    }
}

/// Whether a name is that of a rule, or begins with it if the rule ends so.
fn fits(stem: &str, name: &str) -> bool {
    name.strip_suffix('*')
        .map_or(stem == name, |start| stem.starts_with(start))
}

/// The ranges of the file that stay of a tensor with a part for each of `number` experts.
///
/// # Errors
///
/// [`GgufError::Refused`] where an expert is no range of bytes.
pub(super) fn sliced(tensor: &Tensor, number: u64, kept: &[u64]) -> Result<Vec<(u64, u64)>> {
    let no = |why: String| Err(refused(&tensor.name, &format!("{why}: no expert can go")));
    let (dims, code) = (&tensor.dims, tensor.ggml_type);
    let inner = match dims.split_last() {
        Some((last, inner)) if *last == number => inner,
        _ => {
            return no(format!(
                "has the dimensions {dims:?}, expected the {number} experts as the last one"
            ));
        }
    };
    let Some((values, _)) = types::block(code) else {
        return no(format!(
            "is of the unknown ggml type {code}, which does not tell where an expert ends"
        ));
    };
    if inner.iter().product::<u64>() % values != 0 {
        return no(format!(
            "is of ggml type {code}, which packs {values} values, of several experts"
        ));
    }
    let size = tensor.size / number;
    let ranges = kept.iter().map(|expert| {
        let start = tensor.start + expert * size;
        (start, start + size)
    });
    Ok(ranges.collect())
}
