//! From rows of bfloat16 to tiles: 32 columns of 16 rows at a time, as they are and transposed.
//!
//! Transposed, a lane is a row: the greatest magnitudes are found there without looking across
//! lanes, by instructions that the shuffles leave room for.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;

use super::engine::{COLUMNS, Line, Multiply, OF_BLOCK, SIDE};
use crate::kernels::avx512;

/// The most columns of a chunk: its tiles are to stay in the nearest cache.
pub(super) const CHUNK: usize = 256;

/// The tiles of some columns: step by step, of each block its rows and their transposition;
/// behind all of them the odd row.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub tiles: *mut Line,
    pub steps: usize,
    /// The most of a span.
    pub most: usize,
    pub blocks: usize,
}

impl Layout {
    /// Lines that are needed.
    pub const fn room(steps: usize, blocks: usize) -> usize {
        steps * (blocks * OF_BLOCK + 1)
    }

    /// # Safety
    ///
    /// The tiles have room; the step and the block are there.
    #[inline(always)]
    pub unsafe fn rows_of(&self, step: usize, block: usize) -> *mut Line {
        // SAFETY: the caller's.
        unsafe { self.tiles.add((step * self.blocks + block) * OF_BLOCK) }
    }

    /// # Safety
    ///
    /// As above.
    #[inline(always)]
    pub unsafe fn transposed(&self, step: usize, block: usize) -> *mut Line {
        // SAFETY: the caller's.
        unsafe { self.rows_of(step, block).add(SIDE) }
    }

    /// # Safety
    ///
    /// As above.
    #[inline(always)]
    pub unsafe fn odd_row(&self, step: usize) -> *mut Line {
        // SAFETY: the caller's.
        unsafe { self.rows_of(self.steps, 0).add(step) }
    }

    /// Steps of a span: those of a chunk are cut evenly.
    pub fn of_span(&self) -> usize {
        self.steps.div_ceil(self.steps.div_ceil(self.most))
    }

    /// Copies and transposes 32 columns of 16 rows, `length` values long; their magnitudes
    /// become the `largest` where they are greater. Fetches as many columns of other rows.
    ///
    /// # Safety
    ///
    /// AVX-512 and BF16; the tiles have room, and the rows can be read.
    #[inline(always)]
    pub unsafe fn fill(
        &self,
        step: usize,
        block: usize,
        from: &[*const u16; SIDE],
        length: usize,
        prefetch: &[usize; SIDE],
        largest: &mut __m512i,
    ) {
        // SAFETY: the caller's.
        unsafe {
            let copy = self.rows_of(step, block);
            let at = step * COLUMNS;
            let used = length - at;
            // In the order of reading, which the processor's own fetching learns from.
            for row in prefetch {
                let address = row + step * size_of::<Line>();
                _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
            }
            let mut rows = [_mm512_setzero_si512(); SIDE];
            if used >= COLUMNS {
                for i in 0..SIDE {
                    rows[i] = _mm512_loadu_si512(from[i].add(at).cast());
                }
            } else {
                for i in 0..SIDE {
                    rows[i] = _mm512_maskz_loadu_epi16((1 << used) - 1, from[i].add(at).cast());
                }
            }
            let columns = transposed(rows);
            let transposed = self.transposed(step, block);
            for i in 0..SIDE {
                _mm512_store_si512(copy.add(i).cast(), rows[i]);
                _mm512_store_si512(transposed.add(i).cast(), columns[i]);
            }
            for column in columns {
                let magnitudes = _mm512_and_si512(column, _mm512_set1_epi16(0x7fff));
                *largest = _mm512_max_epu16(*largest, magnitudes);
            }
        }
    }

    /// The greatest magnitude of the odd row and the sum of its squares. Steps are lanes, summed
    /// in the order of the tiles: so a row has the same norm wherever it stands.
    ///
    /// # Safety
    ///
    /// AVX-512; the odd row is there.
    #[inline(always)]
    pub unsafe fn measure_odd_row(&self) -> (f32, f64) {
        const { assert!(CHUNK <= SIDE * COLUMNS) };
        let mut sums = [0.0_f32; SIDE];
        // SAFETY: the caller's; `sums` has room for 16 values.
        let largest = unsafe {
            let mut steps = [_mm512_setzero_si512(); SIDE];
            let mut largest = _mm512_setzero_si512();
            for step in 0..self.steps {
                steps[step] = _mm512_load_si512(self.odd_row(step).cast());
                let magnitudes = _mm512_and_si512(steps[step], _mm512_set1_epi16(0x7fff));
                largest = _mm512_max_epu16(largest, magnitudes);
            }
            let mut apart = [_mm512_setzero_ps(); 2];
            for pairs in transposed(steps) {
                let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                let odd = _mm512_and_si512(pairs, _mm512_set1_epi32(-0x1_0000));
                let odd = _mm512_castsi512_ps(odd);
                apart[0] = _mm512_fmadd_ps(even, even, apart[0]);
                apart[1] = _mm512_fmadd_ps(odd, odd, apart[1]);
            }
            _mm512_storeu_ps(sums.as_mut_ptr(), _mm512_add_ps(apart[0], apart[1]));
            avx512::greatest(largest)
        };
        let mut square = 0.0;
        for span in sums[..self.steps].chunks(self.of_span()) {
            square += f64::from(span.iter().fold(0.0, |sum, of_step| sum + of_step));
        }
        (largest, square)
    }

    /// Multiplies a block with itself over one step.
    ///
    /// # Safety
    ///
    /// The tiles of the step have been filled; the engine can be used.
    #[inline(always)]
    pub unsafe fn square(&self, step: usize, block: usize, engine: &mut impl Multiply) {
        // SAFETY: the caller's.
        unsafe {
            let (rows, transposed) = (self.rows_of(step, block), self.transposed(step, block));
            engine.multiply::<1, false, false>(rows, transposed, rows, transposed);
        }
    }

    /// Copies 32 columns of the odd row, `length` values long.
    ///
    /// # Safety
    ///
    /// AVX-512; the tiles have room, and the row can be read.
    #[inline(always)]
    pub unsafe fn fill_odd_row(
        &self,
        step: usize,
        from: *const u16,
        length: usize,
        prefetch: usize,
    ) {
        let at = step * COLUMNS;
        let unused = COLUMNS - COLUMNS.min(length - at);
        // SAFETY: the caller's.
        unsafe {
            let address = prefetch + step * size_of::<Line>();
            _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address));
            let row = _mm512_maskz_loadu_epi16(u32::MAX >> unused, from.add(at).cast());
            _mm512_store_si512(self.odd_row(step).cast(), row);
        }
    }
}

/// The greater one of each lane's two magnitudes of bfloat16.
///
/// # Safety
///
/// AVX-512 F.
#[inline(always)]
pub(super) unsafe fn greater_ones(largest: __m512i, magnitudes: &mut [f32; SIDE]) {
    // SAFETY: the caller's; there is room for 16 values.
    unsafe {
        // As float32 numbers: the even ones moved up, the odd ones with the others below.
        let odd = _mm512_and_si512(largest, _mm512_set1_epi32(-0x1_0000));
        let even = _mm512_slli_epi32::<16>(largest);
        let greater = _mm512_max_epu32(odd, even);
        _mm512_storeu_si512(magnitudes.as_mut_ptr().cast(), greater);
    }
}

/// Transposes 16 rows of 16 pairs of bfloat16, a pair moving as one.
///
/// # Safety
///
/// AVX-512 F.
#[inline(always)]
pub(super) unsafe fn transposed(rows: [__m512i; SIDE]) -> [__m512i; SIDE] {
    // SAFETY: the caller's.
    unsafe {
        // Within lanes of 128 bits: pairs of rows, then fours. (No closures: they would lack
        // the instructions of the function that this becomes part of.)
        let mut fours = rows;
        for i in (0..SIDE).step_by(4) {
            let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
            let low = [_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d)];
            let high = [_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d)];
            fours[i] = _mm512_unpacklo_epi64(low[0], low[1]);
            fours[i + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
            fours[i + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
            fours[i + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
        }
        // Column `4 lane + i` of rows `4 g ..` is in that lane of `fours[4 g + i]`.
        let mut columns = rows;
        for i in 0..4 {
            let [a, b, c, d] = [fours[i], fours[4 + i], fours[8 + i], fours[12 + i]];
            let even = [
                _mm512_shuffle_i32x4::<0x88>(a, b),
                _mm512_shuffle_i32x4::<0x88>(c, d),
            ];
            let odd = [
                _mm512_shuffle_i32x4::<0xdd>(a, b),
                _mm512_shuffle_i32x4::<0xdd>(c, d),
            ];
            columns[i] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
            columns[4 + i] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
            columns[8 + i] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
            columns[12 + i] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
        }
        columns
    }
}
