//! All-pairs comparison of the hidden states of a transformer's layers.
//!
//! A sample is `num_states = L + 1` vectors of one token: the input of every
//! block and the output of the last one. [`Accumulator`] takes samples in any
//! order, on any number of threads and in any number of shards, and gives the
//! mean and the variance of every metric over every pair of states, with the
//! same bits each time. [`checkpoint`] cuts layers out of files of weights.
//! Nothing here knows Python; `python` alone does.

mod accumulator;
mod bootstrap;
mod bytes;
pub mod checkpoint;
mod cka;
mod costs;
mod error;
mod exact;
mod experts;
pub mod gguf;
mod gram;
mod kernels;
mod limits;
mod metric;
#[cfg(feature = "python")]
mod python;
mod search;
mod sequence;
mod states;
mod sums;
mod superaccumulator;
mod wide;

pub use accumulator::Accumulator;
pub use bootstrap::bootstrap;
pub use cka::Cka;
pub use costs::Costs;
pub use error::{Error, Reason, Rejection};
pub use exact::ExactSum;
pub use experts::{ExpertSums, Moment};
pub use gram::Gram;
pub use kernels::{TIER_VARIABLE, Tier};
pub use limits::{
    MAX_BATCH, MAX_EXPERT_SUMS, MAX_EXPERT_VALUES, MAX_SAMPLES, MAX_SEQUENCE, MAX_STATES, MIN_BATCH,
};
pub use metric::{Metric, Pair};
pub use sequence::Lengths;
pub use states::{Element, Order, States};
pub use sums::Sums;
