//! AMX: bfloat16 products in tiles of 16 x 16 sums.
//!
//! The tiles are the processor's, or those of a twin in plain Rust; both go through one sweep.

#![allow(unsafe_code)]

mod available;
mod engine;
mod filling;
mod hardware;
mod session;
mod span;
mod tiles;
#[cfg(test)]
mod twin;

pub(super) use self::available::is_available;
use self::hardware::Hardware;
use super::sweep::Work;

/// # Safety
///
/// The processor has AVX-512 F, BW, DQ, VL and BF16, and AMX may be used.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Hardware>()
}
