//! AVX2 and FMA.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::registers::Registers;
use super::sweep::{self, Work};
use super::unit::Unit;

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

impl sweep::Kernels for Kernels {
    type Double = Registers<Double>;
    type Bf16 = Registers<Single>;
}

pub(crate) struct Single;

impl Unit for Single {
    type Packed = f32;
    type Vector = __m256;
    type Sum = __m256;

    const SPAN: usize = 256;
    const SPREAD: f64 = 0.8e-7;
    const ROWS: usize = 3;
    const WIDTH: usize = 8;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller has AVX2 and FMA and `WIDTH` values to read.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m256, left: __m256, right: __m256) -> __m256 {
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { _mm256_fmadd_ps(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m256, to: *mut f64) {
        // SAFETY: the caller has AVX2 and FMA and `LANES` values to write.
        unsafe {
            let halves = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            let total = _mm256_add_pd(_mm256_loadu_pd(to), _mm256_cvtps_pd(halves));
            _mm256_storeu_pd(to, total);
        }
    }

    #[inline(always)]
    unsafe fn total(from: *const f64) -> f64 {
        // SAFETY: the caller's.
        unsafe { total(_mm256_loadu_pd(from)) }
    }

    #[inline(always)]
    unsafe fn total_eight(from: *const f64) -> [f64; 8] {
        // SAFETY: the caller's; eight numbers are two times four.
        unsafe { std::mem::transmute([total_four(from), total_four(from.add(16))]) }
    }

    #[inline(always)]
    unsafe fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        const COLUMNS: usize = 16;
        let mut lanes = [0.0; 4];
        let mut at = 0;
        // SAFETY: the caller's; what lies beyond the rows is not read.
        unsafe {
            let factor = _mm256_set1_ps(factor);
            let upper = _mm256_set1_epi32(-0x1_0000);
            while at < x.len() {
                let end = x.len().min(at + 1024);
                let mut sums = [_mm256_setzero_ps(); 8];
                while at < end {
                    let (mut x_rest, mut y_rest) = ([0; COLUMNS], [0; COLUMNS]);
                    let (from_x, from_y) = if x.len() - at >= COLUMNS {
                        (x.as_ptr().add(at), y.as_ptr().add(at))
                    } else {
                        x_rest[..x.len() - at].copy_from_slice(&x[at..]);
                        y_rest[..y.len() - at].copy_from_slice(&y[at..]);
                        (x_rest.as_ptr(), y_rest.as_ptr())
                    };
                    let x = _mm256_loadu_si256(from_x.cast());
                    let y = _mm256_loadu_si256(from_y.cast());
                    let even = _mm256_fmadd_ps(
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(y)),
                        factor,
                        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x)),
                    );
                    let odd = _mm256_fmadd_ps(
                        _mm256_castsi256_ps(_mm256_and_si256(y, upper)),
                        factor,
                        _mm256_castsi256_ps(_mm256_and_si256(x, upper)),
                    );
                    // The chains take turns.
                    let [a, b, rest @ ..] = sums;
                    let [c, d, e, f, g, h] = rest;
                    sums = [
                        c,
                        d,
                        e,
                        f,
                        g,
                        h,
                        _mm256_fmadd_ps(even, even, a),
                        _mm256_fmadd_ps(odd, odd, b),
                    ];
                    at += COLUMNS;
                }
                for sum in sums {
                    Self::flush(sum, lanes.as_mut_ptr());
                }
            }
        }
        Some((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]))
    }

    /// Even columns and odd ones apart.
    #[inline(always)]
    unsafe fn pack_bf16(row: &[u16], to: &mut [f32]) -> Option<(f32, f64)> {
        const COLUMNS: usize = 16;
        // SAFETY: the caller's; `to` is a multiple of 32 and no shorter than the row.
        unsafe {
            let mut sums = [_mm256_setzero_ps(); 4];
            let mut largest = _mm256_setzero_si256();
            let mut at = 0;
            while at < row.len() {
                let mut rest = [0; COLUMNS];
                let from = if row.len() - at >= COLUMNS {
                    row.as_ptr().add(at)
                } else {
                    rest[..row.len() - at].copy_from_slice(&row[at..]);
                    rest.as_ptr()
                };
                let bits = _mm256_loadu_si256(from.cast());
                let even = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits));
                let odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(-0x1_0000)));
                _mm256_storeu_ps(to.as_mut_ptr().add(at), even);
                _mm256_storeu_ps(to.as_mut_ptr().add(at + 8), odd);
                let magnitudes = _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff));
                largest = _mm256_max_epu16(largest, magnitudes);
                // The chains take turns.
                let new = [
                    _mm256_fmadd_ps(even, even, sums[0]),
                    _mm256_fmadd_ps(odd, odd, sums[1]),
                ];
                sums = [sums[2], sums[3], new[0], new[1]];
                at += COLUMNS;
            }
            if at < to.len() {
                to[at..].fill(0.0);
            }
            let mut lanes = [0.0; 4];
            for sum in sums {
                Self::flush(sum, lanes.as_mut_ptr());
            }
            let square = total(_mm256_loadu_pd(lanes.as_ptr()));
            Some((greatest(largest), square))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: the caller has AVX2 and FMA; a prefetch reads nothing.
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T1) }
    }
}

/// The greatest of 16 magnitudes of bfloat16, by their bits.
///
/// # Safety
///
/// AVX2.
#[inline(always)]
pub(super) unsafe fn greatest(bits: __m256i) -> f32 {
    // SAFETY: the caller's.
    unsafe {
        let eight = _mm_max_epu16(
            _mm256_castsi256_si128(bits),
            _mm256_extracti128_si256::<1>(bits),
        );
        // There is an instruction for the least of eight, and none for the greatest.
        let least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
        let greatest = !_mm_extract_epi16::<0>(least).cast_unsigned() & 0xffff;
        f32::from_bits(greatest << 16)
    }
}

/// The sum of four lanes. A compiler does it by way of memory.
///
/// # Safety
///
/// AVX.
#[inline(always)]
pub(super) unsafe fn total(lanes: __m256d) -> f64 {
    // SAFETY: the caller's.
    unsafe {
        let two = _mm_add_pd(
            _mm256_castpd256_pd128(lanes),
            _mm256_extractf128_pd::<1>(lanes),
        );
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)))
    }
}

/// The same of four times four lanes, to the bit.
///
/// # Safety
///
/// AVX2; sixteen values can be read.
#[inline(always)]
pub(super) unsafe fn total_four(from: *const f64) -> [f64; 4] {
    // SAFETY: the caller's; a vector is four numbers.
    unsafe {
        let sum_of_two = |from: *const f64| {
            let (a, b) = (_mm256_loadu_pd(from), _mm256_loadu_pd(from.add(4)));
            _mm256_add_pd(
                _mm256_permute2f128_pd::<0x20>(a, b),
                _mm256_permute2f128_pd::<0x31>(a, b),
            )
        };
        let totals = _mm256_hadd_pd(sum_of_two(from), sum_of_two(from.add(8)));
        std::mem::transmute::<__m256d, [f64; 4]>(_mm256_permute4x64_pd::<0b11_01_10_00>(totals))
    }
}

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
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { _mm256_setzero_pd() }
    }

    #[inline(always)]
    unsafe fn load(from: *const f64) -> __m256d {
        // SAFETY: the caller has AVX2 and FMA and `WIDTH` values to read.
        unsafe { _mm256_loadu_pd(from) }
    }

    #[inline(always)]
    unsafe fn multiply_add(sum: __m256d, left: __m256d, right: __m256d) -> __m256d {
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { _mm256_fmadd_pd(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn flush(sum: __m256d, to: *mut f64) {
        // SAFETY: the caller has AVX2 and FMA and `LANES` values to write.
        unsafe { _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), sum)) }
    }

    #[inline(always)]
    unsafe fn prefetch(address: *const u8) {
        // SAFETY: the caller has AVX2 and FMA; a prefetch reads nothing.
        unsafe { _mm_prefetch(address.cast(), _MM_HINT_T1) }
    }
}
