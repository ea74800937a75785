//! The search among the costs of blocks; see `shallower.values.costs`.

use std::num::NonZeroUsize;

use numpy::{PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::threads::PyThreads;
use crate::Costs;

/// The costs of all blocks, in whole numbers.
#[pyclass(name = "Costs", module = "shallower._core", frozen)]
pub(super) struct PyCosts(pub Costs);

#[pymethods]
impl PyCosts {
    #[staticmethod]
    fn of_blocks(values: PyReadonlyArray2<'_, f64>) -> PyResult<Self> {
        Ok(Self(Costs::of_blocks(
            values.as_slice()?,
            values.shape()[0],
        )?))
    }

    #[staticmethod]
    fn of_layers(values: PyReadonlyArray1<'_, f64>) -> PyResult<Self> {
        Ok(Self(Costs::of_layers(values.as_slice()?)?))
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.0.num_layers()
    }

    fn best_starts(&self, n: i64, count: usize) -> PyResult<Vec<usize>> {
        Ok(self.0.best_starts(n, count)?)
    }

    fn best_plan(
        &self,
        py: Python<'_>,
        n: i64,
        max_blocks: NonZeroUsize,
        protect_first: usize,
        protect_last: usize,
    ) -> PyResult<Vec<(usize, usize)>> {
        let find = || self.0.best_plan(n, max_blocks, protect_first, protect_last);
        let blocks = py.detach(find)?;
        Ok(blocks.into_iter().map(|b| (b.start, b.end)).collect())
    }
}

/// Counts how often each start was the best, by block size; see `Costs.bootstrap`.
#[pyfunction]
#[pyo3(signature = (values, num_states, num_resamples, seed, threads, *, more_is_better=false))]
pub(super) fn bootstrap(
    values: PyReadonlyArray2<'_, f32>,
    num_states: usize,
    num_resamples: usize,
    seed: u64,
    threads: &Bound<'_, PyThreads>,
    more_is_better: bool,
) -> PyResult<Vec<Vec<u64>>> {
    let rows = values.as_slice()?;
    let count = || crate::bootstrap(rows, num_states, more_is_better, num_resamples, seed);
    Ok(threads.get().run(values.py(), count)?)
}
