//! The exact sum of any finite float64, whatever their magnitudes: a fixed-point number as
//! long as the range of float64 (Kulisch's long accumulator), in digits of 32 bits.

use std::cmp::Ordering;
use std::ops::AddAssign;

const DIGITS: usize = 68;
const DIGIT: i64 = 1 << 32;

/// The exponent of the least bit: that of the smallest subnormal number.
const LEAST: i32 = -1074;

/// A sum that does not depend on its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superaccumulator {
    /// Lowest first; all but the last in `0 .. 2^32`, so that equal sums are equal.
    digits: [i64; DIGITS],
}

impl Ord for Superaccumulator {
    fn cmp(&self, other: &Self) -> Ordering {
        self.digits.iter().rev().cmp(other.digits.iter().rev())
    }
}

impl PartialOrd for Superaccumulator {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl AddAssign<&Self> for Superaccumulator {
    fn add_assign(&mut self, other: &Self) {
        self.merge(other);
    }
}

impl Default for Superaccumulator {
    fn default() -> Self {
        Self {
            digits: [0; DIGITS],
        }
    }
}

impl Superaccumulator {
    /// Words that a stored sum takes.
    pub(crate) const WORDS: usize = DIGITS;

    /// Adds a finite number.
    pub(crate) fn add(&mut self, value: f64) {
        self.add_uncarried(value);
        self.carry();
    }

    /// The same, but leaves to `carry` what digits hold beyond 32 bits: after 2^30 numbers
    /// at most.
    pub(crate) fn add_uncarried(&mut self, value: f64) {
        debug_assert!(value.is_finite());
        let bits = value.to_bits();
        let exponent = (bits >> 52) & 0x7ff;
        let fraction = bits & ((1 << 52) - 1);
        let (mantissa, place) = match exponent {
            0 => (fraction, 0),
            _ => (fraction | 1 << 52, exponent as usize - 1),
        };
        let mut rest = u128::from(mantissa) << (place % 32);
        for digit in &mut self.digits[place / 32..] {
            if rest == 0 {
                break;
            }
            let part = i64::from(rest as u32);
            *digit += if value < 0.0 { -part } else { part };
            rest >>= 32;
        }
    }

    /// Adds the other sum's numbers.
    pub(crate) fn merge(&mut self, other: &Self) {
        for (digit, addend) in self.digits.iter_mut().zip(&other.digits) {
            *digit += addend;
        }
        self.carry();
    }

    /// The float64 next to the sum.
    pub(crate) fn value(&self) -> f64 {
        if self.digits[DIGITS - 1] < 0 {
            let mut opposite = Self {
                digits: self.digits.map(|digit| -digit),
            };
            opposite.carry();
            return -opposite.value();
        }
        let Some(top) = self.digits.iter().rposition(|&digit| digit != 0) else {
            return 0.0;
        };
        // The last bit stands for all digits below the ones taken.
        let low = top.saturating_sub(3);
        let taken = self.digits[low..=top].iter().rev();
        let leading = taken.fold(0_u128, |sum, &digit| {
            sum << 32 | u128::from(digit.unsigned_abs())
        });
        let below = self.digits[..low].iter().any(|&digit| digit != 0);
        let mut value = (leading | u128::from(below)) as f64;
        let mut exponent = low.cast_signed() as i32 * 32 + LEAST;
        while exponent != 0 {
            let step = exponent.clamp(-512, 512);
            value *= 2.0_f64.powi(step);
            exponent -= step;
        }
        value
    }

    pub(crate) fn to_words(&self) -> impl Iterator<Item = u64> {
        self.digits.iter().map(|digit| digit.cast_unsigned())
    }

    /// The inverse of `to_words`; refuses what no sum gives.
    pub(crate) fn from_words(words: &[u64; DIGITS]) -> Option<Self> {
        let digits = words.map(u64::cast_signed);
        let (last, others) = digits.split_last()?;
        let are_digits = others.iter().all(|digit| (0..DIGIT).contains(digit));
        (are_digits && last.unsigned_abs() < DIGIT.cast_unsigned()).then_some(Self { digits })
    }

    pub(crate) fn carry(&mut self) {
        for place in 0..DIGITS - 1 {
            let carried = self.digits[place] >> 32;
            self.digits[place] -= carried << 32;
            self.digits[place + 1] += carried;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{DIGITS, Superaccumulator};
    use proptest::prelude::*;

    fn sum(values: &[f64]) -> Superaccumulator {
        let mut sum = Superaccumulator::default();
        for &value in values {
            sum.add(value);
        }
        sum
    }

    proptest! {
        #[test]
        fn one_number_comes_back(value in any::<f64>().prop_filter("finite", |v| v.is_finite())) {
            prop_assert_eq!(sum(&[value]).value(), value);
            prop_assert_eq!(sum(&[value, -value]), Superaccumulator::default());
        }

        #[test]
        fn any_order_and_any_parts_give_the_same(
            values in prop::collection::vec(any::<f64>().prop_filter("finite", |v| v.is_finite()), 1..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut turned = values.clone();
            turned.reverse();
            prop_assert_eq!(sum(&values), sum(&turned));
            let (head, tail) = values.split_at(cut.index(values.len()));
            let mut merged = sum(tail);
            merged.merge(&sum(head));
            prop_assert_eq!(&merged, &sum(&values));
            let words: Vec<u64> = merged.to_words().collect();
            prop_assert_eq!(Superaccumulator::from_words(words.first_chunk::<DIGITS>().unwrap()), Some(merged));
        }

        #[test]
        fn integers_are_summed_as_integers(values in prop::collection::vec(-(1_i64 << 52)..1 << 52, 1..50)) {
            let floats: Vec<f64> = values.iter().map(|&value| value as f64).collect();
            let exact: i128 = values.iter().map(|&value| i128::from(value)).sum();
            prop_assert_eq!(sum(&floats).value(), exact as f64);
        }
    }

    #[test]
    fn nothing_is_lost_and_the_nearest_is_given() {
        assert_eq!(sum(&[1e300, 1.0, -1e300]).value(), 1.0);
        assert_eq!(sum(&[1e300, 1e-300, -1e300]).value(), 1e-300);
        assert_eq!(sum(&[-1e300, -1e-300, 1e300]).value(), -1e-300);
        assert_eq!(sum(&[1.0, f64::EPSILON / 2.0]).value(), 1.0);
        assert_eq!(
            sum(&[1.0, f64::EPSILON / 2.0, 5e-324]).value(),
            1.0 + f64::EPSILON
        );
        assert_eq!(sum(&[f64::MAX, f64::MAX, -f64::MAX]).value(), f64::MAX);
    }

    #[test]
    fn words_that_are_no_digits_are_refused() {
        let mut words = [0_u64; DIGITS];
        words[3] = 1 << 32;
        assert_eq!(Superaccumulator::from_words(&words), None);
        words[3] = u64::MAX;
        assert_eq!(Superaccumulator::from_words(&words), None);
    }
}
