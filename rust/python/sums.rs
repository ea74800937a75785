//! The sums behind a scan, and samples on their way into them.

use numpy::{
    PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray3, PyUntypedArray,
};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::costs::PyCosts;
use super::states::{by_dtype, square, view};
use super::threads::PyThreads;
use crate::{Accumulator, Element, Error, Metric, Order, Rejection, Sums};

/// The sums behind a `Scan`; see `shallower.scanning.scan`.
#[pyclass(name = "Sums", module = "shallower._core")]
pub(super) struct PySums(Sums);

fn parse(metrics: &[String]) -> Result<Vec<Metric>, Error> {
    metrics.iter().map(|name| name.parse()).collect()
}

#[pymethods]
impl PySums {
    #[new]
    fn new(num_states: usize, metrics: Vec<String>) -> PyResult<Self> {
        Ok(Self(Sums::new(num_states, &parse(&metrics)?)?))
    }

    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self(Sums::from_bytes(data)?))
    }

    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.to_bytes())
    }

    #[getter]
    fn num_states(&self) -> usize {
        self.0.num_states()
    }

    #[getter]
    fn count(&self) -> u64 {
        self.0.count()
    }

    #[getter]
    fn num_sequences(&self) -> u64 {
        self.0.lengths().sequences()
    }

    #[getter]
    fn rejected(&self) -> u64 {
        self.0.rejected()
    }

    #[getter]
    fn metrics(&self) -> Vec<&'static str> {
        self.0.metrics().into_iter().map(Metric::name).collect()
    }

    fn merge(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }

    fn mean<'py>(&self, py: Python<'py>, metric: &str) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        square(py, self.0.num_states(), self.0.mean(metric.parse()?)?)
    }

    fn variance<'py>(
        &self,
        py: Python<'py>,
        metric: &str,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        square(py, self.0.num_states(), self.0.variance(metric.parse()?)?)
    }

    fn costs(&self, metric: &str) -> PyResult<PyCosts> {
        Ok(PyCosts(self.0.costs(metric.parse()?)?))
    }

    fn norms<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(PyArray1::from_vec(py, self.0.norms()?))
    }
}

/// Samples into `Sums`; see `shallower.scanning.builder`.
#[pyclass(name = "Accumulator", module = "shallower._core")]
pub(super) struct PyAccumulator(Accumulator);

type Rejected = Vec<(usize, usize, &'static str)>;

/// The values of the samples added, or their sums over sequences, `(samples or sequences, pairs)`
/// for each metric, if they are kept.
type Kept<'py> = Option<Vec<Bound<'py, PyArrayDyn<f32>>>>;

impl PyAccumulator {
    fn add<'py, T: Element + numpy::Element>(
        &mut self,
        states: &Bound<'py, PyUntypedArray>,
        threads: &PyThreads,
        order: Order,
        keep: bool,
        sequences: Option<&[i64]>,
    ) -> PyResult<(Rejected, Kept<'py>, bool)> {
        let (py, inner) = (states.py(), &mut self.0);
        let array: PyReadonlyArray3<'_, T> = states.extract()?;
        let view = view(&array, order)?;
        let num_states = view.num_states();
        let mut kept = vec![Vec::new(); inner.sums().metrics().len()];
        let (rejections, goes_on) = threads.run(py, || match (sequences, keep) {
            (Some(numbers), _) => inner.update_sequences(&view, numbers, keep.then_some(&mut kept)),
            (None, true) => Ok((inner.update_and_keep(&view, &mut kept)?, false)),
            (None, false) => Ok((inner.update(&view)?, false)),
        })?;
        let pairs = num_states * (num_states - 1) / 2;
        let shape = [kept[0].len() / pairs, pairs];
        let name = |r: Rejection| (r.sample, r.state, r.reason.words());
        let rejected = rejections.into_iter().map(name).collect();
        let array = |values| PyArray1::from_vec(py, values).reshape(shape.as_slice());
        let kept = keep.then(|| kept.into_iter().map(array).collect());
        Ok((rejected, kept.transpose()?, goes_on))
    }
}

#[pymethods]
impl PyAccumulator {
    #[new]
    fn new(num_states: usize, metrics: Vec<String>) -> PyResult<Self> {
        Ok(Self(Accumulator::new(num_states, &parse(&metrics)?)?))
    }

    /// The sums of all samples so far.
    fn sums(&self) -> PySums {
        PySums(self.0.sums().clone())
    }

    #[pyo3(signature = (states, threads, *, state_first=false, keep=false, sequences=None))]
    fn update<'py>(
        &mut self,
        states: &Bound<'py, PyUntypedArray>,
        threads: &Bound<'py, PyThreads>,
        state_first: bool,
        keep: bool,
        sequences: Option<PyReadonlyArray1<'_, i64>>,
    ) -> PyResult<(Rejected, Kept<'py>, bool)> {
        let sequences = sequences
            .as_ref()
            .map(|array| array.as_slice())
            .transpose()?;
        let order = if state_first {
            Order::StateFirst
        } else {
            Order::SampleFirst
        };
        by_dtype!(
            self,
            states,
            add(states, threads.get(), order, keep, sequences)
        )
    }

    fn reject(&mut self, samples: u64) -> PyResult<()> {
        Ok(self.0.reject(samples)?)
    }

    fn merge(&mut self, other: PyRef<'_, PySums>) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }
}
