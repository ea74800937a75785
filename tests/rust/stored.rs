//! Stored sums: they come back to the bit, and bytes that no samples give are refused.

use proptest::prelude::*;
use shallower_core::{Accumulator, Cka, Error, Metric, Order, States, Sums};

const STATES: usize = 3;
const WIDTH: usize = 2;

/// Sums of samples, of which some are rejected and some are of one sequence.
fn sums() -> impl Strategy<Value = Sums> {
    (0_usize..20, 1_usize..5).prop_flat_map(|(samples, metrics)| {
        let row = prop_oneof![1 => Just(0.0_f32), 20 => -9.0_f32..9.0];
        let data = prop::collection::vec(row, samples * STATES * WIDTH);
        let sequences = prop::collection::vec(0_i64..3, samples);
        (data, sequences).prop_map(move |(data, sequences)| {
            let states = States::new(&data, samples, STATES, WIDTH, Order::SampleFirst).unwrap();
            let mut accumulator = Accumulator::new(STATES, &Metric::ALL[..metrics]).unwrap();
            accumulator
                .update_sequences(&states, &sequences, None)
                .unwrap();
            accumulator.into_sums()
        })
    })
}

fn cka() -> impl Strategy<Value = Cka> {
    prop::collection::vec(-1.0_f32..1.0, 4 * STATES * WIDTH).prop_map(|data| {
        let states = States::new(&data, 4, STATES, WIDTH, Order::SampleFirst).unwrap();
        let mut cka = Cka::new(STATES, 8).unwrap();
        cka.update(&states).unwrap();
        cka
    })
}

/// Something done to stored bytes.
#[derive(Debug, Clone)]
enum Damage {
    Word(prop::sample::Index, u64),
    Bit(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    More(Vec<u8>),
}

impl Damage {
    fn strike(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Word(place, to) => {
                let (words, _) = bytes.as_chunks_mut();
                if !words.is_empty() {
                    words[place.index(words.len())] = to.to_le_bytes();
                }
            }
            Self::Bit(place, bit) => {
                let place = place.index(bytes.len());
                bytes[place] ^= 1 << bit;
            }
            Self::Cut(place) => bytes.truncate(place.index(bytes.len())),
            Self::More(more) => bytes.extend(more),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    let any_word = prop_oneof![
        any::<u64>(),
        0_u64..9,
        Just(u64::MAX),
        Just(1 << 31),
        Just(1 << 63)
    ];
    prop_oneof![
        (any::<prop::sample::Index>(), any_word).prop_map(|(place, to)| Damage::Word(place, to)),
        (any::<prop::sample::Index>(), 0_u8..8).prop_map(|(place, bit)| Damage::Bit(place, bit)),
        any::<prop::sample::Index>().prop_map(Damage::Cut),
        prop::collection::vec(any::<u8>(), 1..20).prop_map(Damage::More),
    ]
}

/// What is made of sums is as of samples, however they came about.
fn are_possible(sums: &Sums) {
    if sums.count() == 0 {
        return;
    }
    let norms = sums.norms().unwrap();
    assert!(norms.iter().all(|norm| (1e-75..=1e75).contains(norm)));
    for metric in sums.metrics() {
        let mean = sums.mean(metric).unwrap();
        let least = if metric.can_be_negative() { -1.0 } else { 0.0 };
        assert!(mean.iter().all(|d| (least..=metric.range()).contains(d)));
        let variance = sums.variance(metric).unwrap();
        let possible = |v: &f64| *v >= 0.0 && v.is_finite();
        let one = sums.lengths().sequences() == 1;
        assert!(variance.iter().all(|v| possible(v) || one && v.is_nan()));
        if let Ok(costs) = sums.costs(metric) {
            costs.best_starts(1, 1).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(crate::config(64))]

    #[test]
    fn sums_come_back(sums in sums()) {
        prop_assert_eq!(Sums::from_bytes(&sums.to_bytes()), Ok(sums));
    }

    #[test]
    fn damaged_sums_are_refused_or_possible(
        sums in sums(),
        damage in prop::collection::vec(damage(), 1..4),
        other in sums(),
    ) {
        let mut bytes = sums.to_bytes();
        for damage in &damage {
            if !bytes.is_empty() {
                damage.strike(&mut bytes);
            }
        }
        if let Ok(mut back) = Sums::from_bytes(&bytes) {
            are_possible(&back);
            prop_assert_eq!(back.to_bytes(), bytes);
            if back.merge(&other).is_ok() {
                are_possible(&back);
            }
        }
    }

    #[test]
    fn cka_comes_back_or_is_refused(
        cka in cka(),
        damage in prop::collection::vec(damage(), 1..4),
    ) {
        let mut bytes = cka.to_bytes();
        prop_assert_eq!(Cka::from_bytes(&bytes), Ok(cka));
        for damage in &damage {
            if !bytes.is_empty() {
                damage.strike(&mut bytes);
            }
        }
        if let Ok(back) = Cka::from_bytes(&bytes) {
            if back.batches() > 0 {
                let possible = |v: &f64| v.is_nan() || (-1.0..=1.0).contains(v);
                prop_assert!(back.values().unwrap().iter().all(possible));
            }
            prop_assert_eq!(back.to_bytes(), bytes);
        }
    }

    #[test]
    fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Sums::from_bytes(&bytes).is_err());
        prop_assert!(Cka::from_bytes(&bytes).is_err());
    }
}

#[test]
fn what_is_wrong_is_said() {
    let sums = Sums::new(STATES, &[Metric::Angular]).unwrap();
    let bytes = sums.to_bytes();
    let struck = |word: usize, to: u64| {
        let mut bytes = bytes.clone();
        bytes[8 * word..][..8].copy_from_slice(&to.to_le_bytes());
        Sums::from_bytes(&bytes).unwrap_err().to_string()
    };
    assert!(struck(0, 7).contains("not stored sums"));
    assert!(struck(1, 1).contains("2 to 4096 states, got 1"));
    assert!(struck(1, u64::MAX).contains("2 to 4096 states"));
    assert!(struck(1, 4096).contains("truncated or damaged"));
    assert!(struck(2, 1 << 32).contains("at most 2147483648 samples"));
    assert!(struck(3, 1).contains("truncated or damaged"));
    assert!(struck(4, 1).contains("lengths of the sequences"));
    assert!(struck(6, u64::MAX).contains("at most 2147483648 samples"));
    assert!(struck(7, 0).contains("at least one"));
    assert!(struck(7, u64::MAX).contains("unknown metric"));
    assert!(struck(8, 7).contains("unknown metric"));
    assert!(struck(10, 1).contains("norms"));
    assert!(struck(10 + 67, 1 << 63).contains("norms"));
    let pairs = 10 + STATES * 68;
    assert!(struck(pairs, 1).contains("metric angular are damaged"));
    let of_cka = Cka::new(STATES, 8).unwrap().to_bytes();
    let mixed = Sums::from_bytes(&of_cka);
    assert_eq!(mixed, Err(Error::StoredMark("sums")));
    assert!(Cka::from_bytes(&bytes).is_err());
    for (word, to) in [
        (1, 4),
        (2, 3),
        (2, 1025),
        (3, u64::MAX),
        (4, 1),
        (4, u64::MAX),
    ] {
        let mut bytes = of_cka.clone();
        bytes[8 * word..][..8].copy_from_slice(&u64::to_le_bytes(to));
        assert!(Cka::from_bytes(&bytes).is_err(), "{word}");
    }
}
