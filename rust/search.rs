//! Which blocks to drop: the best starts of one block, and the best plan of several.
//!
//! Costs are sums of distances in exact integer units, so nothing here depends on rounding,
//! and equal costs are decided by a rule: fewer blocks, then smaller starts, then smaller stops.

use std::num::NonZeroUsize;
use std::ops::Range;

use crate::accumulator::Accumulator;
use crate::error::Error;
use crate::metric::Metric;

/// The cost of what cannot be.
const IMPOSSIBLE: i128 = i128::MAX;

impl Accumulator {
    /// The `count` best starts `l` in `0..=L-n` of a block of `n` layers, `l*(n)` first
    /// (2403.17887, eq. 6); of equals the smaller. There may be fewer than `count`.
    pub fn best_starts(&self, metric: Metric, n: i64, count: usize) -> Result<Vec<usize>, Error> {
        let n = self.block_size(n)?;
        let cost = self.cost(metric)?;
        let mut starts: Vec<usize> = (0..=self.num_layers() - n).collect();
        starts.sort_by_key(|&start| cost(start, start + n));
        starts.truncate(count);
        Ok(starts)
    }

    /// At most `max_blocks` blocks of `n` layers together whose mean distances have the least
    /// sum. The first and the last layers named stay, and so does one between two blocks:
    /// blocks that touch would be one block, whose removal joins another pair of states.
    pub fn best_plan(
        &self,
        metric: Metric,
        n: i64,
        max_blocks: NonZeroUsize,
        protect_first: usize,
        protect_last: usize,
    ) -> Result<Vec<Range<usize>>, Error> {
        let size = self.block_size(n)?;
        let num_layers = self.num_layers();
        let free = num_layers.saturating_sub(protect_first.saturating_add(protect_last));
        if size > free {
            return Err(Error::Protected {
                n,
                num_layers,
                protect_first,
                protect_last,
            });
        }
        let cost = self.cost(metric)?;
        let layers = protect_first..protect_first + free;
        let most = max_blocks.get().min(size).min(free.div_ceil(2));
        let table = Table::new(layers, size, most, cost);
        Ok(table.best())
    }

    fn block_size(&self, n: i64) -> Result<usize, Error> {
        let num_layers = self.num_layers();
        usize::try_from(n)
            .ok()
            .filter(|n| (1..num_layers).contains(n))
            .ok_or(Error::BlockSize { n, num_layers })
    }
}

/// The least cost to drop exactly `size` of the layers from `first` on in exactly `blocks`
/// blocks, for every `blocks`, `first` and `size`.
struct Table<C> {
    layers: Range<usize>,
    size: usize,
    most: usize,
    cost: C,
    least: Vec<i128>,
}

impl<C: Fn(usize, usize) -> i128> Table<C> {
    fn new(layers: Range<usize>, size: usize, most: usize, cost: C) -> Self {
        let states = (most + 1) * (layers.len() + 1) * (size + 1);
        let mut table = Self {
            layers,
            size,
            most,
            cost,
            least: vec![IMPOSSIBLE; states],
        };
        for first in table.layers.start..=table.layers.end {
            let index = table.index(0, first, 0);
            table.least[index] = 0;
        }
        for blocks in 1..=most {
            for first in table.layers.clone().rev() {
                for size in 1..=table.size {
                    let stay = table.at(blocks, first + 1, size);
                    let drop = (1..=size).map(|length| table.drop(blocks, first, size, length));
                    let least = drop.fold(stay, i128::min);
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

    fn at(&self, blocks: usize, first: usize, size: usize) -> i128 {
        self.least[self.index(blocks, first.min(self.layers.end), size)]
    }

    /// The least cost if `first .. first + length` is the first block.
    fn drop(&self, blocks: usize, first: usize, size: usize, length: usize) -> i128 {
        let stop = first + length;
        if stop > self.layers.end {
            return IMPOSSIBLE;
        }
        match self.at(blocks - 1, stop + 1, size - length) {
            IMPOSSIBLE => IMPOSSIBLE,
            rest => (self.cost)(first, stop) + rest,
        }
    }

    fn best(&self) -> Vec<Range<usize>> {
        let total = |&blocks: &usize| self.at(blocks, self.layers.start, self.size);
        let mut left = (1..=self.most).min_by_key(total).unwrap_or(0);
        let (mut first, mut size, mut found) = (self.layers.start, self.size, Vec::new());
        while left > 0 && first < self.layers.end {
            let least = self.at(left, first, size);
            match (1..=size).find(|&length| self.drop(left, first, size, length) == least) {
                Some(length) => {
                    found.push(first..first + length);
                    (left, size, first) = (left - 1, size - length, first + length + 1);
                }
                None => first += 1,
            }
        }
        found
    }
}
