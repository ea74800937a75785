//! The differences between the costs of blocks, over all samples.

use std::ops::AddAssign;

/// Sums, sums of squares and extremes of many differences.
pub(super) struct Differences {
    sums: Vec<i64>,
    squares: Vec<f64>,
    pub least: Vec<i32>,
    pub greatest: Vec<i32>,
}

impl Differences {
    pub fn none(width: usize) -> Self {
        Self {
            sums: vec![0; width],
            squares: vec![0.0; width],
            least: vec![i32::MAX; width],
            greatest: vec![i32::MIN; width],
        }
    }

    pub fn add(&mut self, values: &[i32]) {
        let each = |sum: &mut i64, value: i32| *sum += i64::from(value);
        self.sums
            .iter_mut()
            .zip(values)
            .for_each(|(sum, &value)| each(sum, value));
        for (squares, &value) in self.squares.iter_mut().zip(values) {
            *squares += f64::from(value) * f64::from(value);
        }
        for (least, &value) in self.least.iter_mut().zip(values) {
            *least = value.min(*least);
        }
        for (greatest, &value) in self.greatest.iter_mut().zip(values) {
            *greatest = value.max(*greatest);
        }
    }

    pub fn merge(mut self, other: Self) -> Self {
        self.sums = add(self.sums, other.sums);
        self.squares = add(self.squares, other.squares);
        let least = self.least.iter_mut().zip(other.least);
        least.for_each(|(left, right)| *left = right.min(*left));
        let greatest = self.greatest.iter_mut().zip(other.greatest);
        greatest.for_each(|(left, right)| *left = right.max(*left));
        self
    }

    /// True if no weights with `sum (w - 1)^2 <= spread` bring a sum down to zero: it is at
    /// least `sum x - sqrt(spread · sum (x - mean)^2)` (Cauchy and Schwarz). The margins are
    /// far above the rounding.
    pub fn stays_positive(&self, pair: usize, spread: usize, num_samples: usize) -> bool {
        let sum = self.sums[pair] as f64;
        let deviations = self.squares[pair] * (1.0 + 1e-9) - sum * sum / num_samples as f64;
        sum > 0.0 && sum * sum * (1.0 - 1e-9) > spread as f64 * deviations
    }
}

/// Adds vectors of one length.
pub(super) fn add<T: Copy + AddAssign>(mut left: Vec<T>, right: Vec<T>) -> Vec<T> {
    left.iter_mut().zip(right).for_each(|(l, r)| *l += r);
    left
}
