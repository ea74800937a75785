//! The border: the only file that knows `PyO3` and `NumPy`. It does no arithmetic.

// PyO3 hands arguments over by value.
#![allow(clippy::needless_pass_by_value)]

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;
use numpy::{
    PyArray1, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadonlyArray3, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::checkpoint::{self, Checkpoint, Cut, Job};
use crate::gguf::{self, Gguf, GgufError};
use crate::{Accumulator, Cka, Element, Error, Lengths, Metric, Order, Rejection, States, Tier};

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
            | Error::Sequences { .. }
            | Error::SequenceTooLong(_)
            | Error::CkaBatch(_)
            | Error::NoCkaBatch
            | Error::CkaOverflow
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
            | Error::DamagedNorms
            | Error::DamagedLengths
            | Error::SampleValues(_) => raised::ScanError::new_err(message),
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

/// Calls a method that is generic over the dtype of the states.
macro_rules! by_dtype {
    ($this:ident, $states:ident, $method:ident($($argument:expr),*)) => {{
        let (dtype, py) = ($states.dtype(), $states.py());
        if dtype.is_equiv_to(&numpy::dtype::<f32>(py)) {
            $this.$method::<f32>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<u16>(py)) {
            $this.$method::<u16>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<f16>(py)) {
            $this.$method::<f16>($($argument),*)
        } else if dtype.is_equiv_to(&numpy::dtype::<f64>(py)) {
            $this.$method::<f64>($($argument),*)
        } else {
            Err(raised::StatesError::new_err(format!(
                "states of dtype {dtype}: expected float32, float16, bfloat16 (as uint16 bits) or \
                 float64"
            )))
        }
    }};
}

type Rejected = Vec<(usize, usize, &'static str)>;

/// The values of the samples added, or their sums over sequences, `(samples or sequences, pairs)`
/// for each metric, if they are kept.
type Kept<'py> = Option<Vec<Bound<'py, PyArrayDyn<f32>>>>;

impl PyAccumulator {
    fn square<'py>(
        &self,
        py: Python<'py>,
        values: Vec<f64>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let size = self.inner.num_states();
        PyArray1::from_vec(py, values).reshape([size, size].as_slice())
    }

    fn add<'py, T: Element + numpy::Element>(
        &mut self,
        states: &Bound<'py, PyUntypedArray>,
        state_first: bool,
        keep: bool,
        sequences: Option<&[i64]>,
    ) -> PyResult<(Rejected, Kept<'py>, bool)> {
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
        let mut kept = vec![Vec::new(); inner.metrics().len()];
        let py = states.py();
        let (rejections, goes_on) = py.detach(|| {
            pool.install(|| match (sequences, keep) {
                (Some(numbers), _) => {
                    inner.update_sequences(&view, numbers, keep.then_some(&mut kept))
                }
                (None, true) => Ok((inner.update_and_keep(&view, &mut kept)?, false)),
                (None, false) => Ok((inner.update(&view)?, false)),
            })
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
        lengths: (u64, u64, u64, u64),
        rejected: u64,
        stored: Vec<(String, PyReadonlyArray1<'_, u64>)>,
        norms: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Self> {
        let sums = stored
            .iter()
            .map(|(name, words)| Ok((name.parse()?, words.as_slice()?.to_vec())))
            .collect::<PyResult<Vec<_>>>()?;
        let (alone, several, samples, squares) = lengths;
        let lengths = Lengths {
            alone,
            several,
            samples,
            squares,
        };
        let norms = norms.as_slice()?;
        Ok(Self {
            pool: pool(Some(1))?,
            inner: Accumulator::from_words(num_states, lengths, rejected, &sums, norms)?,
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
    fn num_sequences(&self) -> u64 {
        self.inner.lengths().sequences()
    }

    /// Sequences of one sample; of several; samples of the latter; their lengths squared.
    #[getter]
    fn lengths(&self) -> (u64, u64, u64, u64) {
        let lengths = self.inner.lengths();
        (
            lengths.alone,
            lengths.several,
            lengths.samples,
            lengths.squares,
        )
    }

    #[getter]
    fn rejected(&self) -> u64 {
        self.inner.rejected()
    }

    #[getter]
    fn metrics(&self) -> Vec<&'static str> {
        self.inner.metrics().into_iter().map(Metric::name).collect()
    }

    #[pyo3(signature = (states, state_first=false, keep=false, sequences=None))]
    fn update<'py>(
        &mut self,
        states: &Bound<'py, PyUntypedArray>,
        state_first: bool,
        keep: bool,
        sequences: Option<PyReadonlyArray1<'_, i64>>,
    ) -> PyResult<(Rejected, Kept<'py>, bool)> {
        let sequences = sequences
            .as_ref()
            .map(|array| array.as_slice())
            .transpose()?;
        by_dtype!(self, states, add(states, state_first, keep, sequences))
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

    fn best_starts(&self, metric: &str, n: i64, count: usize) -> PyResult<Vec<usize>> {
        Ok(self.inner.best_starts(metric.parse()?, n, count)?)
    }

    fn best_plan(
        &self,
        py: Python<'_>,
        metric: &str,
        n: i64,
        max_blocks: NonZeroUsize,
        protect_first: usize,
        protect_last: usize,
    ) -> PyResult<Vec<(usize, usize)>> {
        let (inner, metric) = (&self.inner, metric.parse()?);
        let find = || inner.best_plan(metric, n, max_blocks, protect_first, protect_last);
        let blocks = py.detach(find)?;
        Ok(blocks.into_iter().map(|b| (b.start, b.end)).collect())
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

/// The running sums behind `Scan.cka`; see `shallower.cka`.
#[pyclass(name = "Cka", module = "shallower._core")]
struct PyCka {
    inner: Cka,
    num_states: usize,
    pool: rayon::ThreadPool,
}

impl PyCka {
    fn add<T: Element + numpy::Element>(
        &mut self,
        states: &Bound<'_, PyUntypedArray>,
    ) -> PyResult<()> {
        let array: PyReadonlyArray3<'_, T> = states.extract()?;
        let &[samples, num_states, width] = array.shape() else {
            return Err(PyTypeError::new_err("states must have three axes"));
        };
        let order = Order::SampleFirst;
        let view = States::new(array.as_slice()?, samples, num_states, width, order)?;
        let Self { inner, pool, .. } = self;
        Ok(states
            .py()
            .detach(|| pool.install(|| inner.update(&view)))?)
    }
}

#[pymethods]
impl PyCka {
    #[new]
    #[pyo3(signature = (num_states, batch_size, threads=None))]
    fn new(num_states: usize, batch_size: usize, threads: Option<i64>) -> PyResult<Self> {
        Ok(Self {
            inner: Cka::new(num_states, batch_size)?,
            num_states,
            pool: pool(threads)?,
        })
    }

    #[staticmethod]
    fn from_words(
        num_states: usize,
        batch_size: usize,
        batches: u64,
        samples: u64,
        words: PyReadonlyArray1<'_, u64>,
    ) -> PyResult<Self> {
        let words = words.as_slice()?;
        Ok(Self {
            inner: Cka::from_words(num_states, batch_size, batches, samples, words)?,
            num_states,
            pool: pool(Some(1))?,
        })
    }

    #[getter]
    fn batch_size(&self) -> usize {
        self.inner.batch_size()
    }

    #[getter]
    fn batches(&self) -> u64 {
        self.inner.batches()
    }

    #[getter]
    fn samples(&self) -> u64 {
        self.inner.samples()
    }

    /// `states` are of a dtype that `Accumulator.update` takes, samples first.
    fn update(&mut self, states: &Bound<'_, PyUntypedArray>) -> PyResult<()> {
        by_dtype!(self, states, add(states))
    }

    fn merge(&mut self, other: PyRef<'_, Self>) -> PyResult<()> {
        Ok(self.inner.merge(&other.inner)?)
    }

    fn values<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let shape = [self.num_states, self.num_states];
        PyArray1::from_vec(py, self.inner.values()?).reshape(shape.as_slice())
    }

    fn to_words<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u64>> {
        PyArray1::from_vec(py, self.inner.to_words())
    }
}

/// How often each start was the best, by block size; see `Scan.bootstrap`.
#[pyfunction]
#[pyo3(signature = (values, num_states, metric, num_resamples, seed, threads=None))]
fn bootstrap(
    values: PyReadonlyArray2<'_, f32>,
    num_states: usize,
    metric: &str,
    num_resamples: usize,
    seed: u64,
    threads: Option<i64>,
) -> PyResult<Vec<Vec<u64>>> {
    let (metric, pool) = (metric.parse()?, pool(threads)?);
    let rows = values.as_slice()?;
    let count = || crate::bootstrap(rows, num_states, metric, num_resamples, seed);
    Ok(values.py().detach(|| pool.install(count))?)
}

/// Name, dtype, shape, first byte and the one past the last, counted from the header's end.
type Tensor = (String, String, Vec<u64>, u64, u64);

/// The free texts and the tensors, in the order of their bytes, of a safetensors header that
/// `data_len` bytes follow; see `shallower.states_file`.
#[pyfunction]
fn parse_header(json: &[u8], data_len: u64) -> PyResult<(BTreeMap<String, String>, Vec<Tensor>)> {
    let header = checkpoint::Header::parse(json, data_len).map_err(PyValueError::new_err)?;
    let tensors = header.tensors.into_iter();
    let described = tensors.map(|t| (t.name, t.dtype, t.shape, t.start, t.end));
    Ok((header.metadata, described.collect()))
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

    fn tensors(&self) -> Vec<(&str, &str, &[u64], &Path, u64)> {
        let shards = self.0.shards.iter();
        let all = shards.flat_map(|s| s.header.tensors.iter().map(move |t| (s, t)));
        all.map(|(s, t)| (&*t.name, &*t.dtype, &*t.shape, &*s.path, s.position(t)))
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
    use super::parse_header;

    #[pymodule_export]
    use super::PyCka;

    #[pymodule_export]
    use super::bootstrap;

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
