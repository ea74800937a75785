//! How sure `l*(n)` is: samples are drawn again with replacement, many times, and every time
//! the best start is found anew (Efron, Annals of Statistics 7, 1979).
//!
//! The answer is exact. Values become integers once; a resample gives every sample a weight
//! `w`, how often it was drawn, and the best start has the least `sum w·v`. For speed, starts
//! that no such weights can make the best are left out at once, the sums of the others are
//! bounded from 16 bits of every value, and only those whose bounds overlap are found in full.
//!
//! Samples are put in the order of their values first, so that it does not matter in which
//! order, or in how many shards, they came.

use std::cmp::Ordering;
use std::ops::{AddAssign, Range};

use rayon::prelude::*;

use crate::error::Error;
use crate::kernels::Tier;
use crate::kernels::dots::{CHUNK, Chunk, Dots, TILE};
use crate::metric::Metric;
use crate::states::check_num_states;

/// Bits of the greatest magnitude among the values, so that differences fit 32.
const BITS: u64 = 29;

/// Resamples whose sums are found together.
const RESAMPLES: usize = 64;

/// Samples that are put into columns together: they fill a cache line there.
const LINE: usize = 16;

/// How often each start was the best, for every block size `n = 1 .. L-1`.
///
/// `values` holds the `L(L + 1)/2` pairs `(l, m)`, `l < m`, row by row, of every sample. The
/// same seed gives the same answer on every machine, for any number of threads and any order
/// of the samples. Of equal starts the smallest is the best.
pub fn bootstrap(
    values: &[f32],
    num_states: usize,
    metric: Metric,
    num_resamples: usize,
    seed: u64,
) -> Result<Vec<Vec<u64>>, Error> {
    let samples = Samples::new(values, num_states, metric)?;
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

fn add<T: Copy + AddAssign>(mut left: Vec<T>, right: Vec<T>) -> Vec<T> {
    left.iter_mut().zip(right).for_each(|(l, r)| *l += r);
    left
}

/// The values of all blocks `(start, stop)`; a block is named by its place among the sizes
/// `n = 1 .. L-1` and, within a size, the starts.
struct Samples<'a> {
    values: &'a [f32],
    width: usize,
    /// What turns a value into an integer cost.
    scale: f64,
    /// The samples in the order of their values.
    order: Vec<usize>,
    /// Where each block is among the values of a sample.
    pairs: Vec<usize>,
    /// The blocks of each size.
    rows: Vec<Range<usize>>,
}

impl<'a> Samples<'a> {
    fn new(values: &'a [f32], num_states: usize, metric: Metric) -> Result<Self, Error> {
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
        let similarity = metric
            .is_similarity()
            .ok_or(Error::NoDistance(metric.name()))?;
        let sign = if similarity { -1.0 } else { 1.0 };
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
    fn costs(&self, sample: usize) -> Vec<i32> {
        let row = self.row(sample).iter();
        row.map(|&value| cost(value, self.scale)).collect()
    }

    /// For every block one of its size that is best over all samples, or nearly.
    fn references(&self) -> Vec<usize> {
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

    /// How the pairs of all blocks differ from those of their references, by pair.
    fn differences(&self, references: &[usize]) -> Differences {
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
    fn best_blocks(&self, weight: impl Fn(usize) -> i16) -> impl Iterator<Item = usize> {
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

/// Sums, sums of squares and extremes of many differences.
struct Differences {
    sums: Vec<i64>,
    squares: Vec<f64>,
    least: Vec<i32>,
    greatest: Vec<i32>,
}

impl Differences {
    fn none(width: usize) -> Self {
        Self {
            sums: vec![0; width],
            squares: vec![0.0; width],
            least: vec![i32::MAX; width],
            greatest: vec![i32::MIN; width],
        }
    }

    fn add(&mut self, values: &[i32]) {
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

    fn merge(mut self, other: Self) -> Self {
        self.sums = add(self.sums, other.sums);
        self.squares = add(self.squares, other.squares);
        let least = self.least.iter_mut().zip(other.least);
        least.for_each(|(left, right)| *left = right.min(*left));
        let greatest = self.greatest.iter_mut().zip(other.greatest);
        greatest.for_each(|(left, right)| *left = right.max(*left));
        self
    }

    /// Whether no weights with `sum (w - 1)^2 <= spread` bring a sum down to zero: it is at
    /// least `sum x - sqrt(spread · sum (x - mean)^2)` (Cauchy and Schwarz). The margins are
    /// far above the rounding.
    fn stays_positive(&self, pair: usize, spread: usize, num_samples: usize) -> bool {
        let sum = self.sums[pair] as f64;
        let deviations = self.squares[pair] * (1.0 + 1e-9) - sum * sum / num_samples as f64;
        sum > 0.0 && sum * sum * (1.0 - 1e-9) > spread as f64 * deviations
    }
}

/// A block that some weights may make the best.
struct Rival {
    block: usize,
    pair: usize,
    /// The pair of the block that it is compared with.
    less: usize,
    /// The difference of the two is this, and a high part,
    center: i32,
    /// and so many low bits.
    shift: u32,
}

impl Rival {
    fn split(&self, difference: i32) -> (i16, u16) {
        let value = difference - self.center;
        (
            (value >> self.shift) as i16,
            (value & self.mask()).cast_unsigned() as u16,
        )
    }

    fn mask(&self) -> i32 {
        (1 << self.shift) - 1
    }

    /// The sum of differences but for their low bits, from the sum of their high parts.
    fn without_low(&self, high: i64, num_samples: i64) -> i64 {
        num_samples * i64::from(self.center) + (high << self.shift)
    }
}

/// The blocks that may be the best of their size, and how they differ from it.
struct Rivals<'a> {
    samples: &'a Samples<'a>,
    dots: Dots,
    /// Above this `sum (w - 1)^2` any block may be the best.
    spread: usize,
    rivals: Vec<Rival>,
    /// The rivals of each size.
    rows: Vec<Range<usize>>,
    chunks: Vec<Columns>,
}

/// The differences of some samples, a column a rival; what fills them up is never drawn.
struct Columns {
    high: Vec<Chunk>,
    low: Vec<[u16; CHUNK]>,
}

impl<'a> Rivals<'a> {
    fn new(samples: &'a Samples<'a>, dots: Dots) -> Self {
        let num_samples = samples.order.len();
        let spread = num_samples + 8 * num_samples.isqrt();
        let references = samples.references();
        let differences = samples.differences(&references);
        let mut this = Self {
            samples,
            dots,
            spread,
            rivals: Vec::new(),
            rows: Vec::new(),
            chunks: Vec::new(),
        };
        for row in &samples.rows {
            let first = this.rivals.len();
            for block in row.clone() {
                let pair = samples.pairs[block];
                if differences.stays_positive(pair, spread, num_samples) {
                    continue;
                }
                let (least, greatest) = (differences.least[pair], differences.greatest[pair]);
                let center = least.midpoint(greatest);
                let reach = greatest.abs_diff(center) + 1;
                this.rivals.push(Rival {
                    block,
                    pair,
                    less: samples.pairs[references[block]],
                    center,
                    shift: (u32::BITS - reach.leading_zeros()).saturating_sub(15),
                });
            }
            this.rows.push(first..this.rivals.len());
        }
        let chunks = samples.order.par_chunks(CHUNK);
        this.chunks = chunks.map(|order| this.columns(order)).collect();
        this
    }

    fn columns(&self, order: &[usize]) -> Columns {
        let mut high = vec![Chunk([0; CHUNK]); self.rivals.len()];
        let mut low = vec![[0; CHUNK]; self.rivals.len()];
        for (line, order) in order.chunks(LINE).enumerate() {
            let costs = order.iter().map(|&sample| self.samples.costs(sample));
            let costs: Vec<Vec<i32>> = costs.collect();
            for ((rival, high), low) in self.rivals.iter().zip(&mut high).zip(&mut low) {
                let places = high.0[line * LINE..]
                    .iter_mut()
                    .zip(&mut low[line * LINE..]);
                for ((high, low), costs) in places.zip(&costs) {
                    (*high, *low) = rival.split(costs[rival.pair] - costs[rival.less]);
                }
            }
        }
        Columns { high, low }
    }

    /// How often each block was the best of its size.
    fn wins(&self, weights: &Weights) -> Vec<u64> {
        let width = weights.width;
        let mut highs = vec![0; self.rivals.len() * width];
        for (rows, columns) in weights.chunks.chunks(width).zip(&self.chunks) {
            self.dots.add(rows, &columns.high, &mut highs);
        }
        let mut wins = vec![0; self.samples.pairs.len()];
        let mut close = vec![Vec::new(); width];
        for row in &self.rows {
            self.find_close(row.clone(), &highs[row.start * width..], &mut close);
            for (resample, close) in close[..weights.spreads.len()].iter().enumerate() {
                let rival = match close[..] {
                    _ if weights.spreads[resample] > self.spread => continue,
                    [(rival, _)] => rival,
                    _ => {
                        let close = close.iter();
                        let sum = |&&(rival, sum): &&(usize, i64)| {
                            sum + self.low(rival, weights, resample)
                        };
                        close.min_by_key(sum).map_or(0, |&(rival, _)| rival)
                    }
                };
                wins[self.rivals[rival].block] += 1;
            }
        }
        for (resample, &spread) in weights.spreads.iter().enumerate() {
            if spread > self.spread {
                let best = self
                    .samples
                    .best_blocks(|place| weights.of(resample, place));
                best.for_each(|block| wins[block] += 1);
            }
        }
        wins
    }

    /// The rivals of a row that may be the best in each resample, with their sums but for the
    /// low bits, by the sums of their high parts.
    fn find_close(&self, row: Range<usize>, highs: &[i64], close: &mut [Vec<(usize, i64)>]) {
        let num_samples = self.samples.order.len().cast_signed() as i64;
        let mut bounds = vec![i64::MAX; close.len()];
        for (rival, highs) in self.rivals[row.clone()]
            .iter()
            .zip(highs.chunks(close.len()))
        {
            let most = num_samples * i64::from(rival.mask());
            for (bound, &high) in bounds.iter_mut().zip(highs) {
                *bound = (rival.without_low(high, num_samples) + most).min(*bound);
            }
        }
        close.iter_mut().for_each(Vec::clear);
        for (index, highs) in row.zip(highs.chunks(close.len())) {
            for ((close, &bound), &high) in close.iter_mut().zip(&bounds).zip(highs) {
                let least = self.rivals[index].without_low(high, num_samples);
                if least <= bound {
                    close.push((index, least));
                }
            }
        }
    }

    /// The sum of the low bits of a rival's differences in a resample.
    fn low(&self, rival: usize, weights: &Weights, resample: usize) -> i64 {
        let weights = weights.chunks[resample..].iter().step_by(weights.width);
        let products = self
            .chunks
            .iter()
            .zip(weights)
            .map(|(columns, Chunk(weights))| {
                let both = columns.low[rival].iter().zip(weights);
                i64::from(
                    both.map(|(&low, &w)| i32::from(low) * i32::from(w))
                        .sum::<i32>(),
                )
            });
        products.sum()
    }
}

/// The one of least cost, the first of equals.
fn best(of: impl Iterator<Item = usize>, cost: impl Fn(usize) -> i64) -> usize {
    of.min_by_key(|&one| cost(one)).unwrap_or(0)
}

/// How often every sample was drawn, in some resamples.
struct Weights {
    /// The number of resamples, filled up with ones that draw nothing.
    width: usize,
    /// `[chunk][resample]`. That the weights of a chunk exceed 2^15, and sums 32 bits, is less
    /// likely than 1e-9999.
    chunks: Vec<Chunk>,
    /// `sum (w - 1)^2` of each resample.
    spreads: Vec<usize>,
}

impl Weights {
    fn draw(num_samples: usize, seed: u64, resamples: Range<usize>) -> Self {
        let width = resamples.len().next_multiple_of(TILE);
        let mut chunks = vec![Chunk([0; CHUNK]); num_samples.div_ceil(CHUNK) * width];
        let mut drawn = vec![0_i16; num_samples.next_multiple_of(CHUNK)];
        let mut spreads = Vec::new();
        for (column, resample) in resamples.enumerate() {
            drawn.fill(0);
            let mut state = mixed(seed.wrapping_add(GAMMA.wrapping_mul(resample as u64 + 1)));
            for _ in 0..num_samples {
                state = state.wrapping_add(GAMMA);
                let index = (u128::from(mixed(state)) * num_samples as u128) >> 64;
                drawn[index as usize] += 1;
            }
            let squares = drawn.iter().map(|&w| usize::from(w.unsigned_abs()).pow(2));
            spreads.push(squares.sum::<usize>() - num_samples);
            let places = chunks[column..].iter_mut().step_by(width);
            for (Chunk(to), from) in places.zip(drawn.as_chunks().0) {
                *to = *from;
            }
        }
        Self {
            width,
            chunks,
            spreads,
        }
    }

    fn of(&self, resample: usize, place: usize) -> i16 {
        self.chunks[place / CHUNK * self.width + resample].0[place % CHUNK]
    }
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of `SplitMix64` (Steele, Lea, Flood, OOPSLA 2014).
fn mixed(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
