//! The tensors that go, and the names of the others afterwards.

use std::iter;

use super::error::Error;
use super::experts::{Experts, Stays};
use super::header::Tensor;

/// The layers to keep of a checkpoint, and where their numbers are in the names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    prefixes: Vec<String>,
    num_layers: u64,
    survivors: Vec<u64>,
    experts: Option<Experts>,
}

impl Cut {
    /// A cut that keeps `survivors` of the layers that follow `prefixes`, as `model.layers.`.
    ///
    /// # Errors
    /// [`Error::Prefix`] and [`Error::Survivors`].
    pub fn new(prefixes: Vec<String>, num_layers: u64, survivors: Vec<u64>) -> Result<Self, Error> {
        if let Some(prefix) = prefixes
            .iter()
            .find(|prefix| !prefix.ends_with('.') || prefix.len() < 2)
        {
            return Err(Error::Prefix(prefix.clone()));
        }
        let ascending = survivors.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || survivors.last().is_none_or(|&last| last >= num_layers) {
            return Err(Error::Survivors {
                survivors,
                num_layers,
            });
        }
        Ok(Self {
            prefixes,
            num_layers,
            survivors,
            experts: None,
        })
    }

    /// The same cut, in which only some experts of the layers stay; layers are counted as
    /// before the cut.
    #[must_use]
    pub fn with_experts(self, experts: Experts) -> Self {
        Self {
            experts: Some(experts),
            ..self
        }
    }

    /// Prefixes of the names of the layers' tensors.
    pub fn prefixes(&self) -> &[String] {
        &self.prefixes
    }

    /// Layers before the cut.
    pub fn num_layers(&self) -> u64 {
        self.num_layers
    }

    /// The layers that stay, ascending.
    pub fn survivors(&self) -> &[u64] {
        &self.survivors
    }

    /// The experts that stay, if any go.
    pub fn experts(&self) -> Option<&Experts> {
        self.experts.as_ref()
    }

    /// The new name of a tensor, or `None` if it goes.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`] and [`Error::NoSuchExpert`] for a number that is not below the
    /// number of layers or experts, or that is written otherwise than in plain digits.
    pub fn rename(&self, name: &str) -> Result<Option<String>, Error> {
        let Some((prefix, layer, tail)) = self.locate(name)? else {
            return Ok(Some(name.to_owned()));
        };
        let Ok(new) = self.survivors.binary_search(&layer) else {
            return Ok(None);
        };
        let tail = match &self.experts {
            Some(experts) => experts.rename(name, layer, tail)?,
            None => Some(tail.to_owned()),
        };
        Ok(tail.map(|tail| format!("{prefix}{new}{tail}")))
    }

    /// What stays of a tensor that does not go.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`]; [`Error::Stack`] for a stack of experts that does not divide.
    pub(super) fn stays(&self, tensor: &Tensor) -> Result<Stays, Error> {
        let layer = self.locate(&tensor.name)?.map(|(_, layer, _)| layer);
        let stack = match &self.experts {
            Some(experts) => experts.parts(tensor, layer)?,
            None => None,
        };
        Ok(stack.unwrap_or_else(|| Stays {
            shape: tensor.shape.clone(),
            parts: iter::once(0..tensor.len()).collect(),
        }))
    }

    /// The prefix of a name, the number of its layer, and what follows; `None` of no layer.
    fn locate<'a>(&'a self, name: &'a str) -> Result<Option<(&'a str, u64, &'a str)>, Error> {
        let Some((prefix, number, tail)) = self.prefixes.iter().find_map(|prefix| {
            let rest = name.strip_prefix(&**prefix)?;
            let (number, _) = rest.split_once('.').unwrap_or((rest, ""));
            let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| (&**prefix, number, &rest[number.len()..]))
        }) else {
            return Ok(None);
        };
        let plain = number == "0" || !number.starts_with('0');
        let layer = number
            .parse()
            .ok()
            .filter(|&layer: &u64| plain && layer < self.num_layers)
            .ok_or_else(|| Error::NoSuchLayer {
                name: name.to_owned(),
                num_layers: self.num_layers,
            })?;
        Ok(Some((prefix, layer, tail)))
    }
}
