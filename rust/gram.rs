//! The Gram matrix of one sample's states, in float64.
//!
//! Products of float32 are exact in float64, so the only error is that of the
//! sum: with eight lanes and the widths of today's models, below 1e-13 of
//! `|x| |y|` at worst. That keeps angular distances down to 1e-6 within 1e-8.

use crate::error::Reason;
use crate::states::{Element, States};

/// Values widened at a time; all rows of a chunk stay in the second-level cache.
const CHUNK: usize = 512;
const LANES: usize = 8;

/// Squared norms outside this range could leave float64 when two are multiplied.
const SQUARED_NORMS: std::ops::RangeInclusive<f64> = 1e-150..=1e150;

/// A reusable Gram matrix: the upper triangle, row by row, diagonal included.
#[derive(Debug)]
pub struct Gram {
    num_states: usize,
    products: Vec<f64>,
    widened: Vec<f64>,
}

impl Gram {
    /// Room for samples of `num_states` states.
    pub fn new(num_states: usize) -> Self {
        Self {
            num_states,
            products: vec![0.0; num_states * (num_states + 1) / 2],
            widened: vec![0.0; num_states * CHUNK],
        }
    }

    /// Computes the products of one sample and names its first unusable state, if any.
    pub fn compute<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        debug_assert_eq!(states.num_states(), self.num_states);
        self.products.fill(0.0);
        for start in (0..states.width()).step_by(CHUNK) {
            let length = CHUNK.min(states.width() - start);
            for state in 0..self.num_states {
                let row = &states.row(sample, state)[start..start + length];
                let wide = &mut self.widened[state * CHUNK..][..length];
                for (to, from) in wide.iter_mut().zip(row) {
                    *to = from.widen();
                }
            }
            self.add_chunk(length);
        }
        (0..self.num_states).try_for_each(|state| match self.squared_norm(state) {
            norm if SQUARED_NORMS.contains(&norm) => Ok(()),
            norm => Err((state, reason(states.row(sample, state), norm))),
        })
    }

    /// The cosine of two states, in `[-1, 1]`; exactly 1 for equal states.
    pub fn cosine(&self, first: usize, second: usize) -> f64 {
        let squares = self.squared_norm(first) * self.squared_norm(second);
        (self.products[self.index(first, second)] / squares.sqrt()).clamp(-1.0, 1.0)
    }

    fn squared_norm(&self, state: usize) -> f64 {
        self.products[self.index(state, state)]
    }

    fn index(&self, first: usize, second: usize) -> usize {
        let (row, column) = (first.min(second), first.max(second));
        row * (2 * self.num_states - row + 1) / 2 + column - row
    }

    fn add_chunk(&mut self, length: usize) {
        let rows: Vec<&[f64]> = (self.widened.chunks_exact(CHUNK))
            .map(|row| &row[..length])
            .collect();
        let mut products = self.products.iter_mut();
        for first in 0..rows.len() {
            for second in first..rows.len() {
                if let Some(product) = products.next() {
                    *product += dot(rows[first], rows[second]);
                }
            }
        }
    }
}

fn reason<T: Element>(row: &[T], squared_norm: f64) -> Reason {
    if row.iter().any(|value| !value.widen().is_finite()) {
        Reason::NotFinite
    } else if squared_norm == 0.0 && row.iter().all(|value| value.widen() == 0.0) {
        Reason::Zero
    } else {
        Reason::NormOutOfRange
    }
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (left_whole, left_rest) = left.as_chunks::<LANES>();
    let (right_whole, right_rest) = right.as_chunks::<LANES>();
    for (x, y) in left_whole.iter().zip(right_whole) {
        for lane in 0..LANES {
            lanes[lane] += x[lane] * y[lane];
        }
    }
    let rest: f64 = left_rest.iter().zip(right_rest).map(|(x, y)| x * y).sum();
    lanes.iter().sum::<f64>() + rest
}
