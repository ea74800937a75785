//! Sums that do not depend on their order.
//!
//! A value in `[-1, 1]` is rounded once, to a multiple of 2^-48 (error at most
//! 1.8e-15), and from there on everything is integer arithmetic: addition is
//! associative to the bit, whatever the threads, chunks and shards.

/// Bits behind the binary point.
pub(crate) const SCALE: f64 = (1_u64 << 48) as f64;

/// The greatest magnitude of one rounded value.
pub(crate) const UNIT: u128 = 1 << 48;

/// Added to a number of magnitude at most 2^51, this leaves its nearest integer, ties to
/// even, in the low bits of the mantissa.
const ROUNDING: f64 = 6_755_399_441_055_744.0;

/// A value in `[-1, 1]` in units of 2^-48, rounded to the nearest, ties to even.
#[inline(always)]
fn rounded(value: f64) -> i64 {
    let shifted = value * SCALE + ROUNDING;
    shifted
        .to_bits()
        .wrapping_sub(ROUNDING.to_bits())
        .cast_signed()
}

/// The exact sum of rounded values and of their squares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExactSum {
    sum: i128,
    squares: u128,
}

impl ExactSum {
    /// Adds a value in `[-1, 1]`.
    pub fn add(&mut self, value: f64) {
        debug_assert!((-1.0..=1.0).contains(&value));
        let rounded = rounded(value);
        let magnitude = u128::from(rounded.unsigned_abs());
        self.sum += i128::from(rounded);
        self.squares += magnitude * magnitude;
    }

    /// Adds a value in units of 2^-48.
    pub(crate) fn add_units(&mut self, units: i128) {
        self.sum += units;
        self.squares += units.unsigned_abs() * units.unsigned_abs();
    }

    /// Takes out a value that was added.
    pub(crate) fn subtract_units(&mut self, units: i128) {
        self.sum -= units;
        self.squares -= units.unsigned_abs() * units.unsigned_abs();
    }

    pub(crate) fn squares(&self) -> u128 {
        self.squares
    }

    /// Adds the other sum's values.
    pub fn merge(&mut self, other: &Self) {
        self.sum += other.sum;
        self.squares += other.squares;
    }

    /// The sum in units of 2^-48, for comparisons without rounding.
    pub fn units(&self) -> i128 {
        self.sum
    }

    /// The mean of `count` values.
    pub fn mean(&self, count: u64) -> f64 {
        self.sum as f64 / count as f64 / SCALE
    }

    /// The sample variance of `count` values (divisor `count - 1`); NaN for fewer than two.
    ///
    /// Exact in integers but for the last division: with `|sum| = m·count + r`,
    /// `sum² / count = m²·count + 2·m·r + r² / count`.
    pub fn variance(&self, count: u64) -> f64 {
        if count < 2 {
            return f64::NAN;
        }
        let n = u128::from(count);
        let (m, r) = (self.sum.unsigned_abs() / n, self.sum.unsigned_abs() % n);
        let whole = (self.squares - m * m * n).saturating_sub(2 * m * r);
        let deviations = (whole as f64 - (r * r) as f64 / count as f64).max(0.0);
        deviations / (count - 1) as f64 / (SCALE * SCALE)
    }

    /// The sum and the squares as four words, low word first.
    pub fn to_words(self) -> [u64; 4] {
        let sum = self.sum.cast_unsigned();
        [
            sum as u64,
            (sum >> 64) as u64,
            self.squares as u64,
            (self.squares >> 64) as u64,
        ]
    }

    /// The inverse of [`ExactSum::to_words`]; refuses words that `count` values cannot give.
    pub fn from_words(words: [u64; 4], count: u64) -> Result<Self, &'static str> {
        let [sum_low, sum_high, squares_low, squares_high] = words.map(u128::from);
        let sum = (sum_low | sum_high << 64).cast_signed();
        let squares = squares_low | squares_high << 64;
        let n = u128::from(count);
        let magnitude = sum.unsigned_abs();
        if magnitude > n * UNIT {
            return Err("a sum exceeds the number of samples");
        }
        if squares > n * UNIT * UNIT {
            return Err("a sum of squares exceeds the number of samples");
        }
        // Cauchy-Schwarz, sum² <= n·squares, without overflow.
        if count > 0 {
            let (m, r) = (magnitude / n, magnitude % n);
            let least = (m * m * n).saturating_add(2 * m * r);
            if squares < least {
                return Err("a sum of squares is less than its sum allows");
            }
        } else if sum != 0 || squares != 0 {
            return Err("there are sums but no samples");
        }
        Ok(Self { sum, squares })
    }
}

/// Adds values in `[-1, 1]` to sums of at most [`BlockSums::MAX_SAMPLES`] each.
#[inline(always)]
pub(crate) fn add_rounded(sums: &mut [i64], values: &[f64]) {
    for (sum, &value) in sums.iter_mut().zip(values) {
        *sum += rounded(value);
    }
}

/// Exact sums of many pairs over a few samples, in 64-bit lanes.
///
/// A rounded magnitude of up to 2^48 is `high · 2^24 + low`, so its square is
/// `high² · 2^48 + 2 · high · low · 2^24 + low²`, each part at most 2^48.
#[derive(Debug)]
pub(crate) struct BlockSums {
    sum: Vec<i64>,
    high: Vec<u64>,
    cross: Vec<u64>,
    low: Vec<u64>,
    samples: u32,
}

impl BlockSums {
    /// The samples that 64 bits hold: each sum is at most this many times 2^48.
    pub const MAX_SAMPLES: u32 = 1 << 14;

    pub fn new(num_pairs: usize) -> Self {
        Self {
            sum: vec![0; num_pairs],
            high: vec![0; num_pairs],
            cross: vec![0; num_pairs],
            low: vec![0; num_pairs],
            samples: 0,
        }
    }

    pub fn is_full(&self) -> bool {
        self.samples == Self::MAX_SAMPLES
    }

    /// Adds one sample: a value in `[-1, 1]` for each pair.
    #[inline(always)]
    pub fn add(&mut self, values: &[f64]) {
        debug_assert!(!self.is_full());
        let Self {
            sum,
            high,
            cross,
            low,
            samples,
        } = self;
        let length = values.len();
        let (sum, high) = (&mut sum[..length], &mut high[..length]);
        let (cross, low) = (&mut cross[..length], &mut low[..length]);
        for pair in 0..length {
            let unit = rounded(values[pair]);
            let magnitude = unit.unsigned_abs();
            // Both fit 32 bits, and are seen to: vectors multiply such numbers at once.
            let (upper, lower) = (magnitude >> 24 & 0xffff_ffff, magnitude & 0xff_ffff);
            sum[pair] += unit;
            high[pair] += upper * upper;
            cross[pair] += upper * lower;
            low[pair] += lower * lower;
        }
        *samples += 1;
    }

    /// Moves everything to the sums of the same pairs.
    pub fn drain_into(&mut self, sums: &mut [ExactSum]) {
        for (pair, to) in sums.iter_mut().enumerate() {
            to.sum += i128::from(self.sum[pair]);
            to.squares += (u128::from(self.high[pair]) << 48)
                + (u128::from(self.cross[pair]) << 25)
                + u128::from(self.low[pair]);
        }
        let Self {
            sum,
            high,
            cross,
            low,
            samples,
        } = self;
        sum.fill(0);
        for part in [high, cross, low] {
            part.fill(0);
        }
        *samples = 0;
    }
}
