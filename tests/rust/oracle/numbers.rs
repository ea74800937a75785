//! Numbers that are hard to get right: small angles, the ends of float32, errors that add up.

use half::{bf16, f16};
use shallower_core::{Metric, Order, Tier};

use super::twin::{accumulate, accumulate_on, equals_the_slow_twin, residual_stream};

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
fn the_extremes_of_float32_are_compared() {
    let data = [3e38_f32, 3e38, 3e38, -3e38, 1e-45, 0.0, 1e-45, 1e-45];
    let accumulator = accumulate(&data, (2, 2, 2), Order::SampleFirst, 1);
    assert_eq!(accumulator.count(), 2);
    assert!((accumulator.mean(Metric::Angular).unwrap()[1] - 0.375).abs() < 1e-15);
}
