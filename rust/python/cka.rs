//! The sums behind CKA.

use numpy::{PyArrayDyn, PyReadonlyArray3, PyUntypedArray};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::states::{by_dtype, square, view};
use super::threads::PyThreads;
use crate::{Cka, Element, Order};

/// The sums behind `Scan.cka`; see `shallower.scanning.cka`.
#[pyclass(name = "Cka", module = "shallower._core")]
pub(super) struct PyCka(Cka);

impl PyCka {
    fn add<T: Element + numpy::Element>(
        &mut self,
        states: &Bound<'_, PyUntypedArray>,
        threads: &PyThreads,
    ) -> PyResult<()> {
        let array: PyReadonlyArray3<'_, T> = states.extract()?;
        let view = view(&array, Order::SampleFirst)?;
        Ok(threads.run(states.py(), || self.0.update(&view))?)
    }
}

#[pymethods]
impl PyCka {
    #[new]
    fn new(num_states: usize, batch_size: usize) -> PyResult<Self> {
        Ok(Self(Cka::new(num_states, batch_size)?))
    }

    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self(Cka::from_bytes(data)?))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    #[getter]
    fn num_states(&self) -> usize {
        self.0.num_states()
    }

    #[getter]
    fn batch_size(&self) -> usize {
        self.0.batch_size()
    }

    #[getter]
    fn samples(&self) -> u64 {
        self.0.samples()
    }

    /// `states` are of a dtype that `Accumulator.update` takes, samples first.
    fn update(
        &mut self,
        states: &Bound<'_, PyUntypedArray>,
        threads: &Bound<'_, PyThreads>,
    ) -> PyResult<()> {
        by_dtype!(self, states, add(states, threads.get()))
    }

    fn merge(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }

    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        square(py, self.0.num_states(), self.0.values()?)
    }
}
