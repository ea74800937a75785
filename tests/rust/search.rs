//! The search and the bootstrap against slow twins.

use proptest::prelude::*;
use shallower_core::{Accumulator, Metric, Order, States, bootstrap};
use std::num::NonZeroUsize;
use std::ops::Range;

const METRICS: [Metric; 2] = [Metric::Angular, Metric::Cosine];

fn config() -> ProptestConfig {
    ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(64),
    )
}

/// Directions at multiples of 45 degrees, so that many plans cost the same.
fn accumulate(directions: &[u8], num_states: usize) -> Accumulator {
    let rows = [
        [1.0_f32, 0.0],
        [1.0, 1.0],
        [0.0, 1.0],
        [-1.0, 1.0],
        [-1.0, 0.0],
    ];
    let samples = directions.len() / num_states;
    let data: Vec<f32> = directions[..samples * num_states]
        .iter()
        .flat_map(|&direction| rows[usize::from(direction)])
        .collect();
    let mut accumulator = Accumulator::new(num_states, &METRICS).unwrap();
    let view = States::new(&data, samples, num_states, 2, Order::SampleFirst).unwrap();
    accumulator.update(&view).unwrap();
    accumulator
}

/// All ways to drop `n` of `layers` in at most `blocks` blocks with a layer between them.
fn plans(layers: Range<usize>, n: usize, blocks: usize) -> Vec<Vec<Range<usize>>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    if blocks == 0 {
        return Vec::new();
    }
    let mut all = Vec::new();
    for start in layers.clone() {
        for stop in start + 1..=layers.end.min(start + n) {
            let rest = (stop + 1).min(layers.end)..layers.end;
            for mut plan in plans(rest, n - (stop - start), blocks - 1) {
                plan.insert(0, start..stop);
                all.push(plan);
            }
        }
    }
    all
}

/// The bootstrap without columns, bounds or vectors, on values that need no rounding.
fn slow_bootstrap(
    values: &[Vec<f32>],
    num_states: usize,
    sign: i64,
    resamples: u64,
    seed: u64,
) -> Vec<Vec<u64>> {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed = |state: u64| {
        let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ (state >> 31)
    };
    let mut ordered = values.to_vec();
    ordered.sort_by(|left, right| left.partial_cmp(right).unwrap());
    let pair = |l: usize, m: usize| l * (2 * num_states - l - 1) / 2 + m - l - 1;
    let mut wins: Vec<Vec<u64>> = (1..num_states - 1)
        .map(|n| vec![0; num_states - n])
        .collect();
    for resample in 1..=resamples {
        let key = mixed(seed.wrapping_add(GAMMA.wrapping_mul(resample)));
        let mut sums = vec![0_i64; values[0].len()];
        for draw in 1..=values.len() as u64 {
            let random = mixed(key.wrapping_add(GAMMA.wrapping_mul(draw)));
            let index = (u128::from(random) * values.len() as u128) >> 64;
            for (sum, value) in sums
                .iter_mut()
                .zip(&ordered[usize::try_from(index).unwrap()])
            {
                *sum += sign * (value * 1024.0) as i64;
            }
        }
        for (n, wins) in (1..).zip(&mut wins) {
            let best = (0..num_states - n)
                .min_by_key(|&l| sums[pair(l, l + n)])
                .unwrap();
            wins[best] += 1;
        }
    }
    wins
}

fn samples() -> impl Strategy<Value = (usize, Vec<Vec<f32>>)> {
    let sizes = (
        3_usize..8,
        prop_oneof![1_usize..14, 60_usize..140],
        1_i32..1024,
    );
    sizes.prop_flat_map(|(num_states, samples, reach)| {
        let pairs = num_states * (num_states - 1) / 2;
        let value = (-reach..=reach).prop_map(|value| value as f32 / 1024.0);
        let sample = prop::collection::vec(value, pairs);
        (Just(num_states), prop::collection::vec(sample, samples))
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn the_best_plan_is_the_best_of_all(
        num_states in 3_usize..10,
        directions in prop::collection::vec(0_u8..5, 10..40),
        n in 1_usize..8,
        blocks in 1_usize..5,
        protected in (0_usize..3, 0_usize..3),
    ) {
        let accumulator = accumulate(&directions, num_states);
        let layers = num_states - 1;
        let free = protected.0..layers.saturating_sub(protected.1).max(protected.0);
        for metric in METRICS {
            let found = accumulator.best_plan(
                metric,
                n.cast_signed() as i64,
                NonZeroUsize::new(blocks).unwrap(),
                protected.0,
                protected.1,
            );
            if n >= layers || n > free.len() {
                prop_assert!(found.is_err());
                continue;
            }
            let mean = accumulator.mean(metric).unwrap();
            let count = accumulator.count() as f64;
            let cost = |plan: &Vec<Range<usize>>| {
                let each = plan.iter().map(|block| {
                    let mean = mean[block.start * num_states + block.end];
                    if metric.is_similarity() == Some(true) { 1.0 - mean } else { mean }
                });
                each.sum::<f64>() * count
            };
            let found = found.unwrap();
            let all = plans(free.clone(), n, blocks);
            prop_assert!(all.contains(&found));
            let least = all.iter().map(cost).fold(f64::INFINITY, f64::min);
            prop_assert!(cost(&found) <= least + 1e-9);
        }
    }

    #[test]
    fn the_bootstrap_equals_its_slow_twin(
        (num_states, values) in samples(),
        seed in any::<u64>(),
        resamples in 1_usize..200,
        threads in 1_usize..4,
        turn in any::<prop::sample::Index>(),
    ) {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut turned = values.clone();
        turned.rotate_left(turn.index(values.len()));
        let flat = turned.concat();
        for (metric, sign) in [(Metric::Angular, 1), (Metric::Cosine, -1)] {
            let found = pool.install(|| bootstrap(&flat, num_states, metric, resamples, seed));
            let expected = slow_bootstrap(&values, num_states, sign, resamples as u64, seed);
            prop_assert_eq!(found.unwrap(), expected);
        }
    }
}

#[test]
fn many_samples_far_apart_and_close_together_are_resampled_exactly() {
    let (num_states, samples) = (6, 5000);
    let mut state = 1_u64;
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state >> 40
    };
    let values: Vec<Vec<f32>> = (0..samples)
        .map(|_| {
            let value = |pair: u64| (random() % 512 + (pair % 3) * 256) as f32 / 1024.0;
            (0..15).map(value).collect()
        })
        .collect();
    let found = bootstrap(&values.concat(), num_states, Metric::Angular, 100, 3).unwrap();
    assert_eq!(found, slow_bootstrap(&values, num_states, 1, 100, 3));
    assert!(
        found
            .iter()
            .any(|wins| wins.iter().filter(|&&wins| wins > 0).count() > 1)
    );
}

#[test]
fn values_that_are_no_samples_are_refused() {
    for values in [
        &[][..],
        &[0.5; 4],
        &[0.5, f32::NAN, 0.5],
        &[0.5, f32::INFINITY, 0.5],
    ] {
        assert!(bootstrap(values, 3, Metric::Angular, 10, 0).is_err());
    }
    assert!(bootstrap(&[0.5], 1, Metric::Angular, 10, 0).is_err());
    assert_eq!(bootstrap(&[0.5], 2, Metric::Angular, 10, 0), Ok(vec![]));
    assert_eq!(
        bootstrap(&[0.0; 3], 3, Metric::Angular, 0, 0),
        Ok(vec![vec![0, 0]])
    );
    assert_eq!(
        bootstrap(&[0.0; 3], 3, Metric::Cosine, 7, 0),
        Ok(vec![vec![7, 0]])
    );
}
