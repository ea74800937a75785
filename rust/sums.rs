//! Sums of every metric over every pair of states: data, to be merged, stored and read.

mod bytes;

use crate::costs::Costs;
use crate::error::Error;
use crate::exact::{ExactSum, SCALE};
use crate::limits::MAX_SAMPLES;
use crate::metric::{Metric, names};
use crate::sequence::{Lengths, Sequence, SequenceSum, variance};
use crate::states::check_num_states;
use crate::superaccumulator::Superaccumulator;

/// Sums of one metric over the pairs `(l, m)`, `l < m`, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MetricSums {
    pub metric: Metric,
    /// Over sequences of one sample.
    pub pairs: Vec<ExactSum>,
    /// Over sequences of several; empty where there are none.
    several: Vec<SequenceSum>,
}

impl MetricSums {
    fn new(metric: Metric, num_pairs: usize) -> Self {
        Self {
            metric,
            pairs: vec![ExactSum::default(); num_pairs],
            several: Vec::new(),
        }
    }

    fn units(&self, pair: usize) -> i128 {
        let several = self.several.get(pair).copied().unwrap_or_default();
        self.pairs[pair].units() + several.units()
    }

    /// The sums over sequences of several samples, to be added to.
    fn several_mut(&mut self) -> &mut [SequenceSum] {
        self.several
            .resize(self.pairs.len(), SequenceSum::default());
        &mut self.several
    }
}

/// Count, mean and variance of every metric over every pair of states.
///
/// An [`Accumulator`](crate::Accumulator) makes them of samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    num_states: usize,
    pub(crate) metrics: Vec<MetricSums>,
    pub(crate) norms: Vec<Superaccumulator>,
    pub(crate) lengths: Lengths,
    pub(crate) rejected: u64,
}

pub(crate) fn num_pairs(num_states: usize) -> usize {
    num_states * (num_states - 1) / 2
}

fn check_metrics(metrics: &[Metric]) -> Result<(), Error> {
    let repeated = (1..metrics.len()).any(|i| metrics[..i].contains(&metrics[i]));
    if metrics.is_empty() || repeated {
        return Err(Error::MetricList(names(metrics)));
    }
    Ok(())
}

impl Sums {
    /// The sums of no samples, of `num_states = L + 1` states each.
    pub fn new(num_states: usize, metrics: &[Metric]) -> Result<Self, Error> {
        check_num_states(num_states)?;
        check_metrics(metrics)?;
        let sums = metrics
            .iter()
            .map(|&metric| MetricSums::new(metric, num_pairs(num_states)));
        Ok(Self {
            num_states,
            metrics: sums.collect(),
            norms: vec![Superaccumulator::default(); num_states],
            lengths: Lengths::default(),
            rejected: 0,
        })
    }

    /// The sums of no samples, of the same states and metrics.
    pub(crate) fn empty(&self) -> Self {
        let sums = self.metrics.iter();
        Self {
            num_states: self.num_states,
            metrics: sums
                .map(|sums| MetricSums::new(sums.metric, sums.pairs.len()))
                .collect(),
            norms: vec![Superaccumulator::default(); self.num_states],
            lengths: Lengths::default(),
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
        self.lengths.all_samples()
    }

    /// Number of sequences that the samples are of, and their lengths.
    pub fn lengths(&self) -> Lengths {
        self.lengths
    }

    /// Samples left out.
    pub fn rejected(&self) -> u64 {
        self.rejected
    }

    /// The metrics held, in the order they were asked for.
    pub fn metrics(&self) -> Vec<Metric> {
        self.metrics.iter().map(|sums| sums.metric).collect()
    }

    /// Adds the samples of others; the same bits in whatever order.
    ///
    /// A sequence does not go on from one to the other: with samples in both it counts as two.
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
        self.check_room(other.count() + other.rejected)?;
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
        let sums = self.held(metric)?;
        let count = self.count() as f64;
        Ok(self.matrix(metric.of_identical(), |pair| {
            sums.units(pair) as f64 / count / SCALE * metric.range()
        }))
    }

    /// The variance of a metric between sequences, `(L + 1)²` values row by row; NaN for one
    /// sequence. Over their number it is the squared standard error of the mean.
    ///
    /// It is the sample variance of `(s - m n) / n̄` (divisor `G - 1`), where a sequence has the
    /// sum `s` over `n` samples, `m` is the mean over all samples and `n̄` the mean of `n`: for
    /// sequences of one sample, that of the samples.
    pub fn variance(&self, metric: Metric) -> Result<Vec<f64>, Error> {
        let sums = self.held(metric)?;
        let of_one = if self.lengths.sequences() > 1 {
            0.0
        } else {
            f64::NAN
        };
        Ok(self.matrix(of_one, |pair| {
            let alone = &sums.pairs[pair];
            let variance = match sums.several.get(pair) {
                Some(several) => variance(alone, several, self.lengths),
                None => alone.variance(self.lengths.alone),
            };
            variance * metric.range() * metric.range()
        }))
    }

    /// Costs of every block by a metric: the sum over samples of how far the states it joins
    /// are from alike, in the units of the exact sums.
    pub fn costs(&self, metric: Metric) -> Result<Costs, Error> {
        let similarity = metric
            .is_similarity()
            .ok_or(Error::NoDistance(metric.name()))?;
        let sums = self.held(metric)?;
        let mut alike = ExactSum::default();
        alike.add(metric.of_identical() / metric.range());
        let alike = alike.units() * i128::from(self.count());
        let of_pair = |pair| {
            let units = sums.units(pair);
            if similarity { alike - units } else { units }
        };
        let units = (0..sums.pairs.len()).map(of_pair).collect();
        Ok(Costs::of_units(self.num_layers(), units))
    }

    /// The mean norm of each state, `L + 1` values.
    pub fn norms(&self) -> Result<Vec<f64>, Error> {
        self.check_samples()?;
        let mean = |sum: &Superaccumulator| sum.value() / self.count() as f64;
        Ok(self.norms.iter().map(mean).collect())
    }

    /// Refuses more samples than there is room for.
    pub(crate) fn check_room(&self, samples: u64) -> Result<(), Error> {
        let total = (self.count() + self.rejected).saturating_add(samples);
        if total > MAX_SAMPLES {
            return Err(Error::TooManySamples);
        }
        Ok(())
    }

    /// Adds others of the same states and metrics.
    pub(crate) fn add_sums(&mut self, other: &Self) {
        self.lengths.add(other.lengths);
        self.rejected += other.rejected;
        for (sums, others) in self.metrics.iter_mut().zip(&other.metrics) {
            for (pair, addend) in sums.pairs.iter_mut().zip(&others.pairs) {
                pair.merge(addend);
            }
            if !others.several.is_empty() {
                let pairs = sums.several_mut().iter_mut().zip(&others.several);
                pairs.for_each(|(pair, addend)| pair.merge(addend));
            }
        }
        for (norm, addend) in self.norms.iter_mut().zip(&other.norms) {
            norm.merge(addend);
        }
    }

    pub(crate) fn add_sequence(&mut self, sequence: &Sequence) {
        let samples = sequence.samples;
        self.lengths.add(Lengths::of(samples));
        for (sums, added) in self.metrics.iter_mut().zip(&sequence.sums) {
            if samples == 1 {
                let pairs = sums.pairs.iter_mut().zip(added);
                pairs.for_each(|(pair, &units)| pair.add_units(units));
            } else if samples > 1 {
                let pairs = sums.several_mut().iter_mut().zip(added);
                pairs.for_each(|(pair, &units)| pair.add(units, samples));
            }
        }
    }

    /// Takes out a sequence that was added.
    pub(crate) fn subtract_sequence(&mut self, sequence: &Sequence) {
        let samples = sequence.samples;
        self.lengths.subtract(Lengths::of(samples));
        for (sums, taken) in self.metrics.iter_mut().zip(&sequence.sums) {
            if samples == 1 {
                let pairs = sums.pairs.iter_mut().zip(taken);
                pairs.for_each(|(pair, &units)| pair.subtract_units(units));
            } else if samples > 1 {
                let pairs = sums.several_mut().iter_mut().zip(taken);
                pairs.for_each(|(pair, &units)| pair.subtract(units, samples));
            }
        }
    }

    fn sums_of(&self, metric: Metric) -> Result<&MetricSums, Error> {
        let not_held = || Error::MetricNotHeld {
            wanted: metric.name(),
            held: names(&self.metrics()),
        };
        self.metrics
            .iter()
            .find(|sums| sums.metric == metric)
            .ok_or_else(not_held)
    }

    fn held(&self, metric: Metric) -> Result<&MetricSums, Error> {
        let sums = self.sums_of(metric)?;
        self.check_samples()?;
        Ok(sums)
    }

    fn check_samples(&self) -> Result<(), Error> {
        if self.count() == 0 {
            return Err(Error::NoSamples {
                rejected: self.rejected,
            });
        }
        Ok(())
    }

    fn matrix(&self, diagonal: f64, value: impl Fn(usize) -> f64) -> Vec<f64> {
        let size = self.num_states;
        let mut matrix = vec![diagonal; size * size];
        let mut pair = 0;
        for first in 0..size {
            for second in first + 1..size {
                let entry = value(pair);
                matrix[first * size + second] = entry;
                matrix[second * size + first] = entry;
                pair += 1;
            }
        }
        matrix
    }
}
