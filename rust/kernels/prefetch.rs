//! Lines that are fetched into the cache before they are read.
//!
//! Between the products of one chunk of columns the lines of the one after the next are fetched,
//! one at every few steps. More at a time would wait for one another; later ones arrive too late.

#![allow(unsafe_code)]

use super::unit::Unit;

/// Memory that is to be prefetched: some bytes from each of the addresses on.
#[derive(Debug, Default)]
pub(crate) struct Prefetch {
    rows: Vec<usize>,
    /// The number of runs, and the bytes of each; rows that join are one run.
    runs: usize,
    bytes: usize,
    in_turn: bool,
    /// The next line.
    row: usize,
    at: usize,
    left: usize,
}

impl Prefetch {
    const LINE: usize = 64;

    const PAGE: usize = 4096;

    /// Pages of a group.
    const PAGES: usize = 32;

    /// Starts over with rows of so many bytes; a line of each `in_turn`, or one whole row after
    /// the other.
    pub fn begin(&mut self, rows: impl Iterator<Item = usize>, bytes: usize, in_turn: bool) {
        self.rows.clear();
        self.rows.extend(rows);
        self.in_turn = in_turn;
        (self.row, self.at) = (0, 0);
        let joined = !in_turn && self.rows.windows(2).all(|two| two[0] + bytes == two[1]);
        (self.runs, self.bytes) = if joined {
            (1, bytes * self.rows.len())
        } else {
            (self.rows.len(), bytes)
        };
        self.left = self.bytes.div_ceil(Self::LINE) * self.runs;
    }

    /// The addresses.
    #[cfg(target_arch = "x86_64")]
    pub fn rows(&self) -> &[usize] {
        &self.rows
    }

    /// The number of lines left to be fetched.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Fetches one line of every page of the groups that begin in what is to be fetched: where a
    /// page lies the processor waits to be told, for many pages hardly longer than for one.
    ///
    /// # Safety
    ///
    /// As for the methods of [`Unit`].
    #[inline(always)]
    pub unsafe fn fetch_pages<U: Unit>(&self) {
        for &start in &self.rows[..self.runs] {
            let groups = start.next_multiple_of(Self::PAGES * Self::PAGE)..start + self.bytes;
            for group in groups.step_by(Self::PAGES * Self::PAGE) {
                for page in 0..Self::PAGES {
                    let address = group + page * Self::PAGE;
                    // SAFETY: the caller's; a prefetch reads nothing, whatever is there.
                    unsafe { U::prefetch(std::ptr::without_provenance(address)) };
                }
            }
        }
    }

    /// Fetches the next line, if one is left.
    ///
    /// # Safety
    ///
    /// As for the methods of [`Unit`].
    #[inline(always)]
    pub unsafe fn fetch<U: Unit>(&mut self) {
        if self.left == 0 {
            return;
        }
        self.left -= 1;
        let address = self.rows[self.row] + self.at;
        // SAFETY: the caller's; a prefetch reads nothing.
        unsafe { U::prefetch(std::ptr::without_provenance(address)) };
        if self.in_turn {
            self.row += 1;
            if self.row == self.rows.len() {
                (self.row, self.at) = (0, self.at + Self::LINE);
            }
        } else {
            self.at += Self::LINE;
            if self.at >= self.bytes {
                (self.row, self.at) = (self.row + 1, 0);
            }
        }
    }
}
