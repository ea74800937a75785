//! AMX: bfloat16 products in tiles of 16 x 16 sums.
//!
//! The tiles are the processor's, or those of a twin in plain Rust; both go through one sweep.

#![allow(unsafe_code, clippy::wildcard_imports)]

mod available;
mod filling;
mod hardware;
mod span;
#[cfg(test)]
mod twin;

use std::arch::x86_64::*;
use std::cell::Cell;
use std::mem::MaybeUninit;

pub(super) use self::available::is_available;
use self::filling::{Layout, Line, greater_ones};
use self::hardware::Hardware;
use self::span::{Pending, Span};
use super::{Chunk, Prefetch, Sweep, Work, avx512bf16};
use crate::states::Element;

/// Rows of a tile, and 32-bit columns.
const SIDE: usize = 16;

/// bfloat16 columns of a tile.
const COLUMNS: usize = 2 * SIDE;

/// One tile of sums.
type Tile = [f32; SIDE * SIDE];

/// # Safety
///
/// The processor has AVX-512 F, BW, DQ, VL and BF16, and AMX may be used.
#[target_feature(enable = "avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn run<W: Work>(work: W) -> W::Output {
    work.run::<Hardware>()
}

/// The most blocks that a block of rows is multiplied with at a time.
const BLOCKS: usize = 3;

/// The most columns of a chunk: its tiles are to stay in the nearest cache.
const CHUNK: usize = 256;

/// Steps of 32 columns whose products are summed in float32.
const SPAN: usize = 4;

/// Sums of up to three blocks of rows against one, and of one row more against two of them.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(crate) struct Sums {
    blocks: [Tile; BLOCKS],
    rows: [[f32; SIDE]; 2],
}

/// What multiplies tiles: the processor, or its twin. It holds [`Sums`].
pub(crate) trait Multiply {
    /// Sets the engine up for this thread.
    ///
    /// # Safety
    ///
    /// The engine can be used, and there is no other one in the thread.
    unsafe fn new() -> Self;

    /// Sets the sums to zero.
    fn clear(&mut self);

    /// Adds the products of a block of rows with `N` blocks over 32 columns. With `ROW` also
    /// those of one row more with the same blocks, and with `OWN` before them with one more
    /// block.
    ///
    /// # Safety
    ///
    /// `left` is a tile of 16 lines, unless `N` is 0, and `row` one line, if there is one.
    /// `right` and its followers, [`filling::OF_BLOCK`] lines apart, are transposed tiles, and
    /// so is `own`, if there is one. `N` is at most 3, with `ROW` 2, with `OWN` 1.
    unsafe fn multiply<const N: usize, const ROW: bool, const OWN: bool>(
        &mut self,
        left: *const Line,
        own: *const Line,
        row: *const Line,
        right: *const Line,
    );

    /// Writes the sums of one block.
    fn store_block(&mut self, sums: &mut Tile);

    /// Writes the sums of `N` blocks, and of the row if there is one.
    fn store<const N: usize, const ROW: bool>(&mut self, sums: &mut MaybeUninit<Sums>);
}

/// Sums in tiles of blocks of 16 rows, those of padding included; a row that is left over
/// from blocks is multiplied alone.
pub(crate) struct Tiles<E>(std::marker::PhantomData<E>);

/// An engine, and what it makes of a chunk.
pub(crate) struct Session<E> {
    engine: E,
    /// The most steps of a span: fewer in short rows, where few errors average out.
    most: usize,
    /// Whether norms are summed apart, as in longer rows they need not be.
    is_short: bool,
    /// The length of the rows.
    length: usize,
    /// Whether the rows are others than when the tiles were filled.
    stale: bool,
    buffers: Buffers,
}

/// What a thread keeps from one session to the next.
#[derive(Default)]
struct Buffers {
    tiles: Vec<Line>,
    /// The rows that the tiles are of; rows of zeros make the last block full.
    rows: Vec<*const u16>,
    /// Where the rows are that are to be prefetched.
    prefetch: Vec<usize>,
    magnitudes: Vec<f32>,
    /// The products of each block with itself over each span.
    diagonals: Vec<Tile>,
}

thread_local! {
    static BUFFERS: Cell<Buffers> = Cell::default();
}

impl<E> Drop for Session<E> {
    fn drop(&mut self) {
        BUFFERS.set(std::mem::take(&mut self.buffers));
    }
}

/// Blocks of rows, and whether a row is left over from them.
#[inline(always)]
fn blocks_of(num_states: usize) -> (usize, bool) {
    match (num_states / SIDE, num_states % SIDE) {
        (blocks, 0) => (blocks, false),
        (blocks @ 1.., 1) => (blocks, true),
        (blocks, _) => (blocks + 1, false),
    }
}

/// Where the sums of a block of rows with the blocks from it on begin.
#[inline(always)]
fn place_of(first: usize, blocks: usize) -> usize {
    first * (2 * blocks - first + 1) / 2 * SIDE * SIDE
}

#[inline(always)]
fn add_to(sums: &mut [f64], products: &[f32]) {
    let products = &products[..sums.len()];
    for place in 0..sums.len() {
        sums[place] += f64::from(products[place]);
    }
}

impl<E: Multiply> Session<E> {
    #[inline(always)]
    fn layout(&mut self, num_states: usize) -> Layout {
        let (blocks, _) = blocks_of(num_states);
        Layout {
            tiles: self.buffers.tiles.as_mut_ptr(),
            steps: self.length.div_ceil(COLUMNS),
            most: self.most,
            blocks,
        }
    }

    /// Fills the tiles of all rows, finds the rows' magnitudes, and multiplies each block with
    /// itself, which takes no time beside the transpositions.
    #[inline(always)]
    fn fill(&mut self, num_states: usize) {
        let (blocks, odd) = blocks_of(num_states);
        let steps = self.length.div_ceil(COLUMNS);
        let room = Layout::room(steps, blocks);
        if self.buffers.tiles.len() < room {
            self.buffers.tiles.resize(room, Line([0; SIDE]));
        }
        self.buffers.magnitudes.resize(self.buffers.rows.len(), 0.0);
        let layout = self.layout(num_states);
        let of_span = layout.of_span();
        let spans = steps.div_ceil(of_span);
        self.buffers
            .diagonals
            .resize(spans * blocks, [0.0; SIDE * SIDE]);
        let (rows, _) = self.buffers.rows.as_chunks::<SIDE>();
        let (prefetch, _) = self.buffers.prefetch.as_chunks::<SIDE>();
        let (magnitudes, _) = self.buffers.magnitudes.as_chunks_mut::<SIDE>();
        for block in 0..blocks {
            // SAFETY (of all that follow): a sweep is reached through its tier's `run` alone.
            // The tiles have room, and the rows are `length` long.
            unsafe {
                let mut largest = _mm512_setzero_si512();
                for span in 0..spans {
                    self.engine.clear();
                    let steps = span * of_span..steps.min((span + 1) * of_span);
                    for step in steps.clone() {
                        let (rows, prefetch) = (&rows[block], &prefetch[block]);
                        layout.fill(step, block, rows, self.length, prefetch, &mut largest);
                        // One step late: what was just stored would be waited for.
                        if step > steps.start {
                            layout.square(step - 1, block, &mut self.engine);
                        }
                    }
                    layout.square(steps.end - 1, block, &mut self.engine);
                    let sums = &mut self.buffers.diagonals[span * blocks + block];
                    self.engine.store_block(sums);
                }
                greater_ones(largest, &mut magnitudes[block]);
            }
        }
        if odd {
            let (row, prefetch) = (
                self.buffers.rows[num_states - 1],
                self.buffers.prefetch[num_states - 1],
            );
            for step in 0..steps {
                unsafe { layout.fill_odd_row(step, row, self.length, prefetch) };
            }
        }
        self.stale = false;
    }
}

impl<E: Multiply> Sweep for Tiles<E> {
    type Packed = u16;

    type Engine = Session<E>;

    const CHUNK: usize = CHUNK;

    const AHEAD: usize = 40 << 10;

    const LEAST_AHEAD: usize = 1;

    const SPAN: usize = SPAN * COLUMNS;

    const SPREAD: f64 = 1.05e-7;

    fn span(width: usize) -> usize {
        match width {
            ..=256 => Self::SPAN / 4,
            257..1536 => Self::SPAN / 2,
            _ => Self::SPAN,
        }
    }

    #[inline(always)]
    fn engine(width: usize) -> Session<E> {
        Session {
            // SAFETY: a sweep is reached through its tier's `run` alone, one at a time.
            engine: unsafe { E::new() },
            is_short: width <= 512,
            most: Self::span(width) / COLUMNS,
            length: 0,
            stale: true,
            buffers: BUFFERS.take(),
        }
    }

    fn num_sums(num_states: usize) -> usize {
        let (blocks, odd) = blocks_of(num_states);
        place_of(blocks, blocks) + if odd { blocks * SIDE } else { 0 }
    }

    /// Rows of bfloat16 are read where they are.
    #[inline(always)]
    fn pack<'a, T: Element + 'a>(
        chunk: &mut Chunk<u16>,
        row: impl Fn(usize) -> &'a [T],
        magnitudes: &mut [f32],
        squares: &mut [f64],
        prefetch: &Prefetch,
        session: &mut Session<E>,
    ) {
        static ZEROS: [u16; CHUNK] = [0; CHUNK];
        let num_states = chunk.num_states();
        session.buffers.rows.clear();
        session.length = row(0).len();
        assert!(
            session.length <= CHUNK && session.length.next_multiple_of(COLUMNS) == chunk.length()
        );
        for state in 0..num_states {
            let row = T::bf16_bits(row(state)).expect("tiles are for bfloat16");
            assert!(row.len() == session.length);
            session.buffers.rows.push(row.as_ptr());
        }
        session
            .buffers
            .rows
            .resize(num_states.next_multiple_of(SIDE), ZEROS.as_ptr());
        let (blocks, odd) = blocks_of(num_states);
        session.buffers.prefetch.clear();
        session.buffers.prefetch.extend_from_slice(prefetch.rows());
        session
            .buffers
            .prefetch
            .resize(session.buffers.rows.len(), ZEROS.as_ptr().addr());
        session.fill(num_states);
        magnitudes.copy_from_slice(&session.buffers.magnitudes[..num_states]);
        if session.is_short {
            for state in 0..num_states {
                let row = T::bf16_bits(row(state)).expect("tiles are for bfloat16");
                // SAFETY: a sweep is reached through its tier's `run` alone.
                (magnitudes[state], squares[state]) = unsafe { avx512bf16::measure(row, None) };
            }
            return;
        }
        squares.fill(0.0);
        for (place, _) in session.buffers.diagonals.iter().enumerate() {
            let first = place % blocks * SIDE;
            let products = &session.buffers.diagonals[place];
            for (i, square) in squares[first..].iter_mut().take(SIDE).enumerate() {
                *square += f64::from(products[i * SIDE + i]);
            }
        }
        if odd {
            let last = num_states - 1;
            // SAFETY: a sweep is reached through its tier's `run` alone; the tiles are filled.
            unsafe {
                (magnitudes[last], squares[last]) = session.layout(num_states).measure_odd_row();
            }
        }
    }

    #[inline(always)]
    fn copy<'a, T: Element + 'a>(
        chunk: &mut Chunk<u16>,
        row: impl Fn(usize) -> &'a [T],
        session: &mut Session<E>,
    ) {
        for state in 0..chunk.num_states() {
            chunk.pack(state, row(state));
            session.buffers.rows[state] = chunk.row(state).as_ptr();
        }
        session.stale = true;
    }

    #[inline(always)]
    fn add(
        chunk: &Chunk<u16>,
        fresh: bool,
        sums: &mut [f64],
        _prefetch: &mut Prefetch,
        session: &mut Session<E>,
    ) {
        if fresh {
            sums.fill(0.0);
        }
        let (blocks, odd) = blocks_of(chunk.num_states());
        assert!(sums.len() == Self::num_sums(chunk.num_states()));
        assert!(session.buffers.rows.len() == chunk.num_states().next_multiple_of(SIDE));
        if session.stale {
            session.fill(chunk.num_states());
        }
        for place in 0..session.buffers.diagonals.len() {
            let block = place % blocks;
            let products = &session.buffers.diagonals[place];
            add_to(
                &mut sums[place_of(block, blocks)..][..SIDE * SIDE],
                products,
            );
        }
        let layout = session.layout(chunk.num_states());
        let engine = &mut session.engine;
        let mut pending = Pending::new(sums);
        for start in (0..layout.steps).step_by(layout.of_span()) {
            let s = Span {
                layout: &layout,
                steps: start..layout.steps.min(start + layout.of_span()),
            };
            let (e, p) = (&mut *engine, &mut pending);
            // SAFETY (of all that follow): a sweep is reached through its tier's `run` alone,
            // and the tiles have been filled.
            for first in 0..blocks {
                let mut second = first + 1;
                if first == 0 && odd {
                    if blocks == 1 {
                        unsafe { s.multiply::<E, 0, true, true>([0, 1], e, p) }
                    } else {
                        unsafe { s.multiply::<E, 1, true, true>([0, 1], e, p) }
                        second += 1;
                    }
                }
                let row = first == 0 && odd;
                while second < blocks {
                    let at = [first, second];
                    // With the odd row there is room for the sums of two blocks at a time.
                    let most = if row { 2 } else { BLOCKS };
                    let some = most.min(blocks - second);
                    match (some, row) {
                        (1, true) => unsafe { s.multiply::<E, 1, true, false>(at, e, p) },
                        (_, true) => unsafe { s.multiply::<E, 2, true, false>(at, e, p) },
                        (1, _) => unsafe { s.multiply::<E, 1, false, false>(at, e, p) },
                        (2, _) => unsafe { s.multiply::<E, 2, false, false>(at, e, p) },
                        _ => unsafe { s.multiply::<E, 3, false, false>(at, e, p) },
                    }
                    second += some;
                }
            }
        }
        pending.add();
    }

    #[inline(always)]
    fn square(row: &[u16]) -> f64 {
        avx512bf16::Bf16::square(row)
    }

    #[inline(always)]
    fn measure(row: &[u16]) -> (f32, f64) {
        <avx512bf16::Bf16 as Sweep>::measure(row)
    }

    #[inline(always)]
    fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        <avx512bf16::Bf16 as Sweep>::square_of_sum(x, y, factor)
    }

    #[inline(always)]
    fn pack_bf16(row: &[u16], to: &mut [u16]) -> Option<(f32, f64)> {
        <avx512bf16::Bf16 as Sweep>::pack_bf16(row, to)
    }

    #[inline(always)]
    fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
        let (blocks, odd) = blocks_of(num_states);
        for i in 0..blocks {
            let tiles = sums[place_of(i, blocks)..place_of(i + 1, blocks)]
                .as_chunks()
                .0;
            for row in i * SIDE..((i + 1) * SIDE).min(num_states) {
                let start = row * (2 * num_states - row - 1) / 2;
                for (j, tile) in (i..).zip(tiles) {
                    let tile: &[f64; SIDE * SIDE] = tile;
                    let columns = (j * SIDE).max(row + 1)..((j + 1) * SIDE).min(num_states);
                    let sums = &tile[(row - i * SIDE) * SIDE..][..SIDE];
                    for column in columns {
                        products[start + column - row - 1] += sums[column - j * SIDE];
                    }
                }
            }
        }
        if odd {
            let sums = &sums[place_of(blocks, blocks)..];
            for (row, sum) in sums.iter().enumerate() {
                products[row * (2 * num_states - row - 1) / 2 + num_states - row - 2] += sum;
            }
        }
    }
}
