//! The errors of checkpoints, of cuts, and of the place to write to.

use std::io;
use std::path::PathBuf;

/// A checkpoint that cannot be read, or a cut that cannot be made or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that breaks its format, or that names files or tensors that are missing.
    #[error("{} is damaged or hostile: {what}; fetch it again from its source", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        what: String,
    },
    /// A file that leads out of the checkpoint's folder.
    #[error(
        "{} leads to {}, outside of its folder: put the file itself there",
        path.display(), target.display()
    )]
    Outside {
        /// The link.
        path: PathBuf,
        /// The target of the link.
        target: PathBuf,
    },
    /// No weights in the folder.
    #[error(
        "{} holds neither model.safetensors nor model.safetensors.index.json: expected a checkpoint of safetensors",
        _0.display()
    )]
    NoWeights(PathBuf),
    /// The operating system refused to read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A source that is not what it was when its header was read.
    #[error("{} changed while it was copied; run again when it is no longer being written", _0.display())]
    Changed(PathBuf),
    /// A file that ended before its tensors did.
    #[error("{} ended early while it was copied; run again when it is no longer being written", _0.display())]
    EndedEarly(PathBuf),
    /// Layers to keep that are missing or out of order.
    #[error(
        "cannot keep the layers {survivors:?} of {num_layers}: expected ascending indices below {num_layers}, at least one"
    )]
    Survivors {
        /// The layers asked for.
        survivors: Vec<u64>,
        /// Layers of the model.
        num_layers: u64,
    },
    /// A prefix that does not end with a dot.
    #[error("prefix of layers {0:?}: expected a name that ends with a dot, as \"model.layers.\"")]
    Prefix(String),
    /// A tensor of a layer that the model does not have.
    #[error(
        "the tensor {name} is of a layer that the model does not have: its {num_layers} layers are 0 .. {last}",
        last = num_layers - 1
    )]
    NoSuchLayer {
        /// The tensor.
        name: String,
        /// Layers of the model.
        num_layers: u64,
    },
    /// Experts to keep that are missing or out of order.
    #[error(
        "cannot keep the experts {kept:?} of {num_experts} in layer {layer}: expected ascending indices below {num_experts}, at least one"
    )]
    Experts {
        /// The layer.
        layer: u64,
        /// The experts asked for.
        kept: Vec<u64>,
        /// Experts of the layer.
        num_experts: u64,
    },
    /// A tensor of an expert that the layer does not have.
    #[error(
        "the tensor {name} is of an expert that the model does not have: a layer has {num_experts}"
    )]
    NoSuchExpert {
        /// The tensor.
        name: String,
        /// Experts of a layer.
        num_experts: u64,
    },
    /// A stack of experts that does not divide among them.
    #[error(
        "the tensor {name} of shape {shape:?} has not the same bytes for each of {num_experts} experts of a layer that loses some"
    )]
    Stack {
        /// The tensor.
        name: String,
        /// Its axes.
        shape: Vec<u64>,
        /// Experts of a layer.
        num_experts: u64,
    },
    /// A shard size that nothing fits in, or whose header would be too long.
    #[error("cannot make shards of {size} bytes: {what}")]
    ShardSize {
        /// The size asked for.
        size: u64,
        /// The fault.
        what: String,
    },
    /// The operating system refused to write, or to copy.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// The caller's progress asked to stop.
    #[error("the copy was cancelled; what is complete stays for the next run")]
    Cancelled,
}

impl Error {
    pub(super) fn read(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Read { path, source }
    }

    pub(super) fn write(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Write { path, source }
    }

    pub(super) fn damaged(path: impl Into<PathBuf>) -> impl FnOnce(String) -> Self {
        let path = path.into();
        move |what| Self::Damaged { path, what }
    }
}
