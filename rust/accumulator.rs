//! Samples into sums, on any number of threads.

mod part;

use rayon::prelude::*;

use self::part::{Part, Range, Workspaces, append};
use crate::error::{Error, Rejection};
use crate::exact::SCALE;
use crate::kernels::Tier;
use crate::limits::MAX_SEQUENCE;
use crate::metric::Metric;
use crate::sequence::Sequence;
use crate::states::{Element, States};
use crate::sums::Sums;

/// [`Sums`] that samples are added to.
#[derive(Debug, Clone)]
pub struct Accumulator {
    tier: Tier,
    sums: Sums,
    /// The last sequence, which is in the sums as far as it has come, and may go on. If it does, it
    /// is taken out and added again when it is longer, so states can be split anywhere.
    open: Option<Sequence>,
    /// One a thread at most; they live as long as this does.
    workspaces: Workspaces,
}

impl Accumulator {
    /// An accumulator without samples, which will have `num_states = L + 1` states each.
    pub fn new(num_states: usize, metrics: &[Metric]) -> Result<Self, Error> {
        Ok(Self {
            tier: Tier::chosen()?,
            sums: Sums::new(num_states, metrics)?,
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

    /// The sums of all samples so far.
    pub fn sums(&self) -> &Sums {
        &self.sums
    }

    /// The sums of all samples.
    pub fn into_sums(self) -> Sums {
        self.sums
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
    /// The sum over each sequence is kept, if anything, but none of one that adds no sample. Also
    /// says whether the first one kept takes the place of the last one kept before, which has gone
    /// on.
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

    /// Adds the samples of other sums, as [`Sums::merge`] does.
    pub fn merge(&mut self, other: &Sums) -> Result<(), Error> {
        self.sums.merge(other)?;
        self.open = None;
        Ok(())
    }

    /// Counts samples that never became states, such as empty texts.
    pub fn reject(&mut self, samples: u64) -> Result<(), Error> {
        self.sums.reject(samples)
    }

    fn add_batch<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sequences: Option<&[i64]>,
        kept: Option<&mut [Vec<f32>]>,
    ) -> Result<(Vec<Rejection>, bool), Error> {
        if states.num_states() != self.sums.num_states() {
            return Err(Error::StateCount {
                expected: self.sums.num_states(),
                actual: states.num_states(),
            });
        }
        self.sums.check_room(states.num_samples() as u64)?;
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
            .unwrap_or_else(|| Range::new(&self.sums, keep));
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
            self.sums.subtract_sequence(&open);
            first.join(&open);
            goes_on = open.samples > 0;
        }
        self.sums.add_sums(&sums);
        for end in &ends {
            self.sums.add_sequence(end);
        }
        if let Some(kept) = kept {
            if let Some(first) = ends.first() {
                keep_sequence(&self.sums, first, kept);
            }
            append(kept, inner);
            if let [_, last] = ends.as_slice() {
                keep_sequence(&self.sums, last, kept);
            }
        }
        if let Some(last) = ends.pop() {
            self.open = Some(last);
        }
        rejections.sort_by_key(|rejection| rejection.sample);
        Ok((rejections, goes_on))
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
}

/// Appends the sums over a sequence, if it has samples, to the vector of their metric.
fn keep_sequence(sums: &Sums, sequence: &Sequence, kept: &mut [Vec<f32>]) {
    if sequence.samples == 0 {
        return;
    }
    for ((kept, units), sums) in kept.iter_mut().zip(&sequence.sums).zip(&sums.metrics) {
        let range = sums.metric.range();
        let value = |&units: &i128| (units as f64 / SCALE * range) as f32;
        kept.extend(units.iter().map(value));
    }
}
