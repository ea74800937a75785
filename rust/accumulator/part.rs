//! What one thread adds up before it is added to the rest.

use super::{Accumulator, MetricSums, num_pairs};
use crate::error::{Reason, Rejection};
use crate::exact::{BlockSums, add_rounded};
use crate::gram::Gram;
use crate::kernels::{Kernels, Work};
use crate::sequence::Sequence;
use crate::states::{Element, States};

/// A range of samples, added up.
pub(super) struct Part {
    gram: Gram,
    fractions: Vec<f64>,
    blocks: Vec<BlockSums>,
    pub sums: Accumulator,
    undrained: u32,
    pub rejections: Vec<Rejection>,
    /// The values of all pairs of the samples added, a vector for each metric, if they are kept.
    pub kept: Vec<Vec<f32>>,
    /// The first and the last sequence, if there are any: they may go on in other parts.
    pub ends: Vec<Sequence>,
    /// What the last sequence has more than its sums, for each metric.
    lanes: Vec<Vec<i64>>,
}

impl Part {
    pub fn new(whole: &Accumulator, keep: bool) -> Self {
        let pairs = num_pairs(whole.num_states);
        Self {
            undrained: 0,
            ends: Vec::new(),
            lanes: Vec::new(),
            gram: Gram::new(whole.num_states, whole.tier),
            fractions: vec![0.0; pairs],
            blocks: whole.sums.iter().map(|_| BlockSums::new(pairs)).collect(),
            sums: whole.empty(),
            rejections: Vec::new(),
            kept: vec![Vec::new(); if keep { whole.sums.len() } else { 0 }],
        }
    }

    /// Adds a sample, to the sequence of this number if there are sequences.
    pub fn add<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
        sequence: Option<i64>,
    ) {
        if let Some(number) = sequence {
            self.enter(number);
        }
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
        self.undrained += 1;
        if self.undrained == BlockSums::MAX_SAMPLES {
            self.drain();
        }
    }

    /// Begins the sequence of this number, if it is not the last one.
    fn enter(&mut self, number: i64) {
        if self.ends.last().is_some_and(|last| last.number == number) {
            return;
        }
        self.drain_lanes();
        let pairs = num_pairs(self.sums.num_states);
        let metrics = self.sums.sums.len();
        self.lanes.resize(metrics, vec![0; pairs]);
        self.ends.push(Sequence::new(number, metrics, pairs));
        self.settle();
    }

    /// Adds the sequences that can go on nowhere else.
    fn settle(&mut self) {
        while self.ends.len() > 2 {
            let inner = self.ends.remove(1);
            self.sums.add_sequence(&inner);
            self.sums.keep(&inner, &mut self.kept);
        }
    }

    fn drain_lanes(&mut self) {
        if let Some(last) = self.ends.last_mut() {
            for (lanes, sums) in self.lanes.iter_mut().zip(&mut last.sums) {
                for (lane, sum) in lanes.iter_mut().zip(sums) {
                    *sum += i128::from(std::mem::take(lane));
                }
            }
        }
    }

    fn drain(&mut self) {
        self.undrained = 0;
        self.drain_lanes();
        for (block, sums) in self.blocks.iter_mut().zip(&mut self.sums.sums) {
            block.drain_into(&mut sums.pairs);
        }
        for norm in &mut self.sums.norms {
            norm.carry();
        }
    }

    /// The part once its sums are complete.
    pub fn drained(mut self) -> Self {
        self.drain();
        self
    }

    /// Adds the range that follows, both parts being drained.
    pub fn append(&mut self, next: Self) {
        let mut ends = next.ends.into_iter();
        if let Some(first) = ends.next() {
            match self.ends.last_mut() {
                Some(last) if last.number == first.number => last.join(&first),
                _ => self.ends.push(first),
            }
        }
        self.ends.extend(ends);
        self.settle();
        self.sums.add_sums(&next.sums);
        self.rejections.extend(next.rejections);
        append(&mut self.kept, next.kept);
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
            ends,
            lanes,
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
            gram.fractions::<K>(sums.metric, fractions);
            if let Some(lanes) = lanes.get_mut(place) {
                add_rounded(lanes, fractions);
                continue;
            }
            block.add(fractions);
            if let Some(kept) = kept.get_mut(place) {
                let range = sums.metric.range();
                kept.extend(fractions.iter().map(|fraction| (fraction * range) as f32));
            }
        }
        for (sum, &norm) in sums.norms.iter_mut().zip(gram.norms()) {
            sum.add_uncarried(norm);
        }
        match ends.last_mut() {
            Some(sequence) => sequence.samples += 1,
            None => sums.lengths.alone += 1,
        }
        Ok(())
    }
}

/// Appends what is kept of each metric.
pub(super) fn append(to: &mut [Vec<f32>], from: Vec<Vec<f32>>) {
    for (to, from) in to.iter_mut().zip(from) {
        to.extend(from);
    }
}
