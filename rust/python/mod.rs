//! The border: the only folder that knows `PyO3` and `NumPy`. It does no arithmetic.
//!
//! The core has no state that threads share, and so needs no global lock. Its statics are
//! constants, and one answer that is found once (whether the processor has tiles); scratch memory
//! belongs to a thread. An object is frozen, or `PyO3` lends it to one writer or to many readers.
//! If an array is written to while it is compared, values mix, but no address is made of a value.
//! `SHALLOWER_TIER` is set before threads start, as any variable.

// PyO3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

mod checkpoint;
mod cka;
mod costs;
mod errors;
mod experts;
mod gguf;
mod states;
mod sums;
mod threads;

use pyo3::prelude::*;

use crate::Tier;

/// Let signals through, then say how far the work is.
fn tell(py: Python<'_>, progress: Option<&Py<PyAny>>, done: u64, total: u64) -> PyResult<()> {
    py.check_signals()?;
    progress.map_or(Ok(()), |progress| {
        progress.call1(py, (done, total)).map(drop)
    })
}

/// Every instruction tier, and whether this machine has it.
#[pyfunction]
fn tiers() -> Vec<(&'static str, bool)> {
    let all = Tier::ALL.into_iter();
    all.map(|tier| (tier.name(), tier.is_available())).collect()
}

/// The instruction tier in use: the one that `SHALLOWER_TIER` names, else the fastest.
#[pyfunction]
fn tier() -> PyResult<&'static str> {
    Ok(Tier::chosen()?.name())
}

/// The Rust core of shallower.
///
/// It has no state that threads share, and so needs no global lock.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use super::checkpoint::{PyCheckpoint, PyJob, parse_header};

    #[pymodule_export]
    use super::cka::PyCka;

    #[pymodule_export]
    use super::costs::{PyCosts, bootstrap};

    #[pymodule_export]
    use super::experts::PyExpertSums;

    #[pymodule_export]
    use super::gguf::PyGguf;

    #[pymodule_export]
    use super::sums::{PyAccumulator, PySums};

    #[pymodule_export]
    use super::threads::PyThreads;

    #[pymodule_export]
    use super::{tier, tiers};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
