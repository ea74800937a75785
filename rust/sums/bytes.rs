//! [`Sums`] as bytes: the body of a scan file, of a resumed scan, and of what is gathered.
//!
//! Words of 64 bits: a mark; the states; the lengths of the sequences; the samples rejected; the
//! metrics, a number and their names; the sums of the norms; and for each metric the sums of all
//! pairs over sequences of one sample, and behind them, if there are sequences of several, over
//! those.

use super::{Sums, check_metrics, num_pairs};
use crate::bytes::{Words, bytes, mark};
use crate::error::Error;
use crate::exact::ExactSum;
use crate::gram::NORMS;
use crate::metric::Metric;
use crate::sequence::{Lengths, SequenceSum};
use crate::states::check_num_states;
use crate::superaccumulator::Superaccumulator;

const MARK: u64 = mark(*b"sums v.1");

/// Words of a metric's name, filled up with zeros.
const NAME: usize = 2;

impl Sums {
    /// The sums as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let Lengths {
            alone,
            several,
            samples,
            squares,
        } = self.lengths;
        let states = self.num_states as u64;
        let metrics = self.metrics.len() as u64;
        let head = [
            MARK,
            states,
            alone,
            several,
            samples,
            squares,
            self.rejected,
            metrics,
        ];
        let names = self.metrics.iter().flat_map(|sums| name(sums.metric));
        let norms = self.norms.iter().flat_map(Superaccumulator::to_words);
        let sums = self.metrics.iter().flat_map(|sums| {
            let alone = sums.pairs.iter().flat_map(|sum| sum.to_words());
            let several = sums.several.iter().flat_map(|sum| sum.to_words());
            alone.chain(several)
        });
        bytes(head.into_iter().chain(names).chain(norms).chain(sums))
    }

    /// The sums that these are the bytes of; refuses sums that no samples can have.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut words = Words::new(bytes);
        let ended = || Error::StoredLength {
            what: "sums",
            bytes: bytes.len(),
        };
        let head = words.take().ok_or_else(ended)?;
        let [
            found,
            states,
            alone,
            several,
            samples,
            squares,
            rejected,
            metrics,
        ] = head;
        if found != MARK {
            return Err(Error::StoredMark("sums"));
        }
        let lengths = Lengths {
            alone,
            several,
            samples,
            squares,
        };
        let metrics = (0..metrics.min(1 + Metric::ALL.len() as u64))
            .map(|_| metric(words.take().ok_or_else(ended)?))
            .collect::<Result<Vec<_>, _>>()?;
        let num_states = usize::try_from(states).unwrap_or(usize::MAX);
        check_num_states(num_states)?;
        check_metrics(&metrics)?;
        let words_a_pair = 4 + if several > 0 { SequenceSum::WORDS } else { 0 };
        let words_of_norms = num_states * Superaccumulator::WORDS;
        let expected = words_of_norms + metrics.len() * num_pairs(num_states) * words_a_pair;
        if words.left() != 8 * expected {
            return Err(ended());
        }
        let mut this = Self::new(num_states, &metrics)?;
        if !lengths.are_possible() {
            return Err(Error::DamagedLengths);
        }
        let samples = lengths.alone.saturating_add(lengths.samples);
        this.check_room(samples.saturating_add(rejected))?;
        (this.lengths, this.rejected) = (lengths, rejected);
        this.take_norms(&mut words).ok_or(Error::DamagedNorms)?;
        for (place, metric) in metrics.iter().enumerate() {
            this.take_pairs(place, &mut words).map_err(|what| {
                let metric = metric.name();
                Error::DamagedSums { metric, what }
            })?;
        }
        Ok(this)
    }

    fn take_norms(&mut self, words: &mut Words<'_>) -> Option<()> {
        let count = self.count();
        let usable = if count == 0 { 0.0..=0.0 } else { NORMS };
        for sum in &mut self.norms {
            *sum = Superaccumulator::from_words(&words.take()?)?;
            let mean = sum.value() / count.max(1) as f64;
            usable.contains(&mean).then_some(())?;
        }
        Some(())
    }

    fn take_pairs(&mut self, place: usize, words: &mut Words<'_>) -> Result<(), &'static str> {
        const ENDED: &str = "they end early";
        let lengths = self.lengths;
        let sums = &mut self.metrics[place];
        for sum in &mut sums.pairs {
            *sum = ExactSum::from_words(words.take().ok_or(ENDED)?, lengths.alone)?;
        }
        if lengths.several > 0 {
            for sum in sums.several_mut() {
                *sum = SequenceSum::from_words(words.take().ok_or(ENDED)?, lengths)?;
            }
        }
        let units = sums.pairs.iter().map(ExactSum::units);
        let mut all = units.chain(sums.several.iter().map(SequenceSum::units));
        if !sums.metric.can_be_negative() && all.any(|units| units < 0) {
            return Err("a sum is negative");
        }
        Ok(())
    }
}

fn name(metric: Metric) -> [u64; NAME] {
    let mut letters = [0; 8 * NAME];
    letters[..metric.name().len()].copy_from_slice(metric.name().as_bytes());
    let (words, _) = letters.as_chunks();
    std::array::from_fn(|place| u64::from_le_bytes(words[place]))
}

fn metric(stored: [u64; NAME]) -> Result<Metric, Error> {
    let known = Metric::ALL
        .into_iter()
        .find(|&metric| name(metric) == stored);
    known.map_or_else(
        || {
            String::from_utf8_lossy(&bytes(stored))
                .trim_end_matches('\0')
                .parse()
        },
        Ok,
    )
}
