//! Resamples: how often every sample is drawn.

use std::ops::Range;

use crate::kernels::dots::{CHUNK, Chunk, TILE};

/// The number of times that every sample was drawn, in some resamples.
pub(super) struct Weights {
    /// The number of resamples, filled up with ones that draw nothing.
    pub width: usize,
    /// `[chunk][resample]`. That the weights of a chunk exceed 2^15, and sums 32 bits, is less
    /// likely than 1e-9999.
    pub chunks: Vec<Chunk>,
    /// `sum (w - 1)^2` of each resample.
    pub spreads: Vec<usize>,
}

impl Weights {
    pub fn draw(num_samples: usize, seed: u64, resamples: Range<usize>) -> Self {
        let width = resamples.len().next_multiple_of(TILE);
        let mut chunks = vec![Chunk([0; CHUNK]); num_samples.div_ceil(CHUNK) * width];
        let mut drawn = vec![0_i16; num_samples.next_multiple_of(CHUNK)];
        let mut spreads = Vec::new();
        for (column, resample) in resamples.enumerate() {
            drawn.fill(0);
            let mut state = mixed(seed.wrapping_add(GAMMA.wrapping_mul(resample as u64 + 1)));
            for _ in 0..num_samples {
                state = state.wrapping_add(GAMMA);
                let index = (u128::from(mixed(state)) * num_samples as u128) >> 64;
                drawn[index as usize] += 1;
            }
            let squares = drawn.iter().map(|&w| usize::from(w.unsigned_abs()).pow(2));
            spreads.push(squares.sum::<usize>() - num_samples);
            let places = chunks[column..].iter_mut().step_by(width);
            for (Chunk(to), from) in places.zip(drawn.as_chunks().0) {
                *to = *from;
            }
        }
        Self {
            width,
            chunks,
            spreads,
        }
    }

    pub fn of(&self, resample: usize, place: usize) -> i16 {
        self.chunks[place / CHUNK * self.width + resample].0[place % CHUNK]
    }
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of `SplitMix64` (Steele, Lea, Flood, OOPSLA 2014).
fn mixed(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}
