//! The blocks that may be the best of their size in a resample, and which of them is.

use std::ops::Range;

use rayon::prelude::*;

use super::samples::Samples;
use super::weights::Weights;
use crate::kernels::dots::{CHUNK, Chunk, Dots};

/// Samples that are put into columns together: they fill a cache line there.
const LINE: usize = 16;

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
pub(super) struct Rivals<'a> {
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
    pub fn new(samples: &'a Samples<'a>, dots: Dots) -> Self {
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

    /// The number of resamples in which each block was the best of its size.
    pub fn wins(&self, weights: &Weights) -> Vec<u64> {
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
