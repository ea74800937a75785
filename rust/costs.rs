//! Costs of blocks of layers in whole numbers: their sums are exact, and so is which cost is
//! less or equal.

use std::ops::{AddAssign, Range};

use crate::error::Error;
use crate::search::{Cost, Search};
use crate::states::check_num_states;
use crate::superaccumulator::Superaccumulator;

/// Bits of a unit's magnitude; the rest of 127 is for sums over all layers of a model.
const BITS: i32 = 127 - 13;

/// The costs of all blocks `start .. stop` of the layers of a model; lower is better.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Costs {
    num_layers: usize,
    blocks: Blocks,
}

/// The costs of the blocks, `start` by `start`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Blocks {
    /// In a unit that all are multiples of.
    Units(Vec<Cost<i128>>),
    /// Sums of any magnitude, too far apart for one unit.
    Long(Vec<Cost<Superaccumulator>>),
}

impl Costs {
    /// Costs in some unit, `start` by `start`.
    pub(crate) fn of_units(num_layers: usize, units: Vec<i128>) -> Self {
        let units = units.into_iter().map(Cost::Of).collect();
        Self {
            num_layers,
            blocks: Blocks::Units(units),
        }
    }

    /// The costs in a matrix of `num_states = L + 1` rows, block `start .. stop` in row `start`
    /// and column `stop`; what is not above the diagonal is not read. NaN is the cost of a block
    /// that was not measured, which is then never proposed.
    pub fn of_blocks(values: &[f64], num_states: usize) -> Result<Self, Error> {
        check_num_states(num_states)?;
        if values.len() != num_states * num_states {
            return Err(Error::CostsLength {
                expected: num_states * num_states,
                actual: values.len(),
            });
        }
        let row = |start: usize| &values[start * num_states..][start + 1..num_states];
        let above: Vec<f64> = (0..num_states).flat_map(row).copied().collect();
        let infinite = above.iter().position(|value| value.is_infinite());
        if let Some(place) = infinite {
            let start = (0..num_states).rfind(|&l| first_place(num_states, l) <= place);
            let start = start.unwrap_or(0);
            return Err(Error::InfiniteCost {
                start,
                stop: start + 1 + place - first_place(num_states, start),
                value: above[place],
            });
        }
        let blocks = if let Some(unit) = unit_of(&above) {
            Blocks::Units(above.iter().map(|&v| Cost::of(v, unit)).collect())
        } else {
            Blocks::Long(above.iter().map(|&v| Cost::of_long(v)).collect())
        };
        Ok(Self {
            num_layers: num_states - 1,
            blocks,
        })
    }

    /// The costs of single layers; a block costs what its layers cost together. NaN is the cost of
    /// a layer that was not measured.
    pub fn of_layers(values: &[f64]) -> Result<Self, Error> {
        check_num_states(values.len() + 1)?;
        if let Some(start) = values.iter().position(|value| value.is_infinite()) {
            return Err(Error::InfiniteCost {
                start,
                stop: start + 1,
                value: values[start],
            });
        }
        let blocks = if let Some(unit) = unit_of(values) {
            Blocks::Units(together(values, |value| Cost::of(value, unit)))
        } else {
            Blocks::Long(together(values, Cost::of_long))
        };
        Ok(Self {
            num_layers: values.len(),
            blocks,
        })
    }

    /// Layers of the model, `L`.
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// The `count` best starts `l` in `0..=L-n` of a block of `n` layers, `l*(n)` first
    /// (2403.17887, eq. 6); of equals the smaller. There may be fewer than `count`.
    pub fn best_starts(&self, n: i64, count: usize) -> Result<Vec<usize>, Error> {
        match &self.blocks {
            Blocks::Units(costs) => Search::new(self.num_layers, costs).best_starts(n, count),
            Blocks::Long(costs) => Search::new(self.num_layers, costs).best_starts(n, count),
        }
    }

    /// At most `max_blocks` blocks of `n` layers together whose costs have the least sum. The
    /// first and the last layers named stay, and so does one between two blocks: blocks that
    /// touch would be one block, whose removal joins another pair of states.
    pub fn best_plan(
        &self,
        n: i64,
        max_blocks: std::num::NonZeroUsize,
        protect_first: usize,
        protect_last: usize,
    ) -> Result<Vec<Range<usize>>, Error> {
        let protected = (protect_first, protect_last);
        match &self.blocks {
            Blocks::Units(costs) => {
                Search::new(self.num_layers, costs).best_plan(n, max_blocks, protected)
            }
            Blocks::Long(costs) => {
                Search::new(self.num_layers, costs).best_plan(n, max_blocks, protected)
            }
        }
    }
}

/// Place of the blocks from a start on.
fn first_place(num_states: usize, start: usize) -> usize {
    start * (2 * num_states - start - 1) / 2
}

/// The costs of all blocks, from those of the layers.
fn together<K: Clone + for<'k> AddAssign<&'k K>>(
    values: &[f64],
    cost: impl Fn(f64) -> Cost<K>,
) -> Vec<Cost<K>> {
    let layers: Vec<Cost<K>> = values.iter().map(|&value| cost(value)).collect();
    let from = |start: usize| {
        let rest = layers[start..].iter();
        rest.scan(None, |sum: &mut Option<Cost<K>>, layer| {
            *sum = Some(match sum.take() {
                None => layer.clone(),
                Some(sum) => sum.plus(layer),
            });
            sum.clone()
        })
    };
    (0..layers.len()).flat_map(from).collect()
}

/// The exponent of the greatest power of two that all finite values are multiples of; `None` if
/// the greatest of them is too many times that.
fn unit_of(values: &[f64]) -> Option<i32> {
    let values = values.iter().filter(|value| value.is_finite());
    let parts = values.map(|&value| parts(value)).filter(|&(m, _)| m != 0);
    let ends = parts.map(|(mantissa, exponent)| {
        let bits = mantissa.unsigned_abs();
        let last = exponent + bits.trailing_zeros().cast_signed();
        (last, exponent + 64 - bits.leading_zeros().cast_signed())
    });
    let reach = |(low, high): (i32, i32), (last, first)| (low.min(last), high.max(first));
    match ends.reduce(reach) {
        None => Some(0),
        Some((low, high)) => (high - low <= BITS).then_some(low),
    }
}

/// Mantissa and exponent: the value is `mantissa · 2^exponent`.
fn parts(value: f64) -> (i64, i32) {
    let bits = value.to_bits();
    let fraction = (bits & ((1 << 52) - 1)).cast_signed();
    let (mantissa, exponent) = match (bits >> 52 & 0x7ff) as i32 {
        0 => (fraction, -1074),
        exponent => (fraction | 1 << 52, exponent - 1075),
    };
    (if value < 0.0 { -mantissa } else { mantissa }, exponent)
}

impl Cost<i128> {
    fn of(value: f64, unit: i32) -> Self {
        if value.is_nan() {
            return Self::Unknown;
        }
        let (mantissa, exponent) = parts(value);
        let mantissa = i128::from(mantissa);
        match exponent - unit {
            _ if mantissa == 0 => Self::Of(0),
            shift @ 0.. => Self::Of(mantissa << shift),
            shift => Self::Of(mantissa >> -shift),
        }
    }
}

impl Cost<Superaccumulator> {
    fn of_long(value: f64) -> Self {
        if value.is_nan() {
            return Self::Unknown;
        }
        let mut sum = Superaccumulator::default();
        sum.add(value);
        Self::Of(sum)
    }
}
