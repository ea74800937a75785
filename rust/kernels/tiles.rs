//! Register tiles: a few rows against a few rows, for any vector unit.

#![allow(unsafe_code)]

use std::ptr;

use super::{Chunk, Packed, Soon};

/// The vectors of one instruction set and one precision.
///
/// # Safety
///
/// Every method may use the unit's instructions: call them only from a function that has
/// these features, on a processor that has them. `load` reads `WIDTH` values, `flush` reads
/// and writes `LANES` values.
pub(crate) trait Unit {
    /// What is loaded.
    type Packed: Packed;
    /// A vector of it.
    type Vector: Copy;
    /// A vector of sums.
    type Sum: Copy;

    /// Columns of a chunk.
    const CHUNK: usize;
    /// Rows of a tile: `ROWS²` sums and `ROWS + 1` vectors fit in the registers.
    const ROWS: usize;
    /// Values of a vector.
    const WIDTH: usize;
    /// The float64 numbers that a vector of sums is folded to.
    const LANES: usize;

    unsafe fn zero() -> Self::Sum;
    unsafe fn load(from: *const Self::Packed) -> Self::Vector;
    /// `sum + left · right`, products of bfloat16 added in pairs.
    unsafe fn multiply_add(sum: Self::Sum, left: Self::Vector, right: Self::Vector) -> Self::Sum;
    /// Adds the lanes to `LANES` float64 numbers.
    unsafe fn flush(sum: Self::Sum, to: *mut f64);
    /// Asks for the line of an address, which need not be readable.
    unsafe fn prefetch(address: *const u8);
}

/// `(first row, rows)` of each block of rows, as even as they can be.
#[inline(always)]
fn blocks(num_states: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let count = num_states.div_ceil(most);
    let (rows, larger) = (num_states / count, num_states % count);
    (0..count).map(move |i| (i * rows + i.min(larger), rows + usize::from(i < larger)))
}

/// Every tile: two blocks of rows, the first not after the second.
#[inline(always)]
fn pairs_of_blocks(
    num_states: usize,
    most: usize,
) -> impl Iterator<Item = ((usize, usize), (usize, usize))> {
    blocks(num_states, most)
        .enumerate()
        .flat_map(move |(i, first)| {
            blocks(num_states, most)
                .skip(i)
                .map(move |second| (first, second))
        })
}

pub(crate) fn num_sums<U: Unit>(num_states: usize) -> usize {
    let on_diagonal: usize = blocks(num_states, U::ROWS)
        .map(|(_, rows)| rows * rows)
        .sum();
    (num_states * num_states + on_diagonal) / 2 * U::LANES
}

#[inline(always)]
pub(crate) fn collect<U: Unit>(num_states: usize, sums: &[f64], products: &mut [f64]) {
    let mut entries = sums.chunks_exact(U::LANES);
    for ((first, rows), (second, columns)) in pairs_of_blocks(num_states, U::ROWS) {
        for row in first..first + rows {
            let start = row * (2 * num_states - row - 1) / 2;
            for (column, lanes) in (second..second + columns).zip(&mut entries) {
                if column > row {
                    products[start + column - row - 1] += lanes.iter().sum::<f64>();
                }
            }
        }
    }
}

/// # Safety
///
/// As for the methods of [`Unit`].
#[inline(always)]
pub(crate) unsafe fn square<U: Unit>(row: &[U::Packed]) -> f64 {
    const CHAINS: usize = 4;
    let mut lanes = [0.0; 16];
    assert!(row.len().is_multiple_of(U::WIDTH) && U::LANES <= lanes.len());
    // SAFETY: whole vectors within the row; `lanes` has room for `LANES` values.
    unsafe {
        let mut sums = [U::zero(); CHAINS];
        let mut at = 0;
        while at + CHAINS * U::WIDTH <= row.len() {
            for (chain, sum) in sums.iter_mut().enumerate() {
                let vector = U::load(row.as_ptr().add(at + chain * U::WIDTH));
                *sum = U::multiply_add(*sum, vector, vector);
            }
            at += CHAINS * U::WIDTH;
        }
        while at < row.len() {
            let vector = U::load(row.as_ptr().add(at));
            sums[0] = U::multiply_add(sums[0], vector, vector);
            at += U::WIDTH;
        }
        for sum in sums {
            U::flush(sum, lanes.as_mut_ptr());
        }
    }
    lanes.iter().sum()
}

/// # Safety
///
/// As for the methods of [`Unit`].
#[inline(always)]
pub(crate) unsafe fn add<U: Unit>(chunk: &Chunk<U::Packed>, sums: &mut [f64], soon: Soon<'_>) {
    assert!(chunk.length().is_multiple_of(U::WIDTH));
    assert!(sums.len() == num_sums::<U>(chunk.num_states()));
    let mut place = sums.as_mut_ptr();
    let mut fetch = Fetch::new(soon);
    for ((first, rows), (second, columns)) in pairs_of_blocks(chunk.num_states(), U::ROWS) {
        // SAFETY: the caller's for the instructions. The rows `first + rows` and
        // `second + columns` are the chunk's; `place` has advanced by what the tiles before
        // needed, and all tiles together need `num_sums`.
        unsafe {
            let left = chunk.start().add(first * chunk.stride());
            let right = chunk.start().add(second * chunk.stride());
            let tile = Tile::<U> {
                left,
                right,
                stride: chunk.stride(),
                length: chunk.length(),
                place,
            };
            fetch.some::<U>(rows * columns);
            tile.of_shape(rows, columns, first == second);
            place = place.add(rows * columns * U::LANES);
        }
    }
}

/// Fetches all lines at once.
///
/// # Safety
///
/// As for the methods of [`Unit`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) unsafe fn prefetch_all<U: Unit>(soon: &Soon<'_>) {
    for &row in soon.rows {
        for at in (0..soon.bytes).step_by(64) {
            // SAFETY: the caller's; a prefetch reads nothing.
            unsafe { U::prefetch(ptr::without_provenance(row + at)) };
        }
    }
}

/// Lines to fetch, spread over the tiles.
struct Fetch<'a> {
    soon: Soon<'a>,
    row: usize,
    at: usize,
}

impl<'a> Fetch<'a> {
    fn new(soon: Soon<'a>) -> Self {
        Self {
            soon,
            row: 0,
            at: 0,
        }
    }

    /// Fetches as many lines as there are products in a tile.
    #[inline(always)]
    unsafe fn some<U: Unit>(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some(&row) = self.soon.rows.get(self.row) else {
                return;
            };
            // SAFETY: the caller's; a prefetch reads nothing.
            unsafe { U::prefetch(ptr::without_provenance(row + self.at)) };
            self.at += 64;
            if self.at >= self.soon.bytes {
                (self.row, self.at) = (self.row + 1, 0);
            }
        }
    }
}

struct Tile<U: Unit> {
    left: *const U::Packed,
    right: *const U::Packed,
    stride: usize,
    length: usize,
    place: *mut f64,
}

impl<U: Unit> Tile<U> {
    #[inline(always)]
    unsafe fn of_shape(self, rows: usize, columns: usize, diagonal: bool) {
        // SAFETY: the caller's, for this shape.
        unsafe {
            match (rows, columns, diagonal) {
                (1, 1, true) => self.add::<1, 1, true>(),
                (2, 2, true) => self.add::<2, 2, true>(),
                (3, 3, true) => self.add::<3, 3, true>(),
                (4, 4, true) => self.add::<4, 4, true>(),
                (1, 1, false) => self.add::<1, 1, false>(),
                (2, 1, false) => self.add::<2, 1, false>(),
                (2, 2, false) => self.add::<2, 2, false>(),
                (3, 2, false) => self.add::<3, 2, false>(),
                (3, 3, false) => self.add::<3, 3, false>(),
                (4, 3, false) => self.add::<4, 3, false>(),
                (4, 4, false) => self.add::<4, 4, false>(),
                shape => unreachable!("blocks are even: {shape:?}"),
            }
        }
    }

    #[inline(always)]
    unsafe fn add<const M: usize, const N: usize, const DIAGONAL: bool>(self) {
        // SAFETY: `length` values of `M` rows from `left` and `N` rows from `right` can be
        // read, `M · N · LANES` numbers from `place` written: the caller's.
        unsafe {
            let mut sums = [[U::zero(); N]; M];
            let mut at = 0;
            while at < self.length {
                let mut right = [U::load(self.right.add(at)); N];
                for (j, vector) in right.iter_mut().enumerate().skip(1) {
                    *vector = U::load(self.right.add(j * self.stride + at));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let left = if DIAGONAL {
                        right[i]
                    } else {
                        U::load(self.left.add(i * self.stride + at))
                    };
                    for j in if DIAGONAL { i + 1 } else { 0 }..N {
                        sums[j] = U::multiply_add(sums[j], left, right[j]);
                    }
                }
                at += U::WIDTH;
            }
            for (i, sums) in sums.iter().enumerate() {
                for j in if DIAGONAL { i + 1 } else { 0 }..N {
                    U::flush(sums[j], self.place.add((i * N + j) * U::LANES));
                }
            }
        }
    }
}

/// A [`super::Sweep`] of register tiles.
macro_rules! sweep {
    ($unit:ty) => {
        impl $crate::kernels::Sweep for $unit {
            type Packed = <$unit as Unit>::Packed;

            const CHUNK: usize = <$unit as Unit>::CHUNK;

            fn num_sums(num_states: usize) -> usize {
                $crate::kernels::tiles::num_sums::<$unit>(num_states)
            }

            #[inline(always)]
            fn add(
                chunk: &$crate::kernels::Chunk<Self::Packed>,
                sums: &mut [f64],
                soon: $crate::kernels::Soon<'_>,
            ) {
                // SAFETY: a sweep is reached through its tier's `run` alone, which has the
                // unit's instructions.
                unsafe { $crate::kernels::tiles::add::<$unit>(chunk, sums, soon) }
            }

            #[inline(always)]
            fn square(row: &[Self::Packed]) -> f64 {
                // SAFETY: as above.
                unsafe { $crate::kernels::tiles::square::<$unit>(row) }
            }

            #[inline(always)]
            fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
                $crate::kernels::tiles::collect::<$unit>(num_states, sums, products);
            }
        }
    };
}
pub(crate) use sweep;
