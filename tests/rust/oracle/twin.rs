//! The slow twin, and batches of states to hold it against the core on.

use proptest::prelude::*;
use shallower_core::{Accumulator, Element, Metric, Order, States, Sums, Tier};

pub const METRICS: [Metric; 4] = Metric::ALL;

/// The largest error of an angular distance, on any tier and in any dtype.
pub const TOLERANCE: f64 = 1e-7;

pub fn accumulate<T: Element>(
    data: &[T],
    shape: (usize, usize, usize),
    order: Order,
    threads: usize,
) -> Sums {
    accumulate_on(Tier::chosen().unwrap(), data, shape, order, threads)
}

pub fn accumulate_on<T: Element>(
    tier: Tier,
    data: &[T],
    shape: (usize, usize, usize),
    order: Order,
    threads: usize,
) -> Sums {
    let (samples, states, width) = shape;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    let accumulator = Accumulator::new(states, &METRICS).unwrap();
    let mut accumulator = accumulator.with_tier(tier).unwrap();
    let view = States::new(data, samples, states, width, order).unwrap();
    pool.install(|| accumulator.update(&view)).unwrap();
    accumulator.into_sums()
}

/// The angle by the chord between the unit vectors, `2·asin(|u - v| / 2)`: another formula
/// than the core's, and the one that keeps its digits at small angles.
pub fn slow_angular(x: &[f64], y: &[f64]) -> f64 {
    let norm = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
    let (nx, ny) = (norm(x), norm(y));
    let chord: f64 = x
        .iter()
        .zip(y)
        .map(|(a, b)| (a / nx - b / ny).powi(2))
        .sum();
    2.0 * (chord.sqrt() / 2.0).min(1.0).asin() / std::f64::consts::PI
}

pub fn slow_mean<T: Element>(
    data: &[T],
    shape: (usize, usize, usize),
    value: impl Fn(&[f64], &[f64]) -> f64,
) -> Vec<f64> {
    let (samples, states, width) = shape;
    let wide: Vec<f64> = data.iter().map(|v| v.widen()).collect();
    let row = |s: usize, l: usize| &wide[(s * states + l) * width..][..width];
    let mut mean = vec![0.0; states * states];
    for s in 0..samples {
        for l in 0..states {
            for m in 0..states {
                mean[l * states + m] += value(row(s, l), row(s, m)) / samples as f64;
            }
        }
    }
    mean
}

pub fn close(left: &[f64], right: &[f64], tolerance: f64) {
    for (i, (a, b)) in left.iter().zip(right).enumerate() {
        assert!((a - b).abs() <= tolerance, "entry {i}: {a} and {b}");
    }
}

pub fn batches() -> impl Strategy<Value = (Vec<f32>, (usize, usize, usize))> {
    (1_usize..7, 2_usize..6, 1_usize..700).prop_flat_map(|(samples, states, width)| {
        let value = prop_oneof![9 => -1.0_f32..1.0, 1 => -1000.0_f32..1000.0];
        prop::collection::vec(value, samples * states * width)
            .prop_map(move |data| (data, (samples, states, width)))
    })
}

/// Rejects nothing: a row of zeros would.
pub fn no_zero_row(data: &mut [f32], width: usize) {
    for row in data.chunks_mut(width) {
        if row.iter().all(|&v| v == 0.0) {
            row[0] = 1.0;
        }
    }
}

pub fn slow_cosine(x: &[f64], y: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(p, q)| p * q).sum::<f64>();
    dot(x, y) / (dot(x, x).sqrt() * dot(y, y).sqrt())
}

pub fn equals_the_slow_twin<T: Element>(tier: Tier, data: &[T], shape: (usize, usize, usize)) {
    let accumulator = accumulate_on(tier, data, shape, Order::SampleFirst, 2);
    if accumulator.rejected() > 0 {
        return; // float16 has made a row of zeros
    }
    let mean = |metric| accumulator.mean(metric).unwrap();
    close(
        &mean(Metric::Angular),
        &slow_mean(data, shape, slow_angular),
        TOLERANCE,
    );
    close(
        &mean(Metric::Cosine),
        &slow_mean(data, shape, slow_cosine),
        TOLERANCE,
    );
    let norm = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
    let upper = |slow: Vec<f64>, fast: Vec<f64>| {
        for first in 0..shape.1 {
            for second in first + 1..shape.1 {
                let place = first * shape.1 + second;
                // An angle's error in units of pi is pi times as large in these.
                let allowed = 4.0 * TOLERANCE * slow[place].max(1.0);
                assert!(
                    (slow[place] - fast[place]).abs() <= allowed,
                    "{tier} {shape:?}: {} and {}",
                    slow[place],
                    fast[place]
                );
                assert_eq!(fast[place], fast[second * shape.1 + first]);
            }
        }
    };
    let change = |x: &[f64], y: &[f64]| {
        let difference: Vec<f64> = x.iter().zip(y).map(|(a, b)| b - a).collect();
        norm(&difference) / norm(x)
    };
    upper(slow_mean(data, shape, change), mean(Metric::RelativeL2));
    upper(
        slow_mean(data, shape, |x, y| norm(y) / norm(x)),
        mean(Metric::NormRatio),
    );
}

/// Shapes as deep models have them, odd widths and tails included; a few samples.
pub fn deep_batches() -> impl Strategy<Value = (Vec<f32>, (usize, usize, usize))> {
    let states = prop_oneof![8 => 2_usize..41, 1 => Just(81_usize)];
    (
        1_usize..3,
        states,
        1_usize..1100,
        any::<u64>(),
        any::<bool>(),
    )
        .prop_map(|(samples, states, width, seed, massive)| {
            let data = residual_stream(samples, states, width, seed, massive);
            (data, (samples, states, width))
        })
}

/// Random steps added up layer by layer; two channels a thousand times the rest if `massive`.
pub fn residual_stream(
    samples: usize,
    states: usize,
    width: usize,
    seed: u64,
    massive: bool,
) -> Vec<f32> {
    let mut state = seed | 1;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut data = Vec::with_capacity(samples * states * width);
    for _ in 0..samples {
        let mut stream: Vec<f32> = (0..width).map(|_| 3.0 * random()).collect();
        for _ in 0..states {
            for (channel, value) in stream.iter_mut().enumerate() {
                *value += random();
                let scale = if massive && channel < 2 { 1000.0 } else { 1.0 };
                data.push(scale * *value);
            }
        }
    }
    data
}
