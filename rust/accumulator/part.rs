//! The part that one thread adds up before it joins the rest.

use std::sync::Mutex;

use super::{Accumulator, keep_sequence};
use crate::error::{Reason, Rejection};
use crate::exact::{BlockSums, add_rounded};
use crate::gram::Gram;
use crate::kernels::{Kernels, Tier, Work};
use crate::sequence::Sequence;
use crate::states::{Element, States};
use crate::sums::{MetricSums, Sums, num_pairs};

/// Memory for comparing samples, its sums empty between two ranges: new memory costs the system
/// more than it costs to use it.
#[derive(Debug)]
struct Workspace {
    gram: Gram,
    fractions: Vec<f64>,
    blocks: Vec<BlockSums>,
}

/// The workspaces that nobody uses, all of one accumulator.
#[derive(Debug, Default)]
pub(super) struct Workspaces(Mutex<Vec<Workspace>>);

/// A copy makes its own.
impl Clone for Workspaces {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Workspaces {
    fn take(&self, whole: &Accumulator) -> Workspace {
        let spare = self.0.lock().ok().and_then(|mut spare| spare.pop());
        spare.unwrap_or_else(|| {
            let (num_states, metrics) = (whole.sums.num_states(), whole.sums.metrics.iter());
            let pairs = num_pairs(num_states);
            Workspace {
                gram: Gram::new(num_states, whole.tier),
                fractions: vec![0.0; pairs],
                blocks: metrics.map(|_| BlockSums::new(pairs)).collect(),
            }
        })
    }

    fn give_back(&self, workspace: Workspace) {
        if let Ok(mut spare) = self.0.lock() {
            spare.push(workspace);
        }
    }
}

/// A range of samples that is being added up.
pub(super) struct Part {
    tier: Tier,
    workspace: Workspace,
    range: Range,
    undrained: u32,
    /// Excess of the last sequence over its sums, for each metric.
    lanes: Vec<Vec<i64>>,
}

/// A range of samples, added up.
pub(super) struct Range {
    pub sums: Sums,
    pub rejections: Vec<Rejection>,
    /// The values of all pairs of the samples added, a vector for each metric, if they are kept.
    pub kept: Vec<Vec<f32>>,
    /// The first and the last sequence, if there are any: they may go on in other ranges.
    pub ends: Vec<Sequence>,
}

impl Part {
    pub fn new(whole: &Accumulator, keep: bool) -> Self {
        Self {
            tier: whole.tier,
            workspace: whole.workspaces.take(whole),
            range: Range::new(&whole.sums, keep),
            undrained: 0,
            lanes: Vec::new(),
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
        let compared = self.workspace.gram.compute(states, sample);
        let added = compared.and_then(|()| self.tier.run(AddCompared(self)));
        if let Err((state, reason)) = added {
            self.range.sums.rejected += 1;
            self.range.rejections.push(Rejection {
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
        let ends = &self.range.ends;
        if ends.last().is_some_and(|last| last.number == number) {
            return;
        }
        self.drain_lanes();
        let pairs = num_pairs(self.range.sums.num_states());
        let metrics = self.range.sums.metrics.len();
        self.lanes.resize(metrics, vec![0; pairs]);
        self.range.ends.push(Sequence::new(number, metrics, pairs));
        self.range.settle();
    }

    fn drain_lanes(&mut self) {
        if let Some(last) = self.range.ends.last_mut() {
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
        let sums = &mut self.range.sums;
        for (block, sums) in self.workspace.blocks.iter_mut().zip(&mut sums.metrics) {
            block.drain_into(&mut sums.pairs);
        }
        for norm in &mut sums.norms {
            norm.carry();
        }
    }

    /// The range once its sums are complete.
    pub fn finish(mut self, workspaces: &Workspaces) -> Range {
        self.drain();
        workspaces.give_back(self.workspace);
        self.range
    }
}

impl Range {
    pub fn new(whole: &Sums, keep: bool) -> Self {
        Self {
            sums: whole.empty(),
            rejections: Vec::new(),
            kept: vec![Vec::new(); if keep { whole.metrics.len() } else { 0 }],
            ends: Vec::new(),
        }
    }

    /// Adds the sequences that can go on nowhere else.
    fn settle(&mut self) {
        while self.ends.len() > 2 {
            let inner = self.ends.remove(1);
            self.sums.add_sequence(&inner);
            keep_sequence(&self.sums, &inner, &mut self.kept);
        }
    }

    /// Adds the range that follows.
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

/// Adds the sample that the Gram matrix has compared.
struct AddCompared<'p>(&'p mut Part);

impl Work for AddCompared<'_> {
    type Output = Result<(), (usize, Reason)>;

    #[inline(always)]
    fn run<K: Kernels>(self) -> Self::Output {
        let Part {
            workspace,
            range,
            lanes,
            ..
        } = self.0;
        let Workspace {
            gram,
            fractions,
            blocks,
        } = workspace;
        let Range {
            sums, kept, ends, ..
        } = range;
        let of_norms = |sums: &MetricSums| sums.metric.range() > 1.0;
        if sums.metrics.iter().any(of_norms)
            && let Some(state) = gram.ratio_out_of_range()
        {
            return Err((state, Reason::RatioOutOfRange));
        }
        for (place, (sums, block)) in sums.metrics.iter().zip(blocks).enumerate() {
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
