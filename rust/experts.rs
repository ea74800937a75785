//! Sums over the tokens that were sent to each expert of each layer, with what their errors by
//! text are made of.
//!
//! Of a text `t` an expert has `n_t` tokens, and of each of several values the sum `x_t` over
//! them. Over texts are kept `Σ n_t` and `Σ n_t²` in integers, and `Σ x_t` and, for errors, `Σ x_t²`
//! and `Σ x_t n_t` in [`Superaccumulator`]s: the same bits in whatever order texts come, and of
//! whatever parts the sums are merged.

use crate::bytes::{Words, bytes, mark};
use crate::error::Error;
use crate::limits::{MAX_EXPERT_SUMS, MAX_EXPERT_VALUES, MAX_SAMPLES, MAX_STATES};
use crate::superaccumulator::Superaccumulator;

const MARK: u64 = mark(*b"moe v.2.");

/// The tokens of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count {
    sum: u64,
    square: u128,
}

/// Which of the sums over texts, in the order in which they are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// `Σ x_t`.
    Sum,
    /// `Σ x_t²`.
    Square,
    /// `Σ x_t n_t`.
    Product,
}

/// Sums of values over the tokens of every expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpertSums {
    layers: usize,
    experts: usize,
    num_values: usize,
    /// 3, or 1 where no errors are wanted.
    num_moments: usize,
    /// Texts that each layer has seen.
    texts: Vec<u64>,
    /// By layer, then expert.
    counts: Vec<Count>,
    /// By layer, then expert, then value, then moment.
    sums: Vec<Superaccumulator>,
}

impl ExpertSums {
    /// No sums yet, of `num_values` values; without `errors` of [`Moment::Sum`] alone.
    pub fn new(
        layers: usize,
        experts: usize,
        num_values: usize,
        errors: bool,
    ) -> Result<Self, Error> {
        check_sizes(layers, experts, num_values, errors)?;
        let num_moments = num_moments(errors);
        let num_sums = layers * experts * num_values * num_moments;
        Ok(Self {
            layers,
            experts,
            num_values,
            num_moments,
            texts: vec![0; layers],
            counts: vec![Count::default(); layers * experts],
            sums: vec![Superaccumulator::default(); num_sums],
        })
    }

    /// Layers, experts of a layer, and values.
    pub fn shape(&self) -> [usize; 3] {
        [self.layers, self.experts, self.num_values]
    }

    /// Texts that each layer has seen.
    pub fn texts(&self) -> &[u64] {
        &self.texts
    }

    /// Adds texts to a layer: `counts` are (texts, experts), `values` (texts, experts, values).
    ///
    /// An expert's part of a text is left out if a value, or the product of two, is NaN or
    /// infinite; gives how many were.
    pub fn update(&mut self, layer: usize, counts: &[u64], values: &[f64]) -> Result<u64, Error> {
        let texts = counts.len() / self.experts;
        let fits = layer < self.layers
            && counts.len() == texts * self.experts
            && values.len() == counts.len() * self.num_values;
        if !fits {
            return Err(Error::ExpertUpdate {
                layer,
                counts: counts.len(),
                values: values.len(),
            });
        }
        let all = self.texts[layer] + texts as u64;
        if all > MAX_SAMPLES || counts.iter().any(|&count| count > MAX_SAMPLES) {
            return Err(Error::TooManySamples);
        }
        self.texts[layer] = all;
        let first = layer * self.experts;
        let mut left_out = 0;
        for (place, (&count, some)) in counts
            .iter()
            .zip(values.chunks_exact(self.num_values))
            .enumerate()
        {
            if count == 0 {
                continue;
            }
            let tokens = count as f64;
            if !some.iter().all(|&value| is_summable(value, tokens)) {
                left_out += 1;
                continue;
            }
            let cell = first + place % self.experts;
            self.counts[cell].sum += count;
            self.counts[cell].square += u128::from(count) * u128::from(count);
            let first_sum = cell * self.num_sums();
            let of_value = self.sums[first_sum..].chunks_exact_mut(self.num_moments);
            for (sums, &value) in of_value.zip(some) {
                let moments = [value, value * value, value * tokens];
                for (sum, addend) in sums.iter_mut().zip(moments) {
                    sum.add(addend);
                }
            }
        }
        Ok(left_out)
    }

    /// Adds another's texts; the same bits in whatever order.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        if self.shape() != other.shape() || self.num_moments != other.num_moments {
            let name = |sums: &Self| format!("{} layers of {}", sums.layers, sums.experts);
            return Err(Error::Unmergeable {
                what: "different experts",
                left: name(self),
                right: name(other),
            });
        }
        let too_many = |(mine, theirs): (&u64, &u64)| mine + theirs > MAX_SAMPLES;
        if self.texts.iter().zip(&other.texts).any(too_many) {
            return Err(Error::TooManySamples);
        }
        for (mine, theirs) in self.texts.iter_mut().zip(&other.texts) {
            *mine += theirs;
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            mine.sum += theirs.sum;
            mine.square += theirs.square;
        }
        for (mine, theirs) in self.sums.iter_mut().zip(&other.sums) {
            *mine += theirs;
        }
        Ok(())
    }

    /// Forgets what was summed of one value, as if it had been zero.
    pub fn clear(&mut self, value: usize) {
        let of_value = self.sums.chunks_exact_mut(self.num_moments).skip(value);
        if value < self.num_values {
            of_value
                .step_by(self.num_values)
                .for_each(|sums| sums.fill(Superaccumulator::default()));
        }
    }

    /// The sums of one expert.
    fn num_sums(&self) -> usize {
        self.num_values * self.num_moments
    }

    /// `Σ n_t` of every expert, by layer.
    pub fn counts(&self) -> Vec<u64> {
        self.counts.iter().map(|count| count.sum).collect()
    }

    /// `Σ n_t²` of every expert, by layer, next to it in float64.
    pub fn count_squares(&self) -> Vec<f64> {
        self.counts
            .iter()
            .map(|count| count.square as f64)
            .collect()
    }

    /// A sum over texts of every value of every expert, next to it in float64; NaN if not kept.
    pub fn moment(&self, moment: Moment) -> Vec<f64> {
        let of = |sums: &[Superaccumulator]| {
            sums.get(moment as usize)
                .map_or(f64::NAN, Superaccumulator::value)
        };
        self.sums.chunks_exact(self.num_moments).map(of).collect()
    }

    /// The sums as bytes; of each sum the digits from the first to the last that is not zero.
    pub fn to_bytes(&self) -> Vec<u8> {
        let sizes = self.shape().map(|size| size as u64);
        let errors = u64::from(self.num_moments > 1);
        let mut words = vec![MARK, sizes[0], sizes[1], sizes[2], errors];
        words.extend(&self.texts);
        let cells = self.sums.chunks_exact(self.num_sums());
        for (count, sums) in self.counts.iter().zip(cells) {
            words.extend([count.sum, count.square as u64, (count.square >> 64) as u64]);
            for sum in sums {
                write_trimmed(sum, &mut words);
            }
        }
        bytes(words)
    }

    /// The sums that these are the bytes of; refuses what no texts give.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut words = Words::new(bytes);
        let ended = || Error::StoredLength {
            what: "sums of experts",
            bytes: bytes.len(),
        };
        let [mark, sizes @ .., errors] = words.take::<5>().ok_or_else(ended)?;
        if mark != MARK || errors > 1 {
            return Err(Error::StoredMark("sums of experts"));
        }
        let [layers, experts, num_values] =
            sizes.map(|stored| usize::try_from(stored).unwrap_or(usize::MAX));
        check_sizes(layers, experts, num_values, errors > 0)?;
        let least = layers + layers * experts * (3 + num_values * num_moments(errors > 0));
        if words.left() < 8 * least {
            return Err(ended());
        }
        let mut this = Self::new(layers, experts, num_values, errors > 0)?;
        for texts in &mut this.texts {
            [*texts] = words.take().ok_or_else(ended)?;
            if *texts > MAX_SAMPLES {
                return Err(Error::TooManySamples);
            }
        }
        let (num_sums, num_moments) = (this.num_sums(), this.num_moments);
        let cells = this.counts.iter_mut().enumerate();
        for ((place, count), sums) in cells.zip(this.sums.chunks_exact_mut(num_sums)) {
            let [sum, low, high] = words.take().ok_or_else(ended)?;
            *count = Count {
                sum,
                square: u128::from(high) << 64 | u128::from(low),
            };
            for sum in sums.iter_mut() {
                *sum = read_trimmed(&mut words).ok_or(Error::DamagedExperts)?;
            }
            let values = sums.chunks_exact(num_moments);
            if !is_possible(*count, values, this.texts[place / experts]) {
                return Err(Error::DamagedExperts);
            }
        }
        if words.left() != 0 {
            return Err(ended());
        }
        Ok(this)
    }
}

fn num_moments(errors: bool) -> usize {
    if errors { 3 } else { 1 }
}

fn check_sizes(
    layers: usize,
    experts: usize,
    num_values: usize,
    errors: bool,
) -> Result<(), Error> {
    let are_some = (1..=MAX_STATES).contains(&layers)
        && experts > 0
        && (1..=MAX_EXPERT_VALUES).contains(&num_values);
    let all = layers.saturating_mul(experts).saturating_mul(num_values);
    if !are_some || all > MAX_EXPERT_SUMS / num_moments(errors) {
        return Err(Error::ExpertSizes {
            layers,
            experts,
            num_values,
        });
    }
    Ok(())
}

fn is_summable(value: f64, tokens: f64) -> bool {
    (value * value).is_finite() && (value * tokens).is_finite()
}

/// Whether texts can have given the sums of an expert.
fn is_possible(
    count: Count,
    mut values: std::slice::ChunksExact<'_, Superaccumulator>,
    texts: u64,
) -> bool {
    let most = u128::from(texts) * u128::from(MAX_SAMPLES);
    if count.sum == 0 {
        let zero = Superaccumulator::default();
        return count.square == 0 && values.all(|sums| sums.iter().all(|sum| *sum == zero));
    }
    u128::from(count.sum) <= most
        && count.square >= u128::from(count.sum)
        && count.square <= u128::from(count.sum) * u128::from(count.sum)
        && values.all(|sums| {
            let found: Vec<f64> = sums.iter().map(Superaccumulator::value).collect();
            found.iter().all(|value| value.is_finite())
                && found
                    .get(Moment::Square as usize)
                    .is_none_or(|&square| square >= 0.0)
        })
}

/// A word that says where digits begin and how many there are, then the digits.
fn write_trimmed(sum: &Superaccumulator, words: &mut Vec<u64>) {
    let digits: Vec<u64> = sum.to_words().collect();
    let first = digits.iter().position(|&digit| digit != 0);
    let last = digits.iter().rposition(|&digit| digit != 0);
    let (Some(first), Some(last)) = (first, last) else {
        words.push(0);
        return;
    };
    words.push((first as u64) << 8 | (last - first + 1) as u64);
    words.extend(&digits[first..=last]);
}

/// The inverse; None for what it does not write.
fn read_trimmed(words: &mut Words<'_>) -> Option<Superaccumulator> {
    let mut digits = [0; Superaccumulator::WORDS];
    let [head] = words.take()?;
    let (first, length) = ((head >> 8) as usize, (head & 0xff) as usize);
    if length == 0 {
        return (first == 0).then(Superaccumulator::default);
    }
    let place = digits.get_mut(first..first.checked_add(length)?)?;
    for digit in &mut *place {
        [*digit] = words.take()?;
    }
    let is_trimmed = place.first() != Some(&0) && place.last() != Some(&0);
    is_trimmed
        .then(|| Superaccumulator::from_words(&digits))
        .flatten()
}
