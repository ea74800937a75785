//! Samples that belong together: the tokens of one sequence, whose sums count as one draw.
//!
//! The mean over all samples is the ratio `m = sum s_i / sum n_i` over the sequences `i`, `s_i`
//! being the sum of the `n_i` samples of one. Its variance needs `sum s_i^2`, `sum s_i n_i` and
//! `sum n_i^2`, which are integers here. A sequence of one sample counts as that sample, so a
//! comparison of last tokens costs nothing more, and has the same bits.

use crate::exact::{ExactSum, SCALE, UNIT};
use crate::limits::MAX_SEQUENCE;
use crate::wide::Wide;

/// The number of sequences, and of the samples of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths {
    /// Sequences of one sample.
    pub alone: u64,
    /// Sequences of several.
    pub several: u64,
    /// Samples of the sequences of several.
    pub samples: u64,
    /// The sum of the squares of their lengths, at most 2^51.
    pub squares: u64,
}

impl Lengths {
    /// Sequences of any length.
    pub fn sequences(self) -> u64 {
        self.alone + self.several
    }

    /// Samples of all sequences.
    pub fn all_samples(self) -> u64 {
        self.alone + self.samples
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.alone += other.alone;
        self.several += other.several;
        self.samples += other.samples;
        self.squares += other.squares;
    }

    pub(crate) fn subtract(&mut self, other: Self) {
        self.alone -= other.alone;
        self.several -= other.several;
        self.samples -= other.samples;
        self.squares -= other.squares;
    }

    /// Of one sequence.
    pub(crate) fn of(samples: u64) -> Self {
        match samples {
            0 => Self::default(),
            1 => Self {
                alone: 1,
                ..Self::default()
            },
            _ => Self {
                alone: 0,
                several: 1,
                samples,
                squares: samples * samples,
            },
        }
    }

    /// True if sequences can have these lengths, as long as there are at most 2^31 samples.
    pub(crate) fn are_possible(self) -> bool {
        let [several, samples, squares] =
            [self.several, self.samples, self.squares].map(u128::from);
        let longest = u128::from(MAX_SEQUENCE);
        (2 * several..=longest * several).contains(&samples)
            && (2 * samples..=longest * samples).contains(&squares)
            && samples * samples <= several * squares
    }
}

/// The sums of one pair of states over sequences of several samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SequenceSum {
    sum: i128,
    /// Of `s_i²`, at most 2^147.
    squares: Wide,
    /// Of `s_i n_i`, at most 2^99.
    weighted: i128,
}

impl SequenceSum {
    /// Words that a stored sum takes.
    pub const WORDS: usize = 8;

    /// Adds a sequence of `samples` with the sum `units`.
    pub fn add(&mut self, units: i128, samples: u64) {
        self.sum += units;
        self.squares = self.squares.plus(square(units));
        self.weighted += units * i128::from(samples);
    }

    /// Takes out a sequence that was added.
    pub fn subtract(&mut self, units: i128, samples: u64) {
        self.sum -= units;
        self.squares = self.squares.minus(square(units)).unwrap_or_default();
        self.weighted -= units * i128::from(samples);
    }

    pub fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.squares = self.squares.plus(other.squares);
        self.weighted += other.weighted;
    }

    pub fn units(&self) -> i128 {
        self.sum
    }

    pub fn to_words(self) -> [u64; Self::WORDS] {
        let [a, b] = words(self.sum);
        let [c, d, e, f] = self.squares.to_words();
        let [g, h] = words(self.weighted);
        [a, b, c, d, e, f, g, h]
    }

    /// The inverse of `to_words`; refuses what no sequences of these lengths give.
    pub fn from_words(words: [u64; Self::WORDS], lengths: Lengths) -> Result<Self, &'static str> {
        let [a, b, c, d, e, f, g, h] = words;
        let this = Self {
            sum: number([a, b]),
            squares: Wide::from_words([c, d, e, f]),
            weighted: number([g, h]),
        };
        let [sum, weighted] = [this.sum, this.weighted].map(i128::unsigned_abs);
        if sum > u128::from(lengths.samples) * UNIT
            || weighted > u128::from(lengths.squares) * UNIT
            || this.squares > Wide::product(UNIT * UNIT, u128::from(lengths.squares))
        {
            return Err("a sum of sequences exceeds their lengths");
        }
        // Cauchy-Schwarz, twice.
        if square(this.sum) > this.squares.times(lengths.several)
            || square(this.weighted) > this.squares.times(lengths.squares)
        {
            return Err("a sum of squares of sequences is less than their sums allow");
        }
        Ok(this)
    }
}

/// The variance between sequences of `s_i / n̄` around what its length predicts, `m n_i / n̄`,
/// with the mean length `n̄` and divisor `G - 1`; NaN for fewer than two sequences.
///
/// `N² sum (s_i - m n_i)² = N² sum s_i² - 2 N S sum s_i n_i + S² sum n_i²` is exact, so that no
/// digit cancels.
pub(crate) fn variance(alone: &ExactSum, several: &SequenceSum, lengths: Lengths) -> f64 {
    let sequences = lengths.sequences();
    if sequences < 2 {
        return f64::NAN;
    }
    let samples = lengths.all_samples();
    let sum = alone.units() + several.sum;
    let weighted = alone.units() + several.weighted;
    let squares = several.squares.plus(Wide::from(alone.squares()));
    let of_lengths = lengths.alone + lengths.squares;
    let mut more = squares
        .times(samples)
        .times(samples)
        .plus(square(sum).times(of_lengths));
    let mut less = Wide::product(sum.unsigned_abs(), weighted.unsigned_abs()).times(2 * samples);
    if (sum < 0) != (weighted < 0) {
        more = more.plus(less);
        less = Wide::default();
    }
    let deviations = more.minus(less).unwrap_or_default().nearest();
    let (sequences, samples) = (sequences as f64, samples as f64);
    let mean_length = samples / sequences;
    deviations
        / (samples * samples)
        / (mean_length * mean_length)
        / (sequences - 1.0)
        / (SCALE * SCALE)
}

fn square(value: i128) -> Wide {
    Wide::product(value.unsigned_abs(), value.unsigned_abs())
}

fn words(value: i128) -> [u64; 2] {
    let bits = value.cast_unsigned();
    [bits as u64, (bits >> 64) as u64]
}

fn number([low, high]: [u64; 2]) -> i128 {
    (u128::from(low) | u128::from(high) << 64).cast_signed()
}

/// One sequence: the sums of every pair over its samples so far, for each metric.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub number: i64,
    pub samples: u64,
    pub sums: Vec<Vec<i128>>,
}

impl Sequence {
    pub fn new(number: i64, metrics: usize, pairs: usize) -> Self {
        Self {
            number,
            samples: 0,
            sums: vec![vec![0; pairs]; metrics],
        }
    }

    /// Adds the samples of another part of the sequence.
    pub fn join(&mut self, other: &Self) {
        self.samples += other.samples;
        for (sums, others) in self.sums.iter_mut().zip(&other.sums) {
            for (sum, addend) in sums.iter_mut().zip(others) {
                *sum += addend;
            }
        }
    }
}
