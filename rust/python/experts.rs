//! The sums over the tokens of every expert.

use numpy::{PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::{ExpertSums, Moment};

/// The sums behind `ExpertStatistics`; see `shallower.scanning.expert_statistics`.
#[pyclass(name = "ExpertSums", module = "shallower._core")]
pub(super) struct PyExpertSums(ExpertSums);

fn shaped<'py, T: numpy::Element>(
    py: Python<'py>,
    values: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    PyArray1::from_vec(py, values).reshape(shape)
}

#[pymethods]
impl PyExpertSums {
    #[new]
    #[pyo3(signature = (num_layers, num_experts, num_values, *, errors = true))]
    fn new(
        num_layers: usize,
        num_experts: usize,
        num_values: usize,
        errors: bool,
    ) -> PyResult<Self> {
        let sums = ExpertSums::new(num_layers, num_experts, num_values, errors)?;
        Ok(Self(sums))
    }

    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self(ExpertSums::from_bytes(data)?))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    #[getter]
    fn shape(&self) -> (usize, usize, usize) {
        self.0.shape().into()
    }

    #[getter]
    fn texts(&self) -> Vec<u64> {
        self.0.texts().to_vec()
    }

    /// `counts` are (texts, experts) uint64, `values` (texts, experts, values) float64.
    fn update(
        &mut self,
        layer: usize,
        counts: PyReadonlyArrayDyn<'_, u64>,
        values: PyReadonlyArrayDyn<'_, f64>,
    ) -> PyResult<u64> {
        Ok(self
            .0
            .update(layer, counts.as_slice()?, values.as_slice()?)?)
    }

    fn merge(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }

    fn clear(&mut self, value: usize) {
        self.0.clear(value);
    }

    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<u64>>> {
        shaped(py, self.0.counts(), &self.0.shape()[..2])
    }

    fn count_squares<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        shaped(py, self.0.count_squares(), &self.0.shape()[..2])
    }

    fn sums<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        shaped(py, self.0.moment(Moment::Sum), &self.0.shape())
    }

    fn squares<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        shaped(py, self.0.moment(Moment::Square), &self.0.shape())
    }

    fn products<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        shaped(py, self.0.moment(Moment::Product), &self.0.shape())
    }
}
