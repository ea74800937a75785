//! Routed experts: which layers have them, and those that stay.

use std::collections::{BTreeMap, BTreeSet};

use super::error::{GgufError, Result, refused};
use super::model::Gguf;
use super::record::Entry;
use super::rules::EXPERT_COUNT;
use super::share::{Share, share};
use super::tensors::block_of;

/// The experts that stay, by layer of the whole model: of each as many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Experts {
    number: u64,
    left: u64,
    kept: BTreeMap<u64, Vec<u64>>,
}

impl Experts {
    /// The experts that stay of `number`, by layer of the whole model.
    ///
    /// # Errors
    ///
    /// [`GgufError::Experts`] unless each layer keeps as many: ascending ones, some and not all.
    pub fn new(number: u64, kept: BTreeMap<u64, Vec<u64>>) -> Result<Self> {
        let left = kept.values().next().map_or(0, Vec::len) as u64;
        let wrong = kept.iter().find(|(_, experts)| {
            let ascending = experts.windows(2).all(|pair| pair[0] < pair[1]);
            let inside = experts.last().is_some_and(|&last| last < number);
            !ascending || !inside || experts.len() as u64 != left || left == number
        });
        match wrong {
            Some((layer, _)) => Err(GgufError::Experts(format!(
                "those of layer {layer}: expected ascending ones of {number}, at least one and not \
                 all, and as many as of every other layer"
            ))),
            None if left == 0 => Err(GgufError::Experts("none: no layer is named".into())),
            None => Ok(Self { number, left, kept }),
        }
    }

    /// The number of a layer's experts before the cut.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The number of a layer's experts that stay.
    pub(super) fn left(&self) -> u64 {
        self.left
    }

    /// The experts of a block that stay.
    pub(super) fn of(&self, block: u64) -> &[u64] {
        self.kept.get(&block).map_or(&[], Vec::as_slice)
    }
}

impl Gguf {
    /// The layers that have routed experts.
    pub fn expert_layers(&self) -> Vec<usize> {
        let blocks = self.expert_blocks();
        blocks
            .range(..self.layers)
            .map(|&block| block as usize)
            .collect()
    }

    /// The number of a layer's experts, if the file says one for all layers.
    pub(super) fn num_experts(&self) -> Option<u64> {
        self.value(EXPERT_COUNT).and_then(Entry::count)
    }

    fn expert_blocks(&self) -> BTreeSet<u64> {
        let names = self.header.tensors.iter();
        names
            .filter_map(|tensor| block_of(&tensor.name))
            .filter(|(_, rest)| matches!(share(rest), Share::All | Share::One(..)))
            .filter_map(|(block, _)| block.parse().ok())
            .collect()
    }

    /// Refuse experts that are not those of the layers that stay.
    pub(super) fn check_experts(&self, experts: &Experts, survivors: &[usize]) -> Result<()> {
        let key = format!("{}.{EXPERT_COUNT}", self.architecture);
        let Some(number) = self.num_experts() else {
            let why = "is missing, or not one whole number for all layers: no expert can go";
            return Err(refused(&key, why));
        };
        if number != experts.number {
            let found = format!("some of {}: {key} is {number}", experts.number);
            return Err(GgufError::Experts(found));
        }
        let blocks = self.expert_blocks();
        if let Some(block) = blocks.range(self.layers..).next() {
            let why = "predicts further tokens with experts of its own, of which a plan says \
                       nothing: drop whole layers instead";
            return Err(refused(&format!("blk.{block}"), why));
        }
        let stay = survivors.iter().map(|&layer| layer as u64);
        let expected: BTreeSet<u64> = stay.filter(|layer| blocks.contains(layer)).collect();
        let named: BTreeSet<u64> = experts.kept.keys().copied().collect();
        match expected.symmetric_difference(&named).next() {
            Some(layer) => Err(GgufError::Experts(format!(
                "those of layer {layer}: expected those of each layer that has experts and stays, \
                 and of no other"
            ))),
            None => Ok(()),
        }
    }
}
