//! The search for blocks to drop: the best starts of one block, and the best plan of several.
//!
//! Costs are whole numbers, so nothing here depends on rounding, and equal costs are decided by
//! a rule: fewer blocks, then smaller starts, then smaller stops.

use std::num::NonZeroUsize;
use std::ops::{AddAssign, Range};

use crate::error::Error;

/// The cost of a block or of several; known ones are less.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cost<K> {
    Of(K),
    /// Of what was not measured, or cannot be.
    Unknown,
}

impl<K: for<'k> AddAssign<&'k K>> Cost<K> {
    /// Both together.
    pub fn plus(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Of(mut sum), Self::Of(addend)) => {
                sum += addend;
                Self::Of(sum)
            }
            _ => Self::Unknown,
        }
    }
}

/// The blocks of some layers, and what each costs.
pub(crate) struct Search<'a, K> {
    num_layers: usize,
    /// `start` by `start`, and `stop` by `stop`.
    costs: &'a [Cost<K>],
}

impl<'a, K: Clone + Default + Ord + for<'k> AddAssign<&'k K>> Search<'a, K> {
    pub fn new(num_layers: usize, costs: &'a [Cost<K>]) -> Self {
        Self { num_layers, costs }
    }

    fn cost(&self, start: usize, stop: usize) -> &'a Cost<K> {
        let first = start * (2 * self.num_layers + 1 - start) / 2;
        &self.costs[first + stop - start - 1]
    }

    pub fn best_starts(&self, n: i64, count: usize) -> Result<Vec<usize>, Error> {
        let size = self.block_size(n)?;
        let cost = |start: &usize| self.cost(*start, start + size);
        let mut starts: Vec<usize> = (0..=self.num_layers - size)
            .filter(|start| *cost(start) != Cost::Unknown)
            .collect();
        if starts.is_empty() {
            return Err(Error::NothingMeasured { n });
        }
        starts.sort_by(|left, right| cost(left).cmp(cost(right)));
        starts.truncate(count);
        Ok(starts)
    }

    pub fn best_plan(
        &self,
        n: i64,
        max_blocks: NonZeroUsize,
        (protect_first, protect_last): (usize, usize),
    ) -> Result<Vec<Range<usize>>, Error> {
        let size = self.block_size(n)?;
        let num_layers = self.num_layers;
        let free = num_layers.saturating_sub(protect_first.saturating_add(protect_last));
        if size > free {
            return Err(Error::Protected {
                n,
                num_layers,
                protect_first,
                protect_last,
            });
        }
        let layers = protect_first..protect_first + free;
        let most = max_blocks.get().min(size).min(free.div_ceil(2));
        Table::new(self, layers, size, most)
            .best()
            .ok_or(Error::NothingMeasured { n })
    }

    fn block_size(&self, n: i64) -> Result<usize, Error> {
        let num_layers = self.num_layers;
        usize::try_from(n)
            .ok()
            .filter(|n| (1..num_layers).contains(n))
            .ok_or(Error::BlockSize { n, num_layers })
    }
}

/// The least cost to drop exactly `size` of the layers from `first` on in exactly `blocks`
/// blocks, for every `blocks`, `first` and `size`.
struct Table<'a, K> {
    search: &'a Search<'a, K>,
    layers: Range<usize>,
    size: usize,
    most: usize,
    least: Vec<Cost<K>>,
}

impl<'a, K: Clone + Default + Ord + for<'k> AddAssign<&'k K>> Table<'a, K> {
    fn new(search: &'a Search<'a, K>, layers: Range<usize>, size: usize, most: usize) -> Self {
        let states = (most + 1) * (layers.len() + 1) * (size + 1);
        let mut table = Self {
            search,
            layers,
            size,
            most,
            least: vec![Cost::Unknown; states],
        };
        for first in table.layers.start..=table.layers.end {
            let index = table.index(0, first, 0);
            table.least[index] = Cost::Of(K::default());
        }
        for blocks in 1..=most {
            for first in table.layers.clone().rev() {
                for size in 1..=table.size {
                    let stay = table.at(blocks, first + 1, size).clone();
                    let drop = (1..=size).map(|length| table.drop(blocks, first, size, length));
                    let least = drop.fold(stay, Cost::min);
                    let index = table.index(blocks, first, size);
                    table.least[index] = least;
                }
            }
        }
        table
    }

    fn index(&self, blocks: usize, first: usize, size: usize) -> usize {
        let row = blocks * (self.layers.len() + 1) + first - self.layers.start;
        row * (self.size + 1) + size
    }

    fn at(&self, blocks: usize, first: usize, size: usize) -> &Cost<K> {
        &self.least[self.index(blocks, first.min(self.layers.end), size)]
    }

    /// The least cost if `first .. first + length` is the first block.
    fn drop(&self, blocks: usize, first: usize, size: usize, length: usize) -> Cost<K> {
        let stop = first + length;
        if stop > self.layers.end {
            return Cost::Unknown;
        }
        let rest = self.at(blocks - 1, stop + 1, size - length);
        if *rest == Cost::Unknown {
            return Cost::Unknown;
        }
        self.search.cost(first, stop).clone().plus(rest)
    }

    /// The best plan; `None` if every one has a block whose cost is unknown.
    fn best(&self) -> Option<Vec<Range<usize>>> {
        let total = |blocks: &usize| self.at(*blocks, self.layers.start, self.size);
        let mut left = (1..=self.most).min_by(|one, other| total(one).cmp(total(other)))?;
        if *total(&left) == Cost::Unknown {
            return None;
        }
        let (mut first, mut size, mut found) = (self.layers.start, self.size, Vec::new());
        while left > 0 && first < self.layers.end {
            let least = self.at(left, first, size);
            match (1..=size).find(|&length| self.drop(left, first, size, length) == *least) {
                Some(length) => {
                    found.push(first..first + length);
                    (left, size, first) = (left - 1, size - length, first + length + 1);
                }
                None => first += 1,
            }
        }
        Some(found)
    }
}
