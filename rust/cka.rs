//! Linear CKA of all pairs of layers across samples, from minibatches (Nguyen, Raghu,
//! Kornblith, 2010.15327, eq. 2 and 3).
//!
//! `CKA(l, m) = sum HSIC_1(K_l, K_m) / sqrt(sum HSIC_1(K_l, K_l) · sum HSIC_1(K_m, K_m))` over
//! the minibatches, where `K_l` holds the dot products of the samples' states `l`, and `HSIC_1`
//! is the unbiased estimator of Song et al. (JMLR 13, 2012). It is the dot product of the
//! U-centred matrices (Székely, Rizzo, 2014, eq. 4.3), which loses no digits to what all
//! samples have in common.
//!
//! HSIC has no bounds, so its sums are [`Superaccumulator`]s: the same bits in whatever order.

use rayon::prelude::*;

use crate::bytes::{Words, bytes, mark};
use crate::error::Error;
use crate::limits::{MAX_BATCH, MAX_SAMPLES, MIN_BATCH};
use crate::states::{Element, States, check_num_states};
use crate::superaccumulator::Superaccumulator;

const MARK: u64 = mark(*b"cka v.1.");

/// Columns of the states that are widened at a time.
const CHUNK: usize = 256;

/// Sums of `HSIC_1` over minibatches, for all pairs of states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cka {
    num_states: usize,
    batch_size: usize,
    batches: u64,
    samples: u64,
    /// Pairs `(l, m)`, `l <= m`, row by row.
    sums: Vec<Superaccumulator>,
}

impl Cka {
    /// No sums yet, of minibatches of `batch_size` samples.
    pub fn new(num_states: usize, batch_size: usize) -> Result<Self, Error> {
        check_sizes(num_states, batch_size)?;
        Ok(Self {
            num_states,
            batch_size,
            batches: 0,
            samples: 0,
            sums: vec![Superaccumulator::default(); num_sums(num_states)],
        })
    }

    /// States a sample, `L + 1`.
    pub fn num_states(&self) -> usize {
        self.num_states
    }

    /// Samples in a minibatch; the last one may be smaller.
    pub fn batch_size(&self) -> usize {
        self.batch_size
    }

    /// Minibatches in the sums.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Samples in the minibatches.
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// Adds one minibatch, of 4 samples to the batch size, on the current rayon pool. All must
    /// be finite.
    pub fn update<T: Element>(&mut self, states: &States<'_, T>) -> Result<(), Error> {
        if states.num_states() != self.num_states {
            return Err(Error::StateCount {
                expected: self.num_states,
                actual: states.num_states(),
            });
        }
        let size = states.num_samples();
        if !(MIN_BATCH..=self.batch_size).contains(&size) {
            return Err(Error::CkaBatch(size));
        }
        let centred: Vec<Vec<f64>> = (0..self.num_states)
            .into_par_iter()
            .map(|state| u_centred(size, &products(states, state)))
            .collect();
        // Every pair of samples stands for two entries of the matrices.
        let divisor = (size * (size - 3)) as f64 / 2.0;
        let pairs: Vec<(usize, usize)> = (0..self.num_states)
            .flat_map(|l| (l..self.num_states).map(move |m| (l, m)))
            .collect();
        let hsic = |&(l, m): &(usize, usize)| dot(&centred[l], &centred[m]) / divisor;
        let added: Vec<f64> = pairs.par_iter().map(hsic).collect();
        if !added.iter().all(|value| value.is_finite()) {
            return Err(Error::CkaOverflow);
        }
        self.sums
            .par_iter_mut()
            .zip(added)
            .for_each(|(sum, value)| sum.add(value));
        self.batches += 1;
        self.samples += size as u64;
        Ok(())
    }

    /// Adds another's minibatches; the same bits in whatever order.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        let kind = |cka: &Self| (cka.num_states, cka.batch_size);
        if kind(self) != kind(other) {
            let name = |cka: &Self| format!("{} of {} states", cka.batch_size, cka.num_states);
            return Err(Error::Unmergeable {
                what: "different minibatches for CKA",
                left: name(self),
                right: name(other),
            });
        }
        self.batches += other.batches;
        self.samples += other.samples;
        self.sums
            .iter_mut()
            .zip(&other.sums)
            .for_each(|(sum, addend)| sum.merge(addend));
        Ok(())
    }

    /// The matrix, `(L + 1)²` values row by row, symmetric, in `[-1, 1]`; NaN for states that
    /// were the same in all samples of each minibatch.
    pub fn values(&self) -> Result<Vec<f64>, Error> {
        if self.batches == 0 {
            return Err(Error::NoCkaBatch);
        }
        let size = self.num_states;
        let mut sums = self.sums.iter().map(Superaccumulator::value);
        let mut values = vec![0.0; size * size];
        for l in 0..size {
            for m in l..size {
                values[l * size + m] = sums.next().unwrap_or(f64::NAN);
            }
        }
        let norms: Vec<f64> = (0..size).map(|l| values[l * size + l].sqrt()).collect();
        for l in 0..size {
            for m in l..size {
                let product = norms[l] * norms[m];
                let value = (values[l * size + m] / product).clamp(-1.0, 1.0);
                let value = if l == m && product > 0.0 { 1.0 } else { value };
                values[l * size + m] = value;
                values[m * size + l] = value;
            }
        }
        Ok(values)
    }

    /// The sums as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let sizes = [self.num_states as u64, self.batch_size as u64];
        let head = [MARK, sizes[0], sizes[1], self.batches, self.samples];
        let sums = self.sums.iter().flat_map(Superaccumulator::to_words);
        bytes(head.into_iter().chain(sums))
    }

    /// The sums that these are the bytes of; refuses what no minibatches give.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut words = Words::new(bytes);
        let ended = || Error::StoredLength {
            what: "sums for CKA",
            bytes: bytes.len(),
        };
        let [mark, num_states, batch_size, batches, samples] = words.take().ok_or_else(ended)?;
        if mark != MARK {
            return Err(Error::StoredMark("sums for CKA"));
        }
        let size = |stored| usize::try_from(stored).unwrap_or(usize::MAX);
        let (num_states, batch_size) = (size(num_states), size(batch_size));
        check_sizes(num_states, batch_size)?;
        if words.left() != 8 * Superaccumulator::WORDS * num_sums(num_states) {
            return Err(ended());
        }
        let most = batches.saturating_mul(batch_size as u64);
        let least = batches.saturating_mul(MIN_BATCH as u64);
        if !(least..=most.min(MAX_SAMPLES)).contains(&samples) {
            return Err(Error::DamagedCka);
        }
        let mut this = Self::new(num_states, batch_size)?;
        (this.batches, this.samples) = (batches, samples);
        for sum in &mut this.sums {
            let stored = words.take().ok_or_else(ended)?;
            *sum = Superaccumulator::from_words(&stored).ok_or(Error::DamagedCka)?;
        }
        let mut diagonal = 0;
        for state in 0..num_states {
            let norm = this.sums[diagonal].value();
            if !norm.is_finite() || norm < 0.0 {
                return Err(Error::DamagedCka);
            }
            diagonal += num_states - state;
        }
        Ok(this)
    }
}

fn check_sizes(num_states: usize, batch_size: usize) -> Result<(), Error> {
    check_num_states(num_states)?;
    if !(MIN_BATCH..=MAX_BATCH).contains(&batch_size) {
        return Err(Error::CkaBatch(batch_size));
    }
    Ok(())
}

/// Pairs `(l, m)`, `l <= m`.
fn num_sums(num_states: usize) -> usize {
    num_states * (num_states + 1) / 2
}

/// The dot products of one state of all samples, `(i, j)`, `i < j`, row by row, less the mean
/// of the samples; their differences from the first sample are exactly zero if all are equal.
fn products<T: Element>(states: &States<'_, T>, state: usize) -> Vec<f64> {
    let size = states.num_samples();
    let mut products = vec![0.0; size * (size - 1) / 2];
    let mut rows = vec![[0.0; CHUNK]; size];
    for start in (0..states.width()).step_by(CHUNK) {
        let length = CHUNK.min(states.width() - start);
        let mut mean = [0.0; CHUNK];
        for (sample, row) in rows.iter_mut().enumerate() {
            let values = &states.row(sample, state)[start..start + length];
            let first = &states.row(0, state)[start..start + length];
            for (place, (value, first)) in values.iter().zip(first).enumerate() {
                row[place] = value.widen() - first.widen();
                mean[place] += row[place] / size as f64;
            }
        }
        for row in &mut rows {
            row[..length]
                .iter_mut()
                .zip(&mean)
                .for_each(|(value, mean)| *value -= mean);
            row[length..].fill(0.0);
        }
        let mut left = products.as_mut_slice();
        for (index, row) in rows.iter().enumerate() {
            let (here, rest) = left.split_at_mut(size - index - 1);
            add_dots(here, row, &rows[index + 1..]);
            left = rest;
        }
    }
    products
}

/// Adds the dot products of a row with others, four at a time.
fn add_dots(products: &mut [f64], row: &[f64; CHUNK], others: &[[f64; CHUNK]]) {
    const LANES: usize = 4;
    let (some, rest) = others.as_chunks::<4>();
    let mut products = products.iter_mut();
    for four in some {
        let mut lanes = [[0.0; LANES]; 4];
        for at in (0..CHUNK).step_by(LANES) {
            for (lanes, other) in lanes.iter_mut().zip(four) {
                for lane in 0..LANES {
                    lanes[lane] += row[at + lane] * other[at + lane];
                }
            }
        }
        for (lanes, product) in lanes.iter().zip(products.by_ref()) {
            *product += lanes.iter().sum::<f64>();
        }
    }
    products
        .zip(rest)
        .for_each(|(product, other)| *product += dot(row, other));
}

/// Off the diagonal of a U-centred matrix: less the mean of its row, and of its column, and
/// plus that of all, each over what an unbiased estimate divides by.
fn u_centred(size: usize, products: &[f64]) -> Vec<f64> {
    let pairs = || (0..size).flat_map(|i| (i + 1..size).map(move |j| (i, j)));
    let mut rows = vec![0.0; size];
    for ((i, j), product) in pairs().zip(products) {
        rows[i] += product;
        rows[j] += product;
    }
    let n = size as f64;
    let all = rows.iter().sum::<f64>() / ((n - 1.0) * (n - 2.0));
    let centred =
        |((i, j), product): ((usize, usize), &f64)| product - (rows[i] + rows[j]) / (n - 2.0) + all;
    pairs().zip(products).map(centred).collect()
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    for (left, right) in left.chunks(lanes.len()).zip(right.chunks(lanes.len())) {
        for ((lane, x), y) in lanes.iter_mut().zip(left).zip(right) {
            *lane += x * y;
        }
    }
    lanes.iter().sum()
}
