//! The sweep of tiles.

#![allow(unsafe_code)]

use super::engine::{BLOCKS, COLUMNS, Multiply, SIDE};
use super::filling::CHUNK;
use super::session::Session;
use super::span::{Pending, Span, add_to, blocks_of, place_of};
use crate::kernels::avx512bf16::{self, Bf16};
use crate::kernels::packed::Chunk;
use crate::kernels::prefetch::Prefetch;
use crate::kernels::registers::Registers;
use crate::kernels::sweep::Sweep;
use crate::states::Element;

/// Steps of 32 columns whose products are summed in float32.
const SPAN: usize = 4;

/// Sums in tiles of blocks of 16 rows, those of padding included; a row that is left over
/// from blocks is multiplied alone.
pub(crate) struct Tiles<E>(std::marker::PhantomData<E>);

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
        // SAFETY: a sweep is reached through its tier's `run` alone, one at a time.
        unsafe { Session::new(width, Self::span(width) / COLUMNS) }
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
            for first in 0..blocks {
                // SAFETY: a sweep is reached through its tier's `run` alone, and the tiles have
                // been filled.
                unsafe { multiply_with_later(&s, first, odd, engine, &mut pending) };
            }
        }
        pending.add();
    }

    #[inline(always)]
    fn square(row: &[u16]) -> f64 {
        Registers::<Bf16>::square(row)
    }

    #[inline(always)]
    fn measure(row: &[u16]) -> (f32, f64) {
        Registers::<Bf16>::measure(row)
    }

    #[inline(always)]
    fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        Registers::<Bf16>::square_of_sum(x, y, factor)
    }

    #[inline(always)]
    fn pack_bf16(row: &[u16], to: &mut [u16]) -> Option<(f32, f64)> {
        Registers::<Bf16>::pack_bf16(row, to)
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

/// Multiplies a block with those after it; the first one also with the odd row.
///
/// # Safety
///
/// As for [`Span::multiply`]; the block is there.
#[inline(always)]
unsafe fn multiply_with_later<E: Multiply>(
    s: &Span<'_>,
    first: usize,
    odd: bool,
    e: &mut E,
    p: &mut Pending<'_>,
) {
    let blocks = s.layout.blocks;
    let row = first == 0 && odd;
    let mut second = first + 1;
    // SAFETY: the caller's; the blocks from `second` on are there, and so is the odd row.
    unsafe {
        if row && blocks == 1 {
            s.multiply::<E, 0, true, true>([0, 1], e, p);
        } else if row {
            s.multiply::<E, 1, true, true>([0, 1], e, p);
            second += 1;
        }
        while second < blocks {
            let at = [first, second];
            // With the odd row there is room for the sums of two blocks at a time.
            let most = if row { 2 } else { BLOCKS };
            let some = most.min(blocks - second);
            match (some, row) {
                (1, true) => s.multiply::<E, 1, true, false>(at, e, p),
                (_, true) => s.multiply::<E, 2, true, false>(at, e, p),
                (1, _) => s.multiply::<E, 1, false, false>(at, e, p),
                (2, _) => s.multiply::<E, 2, false, false>(at, e, p),
                _ => s.multiply::<E, 3, false, false>(at, e, p),
            }
            second += some;
        }
    }
}
