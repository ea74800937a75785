//! The Gram matrix of one sample's states, and the angle of every pair of them.
//!
//! Products are summed in float64, or in float32 (bfloat16 products too) within chunks of a
//! few hundred columns and in float64 beyond; docs/maths.md has the errors. What float32
//! cannot do is done otherwise, so that no result is worse than 1e-7 of pi:
//!
//! - columns that outweigh their chunk (massive activations) are taken out and multiplied in
//!   float64;
//! - pairs at a small angle get it from the norm of their difference, which loses no digits;
//! - samples beyond float32's range, and all that are not finite or zero, go to float64.

use std::ops::RangeInclusive;

use crate::error::Reason;
use crate::kernels::{
    Chunk, Chunks, Kernels, PADDING, Packed, Prefetch, Sweep, Tier, Work, greatest,
};
use crate::metric::{Metric, Pair};
use crate::states::{Element, States};

/// Norms outside this range could leave float64 when two are multiplied and squared.
pub(crate) const NORMS: RangeInclusive<f64> = 1e-75..=1e75;

/// Rows with a greatest magnitude outside this range are not multiplied in float32, where a
/// product of theirs could overflow or be lost as denormal.
const MAGNITUDES: RangeInclusive<f32> = 1e-9..=1e15;

/// A column is massive if its square is more than this share of its row's last columns, a
/// chunk or as many as this.
const MASSIVE_SHARE: f64 = 1.0 / 8.0;
const MASSIVE_AMONG: usize = 512;

/// A sample with more massive columns in one chunk is left to float64.
const MOST_MASSIVE: usize = 64;

/// What an angular distance may err by; a pair that could err by more is measured anew.
const TOLERANCE: f64 = 1e-7;

/// `|y| / |x|` of the metrics of norms: then `|y - x| / |x|` is at most 2^16.
const GREATEST_RATIO: f64 = 65535.0;

/// `h (1 - h)` below which float64 itself is too coarse to tell equal states.
const SMALLEST: f64 = 1e-12;

/// A reusable Gram matrix, and what is derived from it.
#[derive(Debug)]
pub struct Gram {
    tier: Tier,
    num_states: usize,
    /// `x·y` of the pairs `(l, m)`, `l < m`, row by row.
    products: Vec<f64>,
    /// The squared norms, but for massive columns, and the massive columns' part.
    squares: Vec<f64>,
    massive: Vec<f64>,
    norms: Vec<f64>,
    inverse_norms: Vec<f64>,
    /// `(1 - cosine) / 2` of the pairs `(l, m)`, `l < m`, row by row.
    haversines: Vec<f64>,
    scratch: Scratch,
}

#[derive(Debug, Default)]
struct Scratch {
    chunks: Chunks,
    sums: Vec<f64>,
    largest: Vec<f32>,
    magnitudes: Vec<f32>,
    prefetch: Prefetch,
    column: Vec<f64>,
    chunk_squares: Vec<f64>,
    /// What the chunks before weigh against the massive columns of the next.
    earlier: Vec<f64>,
}

/// The arithmetic that differences are taken in.
trait Real: Copy {
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

/// What the cosine of a pair may err by if products are summed in float32, as a share of
/// the norms less massive columns: a bias, and rounding errors that grow with a chunk and
/// average out over chunks. Measured, see docs/maths.md.
fn epsilon<S: Sweep>(width: usize) -> f64 {
    let filled = even_part(width, S::span(width)) as f64 / S::SPAN as f64;
    2e-8 + S::SPREAD * filled.max(0.65) * (512.0 / width as f64).sqrt()
}

/// A width cut evenly into parts of at most `most`: a short one has massive columns by chance.
fn even_part(width: usize, most: usize) -> usize {
    width.div_ceil(width.div_ceil(most))
}

/// A sample that float32 cannot be trusted with.
struct Unfit;

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
            products: vec![0.0; num_states * (num_states - 1) / 2],
            squares: vec![0.0; num_states],
            massive: vec![0.0; num_states],
            norms: vec![0.0; num_states],
            inverse_norms: vec![0.0; num_states],
            haversines: vec![0.0; num_states * (num_states - 1) / 2],
            scratch: Scratch::default(),
        }
    }

    /// Compares the states of one sample, or names its first unusable state.
    pub fn compute<T: Element>(
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
            self.multiply::<K::Bf16, T>(states, sample)
        } else {
            Err(Unfit)
        };
        let narrow = match narrow {
            Ok(narrow) => narrow,
            // Float64 finds nothing unfit.
            Err(Unfit) => self
                .multiply::<K::Double, T>(states, sample)
                .unwrap_or(false),
        };
        self.take_norms(states, sample)?;
        if narrow {
            let epsilon = epsilon::<K::Bf16>(states.width());
            self.compare::<f32, T, K::Bf16>(states, sample, epsilon);
        } else {
            self.compare::<f64, T, K::Double>(states, sample, 0.0);
        }
        Ok(())
    }

    /// Sums the products of all pairs of states; whether some were summed in less than float64.
    #[inline(always)]
    fn multiply<S: Sweep, T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<bool, Unfit> {
        let Self {
            num_states,
            products,
            squares,
            massive,
            scratch,
            ..
        } = self;
        let Scratch {
            chunks,
            sums,
            largest,
            magnitudes,
            prefetch,
            column,
            chunk_squares,
            earlier,
        } = scratch;
        let num_states = *num_states;
        let columns = if states.width() <= S::WHOLE {
            states.width()
        } else {
            even_part(states.width(), S::CHUNK)
        };
        let chunk = S::Packed::chunk(chunks, num_states, columns);
        products.fill(0.0);
        squares.fill(0.0);
        massive.fill(0.0);
        sums.resize(S::num_sums(num_states), 0.0);
        magnitudes.resize(num_states, 0.0);
        largest.clear();
        largest.resize(num_states, 0.0);
        column.resize(num_states, 0.0);
        chunk_squares.resize(num_states, 0.0);
        earlier.clear();
        earlier.resize(num_states, 0.0);
        let remembered = 1.0 - (columns as f64 / MASSIVE_AMONG as f64).min(1.0);
        let mut engine = S::engine(states.width());
        let chunks = states.width().div_ceil(columns);
        // While a chunk is multiplied, one that follows is fetched.
        let ahead = S::AHEAD / (num_states * columns * size_of::<T>());
        let ahead = ahead.max(S::LEAST_AHEAD).min(chunks);
        for (number, start) in (0..states.width()).step_by(columns).enumerate() {
            let length = columns.min(states.width() - start);
            let (next_sample, next) = if number + ahead < chunks {
                (sample, number + ahead)
            } else {
                let next_sample = (sample + 1).min(states.num_samples() - 1);
                (next_sample, number + ahead - chunks)
            };
            let rows = (0..num_states).map(|state| {
                let row = &states.row(next_sample, state)[next * columns..];
                row.as_ptr().addr()
            });
            prefetch.begin(rows, length * size_of::<T>(), chunks > 1);
            chunk.resize(length);
            let row = |state| &states.row(sample, state)[start..][..length];
            S::pack(chunk, row, magnitudes, chunk_squares, prefetch, &mut engine);
            let mut outweighed = false;
            let weights = chunk_squares.iter().zip(earlier.iter());
            for ((largest, &magnitude), (square, earlier)) in
                largest.iter_mut().zip(magnitudes.iter()).zip(weights)
            {
                let greater = magnitude > *largest || magnitude.is_nan();
                *largest = if greater { magnitude } else { *largest };
                outweighed |= is_massive(f64::from(magnitude), square + earlier);
            }
            if S::Packed::NARROW && outweighed {
                let rows = Rows {
                    magnitudes,
                    squares: chunk_squares,
                    earlier,
                    column,
                };
                S::copy(chunk, row, &mut engine);
                take_massive::<S>(chunk, rows, products, massive)?;
            }
            for ((square, earlier), of_chunk) in squares
                .iter_mut()
                .zip(earlier.iter_mut())
                .zip(chunk_squares.iter())
            {
                *square += of_chunk;
                *earlier = remembered * (*earlier + of_chunk);
            }
            S::add(chunk, start == 0, sums, prefetch, &mut engine);
        }
        let fits = |magnitude| MAGNITUDES.contains(magnitude);
        if S::Packed::NARROW && !largest.iter().all(fits) {
            return Err(Unfit);
        }
        S::collect(num_states, sums, products);
        Ok(S::Packed::NARROW)
    }

    #[inline(always)]
    fn take_norms<T: Element>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
    ) -> Result<(), (usize, Reason)> {
        for state in 0..self.num_states {
            let square = self.squares[state] + self.massive[state];
            self.norms[state] = square.sqrt();
            if !NORMS.contains(&self.norms[state]) {
                return Err((state, reason(states.row(sample, state), square)));
            }
            self.inverse_norms[state] = self.norms[state].recip();
        }
        Ok(())
    }

    /// Haversines from products, whose cosines may err by `epsilon` of the norms less
    /// massive columns, and from differences where that is too coarse.
    #[inline(always)]
    fn compare<R: Real, T: Element, S: Sweep>(
        &mut self,
        states: &States<'_, T>,
        sample: usize,
        epsilon: f64,
    ) {
        // The error of an angle is that of its cosine over its sine, 2√(h(1-h)).
        let scale = (epsilon / (2.0 * TOLERANCE * std::f64::consts::PI)).powi(2);
        for (square, inverse) in self.squares.iter_mut().zip(&self.inverse_norms) {
            *square *= inverse * inverse;
        }
        let mut start = 0;
        for first in 0..self.num_states - 1 {
            let others = self.num_states - first - 1;
            let products = &self.products[start..][..others];
            let haversines = &mut self.haversines[start..][..others];
            let (inverse, share) = (self.inverse_norms[first], scale * self.squares[first]);
            let inverses = &self.inverse_norms[first + 1..][..others];
            let shares = &self.squares[first + 1..][..others];
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
                    let norms = pair.map(|state| self.norms[state]);
                    let opposite = *haversine > 0.5;
                    *haversine = from_difference::<R, T, S>(rows, norms, opposite);
                }
            }
            start += others;
        }
    }
}

#[inline(always)]
fn is_massive(value: f64, square: f64) -> bool {
    value * value > MASSIVE_SHARE * square
}

/// Takes massive columns out of a chunk until there is none, and adds their products.
#[inline(always)]
fn take_massive<S: Sweep>(
    chunk: &mut Chunk<S::Packed>,
    rows: Rows<'_>,
    products: &mut [f64],
    massive: &mut [f64],
) -> Result<(), Unfit> {
    let Rows {
        magnitudes,
        squares,
        earlier,
        column: values,
    } = rows;
    let mut taken = 0;
    // Rows have most of them in common: one row's are taken out of all, and all looked at anew.
    while let Some(state) = (0..magnitudes.len()).find(|&state| {
        is_massive(
            f64::from(magnitudes[state]),
            squares[state] + earlier[state],
        )
    }) {
        let weight = squares[state] + earlier[state];
        for first in (0..chunk.length()).step_by(PADDING) {
            let some = &chunk.row(state)[first..][..PADDING];
            if !is_massive(greatest(some).into(), weight) {
                continue;
            }
            for column in first..first + PADDING {
                if !is_massive(chunk.row(state)[column].widen(), weight) {
                    continue;
                }
                taken += 1;
                if taken > MOST_MASSIVE {
                    return Err(Unfit);
                }
                chunk.take_column(column, values);
                add_products(values, products, massive);
            }
        }
        for state in 0..magnitudes.len() {
            (magnitudes[state], squares[state]) = S::measure(chunk.row(state));
        }
    }
    Ok(())
}

/// Adds a column's products of all pairs, and its squares.
#[inline(always)]
fn add_products(values: &[f64], products: &mut [f64], squares: &mut [f64]) {
    let mut start = 0;
    for (first, &value) in values.iter().enumerate() {
        let others = &values[first + 1..];
        for (product, other) in products[start..].iter_mut().zip(others) {
            *product += value * other;
        }
        squares[first] += value * value;
        start += others.len();
    }
}

/// What is known of the rows of a chunk, and room for a column.
struct Rows<'a> {
    magnitudes: &'a mut [f32],
    squares: &'a mut [f64],
    earlier: &'a [f64],
    column: &'a mut [f64],
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

fn reason<T: Element>(row: &[T], squared_norm: f64) -> Reason {
    if row.iter().any(|value| !value.widen().is_finite()) {
        Reason::NotFinite
    } else if squared_norm == 0.0 && row.iter().all(|value| value.widen() == 0.0) {
        Reason::Zero
    } else {
        Reason::NormOutOfRange
    }
}
