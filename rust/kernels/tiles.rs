//! Register tiles: a few rows against a few rows, for any vector unit.

#![allow(unsafe_code)]

use super::packed::{Chunk, PADDING};
use super::prefetch::Prefetch;
use super::unit::Unit;

/// At least the pairs of the largest tile; a multiple of eight.
const MOST_PAIRS: usize = 32;

/// Rows in blocks as even as they can be, of at most `most`.
#[derive(Clone, Copy)]
struct Blocks {
    count: usize,
    rows: usize,
    larger: usize,
}

impl Blocks {
    #[inline(always)]
    fn new(num_states: usize, most: usize) -> Self {
        let count = num_states.div_ceil(most);
        let (rows, larger) = (num_states / count, num_states % count);
        Self {
            count,
            rows,
            larger,
        }
    }

    /// First row and number of rows.
    #[inline(always)]
    fn get(self, block: usize) -> (usize, usize) {
        let first = block * self.rows + block.min(self.larger);
        (first, self.rows + usize::from(block < self.larger))
    }
}

pub(crate) fn num_sums<U: Unit>(num_states: usize) -> usize {
    let blocks = Blocks::new(num_states, U::ROWS);
    let on_diagonal: usize = (0..blocks.count)
        .map(|block| blocks.get(block).1.pow(2))
        .sum();
    // Sums are totalled by eight, so up to seven beyond the last are read.
    (usize::midpoint(num_states * num_states, on_diagonal) + 7) * U::LANES
}

/// # Safety
///
/// As for the methods of [`Unit`].
#[inline(always)]
pub(crate) unsafe fn collect<U: Unit>(num_states: usize, sums: &[f64], products: &mut [f64]) {
    let blocks = Blocks::new(num_states, U::ROWS);
    let mut tiles = sums;
    for i in 0..blocks.count {
        let (first, rows) = blocks.get(i);
        for j in i..blocks.count {
            let (second, columns) = blocks.get(j);
            let count = rows * columns;
            let mut totals = [0.0; MOST_PAIRS];
            for eight in 0..count.div_ceil(8) {
                let lanes = &tiles[8 * eight * U::LANES..][..8 * U::LANES];
                // SAFETY: eight times `LANES` of them.
                let eight_totals = unsafe { U::total_eight(lanes.as_ptr()) };
                totals[8 * eight..][..8].copy_from_slice(&eight_totals);
            }
            tiles = &tiles[count * U::LANES..];
            for row in 0..rows {
                let skipped = if i == j { row + 1 } else { 0 };
                let totals = &totals[row * columns + skipped..][..columns - skipped];
                let row = first + row;
                let start = row * (2 * num_states - row - 1) / 2 + second + skipped - row - 1;
                // No iterators: in a function of this size they are calls.
                let products = &mut products[start..][..totals.len()];
                match totals.len() {
                    5 => add_all::<5>(products, totals),
                    4 => add_all::<4>(products, totals),
                    3 => add_all::<3>(products, totals),
                    2 => add_all::<2>(products, totals),
                    1 => add_all::<1>(products, totals),
                    0 => (),
                    rows => unreachable!("tiles have at most five rows: {rows}"),
                }
            }
        }
    }
}

#[inline(always)]
fn add_all<const N: usize>(products: &mut [f64], totals: &[f64]) {
    for column in 0..N {
        products[column] += totals[column];
    }
}

/// # Safety
///
/// As for the methods of [`Unit`].
#[inline(always)]
pub(crate) unsafe fn add<U: Unit>(
    chunk: &Chunk<U::Packed>,
    fresh: bool,
    sums: &mut [f64],
    prefetch: &mut Prefetch,
) {
    let length = chunk.length();
    assert!(length.is_multiple_of(U::WIDTH));
    assert!(sums.len() == num_sums::<U>(chunk.num_states()));
    let span = length
        .div_ceil(length.div_ceil(U::SPAN))
        .next_multiple_of(PADDING);
    if fresh {
        sums.fill(0.0);
    }
    let mut place = sums.as_mut_ptr();
    let blocks = Blocks::new(chunk.num_states(), U::ROWS);
    // One line every so many columns, since many at a time wait for one another; what is left
    // over, where spans begin.
    let tiles = blocks.count * (blocks.count + 1) / 2;
    let (steps, spans) = (tiles * length / U::WIDTH, tiles * length.div_ceil(span));
    let between = steps / prefetch.left().max(1) * U::WIDTH;
    let left_over = prefetch.left().saturating_sub(steps).div_ceil(spans);
    // SAFETY: the caller's.
    unsafe { prefetch.fetch_pages::<U>() };
    for i in 0..blocks.count {
        let (first, rows) = blocks.get(i);
        for j in i..blocks.count {
            let (second, columns) = blocks.get(j);
            // SAFETY: the caller's for the instructions. The rows `first + rows` and
            // `second + columns` are the chunk's; `place` has advanced by what the tiles
            // before needed, and all tiles together need `num_sums`.
            unsafe {
                let tile = Tile::<U> {
                    left: chunk.start().add(first * chunk.stride()),
                    right: chunk.start().add(second * chunk.stride()),
                    stride: chunk.stride(),
                    length,
                    span,
                    between,
                    left_over,
                    place,
                };
                tile.of_shape(rows, columns, i == j, prefetch);
                place = place.add(rows * columns * U::LANES);
            }
        }
    }
}

struct Tile<U: Unit> {
    left: *const U::Packed,
    right: *const U::Packed,
    stride: usize,
    length: usize,
    span: usize,
    /// Columns from one line that is fetched to the next.
    between: usize,
    /// Lines that are fetched where a span begins.
    left_over: usize,
    place: *mut f64,
}

impl<U: Unit> Tile<U> {
    #[inline(always)]
    unsafe fn of_shape(self, rows: usize, columns: usize, diagonal: bool, prefetch: &mut Prefetch) {
        // SAFETY: the caller's, for this shape.
        unsafe {
            match (rows, columns, diagonal) {
                (1, 1, true) => self.add::<1, 1, true>(prefetch),
                (2, 2, true) => self.add::<2, 2, true>(prefetch),
                (3, 3, true) => self.add::<3, 3, true>(prefetch),
                (4, 4, true) => self.add::<4, 4, true>(prefetch),
                (5, 5, true) => self.add::<5, 5, true>(prefetch),
                (1, 1, false) => self.add::<1, 1, false>(prefetch),
                (2, 1, false) => self.add::<2, 1, false>(prefetch),
                (2, 2, false) => self.add::<2, 2, false>(prefetch),
                (3, 2, false) => self.add::<3, 2, false>(prefetch),
                (3, 3, false) => self.add::<3, 3, false>(prefetch),
                (4, 3, false) => self.add::<4, 3, false>(prefetch),
                (4, 4, false) => self.add::<4, 4, false>(prefetch),
                (5, 4, false) => self.add::<5, 4, false>(prefetch),
                (5, 5, false) => self.add::<5, 5, false>(prefetch),
                shape => unreachable!("blocks are even: {shape:?}"),
            }
        }
    }

    #[inline(always)]
    unsafe fn add<const M: usize, const N: usize, const DIAGONAL: bool>(
        self,
        prefetch: &mut Prefetch,
    ) {
        // SAFETY: `length` values of `M` rows from `left` and `N` rows from `right` can be
        // read, `M · N · LANES` numbers from `place` written: the caller's.
        unsafe {
            let mut at = 0;
            let mut next = 0;
            while at < self.length {
                let end = self.length.min(at + self.span);
                let mut sums = [[U::zero(); N]; M];
                for _ in 0..self.left_over {
                    prefetch.fetch::<U>();
                }
                while at < end {
                    if at >= next {
                        prefetch.fetch::<U>();
                        next += self.between;
                    }
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
                if DIAGONAL {
                    for (i, sums) in sums.iter().enumerate() {
                        for (j, &sum) in sums.iter().enumerate().skip(i + 1) {
                            U::flush(sum, self.place.add((i * N + j) * U::LANES));
                        }
                    }
                } else {
                    let mut at = 0;
                    while at + 4 <= M * N {
                        let mut four = [U::zero(); 4];
                        for (i, sum) in four.iter_mut().enumerate() {
                            *sum = sums[(at + i) / N][(at + i) % N];
                        }
                        U::flush_four(four, self.place.add(at * U::LANES));
                        at += 4;
                    }
                    while at < M * N {
                        U::flush(sums[at / N][at % N], self.place.add(at * U::LANES));
                        at += 1;
                    }
                }
            }
        }
    }
}
