//! The samples, their values as integer costs.

use std::cmp::Ordering;
use std::ops::Range;

use rayon::prelude::*;

use super::differences::{Differences, add};
use crate::error::Error;
use crate::states::check_num_states;

/// Bits of the greatest magnitude among the values, so that differences fit 32.
const BITS: u64 = 29;

/// The values of all blocks `(start, stop)`; a block is named by its place among the sizes
/// `n = 1 .. L-1` and, within a size, the starts.
pub(super) struct Samples<'a> {
    values: &'a [f32],
    pub width: usize,
    /// The factor that turns a value into an integer cost.
    scale: f64,
    /// The samples in the order of their values.
    pub order: Vec<usize>,
    /// The place of each block among the values of a sample.
    pub pairs: Vec<usize>,
    /// The blocks of each size.
    pub rows: Vec<Range<usize>>,
}

impl<'a> Samples<'a> {
    pub fn new(values: &'a [f32], num_states: usize, more_is_better: bool) -> Result<Self, Error> {
        check_num_states(num_states)?;
        let width = num_states * (num_states - 1) / 2;
        if values.is_empty() || !values.len().is_multiple_of(width) {
            return Err(Error::SampleValues("their number does not fit the pairs"));
        }
        let (mut pairs, mut rows) = (Vec::new(), Vec::new());
        for size in 1..num_states - 1 {
            let starts = 0..num_states - size;
            rows.push(pairs.len()..pairs.len() + starts.len());
            pairs.extend(starts.map(|l| l * (2 * num_states - l - 1) / 2 + size - 1));
        }
        let row = |sample: usize| &values[sample * width..][..width];
        let by_value = |&left: &usize, &right: &usize| row(left).partial_cmp(row(right));
        let mut order: Vec<usize> = (0..values.len() / width).collect();
        order.par_sort_by(|left, right| by_value(left, right).unwrap_or(Ordering::Equal));
        let sign = if more_is_better { -1.0 } else { 1.0 };
        Ok(Self {
            values,
            width,
            scale: sign * scale(values)?,
            order,
            pairs,
            rows,
        })
    }

    fn row(&self, sample: usize) -> &[f32] {
        &self.values[sample * self.width..][..self.width]
    }

    /// The integer costs of a sample's pairs.
    pub fn costs(&self, sample: usize) -> Vec<i32> {
        let row = self.row(sample).iter();
        row.map(|&value| cost(value, self.scale)).collect()
    }

    /// For every block one of its size that is best over all samples, or nearly.
    pub fn references(&self) -> Vec<usize> {
        let sums = (self.order.par_iter())
            .fold(
                || vec![0.0; self.width],
                |mut sums, &sample| {
                    let row = self.row(sample).iter();
                    sums.iter_mut()
                        .zip(row)
                        .for_each(|(sum, &value)| *sum += f64::from(value));
                    sums
                },
            )
            .reduce(|| vec![0.0; self.width], add);
        let cost = |&block: &usize| sums[self.pairs[block]] * self.scale;
        let nearer = |&left: &usize, &right: &usize| cost(&left).total_cmp(&cost(&right));
        let best = |row: &Range<usize>| row.clone().min_by(nearer).unwrap_or(row.start);
        self.rows
            .iter()
            .flat_map(|row| vec![best(row); row.len()])
            .collect()
    }

    /// The differences between the pairs of all blocks and those of their references, by pair.
    pub fn differences(&self, references: &[usize]) -> Differences {
        let mut less: Vec<usize> = (0..self.width).collect();
        for (&pair, &reference) in self.pairs.iter().zip(references) {
            less[pair] = self.pairs[reference];
        }
        let none = || Differences::none(self.width);
        let add_sample = |mut differences: Differences, &sample: &usize| {
            let costs = self.costs(sample);
            let difference = |(cost, &less): (&i32, &usize)| cost - costs[less];
            let all: Vec<i32> = costs.iter().zip(&less).map(difference).collect();
            differences.add(&all);
            differences
        };
        let parts = self.order.par_iter().fold(none, add_sample);
        parts.reduce(none, Differences::merge)
    }

    /// The best block of every size, by the samples' weights.
    pub fn best_blocks(&self, weight: impl Fn(usize) -> i16) -> impl Iterator<Item = usize> {
        let mut sums = vec![0; self.width];
        for (place, &sample) in self.order.iter().enumerate() {
            let weight = i64::from(weight(place));
            for (sum, cost) in sums.iter_mut().zip(self.costs(sample)) {
                *sum += weight * i64::from(cost);
            }
        }
        let rows = self.rows.iter();
        rows.map(move |row| best(row.clone(), |block| sums[self.pairs[block]]))
    }
}

/// The power of two that brings the greatest magnitude below `2^BITS`.
fn scale(values: &[f32]) -> Result<f64, Error> {
    let magnitudes = values.par_iter().map(|value| value.abs().to_bits());
    let greatest = magnitudes.max().unwrap_or(0);
    if !f32::from_bits(greatest).is_finite() {
        return Err(Error::SampleValues("one is NaN or infinite"));
    }
    let exponent = u64::from(greatest >> 23);
    Ok(f64::from_bits((BITS + 126 + 1023 - exponent) << 52))
}

/// The nearest integer to `value · scale`, ties to even: adding `1.5 · 2^52` leaves it in the
/// last bits of the mantissa.
fn cost(value: f32, scale: f64) -> i32 {
    (f64::from(value) * scale + 6_755_399_441_055_744.0).to_bits() as i32
}

/// The one of least cost, the first of equals.
fn best(of: impl Iterator<Item = usize>, cost: impl Fn(usize) -> i64) -> usize {
    of.min_by_key(|&one| cost(one)).unwrap_or(0)
}
