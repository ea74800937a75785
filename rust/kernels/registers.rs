//! The sweep of register tiles, for any vector unit.

#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::packed::{Chunk, PADDING};
use super::prefetch::Prefetch;
use super::sweep::Sweep;
use super::tiles;
use super::unit::{self, Unit};

/// A [`Sweep`] whose sums are tiles in the registers of a unit.
pub(crate) struct Registers<U>(PhantomData<U>);

// Every call of a unit below rests on this: a sweep is reached through its tier's `run` alone,
// in a function that has the unit's instructions, on a processor that has them.
impl<U: Unit> Sweep for Registers<U> {
    type Packed = U::Packed;

    type Engine = ();

    const CHUNK: usize = 512;

    const WHOLE: usize = 768;

    const AHEAD: usize = 80 << 10;

    const LEAST_AHEAD: usize = 2;

    const SPAN: usize = U::SPAN;

    const SPREAD: f64 = U::SPREAD;

    fn engine(_width: usize) {}

    fn num_sums(num_states: usize) -> usize {
        tiles::num_sums::<U>(num_states)
    }

    #[inline(always)]
    fn add(
        chunk: &Chunk<U::Packed>,
        fresh: bool,
        sums: &mut [f64],
        prefetch: &mut Prefetch,
        (): &mut (),
    ) {
        // SAFETY: the tier's `run` has the unit's instructions.
        unsafe { tiles::add::<U>(chunk, fresh, sums, prefetch) }
    }

    #[inline(always)]
    fn square(row: &[U::Packed]) -> f64 {
        // SAFETY: the tier's `run` has the unit's instructions.
        unsafe { unit::square::<U>(row) }
    }

    #[inline(always)]
    fn measure(row: &[U::Packed]) -> (f32, f64) {
        // SAFETY: the tier's `run` has the unit's instructions.
        unsafe { U::measure(row) }
    }

    #[inline(always)]
    fn square_of_sum(x: &[u16], y: &[u16], factor: f32) -> Option<f64> {
        assert!(x.len() == y.len());
        // SAFETY: the tier's `run` has the unit's instructions; the rows are of one length.
        unsafe { U::square_of_sum(x, y, factor) }
    }

    #[inline(always)]
    fn pack_bf16(row: &[u16], to: &mut [U::Packed]) -> Option<(f32, f64)> {
        assert!(row.len() <= to.len() && to.len().is_multiple_of(PADDING));
        // SAFETY: the tier's `run` has the unit's instructions; the row fits, padded.
        unsafe { U::pack_bf16(row, to) }
    }

    #[inline(always)]
    fn collect(num_states: usize, sums: &[f64], products: &mut [f64]) {
        // SAFETY: the tier's `run` has the unit's instructions.
        unsafe { tiles::collect::<U>(num_states, sums, products) }
    }
}
