//! The haversine of every pair's angle: from their product, or from their difference where that
//! loses fewer digits.

use super::products::even_part;
use crate::kernels::Sweep;
use crate::states::{Element, States};

/// The largest error of an angular distance; a pair that could err by more is measured again.
const TOLERANCE: f64 = 1e-7;

/// `h (1 - h)` below which float64 itself is too coarse to tell equal states.
const SMALLEST: f64 = 1e-12;

/// The norms of a sample's states, and the products of their pairs `(l, m)`, `l < m`, row by row.
pub(super) struct Known<'a> {
    pub products: &'a [f64],
    pub norms: &'a [f64],
    pub inverse_norms: &'a [f64],
    /// The squared norms, but for massive columns; they are divided by the whole ones.
    pub squares: &'a mut [f64],
}

/// The largest error of the cosine of a pair if products are summed in float32, as a share of
/// the norms less massive columns: a bias, and rounding errors that grow with a chunk and
/// average out over chunks. Measured, see docs/derivations.md.
pub(super) fn epsilon<S: Sweep>(width: usize) -> f64 {
    let filled = even_part(width, S::span(width)) as f64 / S::SPAN as f64;
    2e-8 + S::SPREAD * filled.max(0.65) * (512.0 / width as f64).sqrt()
}

/// Haversines from products, whose cosines may err by `epsilon` of the norms less massive
/// columns, and from differences where that is too coarse.
#[inline(always)]
pub(super) fn compare<R: Real, T: Element, S: Sweep>(
    known: Known<'_>,
    (states, sample): (&States<'_, T>, usize),
    epsilon: f64,
    haversines: &mut [f64],
) {
    let Known {
        products,
        norms,
        inverse_norms,
        squares: shares,
    } = known;
    // The error of an angle is that of its cosine over its sine, 2√(h(1-h)).
    let scale = (epsilon / (2.0 * TOLERANCE * std::f64::consts::PI)).powi(2);
    for (square, inverse) in shares.iter_mut().zip(inverse_norms) {
        *square *= inverse * inverse;
    }
    let mut start = 0;
    for first in 0..norms.len() - 1 {
        let others = norms.len() - first - 1;
        let products = &products[start..][..others];
        let haversines = &mut haversines[start..][..others];
        let (inverse, share) = (inverse_norms[first], scale * shares[first]);
        let inverses = &inverse_norms[first + 1..][..others];
        let shares = &shares[first + 1..][..others];
        let is_coarse = |haversine: f64, other: usize| {
            haversine * (1.0 - haversine) < (share * shares[other]).max(SMALLEST)
        };
        let mut coarse = false;
        for other in 0..others {
            let cosine = products[other] * (inverse * inverses[other]);
            let haversine = (0.5 - 0.5 * cosine).clamp(0.0, 1.0);
            haversines[other] = haversine;
            coarse |= is_coarse(haversine, other);
        }
        let measured = if coarse { others } else { 0 };
        for (other, haversine) in haversines[..measured].iter_mut().enumerate() {
            if is_coarse(*haversine, other) {
                let pair = [first, first + 1 + other];
                let rows = pair.map(|state| states.row(sample, state));
                let norms = pair.map(|state| norms[state]);
                let opposite = *haversine > 0.5;
                *haversine = from_difference::<R, T, S>(rows, norms, opposite);
            }
        }
        start += others;
    }
}

/// The arithmetic that differences are taken in.
pub(super) trait Real: Copy {
    fn of(value: f64) -> Self;
    fn element<T: Element>(value: T) -> Self;
    fn wide(self) -> f64;
    /// `self · factor + addend`, rounded once.
    fn times_plus(self, factor: Self, addend: Self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }

    #[inline(always)]
    fn element<T: Element>(value: T) -> Self {
        value.single()
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        f64::from(self)
    }

    #[inline(always)]
    fn times_plus(self, factor: Self, addend: Self) -> Self {
        self.mul_add(factor, addend)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(value: f64) -> Self {
        value
    }

    #[inline(always)]
    fn element<T: Element>(value: T) -> Self {
        value.widen()
    }

    #[inline(always)]
    fn wide(self) -> f64 {
        self
    }

    #[inline(always)]
    fn times_plus(self, factor: Self, addend: Self) -> Self {
        self.mul_add(factor, addend)
    }
}

/// The haversine of the angle between two states, `|x - s·y|² / (4 s |x| |y|)` less what
/// is due to `s = |x| / |y|` being rounded; of opposite states one less that.
#[inline(always)]
fn from_difference<R: Real, T: Element, S: Sweep>(
    rows: [&[T]; 2],
    norms: [f64; 2],
    opposite: bool,
) -> f64 {
    let [x, y] = rows;
    let scale = R::of(norms[0] / norms[1]);
    let subtracted = if opposite {
        scale
    } else {
        R::of(-scale.wide())
    };
    let bits = T::bf16_bits(x).zip(T::bf16_bits(y));
    let square = bits
        .and_then(|(x, y)| S::square_of_sum(x, y, subtracted.wide() as f32))
        .unwrap_or_else(|| square_of_sum(x, y, subtracted));
    let scale = scale.wide();
    let excess = norms[0] - scale * norms[1];
    let chord = (square - excess * excess).max(0.0);
    let haversine = (chord / (4.0 * scale * norms[0] * norms[1])).min(1.0);
    if opposite { 1.0 - haversine } else { haversine }
}

/// `|x + f·y|²`, every element rounded once.
#[inline(always)]
fn square_of_sum<R: Real, T: Element>(x: &[T], y: &[T], factor: R) -> f64 {
    const LANES: usize = 64;
    let mut square = 0.0;
    for (x, y) in x.chunks(16 * LANES).zip(y.chunks(16 * LANES)) {
        let mut lanes = [R::of(0.0); LANES];
        let (x_whole, x_rest) = x.as_chunks::<LANES>();
        let (y_whole, y_rest) = y.as_chunks::<LANES>();
        for (x, y) in x_whole.iter().zip(y_whole) {
            for lane in 0..LANES {
                let difference = R::element(y[lane]).times_plus(factor, R::element(x[lane]));
                lanes[lane] = difference.times_plus(difference, lanes[lane]);
            }
        }
        for (lane, (&x, &y)) in x_rest.iter().zip(y_rest).enumerate() {
            let difference = R::element(y).times_plus(factor, R::element(x));
            lanes[lane] = difference.times_plus(difference, lanes[lane]);
        }
        // Not one after the other: that would take longer than the differences.
        let mut sums = [0.0; 8];
        for eight in lanes.as_chunks::<8>().0 {
            for (sum, lane) in sums.iter_mut().zip(eight) {
                *sum += lane.wide();
            }
        }
        let [a, b, c, d, e, f, g, h] = sums;
        square += ((a + b) + (c + d)) + ((e + f) + (g + h));
    }
    square
}
