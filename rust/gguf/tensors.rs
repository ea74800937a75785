//! The names of tensors, before a cut and after it.

/// The block of a tensor, if it belongs to one, and the rest of its name.
pub(super) fn block_of(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("blk.")?.split_once('.')
}

/// The place of a number among the kept ones, which are in order.
pub(super) fn place_of(number: u64, kept: &[u64]) -> Option<u64> {
    kept.binary_search(&number).ok().map(|place| place as u64)
}
