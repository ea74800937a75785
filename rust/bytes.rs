//! Words of 64 bits as bytes, the low byte first, and back: how sums are stored.

/// A mark of eight letters that stored sums begin with.
pub(crate) const fn mark(letters: [u8; 8]) -> u64 {
    u64::from_le_bytes(letters)
}

/// The bytes of words.
pub(crate) fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Words that are read one after the other.
pub(crate) struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next words, if there are as many.
    pub fn take<const N: usize>(&mut self) -> Option<[u64; N]> {
        let (taken, rest) = self.0.split_at_checked(8 * N)?;
        self.0 = rest;
        let (words, _) = taken.as_chunks();
        let mut words = words.iter().copied().map(u64::from_le_bytes);
        Some(std::array::from_fn(|_| words.next().unwrap_or_default()))
    }

    /// Bytes that are left.
    pub fn left(&self) -> usize {
        self.0.len()
    }
}
