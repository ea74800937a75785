//! Linear CKA against a slow twin, and against itself in other orders.

use proptest::prelude::*;
use shallower_core::{Cka, Order, States};

const STATES: usize = 3;

fn add(cka: &mut Cka, data: &[f32], width: usize, threads: usize) {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .unwrap();
    let samples = data.len() / STATES / width;
    let view = States::new(data, samples, STATES, width, Order::SampleFirst).unwrap();
    pool.install(|| cka.update(&view)).unwrap();
}

/// `HSIC_1` of two states as Song et al. write it, from Gram matrices that are not centred.
fn slow_hsic(data: &[f32], width: usize, l: usize, m: usize) -> f64 {
    let samples = data.len() / STATES / width;
    let row = |s: usize, l: usize| &data[(s * STATES + l) * width..][..width];
    let gram = |l: usize| -> Vec<Vec<f64>> {
        let dot = |i: usize, j: usize| {
            let both = row(i, l).iter().zip(row(j, l));
            both.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
        };
        let entry = |i: usize, j: usize| if i == j { 0.0 } else { dot(i, j) };
        (0..samples)
            .map(|i| (0..samples).map(|j| entry(i, j)).collect())
            .collect()
    };
    let (left, right) = (gram(l), gram(m));
    let sums =
        |gram: &Vec<Vec<f64>>| -> Vec<f64> { gram.iter().map(|row| row.iter().sum()).collect() };
    let (left_sums, right_sums) = (sums(&left), sums(&right));
    let n = samples as f64;
    let trace: f64 = (left.iter().zip(&right))
        .flat_map(|(left, right)| left.iter().zip(right))
        .map(|(x, y)| x * y)
        .sum();
    let product: f64 = left_sums.iter().zip(&right_sums).map(|(x, y)| x * y).sum();
    let totals = left_sums.iter().sum::<f64>() * right_sums.iter().sum::<f64>();
    (trace + totals / ((n - 1.0) * (n - 2.0)) - 2.0 * product / (n - 2.0)) / (n * (n - 3.0))
}

fn batches() -> impl Strategy<Value = (usize, Vec<Vec<f32>>)> {
    (1_usize..300).prop_flat_map(|width| {
        let batch = (4_usize..9).prop_flat_map(move |samples| {
            prop::collection::vec(-1.0_f32..1.0, samples * STATES * width)
        });
        (Just(width), prop::collection::vec(batch, 1..5))
    })
}

proptest! {
    #![proptest_config(crate::config(64))]

    #[test]
    fn equals_the_slow_twin((width, batches) in batches()) {
        let mut cka = Cka::new(STATES, 8).unwrap();
        for batch in &batches {
            add(&mut cka, batch, width, 2);
        }
        let hsic = |l, m| batches.iter().map(|batch| slow_hsic(batch, width, l, m)).sum::<f64>();
        let values = cka.values().unwrap();
        for l in 0..STATES {
            for m in 0..STATES {
                let expected = hsic(l, m) / (hsic(l, l) * hsic(m, m)).sqrt();
                let found = values[l * STATES + m];
                prop_assert!((found - expected).abs() < 1e-9, "{found} and {expected}");
            }
        }
    }

    #[test]
    fn same_bits_in_every_order((width, batches) in batches(), threads in 1_usize..5) {
        let mut whole = Cka::new(STATES, 8).unwrap();
        for batch in &batches {
            add(&mut whole, batch, width, 1);
        }
        let mut merged = Cka::new(STATES, 8).unwrap();
        for batch in batches.iter().rev() {
            let mut part = Cka::new(STATES, 8).unwrap();
            add(&mut part, batch, width, threads);
            merged.merge(&part).unwrap();
        }
        prop_assert_eq!(&merged, &whole);
        let back = Cka::from_bytes(&whole.to_bytes()).unwrap();
        prop_assert_eq!(&back, &whole);
    }
}

#[test]
fn minibatches_of_other_sizes_are_refused() {
    assert!(Cka::new(STATES, 3).is_err());
    assert!(Cka::new(STATES, 1025).is_err());
    assert!(Cka::new(1, 8).is_err());
    let mut cka = Cka::new(STATES, 8).unwrap();
    assert!(cka.values().is_err());
    for samples in [0, 3, 9] {
        let data = vec![1.0_f32; samples * STATES * 2];
        let view = States::new(&data, samples, STATES, 2, Order::SampleFirst).unwrap();
        assert!(cka.update(&view).is_err());
    }
    assert!(cka.merge(&Cka::new(STATES, 9).unwrap()).is_err());
    assert!(cka.merge(&Cka::new(4, 8).unwrap()).is_err());
}

#[test]
fn numbers_that_leave_float64_are_refused() {
    let data: Vec<f64> = (0..4 * STATES)
        .map(|i| 1e75 * f64::from(i as u32).sin() * 1e10)
        .collect();
    let view = States::new(&data, 4, STATES, 1, Order::SampleFirst).unwrap();
    let mut cka = Cka::new(STATES, 8).unwrap();
    let before = cka.clone();
    assert!(cka.update(&view).is_err());
    assert_eq!(cka, before);
}
