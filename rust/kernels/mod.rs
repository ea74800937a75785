//! The instruction sets, and the sums of products that each of them makes. Everything above
//! works on plain slices; unsafe code is here alone.
//!
//! A [`Work`] is written once, in plain Rust, and compiled once for each tier: [`Tier::run`]
//! calls it inside a function that has the tier's instructions, so that its loops become the
//! tier's vectors. What a compiler does not find by itself, the register tiles of a Gram
//! matrix, are the [`Sweep`]s of the tier. All other code is compiled for the baseline, so one
//! wheel runs on every processor.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
pub(crate) mod dots;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;
mod prefetch;
mod registers;
mod scalar;
mod sweep;
mod tier;
mod tiles;
mod unit;

pub(crate) use packed::{Chunk, Chunks, PADDING, Packed, greatest};
pub(crate) use prefetch::Prefetch;
pub(crate) use sweep::{Kernels, Sweep, Work};
pub use tier::{TIER_VARIABLE, Tier};
