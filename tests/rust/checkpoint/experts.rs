//! Experts cut out of layers against a slow twin that takes every tensor apart.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;

use proptest::prelude::*;
use shallower_core::checkpoint::{Cut, Error, Experts, Job};
use tempfile::tempdir;

use super::files::{DTYPES, Given, open, read_checkpoint, survivors, write, write_checkpoint};

/// The tensors of a layer: single experts, stacks (with the axes before and after the experts'
/// and the rows of each), and what belongs to no expert.
#[derive(Debug, Clone)]
struct Layer {
    single: Vec<(usize, u64)>,
    stacks: Vec<(usize, usize, u64, u64)>,
    other: u64,
}

#[derive(Debug, Clone)]
struct Model {
    num_experts: u64,
    layers: Vec<Layer>,
}

fn models() -> impl Strategy<Value = Model> {
    let stack = (0..DTYPES.len(), 0_usize..3, 1_u64..4, 0_u64..4);
    let layer = (
        prop::collection::vec((0..DTYPES.len(), 0_u64..5), 0..3),
        prop::collection::vec(stack, 0..3),
        0_u64..9,
    );
    let layer = layer.prop_map(|(single, stacks, other)| Layer {
        single,
        stacks,
        other,
    });
    (2_u64..6, prop::collection::vec(layer, 2..5)).prop_map(|(num_experts, layers)| Model {
        num_experts,
        layers,
    })
}

/// The parts of every tensor, a part an expert, or one part of a tensor of no expert.
type Parts = Vec<Vec<u8>>;

impl Model {
    /// Its tensors in the order of a file: name, dtype, axes before and after the experts', parts.
    fn tensors(&self) -> Vec<(String, &'static str, Vec<u64>, Parts)> {
        let mut seed = 0_u8;
        let mut bytes = |len: u64| -> Vec<u8> {
            seed = seed.wrapping_add(37);
            (0..len).map(|i| seed.wrapping_add(i as u8)).collect()
        };
        let mut tensors = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let head = format!("model.layers.{i}");
            for (n, &(dtype, size)) in layer.single.iter().enumerate() {
                let (dtype, bits) = DTYPES[dtype];
                for j in 0..self.num_experts {
                    let name = format!("{head}.mlp.experts.{j}.w{n}.weight");
                    tensors.push((name, dtype, vec![size, 4], vec![bytes(size * 4 * bits / 8)]));
                }
            }
            for (n, &(dtype, ones, rows, columns)) in layer.stacks.iter().enumerate() {
                let (dtype, bits) = DTYPES[dtype];
                let mut shape = vec![1; ones];
                shape.extend([rows * self.num_experts, columns, 4]);
                let part = rows * columns * 4 * bits / 8;
                let parts = (0..self.num_experts).map(|_| bytes(part)).collect();
                tensors.push((format!("{head}.mlp.stack{n}"), dtype, shape, parts));
            }
            let other = vec![bytes(layer.other)];
            tensors.push((
                format!("{head}.shared_experts.0.w"),
                "U8",
                vec![layer.other],
                other,
            ));
        }
        tensors
    }

    fn stacks(&self, mixtures: &BTreeSet<u64>) -> BTreeSet<String> {
        let all = self.layers.iter().enumerate();
        all.filter(|(i, _)| mixtures.contains(&(*i as u64)))
            .flat_map(|(i, layer)| {
                (0..layer.stacks.len()).map(move |n| format!("model.layers.{i}.mlp.stack{n}"))
            })
            .collect()
    }
}

proptest! {
    #![proptest_config(crate::config(128))]

    #[test]
    fn a_cut_of_experts_equals_the_slow_twin(
        model in models(), mask in any::<u64>(), mixtures in any::<u8>(),
        chosen in prop::collection::vec(any::<u64>(), 5), size in 1_u64..400, split in 1_usize..4,
        stop in 0_usize..9,
    ) {
        let (source, out, again) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        let tensors = model.tensors();
        let given: Vec<Given> = tensors.iter().map(|(name, dtype, shape, parts)| {
            (name.clone(), *dtype, shape.clone(), parts.concat())
        }).collect();
        let shards: Vec<_> = given.chunks(given.len().div_ceil(split)).map(<[Given]>::to_vec).collect();
        write_checkpoint(source.path(), &shards);
        let num_layers = model.layers.len() as u64;
        let layers = survivors(num_layers, mask);
        let mixtures: BTreeSet<u64> = (0..num_layers).filter(|i| mixtures >> i & 1 == 1).collect();
        let kept: BTreeMap<u64, Vec<u64>> = mixtures.iter()
            .map(|&layer| (layer, survivors(model.num_experts, chosen[layer as usize]))).collect();
        let mut wanted = BTreeMap::new();
        for (name, _, shape, parts) in &tensors {
            let words: Vec<&str> = name.split('.').collect();
            let layer: u64 = words[2].parse().unwrap();
            let Some(place) = layers.iter().position(|&one| one == layer) else { continue };
            let mut new: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            new[2] = place.to_string();
            let mut shape = shape.clone();
            let mut parts = parts.clone();
            if let Some(kept) = kept.get(&layer) {
                if words[4] == "experts" {
                    let Some(place) = kept.iter().position(|one| one.to_string() == words[5]) else { continue };
                    new[5] = place.to_string();
                } else if parts.len() > 1 {
                    parts = kept.iter().map(|&one| parts[one as usize].clone()).collect();
                    let axis = shape.len() - 3;
                    shape[axis] = shape[axis] / model.num_experts * kept.len() as u64;
                }
            }
            let shape: Vec<_> = shape.into_iter().map(|axis| axis as usize).collect();
            wanted.insert(new.join("."), (shape, parts.concat()));
        }
        let experts = Experts::new(model.num_experts, kept, model.stacks(&mixtures)).unwrap();
        let cut = Cut::new(vec!["model.layers.".into()], num_layers, layers).unwrap().with_experts(experts);
        let job = Job::new(open(source.path()), cut, size).unwrap();
        write(&job, out.path());
        let seen: BTreeMap<_, _> = read_checkpoint(out.path()).into_iter()
            .map(|(name, (_, shape, bytes))| (name, (shape, bytes))).collect();
        prop_assert_eq!(&seen, &wanted);
        let total: u64 = wanted.values().map(|(_, bytes)| bytes.len() as u64).sum();
        prop_assert_eq!(job.total_bytes(), total);
        let mut calls = 0;
        let _ = job.write(again.path(), &mut |_, _| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        write(&job, again.path());
        for (name, len) in job.files() {
            let bytes = fs::read(out.path().join(name)).unwrap();
            prop_assert_eq!(bytes.len() as u64, len);
            prop_assert_eq!(bytes, fs::read(again.path().join(name)).unwrap());
        }
    }
}

fn experts(kept: &[u64], stacks: &[&str]) -> Result<Experts, Error> {
    let stacks = stacks.iter().map(|&name| name.to_owned()).collect();
    Experts::new(12, BTreeMap::from([(1, kept.to_vec())]), stacks)
}

fn cut(kept: &[u64], stacks: &[&str]) -> Cut {
    let cut = Cut::new(vec!["l.".into()], 3, vec![0, 1]).unwrap();
    cut.with_experts(experts(kept, stacks).unwrap())
}

#[test]
fn experts_are_those_of_their_layer() {
    for kept in [&[][..], &[12], &[1, 1], &[2, 0]] {
        assert!(matches!(experts(kept, &[]), Err(Error::Experts { .. })));
    }
    let cut = cut(&[0, 2, 11], &["l.1.experts.3"]);
    for (name, new) in [
        ("l.1.m.experts.0.w", Some("l.1.m.experts.0.w")),
        ("l.1.m.experts.1.w", None),
        (
            "l.1.experts.2.experts.1.w",
            Some("l.1.experts.1.experts.1.w"),
        ),
        ("l.1.m.experts.11", Some("l.1.m.experts.2")),
        (
            "l.1.m.experts.w.experts.11.w",
            Some("l.1.m.experts.w.experts.2.w"),
        ),
        ("l.1.m.experts.w", Some("l.1.m.experts.w")),
        ("l.1.m.shared_experts.1.w", Some("l.1.m.shared_experts.1.w")),
        ("l.1.experts.3", Some("l.1.experts.3")),
        ("l.0.m.experts.1.w", Some("l.0.m.experts.1.w")),
        ("l.0.m.experts.99.w", Some("l.0.m.experts.99.w")),
        ("l.2.m.experts.0.w", None),
        ("x.experts.1.w", Some("x.experts.1.w")),
    ] {
        assert_eq!(cut.rename(name).unwrap().as_deref(), new, "{name}");
    }
    for name in [
        "l.1.m.experts.12.w",
        "l.1.m.experts.02.w",
        "l.1.m.experts.99999999999999999999",
    ] {
        let refused = cut.rename(name);
        assert!(matches!(refused, Err(Error::NoSuchExpert { .. })), "{name}");
    }
}

#[test]
fn a_stack_that_does_not_divide_is_refused() {
    let source = tempdir().unwrap();
    let given = |name: &str, shape: &[u64], dtype| -> Given {
        let values: u64 = shape.iter().product();
        let len = if dtype == "F4" { values / 2 } else { values };
        (
            name.to_owned(),
            dtype,
            shape.to_vec(),
            vec![7; len as usize],
        )
    };
    let tensors = [
        given("l.1.right", &[24, 2], "U8"),
        given("l.1.seven", &[7, 12], "U8"),
        given("l.1.scalar", &[], "U8"),
        given("l.1.halves", &[12, 3], "F4"),
        given("l.0.whole", &[12, 2], "U8"),
        given("other", &[12, 2], "U8"),
    ];
    write_checkpoint(source.path(), &[tensors.to_vec()]);
    let checkpoint = open(source.path());
    let job = |name| Job::new(checkpoint.clone(), cut(&[0, 3], &[name]), 1000);
    assert!(job("l.1.right").is_ok());
    for name in [
        "l.1.seven",
        "l.1.scalar",
        "l.1.halves",
        "l.0.whole",
        "other",
    ] {
        assert!(matches!(job(name), Err(Error::Stack { .. })), "{name}");
    }
}

#[test]
fn a_journal_knows_the_experts() {
    let source = tempdir().unwrap();
    let tensor: Given = ("l.1.a".into(), "U8", vec![12, 1], vec![1; 12]);
    write_checkpoint(source.path(), &[vec![tensor]]);
    let journal = |cut| Job::new(open(source.path()), cut, 1000).unwrap().journal();
    let one = journal(cut(&[0, 3], &["l.1.a"]));
    assert_eq!(one, journal(cut(&[0, 3], &["l.1.a"])));
    assert_ne!(one, journal(cut(&[0, 4], &["l.1.a"])));
    assert_ne!(one, journal(cut(&[0, 3], &[])));
    assert_ne!(
        one,
        journal(Cut::new(vec!["l.".into()], 3, vec![0, 1]).unwrap())
    );
}
