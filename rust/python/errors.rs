//! Errors of the core as the classes of `shallower.errors`.

use pyo3::PyErr;

use crate::checkpoint;
use crate::error::Error;

pub(super) mod raised {
    //! The classes that the core raises.
    use pyo3::import_exception;

    import_exception!(shallower.errors, StatesError);
    import_exception!(shallower.errors, MetricError);
    import_exception!(shallower.errors, LayersError);
    import_exception!(shallower.errors, ExpertsError);
    import_exception!(shallower.errors, CostsError);
    import_exception!(shallower.errors, ScanError);
    import_exception!(shallower.errors, ThreadsError);
    import_exception!(shallower.errors, TierError);
    import_exception!(shallower.errors, ModelError);
    import_exception!(shallower.errors, OutputError);
}

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::BufferLength { .. }
            | Error::NumStates(_)
            | Error::EmptyStates
            | Error::StateCount { .. }
            | Error::TooManySamples
            | Error::Sequences { .. }
            | Error::SequenceTooLong(_)
            | Error::CkaBatch(_)
            | Error::NoCkaBatch
            | Error::CkaOverflow
            | Error::ExpertSizes { .. }
            | Error::ExpertUpdate { .. }
            | Error::NoSamples { .. } => raised::StatesError::new_err(message),
            Error::UnknownMetric { .. }
            | Error::MetricList(_)
            | Error::MetricNotHeld { .. }
            | Error::NoDistance(_) => raised::MetricError::new_err(message),
            Error::UnknownTier { .. } | Error::TierUnavailable { .. } => {
                raised::TierError::new_err(message)
            }
            Error::Unmergeable { .. }
            | Error::DamagedSums { .. }
            | Error::DamagedCka
            | Error::DamagedExperts
            | Error::DamagedNorms
            | Error::DamagedLengths
            | Error::StoredMark(_)
            | Error::StoredLength { .. }
            | Error::SampleValues(_) => raised::ScanError::new_err(message),
            Error::CostsLength { .. }
            | Error::InfiniteCost { .. }
            | Error::NothingMeasured { .. } => raised::CostsError::new_err(message),
            Error::BlockSize { .. } | Error::Protected { .. } => {
                raised::LayersError::new_err(message)
            }
            Error::Threads(_) | Error::ThreadPool { .. } => raised::ThreadsError::new_err(message),
        }
    }
}

impl From<checkpoint::Error> for PyErr {
    fn from(error: checkpoint::Error) -> Self {
        use checkpoint::Error as E;
        let message = error.to_string();
        match error {
            E::Damaged { .. }
            | E::Outside { .. }
            | E::NoWeights(_)
            | E::Read { .. }
            | E::Changed(_)
            | E::EndedEarly(_)
            | E::Prefix(_)
            | E::NoSuchLayer { .. }
            | E::NoSuchExpert { .. }
            | E::Stack { .. } => raised::ModelError::new_err(message),
            E::Survivors { .. } => raised::LayersError::new_err(message),
            E::Experts { .. } => raised::ExpertsError::new_err(message),
            E::ShardSize { .. } | E::Write { .. } | E::Cancelled => {
                raised::OutputError::new_err(message)
            }
        }
    }
}
