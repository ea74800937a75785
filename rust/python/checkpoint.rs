//! Checkpoints in safetensors, cut without being read whole.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::tell;
use crate::checkpoint::{self, Checkpoint, Cut, Experts, Job};

/// Name, dtype, shape, first byte and the one past the last, counted from the header's end.
type Tensor = (String, String, Vec<u64>, u64, u64);

/// The experts of a layer, those that stay by layer, and the names of stacks of experts.
type Mixture = (u64, BTreeMap<u64, Vec<u64>>, BTreeSet<String>);

/// The free texts and the tensors, in the order of their bytes, of a safetensors header that
/// `data_len` bytes follow; see `shallower.scanning.states_file`.
#[pyfunction]
pub(super) fn parse_header(
    json: &[u8],
    data_len: u64,
) -> PyResult<(BTreeMap<String, String>, Vec<Tensor>)> {
    let header = checkpoint::Header::parse(json, data_len).map_err(PyValueError::new_err)?;
    let tensors = header.tensors.into_iter();
    let described = tensors.map(|t| (t.name, t.dtype, t.shape, t.start, t.end));
    Ok((header.metadata, described.collect()))
}

/// A checkpoint on disk, its headers read; see `shallower.cutting.checkpoint`.
#[pyclass(name = "Checkpoint", module = "shallower._core", frozen)]
pub(super) struct PyCheckpoint(Arc<Checkpoint>);

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

    #[pyo3(signature = (prefixes, num_layers, survivors, max_shard_size, experts=None))]
    fn cut(
        &self,
        prefixes: Vec<String>,
        num_layers: u64,
        survivors: Vec<u64>,
        max_shard_size: u64,
        experts: Option<Mixture>,
    ) -> PyResult<PyJob> {
        let mut cut = Cut::new(prefixes, num_layers, survivors)?;
        if let Some((num_experts, kept, stacks)) = experts {
            cut = cut.with_experts(Experts::new(num_experts, kept, stacks)?);
        }
        Ok(PyJob(Job::new(Arc::clone(&self.0), cut, max_shard_size)?))
    }
}

/// A cut of a checkpoint, laid out; see `shallower.cutting.checkpoint`.
#[pyclass(name = "Job", module = "shallower._core", frozen)]
pub(super) struct PyJob(Job);

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
