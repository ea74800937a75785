//! Cuts of experts against the slow twin, and those that are refused.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use shallower_core::gguf::{Experts, GgufError};

use super::model::{Model, V, bools, cut, cut_experts, edits, read, u32s};

type Kept = BTreeMap<u64, Vec<u64>>;

/// A tensor of a ggml type with rows of one block, whose bytes tell their place.
fn tensor(model: &mut Model, name: String, ggml_type: u32, outer: &[u64]) {
    let (values, bytes) = match ggml_type {
        0 => (3, 12),
        1 => (3, 6),
        2 => (32, 18),
        8 => (32, 34),
        12 => (256, 144),
        39 => (32, 17),
        other => panic!("{other}"),
    };
    let rows: u64 = outer.iter().product();
    let seed = model.tensors.len() as u64;
    let data = (0..rows * bytes).map(|at| (at * 31 + at / 251 + seed * 7) as u8);
    let dims = [&[values], outer].concat();
    model
        .tensors
        .push((name, (ggml_type, dims, data.collect())));
}

/// Layers from `dense` on have `number` experts, and all that may lie beside them.
fn mixture(blocks: u32, dense: u32, number: u64, ggml_type: u32) -> Model {
    let mut model = Model::of("mix", blocks)
        .with("mix.expert_count", V::U32(number as u32))
        .with("mix.expert_used_count", V::U32(1))
        .with("mix.leading_dense_block_count", V::U32(dense));
    for (name, _) in &mut model.tensors {
        *name = name.replace(".norm.", ".attn_norm.");
    }
    for block in dense..blocks {
        let mut add = |name: &str, ggml_type, outer: &[u64]| {
            tensor(&mut model, format!("blk.{block}.{name}"), ggml_type, outer);
        };
        add("ffn_gate_inp.weight", 0, &[number]);
        add("attn_k_norm.weight", 0, &[number]);
        add("ffn_up_exps.weight", ggml_type, &[2, number]);
        add("ffn_gate_up_exps.bias", 1, &[number]);
        add("ffn_down_exps.weight", ggml_type, &[3, number]);
        add("ffn_down_shexp.weight", ggml_type, &[number]);
        add("ffn_gate_inp_shexp.weight", 0, &[1]);
        let values = |count: u64| (0..4 * count).map(|at| at as u8 ^ 0x5a).collect();
        for (name, count) in [
            ("exp_probs_b.bias", number),
            ("ffn_down_exps.scale", number),
            ("ffn_up_exps.input_scale", 1),
        ] {
            let data = (0, vec![count], values(count));
            model.tensors.push((format!("blk.{block}.{name}"), data));
        }
    }
    model
}

/// The slow twin: every stack is taken apart, and put together of the experts that stay.
fn divided(model: &Model, kept: &Kept, number: u64) -> Model {
    let mut cut = model.clone();
    let left = kept.values().next().unwrap().len() as u64;
    for (key, value) in &mut cut.entries {
        if key == "mix.expert_count" {
            *value = V::U32(left as u32);
        }
    }
    for (name, (_, dims, bytes)) in &mut cut.tensors {
        let parts = [
            "_exps.weight",
            "_exps.bias",
            "_exps.scale",
            "inp.weight",
            "probs_b.bias",
        ];
        if !parts.iter().any(|part| name.ends_with(part)) {
            continue;
        }
        let block: u64 = name.split('.').nth(1).unwrap().parse().unwrap();
        let size = bytes.len() / number as usize;
        let experts: Vec<&[u8]> = bytes.chunks(size).collect();
        *bytes = kept[&block]
            .iter()
            .flat_map(|&e| experts[e as usize].to_vec())
            .collect();
        *dims.last_mut().unwrap() = left;
    }
    cut
}

fn same(experts: &[u64], layers: impl IntoIterator<Item = u64>) -> Kept {
    layers
        .into_iter()
        .map(|layer| (layer, experts.to_vec()))
        .collect()
}

/// A mixture, layers that stay, and experts that stay of those among them that have any.
fn cuts() -> impl Strategy<Value = (Model, Vec<usize>, u64, Kept)> {
    let sizes = (
        2_u32..6,
        0_u32..3,
        2_u64..9,
        select(vec![0, 1, 2, 8, 12, 39]),
        0_u32..9,
    );
    sizes.prop_flat_map(|(blocks, dense, number, ggml_type, log)| {
        let dense = dense.min(blocks - 1);
        let last = blocks as usize - 1;
        let layers = subsequence((0..last).collect::<Vec<_>>(), 0..=last);
        (layers, 1..number).prop_flat_map(move |(mut layers, left)| {
            layers.push(last);
            let all: Vec<u64> = (0..number).collect();
            let each = subsequence(all, left as usize);
            let with: Vec<u64> = layers
                .iter()
                .map(|&l| l as u64)
                .filter(|&l| l >= u64::from(dense))
                .collect();
            prop::collection::vec(each, with.len()).prop_map(move |kept| {
                let model = mixture(blocks, dense, number, ggml_type).aligned(1 << log);
                let kept = with.iter().copied().zip(kept).collect();
                (model, layers.clone(), number, kept)
            })
        })
    })
}

proptest! {
    #[test]
    fn a_cut_is_the_mixture_built_anew((model, layers, number, kept) in cuts()) {
        let file = model.bytes();
        let found = cut_experts(&file, &layers, (number, &kept)).unwrap();
        let dense = layers.iter().filter(|&&layer| !kept.contains_key(&(layer as u64))).count();
        let stays = model.without(&layers, &edits(&[
            ("mix.block_count", V::U32(layers.len() as u32)),
            ("mix.leading_dense_block_count", V::U32(dense as u32)),
        ]));
        let placed = kept.iter().map(|(layer, experts)| {
            let place = layers.iter().position(|&kept| kept as u64 == *layer).unwrap();
            (place as u64, experts.clone())
        });
        let expected = divided(&stays, &placed.collect(), number);
        prop_assert!(found == expected.bytes());
    }

    #[test]
    fn layers_first_or_experts_first_is_both_at_once((model, layers, number, kept) in cuts()) {
        let file = model.bytes();
        let blocks = read(&file).unwrap().num_layers();
        prop_assume!(layers.len() < blocks);
        let once = cut_experts(&file, &layers, (number, &kept)).unwrap();
        let placed: Kept = kept.iter().map(|(layer, experts)| {
            let place = layers.iter().position(|&kept| kept as u64 == *layer).unwrap();
            (place as u64, experts.clone())
        }).collect();
        let left: Vec<usize> = (0..layers.len()).collect();
        let without = cut(&file, &layers).unwrap();
        prop_assert!(cut_experts(&without, &left, (number, &placed)).unwrap() == once);
        let all: Vec<usize> = (0..blocks).collect();
        let (some, with) = (kept.values().next().unwrap(), read(&file).unwrap().expert_layers());
        let whole = with.into_iter().map(|layer| {
            let layer = layer as u64;
            (layer, kept.get(&layer).unwrap_or(some).clone())
        }).collect();
        let fewer = cut_experts(&file, &all, (number, &whole)).unwrap();
        prop_assert!(cut(&fewer, &layers).unwrap() == once);
    }
}

#[test]
fn tensors_of_single_experts_are_renumbered() {
    let mut model = Model::of("mix", 2).with("mix.expert_count", V::U32(4));
    for block in 0..2 {
        for expert in 0..4 {
            tensor(
                &mut model,
                format!("blk.{block}.ffn_gate.{expert}.weight"),
                2,
                &[3],
            );
        }
        tensor(
            &mut model,
            format!("blk.{block}.ffn_gate_inp.weight"),
            0,
            &[4],
        );
    }
    let file = model.bytes();
    assert_eq!(read(&file).unwrap().expert_layers(), [0, 1]);
    let kept = Kept::from([(0, vec![1, 3]), (1, vec![0, 3])]);
    let found = cut_experts(&file, &[0, 1], (4, &kept)).unwrap();
    let mut expected = divided(&model, &kept, 4);
    expected.tensors.retain_mut(|(name, _)| {
        let parts: Vec<String> = name.split('.').map(Into::into).collect();
        if parts.get(2).is_none_or(|stem| stem != "ffn_gate") {
            return true;
        }
        let (block, expert): (u64, u64) = (parts[1].parse().unwrap(), parts[3].parse().unwrap());
        let kept: &Vec<u64> = &kept[&block];
        let place = kept.iter().position(|&one| one == expert);
        *name = format!("blk.{block}.ffn_gate.{}.weight", place.unwrap_or(99));
        place.is_some()
    });
    assert!(found == expected.bytes());
}

#[test]
fn what_cannot_lose_layers_can_lose_experts() {
    let stays = |model: Model, number: u64| {
        let kept = same(&[0, 2], 0..2);
        let found = cut_experts(&model.bytes(), &[0, 1], (number, &kept)).unwrap();
        assert!(found == divided(&model, &kept, number).bytes());
    };
    stays(
        mixture(2, 0, 4, 8).with("mix.attention.shared_kv_layers", V::U32(1)),
        4,
    );
    stays(mixture(2, 0, 4, 8).with("mix.odd", u32s(&[1, 2, 3])), 4);
    stays(
        mixture(2, 0, 4, 8).with("mix.rope.dimension_sections", u32s(&[1, 2, 3, 4])),
        4,
    );
    stays(
        mixture(2, 0, 4, 8).with("mix.attention.layer_indices", u32s(&[1, 1, 0, 1])),
        4,
    );
    stays(
        mixture(2, 0, 4, 8).with("mix.a_layer", bools(&[true, false])),
        4,
    );
}

#[test]
fn names_and_labels_tell_the_experts_that_are_left() {
    let text = |text: &str| V::Text(text.into());
    let mut model = mixture(2, 0, 8, 1);
    let big = vec![1; 1 << 21];
    model.tensors.push((
        "blk.0.ffn_gate_exps.weight".into(),
        (1, vec![1 << 17, 1, 8], big),
    ));
    let model = model
        .with("general.size_label", text("8x0.13M"))
        .with("general.name", text("Mix"));
    let kept = same(&[1, 2, 5, 6], 0..2);
    let found = cut_experts(&model.bytes(), &[0, 1], (8, &kept)).unwrap();
    let mut expected = divided(&model, &kept, 8);
    let last = expected.entries.len() - 2;
    expected.entries[last].1 = text("4x131K");
    expected.entries[last + 1].1 = text("Mix (4 experts)");
    let shown = String::from_utf8_lossy(&found[..600]).into_owned();
    assert!(found == expected.bytes(), "{shown}");
}

/// Asserts that no two experts of a mixture's layers can stay, and why.
#[track_caller]
fn refused(model: &Model, words: &str) {
    let kept = same(&[0, 1], 0..2);
    let error = cut_experts(&model.bytes(), &[0, 1], (4, &kept)).unwrap_err();
    assert!(matches!(error, GgufError::Refused { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[test]
fn tensors_that_cannot_be_divided_are_refused_by_name() {
    let with = |name: &str, ggml_type: u32, outer: &[u64]| {
        let mut model = mixture(2, 0, 4, 8);
        tensor(&mut model, format!("blk.1.{name}"), ggml_type, outer);
        model
    };
    refused(
        &with("ffn_gate_tid2eid.weight", 0, &[7]),
        "tokens to experts by their number",
    );
    refused(
        &with("ffn_up_chexps.weight", 0, &[2, 2]),
        "several others share",
    );
    refused(
        &with("ffn_gate_exps.weight", 0, &[5]),
        "expected the 4 experts as the last one",
    );
    refused(
        &with("ffn_gate_exps.weight.in_sum2", 0, &[4]),
        "has 4 parts, as many as",
    );
    refused(
        &with("ffn_strange.weight", 0, &[2, 4]),
        "blk.1.ffn_strange.weight has 4 parts",
    );
    refused(&with("ffn_up.4.weight", 0, &[1]), "an expert beyond the 4");
    let known = with("ffn_strange.weight", 0, &[2, 5]);
    cut_experts(&known.bytes(), &[0, 1], (4, &same(&[0, 1], 0..2))).unwrap();
    let mut packed = mixture(2, 0, 4, 8);
    packed.tensors.push((
        "blk.1.exp_probs_b.weight".into(),
        (8, vec![32, 4], vec![1; 136]),
    ));
    cut_experts(&packed.bytes(), &[0, 1], (4, &same(&[0, 1], 0..2))).unwrap();
    let last = packed.tensors.len() - 1;
    packed.tensors[last].1 = (137, vec![32, 4], vec![1; 128]);
    refused(&packed, "unknown ggml type 137");
    let across = Model::of("mix", 1).with("mix.expert_count", V::U32(64));
    let mut across = across.clone();
    across
        .tensors
        .push(("blk.0.exp_probs_b.bias".into(), (8, vec![64], vec![1; 68])));
    let error = cut_experts(&across.bytes(), &[0], (64, &same(&[1, 2], 0..1))).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("packs 32 values, of several experts"),
        "{error}"
    );
}

#[test]
fn metadata_that_cannot_describe_fewer_experts_is_refused() {
    let counted = |value: V| {
        let mut model = mixture(2, 0, 4, 8);
        model.entries.retain(|(key, _)| key != "mix.expert_count");
        model.with("mix.expert_count", value)
    };
    refused(
        &counted(u32s(&[4, 4])),
        "not one whole number for all layers",
    );
    refused(&counted(V::F32(4.0)), "not one whole number for all layers");
    refused(
        &mixture(2, 0, 4, 8).with("mix.odd", u32s(&[1, 2, 3, 4])),
        "as many as there are experts",
    );
    let mut further = mixture(3, 0, 4, 8).with("mix.nextn_predict_layers", V::U32(1));
    refused(&further, "predicts further tokens with experts of its own");
    further
        .tensors
        .retain(|(name, _)| !name.starts_with("blk.2.") || name.ends_with("norm.weight"));
    cut_experts(&further.bytes(), &[0, 1], (4, &same(&[0, 1], 0..2))).unwrap();
}

#[test]
fn experts_must_be_as_many_of_every_layer_that_has_any_and_stays() {
    let file = mixture(4, 1, 4, 8).bytes();
    assert_eq!(read(&file).unwrap().expert_layers(), [1, 2, 3]);
    for (layers, kept) in [
        (&[0, 1, 2, 3][..], same(&[0, 1], 1..3)),
        (&[0, 1, 2, 3], same(&[0, 1], 0..4)),
        (&[0, 1, 2, 3], same(&[0, 1], 1..5)),
        (&[0, 1, 2], same(&[0, 1], 1..4)),
        (&[0], same(&[0, 1], 1..4)),
    ] {
        let error = cut_experts(&file, layers, (4, &kept)).unwrap_err();
        assert!(matches!(error, GgufError::Experts(_)), "{error}");
    }
    let error = cut_experts(&file, &[0, 1, 2, 3], (5, &same(&[0, 1], 1..4))).unwrap_err();
    assert!(
        error.to_string().contains("mix.expert_count is 4"),
        "{error}"
    );
    for kept in [
        Kept::new(),
        same(&[], 0..2),
        same(&[1, 0], 0..2),
        same(&[1, 1], 0..2),
        same(&[4], 0..2),
        same(&[0, 1, 2, 3], 0..2),
        Kept::from([(0, vec![0]), (1, vec![0, 1])]),
    ] {
        let error = Experts::new(4, kept).unwrap_err();
        assert!(matches!(error, GgufError::Experts(_)), "{error}");
    }
    for survivors in [&[][..], &[1, 0], &[4]] {
        let error = cut_experts(&file, survivors, (4, &same(&[0, 1], 1..4))).unwrap_err();
        assert!(matches!(error, GgufError::Survivors { .. }), "{error}");
    }
}
