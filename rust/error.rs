//! Errors of the input, each case with its culprit and the way out.

use crate::limits::{
    MAX_BATCH, MAX_EXPERT_SUMS, MAX_EXPERT_VALUES, MAX_SAMPLES, MAX_SEQUENCE, MAX_STATES,
    MAX_THREADS, MIN_BATCH,
};

/// An input that the core refuses.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The three lengths do not describe the buffer.
    #[error(
        "states of shape ({samples}, {states}, {width}) need {expected} values, the buffer has {actual}"
    )]
    BufferLength {
        /// Samples asked for.
        samples: usize,
        /// States a sample.
        states: usize,
        /// Values a state.
        width: usize,
        /// The product of the three, or `usize::MAX` where it overflows.
        expected: usize,
        /// The length of the buffer.
        actual: usize,
    },
    /// Too few states to compare, or more than any model has.
    #[error("a sample must hold 2 to {MAX} states, got {0}", MAX = MAX_STATES)]
    NumStates(usize),
    /// States without values.
    #[error("a state must hold at least 1 value, got states of shape (.., 0)")]
    EmptyStates,
    /// A batch whose number of states is not the accumulator's.
    #[error("this accumulator compares {expected} states a sample, the batch has {actual}")]
    StateCount {
        /// The accumulator's number of states.
        expected: usize,
        /// The batch's number of states.
        actual: usize,
    },
    /// A metric's name that is not known.
    #[error("unknown metric {name:?}: expected one of {known}")]
    UnknownMetric {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No metric, or the same one twice.
    #[error("metrics must be named once each and at least one, got [{0}]")]
    MetricList(String),
    /// A metric that does not say how alike two states are.
    #[error("metric {0} does not say how alike two states are: choose by another one")]
    NoDistance(&'static str),
    /// A tier's name that is not known.
    #[error("unknown tier {name:?} in {variable}: this machine has {available}")]
    UnknownTier {
        /// The name given.
        name: String,
        /// The environment variable that names one.
        variable: &'static str,
        /// The tiers there are.
        available: String,
    },
    /// A tier that this machine does not have.
    #[error("this machine cannot run tier {tier}: it has {available}")]
    TierUnavailable {
        /// The tier asked for.
        tier: &'static str,
        /// The tiers there are.
        available: String,
    },
    /// A metric that was not accumulated.
    #[error("metric {wanted} was not accumulated: this scan holds {held}")]
    MetricNotHeld {
        /// The metric asked for.
        wanted: &'static str,
        /// The metrics there are.
        held: String,
    },
    /// Sums of different shapes or metrics cannot be merged.
    #[error("cannot merge sums of {what}: {left} and {right}")]
    Unmergeable {
        /// Difference in words.
        what: &'static str,
        /// The value on this side.
        left: String,
        /// The value on the other side.
        right: String,
    },
    /// More samples than the exact sums have room for.
    #[error("an accumulator holds at most {MAX} samples", MAX = MAX_SAMPLES)]
    TooManySamples,
    /// Sequences that do not say of every sample which one it is of.
    #[error("{sequences} numbers of sequences for {samples} samples: expected one each")]
    Sequences {
        /// Samples of the batch.
        samples: usize,
        /// Numbers given.
        sequences: usize,
    },
    /// A sequence of more samples than the exact sums have room for.
    #[error("sequence {0} has more than {MAX} samples: give its parts numbers of their own", MAX = MAX_SEQUENCE)]
    SequenceTooLong(i64),
    /// Stored lengths that no sequences can have.
    #[error("the stored lengths of the sequences are damaged")]
    DamagedLengths,
    /// No sample was accepted, so there is no mean.
    #[error("no sample was accepted ({rejected} rejected): there is nothing to compare")]
    NoSamples {
        /// Samples rejected.
        rejected: u64,
    },
    /// A block size that leaves no layer, or drops none.
    #[error("cannot drop n = {n} of {num_layers} layers: expected 1 <= n <= {max}", max = num_layers - 1)]
    BlockSize {
        /// Layers to drop.
        n: i64,
        /// Layers of the model.
        num_layers: usize,
    },
    /// More layers to drop than are free.
    #[error(
        "cannot drop n = {n} of {num_layers} layers with the first {protect_first} and the last \
         {protect_last} protected: protect fewer, or drop fewer"
    )]
    Protected {
        /// Layers to drop.
        n: i64,
        /// Layers of the model.
        num_layers: usize,
        /// Layers at the start that stay.
        protect_first: usize,
        /// Layers at the end that stay.
        protect_last: usize,
    },
    /// Values of single samples that no scan has kept.
    #[error("the values of the samples are damaged: {0}")]
    SampleValues(&'static str),
    /// Costs that are not those of all blocks.
    #[error("a matrix of costs needs {expected} values, (L + 1, L + 1), the buffer has {actual}")]
    CostsLength {
        /// Values asked for.
        expected: usize,
        /// The length of the buffer.
        actual: usize,
    },
    /// A cost that cannot be compared.
    #[error(
        "the cost of block [{start}, {stop}) is {value}: expected a finite number, or NaN where it \
         was not measured"
    )]
    InfiniteCost {
        /// The first layer.
        start: usize,
        /// One past the last layer.
        stop: usize,
        /// The cost.
        value: f64,
    },
    /// No block or plan whose costs are known.
    #[error(
        "cannot drop n = {n} layers: of no way to do so all costs are known (the others are NaN); \
         measure the costs of more blocks, allow more blocks, or protect fewer layers"
    )]
    NothingMeasured {
        /// Layers to drop.
        n: i64,
    },
    /// A minibatch too small for CKA, or too large.
    #[error("a minibatch for CKA must hold {MIN} to {MAX} samples and no more than the others, got {0}", MIN = MIN_BATCH, MAX = MAX_BATCH)]
    CkaBatch(usize),
    /// Too few samples for CKA.
    #[error("CKA needs at least {MIN} samples that can be compared", MIN = MIN_BATCH)]
    NoCkaBatch,
    /// States too large for CKA.
    #[error("the states of a minibatch are too large for CKA in float64")]
    CkaOverflow,
    /// Stored sums for CKA that no minibatches can have.
    #[error("the stored sums for CKA are damaged")]
    DamagedCka,
    /// Layers and experts that no model has.
    #[error(
        "{num_values} values of {experts} experts in each of {layers} layers: expected up to {VALUES} \
         values, {STATES} layers, and {SUMS} sums in all, three of a value with errors",
        VALUES = MAX_EXPERT_VALUES,
        STATES = MAX_STATES,
        SUMS = MAX_EXPERT_SUMS
    )]
    ExpertSizes {
        /// Layers with experts.
        layers: usize,
        /// Experts of a layer.
        experts: usize,
        /// Values summed of an expert's tokens.
        num_values: usize,
    },
    /// Texts that do not fit the sums of experts.
    #[error(
        "{counts} counts and {values} values for layer {layer} do not fit the sums of experts: \
         expected one count of every text and expert, and all of its values"
    )]
    ExpertUpdate {
        /// Place among the layers with experts.
        layer: usize,
        /// Counts given.
        counts: usize,
        /// Values given.
        values: usize,
    },
    /// Stored sums that no tokens of experts can have.
    #[error("the stored sums of experts are damaged")]
    DamagedExperts,
    /// A number of threads that cannot be.
    #[error("threads must be 1 to {MAX}, got {0}", MAX = MAX_THREADS)]
    Threads(String),
    /// The operating system refused the threads.
    #[error("cannot start {threads} threads: {reason}")]
    ThreadPool {
        /// Threads asked for.
        threads: usize,
        /// The system's words.
        reason: String,
    },
    /// Stored sums that no set of samples can have.
    #[error("the stored sums of metric {metric} are damaged: {what}")]
    DamagedSums {
        /// The metric.
        metric: &'static str,
        /// Damage in words.
        what: &'static str,
    },
    /// Bytes that do not begin as stored ones do.
    #[error("these bytes are not stored {0}, or those of another version")]
    StoredMark(&'static str),
    /// Stored bytes that end early, or go on.
    #[error("the stored {what} are truncated or damaged: {bytes} bytes do not fit their head")]
    StoredLength {
        /// Kind of the stored sums.
        what: &'static str,
        /// Number of bytes.
        bytes: usize,
    },
    /// Stored norms that no set of samples can have.
    #[error("the stored sums of the norms are damaged")]
    DamagedNorms,
}

/// Why a sample cannot be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// A NaN or an infinity.
    NotFinite,
    /// All values are zero.
    Zero,
    /// A norm outside 1e-75 .. 1e75, where float64 no longer holds a product of squares.
    NormOutOfRange,
    /// A norm too many times that of an earlier state, where a metric of norms is asked for.
    RatioOutOfRange,
}

impl Reason {
    /// The reason in words, to follow "state 3 ".
    pub fn words(self) -> &'static str {
        match self {
            Reason::NotFinite => "holds NaN or infinity",
            Reason::Zero => "is a zero vector",
            Reason::NormOutOfRange => "has a norm outside 1e-75 .. 1e75",
            Reason::RatioOutOfRange => "has more than 65535 times the norm of an earlier state",
        }
    }
}

/// A sample that was left out of every sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rejection {
    /// The sample's index in its batch.
    pub sample: usize,
    /// The first offending state.
    pub state: usize,
    /// Damage in words.
    pub reason: Reason,
}
