//! Non-negative integers of 256 bits: room for the products behind a variance of sequences.

use std::cmp::Ordering;

/// Four words, the low one first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wide([u64; 4]);

impl Wide {
    pub fn from_words(words: [u64; 4]) -> Self {
        Self(words)
    }

    pub fn to_words(self) -> [u64; 4] {
        self.0
    }

    /// `left · right`, exactly.
    pub fn product(left: u128, right: u128) -> Self {
        if (left | right) >> 64 == 0 {
            return Self::from(left * right);
        }
        let low = Self::from(left).times(right as u64);
        let [a, b, c, _] = Self::from(left).times((right >> 64) as u64).0;
        low.plus(Self([0, a, b, c]))
    }

    /// `self · factor`, which must fit.
    pub fn times(self, factor: u64) -> Self {
        let mut carried = 0;
        let words = self.0.map(|word| {
            let product = u128::from(word) * u128::from(factor) + carried;
            carried = product >> 64;
            product as u64
        });
        debug_assert_eq!(carried, 0);
        Self(words)
    }

    /// `self + other`, which must fit.
    pub fn plus(self, other: Self) -> Self {
        let mut carried = false;
        let mut words = self.0;
        for (word, addend) in words.iter_mut().zip(other.0) {
            let (sum, first) = word.overflowing_add(addend);
            let (sum, second) = sum.overflowing_add(u64::from(carried));
            (*word, carried) = (sum, first || second);
        }
        debug_assert!(!carried);
        Self(words)
    }

    /// `self - other`; `None` if that is less than zero.
    pub fn minus(self, other: Self) -> Option<Self> {
        let mut borrowed = false;
        let mut words = self.0;
        for (word, subtrahend) in words.iter_mut().zip(other.0) {
            let (difference, first) = word.overflowing_sub(subtrahend);
            let (difference, second) = difference.overflowing_sub(u64::from(borrowed));
            (*word, borrowed) = (difference, first || second);
        }
        (!borrowed).then_some(Self(words))
    }

    /// The nearest float64, ties to even.
    pub fn nearest(self) -> f64 {
        let Some(top) = self.0.iter().rposition(|&word| word != 0) else {
            return 0.0;
        };
        // The last bit stands for all words below the two taken.
        let low = top.saturating_sub(1);
        let leading = u128::from(self.0[top]) << (64 * (top - low)) | u128::from(self.0[low]);
        let below = self.0[..low].iter().any(|&word| word != 0);
        (leading | u128::from(below)) as f64 * 2.0_f64.powi(64 * low.cast_signed() as i32)
    }
}

impl From<u128> for Wide {
    fn from(value: u128) -> Self {
        Self([value as u64, (value >> 64) as u64, 0, 0])
    }
}

impl Ord for Wide {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.iter().rev().cmp(other.0.iter().rev())
    }
}

impl PartialOrd for Wide {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Bit by bit: the sum of `left << i` over the bits `i` of `right`.
    fn slow_product(left: u128, right: u128) -> Wide {
        let shifted = |bits: u32| {
            let mut words = [0; 4];
            for bit in (0..128).filter(|bit| left >> bit & 1 == 1) {
                let place = bit + bits;
                words[place as usize / 64] |= 1 << (place % 64);
            }
            Wide(words)
        };
        (0..128)
            .filter(|bit| right >> bit & 1 == 1)
            .fold(Wide::default(), |sum, bit| sum.plus(shifted(bit)))
    }

    fn any_length() -> impl Strategy<Value = u128> {
        (any::<u128>(), 0_u32..128).prop_map(|(value, shift)| value >> shift)
    }

    proptest! {
        #[test]
        fn products_are_those_of_the_slow_twin(left in any_length(), right in any_length()) {
            let product = Wide::product(left, right);
            prop_assert_eq!(product, slow_product(left, right));
            prop_assert_eq!(product, Wide::product(right, left));
            if let Some(small) = left.checked_mul(right) {
                prop_assert_eq!(product, Wide::from(small));
            }
        }

        #[test]
        fn differences_undo_sums(a in any_length(), b in any_length(), c in any_length(), d in any_length()) {
            let (x, y) = (Wide::product(a >> 1, b), Wide::product(c >> 1, d));
            prop_assert_eq!(x.plus(y).minus(y), Some(x));
            prop_assert_eq!(x.minus(y).is_some(), x >= y);
            prop_assert_eq!(x.minus(y).is_none(), y > x);
            prop_assert_eq!(Wide::from_words(x.to_words()), x);
        }

        #[test]
        fn the_nearest_float_is_that_of_a_shifted_small_number(value in any_length(), shift in 0_u8..3) {
            let mut words = [0; 4];
            let low = usize::from(shift);
            words[low..low + 2].copy_from_slice(&[value as u64, (value >> 64) as u64]);
            let expected = value as f64 * 2.0_f64.powi(64 * i32::from(shift));
            prop_assert_eq!(Wide(words).nearest(), expected);
        }

        #[test]
        fn words_far_below_decide_ties(low in 1_u64.., even in 0_u64..1 << 52) {
            // Halfway between two float64: the words below decide, and without them the even one.
            let tie = (even << 1) << 11 | 1 << 10;
            let whole = |low| Wide([low, 0, tie | 1 << 63, 0]).nearest();
            let up = (((tie | 1 << 63) + (1 << 10)) as f64) * 2.0_f64.powi(128);
            prop_assert_eq!(whole(low), up);
            prop_assert!(whole(0) < up);
        }
    }
}
