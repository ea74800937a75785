//! Sums over the tokens of experts, against their slow twin, in other orders, and stored.

use proptest::prelude::*;
use shallower_core::{Error, ExpertSums, Moment};

const LAYERS: usize = 2;
const EXPERTS: usize = 3;
const VALUES: usize = 2;
const CELLS: usize = LAYERS * EXPERTS;

/// A text: of every expert of every layer its tokens, and sums of two values over them.
type Text = Vec<(u64, [f64; VALUES])>;

fn text() -> impl Strategy<Value = Text> {
    let value = prop_oneof![4 => -9.0..9.0, 1 => -1e9..1e9, 1 => Just(1e-30)];
    let values = [value.clone(), value];
    prop::collection::vec((0_u64..5, values), CELLS)
}

fn add(sums: &mut ExpertSums, text: &Text) -> u64 {
    let mut left_out = 0;
    for (layer, cells) in text.chunks(EXPERTS).enumerate() {
        let counts: Vec<u64> = cells.iter().map(|(count, _)| *count).collect();
        let values: Vec<f64> = cells.iter().flat_map(|(_, values)| *values).collect();
        left_out += sums.update(layer, &counts, &values).unwrap();
    }
    left_out
}

fn sums<'a>(texts: impl IntoIterator<Item = &'a Text>) -> ExpertSums {
    let mut sums = ExpertSums::new(LAYERS, EXPERTS, VALUES, true).unwrap();
    for text in texts {
        assert_eq!(add(&mut sums, text), 0);
    }
    sums
}

proptest! {
    #[test]
    fn sums_are_those_of_all_texts(texts in prop::collection::vec(text(), 0..9)) {
        let sums = sums(&texts);
        prop_assert_eq!(sums.texts(), &[texts.len() as u64; LAYERS]);
        for cell in 0..CELLS {
            let counts = texts.iter().map(|text| text[cell].0);
            prop_assert_eq!(sums.counts()[cell], counts.clone().sum::<u64>());
            let squares = counts.map(|count| count * count).sum::<u64>();
            prop_assert_eq!(sums.count_squares()[cell], squares as f64);
            for value in 0..VALUES {
                let of = |text: &Text| (text[cell].0 as f64, text[cell].1[value]);
                let some = || texts.iter().map(of).filter(|(count, _)| *count > 0.0);
                let wanted: [(Moment, f64); 3] = [
                    (Moment::Sum, some().map(|(_, x)| x).sum()),
                    (Moment::Square, some().map(|(_, x)| x * x).sum()),
                    (Moment::Product, some().map(|(count, x)| count * x).sum()),
                ];
                for (moment, wanted) in wanted {
                    let found = sums.moment(moment)[cell * VALUES + value];
                    let size: f64 = some().map(|(count, x)| x.abs() * (count + x.abs())).sum();
                    prop_assert!((found - wanted).abs() <= 1e-12 * size, "{found} {wanted}");
                }
            }
        }
    }

    #[test]
    fn any_order_and_any_parts_give_the_same(
        texts in prop::collection::vec(text(), 1..9),
        cut in any::<prop::sample::Index>(),
    ) {
        let whole = sums(&texts);
        prop_assert_eq!(&sums(texts.iter().rev()), &whole);
        let (head, tail) = texts.split_at(cut.index(texts.len()));
        let mut merged = sums(tail);
        merged.merge(&sums(head)).unwrap();
        prop_assert_eq!(merged.to_bytes(), whole.to_bytes());
        prop_assert_eq!(ExpertSums::from_bytes(&merged.to_bytes()), Ok(whole));
    }

    #[test]
    fn a_value_is_cleared_as_if_it_had_been_zero(
        texts in prop::collection::vec(text(), 0..4),
        value in 0..VALUES,
    ) {
        let mut cleared = sums(&texts);
        cleared.clear(value);
        let mut zeroed = texts.clone();
        zeroed.iter_mut().flatten().for_each(|(_, values)| values[value] = 0.0);
        prop_assert_eq!(&cleared, &sums(&zeroed));
        cleared.clear(VALUES);
        prop_assert_eq!(cleared, sums(&zeroed));
    }

    #[test]
    fn damaged_bytes_are_refused_or_possible(
        texts in prop::collection::vec(text(), 0..4),
        word in any::<prop::sample::Index>(),
        to in prop_oneof![any::<u64>(), 0_u64..9, Just(u64::MAX), Just(1 << 63), Just(1 << 31)],
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = sums(&texts).to_bytes();
        let place = 8 * word.index(bytes.len() / 8);
        bytes[place..place + 8].copy_from_slice(&to.to_le_bytes());
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(back) = ExpertSums::from_bytes(&bytes) {
            prop_assert_eq!(back.to_bytes(), bytes);
            for moment in [Moment::Sum, Moment::Square, Moment::Product] {
                prop_assert!(back.moment(moment).iter().all(|value| value.is_finite()));
            }
        }
    }

    #[test]
    fn without_errors_the_sums_are_the_same(texts in prop::collection::vec(text(), 0..5)) {
        let with = sums(&texts);
        let mut without = ExpertSums::new(LAYERS, EXPERTS, VALUES, false).unwrap();
        for text in &texts {
            add(&mut without, text);
        }
        prop_assert_eq!(without.moment(Moment::Sum), with.moment(Moment::Sum));
        prop_assert_eq!(without.counts(), with.counts());
        prop_assert!(without.moment(Moment::Square).iter().all(|square| square.is_nan()));
        let stored = without.to_bytes();
        prop_assert!(stored.len() < with.to_bytes().len());
        prop_assert_eq!(ExpertSums::from_bytes(&stored), Ok(without));
    }

    #[test]
    fn any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(ExpertSums::from_bytes(&bytes).is_err());
    }
}

#[test]
fn what_is_not_finite_is_left_out_and_counted() {
    let mut sums = ExpertSums::new(1, EXPERTS, 1, true).unwrap();
    let left_out = sums.update(0, &[1, 2, 0], &[f64::NAN, 3.0, f64::INFINITY]);
    assert_eq!(left_out, Ok(1));
    assert_eq!(sums.update(0, &[0, 1, 1], &[0.0, 1e200, 4.0]), Ok(1));
    assert_eq!(sums.counts(), [0, 2, 1]);
    assert_eq!(sums.moment(Moment::Sum), [0.0, 3.0, 4.0]);
    assert_eq!(sums.texts(), [2]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut sums = ExpertSums::new(LAYERS, EXPERTS, VALUES, true).unwrap();
    for (layer, counts, values) in [(2, 3, 6), (0, 4, 8), (0, 3, 5)] {
        let refused = sums.update(layer, &vec![0; counts], &vec![0.0; values]);
        assert!(matches!(refused, Err(Error::ExpertUpdate { .. })));
    }
    let many = sums.update(0, &[1 << 32, 0, 0], &[0.0; 6]);
    assert_eq!(many, Err(Error::TooManySamples));
    assert_eq!(
        sums,
        ExpertSums::new(LAYERS, EXPERTS, VALUES, true).unwrap()
    );
    for sizes in [(0, 3, 1), (1, 0, 1), (1, 3, 0), (1, 3, 99), (4096, 4096, 1)] {
        let refused = ExpertSums::new(sizes.0, sizes.1, sizes.2, false);
        assert!(matches!(refused, Err(Error::ExpertSizes { .. })));
    }
    let other = ExpertSums::new(LAYERS, 4, VALUES, true).unwrap();
    assert!(matches!(sums.merge(&other), Err(Error::Unmergeable { .. })));
    let other = ExpertSums::new(LAYERS, EXPERTS, VALUES, false).unwrap();
    assert!(matches!(sums.merge(&other), Err(Error::Unmergeable { .. })));
}
