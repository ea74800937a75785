//! Every tier against the slow twin, and against itself in other orders.

use half::{bf16, f16};
use proptest::prelude::*;
use shallower_core::{Metric, Order, Sums, Tier};

use super::twin::{
    METRICS, TOLERANCE, accumulate, accumulate_on, batches, close, deep_batches,
    equals_the_slow_twin, no_zero_row,
};

proptest! {
    #![proptest_config(crate::config(64))]

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
            let mean = |sums: &Sums| sums.mean(Metric::Angular).unwrap();
            if narrow.count() > 0 {
                close(&mean(&narrow), &mean(&widened), TOLERANCE);
            }
            // The others multiply bfloat16 in float32.
            prop_assert!(tier != Tier::Scalar || narrow == widened);
        }
    }

    #[test]
    fn a_sample_is_worth_the_same_whatever_stands_beside_it((data, shape) in batches()) {
        let (samples, states, width) = shape;
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        for tier in Tier::available() {
            let whole = accumulate_on(tier, &narrow, shape, Order::SampleFirst, 3);
            let mut merged = Sums::new(states, &METRICS).unwrap();
            for sample in narrow.chunks(states * width).rev() {
                merged.merge(&accumulate_on(tier, sample, (1, states, width), Order::SampleFirst, 1)).unwrap();
            }
            prop_assert_eq!(&whole, &merged);
            prop_assert_eq!(whole.count() + whole.rejected(), samples as u64);
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

proptest! {
    // A case takes ten times as long as one of the others.
    #![proptest_config(crate::config(16))]

    #[test]
    fn every_tier_equals_the_slow_twin_on_deep_models((data, shape) in deep_batches()) {
        let narrow: Vec<bf16> = data.iter().map(|&v| bf16::from_f32(v)).collect();
        for tier in Tier::available() {
            equals_the_slow_twin(tier, &data, shape);
            equals_the_slow_twin(tier, &narrow, shape);
        }
    }
}
