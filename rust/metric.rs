//! The metrics: what is made of the cosine of a pair of states.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// A comparison of two states, a function of the angle between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Angular distance `arccos(x·y / (|x| |y|)) / pi`, in `[0, 1]` (2403.17887, eq. 7).
    Angular,
    /// Cosine similarity `x·y / (|x| |y|)`, in `[-1, 1]`; `1 - cosine` of neighbours is
    /// Block Influence (2403.03853).
    Cosine,
}

impl Metric {
    /// The value for a pair whose cosine is `cosine`.
    pub fn of_cosine(self, cosine: f64) -> f64 {
        match self {
            Metric::Angular => cosine.acos() * std::f64::consts::FRAC_1_PI,
            Metric::Cosine => cosine,
        }
    }

    /// The value of a state compared with itself.
    pub fn of_identical(self) -> f64 {
        self.of_cosine(1.0)
    }

    /// Whether a greater value means that the states are more alike.
    pub fn is_similarity(self) -> bool {
        self == Metric::Cosine
    }

    /// Whether a value can be less than zero.
    pub fn can_be_negative(self) -> bool {
        self == Metric::Cosine
    }

    /// The metric's name.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Angular => "angular",
            Metric::Cosine => "cosine",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Metric {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [Metric::Angular, Metric::Cosine]
            .into_iter()
            .find(|metric| metric.name() == name)
            .ok_or_else(|| Error::UnknownMetric(name.to_owned()))
    }
}
