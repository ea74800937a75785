//! AVX2 and FMA.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::Work;
use super::tiles::{Unit, sweep};

pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi2")
}

/// # Safety
///
/// The processor has AVX2, FMA, F16C and BMI2.
#[target_feature(enable = "avx2,fma,f16c,bmi2")]
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
    type Vector = __m256;
    type Sum = __m256;

    const SPAN: usize = 256;
    const ROWS: usize = 3;
    const WIDTH: usize = 8;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller's, as for all that follows.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m256, left: __m256, right: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m256, to: *mut f64) {
        unsafe {
            let halves = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            let total = _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(halves));
            _mm256_storeu_pd(to, total);
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T0) }
    }
}

sweep!(Single);

pub(crate) struct Double;

impl Unit for Double {
    type Packed = f64;
    type Vector = __m256d;
    type Sum = __m256d;

    const SPAN: usize = 256;
    const ROWS: usize = 3;
    const WIDTH: usize = 4;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m256d {
        unsafe { _mm256_setzero_pd() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> __m256d {
        unsafe { _mm256_loadu_pd(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m256d, left: __m256d, right: __m256d) -> __m256d {
        unsafe { _mm256_fmadd_pd(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m256d, to: *mut f64) {
        unsafe { _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), sum)) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T0) }
    }
}

sweep!(Double);
