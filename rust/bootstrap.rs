//! The certainty of `l*(n)`: samples are drawn again with replacement, many times, and every time
//! the best start is found again (Efron, Annals of Statistics 7, 1979).
//!
//! The answer is exact. Values become integers once; a resample gives every sample a weight
//! `w`, how often it was drawn, and the best start has the least `sum w·v`. For speed, starts
//! that no such weights can make the best are left out at once, the sums of the others are
//! bounded from 16 bits of every value, and only those whose bounds overlap are found in full.
//!
//! Samples are put in the order of their values first, so that it does not matter in which
//! order, or in how many shards, they came.

mod differences;
mod rivals;
mod samples;
mod weights;

use std::ops::Range;

use rayon::prelude::*;

use self::differences::add;
use self::rivals::Rivals;
use self::samples::Samples;
use self::weights::Weights;
use crate::error::Error;
use crate::kernels::Tier;
use crate::kernels::dots::Dots;

/// Resamples whose sums are found together.
const RESAMPLES: usize = 64;

/// Counts how often each start was the best, for every block size `n = 1 .. L-1`.
///
/// `values` holds the `L(L + 1)/2` pairs `(l, m)`, `l < m`, row by row, of every sample: what the
/// block between them costs, or, with `more_is_better`, how good it is to drop it. The same seed
/// gives the same answer on every machine, for any number of threads and any order of the samples.
/// Of equal starts the smallest is the best.
pub fn bootstrap(
    values: &[f32],
    num_states: usize,
    more_is_better: bool,
    num_resamples: usize,
    seed: u64,
) -> Result<Vec<Vec<u64>>, Error> {
    let samples = Samples::new(values, num_states, more_is_better)?;
    let rivals = Rivals::new(&samples, Dots::of(Tier::chosen()?));
    let wins = (0..num_resamples.div_ceil(RESAMPLES))
        .into_par_iter()
        .map(|part| {
            let first = part * RESAMPLES;
            let resamples = first..num_resamples.min(first + RESAMPLES);
            rivals.wins(&Weights::draw(samples.order.len(), seed, resamples))
        })
        .reduce(|| vec![0; samples.pairs.len()], add);
    let of_size = |row: &Range<usize>| wins[row.clone()].to_vec();
    Ok(samples.rows.iter().map(of_size).collect())
}
