//! GGUF files, cut without being read whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::errors::raised;
use super::tell;
use crate::gguf::{self, Cut, Experts, Gguf, GgufError, Told};

/// The number of a layer's experts, and by layer those that stay.
type KeptExperts = (u64, BTreeMap<u64, Vec<u64>>);

/// A GGUF file, its header read; see `shallower.cutting.gguf`.
#[pyclass(name = "Gguf", module = "shallower._core")]
pub(super) struct PyGguf {
    path: PathBuf,
    file: File,
    inner: Gguf,
}

fn gguf_error(path: &Path, error: &GgufError) -> PyErr {
    let message = format!("{} {error}", path.display());
    match error {
        GgufError::Survivors { .. } => raised::LayersError::new_err(message),
        GgufError::Experts(_) => raised::ExpertsError::new_err(message),
        GgufError::Write(_) | GgufError::Stopped => raised::OutputError::new_err(message),
        GgufError::Read(_)
        | GgufError::Damaged { .. }
        | GgufError::Format(_)
        | GgufError::Split(_)
        | GgufError::NoLayers(_)
        | GgufError::Refused { .. } => raised::ModelError::new_err(message),
    }
}

impl PyGguf {
    fn planned(&mut self, survivors: &[usize], experts: Option<KeptExperts>) -> PyResult<Cut> {
        let Self { path, file, inner } = self;
        let experts = experts.map(|(number, kept)| Experts::new(number, kept));
        let planned = experts
            .transpose()
            .and_then(|experts| inner.cut(file, survivors, experts.as_ref()));
        planned.map_err(|error| gguf_error(path, &error))
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

    #[getter]
    fn expert_layers(&self) -> Vec<usize> {
        self.inner.expert_layers()
    }

    fn metadata<'py>(
        &mut self,
        py: Python<'py>,
        keys: Vec<String>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let told = PyDict::new(py);
        for key in keys {
            match self.inner.told(&mut self.file, &key) {
                Some(Told::Number(number)) => told.set_item(key, number)?,
                Some(Told::Text(text)) => told.set_item(key, text)?,
                Some(Told::Texts(texts)) => told.set_item(key, texts)?,
                None => {}
            }
        }
        Ok(told)
    }

    #[pyo3(signature = (survivors, experts=None))]
    fn cut_size(&mut self, survivors: Vec<usize>, experts: Option<KeptExperts>) -> PyResult<u64> {
        Ok(self.planned(&survivors, experts)?.size())
    }

    #[pyo3(signature = (survivors, out, progress=None, *, experts=None))]
    fn cut(
        &mut self,
        py: Python<'_>,
        survivors: Vec<usize>,
        out: PathBuf,
        progress: Option<Py<PyAny>>,
        experts: Option<KeptExperts>,
    ) -> PyResult<()> {
        let cut = self.planned(&survivors, experts)?;
        let Self { path, file, .. } = self;
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
