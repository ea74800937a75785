//! Models at random, and what is left of them: a reader must survive every file.

use std::io::Cursor;

use proptest::prelude::*;
use shallower_core::gguf::Gguf;

use super::model::{Model, V, cut, cut_experts, hostile, read, u32s};

fn models() -> impl Strategy<Value = Model> {
    let sizes = (1_u64..40, 1_u64..4, any::<u8>());
    (
        2_u32..7,
        0_u32..13,
        prop::collection::vec(sizes, 8),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(blocks, log, sizes, dense, experts)| {
            let mut model = Model::new(blocks).aligned(1 << log);
            for (index, (row, rows, byte)) in sizes.iter().enumerate() {
                let name = match index {
                    0 => "other".into(),
                    _ => format!("blk.{}.t{index}", index as u32 % blocks),
                };
                let bytes = vec![*byte; (row * rows * 2) as usize];
                model.tensors.push((name, (30, vec![*row, *rows], bytes)));
            }
            let values: Vec<u32> = (10..10 + blocks).collect();
            model = model.with("llama.attention.head_count_kv", u32s(&values));
            if experts {
                model = model.with("llama.expert_count", V::U32(3));
                for block in 0..blocks {
                    let name = format!("blk.{block}.ffn_up_exps.weight");
                    model
                        .tensors
                        .push((name, (1, vec![5, 2, 3], vec![block as u8; 60])));
                }
            }
            if dense {
                model = model.with("llama.leading_dense_block_count", V::U32(blocks / 2));
            }
            model
        })
}

/// A non-empty proper subset of `0 .. count`, from random bits.
fn subset(count: usize, bits: usize) -> Vec<usize> {
    let bits = 1 + bits % ((1 << count) - 2);
    (0..count).filter(|index| bits >> index & 1 == 1).collect()
}

/// Asserts that a reader neither panics on a file, nor hangs, nor writes one that it cannot read.
fn survives(file: &[u8]) {
    let mut source = Cursor::new(file);
    let Ok(read) = Gguf::read(&mut source) else {
        return;
    };
    for survivor in 0..read.num_layers().min(3) {
        if let Ok(cut) = cut(file, &[survivor]) {
            assert_eq!(self::read(&cut).unwrap().num_layers(), 1);
            assert!(cut.len() <= file.len() + (1 << 14));
        }
    }
    let layers: Vec<usize> = (0..read.num_layers()).collect();
    let kept = read
        .expert_layers()
        .into_iter()
        .map(|layer| (layer as u64, vec![1]));
    if let Ok(cut) = cut_experts(file, &layers, (3, &kept.collect())) {
        assert_eq!(self::read(&cut).unwrap().num_layers(), layers.len());
        assert!(cut.len() <= file.len() + (1 << 14));
    }
}

proptest! {
    #[test]
    fn cutting_twice_is_cutting_once(
        model in models(), first in any::<usize>(), second in any::<usize>(),
    ) {
        let file = model.bytes();
        let blocks = read(&file).unwrap().num_layers();
        let outer = subset(blocks, first);
        let once = cut(&file, &outer).unwrap();
        prop_assert_eq!(read(&once).unwrap().num_layers(), outer.len());
        if outer.len() > 1 {
            let inner = subset(outer.len(), second);
            let both: Vec<usize> = inner.iter().map(|&index| outer[index]).collect();
            prop_assert!(cut(&once, &inner).unwrap() == cut(&file, &both).unwrap());
        }
    }

    #[test]
    fn damaged_files_are_survived(
        model in models(),
        strikes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut file = model.bytes();
        let header = file.len().min(600);
        for (place, byte) in strikes {
            file[place.index(header)] = byte;
        }
        survives(&file);
    }

    #[test]
    fn files_with_odd_numbers_are_survived(
        model in models(),
        strikes in prop::collection::vec(
            (
                any::<prop::sample::Index>(),
                prop::sample::select(vec![
                    0, 1, 8, 9, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 61, 1 << 63, u64::MAX,
                    u64::MAX - 7, i64::MAX as u64, u64::MAX / 8,
                ]),
                1_usize..9,
            ),
            1..4,
        ),
    ) {
        let mut file = model.bytes();
        let header = file.len().min(900) - 8;
        for (place, number, width) in strikes {
            let at = place.index(header);
            file[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
        }
        survives(&file);
    }

    #[test]
    fn spliced_files_are_survived(
        model in models(),
        from in any::<prop::sample::Index>(),
        to in any::<prop::sample::Index>(),
        more in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut file = model.bytes();
        let (a, b) = (from.index(file.len()), to.index(file.len()));
        file.splice(a.min(b)..a.max(b), more);
        survives(&file);
        file.truncate(a);
        survives(&file);
    }

    #[test]
    fn random_bytes_are_survived(
        entries in 0_u64..4, tensors in 0_u64..4,
        rest in prop::collection::vec(prop_oneof![3 => 0_u8..14, 1 => any::<u8>()], 0..400),
    ) {
        survives(&hostile(entries, tensors, &rest));
        survives(&rest);
    }
}
