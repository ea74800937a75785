//! Input that is refused or left out of the sums, and ties.

use shallower_core::{Accumulator, Error, Gram, Metric, Order, Reason, States, Sums, Tier};

use super::twin::{METRICS, accumulate};

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
#[should_panic(expected = "this processor has no")]
fn a_matrix_of_a_tier_that_this_machine_lacks_is_refused() {
    let missing = if cfg!(target_arch = "aarch64") {
        Tier::Avx2
    } else {
        Tier::Neon
    };
    Gram::new(2, missing);
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
            assert_eq!(*accumulator.sums(), expected);
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
fn the_best_start_is_the_smallest_of_equals() {
    // Three layers: x0, x1 = x0, x2 orthogonal, x3 = x2.
    let data = [1.0_f32, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0];
    let accumulator = accumulate(&data, (1, 4, 2), Order::SampleFirst, 1);
    let no_distance = Err(Error::NoDistance("norm_ratio"));
    assert_eq!(accumulator.costs(Metric::NormRatio), no_distance);
    for metric in [Metric::Angular, Metric::Cosine, Metric::RelativeL2] {
        let costs = accumulator.costs(metric).unwrap();
        assert_eq!(costs.best_starts(1, 1), Ok(vec![0]));
        assert_eq!(costs.best_starts(2, 9), Ok(vec![0, 1]));
        for n in [-1, 0, 3, 4] {
            let refused = Error::BlockSize { n, num_layers: 3 };
            assert_eq!(costs.best_starts(n, 1), Err(refused));
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
    assert!(three.merge(&Sums::new(2, &METRICS).unwrap()).is_err());
    assert!(
        three
            .merge(&Sums::new(3, &[Metric::Angular]).unwrap())
            .is_err()
    );
    assert!(matches!(
        three.sums().mean(Metric::Angular),
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
