//! The border: the only file that knows `PyO3` and `NumPy`. It does no arithmetic.

// PyO3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use numpy::{
    PyArray1, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray3,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::checkpoint::{self, Checkpoint, Cut, Job};
use crate::gguf::{self, Gguf, GgufError};
use crate::{Accumulator, Element, Error, Metric, Order, Rejection, States, Tier};

mod raised {
    //! The classes of `shallower.errors` that the core raises.
    use pyo3::import_exception;

    import_exception!(shallower.errors, StatesError);
    import_exception!(shallower.errors, MetricError);
    import_exception!(shallower.errors, LayersError);
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
            | Error::NoSamples { .. } => raised::StatesError::new_err(message),
            Error::UnknownMetric(_)
            | Error::MetricList(_)
            | Error::MetricNotHeld { .. }
            | Error::NoDistance(_) => raised::MetricError::new_err(message),
            Error::UnknownTier(_) | Error::TierUnavailable(_) => {
                raised::TierError::new_err(message)
            }
            Error::Unmergeable { .. } | Error::DamagedSums { .. } | Error::DamagedNorms => {
                raised::ScanError::new_err(message)
            }
            Error::BlockSize { .. } => raised::LayersError::new_err(message),
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
            | E::NoSuchLayer { .. } => raised::ModelError::new_err(message),
            E::Survivors { .. } => raised::LayersError::new_err(message),
            E::ShardSize { .. } | E::Write { .. } | E::Cancelled => {
                raised::OutputError::new_err(message)
            }
        }
    }
}

/// The running sums behind a `Scan`; see `shallower.similarity`.
#[pyclass(name = "Accumulator", module = "shallower._core")]
struct PyAccumulator {
    inner: Accumulator,
    pool: rayon::ThreadPool,
}

fn pool(threads: Option<i64>) -> Result<rayon::ThreadPool, Error> {
    let threads = match threads {
        None => 0,
        Some(threads) => usize::try_from(threads)
            .ok()
            .filter(|&threads| threads > 0)
            .ok_or(Error::Threads(threads))?,
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::ThreadPool {
            threads,
            reason: error.to_string(),
        })
}

fn parse(metrics: &[String]) -> Result<Vec<Metric>, Error> {
    metrics.iter().map(|name| name.parse()).collect()
}

type Rejected = Vec<(usize, usize, &'static str)>;

impl PyAccumulator {
    fn square<'py>(
        &self,
        py: Python<'py>,
        values: Vec<f64>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let size = self.inner.num_states();
        PyArray1::from_vec(py, values).reshape([size, size].as_slice())
    }

    fn add<T: Element + numpy::Element>(
        &mut self,
        states: &Bound<'_, PyUntypedArray>,
        state_first: bool,
    ) -> PyResult<Rejected> {
        let array: PyReadonlyArray3<'_, T> = states.extract()?;
        let &[outer, inner, width] = array.shape() else {
            return Err(PyTypeError::new_err("states must have three axes"));
        };
        let (order, samples, num_states) = if state_first {
            (Order::StateFirst, inner, outer)
        } else {
            (Order::SampleFirst, outer, inner)
        };
        let view = States::new(array.as_slice()?, samples, num_states, width, order)?;
        let Self { inner, pool } = self;
        let rejections = states
            .py()
            .detach(|| pool.install(|| inner.update(&view)))?;
        let name = |r: Rejection| (r.sample, r.state, r.reason.words());
        Ok(rejections.into_iter().map(name).collect())
    }
}

#[pymethods]
impl PyAccumulator {
    #[new]
    #[pyo3(signature = (num_states, metrics, threads=None))]
    fn new(num_states: usize, metrics: Vec<String>, threads: Option<i64>) -> PyResult<Self> {
        Ok(Self {
            pool: pool(threads)?,
            inner: Accumulator::new(num_states, &parse(&metrics)?)?,
        })
    }

    #[staticmethod]
    fn from_words(
        num_states: usize,
        count: u64,
        rejected: u64,
        stored: Vec<(String, PyReadonlyArray1<'_, u64>)>,
        norms: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Self> {
        let sums = stored
            .iter()
            .map(|(name, words)| Ok((name.parse()?, words.as_slice()?.to_vec())))
            .collect::<PyResult<Vec<_>>>()?;
        Ok(Self {
            pool: pool(Some(1))?,
            inner: Accumulator::from_words(num_states, count, rejected, &sums, norms.as_slice()?)?,
        })
    }

    #[getter]
    fn num_states(&self) -> usize {
        self.inner.num_states()
    }

    #[getter]
    fn count(&self) -> u64 {
        self.inner.count()
    }

    #[getter]
    fn rejected(&self) -> u64 {
        self.inner.rejected()
    }

    #[getter]
    fn metrics(&self) -> Vec<&'static str> {
        self.inner.metrics().into_iter().map(Metric::name).collect()
    }

    #[pyo3(signature = (states, state_first=false))]
    fn update(
        &mut self,
        states: &Bound<'_, PyUntypedArray>,
        state_first: bool,
    ) -> PyResult<Rejected> {
        let dtype = states.dtype();
        let py = states.py();
        if dtype.is_equiv_to(&numpy::dtype::<f32>(py)) {
            self.add::<f32>(states, state_first)
        } else if dtype.is_equiv_to(&numpy::dtype::<u16>(py)) {
            self.add::<u16>(states, state_first)
        } else if dtype.is_equiv_to(&numpy::dtype::<f16>(py)) {
            self.add::<f16>(states, state_first)
        } else if dtype.is_equiv_to(&numpy::dtype::<f64>(py)) {
            self.add::<f64>(states, state_first)
        } else {
            Err(raised::StatesError::new_err(format!(
                "states of dtype {dtype}: expected float32, float16, bfloat16 (as uint16 bits) or float64"
            )))
        }
    }

    fn reject(&mut self, samples: u64) -> PyResult<()> {
        Ok(self.inner.reject(samples)?)
    }

    fn merge(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        Ok(self.inner.merge(&other.inner)?)
    }

    fn mean<'py>(&self, py: Python<'py>, metric: &str) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        self.square(py, self.inner.mean(metric.parse()?)?)
    }

    fn variance<'py>(
        &self,
        py: Python<'py>,
        metric: &str,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        self.square(py, self.inner.variance(metric.parse()?)?)
    }

    fn best_start(&self, metric: &str, n: i64) -> PyResult<usize> {
        Ok(self.inner.best_start(metric.parse()?, n)?)
    }

    fn norms<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(PyArray1::from_vec(py, self.inner.norms()?))
    }

    fn norms_to_words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        PyArray1::from_vec(py, self.inner.norms_to_words())
    }

    fn to_words<'py>(&self, py: Python<'py>, metric: &str) -> PyResult<Bound<'py, PyArray1<u64>>> {
        Ok(PyArray1::from_vec(
            py,
            self.inner.to_words(metric.parse()?)?,
        ))
    }
}

/// A checkpoint on disk, its headers read; see `shallower.checkpoint`.
#[pyclass(name = "Checkpoint", module = "shallower._core", frozen)]
struct PyCheckpoint(Arc<Checkpoint>);

#[pymethods]
impl PyCheckpoint {
    #[new]
    fn new(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let opened = py.detach(|| Checkpoint::open(&folder))?;
        Ok(Self(Arc::new(opened)))
    }

    #[getter]
    fn folder(&self) -> PathBuf {
        self.0.folder.clone()
    }

    fn resolve(&self, name: &str) -> PyResult<PathBuf> {
        Ok(self.0.resolve(name)?)
    }

    fn tensors(&self) -> Vec<(String, String, Vec<u64>, PathBuf)> {
        let shards = self.0.shards.iter();
        let all = shards.flat_map(|s| s.header.tensors.iter().map(move |t| (t, &s.path)));
        all.map(|(t, path)| {
            (
                t.name.clone(),
                t.dtype.clone(),
                t.shape.clone(),
                path.clone(),
            )
        })
        .collect()
    }

    fn cut(
        &self,
        prefixes: Vec<String>,
        num_layers: u64,
        survivors: Vec<u64>,
        max_shard_size: u64,
    ) -> PyResult<PyJob> {
        let cut = Cut::new(prefixes, num_layers, survivors)?;
        Ok(PyJob(Job::new(Arc::clone(&self.0), cut, max_shard_size)?))
    }
}

/// A cut of a checkpoint, laid out; see `shallower.checkpoint`.
#[pyclass(name = "Job", module = "shallower._core", frozen)]
struct PyJob(Job);

#[pymethods]
impl PyJob {
    #[getter]
    fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    #[getter]
    fn journal(&self) -> String {
        self.0.journal()
    }

    #[getter]
    fn files(&self) -> Vec<(&str, u64)> {
        self.0.files()
    }

    /// Ctrl-C and whatever `progress` raises stop the copy.
    #[pyo3(signature = (folder, progress=None))]
    fn write(&self, py: Python<'_>, folder: PathBuf, progress: Option<Py<PyAny>>) -> PyResult<()> {
        let mut raised = None;
        let mut report = |done: u64, total: u64| {
            let heard = Python::attach(|py| tell(py, progress.as_ref(), done, total));
            match heard {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    raised = Some(error);
                    ControlFlow::Break(())
                }
            }
        };
        let written = py.detach(|| self.0.write(&folder, &mut report));
        raised.map_or_else(|| Ok(written?), Err)
    }
}

/// A GGUF file, its header read; see `shallower.gguf`.
#[pyclass(name = "Gguf", module = "shallower._core")]
struct PyGguf {
    path: PathBuf,
    file: File,
    inner: Gguf,
}

fn gguf_error(path: &Path, error: &GgufError) -> PyErr {
    let message = format!("{} {error}", path.display());
    match error {
        GgufError::Survivors { .. } => raised::LayersError::new_err(message),
        GgufError::Write(_) | GgufError::Stopped => raised::OutputError::new_err(message),
        GgufError::Read(_)
        | GgufError::Damaged { .. }
        | GgufError::Format(_)
        | GgufError::Split(_)
        | GgufError::NoLayers(_)
        | GgufError::Refused { .. } => raised::ModelError::new_err(message),
    }
}

#[pymethods]
impl PyGguf {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let read = || {
            let mut file = gguf::open(&path)?;
            Ok((Gguf::read(&mut file)?, file))
        };
        let (inner, file) = py.detach(read).map_err(|error| gguf_error(&path, &error))?;
        Ok(Self { path, file, inner })
    }

    #[getter]
    fn architecture(&self) -> &str {
        self.inner.architecture()
    }

    #[getter]
    fn num_layers(&self) -> usize {
        self.inner.num_layers()
    }

    fn cut_size(&mut self, survivors: Vec<usize>) -> PyResult<u64> {
        let cut = self.inner.cut(&mut self.file, &survivors);
        Ok(cut.map_err(|error| gguf_error(&self.path, &error))?.size())
    }

    #[pyo3(signature = (survivors, out, progress=None))]
    fn cut(
        &mut self,
        py: Python<'_>,
        survivors: Vec<usize>,
        out: PathBuf,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let Self { path, file, inner } = self;
        let planned = inner.cut(file, &survivors);
        let cut = planned.map_err(|error| gguf_error(path, &error))?;
        let (total, mut raised) = (cut.size(), None);
        let told = |done| Python::attach(|py| tell(py, progress.as_ref(), done, total));
        let saved = py.detach(|| {
            cut.save(file, &out, &mut |done| {
                raised = told(done).err();
                raised.is_none()
            })
        });
        match (saved, raised) {
            (Ok(()), _) => Ok(()),
            (Err(GgufError::Stopped), Some(error)) => Err(error),
            (Err(error @ GgufError::Write(_)), _) => Err(gguf_error(&out, &error)),
            (Err(error), _) => Err(gguf_error(path, &error)),
        }
    }
}

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
#[pymodule]
mod _core {
    #[pymodule_export]
    use super::PyAccumulator;

    #[pymodule_export]
    use super::tier;

    #[pymodule_export]
    use super::tiers;

    #[pymodule_export]
    use super::PyCheckpoint;

    #[pymodule_export]
    use super::PyJob;

    #[pymodule_export]
    use super::PyGguf;

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
