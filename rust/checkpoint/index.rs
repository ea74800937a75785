//! `model.safetensors.index.json`: which file holds which tensor.

use serde::Deserialize;

use super::header::{Texts, check_unique};

/// The tensors of a sharded checkpoint and the files that hold them, by name of the tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// Pairs of a tensor's name and a plain file name.
    pub pairs: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Parsed {
    weight_map: Texts,
}

impl Index {
    /// Parses an index; whatever it holds besides `weight_map` is not looked at.
    ///
    /// The error says in words what is wrong, without the file: no JSON, no `weight_map`, a
    /// tensor named twice, or a file that is not the plain name of a `.safetensors` file.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        let Parsed {
            weight_map: Texts(mut pairs),
        } = serde_json::from_slice(json).map_err(|error| format!("it is broken: {error}"))?;
        if pairs.is_empty() {
            return Err("it names no tensor".into());
        }
        check_unique(pairs.iter().map(|(tensor, _)| &**tensor))
            .map_err(|tensor| format!("the tensor {tensor} is named twice"))?;
        if let Some((tensor, file)) = pairs.iter().find(|(_, file)| !is_plain(file)) {
            return Err(format!(
                "it places the tensor {tensor} in {file:?}: expected the plain name of a \
                 .safetensors file beside it"
            ));
        }
        pairs.sort_unstable();
        Ok(Self { pairs })
    }

    /// The names of the files, ascending, each once.
    pub fn files(&self) -> Vec<&str> {
        let mut files: Vec<&str> = self.pairs.iter().map(|(_, file)| &**file).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// True if a name is that of a shard in the same folder: no separator and no `..`.
fn is_plain(file: &str) -> bool {
    let stem = file.strip_suffix(".safetensors");
    stem.is_some_and(|stem| !stem.is_empty())
        && file.len() <= 255
        && !file.contains(['/', '\\', ':', '\0'])
}
