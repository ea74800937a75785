//! Checks that an architecture's loader takes the survivors for the layers that they were.

use super::error::{Result, refused};
use super::model::Gguf;
use super::record::Entry;
use super::rules::{PATTERN, QUIRKS, Quirk};

impl Gguf {
    /// Refuses survivors whose kind or constants the loader would get wrong.
    pub(super) fn check_quirks(&self, kept: &[u64]) -> Result<()> {
        let layers = self.layers_of(kept);
        let number = layers.len() as u64;
        let has = |key| self.value(key).is_some();
        let set = |key| {
            self.value(key)
                .and_then(Entry::count)
                .is_some_and(|value| value > 0)
        };
        for (_, quirk) in QUIRKS.iter().filter(|(name, _)| *name == self.architecture) {
            let obstacle = match *quirk {
                Quirk::Every(period) => out_of_step(layers, period),
                Quirk::EveryUnless(period, key) if !has(key) => out_of_step(layers, period),
                Quirk::EveryIf(period, key) if set(key) && !has(PATTERN) => {
                    out_of_step(layers, period)
                }
                Quirk::Count(special) if self.layers == special || number == special => Some(
                    format!("takes other constants at {special} layers than at any other number"),
                ),
                Quirk::First if layers[0] != 0 => Some("needs its first layer".into()),
                Quirk::CountUnless(key) if !has(key) => Some(format!(
                    "makes a constant of the number of layers where {key} is missing"
                )),
                Quirk::Lite(key) if has(key) == matches!(number, 26 | 27) => Some(format!(
                    "takes 26 or 27 layers for the variant without {key}, and only them"
                )),
                Quirk::Never(why) => Some(why.into()),
                _ => None,
            };
            if let Some(why) = obstacle {
                return Err(refused(
                    &self.architecture,
                    &format!("is an architecture that {why}"),
                ));
            }
        }
        Ok(())
    }
}

/// The reason why the layers would not keep their places in a period, if they would not.
pub(super) fn out_of_step(layers: &[u64], period: u64) -> Option<String> {
    let moved = (0..)
        .zip(layers)
        .find(|(new, old)| period > 1 && new % period != *old % period);
    moved.map(|(new, old)| {
        format!(
            "makes one layer in {period} of another kind by its place: layer {old} would become \
             layer {new}, of the wrong kind; drop {period} layers in a row, or a multiple of it"
        )
    })
}
