//! The metrics: what is made of a pair of states.

use std::fmt;
use std::str::FromStr;

use crate::error::Error;

/// `arcsin(√z) / (π √z)` on `[0, 1/4]`, relative error 6e-17: interpolated at the zeros of
/// a Chebyshev polynomial in 60-digit arithmetic.
#[allow(clippy::unreadable_literal)]
const ARCSINE: [f64; 13] = [
    std::f64::consts::FRAC_1_PI,
    0.05305164769729295,
    0.023873241465010436,
    0.014210262668836788,
    0.009670878133410672,
    0.0071211491112956994,
    0.005525789481813799,
    0.004419682739751869,
    0.003873875430185169,
    0.0020783413779872934,
    0.00621132985810709,
    -0.005152606991585093,
    0.010147598659675072,
];

/// A comparison of two states `x = x^(l)` and `y = x^(m)`, `l < m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Angular distance `arccos(x·y / (|x| |y|)) / pi`, in `[0, 1]` (2403.17887, eq. 7).
    Angular,
    /// Cosine similarity `x·y / (|x| |y|)`, in `[-1, 1]`; `1 - cosine` of neighbours is
    /// Block Influence (2403.03853).
    Cosine,
    /// Relative change `|y - x| / |x|`, in `[0, 2^16]`.
    RelativeL2,
    /// Growth `|y| / |x|`, in `[0, 2^16]`.
    NormRatio,
}

/// A pair of states as the metrics see it.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    /// The haversine of the angle, `(1 - cosine) / 2`, in `[0, 1]`: it keeps its digits
    /// where the angle is small.
    pub haversine: f64,
    /// `|y| / |x|`.
    pub ratio: f64,
}

impl Metric {
    /// All metrics.
    pub const ALL: [Metric; 4] = [
        Metric::Angular,
        Metric::Cosine,
        Metric::RelativeL2,
        Metric::NormRatio,
    ];

    /// The value of a pair.
    #[inline(always)]
    pub fn of(self, pair: Pair) -> f64 {
        self.with(pair, false)
    }

    /// The same, by `fused` instructions where there are such.
    #[inline(always)]
    pub(crate) fn with(self, pair: Pair, fused: bool) -> f64 {
        let Pair { haversine, ratio } = pair;
        match self {
            Metric::Angular => angle(haversine, fused),
            Metric::Cosine => 1.0 - 2.0 * haversine,
            Metric::RelativeL2 => ((ratio - 1.0) * (ratio - 1.0) + 4.0 * ratio * haversine).sqrt(),
            Metric::NormRatio => ratio,
        }
    }

    /// The value of a state compared with itself.
    pub fn of_identical(self) -> f64 {
        self.of(Pair {
            haversine: 0.0,
            ratio: 1.0,
        })
    }

    /// The greatest magnitude of a value, a power of two: sums are kept of its fractions.
    pub fn range(self) -> f64 {
        match self {
            Metric::Angular | Metric::Cosine => 1.0,
            Metric::RelativeL2 | Metric::NormRatio => 65536.0,
        }
    }

    /// True if a greater value means that the states are more alike; `None` if the value
    /// does not say how alike they are.
    pub fn is_similarity(self) -> Option<bool> {
        match self {
            Metric::Angular | Metric::RelativeL2 => Some(false),
            Metric::Cosine => Some(true),
            Metric::NormRatio => None,
        }
    }

    /// True if a value can be less than zero.
    pub fn can_be_negative(self) -> bool {
        self == Metric::Cosine
    }

    /// The metric's name.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Angular => "angular",
            Metric::Cosine => "cosine",
            Metric::RelativeL2 => "relative_l2",
            Metric::NormRatio => "norm_ratio",
        }
    }
}

/// The angle over pi from its haversine, within 3e-16; no branches, to become vectors.
/// `fused` if there are instructions that multiply and add.
///
/// `sin²(a/2) = (1 - cos a) / 2`, so `a = 2·arcsin(√h)`; from the other side for angles
/// near pi, and `a = pi/2 - arcsin(cos a)` between.
#[inline(always)]
fn angle(haversine: f64, fused: bool) -> f64 {
    let cosine = 1.0 - 2.0 * haversine;
    let (small, large) = (haversine < 0.25, haversine > 0.75);
    let z = if small {
        haversine
    } else if large {
        1.0 - haversine
    } else {
        cosine * cosine
    };
    let mut series = ARCSINE[12];
    for &coefficient in ARCSINE[..12].iter().rev() {
        series = if fused {
            series.mul_add(z, coefficient)
        } else {
            series * z + coefficient
        };
    }
    let arcsine = z.sqrt() * series;
    if small {
        2.0 * arcsine
    } else if large {
        1.0 - 2.0 * arcsine
    } else {
        0.5 - arcsine.copysign(cosine)
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
        Self::ALL
            .into_iter()
            .find(|metric| metric.name() == name)
            .ok_or_else(|| Error::UnknownMetric {
                name: name.to_owned(),
                known: names(&Self::ALL),
            })
    }
}

/// The names of metrics in one line.
pub(crate) fn names(metrics: &[Metric]) -> String {
    let names: Vec<_> = metrics.iter().map(|metric| metric.name()).collect();
    names.join(", ")
}
