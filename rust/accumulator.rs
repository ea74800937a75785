//! Running sums of every metric over every pair of states.

mod part;

use rayon::prelude::*;

use self::part::{Part, Range, Workspaces, append};
use crate::error::{Error, Rejection};
use crate::exact::{ExactSum, SCALE};
use crate::gram::NORMS;
use crate::kernels::Tier;
use crate::limits::{MAX_SAMPLES, MAX_SEQUENCE};
use crate::metric::{Metric, names};
use crate::sequence::{Lengths, Sequence, SequenceSum, variance};
use crate::states::{Element, States, check_num_states};
use crate::superaccumulator::Superaccumulator;

/// Sums of one metric over the pairs `(l, m)`, `l < m`, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricSums {
    metric: Metric,
    /// Over sequences of one sample.
    pairs: Vec<ExactSum>,
    /// Over sequences of several; empty where there are none.
    several: Vec<SequenceSum>,
}

impl MetricSums {
    fn of_several(&self, pair: usize) -> SequenceSum {
        self.several.get(pair).copied().unwrap_or_default()
    }

    fn units(&self, pair: usize) -> i128 {
        self.pairs[pair].units() + self.of_several(pair).units()
    }

    /// The sums over sequences of several samples, to be added to.
    fn several_mut(&mut self) -> &mut [SequenceSum] {
        self.several
            .resize(self.pairs.len(), SequenceSum::default());
        &mut self.several
    }
}

/// Count, mean and variance of every metric over every pair of states.
#[derive(Debug, Clone)]
pub struct Accumulator {
    tier: Tier,
    num_states: usize,
    sums: Vec<MetricSums>,
    norms: Vec<Superaccumulator>,
    lengths: Lengths,
    rejected: u64,
    /// The last sequence, which is in the sums as far as it has come, and may go on.
    open: Option<Sequence>,
    /// One a thread at most; they live as long as this does.
    workspaces: Workspaces,
}

/// The same samples, whatever tier compares the next ones.
impl PartialEq for Accumulator {
    fn eq(&self, other: &Self) -> bool {
        let all = |this: &Self| (this.num_states, this.lengths, this.rejected);
        all(self) == all(other) && self.sums == other.sums && self.norms == other.norms
    }
}

impl Eq for Accumulator {}

fn num_pairs(num_states: usize) -> usize {
    num_states * (num_states - 1) / 2
}

impl Accumulator {
    /// An empty accumulator for samples of `num_states = L + 1` states.
    pub fn new(num_states: usize, metrics: &[Metric]) -> Result<Self, Error> {
        check_num_states(num_states)?;
        let repeated = (1..metrics.len()).any(|i| metrics[..i].contains(&metrics[i]));
        if metrics.is_empty() || repeated {
            return Err(Error::MetricList(names(metrics)));
        }
        let sums = metrics.iter().map(|&metric| MetricSums {
            metric,
            pairs: vec![ExactSum::default(); num_pairs(num_states)],
            several: Vec::new(),
        });
        Ok(Self {
            tier: Tier::chosen()?,
            num_states,
            sums: sums.collect(),
            norms: vec![Superaccumulator::default(); num_states],
            lengths: Lengths::default(),
            rejected: 0,
            open: None,
            workspaces: Workspaces::default(),
        })
    }

    /// The same with another tier than the chosen one; samples that are in keep their values.
    pub fn with_tier(self, tier: Tier) -> Result<Self, Error> {
        let tier = tier.checked()?;
        Ok(Self {
            tier,
            workspaces: Workspaces::default(),
            ..self
        })
    }

    /// The instruction set that samples are compared with.
    pub fn tier(&self) -> Tier {
        self.tier
    }

    fn empty(&self) -> Self {
        let sums = self.sums.iter().map(|sums| MetricSums {
            metric: sums.metric,
            pairs: vec![ExactSum::default(); sums.pairs.len()],
            several: Vec::new(),
        });
        Self {
            tier: self.tier,
            num_states: self.num_states,
            sums: sums.collect(),
            norms: vec![Superaccumulator::default(); self.num_states],
            lengths: Lengths::default(),
            rejected: 0,
            open: None,
            workspaces: Workspaces::default(),
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

    /// How many sequences the samples are of, and how long those are.
    pub fn lengths(&self) -> Lengths {
        self.lengths
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
        Ok(self.add_batch(states, None, None)?.0)
    }

    /// The same, and appends the values of the samples added, all pairs of each, to the
    /// vector of their metric.
    pub fn update_and_keep<T: Element>(
        &mut self,
        states: &States<'_, T>,
        kept: &mut [Vec<f32>],
    ) -> Result<Vec<Rejection>, Error> {
        Ok(self.add_batch(states, None, Some(kept))?.0)
    }

    /// Adds a batch of samples of which one after the other may be of one sequence: those with
    /// the same number, `sequences` having one for each. The first sequence goes on with the last
    /// one of the update before if that has the same number; any other update ends it, and so
    /// does a merge.
    ///
    /// What is kept, if anything, is the sum over each sequence, left out if no sample of it was
    /// added. Also says whether the first one kept takes the place of the last one kept before,
    /// which has gone on.
    pub fn update_sequences<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sequences: &[i64],
        kept: Option<&mut [Vec<f32>]>,
    ) -> Result<(Vec<Rejection>, bool), Error> {
        if sequences.len() != states.num_samples() {
            return Err(Error::Sequences {
                samples: states.num_samples(),
                sequences: sequences.len(),
            });
        }
        self.check_lengths(sequences)?;
        self.add_batch(states, Some(sequences), kept)
    }

    fn add_batch<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sequences: Option<&[i64]>,
        kept: Option<&mut [Vec<f32>]>,
    ) -> Result<(Vec<Rejection>, bool), Error> {
        if states.num_states() != self.num_states {
            return Err(Error::StateCount {
                expected: self.num_states,
                actual: states.num_states(),
            });
        }
        self.check_room(states.num_samples() as u64)?;
        let keep = kept.is_some();
        let added = (0..states.num_samples())
            .into_par_iter()
            .fold(
                || Part::new(self, keep),
                |mut part, sample| {
                    part.add(states, sample, sequences.map(|numbers| numbers[sample]));
                    part
                },
            )
            .map(|part| part.finish(&self.workspaces))
            .reduce_with(|mut left, right| {
                left.append(right);
                left
            })
            .unwrap_or_else(|| Range::new(self, keep));
        let Range {
            sums,
            mut rejections,
            kept: inner,
            mut ends,
        } = added;
        let mut goes_on = false;
        if states.num_samples() > 0
            && let Some(open) = self.open.take()
            && let Some(first) = ends.first_mut()
            && first.number == open.number
        {
            self.subtract_sequence(&open);
            first.join(&open);
            goes_on = open.samples > 0;
        }
        self.add_sums(&sums);
        for end in &ends {
            self.add_sequence(end);
        }
        if let Some(kept) = kept {
            if let Some(first) = ends.first() {
                self.keep(first, kept);
            }
            append(kept, inner);
            if let [_, last] = ends.as_slice() {
                self.keep(last, kept);
            }
        }
        if let Some(last) = ends.pop() {
            self.open = Some(last);
        }
        rejections.sort_by_key(|rejection| rejection.sample);
        Ok((rejections, goes_on))
    }

    fn add_sequence(&mut self, sequence: &Sequence) {
        let samples = sequence.samples;
        self.lengths.add(Lengths::of(samples));
        for (sums, added) in self.sums.iter_mut().zip(&sequence.sums) {
            if samples == 1 {
                let pairs = sums.pairs.iter_mut().zip(added);
                pairs.for_each(|(pair, &units)| pair.add_units(units));
            } else if samples > 1 {
                let pairs = sums.several_mut().iter_mut().zip(added);
                pairs.for_each(|(pair, &units)| pair.add(units, samples));
            }
        }
    }

    fn subtract_sequence(&mut self, sequence: &Sequence) {
        let samples = sequence.samples;
        self.lengths.subtract(Lengths::of(samples));
        for (sums, taken) in self.sums.iter_mut().zip(&sequence.sums) {
            if samples == 1 {
                let pairs = sums.pairs.iter_mut().zip(taken);
                pairs.for_each(|(pair, &units)| pair.subtract_units(units));
            } else if samples > 1 {
                let pairs = sums.several_mut().iter_mut().zip(taken);
                pairs.for_each(|(pair, &units)| pair.subtract(units, samples));
            }
        }
    }

    /// Appends the sums over a sequence, if it has samples, to the vector of their metric.
    fn keep(&self, sequence: &Sequence, kept: &mut [Vec<f32>]) {
        if sequence.samples == 0 {
            return;
        }
        for ((kept, units), sums) in kept.iter_mut().zip(&sequence.sums).zip(&self.sums) {
            let range = sums.metric.range();
            kept.extend(
                units
                    .iter()
                    .map(|&units| (units as f64 / SCALE * range) as f32),
            );
        }
    }

    /// Adds another accumulator's samples; the same bits in whatever order.
    ///
    /// A sequence does not go on from one accumulator to the other: with samples in both it
    /// counts as two.
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
        self.open = None;
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

    /// The cost of a block `(start, stop)`: the sum over samples of how far the states it
    /// joins are from alike, in the units of the exact sums.
    pub(crate) fn cost(&self, metric: Metric) -> Result<impl Fn(usize, usize) -> i128, Error> {
        let similarity = metric
            .is_similarity()
            .ok_or(Error::NoDistance(metric.name()))?;
        let sums = self.held(metric)?;
        let mut alike = ExactSum::default();
        alike.add(metric.of_identical() / metric.range());
        let alike = alike.units() * i128::from(self.count());
        Ok(move |start, stop| {
            let units = sums.units(self.pair_index(start, stop));
            if similarity { alike - units } else { units }
        })
    }

    /// The mean norm of each state, `L + 1` values.
    pub fn norms(&self) -> Result<Vec<f64>, Error> {
        self.check_samples()?;
        let mean = |sum: &Superaccumulator| sum.value() / self.count() as f64;
        Ok(self.norms.iter().map(mean).collect())
    }

    /// The sums of the norms as words, for storage.
    pub fn norms_to_words(&self) -> Vec<u64> {
        self.norms
            .iter()
            .flat_map(Superaccumulator::to_words)
            .collect()
    }

    /// The sums of a metric as words for storage: four a pair for the sequences of one sample,
    /// and behind them, if there are sequences of several, eight a pair for those.
    pub fn to_words(&self, metric: Metric) -> Result<Vec<u64>, Error> {
        let sums = self.sums_of(metric)?;
        let alone = sums.pairs.iter().flat_map(|sum| sum.to_words());
        let several = sums.several.iter().flat_map(|sum| sum.to_words());
        Ok(alone.chain(several).collect())
    }

    /// Rebuilds an accumulator from stored sums; refuses sums that no samples can have.
    pub fn from_words(
        num_states: usize,
        lengths: Lengths,
        rejected: u64,
        stored: &[(Metric, Vec<u64>)],
        norms: &[u64],
    ) -> Result<Self, Error> {
        let metrics: Vec<Metric> = stored.iter().map(|&(metric, _)| metric).collect();
        let mut this = Self::new(num_states, &metrics)?;
        if !lengths.are_possible() {
            return Err(Error::DamagedLengths);
        }
        let samples = lengths.alone.saturating_add(lengths.samples);
        this.check_room(samples.saturating_add(rejected))?;
        (this.lengths, this.rejected) = (lengths, rejected);
        let words_a_pair = if lengths.several > 0 { 12 } else { 4 };
        for (sums, (metric, words)) in this.sums.iter_mut().zip(stored) {
            let damaged = |what| Error::DamagedSums {
                metric: metric.name(),
                what,
            };
            if words.len() != words_a_pair * sums.pairs.len() {
                return Err(damaged(format!(
                    "{} words for {} pairs",
                    words.len(),
                    sums.pairs.len()
                )));
            }
            let (alone, several) = words.split_at(4 * sums.pairs.len());
            for (pair, &words) in sums.pairs.iter_mut().zip(alone.as_chunks().0) {
                *pair = ExactSum::from_words(words, lengths.alone)
                    .map_err(|what| damaged(what.to_owned()))?;
            }
            sums.several = several
                .as_chunks()
                .0
                .iter()
                .map(|&words| SequenceSum::from_words(words, lengths))
                .collect::<Result<_, _>>()
                .map_err(|what| damaged(what.to_owned()))?;
            let units = sums.pairs.iter().map(ExactSum::units);
            let mut all = units.chain(sums.several.iter().map(SequenceSum::units));
            if !metric.can_be_negative() && all.any(|units| units < 0) {
                return Err(damaged("a sum is negative".to_owned()));
            }
        }
        this.norms_from_words(norms)?;
        Ok(this)
    }

    fn norms_from_words(&mut self, words: &[u64]) -> Result<(), Error> {
        let (whole, rest) = words.as_chunks::<{ Superaccumulator::WORDS }>();
        if whole.len() != self.num_states || !rest.is_empty() {
            return Err(Error::DamagedNorms);
        }
        let count = self.count();
        for (sum, words) in self.norms.iter_mut().zip(whole) {
            *sum = Superaccumulator::from_words(words).ok_or(Error::DamagedNorms)?;
            let mean = sum.value() / count.max(1) as f64;
            let usable = if count == 0 { 0.0..=0.0 } else { NORMS };
            if !usable.contains(&mean) {
                return Err(Error::DamagedNorms);
            }
        }
        Ok(())
    }

    fn check_room(&self, samples: u64) -> Result<(), Error> {
        let total = (self.count() + self.rejected).saturating_add(samples);
        if total > MAX_SAMPLES {
            return Err(Error::TooManySamples);
        }
        Ok(())
    }

    fn check_lengths(&self, sequences: &[i64]) -> Result<(), Error> {
        let mut before = self.open.as_ref();
        for run in sequences.chunk_by(|left, right| left == right) {
            let open = before.take().filter(|open| open.number == run[0]);
            let length = open.map_or(0, |open| open.samples) + run.len() as u64;
            if length > MAX_SEQUENCE {
                return Err(Error::SequenceTooLong(run[0]));
            }
        }
        Ok(())
    }

    fn add_sums(&mut self, other: &Self) {
        self.lengths.add(other.lengths);
        self.rejected += other.rejected;
        for (sums, others) in self.sums.iter_mut().zip(&other.sums) {
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

    fn sums_of(&self, metric: Metric) -> Result<&MetricSums, Error> {
        let held = || Error::MetricNotHeld {
            wanted: metric.name(),
            held: names(&self.metrics()),
        };
        self.sums
            .iter()
            .find(|sums| sums.metric == metric)
            .ok_or_else(held)
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

    fn pair_index(&self, first: usize, second: usize) -> usize {
        first * (2 * self.num_states - first - 1) / 2 + second - first - 1
    }

    fn matrix(&self, diagonal: f64, value: impl Fn(usize) -> f64) -> Vec<f64> {
        let size = self.num_states;
        let mut matrix = vec![diagonal; size * size];
        for first in 0..size {
            for second in first + 1..size {
                let entry = value(self.pair_index(first, second));
                matrix[first * size + second] = entry;
                matrix[second * size + first] = entry;
            }
        }
        matrix
    }
}
