//! The Gram matrix of one sample's states, and the angle of every pair of them.
//!
//! Products are summed in float64, or in float32 (bfloat16 products too) within chunks of a
//! few hundred columns and in float64 beyond; docs/derivations.md has the errors. Float32 is for bfloat16
//! alone, whose products it holds exactly. Rounding errors of float32 and float16 states could add
//! up beyond 1e-7, so their products are in float64. What float32 cannot do is done otherwise, so
//! that no result is worse than 1e-7 of pi:
//!
//! - columns that outweigh their chunk (massive activations) are taken out and multiplied in
//!   float64;
//! - pairs at a small angle get it from the norm of their difference, which loses no digits;
//! - samples beyond float32's range, and all that are not finite or zero, go to float64.

mod compare;
mod massive;
mod products;

use std::ops::RangeInclusive;

use self::compare::{Known, compare, epsilon};
use self::massive::Unfit;
use self::products::Products;
use crate::error::Reason;
use crate::kernels::{Kernels, Tier, Work};
use crate::metric::{Metric, Pair};
use crate::states::{Element, States, Typed};

/// Norms outside this range could leave float64 when two are multiplied and squared.
pub(crate) const NORMS: RangeInclusive<f64> = 1e-75..=1e75;

/// `|y| / |x|` of the metrics of norms: then `|y - x| / |x|` is at most 2^16.
const GREATEST_RATIO: f64 = 65535.0;

/// A reusable Gram matrix, and what is derived from it.
#[derive(Debug)]
pub struct Gram {
    tier: Tier,
    num_states: usize,
    products: Products,
    norms: Vec<f64>,
    inverse_norms: Vec<f64>,
    /// `(1 - cosine) / 2` of the pairs `(l, m)`, `l < m`, row by row.
    haversines: Vec<f64>,
}

struct Compute<'g, 's, T> {
    gram: &'g mut Gram,
    states: &'g States<'s, T>,
    sample: usize,
}

impl<T: Element> Work for Compute<'_, '_, T> {
    type Output = Result<(), (usize, Reason)>;

    #[inline(always)]
    fn run<K: Kernels>(self) -> Self::Output {
        self.gram.compute_with::<K, T>(self.states, self.sample)
    }
}

impl Gram {
    /// Room for samples of `num_states` states.
    ///
    /// # Panics
    ///
    /// If the processor does not have the tier.
    pub fn new(num_states: usize, tier: Tier) -> Self {
        assert!(tier.is_available(), "this processor has no {tier}");
        Self {
            tier,
            num_states,
            products: Products::new(num_states),
            norms: vec![0.0; num_states],
            inverse_norms: vec![0.0; num_states],
            haversines: vec![0.0; num_states * (num_states - 1) / 2],
        }
    }

    /// Compares the states of one sample, or names its first unusable state.
    pub fn compute<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        self.compute_typed(&T::typed(states), sample)
    }

    fn compute_typed(&mut self, states: &Typed<'_>, sample: usize) -> Result<(), (usize, Reason)> {
        match states {
            Typed::F64(states) => self.compute_of(states, sample),
            Typed::F32(states) => self.compute_of(states, sample),
            Typed::F16(states) => self.compute_of(states, sample),
            Typed::Bf16(states) => self.compute_of(states, sample),
        }
    }

    fn compute_of<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        self.tier.run(Compute {
            gram: self,
            states,
            sample,
        })
    }

    /// The first state whose norm is too many times an earlier one for the metrics of norms.
    pub(crate) fn ratio_out_of_range(&self) -> Option<usize> {
        let mut least = f64::INFINITY;
        self.norms.iter().position(|&norm| {
            least = least.min(norm);
            norm / least > GREATEST_RATIO
        })
    }

    /// The norms of the states.
    pub fn norms(&self) -> &[f64] {
        &self.norms
    }

    /// A metric of every pair `(l, m)`, `l < m`, row by row, as fractions of its range.
    #[inline(always)]
    pub(crate) fn fractions<K: Kernels>(&self, metric: Metric, values: &mut [f64]) {
        match metric {
            Metric::Angular | Metric::Cosine => {
                for (value, &haversine) in values.iter_mut().zip(&self.haversines) {
                    let pair = Pair {
                        haversine,
                        ratio: 1.0,
                    };
                    *value = metric.with(pair, K::FUSED);
                }
            }
            Metric::RelativeL2 | Metric::NormRatio => self.fractions_of_norms(metric, values),
        }
    }

    #[inline(always)]
    fn fractions_of_norms(&self, metric: Metric, values: &mut [f64]) {
        let scale = metric.range().recip();
        let mut start = 0;
        for first in 0..self.num_states - 1 {
            let others = &self.norms[first + 1..];
            let inverse = self.inverse_norms[first];
            let pairs = self.haversines[start..][..others.len()].iter().zip(others);
            for (value, (&haversine, norm)) in values[start..].iter_mut().zip(pairs) {
                *value = metric.of(Pair {
                    haversine,
                    ratio: norm * inverse,
                }) * scale;
            }
            start += others.len();
        }
    }

    /// As [`Gram::compute`], in a function that has the instructions of `K`.
    #[inline(always)]
    pub(crate) fn compute_with<K: Kernels, T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        debug_assert_eq!(states.num_states(), self.num_states);
        let narrow = if T::IS_BF16 {
            self.products.multiply::<K::Bf16, T>(states, sample)
        } else {
            Err(Unfit)
        };
        let narrow = match narrow {
            Ok(narrow) => narrow,
            // Float64 finds nothing unfit.
            Err(Unfit) => self
                .products
                .multiply::<K::Double, T>(states, sample)
                .unwrap_or(false),
        };
        self.take_norms(states, sample)?;
        let known = Known {
            products: &self.products.products,
            norms: &self.norms,
            inverse_norms: &self.inverse_norms,
            squares: &mut self.products.squares,
        };
        let of = (states, sample);
        if narrow {
            let epsilon = epsilon::<K::Bf16>(states.width());
            compare::<f32, T, K::Bf16>(known, of, epsilon, &mut self.haversines);
        } else {
            compare::<f64, T, K::Double>(known, of, 0.0, &mut self.haversines);
        }
        Ok(())
    }

    #[inline(always)]
    fn take_norms<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        for state in 0..self.num_states {
            let square = self.products.squares[state] + self.products.massive[state];
            self.norms[state] = square.sqrt();
            if !NORMS.contains(&self.norms[state]) {
                return Err((state, reason(states.row(sample, state), square)));
            }
            self.inverse_norms[state] = self.norms[state].recip();
        }
        Ok(())
    }
}

fn reason<T: Element>(row: &[T], squared_norm: f64) -> Reason {
    if row.iter().any(|value| !value.widen().is_finite()) {
        Reason::NotFinite
    } else if squared_norm == 0.0 && row.iter().all(|value| value.widen() == 0.0) {
        Reason::Zero
    } else {
        Reason::NormOutOfRange
    }
}
