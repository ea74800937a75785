//! The core against a slow twin, and against itself in other orders.

use half::{bf16, f16};
use proptest::prelude::*;
use shallower_core::{Accumulator, Element, Error, Metric, Order, Reason, States};

const METRICS: [Metric; 2] = [Metric::Angular, Metric::Cosine];

fn accumulate<T: Element>(
    data: &[T],
    shape: (usize, usize, usize),
    order: Order,
    threads: usize,
) -> Accumulator {
    let (samples, states, width) = shape;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    let mut accumulator = Accumulator::new(states, &METRICS).unwrap();
    let view = States::new(data, samples, states, width, order).unwrap();
    pool.install(|| accumulator.update(&view)).unwrap();
    accumulator
}

/// The angle by the chord between the unit vectors, `2·asin(|u - v| / 2)`: another formula
/// than the core's, and the one that keeps its digits at small angles.
fn slow_angular(x: &[f64], y: &[f64]) -> f64 {
    let norm = |v: &[f64]| v.iter().map(|a| a * a).sum::<f64>().sqrt();
    let (nx, ny) = (norm(x), norm(y));
    let chord: f64 = x
        .iter()
        .zip(y)
        .map(|(a, b)| (a / nx - b / ny).powi(2))
        .sum();
    2.0 * (chord.sqrt() / 2.0).min(1.0).asin() / std::f64::consts::PI
}

fn slow_mean<T: Element>(
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

fn close(left: &[f64], right: &[f64], tolerance: f64) {
    for (i, (a, b)) in left.iter().zip(right).enumerate() {
        assert!((a - b).abs() <= tolerance, "entry {i}: {a} and {b}");
    }
}

fn batches() -> impl Strategy<Value = (Vec<f32>, (usize, usize, usize))> {
    (1_usize..7, 2_usize..6, 1_usize..700).prop_flat_map(|(samples, states, width)| {
        let value = prop_oneof![9 => -1.0_f32..1.0, 1 => -1000.0_f32..1000.0];
        prop::collection::vec(value, samples * states * width)
            .prop_map(move |data| (data, (samples, states, width)))
    })
}

/// Rejects nothing: a row of zeros would.
fn no_zero_row(data: &mut [f32], width: usize) {
    for row in data.chunks_mut(width) {
        if row.iter().all(|&v| v == 0.0) {
            row[0] = 1.0;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64)
    ))]

    #[test]
    fn equals_the_slow_twin((mut data, shape) in batches()) {
        no_zero_row(&mut data, shape.2);
        let accumulator = accumulate(&data, shape, Order::SampleFirst, 2);
        let mean = accumulator.mean(Metric::Angular).unwrap();
        close(&mean, &slow_mean(&data, shape, slow_angular), 1e-8);
        let cosine = accumulator.mean(Metric::Cosine).unwrap();
        let slow_cosine = |x: &[f64], y: &[f64]| {
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(p, q)| p * q).sum::<f64>();
            dot(x, y) / (dot(x, x).sqrt() * dot(y, y).sqrt())
        };
        close(&cosine, &slow_mean(&data, shape, slow_cosine), 1e-12);
    }

    #[test]
    fn same_bits_in_every_order((data, shape) in batches(), threads in 1_usize..5, cut in 0_usize..7) {
        let (samples, states, width) = shape;
        let whole = accumulate(&data, shape, Order::SampleFirst, 1);
        prop_assert_eq!(&whole, &accumulate(&data, shape, Order::SampleFirst, threads));

        let mut other_order = Vec::new();
        for l in 0..states {
            for s in 0..samples {
                other_order.extend_from_slice(&data[(s * states + l) * width..][..width]);
            }
        }
        prop_assert_eq!(&whole, &accumulate(&other_order, shape, Order::StateFirst, threads));

        let cut = cut.min(samples);
        let (head, tail) = data.split_at(cut * states * width);
        let head = accumulate(head, (cut, states, width), Order::SampleFirst, threads);
        let mut merged = accumulate(tail, (samples - cut, states, width), Order::SampleFirst, 1);
        merged.merge(&head).unwrap();
        prop_assert_eq!(&whole, &merged);
    }

    #[test]
    fn half_precision_is_widened_without_loss((data, shape) in batches()) {
        let halves: Vec<f16> = data.iter().map(|&v| f16::from_f32(v)).collect();
        let widened: Vec<f32> = halves.iter().map(|v| v.to_f32()).collect();
        prop_assert_eq!(
            accumulate(&halves, shape, Order::SampleFirst, 1),
            accumulate(&widened, shape, Order::SampleFirst, 1)
        );
        let brains: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        let bits: Vec<u16> = brains.iter().map(|v| v.to_bits()).collect();
        let widened: Vec<f32> = brains.iter().map(|v| v.to_f32()).collect();
        let expected = accumulate(&widened, shape, Order::SampleFirst, 1);
        prop_assert_eq!(&expected, &accumulate(&brains, shape, Order::SampleFirst, 1));
        prop_assert_eq!(&expected, &accumulate(&bits, shape, Order::SampleFirst, 1));
    }

    #[test]
    fn stored_sums_come_back_or_are_refused((data, shape) in batches(), word in 0_usize..1000, to in any::<u64>()) {
        let accumulator = accumulate(&data, shape, Order::SampleFirst, 1);
        let mut stored: Vec<_> =
            METRICS.map(|m| (m, accumulator.to_words(m).unwrap())).into_iter().collect();
        let (n, rejected) = (accumulator.count(), accumulator.rejected());
        let back = Accumulator::from_words(shape.1, n, rejected, &stored).unwrap();
        prop_assert_eq!(&back, &accumulator);

        let words = &mut stored[0].1;
        let word = word % words.len();
        words[word] = to;
        if let Ok(damaged) = Accumulator::from_words(shape.1, n, rejected, &stored) && n > 0 {
            let mean = damaged.mean(Metric::Angular).unwrap();
            prop_assert!(mean.iter().all(|d| d.abs() <= 1.0));
            let variance = damaged.variance(Metric::Angular).unwrap();
            prop_assert!(n < 2 || variance.iter().all(|v| *v >= 0.0));
        }
    }

    #[test]
    fn variance_equals_the_textbook(values in prop::collection::vec(-1.0_f64..1.0, 2..50)) {
        let mut sum = shallower_core::ExactSum::default();
        for &value in &values {
            sum.add(value);
        }
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
        prop_assert!((sum.mean(values.len() as u64) - mean).abs() < 1e-14);
        prop_assert!((sum.variance(values.len() as u64) - variance).abs() < 1e-13);
    }
}

#[test]
fn small_angles_keep_their_digits() {
    for exponent in 1..=6 {
        let d = 10_f64.powi(-exponent);
        let angle = d * std::f64::consts::PI;
        let data = [1.0, 0.0, angle.cos(), angle.sin()];
        let mean = accumulate(&data, (1, 2, 2), Order::SampleFirst, 1)
            .mean(Metric::Angular)
            .unwrap();
        assert!((mean[1] - d).abs() < 1e-9, "{d}: {}", mean[1]);
    }
}

#[test]
fn equal_states_are_at_zero_and_opposite_ones_at_one() {
    let x: Vec<f32> = (0..600).map(|i| (i as f32 * 0.37).sin()).collect();
    let opposite: Vec<f32> = x.iter().map(|v| -v).collect();
    let data = [x.clone(), x, opposite].concat();
    let accumulator = accumulate(&data, (1, 3, 600), Order::SampleFirst, 1);
    let mean = accumulator.mean(Metric::Angular).unwrap();
    assert_eq!(mean, [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
}

#[test]
fn unusable_samples_enter_no_sum() {
    let good = [1.0_f32, 2.0, 2.0, 1.0];
    for (bad, reason) in [
        ([f32::NAN, 0.0], Reason::NotFinite),
        ([f32::INFINITY, 0.0], Reason::NotFinite),
        ([0.0, -0.0], Reason::Zero),
    ] {
        for state in 0..2 {
            let mut sample = good;
            sample[2 * state..2 * state + 2].copy_from_slice(&bad);
            let data = [good, sample, good].concat();
            let view = States::new(&data, 3, 2, 2, Order::SampleFirst).unwrap();
            let mut accumulator = Accumulator::new(2, &METRICS).unwrap();
            let rejections = accumulator.update(&view).unwrap();
            assert_eq!(rejections.len(), 1);
            let found = rejections[0];
            assert_eq!(
                (found.sample, found.state, found.reason),
                (1, state, reason)
            );
            let mut expected = accumulate(&[good, good].concat(), (2, 2, 2), Order::SampleFirst, 1);
            expected.reject(1).unwrap();
            assert_eq!(accumulator, expected);
        }
    }
    let huge = [1e200_f64, 0.0, 1.0, 0.0];
    let view = States::new(&huge, 1, 2, 2, Order::SampleFirst).unwrap();
    let rejections = Accumulator::new(2, &METRICS)
        .unwrap()
        .update(&view)
        .unwrap();
    assert_eq!(rejections[0].reason, Reason::NormOutOfRange);
}

#[test]
fn the_extremes_of_float32_are_compared() {
    let data = [3e38_f32, 3e38, 3e38, -3e38, 1e-45, 0.0, 1e-45, 1e-45];
    let accumulator = accumulate(&data, (2, 2, 2), Order::SampleFirst, 1);
    assert_eq!(accumulator.count(), 2);
    assert!((accumulator.mean(Metric::Angular).unwrap()[1] - 0.375).abs() < 1e-15);
}

#[test]
fn the_best_start_is_the_smallest_of_equals() {
    // Three layers: x0, x1 = x0, x2 orthogonal, x3 = x2.
    let data = [1.0_f32, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0];
    let accumulator = accumulate(&data, (1, 4, 2), Order::SampleFirst, 1);
    for metric in METRICS {
        assert_eq!(accumulator.best_starts(metric, 1, 1), Ok(vec![0]));
        assert_eq!(accumulator.best_starts(metric, 2, 9), Ok(vec![0, 1]));
        for n in [-1, 0, 3, 4] {
            let refused = Error::BlockSize { n, num_layers: 3 };
            assert_eq!(accumulator.best_starts(metric, n, 1), Err(refused));
        }
    }
}

#[test]
fn wrong_shapes_and_metrics_are_refused() {
    let data = [1.0_f32; 12];
    assert!(States::new(&data, 2, 3, 3, Order::SampleFirst).is_err());
    assert!(States::new(&data, usize::MAX, 3, 2, Order::SampleFirst).is_err());
    assert!(States::new(&data, 12, 1, 1, Order::SampleFirst).is_err());
    assert!(States::new(&data, 1, 12, 0, Order::SampleFirst).is_err());
    assert!(Accumulator::new(1 << 40, &METRICS).is_err());
    assert!(Accumulator::new(1, &METRICS).is_err());
    assert!(Accumulator::new(3, &[]).is_err());
    assert!(Accumulator::new(3, &[Metric::Cosine, Metric::Cosine]).is_err());
    let mut three = Accumulator::new(3, &METRICS).unwrap();
    let view = States::new(&data, 3, 2, 2, Order::SampleFirst).unwrap();
    assert!(matches!(three.update(&view), Err(Error::StateCount { .. })));
    assert!(
        three
            .merge(&Accumulator::new(2, &METRICS).unwrap())
            .is_err()
    );
    assert!(
        three
            .merge(&Accumulator::new(3, &[Metric::Angular]).unwrap())
            .is_err()
    );
    assert!(matches!(
        three.mean(Metric::Angular),
        Err(Error::NoSamples { .. })
    ));
    assert!("euclid".parse::<Metric>().is_err());
}

#[test]
fn one_sample_has_no_variance() {
    let accumulator = accumulate(&[1.0_f32, 0.0, 0.0, 1.0], (1, 2, 2), Order::SampleFirst, 1);
    assert!(accumulator.variance(Metric::Angular).unwrap()[1].is_nan());
    let twice = accumulate(
        &[1.0_f32, 0.0, 0.0, 1.0].repeat(2),
        (2, 2, 2),
        Order::SampleFirst,
        1,
    );
    assert_eq!(twice.variance(Metric::Angular).unwrap()[1], 0.0);
}
