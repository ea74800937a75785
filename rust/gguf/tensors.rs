//! The names of tensors, before a cut and after it.

/// The block of a tensor, if it belongs to one, and the rest of its name.
pub(super) fn block_of(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("blk.")?.split_once('.')
}

/// A tensor's new name; none if it goes.
pub(super) fn renamed(name: &str, kept: &[u64]) -> Option<String> {
    let Some((block, rest)) = block_of(name) else {
        return Some(name.into());
    };
    let place = place_of(block.parse().ok()?, kept)?;
    Some(format!("blk.{place}.{rest}"))
}

/// The place of a block among the kept ones, which are in order.
pub(super) fn place_of(block: u64, kept: &[u64]) -> Option<u64> {
    kept.binary_search(&block).ok().map(|place| place as u64)
}
