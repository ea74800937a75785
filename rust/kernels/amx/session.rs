//! An engine with the tiles that it makes of a chunk.

#![allow(unsafe_code, clippy::wildcard_imports)]

use std::arch::x86_64::*;
use std::cell::Cell;

use super::engine::{COLUMNS, Line, Multiply, SIDE, Tile};
use super::filling::{Layout, greater_ones};
use super::span::blocks_of;

/// An engine, and what it makes of a chunk.
pub(crate) struct Session<E> {
    pub(super) engine: E,
    /// The most steps of a span: fewer in short rows, where few errors average out.
    pub(super) most: usize,
    /// True if norms are summed apart, as in longer rows they need not be.
    pub(super) is_short: bool,
    /// The length of the rows.
    pub(super) length: usize,
    /// True if the rows are others than when the tiles were filled.
    pub(super) stale: bool,
    pub(super) buffers: Buffers,
}

/// Buffers that a thread keeps from one session to the next.
#[derive(Default)]
pub(super) struct Buffers {
    tiles: Vec<Line>,
    /// The rows that the tiles are of; rows of zeros make the last block full.
    pub(super) rows: Vec<*const u16>,
    /// The addresses of the rows to be prefetched.
    pub(super) prefetch: Vec<usize>,
    pub(super) magnitudes: Vec<f32>,
    /// The products of each block with itself over each span.
    pub(super) diagonals: Vec<Tile>,
}

thread_local! {
    static BUFFERS: Cell<Buffers> = Cell::default();
}

impl<E> Drop for Session<E> {
    fn drop(&mut self) {
        BUFFERS.set(std::mem::take(&mut self.buffers));
    }
}

impl<E: Multiply> Session<E> {
    /// A session for rows of a width, with spans of at most so many steps.
    ///
    /// # Safety
    ///
    /// The engine can be used, and there is no other one in the thread.
    #[inline(always)]
    pub(super) unsafe fn new(width: usize, most: usize) -> Self {
        Self {
            // SAFETY: the caller's.
            engine: unsafe { E::new() },
            is_short: width <= 512,
            most,
            length: 0,
            stale: true,
            buffers: BUFFERS.take(),
        }
    }

    /// The places of the tiles of so many rows.
    #[inline(always)]
    pub(super) fn layout(&mut self, num_states: usize) -> Layout {
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
    pub(super) fn fill(&mut self, num_states: usize) {
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
            // SAFETY: a sweep is reached through its tier's `run` alone, which has the
            // instructions. The tiles have room, and the rows are `length` long.
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
                // SAFETY: as above; there is one odd row.
                unsafe { layout.fill_odd_row(step, row, self.length, prefetch) };
            }
        }
        self.stale = false;
    }
}
