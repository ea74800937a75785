//! The search and the bootstrap against slow twins.

use proptest::prelude::*;
use shallower_core::{Accumulator, Costs, Error, Metric, Order, States, Sums, bootstrap};
use std::num::NonZeroUsize;
use std::ops::Range;

const METRICS: [Metric; 2] = [Metric::Angular, Metric::Cosine];

/// Directions at multiples of 45 degrees, so that many plans cost the same.
fn accumulate(directions: &[u8], num_states: usize) -> Sums {
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
    accumulator.into_sums()
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

/// A cost of one of three magnitudes, too far apart for one float64; the greatest decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Magnitudes([i64; 3]);

impl Magnitudes {
    fn value(self) -> f64 {
        let scales = [2.0_f64.powi(500), 1.0, 2.0_f64.powi(-1060)];
        let parts = self.0.into_iter().zip(scales);
        parts.map(|(part, scale)| part as f64 * scale).sum()
    }
}

impl std::iter::Sum for Magnitudes {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let add = |sum: Self, one: Self| Self(std::array::from_fn(|i| sum.0[i] + one.0[i]));
        all.fold(Self::default(), add)
    }
}

fn cost() -> impl Strategy<Value = Option<Magnitudes>> {
    let of = |magnitude: usize| {
        (-2_i64..4).prop_map(move |part| {
            let mut parts = [0; 3];
            parts[magnitude] = part;
            Some(Magnitudes(parts))
        })
    };
    prop_oneof![1 => Just(None), 6 => of(1), 1 => of(0), 1 => of(2)]
}

/// The costs of all blocks, of one magnitude or of several.
fn costs() -> impl Strategy<Value = (usize, Vec<Option<Magnitudes>>)> {
    (1_usize..8, any::<bool>()).prop_flat_map(|(layers, near)| {
        let entry = cost().prop_map(move |cost| match cost {
            Some(Magnitudes([_, part, _])) if near => Some(Magnitudes([0, part, 0])),
            cost => cost,
        });
        let entries = prop::collection::vec(entry, (layers + 1) * (layers + 1));
        (Just(layers), entries)
    })
}

proptest! {
    #![proptest_config(crate::config(64))]

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
            let found = accumulator.costs(metric).unwrap().best_plan(
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
    fn costs_of_any_blocks_are_searched_exactly(
        (layers, costs) in costs(),
        n in 1_usize..8,
        blocks in 1_usize..5,
        count in 1_usize..9,
        protected in (0_usize..3, 0_usize..3),
    ) {
        let states = layers + 1;
        let value = |cost: Option<Magnitudes>| cost.map_or(f64::NAN, Magnitudes::value);
        let matrix: Vec<f64> = costs.iter().map(|&cost| value(cost)).collect();
        let found = Costs::of_blocks(&matrix, states).unwrap();
        prop_assert_eq!(found.num_layers(), layers);
        let cost = |block: &Range<usize>| costs[block.start * states + block.end];
        let size = n.cast_signed() as i64;
        let mut starts: Vec<(Magnitudes, usize)> = (0..states.saturating_sub(n))
            .filter_map(|start| Some((cost(&(start..start + n))?, start)))
            .collect();
        starts.sort_unstable();
        let starts: Vec<usize> = starts.iter().map(|&(_, start)| start).take(count).collect();
        match found.best_starts(size, count) {
            Ok(found) => prop_assert_eq!(found, starts),
            Err(error) => {
                let unknown = error == Error::NothingMeasured { n: size } && starts.is_empty();
                prop_assert!(unknown || n >= layers);
            }
        }

        let free = protected.0..layers.saturating_sub(protected.1).max(protected.0);
        let key = |plan: &Vec<Range<usize>>| {
            let total = plan.iter().map(&cost).sum::<Option<Magnitudes>>()?;
            let starts: Vec<_> = plan.iter().map(|block| block.start).collect();
            let stops: Vec<_> = plan.iter().map(|block| block.end).collect();
            let order: Vec<_> = starts.into_iter().zip(stops).collect();
            Some((total, plan.len(), order))
        };
        let all = plans(free.clone(), n, blocks);
        let best = all.iter().filter(|plan| key(plan).is_some()).min_by_key(|plan| key(plan));
        let most = NonZeroUsize::new(blocks).unwrap();
        match found.best_plan(size, most, protected.0, protected.1) {
            Ok(found) => prop_assert_eq!(Some(&found), best),
            Err(error) => {
                let unknown = error == Error::NothingMeasured { n: size } && best.is_none();
                prop_assert!(unknown || n >= layers || n > free.len());
            }
        }
    }

    #[test]
    fn a_block_costs_what_its_layers_cost(
        layers in prop::collection::vec(cost(), 1..9),
        n in 1_usize..8,
        blocks in 1_usize..4,
    ) {
        let value = |cost: &Option<Magnitudes>| cost.map_or(f64::NAN, Magnitudes::value);
        let values: Vec<f64> = layers.iter().map(value).collect();
        let found = Costs::of_layers(&values).unwrap();
        let size = n.cast_signed() as i64;
        let sum = |block: &Range<usize>| layers[block.clone()].iter().copied().sum::<Option<_>>();
        if let Ok(starts) = found.best_starts(size, 1) {

            let all = (0..=layers.len() - n)
                .filter_map(|start| Some((sum(&(start..start + n))?, start)));
            prop_assert_eq!(starts[0], all.min().unwrap().1);
        }
        if let Ok(plan) = found.best_plan(size, NonZeroUsize::new(blocks).unwrap(), 0, 0) {
            let total = |plan: &Vec<Range<usize>>| plan.iter().map(&sum).sum::<Option<Magnitudes>>();
            let all = plans(0..layers.len(), n, blocks);
            prop_assert_eq!(total(&plan), all.iter().filter_map(total).min());
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
        for (more_is_better, sign) in [(false, 1), (true, -1)] {
            let found = pool.install(|| bootstrap(&flat, num_states, more_is_better, resamples, seed));
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
    let found = bootstrap(&values.concat(), num_states, false, 100, 3).unwrap();
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
        assert!(bootstrap(values, 3, false, 10, 0).is_err());
    }
    assert!(bootstrap(&[0.5], 1, false, 10, 0).is_err());
    assert_eq!(bootstrap(&[0.5], 2, false, 10, 0), Ok(vec![]));
    assert_eq!(bootstrap(&[0.0; 3], 3, false, 0, 0), Ok(vec![vec![0, 0]]));
    assert_eq!(bootstrap(&[0.0; 3], 3, true, 7, 0), Ok(vec![vec![7, 0]]));
}

#[test]
fn costs_that_cannot_be_compared_are_refused() {
    let mut matrix = vec![0.5; 16];
    // Below the diagonal, and on it, nothing is read.
    (matrix[0], matrix[4]) = (f64::INFINITY, f64::INFINITY);
    assert!(Costs::of_blocks(&matrix, 4).is_ok());
    assert!(Costs::of_blocks(&matrix, 3).is_err());
    assert!(Costs::of_blocks(&[0.0], 1).is_err());
    matrix[6] = f64::NEG_INFINITY;
    let refused = Costs::of_blocks(&matrix, 4).unwrap_err().to_string();
    assert!(refused.contains("block [1, 2) is -inf"), "{refused}");
    let refused = Costs::of_layers(&[0.0, f64::INFINITY]).unwrap_err();
    assert!(refused.to_string().contains("block [1, 2) is inf"));
    assert!(Costs::of_layers(&[]).is_err());
    let unknown = Costs::of_layers(&[f64::NAN, 1.0, f64::NAN]).unwrap();
    assert_eq!(unknown.best_starts(1, 9), Ok(vec![1]));
    let refused = unknown.best_starts(2, 1).unwrap_err();
    assert_eq!(refused, Error::NothingMeasured { n: 2 });
    assert!(refused.to_string().contains("NaN"));
}

#[test]
fn costs_are_as_exact_as_float64_says() {
    let next = 0.1_f64.next_up();
    let costs = Costs::of_layers(&[next, 0.1, 0.1, 1e-300, 5e-324, 0.0]).unwrap();
    assert_eq!(costs.best_starts(1, 9), Ok(vec![5, 4, 3, 1, 2, 0]));
    // In float64, 0.1 + 0.2 is more than 0.3.
    let costs = Costs::of_layers(&[0.3, 0.0, 0.1, 0.2]).unwrap();
    assert_eq!(costs.best_starts(2, 9), Ok(vec![1, 0, 2]));
    let greatest = Costs::of_layers(&[f64::MAX; 40]).unwrap();
    assert_eq!(greatest.best_starts(39, 2), Ok(vec![0, 1]));
}
