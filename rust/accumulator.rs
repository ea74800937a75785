//! Running sums of every metric over every pair of states.

use rayon::prelude::*;

use crate::error::{Error, Reason, Rejection, names};
use crate::exact::{BlockSums, ExactSum};
use crate::gram::{Gram, NORMS};
use crate::kernels::{Kernels, Tier, Work};
use crate::long_sum::LongSum;
use crate::metric::Metric;
use crate::states::{Element, States, check_num_states};

/// The samples that the exact sums have room for.
pub const MAX_SAMPLES: u64 = 1 << 31;

/// The states a sample that sums are kept for: more than any model has layers, and few
/// enough for the sums of a hostile file or shape to fit in memory.
pub const MAX_STATES: usize = 4096;

/// Sums of one metric over the pairs `(l, m)`, `l < m`, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricSums {
    metric: Metric,
    pairs: Vec<ExactSum>,
}

/// Count, mean and variance of every metric over every pair of states.
#[derive(Debug, Clone)]
pub struct Accumulator {
    tier: Tier,
    num_states: usize,
    sums: Vec<MetricSums>,
    norms: Vec<LongSum>,
    count: u64,
    rejected: u64,
}

/// The same samples, whatever tier compares the next ones.
impl PartialEq for Accumulator {
    fn eq(&self, other: &Self) -> bool {
        let all = |this: &Self| (this.num_states, this.count, this.rejected);
        all(self) == all(other) && self.sums == other.sums && self.norms == other.norms
    }
}

impl Eq for Accumulator {}

/// What one thread adds up before it is added to the rest.
struct Part {
    gram: Gram,
    fractions: Vec<f64>,
    blocks: Vec<BlockSums>,
    sums: Accumulator,
    rejections: Vec<Rejection>,
    /// The values of all pairs of the samples added, a vector for each metric, if they are kept.
    kept: Vec<Vec<f32>>,
}

impl Part {
    fn new(whole: &Accumulator, keep: bool) -> Self {
        let pairs = num_pairs(whole.num_states);
        Self {
            gram: Gram::new(whole.num_states, whole.tier),
            fractions: vec![0.0; pairs],
            blocks: whole.sums.iter().map(|_| BlockSums::new(pairs)).collect(),
            sums: whole.empty(),
            rejections: Vec::new(),
            kept: vec![Vec::new(); if keep { whole.sums.len() } else { 0 }],
        }
    }

    fn add<T: Element>(&mut self, states: &States<'_, T>, sample: usize) {
        let tier = self.sums.tier;
        let added = tier.run(AddSample {
            part: self,
            states,
            sample,
        });
        if let Err((state, reason)) = added {
            self.sums.rejected += 1;
            self.rejections.push(Rejection {
                sample,
                state,
                reason,
            });
        }
        if self.blocks.iter().any(BlockSums::is_full) {
            self.drain();
        }
    }

    fn drain(&mut self) {
        for (block, sums) in self.blocks.iter_mut().zip(&mut self.sums.sums) {
            block.drain_into(&mut sums.pairs);
        }
        for norm in &mut self.sums.norms {
            norm.carry();
        }
    }

    fn finish(mut self) -> (Accumulator, Vec<Rejection>, Vec<Vec<f32>>) {
        self.drain();
        (self.sums, self.rejections, self.kept)
    }
}

struct AddSample<'p, 's, T> {
    part: &'p mut Part,
    states: &'s States<'s, T>,
    sample: usize,
}

impl<T: Element> Work for AddSample<'_, '_, T> {
    type Output = Result<(), (usize, Reason)>;

    #[inline(always)]
    fn run<K: Kernels>(self) -> Self::Output {
        let Part {
            gram,
            fractions,
            blocks,
            sums,
            kept,
            ..
        } = self.part;
        gram.compute_with::<K, T>(self.states, self.sample)?;
        let of_norms = |sums: &MetricSums| sums.metric.range() > 1.0;
        if sums.sums.iter().any(of_norms)
            && let Some(state) = gram.ratio_out_of_range()
        {
            return Err((state, Reason::RatioOutOfRange));
        }
        for (place, (sums, block)) in sums.sums.iter().zip(blocks).enumerate() {
            gram.fractions(sums.metric, fractions);
            block.add(fractions);
            if let Some(kept) = kept.get_mut(place) {
                let range = sums.metric.range();
                kept.extend(fractions.iter().map(|fraction| (fraction * range) as f32));
            }
        }
        for (sum, &norm) in sums.norms.iter_mut().zip(gram.norms()) {
            sum.add_uncarried(norm);
        }
        sums.count += 1;
        Ok(())
    }
}

fn append(to: &mut [Vec<f32>], from: Vec<Vec<f32>>) {
    for (to, from) in to.iter_mut().zip(from) {
        to.extend(from);
    }
}

fn num_pairs(num_states: usize) -> usize {
    num_states * (num_states - 1) / 2
}

impl Accumulator {
    /// An empty accumulator for samples of `num_states = L + 1` states.
    pub fn new(num_states: usize, metrics: &[Metric]) -> Result<Self, Error> {
        check_num_states(num_states)?;
        let repeated = (1..metrics.len()).any(|i| metrics[..i].contains(&metrics[i]));
        if metrics.is_empty() || repeated {
            return Err(Error::MetricList(metrics.to_vec()));
        }
        let sums = metrics.iter().map(|&metric| MetricSums {
            metric,
            pairs: vec![ExactSum::default(); num_pairs(num_states)],
        });
        Ok(Self {
            tier: Tier::chosen()?,
            num_states,
            sums: sums.collect(),
            norms: vec![LongSum::default(); num_states],
            count: 0,
            rejected: 0,
        })
    }

    /// The same with another tier than the chosen one; samples that are in keep their values.
    pub fn with_tier(self, tier: Tier) -> Result<Self, Error> {
        let tier = tier.checked()?;
        Ok(Self { tier, ..self })
    }

    /// The instruction set that samples are compared with.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    fn empty(&self) -> Self {
        let mut empty = self.clone();
        (empty.count, empty.rejected) = (0, 0);
        empty.norms.fill(LongSum::default());
        for sums in &mut empty.sums {
            sums.pairs.fill(ExactSum::default());
        }
        empty
    }

    /// States a sample, `L + 1`.
    pub fn num_states(&self) -> usize {
        self.num_states
    }

    /// Layers of the model, `L`.
    pub fn num_layers(&self) -> usize {
        self.num_states - 1
    }

    /// Samples in the sums.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Samples left out.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    /// The metrics held, in the order they were asked for.
    pub fn metrics(&self) -> Vec<Metric> {
        self.sums.iter().map(|sums| sums.metric).collect()
    }

    /// Adds a batch on the current rayon pool; returns the samples left out, in order.
    ///
    /// A sample with an unusable state enters no sum at all. On an error nothing is added.
    pub fn update<T: Element>(&mut self, states: &States<'_, T>) -> Result<Vec<Rejection>, Error> {
        self.add_batch(states, None)
    }

    /// The same, and appends the values of the samples added, all pairs of each, to the
    /// vector of their metric.
    pub fn update_and_keep<T: Element>(
        &mut self,
        states: &States<'_, T>,
        kept: &mut [Vec<f32>],
    ) -> Result<Vec<Rejection>, Error> {
        self.add_batch(states, Some(kept))
    }

    fn add_batch<T: Element>(
        &mut self,
        states: &States<'_, T>,
        kept: Option<&mut [Vec<f32>]>,
    ) -> Result<Vec<Rejection>, Error> {
        if states.num_states() != self.num_states {
            return Err(Error::StateCount {
                expected: self.num_states,
                actual: states.num_states(),
            });
        }
        self.check_room(states.num_samples() as u64)?;
        let keep = kept.is_some();
        let (added, mut rejections, values) = (0..states.num_samples())
            .into_par_iter()
            .fold(
                || Part::new(self, keep),
                |mut part, sample| {
                    part.add(states, sample);
                    part
                },
            )
            .map(Part::finish)
            .reduce(
                || Part::new(self, keep).finish(),
                |(mut left, mut left_rejections, mut left_values), right| {
                    left.add_sums(&right.0);
                    left_rejections.extend(right.1);
                    append(&mut left_values, right.2);
                    (left, left_rejections, left_values)
                },
            );
        self.add_sums(&added);
        if let Some(kept) = kept {
            append(kept, values);
        }
        rejections.sort_by_key(|rejection| rejection.sample);
        Ok(rejections)
    }

    /// Adds another accumulator's samples; the same bits in whatever order.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        if self.num_states != other.num_states {
            return Err(Error::Unmergeable {
                what: "different numbers of states",
                left: self.num_states.to_string(),
                right: other.num_states.to_string(),
            });
        }
        if self.metrics() != other.metrics() {
            return Err(Error::Unmergeable {
                what: "different metrics",
                left: names(&self.metrics()),
                right: names(&other.metrics()),
            });
        }
        self.check_room(other.count + other.rejected)?;
        self.add_sums(other);
        Ok(())
    }

    /// Counts samples that never became states, such as empty texts.
    pub fn reject(&mut self, samples: u64) -> Result<(), Error> {
        self.check_room(samples)?;
        self.rejected += samples;
        Ok(())
    }

    /// The mean of a metric, `(L + 1)²` values row by row, symmetric.
    pub fn mean(&self, metric: Metric) -> Result<Vec<f64>, Error> {
        self.matrix(metric, metric.of_identical(), |sum, count| {
            sum.mean(count) * metric.range()
        })
    }

    /// The sample variance of a metric, `(L + 1)²` values row by row; NaN for one sample.
    pub fn variance(&self, metric: Metric) -> Result<Vec<f64>, Error> {
        let of_identical = if self.count > 1 { 0.0 } else { f64::NAN };
        self.matrix(metric, of_identical, |sum, count| {
            sum.variance(count) * metric.range() * metric.range()
        })
    }

    /// The cost of a block `(start, stop)`: the sum over samples of how far the states it
    /// joins are from alike, in the units of the exact sums.
    pub(crate) fn cost(&self, metric: Metric) -> Result<impl Fn(usize, usize) -> i128, Error> {
        let similarity = metric.is_similarity().ok_or(Error::NoDistance(metric))?;
        let pairs = self.pairs(metric)?;
        let mut alike = ExactSum::default();
        alike.add(metric.of_identical() / metric.range());
        let alike = alike.units() * i128::from(self.count);
        Ok(move |start, stop| {
            let units = pairs[self.pair_index(start, stop)].units();
            if similarity { alike - units } else { units }
        })
    }

    /// The mean norm of each state, `L + 1` values.
    pub fn norms(&self) -> Result<Vec<f64>, Error> {
        self.check_samples()?;
        let mean = |sum: &LongSum| sum.value() / self.count as f64;
        Ok(self.norms.iter().map(mean).collect())
    }

    /// The sums of the norms as words, for storage.
    pub fn norms_to_words(&self) -> Vec<u64> {
        self.norms.iter().flat_map(LongSum::to_words).collect()
    }

    /// The sums of a metric as words, four a pair, for storage.
    pub fn to_words(&self, metric: Metric) -> Result<Vec<u64>, Error> {
        let sums = self.sums_of(metric)?;
        Ok(sums.pairs.iter().flat_map(|sum| sum.to_words()).collect())
    }

    /// Rebuilds an accumulator from stored sums; refuses sums that no samples can have.
    pub fn from_words(
        num_states: usize,
        count: u64,
        rejected: u64,
        stored: &[(Metric, Vec<u64>)],
        norms: &[u64],
    ) -> Result<Self, Error> {
        let metrics: Vec<Metric> = stored.iter().map(|&(metric, _)| metric).collect();
        let mut this = Self::new(num_states, &metrics)?;
        this.check_room(count.saturating_add(rejected))?;
        (this.count, this.rejected) = (count, rejected);
        for (sums, (metric, words)) in this.sums.iter_mut().zip(stored) {
            let damaged = |what| Error::DamagedSums {
                metric: *metric,
                what,
            };
            let (whole, rest) = words.as_chunks::<4>();
            if whole.len() != sums.pairs.len() || !rest.is_empty() {
                return Err(damaged(format!(
                    "{} words for {} pairs",
                    words.len(),
                    sums.pairs.len()
                )));
            }
            for (pair, &words) in sums.pairs.iter_mut().zip(whole) {
                *pair = ExactSum::from_words(words, count).map_err(|e| damaged(e.to_owned()))?;
                if pair.units() < 0 && !metric.can_be_negative() {
                    return Err(damaged("a sum is negative".to_owned()));
                }
            }
        }
        this.norms_from_words(norms)?;
        Ok(this)
    }

    fn norms_from_words(&mut self, words: &[u64]) -> Result<(), Error> {
        let (whole, rest) = words.as_chunks::<{ LongSum::WORDS }>();
        if whole.len() != self.num_states || !rest.is_empty() {
            return Err(Error::DamagedNorms);
        }
        for (sum, words) in self.norms.iter_mut().zip(whole) {
            *sum = LongSum::from_words(words).ok_or(Error::DamagedNorms)?;
            let mean = sum.value() / (self.count.max(1)) as f64;
            let usable = if self.count == 0 { 0.0..=0.0 } else { NORMS };
            if !usable.contains(&mean) {
                return Err(Error::DamagedNorms);
            }
        }
        Ok(())
    }

    fn check_room(&self, samples: u64) -> Result<(), Error> {
        let total = (self.count + self.rejected).saturating_add(samples);
        if total > MAX_SAMPLES {
            return Err(Error::TooManySamples);
        }
        Ok(())
    }

    fn add_sums(&mut self, other: &Self) {
        self.count += other.count;
        self.rejected += other.rejected;
        for (sums, others) in self.sums.iter_mut().zip(&other.sums) {
            for (pair, addend) in sums.pairs.iter_mut().zip(&others.pairs) {
                pair.merge(addend);
            }
        }
        for (norm, addend) in self.norms.iter_mut().zip(&other.norms) {
            norm.merge(addend);
        }
    }

    fn sums_of(&self, metric: Metric) -> Result<&MetricSums, Error> {
        let held = || Error::MetricNotHeld {
            wanted: metric,
            held: self.metrics(),
        };
        self.sums
            .iter()
            .find(|sums| sums.metric == metric)
            .ok_or_else(held)
    }

    fn pairs(&self, metric: Metric) -> Result<&[ExactSum], Error> {
        let sums = self.sums_of(metric)?;
        self.check_samples()?;
        Ok(&sums.pairs)
    }

    fn check_samples(&self) -> Result<(), Error> {
        if self.count == 0 {
            return Err(Error::NoSamples {
                rejected: self.rejected,
            });
        }
        Ok(())
    }

    fn pair_index(&self, first: usize, second: usize) -> usize {
        first * (2 * self.num_states - first - 1) / 2 + second - first - 1
    }

    fn matrix(
        &self,
        metric: Metric,
        diagonal: f64,
        value: impl Fn(&ExactSum, u64) -> f64,
    ) -> Result<Vec<f64>, Error> {
        let pairs = self.pairs(metric)?;
        let size = self.num_states;
        let mut matrix = vec![diagonal; size * size];
        for first in 0..size {
            for second in first + 1..size {
                let entry = value(&pairs[self.pair_index(first, second)], self.count);
                matrix[first * size + second] = entry;
                matrix[second * size + first] = entry;
            }
        }
        Ok(matrix)
    }
}
