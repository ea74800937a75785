//! Running sums of every metric over every pair of states.

use rayon::prelude::*;

use crate::error::{Error, Rejection, names};
use crate::exact::ExactSum;
use crate::gram::Gram;
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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accumulator {
    num_states: usize,
    sums: Vec<MetricSums>,
    count: u64,
    rejected: u64,
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
        Ok(Self::zero(num_states, metrics))
    }

    fn zero(num_states: usize, metrics: &[Metric]) -> Self {
        let sums = metrics.iter().map(|&metric| MetricSums {
            metric,
            pairs: vec![ExactSum::default(); num_pairs(num_states)],
        });
        Self {
            num_states,
            sums: sums.collect(),
            count: 0,
            rejected: 0,
        }
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
        let metrics = self.metrics();
        self.check_room(states.num_samples() as u64)?;
        let nothing = || vec![Vec::new(); if kept.is_some() { metrics.len() } else { 0 }];
        let start = || {
            (
                Self::zero(self.num_states, &metrics),
                Gram::new(self.num_states),
                Vec::new(),
                nothing(),
            )
        };
        let (added, mut rejections, values) = (0..states.num_samples())
            .into_par_iter()
            .fold(
                start,
                |(mut part, mut gram, mut rejections, mut values), sample| {
                    match gram.compute(states, sample) {
                        Ok(()) => part.add_sample(&gram, &mut values),
                        Err((state, reason)) => {
                            part.rejected += 1;
                            rejections.push(Rejection {
                                sample,
                                state,
                                reason,
                            });
                        }
                    }
                    (part, gram, rejections, values)
                },
            )
            .map(|(part, _, rejections, values)| (part, rejections, values))
            .reduce(
                || (Self::zero(self.num_states, &metrics), Vec::new(), nothing()),
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
        self.matrix(metric, metric.of_identical(), ExactSum::mean)
    }

    /// The sample variance of a metric, `(L + 1)²` values row by row; NaN for one sample.
    pub fn variance(&self, metric: Metric) -> Result<Vec<f64>, Error> {
        let of_identical = if self.count > 1 { 0.0 } else { f64::NAN };
        self.matrix(metric, of_identical, ExactSum::variance)
    }

    /// The cost of a block `(start, stop)`: the sum over samples of how far the states it
    /// joins are from alike, in the units of the exact sums.
    pub(crate) fn cost(&self, metric: Metric) -> Result<impl Fn(usize, usize) -> i128, Error> {
        let pairs = self.pairs(metric)?;
        let mut alike = ExactSum::default();
        alike.add(metric.of_identical());
        let alike = alike.units() * i128::from(self.count);
        Ok(move |start, stop| {
            let units = pairs[self.pair_index(start, stop)].units();
            if metric.is_similarity() {
                alike - units
            } else {
                units
            }
        })
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
        Ok(this)
    }

    fn check_room(&self, samples: u64) -> Result<(), Error> {
        let total = (self.count + self.rejected).saturating_add(samples);
        if total > MAX_SAMPLES {
            return Err(Error::TooManySamples);
        }
        Ok(())
    }

    /// Adds a sample; its values also to `kept`, if that has a place for each metric.
    fn add_sample(&mut self, gram: &Gram, kept: &mut [Vec<f32>]) {
        let pairs = (0..self.num_states)
            .flat_map(|first| (first + 1..self.num_states).map(move |second| (first, second)));
        for (index, (first, second)) in pairs.enumerate() {
            let cosine = gram.cosine(first, second);
            for (place, sums) in self.sums.iter_mut().enumerate() {
                let value = sums.metric.of_cosine(cosine);
                sums.pairs[index].add(value);
                if let Some(kept) = kept.get_mut(place) {
                    kept.push(value as f32);
                }
            }
        }
        self.count += 1;
    }

    fn add_sums(&mut self, other: &Self) {
        self.count += other.count;
        self.rejected += other.rejected;
        for (sums, others) in self.sums.iter_mut().zip(&other.sums) {
            for (pair, addend) in sums.pairs.iter_mut().zip(&others.pairs) {
                pair.merge(addend);
            }
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
        if self.count == 0 {
            return Err(Error::NoSamples {
                rejected: self.rejected,
            });
        }
        Ok(&sums.pairs)
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
