//! Sums over sequences: the textbook's variance, and the same bits however they are cut.

use proptest::prelude::*;
use shallower_core::{Accumulator, Error, Lengths, MAX_SEQUENCE, Metric, Order, States, Sums};

const STATES: usize = 3;
const PAIRS: usize = 3;
const WIDTH: usize = 2;
const METRICS: [Metric; 4] = Metric::ALL;

/// A row for each: 0 is the zero vector, others point anywhere.
fn states(rows: &[u8]) -> Vec<f32> {
    rows.iter()
        .flat_map(|&row| {
            let angle = f32::from(row) * 0.7;
            let norm = f32::from(u8::from(row > 0)) * (1.0 + f32::from(row) / 9.0);
            [norm * angle.cos(), norm * angle.sin()]
        })
        .collect()
}

fn view(data: &[f32]) -> States<'_, f32> {
    let samples = data.len() / (STATES * WIDTH);
    States::new(data, samples, STATES, WIDTH, Order::SampleFirst).unwrap()
}

type Kept = [Vec<f32>; 4];

/// Sums of the samples cut at `cuts`, what was kept of them, and the samples left out.
fn accumulate(
    data: &[f32],
    sequences: &[i64],
    cuts: &[usize],
    threads: usize,
) -> (Sums, Kept, Vec<usize>) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    let pool = pool.build().unwrap();
    let mut accumulator = Accumulator::new(STATES, &METRICS).unwrap();
    let (mut kept, mut rejected) = (Kept::default(), Vec::new());
    for range in cuts.windows(2) {
        let part = &data[range[0] * STATES * WIDTH..range[1] * STATES * WIDTH];
        let numbers = &sequences[range[0]..range[1]];
        let mut now = Kept::default();
        let update = || accumulator.update_sequences(&view(part), numbers, Some(&mut now));
        let (rejections, goes_on) = pool.install(update).unwrap();
        rejected.extend(rejections.iter().map(|r| r.sample + range[0]));
        for (kept, now) in kept.iter_mut().zip(now) {
            kept.truncate(kept.len() - if goes_on { PAIRS } else { 0 });
            kept.extend(now);
        }
    }
    (accumulator.into_sums(), kept, rejected)
}

/// Rows of a few samples, the sequence of each, and where to cut them.
fn samples() -> impl Strategy<Value = (Vec<u8>, Vec<i64>, Vec<usize>)> {
    (1_usize..40).prop_flat_map(|samples| {
        let row = prop_oneof![1 => Just(0_u8), 40 => 1_u8..];
        let rows = prop::collection::vec(row, samples * STATES);
        let steps = prop::collection::vec(0_i64..3, samples);
        let cuts = prop::collection::vec(0..=samples, 0..6);
        (rows, steps, cuts).prop_map(move |(rows, steps, mut cuts)| {
            let numbers = steps.iter().scan(-3, |number, step| {
                *number += step / 2;
                Some(*number)
            });
            cuts.extend([0, samples]);
            cuts.sort_unstable();
            (rows, numbers.collect(), cuts)
        })
    })
}

/// The variance between sequences in float64, from the values of single samples.
fn textbook(values: &[f64], sequences: &[i64]) -> f64 {
    let mut sums: Vec<(i64, f64, f64)> = Vec::new();
    for (&value, &number) in values.iter().zip(sequences) {
        match sums.last_mut() {
            Some(last) if last.0 == number => (last.1, last.2) = (last.1 + value, last.2 + 1.0),
            _ => sums.push((number, value, 1.0)),
        }
    }
    let samples = values.len() as f64;
    let mean = values.iter().sum::<f64>() / samples;
    let count = sums.len() as f64;
    let deviation =
        |&(_, sum, length): &(i64, f64, f64)| ((sum - mean * length) * count / samples).powi(2);
    sums.iter().map(deviation).sum::<f64>() / (count - 1.0)
}

proptest! {
    #[test]
    fn cuts_threads_and_shards_do_not_matter((rows, sequences, cuts) in samples(), threads in 1_usize..4) {
        let (data, samples) = (states(&rows), sequences.len());
        let whole = accumulate(&data, &sequences, &[0, samples], 1);
        prop_assert_eq!(&accumulate(&data, &sequences, &cuts, threads), &whole);

        let mut merged = Sums::new(STATES, &METRICS).unwrap();
        let starts = (0..samples).filter(|&i| i == 0 || sequences[i] != sequences[i - 1]);
        let mut shards: Vec<usize> = starts.step_by(2).collect();
        shards.push(samples);
        for range in shards.windows(2).rev() {
            let part = &data[range[0] * STATES * WIDTH..range[1] * STATES * WIDTH];
            let part = accumulate(part, &sequences[range[0]..range[1]], &[0, range[1] - range[0]], 2);
            merged.merge(&part.0).unwrap();
        }
        prop_assert_eq!(&merged, &whole.0);
    }

    #[test]
    fn the_variance_is_the_textbooks((rows, sequences, cuts) in samples()) {
        let data = states(&rows);
        let (accumulator, kept, rejected) = accumulate(&data, &sequences, &cuts, 2);
        let accepted: Vec<usize> = (0..sequences.len()).filter(|i| !rejected.contains(i)).collect();
        let numbers: Vec<i64> = accepted.iter().map(|&i| sequences[i]).collect();
        prop_assert_eq!(accumulator.count() as usize, accepted.len());
        let runs = numbers.chunk_by(|a, b| a == b);
        let lengths: Vec<u64> = runs.map(|run| run.len() as u64).collect();
        prop_assert_eq!(accumulator.lengths().sequences() as usize, lengths.len());
        prop_assume!(!accepted.is_empty());
        for (place, metric) in METRICS.into_iter().enumerate() {
            let one = |&i: &usize| {
                let mut alone = Accumulator::new(STATES, &[metric]).unwrap();
                alone.update(&view(&data[i * STATES * WIDTH..][..STATES * WIDTH])).unwrap();
                alone.sums().mean(metric).unwrap()
            };
            let values: Vec<Vec<f64>> = accepted.iter().map(one).collect();
            let (mean, variance) = (accumulator.mean(metric).unwrap(), accumulator.variance(metric).unwrap());
            let mut pair = 0;
            for first in 0..STATES {
                for second in first + 1..STATES {
                    let entry = first * STATES + second;
                    let of_pair: Vec<f64> = values.iter().map(|v| v[entry]).collect();
                    let expected = of_pair.iter().sum::<f64>() / of_pair.len() as f64;
                    prop_assert!((mean[entry] - expected).abs() <= 1e-13 * expected.abs().max(1.0));
                    let mut rest = of_pair.as_slice();
                    for (row, &length) in lengths.iter().enumerate() {
                        let (here, others) = rest.split_at(length as usize);
                        let sum = here.iter().sum::<f64>();
                        prop_assert!((f64::from(kept[place][row * PAIRS + pair]) - sum).abs() <= 1e-6 * sum.abs().max(1e-6));
                        rest = others;
                    }
                    if lengths.len() > 1 {
                        let expected = textbook(&of_pair, &numbers);
                        let error = (variance[entry] - expected).abs();
                        prop_assert!(error <= 1e-11 * expected.max(1.0), "{} {}", variance[entry], expected);
                    } else {
                        prop_assert!(variance[entry].is_nan());
                    }
                    pair += 1;
                }
            }
        }
    }

    #[test]
    fn sequences_of_one_sample_are_samples((rows, _, cuts) in samples(), threads in 1_usize..4) {
        let data = states(&rows);
        let samples = rows.len() / STATES;
        let numbers: Vec<i64> = (0..).take(samples).map(|number: i64| -number).collect();
        let mut plain = Accumulator::new(STATES, &METRICS).unwrap();
        plain.update(&view(&data)).unwrap();
        let clustered = accumulate(&data, &numbers, &cuts, threads).0;
        let plain = plain.into_sums();
        prop_assert_eq!(&clustered, &plain);
        if plain.count() > 0 {
            for metric in METRICS {
                let bits = |sums: &Sums| {
                    let values = sums.variance(metric).unwrap();
                    values.into_iter().map(f64::to_bits).collect::<Vec<_>>()
                };
                prop_assert_eq!(bits(&clustered), bits(&plain));
            }
        }
    }
}

#[test]
fn a_sequence_that_comes_back_after_another_is_another() {
    let data = states(&[9; 8 * STATES]);
    for threads in 1..4 {
        for cut in 0..=8 {
            let numbers = [1, 2, 2, 1, 1, 2, 1, 1];
            let (sums, kept, _) = accumulate(&data, &numbers, &[0, cut, 8], threads);
            let expected = Lengths {
                alone: 2,
                several: 3,
                samples: 6,
                squares: 12,
            };
            assert_eq!(sums.lengths(), expected);
            assert_eq!(kept[0].len(), 5 * PAIRS);
        }
    }
}

#[test]
fn a_merge_and_an_update_without_sequences_end_a_sequence() {
    let data = states(&[1, 2, 3]);
    let of_one = |sums: &mut Accumulator| sums.update_sequences(&view(&data), &[7], None).unwrap();
    let ends: [fn(&mut Accumulator, &[f32]); 2] = [
        |sums, _| {
            sums.merge(&Sums::new(STATES, &METRICS).unwrap()).unwrap();
        },
        |sums, data| drop(sums.update(&view(data)).unwrap()),
    ];
    for end in ends {
        let mut sums = Accumulator::new(STATES, &METRICS).unwrap();
        of_one(&mut sums);
        end(&mut sums, &data);
        assert_eq!(of_one(&mut sums), (Vec::new(), false));
        assert_eq!(sums.sums().lengths().alone, sums.sums().count());
        // An empty batch ends nothing.
        sums.update_sequences(&view(&[]), &[], None).unwrap();
        assert_eq!(of_one(&mut sums), (Vec::new(), true));
        assert_eq!(sums.sums().lengths().samples, 2);
    }
}

#[test]
fn the_longest_sequences_fit_and_longer_ones_are_refused() {
    // Opposite states: the greatest distance, 1.
    let length = MAX_SEQUENCE as usize;
    let data = [1.0_f32, -1.0].repeat(length);
    let all = |samples: usize| {
        States::new(&data[..2 * samples], samples, 2, 1, Order::SampleFirst).unwrap()
    };
    let mut sums = Accumulator::new(2, &METRICS).unwrap();
    sums.update_sequences(&all(length), &vec![5; length], None)
        .unwrap();
    let full = sums.clone();
    let refused = sums.update_sequences(&all(1), &[5], None);
    assert_eq!(refused, Err(Error::SequenceTooLong(5)));
    assert_eq!(sums.sums(), full.sums());
    sums.update_sequences(&all(1), &[6], None).unwrap();
    let same = [1.0_f32, 1.0].repeat(length);
    let same = States::new(&same, length, 2, 1, Order::SampleFirst).unwrap();
    sums.update_sequences(&same, &vec![7; length], None)
        .unwrap();

    // Two sequences of n and one sample: sums n, 1 and 0.
    let n = length as f64;
    let (samples, mean) = (2.0 * n + 1.0, (n + 1.0) / (2.0 * n + 1.0));
    let squares = (n - mean * n).powi(2) + (1.0 - mean).powi(2) + (mean * n).powi(2);
    let expected = squares / 2.0 * (3.0 / samples).powi(2);
    let variance = sums.sums().variance(Metric::Angular).unwrap()[1];
    assert!(
        (variance - expected).abs() < 1e-15 * expected.max(1.0),
        "{variance} {expected}"
    );

    let mismatched = sums.update_sequences(&all(2), &[1], None);
    assert_eq!(
        mismatched,
        Err(Error::Sequences {
            samples: 2,
            sequences: 1
        })
    );
}
