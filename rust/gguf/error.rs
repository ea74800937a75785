//! The errors of GGUF files and of their cuts, each with the way out.

/// A GGUF file, a cut or a place that is refused; the message goes on after the file's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Read(String),
    /// The file breaks the format; the position is in bytes.
    #[error("is damaged at byte {at}: {what}")]
    Damaged {
        /// The start of the offending field.
        at: u64,
        /// The content found, and the content expected.
        what: String,
    },
    /// Not a GGUF file, or one of a version that is not read.
    #[error("{0}")]
    Format(String),
    /// One of several files of a model.
    #[error(
        "is one of {0} files of a model: merge them first, with llama.cpp's `llama-gguf-split --merge FIRST-FILE MERGED.gguf`"
    )]
    Split(u64),
    /// A file that holds no blocks of layers, or not those that it counts.
    #[error("holds no model whose layers can be cut: {0}")]
    NoLayers(String),
    /// Survivors that are missing, out of order, or not in the model.
    #[error(
        "cannot keep the layers {survivors:?} of {num_layers}: expected ascending ones, at least one and not all"
    )]
    Survivors {
        /// The layers asked for.
        survivors: Vec<usize>,
        /// The layers that there are.
        num_layers: usize,
    },
    /// Experts that are missing, out of order, or not in the model.
    #[error("cannot keep these experts: {0}")]
    Experts(String),
    /// Metadata or tensors that cannot describe what stays.
    #[error("cannot be cut so: {key} {reason}")]
    Refused {
        /// The key, the tensor, the block or the architecture.
        key: String,
        /// Why, and the way out.
        reason: String,
    },
    /// The new file cannot be written.
    #[error("cannot be written: {0}")]
    Write(String),
    /// The progress callback asked to stop.
    #[error("was not finished: the cut was stopped")]
    Stopped,
}

/// A result of this module.
pub type Result<T> = std::result::Result<T, GgufError>;

pub(super) fn unreadable(error: &std::io::Error) -> GgufError {
    GgufError::Read(error.to_string())
}

pub(super) fn damaged(at: u64, what: impl Into<String>) -> GgufError {
    GgufError::Damaged {
        at,
        what: what.into(),
    }
}

pub(super) fn refused(key: &str, reason: &str) -> GgufError {
    GgufError::Refused {
        key: key.into(),
        reason: reason.into(),
    }
}
