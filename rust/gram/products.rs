//! The products of all pairs of states, summed chunk by chunk of their columns.

use std::ops::RangeInclusive;

use super::massive::{MASSIVE_AMONG, Rows, Unfit, is_massive, take_massive};
use crate::kernels::{Chunks, Packed, Prefetch, Sweep};
use crate::states::{Element, States};

/// Rows with a greatest magnitude outside this range are not multiplied in float32, where a
/// product of theirs could overflow or be lost as denormal.
const MAGNITUDES: RangeInclusive<f32> = 1e-9..=1e15;

/// The products of one sample, and room to make them.
#[derive(Debug)]
pub(super) struct Products {
    num_states: usize,
    /// `x·y` of the pairs `(l, m)`, `l < m`, row by row.
    pub products: Vec<f64>,
    /// The squared norms, but for massive columns, and the massive columns' part.
    pub squares: Vec<f64>,
    pub massive: Vec<f64>,
    scratch: Scratch,
}

#[derive(Debug, Default)]
struct Scratch {
    chunks: Chunks,
    sums: Vec<f64>,
    largest: Vec<f32>,
    magnitudes: Vec<f32>,
    prefetch: Prefetch,
    column: Vec<f64>,
    chunk_squares: Vec<f64>,
    /// The weight of the chunks before against the massive columns of the next.
    earlier: Vec<f64>,
}

/// A width cut evenly into parts of at most `most`: a short one has massive columns by chance.
pub(super) fn even_part(width: usize, most: usize) -> usize {
    width.div_ceil(width.div_ceil(most))
}

impl Products {
    pub fn new(num_states: usize) -> Self {
        Self {
            num_states,
            products: vec![0.0; num_states * (num_states - 1) / 2],
            squares: vec![0.0; num_states],
            massive: vec![0.0; num_states],
            scratch: Scratch::default(),
        }
    }

    /// Sums the products of all pairs of states; whether some were summed in less than float64.
    #[inline(always)]
    pub fn multiply<S: Sweep, T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<bool, Unfit> {
        let Self {
            num_states,
            products,
            squares,
            massive,
            scratch,
        } = self;
        let Scratch {
            chunks,
            sums,
            largest,
            magnitudes,
            prefetch,
            column,
            chunk_squares,
            earlier,
        } = scratch;
        let num_states = *num_states;
        let columns = if states.width() <= S::WHOLE {
            states.width()
        } else {
            even_part(states.width(), S::CHUNK)
        };
        let chunk = S::Packed::chunk(chunks, num_states, columns);
        products.fill(0.0);
        squares.fill(0.0);
        massive.fill(0.0);
        sums.resize(S::num_sums(num_states), 0.0);
        magnitudes.resize(num_states, 0.0);
        largest.clear();
        largest.resize(num_states, 0.0);
        column.resize(num_states, 0.0);
        chunk_squares.resize(num_states, 0.0);
        earlier.clear();
        earlier.resize(num_states, 0.0);
        let remembered = 1.0 - (columns as f64 / MASSIVE_AMONG as f64).min(1.0);
        let mut engine = S::engine(states.width());
        let chunks = states.width().div_ceil(columns);
        // While a chunk is multiplied, one that follows is fetched.
        let ahead = S::AHEAD / (num_states * columns * size_of::<T>());
        let ahead = ahead.max(S::LEAST_AHEAD).min(chunks);
        for (number, start) in (0..states.width()).step_by(columns).enumerate() {
            let length = columns.min(states.width() - start);
            let (next_sample, next) = if number + ahead < chunks {
                (sample, number + ahead)
            } else {
                let next_sample = (sample + 1).min(states.num_samples() - 1);
                (next_sample, number + ahead - chunks)
            };
            let rows = (0..num_states).map(|state| {
                let row = &states.row(next_sample, state)[next * columns..];
                row.as_ptr().addr()
            });
            prefetch.begin(rows, length * size_of::<T>(), chunks > 1);
            chunk.resize(length);
            let row = |state| &states.row(sample, state)[start..][..length];
            S::pack(chunk, row, magnitudes, chunk_squares, prefetch, &mut engine);
            let mut outweighed = false;
            let weights = chunk_squares.iter().zip(earlier.iter());
            for ((largest, &magnitude), (square, earlier)) in
                largest.iter_mut().zip(magnitudes.iter()).zip(weights)
            {
                let greater = magnitude > *largest || magnitude.is_nan();
                *largest = if greater { magnitude } else { *largest };
                outweighed |= is_massive(f64::from(magnitude), square + earlier);
            }
            if S::Packed::NARROW && outweighed {
                let rows = Rows {
                    magnitudes,
                    squares: chunk_squares,
                    earlier,
                    column,
                };
                S::copy(chunk, row, &mut engine);
                take_massive::<S>(chunk, rows, products, massive)?;
            }
            for ((square, earlier), of_chunk) in squares
                .iter_mut()
                .zip(earlier.iter_mut())
                .zip(chunk_squares.iter())
            {
                *square += of_chunk;
                *earlier = remembered * (*earlier + of_chunk);
            }
            S::add(chunk, start == 0, sums, prefetch, &mut engine);
        }
        let fits = |magnitude| MAGNITUDES.contains(magnitude);
        if S::Packed::NARROW && !largest.iter().all(fits) {
            return Err(Unfit);
        }
        S::collect(num_states, sums, products);
        Ok(S::Packed::NARROW)
    }
}
