//! The tensors that go, and the names of the others afterwards.

use super::error::Error;

/// The layers to keep of a checkpoint, and where their numbers are in the names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    prefixes: Vec<String>,
    num_layers: u64,
    survivors: Vec<u64>,
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
        })
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

    /// The new name of a tensor, or `None` if it goes.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`] for a number that is not below the number of layers, or that is
    /// written otherwise than in plain digits.
    pub fn rename(&self, name: &str) -> Result<Option<String>, Error> {
        let Some((prefix, number, tail)) = self.prefixes.iter().find_map(|prefix| {
            let rest = name.strip_prefix(&**prefix)?;
            let (number, _) = rest.split_once('.').unwrap_or((rest, ""));
            let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| (prefix, number, &rest[number.len()..]))
        }) else {
            return Ok(Some(name.to_owned()));
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
        let place = self.survivors.binary_search(&layer).ok();
        Ok(place.map(|new| format!("{prefix}{new}{tail}")))
    }
}
