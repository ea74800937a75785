//! What stays of a model: its blocks, and its tensors under their new names.

use super::error::{Result, refused};
use super::experts::Experts;
use super::record::Tensor;
use super::share::{Share, share, sliced};
use super::tensors::{block_of, place_of};

/// What stays of a model.
pub(super) struct Kept {
    /// The blocks: the survivors, and the blocks beyond the layers.
    pub blocks: Vec<u64>,
    /// The number of a layer's experts that stay, if some go.
    pub experts: Option<u64>,
    /// The tensors of the new file.
    pub tensors: Vec<New>,
}

/// A tensor of the new file, made of ranges of the old one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct New {
    pub name: String,
    pub dims: Vec<u64>,
    pub ggml_type: u32,
    pub ranges: Vec<(u64, u64)>,
}

impl New {
    /// A whole tensor under a new name.
    fn whole(name: String, tensor: &Tensor) -> Self {
        Self {
            name,
            dims: tensor.dims.clone(),
            ggml_type: tensor.ggml_type,
            ranges: vec![(tensor.start, tensor.start + tensor.size)],
        }
    }

    /// Bytes of its data, without padding.
    pub fn size(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }
}

/// What becomes of a tensor; nothing if it goes.
///
/// # Errors
///
/// [`GgufError::Refused`](super::GgufError::Refused) where experts go, and the tensor holds some of
/// them in a way that no rule describes.
pub(super) fn kept(
    tensor: &Tensor,
    blocks: &[u64],
    experts: Option<&Experts>,
) -> Result<Option<New>> {
    let Some((block, rest)) = block_of(&tensor.name) else {
        return Ok(Some(New::whole(tensor.name.clone(), tensor)));
    };
    let block = block.parse().ok();
    let Some((block, place)) = block.and_then(|block| Some((block, place_of(block, blocks)?)))
    else {
        return Ok(None);
    };
    let whole = New::whole(format!("blk.{place}.{rest}"), tensor);
    match experts {
        Some(experts) => divided(tensor, whole, experts, block),
        None => Ok(Some(whole)),
    }
}

/// What is left of a tensor of a block that stays, `whole` under its new name.
fn divided(tensor: &Tensor, whole: New, experts: &Experts, block: u64) -> Result<Option<New>> {
    let (number, kept) = (experts.number(), experts.of(block));
    let (_, rest) = block_of(&whole.name).unwrap_or_default();
    let no = |why: &str| Err(refused(&tensor.name, &format!("{why}: no expert can go")));
    match share(rest) {
        // One scale for all of them.
        Share::All if rest.ends_with("scale") && whole.dims.iter().all(|&dim| dim == 1) => {
            Ok(Some(whole))
        }
        Share::All => {
            let ranges = sliced(tensor, number, kept)?;
            let mut dims = whole.dims;
            dims.pop();
            dims.push(kept.len() as u64);
            Ok(Some(New {
                name: whole.name,
                dims,
                ggml_type: whole.ggml_type,
                ranges,
            }))
        }
        Share::One(stem, expert, tail) if expert < number => {
            let start = &whole.name[..whole.name.len() - rest.len()];
            Ok(place_of(expert, kept).map(|place| New {
                name: format!("{start}{stem}.{place}.{tail}"),
                ..whole
            }))
        }
        Share::One(..) => no(&format!(
            "is of an expert beyond the {number} that are counted"
        )),
        Share::Several(why) => no(why),
        Share::Unknown if whole.dims.last() == Some(&number) => no(&format!(
            "has {number} parts, as many as there are experts, and no rule says whether they are \
             theirs"
        )),
        Share::Nothing | Share::Unknown => Ok(Some(whole)),
    }
}
