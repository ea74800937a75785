//! The products of blocks over a span of columns, and how they get to the sums.

#![allow(unsafe_code)]

use std::mem::MaybeUninit;

use super::engine::{Multiply, SIDE, Sums};
use super::filling::Layout;

/// Blocks of rows, and whether a row is left over from them.
#[inline(always)]
pub(super) fn blocks_of(num_states: usize) -> (usize, bool) {
    match (num_states / SIDE, num_states % SIDE) {
        (blocks, 0) => (blocks, false),
        (blocks @ 1.., 1) => (blocks, true),
        (blocks, _) => (blocks + 1, false),
    }
}

/// The place of the first sum of a block of rows with the blocks from it on.
#[inline(always)]
pub(super) fn place_of(first: usize, blocks: usize) -> usize {
    first * (2 * blocks - first + 1) / 2 * SIDE * SIDE
}

/// Adds float32 products to as many sums.
#[inline(always)]
pub(super) fn add_to(sums: &mut [f64], products: &[f32]) {
    let products = &products[..sums.len()];
    for place in 0..sums.len() {
        sums[place] += f64::from(products[place]);
    }
}

/// Some steps of a chunk, whose products are summed in float32.
pub(super) struct Span<'a> {
    pub layout: &'a Layout,
    pub steps: std::ops::Range<usize>,
}

impl Span<'_> {
    /// Multiplies block `first` with `N` blocks from `second` on, with `ROW` also the odd row
    /// with them, and with `OWN` with `first`, which is right before them; meanwhile the
    /// products before are added to the sums.
    ///
    /// # Safety
    ///
    /// AVX-512; the engine can be used. The blocks are there, and so is the odd row.
    #[inline(always)]
    pub unsafe fn multiply<E: Multiply, const N: usize, const ROW: bool, const OWN: bool>(
        &self,
        [first, second]: [usize; 2],
        engine: &mut E,
        pending: &mut Pending<'_>,
    ) {
        let Self { layout, ref steps } = *self;
        engine.clear();
        for step in steps.clone() {
            // SAFETY: the caller's.
            unsafe {
                engine.multiply::<N, ROW, OWN>(
                    layout.rows_of(step, first),
                    layout.transposed(step, first),
                    layout.odd_row(step),
                    layout.transposed(step, second),
                );
            }
        }
        let place = place_of(first, layout.blocks) + (second - first) * SIDE * SIDE;
        let (of_row, rows) = match (ROW, OWN) {
            (false, _) => (0, 0),
            (true, false) => (second, N),
            (true, true) => (first, N + 1),
        };
        let of_row = place_of(layout.blocks, layout.blocks) + of_row * SIDE;
        pending.next::<E, N, ROW>(engine, [place, N * SIDE * SIDE, of_row, rows * SIDE]);
    }
}

/// Products that were just stored would be waited for: they are added when the next are.
pub(super) struct Pending<'a> {
    products: [MaybeUninit<Sums>; 2],
    /// Place and number of the blocks' products, and of the row's.
    places: Option<[usize; 4]>,
    latest: usize,
    sums: &'a mut [f64],
}

impl<'a> Pending<'a> {
    pub fn new(sums: &'a mut [f64]) -> Self {
        Self {
            products: [MaybeUninit::uninit(); 2],
            places: None,
            latest: 0,
            sums,
        }
    }

    #[inline(always)]
    fn next<E: Multiply, const N: usize, const ROW: bool>(
        &mut self,
        engine: &mut E,
        places: [usize; 4],
    ) {
        engine.store::<N, ROW>(&mut self.products[1 - self.latest]);
        self.add();
        self.latest = 1 - self.latest;
        self.places = Some(places);
    }

    #[inline(always)]
    pub fn add(&mut self) {
        let Some([place, length, of_row, row]) = self.places.take() else {
            return;
        };
        let products = self.products[self.latest].as_ptr();
        // SAFETY: of these products as many have been stored as there are places for.
        unsafe {
            let blocks = std::slice::from_raw_parts((&raw const (*products).blocks).cast(), length);
            add_to(&mut self.sums[place..][..length], blocks);
            let rows = std::slice::from_raw_parts((&raw const (*products).rows).cast(), row);
            add_to(&mut self.sums[of_row..][..row], rows);
        }
    }
}
