//! The experts of a mixture that stay: the names of single ones, and the parts of stacks.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use serde_json::{Value, json};

use super::error::Error;
use super::header::Tensor;

/// What comes before the number of a single expert in the name of its tensor.
const SINGLE: &str = ".experts.";

/// What stays of a tensor.
pub(super) struct Stays {
    /// Its new shape.
    pub shape: Vec<u64>,
    /// The bytes of it that stay, counted from its first one.
    pub parts: Vec<Range<u64>>,
}

/// The routed experts to keep, by layer, and the tensors that hold a part for each of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    num_experts: u64,
    kept: BTreeMap<u64, Vec<u64>>,
    stacks: BTreeSet<String>,
}

impl Experts {
    /// Keeps the experts `kept` of layers that have `num_experts` each; other layers stay whole.
    ///
    /// `stacks` are the names of tensors whose outermost axis holds a part for every expert;
    /// tensors named `….experts.{j}.…` in such a layer are of the expert j alone.
    ///
    /// # Errors
    /// [`Error::Experts`]: indices that are not ascending and below `num_experts`, or none.
    pub fn new(
        num_experts: u64,
        kept: BTreeMap<u64, Vec<u64>>,
        stacks: BTreeSet<String>,
    ) -> Result<Self, Error> {
        for (&layer, experts) in &kept {
            let ascending = experts.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascending || experts.last().is_none_or(|&last| last >= num_experts) {
                return Err(Error::Experts {
                    layer,
                    kept: experts.clone(),
                    num_experts,
                });
            }
        }
        Ok(Self {
            num_experts,
            kept,
            stacks,
        })
    }

    /// What the half-done work of a job is known by.
    pub(super) fn journal(&self) -> Value {
        json!({"num_experts": self.num_experts, "kept": self.kept, "stacks": self.stacks})
    }

    /// The new end of a name, which follows the number of its layer; `None` if its expert goes.
    pub(super) fn rename(
        &self,
        name: &str,
        layer: u64,
        tail: &str,
    ) -> Result<Option<String>, Error> {
        let single = || {
            tail.match_indices(SINGLE).find_map(|(start, _)| {
                let (head, rest) = tail.split_at(start + SINGLE.len());
                let (number, _) = rest.split_once('.').unwrap_or((rest, ""));
                let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
                digits.then(|| (head, number, &rest[number.len()..]))
            })
        };
        let Some(kept) = self
            .kept
            .get(&layer)
            .filter(|_| !self.stacks.contains(name))
        else {
            return Ok(Some(tail.to_owned()));
        };
        let Some((head, number, rest)) = single() else {
            return Ok(Some(tail.to_owned()));
        };
        let plain = number == "0" || !number.starts_with('0');
        let expert = number
            .parse()
            .ok()
            .filter(|&expert: &u64| plain && expert < self.num_experts)
            .ok_or_else(|| Error::NoSuchExpert {
                name: name.to_owned(),
                num_experts: self.num_experts,
            })?;
        let place = kept.binary_search(&expert).ok();
        Ok(place.map(|new| format!("{head}{new}{rest}")))
    }

    /// What stays of a stack in a layer; `None` of any other tensor.
    pub(super) fn parts(
        &self,
        tensor: &Tensor,
        layer: Option<u64>,
    ) -> Result<Option<Stays>, Error> {
        if !self.stacks.contains(&tensor.name) {
            return Ok(None);
        }
        let refused = || Error::Stack {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            num_experts: self.num_experts,
        };
        let kept = layer.and_then(|layer| self.kept.get(&layer));
        let axis = tensor.shape.iter().position(|&size| size != 1);
        let (kept, axis) = kept.zip(axis).ok_or_else(refused)?;
        let (size, len) = (tensor.shape[axis], tensor.len());
        if !size.is_multiple_of(self.num_experts) || !len.is_multiple_of(self.num_experts) {
            return Err(refused());
        }
        let mut shape = tensor.shape.clone();
        shape[axis] = size / self.num_experts * kept.len() as u64;
        let part = len / self.num_experts;
        let parts = kept.iter().map(|expert| expert * part..(expert + 1) * part);
        Ok(Some(Stays {
            shape,
            parts: parts.collect(),
        }))
    }
}
