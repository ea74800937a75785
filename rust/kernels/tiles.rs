//! Register tiles: a few rows against a few rows, for any vector unit.

#![allow(unsafe_code)]

use super::packed::PADDING;
use super::{Chunk, Packed, Prefetch, greatest};

/// The vectors of one instruction set and one precision.
///
/// # Safety
///
/// Every method may use the unit's instructions: call them only from a function that has
/// these features, on a processor that has them. `load` reads `WIDTH` values, `flush` reads
/// and writes `LANES` values.
pub(crate) trait Unit: Sized {
    /// What is loaded.
    type Packed: Packed;
    /// A vector of it.
    type Vector: Copy;
    /// A vector of sums.
    type Sum: Copy;

    /// Columns whose products are summed in `Sum`'s precision.
    const SPAN: usize;
    /// How far cosines err; see [`super::Sweep::SPREAD`].
    const SPREAD: f64 = 1.1e-7;
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
    /// The same with four sums, and four times `LANES` numbers.
    #[inline(always)]
    unsafe fn flush_four(sums: [Self::Sum; 4], to: *mut f64) {
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's.
            unsafe { Self::flush(sum, to.add(i * Self::LANES)) };
        }
    }

    /// The sum of `LANES` numbers.
    #[inline(always)]
    unsafe fn total(from: *const f64) -> f64 {
        // SAFETY: the caller's: so many can be read.
        match *unsafe { std::slice::from_raw_parts(from, Self::LANES) } {
            [a, b] => a + b,
            [a, b, c, d] => (a + b) + (c + d),
            [a, b, c, d, e, f, g, h] => ((a + b) + (c + d)) + ((e + f) + (g + h)),
            _ => unreachable!("a unit has 2, 4 or 8 lanes"),
        }
    }

    /// The same of eight times `LANES` numbers, to the bit.
    #[inline(always)]
    unsafe fn total_eight(from: *const f64) -> [f64; 8] {
        // SAFETY: the caller's.
        std::array::from_fn(|i| unsafe { Self::total(from.add(i * Self::LANES)) })
    }

    /// Copies a row of bfloat16, padded with zeros to a multiple of 32; its greatest magnitude
    /// and the sum of its squares. Columns may change places, in all rows alike. `None` if
    /// the unit has no way of its own.
    #[inline(always)]
    unsafe fn pack_bf16(_row: &[u16], _to: &mut [Self::Packed]) -> Option<(f32, f64)> {
        None
    }

    /// The greatest magnitude of a packed row and the sum of its squares.
    #[inline(always)]
    unsafe fn measure(row: &[Self::Packed]) -> (f32, f64) {
        // SAFETY: the caller's.
        (greatest(row), unsafe { square::<Self>(row) })
    }

    /// `|x + f·y|²` of rows of bfloat16 of one length; `None` if the unit has no way of its own.
    #[inline(always)]
    unsafe fn square_of_sum(_x: &[u16], _y: &[u16], _factor: f32) -> Option<f64> {
        None
    }

    /// Asks for the line of an address, which need not be readable.
    unsafe fn prefetch(address: *const u8);
}

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
pub(crate) unsafe fn square<U: Unit>(row: &[U::Packed]) -> f64 {
    const CHAINS: usize = 4;
    let mut lanes = [0.0; 8];
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
        U::total(lanes.as_ptr())
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

/// A [`super::Sweep`] of register tiles.
macro_rules! sweep {
    ($unit:ty) => {
        impl $crate::kernels::Sweep for $unit {
            type Packed = <$unit as Unit>::Packed;

            type Engine = ();

            const CHUNK: usize = 512;

            const WHOLE: usize = 768;

            const AHEAD: usize = 80 << 10;

            const LEAST_AHEAD: usize = 2;

            const SPAN: usize = <$unit as Unit>::SPAN;

            const SPREAD: f64 = <$unit as Unit>::SPREAD;

            fn engine(_width: usize) {}

            fn num_sums(num_states: usize) -> usize {
                $crate::kernels::tiles::num_sums::<$unit>(num_states)
            }

            #[inline(always)]
            fn add(
                chunk: &$crate::kernels::Chunk<Self::Packed>,
                fresh: bool,
                sums: &mut [f64],
                prefetch: &mut $crate::kernels::Prefetch,
                (): &mut (),
            ) {
                // SAFETY: a sweep is reached through its tier's `run` alone, which has the
                // unit's instructions.
                unsafe { $crate::kernels::tiles::add::<$unit>(chunk, fresh, sums, prefetch) }
            }

            #[inline(always)]
            fn square(row: &[Self::Packed]) -> f64 {
                // SAFETY: as above.
                unsafe { $crate::kernels::tiles::square::<$unit>(row) }
            }

            #[inline(always)]
            fn measure(row: &[Self::Packed]) -> (f32, f64) {
                // SAFETY: as above.
                unsafe { <$unit as Unit>::measure(row) }
            }

            #[inline(always)]
            fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
                assert!(x.len() == y.len());
                // SAFETY: as above.
                unsafe { <$unit as Unit>::square_of_sum(x, y, factor) }
            }

            #[inline(always)]
            fn pack_bf16(row: &[u16], to: &mut [Self::Packed]) -> Option<(f32, f64)> {
                assert!(row.len() <= to.len() && to.len().is_multiple_of($crate::kernels::PADDING));
                // SAFETY: as above.
                unsafe { <$unit as Unit>::pack_bf16(row, to) }
            }

            #[inline(always)]
            fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
                // SAFETY: as above.
                unsafe { $crate::kernels::tiles::collect::<$unit>(num_states, sums, products) }
            }
        }
    };
}
pub(crate) use sweep;

#[cfg(test)]
mod tests {
    use super::Unit;
    #[cfg(target_arch = "aarch64")]
    use crate::kernels::neon;
    use crate::kernels::{Tier, scalar};
    #[cfg(target_arch = "x86_64")]
    use crate::kernels::{avx2, avx512, avx512bf16};

    fn eight_are_totalled_as_one<U: Unit>(tier: Tier) {
        if !tier.is_available() {
            return;
        }
        let lanes: Vec<f64> = (0..8 * U::LANES)
            .map(|lane| [1e16, 1.0, -1e16, 3.0][lane % 4] * (1 + lane / 4) as f64)
            .collect();
        // SAFETY: the tier is available, and has the unit's instructions; eight times `LANES`
        // values can be read.
        unsafe {
            for (i, eighth) in U::total_eight(lanes.as_ptr()).into_iter().enumerate() {
                let alone = U::total(lanes.as_ptr().add(i * U::LANES));
                assert_eq!(eighth.to_bits(), alone.to_bits(), "{tier}, {i}");
            }
        }
    }

    #[test]
    fn eight_sums_are_totalled_as_one_is() {
        eight_are_totalled_as_one::<scalar::Double>(Tier::Scalar);
        #[cfg(target_arch = "x86_64")]
        {
            eight_are_totalled_as_one::<avx2::Single>(Tier::Avx2);
            eight_are_totalled_as_one::<avx2::Double>(Tier::Avx2);
            eight_are_totalled_as_one::<avx512::Single>(Tier::Avx512);
            eight_are_totalled_as_one::<avx512::Double>(Tier::Avx512);
            eight_are_totalled_as_one::<avx512bf16::Bf16>(Tier::Avx512Bf16);
        }
        #[cfg(target_arch = "aarch64")]
        {
            eight_are_totalled_as_one::<neon::Single>(Tier::Neon);
            eight_are_totalled_as_one::<neon::Double>(Tier::Neon);
        }
    }
}
