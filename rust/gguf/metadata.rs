//! The metadata of a cut, entry by entry, by the tables of `rules`.

use std::io::{Read, Seek};

use super::error::{Result, damaged, refused};
use super::header::integers;
use super::kept::Kept;
use super::label::{Count, name_with_counts, size_label};
use super::model::Gguf;
use super::piece::{Piece, filtered, recounted, retold};
use super::quirks::out_of_step;
use super::record::{Entry, Value};
use super::rules::{
    EXPERT_COUNT, INDICES, Meaning, NOT_PER_LAYER, OTHER_TOWERS, PER_LAYER_PREFIX, SCALARS,
    UNCUTTABLE,
};
use super::tensors::place_of;
use super::told::text_of;
use super::types::Kind;

impl Gguf {
    /// The pieces that an entry becomes.
    pub(super) fn entry(
        &self,
        source: &mut (impl Read + Seek),
        entry: &Entry,
        kept: &Kept,
    ) -> Result<Vec<Piece>> {
        let whole = vec![Piece::Copy(entry.start, entry.end)];
        if entry.key == "split.tensors.count" {
            return recounted(entry, kept.tensors.len() as u64);
        }
        if let Some(text) = self.told_anew(source, entry, kept) {
            return Ok(retold(entry, &text));
        }
        let prefix = format!("{}.", self.architecture);
        let suffix = match entry.key.strip_prefix(&prefix) {
            Some(suffix) if !OTHER_TOWERS.iter().any(|tower| suffix.starts_with(tower)) => suffix,
            _ if entry.key.starts_with(PER_LAYER_PREFIX) => &entry.key,
            _ => return Ok(whole),
        };
        if let Some(left) = kept.experts.filter(|_| suffix == EXPERT_COUNT) {
            return recounted(entry, left);
        }
        self.check_array(entry, suffix, kept)?;
        if !self.loses_layers(kept) {
            return Ok(whole);
        }
        let kept = &kept.blocks;
        match entry.value {
            Value::Scalar(..) => match SCALARS.iter().find(|(name, _)| *name == suffix) {
                Some((_, meaning)) => self.scalar(entry, *meaning, kept),
                None => Ok(whole),
            },
            Value::Text(_) | Value::Array { count: 0, .. } => Ok(whole),
            Value::Array { .. } if NOT_PER_LAYER.contains(&suffix) => Ok(whole),
            Value::Array { .. } if UNCUTTABLE.contains(&suffix) => Err(refused(
                &entry.key,
                "speaks of single layers in a way that a cut cannot keep",
            )),
            Value::Array { .. } if INDICES.contains(&suffix) => self.indices(source, entry, kept),
            Value::Array { count, .. } if count == self.blocks => filtered(source, entry, kept),
            Value::Array { count, .. } if count == self.layers => {
                filtered(source, entry, self.layers_of(kept))
            }
            Value::Array {
                kind: Kind::Text, ..
            } => Ok(whole),
            Value::Array { count, .. } => Err(refused(
                &entry.key,
                &format!(
                    "is an array of {count} elements, which has not one a layer and might name \
                     layers: cut the model in memory instead, with a folder as --out"
                ),
            )),
        }
    }

    /// The new text of an entry that tells the model's size.
    fn told_anew(
        &self,
        source: &mut (impl Read + Seek),
        entry: &Entry,
        kept: &Kept,
    ) -> Option<String> {
        let Value::Text(_) = entry.value else {
            return None;
        };
        match entry.key.as_str() {
            "general.size_label" => Some(size_label(&kept.tensors)),
            "general.name" => {
                let name = text_of(source, entry)?;
                Some(name_with_counts(&name, &self.counts(kept)))
            }
            _ => None,
        }
    }

    /// The layers, and the experts of a mixture, before the cut and after it.
    fn counts(&self, kept: &Kept) -> Vec<Count> {
        let layers = Count {
            what: "layer",
            before: self.layers,
            after: self.layers_of(&kept.blocks).len() as u64,
        };
        let experts = self.num_experts().map(|before| Count {
            what: "expert",
            before,
            after: kept.experts.unwrap_or(before),
        });
        [layers].into_iter().chain(experts).collect()
    }

    /// Refuse an array of numbers that might have one for every expert, if experts go.
    fn check_array(&self, entry: &Entry, suffix: &str, kept: &Kept) -> Result<()> {
        let Value::Array { kind, count } = entry.value else {
            return Ok(());
        };
        let told = NOT_PER_LAYER.contains(&suffix) || INDICES.contains(&suffix);
        let layered = count == self.blocks || count == self.layers;
        let each = kept.experts.is_some() && Some(count) == self.num_experts();
        if !each || told || layered || kind == Kind::Text {
            return Ok(());
        }
        Err(refused(
            &entry.key,
            &format!(
                "is an array of {count} elements, as many as there are experts, and no rule says \
                 whether they are theirs: no expert can go"
            ),
        ))
    }

    fn scalar(&self, entry: &Entry, meaning: Meaning, kept: &[u64]) -> Result<Vec<Piece>> {
        let whole = Ok(vec![Piece::Copy(entry.start, entry.end)]);
        let value = entry
            .count()
            .ok_or_else(|| refused(&entry.key, "is not a whole number"))?;
        let below = kept.partition_point(|&block| block < value) as u64;
        let obstacle = match meaning {
            Meaning::Blocks => return recounted(entry, kept.len() as u64),
            Meaning::Leading => return recounted(entry, below),
            Meaning::LeadingStay if below < value.min(self.blocks) => Some(format!(
                "is {value}: the first {value} layers must stay, they take in images by their place"
            )),
            Meaning::Period => out_of_step(self.layers_of(kept), value)
                .map(|why| format!("is {value}, which {why}")),
            Meaning::Zero(what) if value > 0 => Some(format!(
                "is {value}, which {what}: no value describes the model without some layers"
            )),
            Meaning::Trailing | Meaning::LeadingStay | Meaning::Zero(_) => None,
        };
        obstacle.map_or(whole, |why| Err(refused(&entry.key, &why)))
    }

    fn indices(
        &self,
        source: &mut (impl Read + Seek),
        entry: &Entry,
        kept: &[u64],
    ) -> Result<Vec<Piece>> {
        let named = integers(source, entry)?;
        if let Some(wrong) = named.iter().find(|&&index| index >= self.blocks) {
            return Err(refused(
                &entry.key,
                &format!("names layer {wrong}, of {}", self.blocks),
            ));
        }
        let new: Vec<u64> = named
            .iter()
            .filter_map(|index| place_of(*index, kept))
            .collect();
        let Value::Array {
            kind: Kind::Scalar(scalar),
            ..
        } = entry.value
        else {
            return Err(damaged(
                entry.start,
                format!("{}: expected an array of integers", entry.key),
            ));
        };
        let mut bytes = (new.len() as u64).to_le_bytes().to_vec();
        for index in new {
            bytes.extend(&index.to_le_bytes()[..scalar.size()]);
        }
        Ok(vec![
            Piece::Copy(entry.start, entry.payload - 8),
            Piece::Bytes(bytes),
        ])
    }
}
