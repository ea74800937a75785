//! AVX-512: float32 and float64 FMA.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::avx2;
use super::registers::Registers;
use super::sweep::{self, Work};
use super::unit::Unit;

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

impl sweep::Kernels for Kernels {
    type Double = Registers<Double>;
    type Bf16 = Registers<Single>;
}

pub(crate) struct Single;

impl Unit for Single {
    type Packed = f32;
    type Vector = __m512;
    type Sum = __m512;

    const SPAN: usize = 512;
    const SPREAD: f64 = 0.95e-7;
    const ROWS: usize = 5;
    const WIDTH: usize = 16;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller has AVX-512 and `WIDTH` values to read.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512, left: __m512, right: __m512) -> __m512 {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_ps(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512, to: *mut f64) {
        // SAFETY: the caller has AVX-512 and `LANES` values to write.
        unsafe { fold(sum, to) }
    }

    #[inline(always)]
    unsafe fn flush_four(sums: [__m512; 4], to: *mut f64) {
        // SAFETY: the caller's.
        unsafe { fold_four(sums, to) }
    }

    #[inline(always)]
    unsafe fn total(from: *const f64) -> f64 {
        // SAFETY: the caller's.
        unsafe { avx2::total(_mm256_loadu_pd(from)) }
    }

    #[inline(always)]
    unsafe fn total_eight(from: *const f64) -> [f64; 8] {
        // SAFETY: the caller's.
        unsafe { total_eight(from) }
    }

    #[inline(always)]
    unsafe fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        // SAFETY: the caller's.
        Some(unsafe { square_of_sum(x, y, factor) })
    }

    /// Even columns and odd ones apart.
    #[inline(always)]
    unsafe fn pack_bf16(row: &[u16], to: &mut [f32]) -> Option<(f32, f64)> {
        // SAFETY: the caller's; `to` is a multiple of 32 and no shorter than the row.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); 4];
            let mut largest = _mm512_setzero_si512();
            let mut at = 0;
            while at < row.len() {
                let bits = load_bf16(row, at);
                let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
                let odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x1_0000)));
                _mm512_storeu_ps(to.as_mut_ptr().add(at), even);
                _mm512_storeu_ps(to.as_mut_ptr().add(at + 16), odd);
                let magnitudes = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
                largest = _mm512_max_epu16(largest, magnitudes);
                // The chains take turns.
                let new = [
                    _mm512_fmadd_ps(even, even, sums[0]),
                    _mm512_fmadd_ps(odd, odd, sums[1]),
                ];
                sums = [sums[2], sums[3], new[0], new[1]];
                at += 32;
            }
            Some((greatest(largest), total(sums)))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: the caller has AVX-512; a prefetch reads nothing.
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T1) }
    }
}

/// `|x + f·y|²` of rows of bfloat16 of one length, in float32 for 1,024 columns.
///
/// # Safety
///
/// AVX-512 F, BW and DQ.
#[inline(always)]
pub(super) unsafe fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> f64 {
    let mut square = 0.0;
    let mut at = 0;
    while at < x.len() {
        let end = x.len().min(at + 1024);
        // SAFETY: the caller's; what lies beyond the rows is not read.
        unsafe {
            let factor = _mm512_set1_ps(factor);
            let upper = _mm512_set1_epi32(-0x1_0000);
            let mut sums = [_mm512_setzero_ps(); 4];
            while at < end {
                let (x, y) = (load_bf16(x, at), load_bf16(y, at));
                let even = _mm512_fmadd_ps(
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(y)),
                    factor,
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x)),
                );
                let odd = _mm512_fmadd_ps(
                    _mm512_castsi512_ps(_mm512_and_si512(y, upper)),
                    factor,
                    _mm512_castsi512_ps(_mm512_and_si512(x, upper)),
                );
                // The chains take turns.
                let new = [
                    _mm512_fmadd_ps(even, even, sums[0]),
                    _mm512_fmadd_ps(odd, odd, sums[1]),
                ];
                sums = [sums[2], sums[3], new[0], new[1]];
                at += 32;
            }
            square += total(sums);
        }
    }
    square
}

/// The sum of four vectors' lanes, in float64.
///
/// # Safety
///
/// AVX-512 F and DQ.
#[inline(always)]
pub(super) unsafe fn total(sums: [__m512; 4]) -> f64 {
    // SAFETY: the caller's.
    unsafe {
        let mut total = [_mm512_setzero_pd(); 2];
        for sum in sums {
            let high = _mm512_extractf32x8_ps::<1>(sum);
            total[0] = _mm512_add_pd(total[0], _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
            total[1] = _mm512_add_pd(total[1], _mm512_cvtps_pd(high));
        }
        _mm512_reduce_add_pd(_mm512_add_pd(total[0], total[1]))
    }
}

/// Up to 32 bfloat16 from the `at`th on, zeros where the row has ended.
///
/// # Safety
///
/// AVX-512 BW; `at` is within the row.
#[inline(always)]
pub(super) unsafe fn load_bf16(row: &[u16], at: usize) -> __m512i {
    let rest = row.len() - at;
    // SAFETY: the caller's; what lies beyond the row is not read.
    unsafe {
        let from = row.as_ptr().add(at).cast();
        if rest >= 32 {
            _mm512_loadu_epi16(from)
        } else {
            _mm512_maskz_loadu_epi16((1 << rest) - 1, from)
        }
    }
}

/// The greatest of 32 magnitudes of bfloat16, by their bits.
///
/// # Safety
///
/// AVX-512 F and AVX2.
#[inline(always)]
pub(super) unsafe fn greatest(bits: __m512i) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        avx2::greatest(_mm256_max_epu16(
            _mm512_castsi512_si256(bits),
            _mm512_extracti64x4_epi64::<1>(bits),
        ))
    }
}

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

/// The same with four sums, and sixteen numbers: the same bits with fewer shuffles.
///
/// # Safety
///
/// AVX-512 F and DQ; `to` is valid for sixteen values.
#[inline(always)]
pub(super) unsafe fn fold_four(sums: [__m512; 4], to: *mut f64) {
    // SAFETY: the caller's.
    unsafe {
        let [a, b, c, d] = sums;
        // Quarters 0 and 1 of two sums plus their quarters 2 and 3, then 0 and 1 of each.
        let ab = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x44>(a, b),
            _mm512_shuffle_f32x4::<0xee>(a, b),
        );
        let cd = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x44>(c, d),
            _mm512_shuffle_f32x4::<0xee>(c, d),
        );
        let folded = _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd),
        );
        let halves = [
            _mm512_castps512_ps256(folded),
            _mm512_extractf32x8_ps::<1>(folded),
        ];
        for (i, half) in halves.into_iter().enumerate() {
            let to = to.add(8 * i);
            let total = _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(half));
            _mm512_storeu_pd(to, total);
        }
    }
}

/// The sums of eight times four lanes, to the bit those of [`avx2::total`].
///
/// # Safety
///
/// AVX-512 F; 32 values can be read.
#[inline(always)]
pub(super) unsafe fn total_eight(from: *const f64) -> [f64; 8] {
    // SAFETY: the caller's; a vector is eight numbers.
    unsafe {
        let (a, b) = (halves_of_four(from), halves_of_four(from.add(16)));
        // Of the first, fifth, second, sixth, ...
        let totals = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
        std::mem::transmute::<__m512d, [f64; 8]>(_mm512_permutexvar_pd(order, totals))
    }
}

/// Lanes 0 and 2 added, and 1 and 3, of four sums.
///
/// # Safety
///
/// AVX-512 F; sixteen values can be read.
#[inline(always)]
unsafe fn halves_of_four(from: *const f64) -> __m512d {
    // SAFETY: the caller's; a vector is eight numbers.
    unsafe {
        let (a, b) = (_mm512_loadu_pd(from), _mm512_loadu_pd(from.add(8)));
        _mm512_add_pd(
            _mm512_shuffle_f64x2::<0x88>(a, b),
            _mm512_shuffle_f64x2::<0xdd>(a, b),
        )
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
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_setzero_pd() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> __m512d {
        // SAFETY: the caller has AVX-512 and `WIDTH` values to read.
        unsafe { _mm512_loadu_pd(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m512d, left: __m512d, right: __m512d) -> __m512d {
        // SAFETY: the caller has AVX-512.
        unsafe { _mm512_fmadd_pd(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m512d, to: *mut f64) {
        // SAFETY: the caller has AVX-512 and `LANES` values to write.
        unsafe { _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), sum)) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: the caller has AVX-512; a prefetch reads nothing.
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T1) }
    }
}
