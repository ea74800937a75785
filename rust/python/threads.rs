//! Threads, which belong to the work and not to what comes of it.

use pyo3::prelude::*;

use crate::error::Error;
use crate::limits::MAX_THREADS;

/// Threads of the core, started here, and gone with the last reference.
#[pyclass(name = "Threads", module = "shallower._core", frozen)]
pub(super) struct PyThreads(rayon::ThreadPool);

impl PyThreads {
    /// Does the work on these threads, while Python goes on.
    pub fn run<R: Send>(&self, py: Python<'_>, work: impl FnOnce() -> R + Send) -> R {
        py.detach(|| self.0.install(work))
    }
}

#[pymethods]
impl PyThreads {
    /// So many, or by default one for each processor.
    #[new]
    #[pyo3(signature = (threads=None))]
    fn new(threads: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let threads = match threads {
            None => 0,
            Some(threads) => threads
                .extract()
                .ok()
                .filter(|threads| (1..=MAX_THREADS).contains(threads))
                .ok_or_else(|| Error::Threads(threads.to_string()))?,
        };
        let built = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = built.map_err(|error| Error::ThreadPool {
            threads,
            reason: error.to_string(),
        })?;
        Ok(Self(pool))
    }
}
