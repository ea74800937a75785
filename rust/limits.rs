//! Limits of the core, in constants that its errors name.

/// The samples that the exact sums have room for.
pub const MAX_SAMPLES: u64 = 1 << 31;

/// The states a sample that sums are kept for: more than any model has layers, and few
/// enough for the sums of a hostile file or shape to fit in memory.
pub const MAX_STATES: usize = 4096;

/// The samples that a sequence can have.
pub const MAX_SEQUENCE: u64 = 1 << 20;

/// Threads that an update can have.
pub const MAX_THREADS: usize = 4096;

/// The samples that a minibatch for CKA needs: `HSIC_1` divides by `n (n - 3)`.
pub const MIN_BATCH: usize = 4;

/// Samples in a minibatch for CKA at most: its products fit memory, and float64.
pub const MAX_BATCH: usize = 1024;

/// Sums of experts in all: several times what any model has, or of all pairs of them in most, and
/// few enough for those of a hostile file to fit in memory.
pub const MAX_EXPERT_SUMS: usize = 3 << 19;

/// Values that are summed of an expert's tokens.
pub const MAX_EXPERT_VALUES: usize = 8;
