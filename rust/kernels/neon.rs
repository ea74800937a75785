//! NEON, which every aarch64 has.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::aarch64::*;

use super::registers::Registers;
use super::sweep::{self, Work};
use super::unit::Unit;

pub(super) fn is_available() -> bool {
    std::arch::is_aarch64_feature_detected!("neon")
}

/// # Safety
///
/// The processor has NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Kernels>()
}

pub(crate) struct Kernels;

impl sweep::Kernels for Kernels {
    type Double = Registers<Double>;
    type Bf16 = Registers<Single>;
}

pub(crate) struct Single;

impl Unit for Single {
    type Packed = f32;
    type Vector = float32x4_t;
    type Sum = float32x4_t;

    const SPAN: usize = 128;
    const ROWS: usize = 4;
    const WIDTH: usize = 4;
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> float32x4_t {
        // SAFETY: the caller has NEON.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        // SAFETY: the caller has NEON and `WIDTH` values to read.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: float32x4_t, left: float32x4_t, right: float32x4_t) -> float32x4_t {
        // SAFETY: the caller has NEON.
        unsafe { vfmaq_f32(sum, left, right) }
    }

    #[inline(always)]
    unsafe fn flush(sum: float32x4_t, to: *mut f64) {
        // SAFETY: the caller has NEON and `LANES` values to write.
        unsafe {
            let halves = vadd_f32(vget_low_f32(sum), vget_high_f32(sum));
            vst1q_f64(to, vaddq_f64(vld1q_f64(to), vcvt_f64_f32(halves)));
        }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

pub(crate) struct Double;

impl Unit for Double {
    type Packed = f64;
    type Vector = float64x2_t;
    type Sum = float64x2_t;

    const SPAN: usize = 256;
    const ROWS: usize = 4;
    const WIDTH: usize = 2;
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> float64x2_t {
        // SAFETY: the caller has NEON.
        unsafe { vdupq_n_f64(0.0) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> float64x2_t {
        // SAFETY: the caller has NEON and `WIDTH` values to read.
        unsafe { vld1q_f64(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: float64x2_t, left: float64x2_t, right: float64x2_t) -> float64x2_t {
        // SAFETY: the caller has NEON.
        unsafe { vfmaq_f64(sum, left, right) }
    }

    #[inline(always)]
    unsafe fn flush(sum: float64x2_t, to: *mut f64) {
        // SAFETY: the caller has NEON and `LANES` values to write.
        unsafe { vst1q_f64(to, vaddq_f64(vld1q_f64(to), sum)) }
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}
