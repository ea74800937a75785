//! The core against a slow twin, and against itself in other orders.

use half::{bf16, f16};
use proptest::prelude::*;
use shallower_core::{Accumulator, Element, Error, Metric, Order, Reason, States, Tier};

const METRICS: [Metric; 4] = Metric::ALL;

/// What an angular distance may err by, on any tier and in any dtype.
const TOLERANCE: f64 = 1e-7;

fn accumulate<T: Element>(
    data: &[T],
    shape: (usize, usize, usize),
    order: Order,
    threads: usize,
) -> Accumulator {
    accumulate_on(Tier::chosen().unwrap(), data, shape, order, threads)
}

fn accumulate_on<T: Element>(
    tier: Tier,
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
    let accumulator = Accumulator::new(states, &METRICS).unwrap();
    let mut accumulator = accumulator.with_tier(tier).unwrap();
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

fn slow_cosine(x: &[f64], y: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(p, q)| p * q).sum::<f64>();
    dot(x, y) / (dot(x, x).sqrt() * dot(y, y).sqrt())
}

fn equals_the_slow_twin<T: Element>(tier: Tier, data: &[T], shape: (usize, usize, usize)) {
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
fn deep_batches() -> impl Strategy<Value = (Vec<f32>, (usize, usize, usize))> {
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
fn residual_stream(
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(64)
    ))]

    #[test]
    fn every_tier_equals_the_slow_twin((mut data, shape) in batches()) {
        no_zero_row(&mut data, shape.2);
        let halves: Vec<f16> = data.iter().map(|&v| f16::from_f32(v)).collect();
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        let doubles: Vec<f64> = data.iter().map(|&v| f64::from(v) * 1.000_000_1).collect();
        for tier in Tier::available() {
            equals_the_slow_twin(tier, &data, shape);
            equals_the_slow_twin(tier, &halves, shape);
            equals_the_slow_twin(tier, &narrow, shape);
            equals_the_slow_twin(tier, &doubles, shape);
        }
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
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        let bits: Vec<u16> = narrow.iter().map(|v| v.to_bits()).collect();
        let widened: Vec<f32> = narrow.iter().map(|v| v.to_f32()).collect();
        for tier in Tier::available() {
            let narrow = accumulate_on(tier, &narrow, shape, Order::SampleFirst, 1);
            prop_assert_eq!(&narrow, &accumulate_on(tier, &bits, shape, Order::SampleFirst, 1));
            let widened = accumulate_on(tier, &widened, shape, Order::SampleFirst, 1);
            let mean = |sums: &Accumulator| sums.mean(Metric::Angular).unwrap();
            if narrow.count() > 0 {
                close(&mean(&narrow), &mean(&widened), TOLERANCE);
            }
            // The others multiply bfloat16 in float32.
            prop_assert!(tier != Tier::Scalar || narrow == widened);
        }
    }

    #[test]
    fn every_tier_equals_the_slow_twin_on_deep_models((data, shape) in deep_batches()) {
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        for tier in Tier::available() {
            equals_the_slow_twin(tier, &data, shape);
            equals_the_slow_twin(tier, &narrow, shape);
        }
    }

    #[test]
    fn a_sample_is_worth_the_same_whatever_stands_beside_it((data, shape) in batches()) {
        let (samples, states, width) = shape;
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        for tier in Tier::available() {
            let whole = accumulate_on(tier, &narrow, shape, Order::SampleFirst, 3);
            let mut merged = Accumulator::new(states, &METRICS).unwrap();
            for sample in narrow.chunks(states * width).rev() {
                merged.merge(&accumulate_on(tier, sample, (1, states, width), Order::SampleFirst, 1)).unwrap();
            }
            prop_assert_eq!(&whole, &merged);
            prop_assert_eq!(whole.count() + whole.rejected(), samples as u64);
        }
    }

    #[test]
    fn stored_sums_come_back_or_are_refused((data, shape) in batches(), word in 0_usize..1000, to in any::<u64>()) {
        let accumulator = accumulate(&data, shape, Order::SampleFirst, 1);
        let mut stored: Vec<_> =
            METRICS.map(|m| (m, accumulator.to_words(m).unwrap())).into_iter().collect();
        let (lengths, rejected) = (accumulator.lengths(), accumulator.rejected());
        let n = accumulator.count();
        let mut norms = accumulator.norms_to_words();
        let back = Accumulator::from_words(shape.1, lengths, rejected, &stored, &norms).unwrap();
        prop_assert_eq!(&back, &accumulator);

        let at = word % norms.len();
        let whole = std::mem::replace(&mut norms[at], to);
        if let Ok(damaged) = Accumulator::from_words(shape.1, lengths, rejected, &stored, &norms) && n > 0 {
            prop_assert!(damaged.norms().unwrap().iter().all(|norm| (1e-75..=1e75).contains(norm)));
        }
        norms[at] = whole;
        prop_assert!(Accumulator::from_words(shape.1, lengths, rejected, &stored, &norms[1..]).is_err());

        let words = &mut stored[0].1;
        let word = word % words.len();
        words[word] = to;
        if let Ok(damaged) = Accumulator::from_words(shape.1, lengths, rejected, &stored, &norms) && n > 0 {
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

/// Two rows at an angular distance, of norms 1 and 3, and massive in two channels or not.
fn rows_at(distance: f64, width: usize, massive: bool) -> Vec<f64> {
    let stream = residual_stream(1, 2, width, 5, massive);
    let (mut x, mut y): (Vec<f64>, Vec<f64>) = (
        stream[..width].iter().map(|&v| f64::from(v)).collect(),
        stream[width..].iter().map(|&v| f64::from(v)).collect(),
    );
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a * b).sum::<f64>();
    let norm = dot(&x, &x).sqrt();
    for v in &mut x {
        *v /= norm;
    }
    let along = dot(&x, &y);
    for (v, u) in y.iter_mut().zip(&x) {
        *v -= along * u;
    }
    let norm = dot(&y, &y).sqrt();
    let (sine, cosine) = (distance * std::f64::consts::PI).sin_cos();
    let second: Vec<f64> = x
        .iter()
        .zip(&y)
        .map(|(u, v)| 3.0 * (cosine * u + sine * v / norm))
        .collect();
    x.extend(second);
    x
}

#[test]
fn every_tier_keeps_the_digits_of_small_angles() {
    for exponent in 1..=6 {
        for distance in [10_f64.powi(-exponent), 1.0 - 10_f64.powi(-exponent)] {
            for (width, massive) in [(2, false), (601, false), (601, true), (4096, true)] {
                let data = rows_at(distance, width, massive);
                let singles: Vec<f32> = data.iter().map(|&v| v as f32).collect();
                let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f64(v)).collect();
                for tier in Tier::available() {
                    equals_the_slow_twin(tier, &data, (1, 2, width));
                    equals_the_slow_twin(tier, &singles, (1, 2, width));
                    equals_the_slow_twin(tier, &narrow, (1, 2, width));
                    let exact = accumulate_on(tier, &data, (1, 2, width), Order::SampleFirst, 1);
                    let mean = exact.mean(Metric::Angular).unwrap()[1];
                    assert!((mean - distance).abs() < 1e-9, "{tier} {distance}: {mean}");
                }
            }
        }
    }
}

#[test]
fn every_tier_is_right_where_float32_ends() {
    let stream = residual_stream(2, 5, 640, 3, false);
    for scale in [1e-38, 1e-30, 1e-20, 1e-12, 1e12, 1e17, 1e20, 1e30, 3e37_f32] {
        let scaled: Vec<f32> = stream.iter().map(|v| v * scale).collect();
        let narrow: Vec<bf16> = scaled.iter().map(|&v| bf16::from_f32(v)).collect();
        // Rows of very different sizes beside each other.
        let mut uneven = stream.clone();
        uneven[640..1280].iter_mut().for_each(|v| *v *= scale);
        for tier in Tier::available() {
            equals_the_slow_twin(tier, &scaled, (2, 5, 640));
            equals_the_slow_twin(tier, &narrow, (2, 5, 640));
            let uneven = accumulate_on(tier, &uneven, (2, 5, 640), Order::SampleFirst, 1);
            assert!(uneven.count() + uneven.rejected() == 2);
        }
    }
    let halves: Vec<f16> = stream.iter().map(|&v| f16::from_f32(v * 1e-6)).collect();
    for tier in Tier::available() {
        equals_the_slow_twin(tier, &halves, (2, 5, 640));
    }
}

/// Numbers whose rounding errors do not cancel: constant rows, few values, heavy tails.
#[test]
fn every_tier_is_right_on_numbers_without_randomness() {
    let kinds: [fn(usize, usize) -> f32; 6] = [
        |row, _| 0.1 * (row + 1) as f32,
        |row, column| if column % (row + 2) == 0 { -0.3 } else { 0.7 },
        |row, column| {
            if column % 16 == 0 {
                30.0 + row as f32
            } else {
                0.1
            }
        },
        |row, column| (row as f32 + 1.0) / (column as f32 + 1.0),
        |row, column| ((column * column + 7 * row) % 17) as f32 + 0.1,
        |row, column| {
            if column % 500 == row {
                100.0
            } else {
                (column % 3) as f32 - 1.0
            }
        },
    ];
    for kind in kinds {
        for width in [33, 576, 4096] {
            let rows = (0..6).flat_map(|row| (0..width).map(move |column| kind(row, column)));
            let data: Vec<f32> = rows.collect();
            let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
            for tier in Tier::available() {
                equals_the_slow_twin(tier, &data, (1, 6, width));
                equals_the_slow_twin(tier, &narrow, (1, 6, width));
            }
        }
    }
}

#[test]
fn every_tier_has_equal_states_at_zero_and_opposite_ones_at_one() {
    for width in [1, 7, 64, 600, 1100] {
        let x: Vec<f32> = (0..width).map(|i| (i as f32 * 0.37).cos()).collect();
        let times = |factor: f32| x.iter().map(|v| v * factor).collect::<Vec<f32>>();
        let data = [x.clone(), times(4.0), times(-1.0)].concat();
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        for tier in Tier::available() {
            let expected = [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0];
            let single = accumulate_on(tier, &data, (1, 3, width), Order::SampleFirst, 1);
            assert_eq!(
                single.mean(Metric::Angular).unwrap(),
                expected,
                "{tier} {width}"
            );
            let narrow = accumulate_on(tier, &narrow, (1, 3, width), Order::SampleFirst, 1);
            assert_eq!(
                narrow.mean(Metric::Angular).unwrap(),
                expected,
                "{tier} {width}"
            );
        }
    }
}

#[test]
fn tiers_that_this_machine_lacks_are_refused() {
    for tier in Tier::ALL {
        assert_eq!(tier.name().parse(), Ok(tier));
        let forced = Accumulator::new(2, &METRICS).unwrap().with_tier(tier);
        if tier.is_available() {
            assert_eq!(forced.unwrap().tier(), tier);
        } else {
            eprintln!("skipped: this machine has no {tier}");
            assert!(matches!(forced, Err(Error::TierUnavailable { .. })));
        }
    }
    let unknown = "sse9".parse::<Tier>().unwrap_err().to_string();
    assert!(
        unknown.contains("\"sse9\"") && unknown.contains("scalar"),
        "{unknown}"
    );
}

#[test]
fn ratios_that_the_sums_have_no_room_for_are_rejected() {
    let data = [1.0_f64, 0.0, 65536.0, 0.0];
    let view = States::new(&data, 1, 2, 2, Order::SampleFirst).unwrap();
    for (metric, rejected) in [
        (Metric::Angular, 0),
        (Metric::NormRatio, 1),
        (Metric::RelativeL2, 1),
    ] {
        let mut accumulator = Accumulator::new(2, &[metric]).unwrap();
        let rejections = accumulator.update(&view).unwrap();
        assert_eq!(rejections.len(), rejected);
        if let Some(rejection) = rejections.first() {
            assert_eq!(
                (rejection.state, rejection.reason),
                (1, Reason::RatioOutOfRange)
            );
        }
    }
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
    let no_distance = Err(Error::NoDistance("norm_ratio"));
    assert_eq!(
        accumulator.best_starts(Metric::NormRatio, 1, 1),
        no_distance
    );
    for metric in [Metric::Angular, Metric::Cosine, Metric::RelativeL2] {
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
