//! AVX-512: float32 and float64 FMA.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::Work;
use super::tiles::{Unit, sweep};

pub(super) fn is_available() -> bool {
    super::avx2::is_available()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// # Safety
///
/// The processor has AVX-512 F, BW, DQ and VL.
// Without VL the compiler has 16 registers of 256 bits, and spills.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Kernels>()
}

pub(crate) struct Kernels;

impl super::Kernels for Kernels {
    type Double = Double;
    type Brain = Single;
}

pub(crate) struct Single;

impl Unit for Single {
    type Packed = f32;
    type Vector = __m512;
    type Sum = __m512;

    const SPAN: usize = 256;
    const ROWS: usize = 4;
    const WIDTH: usize = 16;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's, as for all that follows.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512, to: *mut f64) {
        // SAFETY: the caller's.
        unsafe { fold(sum, to) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T0) }
    }
}

sweep!(Single);

/// Adds sixteen float32 lanes to four float64 numbers.
///
/// # Safety
///
/// AVX-512 F and DQ; `to` is valid for four values.
#[inline(always)]
pub(super) unsafe fn fold(sum: __m512, to: *mut f64) {
    // SAFETY: the caller's.
    unsafe {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(sum), _mm512_extractf32x8_ps(sum, 1));
        let four = _mm_add_ps(
            _mm256_castps256_ps128(eight),
            _mm256_extractf128_ps(eight, 1),
        );
        let total = _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(four));
        _mm256_storeu_pd(to, total);
    }
}

pub(crate) struct Double;

impl Unit for Double {
    type Packed = f64;
    type Vector = __m512d;
    type Sum = __m512d;

    const SPAN: usize = 256;
    const ROWS: usize = 4;
    const WIDTH: usize = 8;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> __m512d {
        unsafe { _mm512_setzero_pd() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> __m512d {
        unsafe { _mm512_loadu_pd(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512d, left: __m512d, right: __m512d) -> __m512d {
        unsafe { _mm512_fmadd_pd(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512d, to: *mut f64) {
        unsafe { _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), sum)) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T0) }
    }
}

sweep!(Double);
