//! AVX-512 with `vdpbf16ps`: products of bfloat16, added in pairs to float32 lanes.
//!
//! The instruction takes denormal numbers for zero and makes none: hence the range of
//! norms that `gram` leaves to it.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::registers::Registers;
use super::sweep::{self, Work};
use super::unit::Unit;
use super::{avx2, avx512};

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

impl sweep::Kernels for Kernels {
    type Double = Registers<avx512::Double>;
    type Bf16 = Registers<Bf16>;
}

pub(crate) struct Bf16;

impl Unit for Bf16 {
    type Packed = u16;
    type Vector = __m512bh;
    type Sum = __m512;

    const SPAN: usize = 512;
    const SPREAD: f64 = 0.95e-7;
    const ROWS: usize = 5;
    const WIDTH: usize = 32;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller has AVX-512 and BF16.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> __m512bh {
        // SAFETY: the caller has AVX-512 and 32 values to read; both types are 512 bits.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512bh, right: __m512bh) -> __m512 {
        // SAFETY: the caller has AVX-512 and BF16.
        unsafe { _mm512_dpbf16_ps(sum, left, right) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512, to: *mut f64) {
        // SAFETY: the caller has AVX-512 and BF16 and `LANES` values to write.
        unsafe { avx512::fold(sum, to) }
    }

    #[inline(always)]
    unsafe fn flush_four(sums: [__m512; 4], to: *mut f64) {
        // SAFETY: the caller has AVX-512 and sixteen values to write.
        unsafe { avx512::fold_four(sums, to) }
    }

    #[inline(always)]
    unsafe fn total(from: *const f64) -> f64 {
        // SAFETY: the caller's.
        unsafe { avx2::total(_mm256_loadu_pd(from)) }
    }

    #[inline(always)]
    unsafe fn total_eight(from: *const f64) -> [f64; 8] {
        // SAFETY: the caller's.
        unsafe { avx512::total_eight(from) }
    }

    #[inline(always)]
    unsafe fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        // SAFETY: the caller's.
        Some(unsafe { avx512::square_of_sum(x, y, factor) })
    }

    #[inline(always)]
    unsafe fn measure(row: &[u16]) -> (f32, f64) {
        // SAFETY: the caller's.
        unsafe { measure(row, None) }
    }

    #[inline(always)]
    unsafe fn pack_bf16(row: &[u16], to: &mut [u16]) -> Option<(f32, f64)> {
        // SAFETY: the caller's; `to` is a multiple of 32 and no shorter than the row.
        Some(unsafe { measure(row, Some(to)) })
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: the caller has AVX-512 and BF16; a prefetch reads nothing.
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T1) }
    }
}

/// The greatest magnitude of a row and the sum of its squares; copies it, padded with zeros.
///
/// # Safety
///
/// AVX-512 and BF16; the copy is a multiple of 32 and no shorter than the row.
#[inline(always)]
pub(super) unsafe fn measure(row: &[u16], mut copy: Option<&mut [u16]>) -> (f32, f64) {
    // SAFETY: the caller's; what lies beyond the row is not read.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); 4];
        let mut largest = [_mm512_setzero_si512(); 2];
        let mut at = 0;
        while at + 4 * 32 <= row.len() {
            for chain in 0..4 {
                let bits = _mm512_loadu_epi16(row.as_ptr().add(at).cast());
                weigh(bits, &mut largest[chain % 2], &mut sums[chain]);
                if let Some(copy) = &mut copy {
                    _mm512_storeu_si512(copy.as_mut_ptr().add(at).cast(), bits);
                }
                at += 32;
            }
        }
        for chain in 0..4 {
            if at < row.len() {
                let bits = avx512::load_bf16(row, at);
                weigh(bits, &mut largest[chain % 2], &mut sums[chain]);
                if let Some(copy) = &mut copy {
                    _mm512_storeu_si512(copy.as_mut_ptr().add(at).cast(), bits);
                }
                at += 32;
            }
        }
        let largest = _mm512_max_epu16(largest[0], largest[1]);
        (avx512::greatest(largest), avx512::total(sums))
    }
}

/// Takes 32 columns into the greatest magnitudes and the sums of squares.
///
/// # Safety
///
/// AVX-512 and BF16.
#[inline(always)]
unsafe fn weigh(bits: __m512i, largest: &mut __m512i, sum: &mut __m512) {
    // SAFETY: the caller's; both are 512 bits of anything.
    unsafe {
        let magnitudes = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
        *largest = _mm512_max_epu16(*largest, magnitudes);
        let bits = std::mem::transmute::<__m512i, __m512bh>(bits);
        *sum = _mm512_dpbf16_ps(*sum, bits, bits);
    }
}
