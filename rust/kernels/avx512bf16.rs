//! AVX-512 with `vdpbf16ps`: products of bfloat16, added in pairs to float32 lanes.
//!
//! The instruction takes denormal numbers for zero and makes none, whence the range of
//! norms that `gram` leaves to it.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::tiles::{Unit, sweep};
use super::{Work, avx512};

pub(super) fn is_available() -> bool {
    avx512::is_available() && is_x86_feature_detected!("avx512bf16")
}

/// # Safety
///
/// The processor has AVX-512 F, BW, DQ, VL and BF16.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Kernels>()
}

pub(crate) struct Kernels;

impl super::Kernels for Kernels {
    type Double = avx512::Double;
    type Brain = Brain;
}

pub(crate) struct Brain;

impl Unit for Brain {
    type Packed = u16;
    type Vector = __m512bh;
    type Sum = __m512;

    const SPAN: usize = 512;
    const ROWS: usize = 4;
    const WIDTH: usize = 32;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's, as for all that follows.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> __m512bh {
        // SAFETY: both are 512 bits of anything.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512bh, right: __m512bh) -> __m512 {
        unsafe { _mm512_dpbf16_ps(sum, left, right) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512, to: *mut f64) {
        unsafe { avx512::fold(sum, to) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T0) }
    }
}

sweep!(Brain);
