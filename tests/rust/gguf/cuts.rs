//! Cuts against the slow twin, and cuts that are refused.

use std::io::Cursor;

use shallower_core::gguf::{Gguf, GgufError};

use super::model::{Model, V, becomes, bools, cut, edits, read, refused, u32s};

#[test]
fn a_cut_is_the_model_built_anew() {
    let model = Model::new(5);
    becomes(&model, &[0, 1, 4], &[]);
    becomes(&model, &[4], &[]);
    becomes(&model, &[1, 2, 3, 4], &[]);
    becomes(&model.clone().aligned(8), &[0, 3], &[]);
    becomes(&model.aligned(4096), &[0, 3], &[]);
}

#[test]
fn arrays_of_a_value_a_layer_are_filtered() {
    let nested = |values: &[u32]| V::Array(9, values.iter().map(|&v| u32s(&[v, v])).collect());
    let texts = |values: &[&str]| V::Array(8, values.iter().map(|&v| V::Text(v.into())).collect());
    let model = Model::new(4)
        .with("llama.attention.head_count", u32s(&[1, 2, 3, 4]))
        .with(
            "llama.attention.sliding_window_pattern",
            bools(&[true, false, true, true]),
        )
        .with("llama.layer_types", texts(&["a", "", "ccc", "dd"]))
        .with("llama.nested", nested(&[5, 6, 7, 8]))
        .with(
            "xielu.alpha_p",
            V::Array(6, [1.0, 2.0, 3.0, 4.0].map(V::F32).into()),
        )
        .with("llama.rope.dimension_sections", u32s(&[8, 8, 8, 0]))
        .with("llama.vision.image_mean", u32s(&[1, 2, 3]))
        .with("llama.empty", u32s(&[]))
        .with("tokenizer.ggml.tokens", texts(&["x", "y", "z", "w"]))
        .with("general.tags", texts(&["p", "q"]));
    becomes(
        &model,
        &[1, 3],
        &[
            ("llama.attention.head_count", u32s(&[2, 4])),
            (
                "llama.attention.sliding_window_pattern",
                bools(&[false, true]),
            ),
            ("llama.layer_types", texts(&["", "dd"])),
            ("llama.nested", nested(&[6, 8])),
            ("xielu.alpha_p", V::Array(6, [2.0, 4.0].map(V::F32).into())),
        ],
    );
}

#[test]
fn counts_and_lists_of_layers_follow_the_survivors() {
    let model = Model::of("deepseek", 6)
        .with("deepseek.leading_dense_block_count", V::U32(3))
        .with("deepseek.hash_layer_count", V::U8(1))
        .with("deepseek.attention.layer_indices", u32s(&[0, 2, 5]))
        .with("deepseek.expert_count", V::U32(64))
        .with("split.count", V::U8(1))
        .with("split.tensors.count", V::I32(14));
    becomes(
        &model,
        &[1, 2, 3, 5],
        &[
            ("deepseek.leading_dense_block_count", V::U32(2)),
            ("deepseek.hash_layer_count", V::U8(0)),
            ("deepseek.attention.layer_indices", u32s(&[1, 3])),
            ("split.tensors.count", V::I32(10)),
        ],
    );
}

#[test]
fn blocks_that_predict_further_tokens_are_no_layers() {
    let model = Model::of("glm4moe", 5)
        .with("glm4moe.nextn_predict_layers", V::U32(1))
        .with("glm4moe.a", u32s(&[0, 1, 2, 3, 4]))
        .with("glm4moe.b", u32s(&[0, 1, 2, 3]));
    let file = model.bytes();
    assert_eq!(read(&file).unwrap().num_layers(), 4);
    let expected = model.without(
        &[0, 3, 4],
        &edits(&[
            ("glm4moe.block_count", V::U32(3)),
            ("glm4moe.a", u32s(&[0, 3, 4])),
            ("glm4moe.b", u32s(&[0, 3])),
        ]),
    );
    assert!(cut(&file, &[0, 3]).unwrap() == expected.bytes());
    assert!(matches!(
        cut(&file, &[0, 4]),
        Err(GgufError::Survivors { .. })
    ));
}

#[test]
fn survivors_must_be_some_of_the_layers_in_order() {
    let file = Model::new(3).bytes();
    for survivors in [
        &[][..],
        &[0, 1, 2],
        &[1, 0],
        &[1, 1],
        &[3],
        &[0, usize::MAX],
    ] {
        let error = cut(&file, survivors).unwrap_err();
        assert!(
            matches!(error, GgufError::Survivors { .. }),
            "{survivors:?}"
        );
    }
}

#[test]
fn periods_must_keep_step() {
    let key = "llama.full_attention_interval";
    let model = Model::new(8).with(key, V::U32(4));
    becomes(&model, &[0, 1, 2, 3], &[]);
    becomes(&model, &[0, 5, 6, 7], &[]);
    becomes(&model, &[0, 1, 2, 3, 4], &[]);
    refused(
        &model,
        &[0, 1, 2, 4, 5, 6, 7],
        "layer 4 would become layer 3",
    );
    becomes(&Model::new(8).with(key, V::U32(1)), &[3, 5], &[]);
    let swa = "llama.attention.sliding_window_pattern";
    refused(
        &Model::new(4).with(swa, V::I32(2)),
        &[1],
        "drop 2 layers in a row",
    );
    becomes(&Model::new(4).with(swa, V::U32(0)), &[1], &[]);
    refused(
        &Model::new(4).with(swa, V::F32(2.0)),
        &[1],
        "not a whole number",
    );
    refused(
        &Model::new(4).with(swa, V::I32(-2)),
        &[1],
        "not a whole number",
    );
}

#[test]
fn architectures_have_quirks_that_no_key_tells() {
    let gemma = Model::of("gemma3", 12).with("gemma3.attention.sliding_window", V::U32(512));
    becomes(&gemma, &[0, 1, 2, 9, 10, 11], &[]);
    refused(
        &gemma,
        &[0, 1, 2, 3, 4, 6],
        "gemma3 is an architecture that makes one layer in 6",
    );
    becomes(&Model::of("gemma3", 12), &[0, 6], &[]);
    let set = gemma
        .clone()
        .with("gemma3.attention.sliding_window_pattern", V::U32(3));
    becomes(&set, &[0, 1, 5], &[]);
    let many: Vec<usize> = (0..56).collect();
    refused(&Model::of("gemma3", 62), &many, "other constants at 62");
    refused(&Model::of("gemma2", 4), &[0, 2], "one layer in 2");
    let even: Vec<usize> = (0..44).collect();
    refused(&Model::of("gemma2", 46), &even, "other constants at 46");
    refused(&Model::of("smollm3", 8), &[1, 2], "one layer in 4");
    refused(&Model::of("llama4", 8), &[1, 2], "one layer in 4");
    refused(&Model::of("minicpm", 4), &[1, 2], "residual_scale");
    let scaled = Model::of("minicpm", 4).with("minicpm.residual_scale", V::F32(0.2));
    becomes(&scaled, &[1, 2], &[]);
    refused(&Model::of("baichuan", 4), &[1, 2], "ALiBi");
    refused(&Model::of("rwkv7", 4), &[1, 2], "first layer");
    becomes(&Model::of("rwkv7", 4), &[0, 2], &[]);
    refused(&Model::of("deepseek2", 27), &[0, 1], "26 or 27");
    let all_but_one: Vec<usize> = (0..26).collect();
    becomes(&Model::of("deepseek2", 27), &all_but_one, &[]);
}

#[test]
fn what_cannot_be_described_is_refused() {
    let with = |key: &str, value: V| Model::new(4).with(&format!("llama.{key}"), value);
    refused(
        &with("attention.shared_kv_layers", V::U32(2)),
        &[0, 1],
        "keys and values",
    );
    becomes(&with("attention.shared_kv_layers", V::U32(0)), &[0, 1], &[]);
    refused(
        &with("embedding_length_per_layer_input", V::U64(2)),
        &[0, 1],
        "slice",
    );
    refused(
        &with("n_deepstack_layers", V::U32(2)),
        &[0, 2],
        "first 2 layers must stay",
    );
    becomes(&with("n_deepstack_layers", V::U32(2)), &[0, 1, 3], &[]);
    refused(&with("ple.layers", u32s(&[1, 2])), &[0, 1], "single layers");
    refused(
        &with("strange", u32s(&[1, 2])),
        &[0, 1],
        "has not one a layer",
    );
    refused(
        &with("attention.layer_indices", u32s(&[9])),
        &[0, 1],
        "names layer 9",
    );
}

#[test]
fn an_unknown_type_reaches_to_the_next_tensor() {
    let mut model = Model::new(3);
    model.tensors[3].1 = (137, vec![1000], vec![5; 96]);
    let last = model.tensors.len() - 1;
    model.tensors[last].1 = (138, vec![7], vec![6; 64]);
    becomes(&model, &[1, 2], &[]);
    becomes(&model, &[0, 2], &[]);
}

#[test]
fn a_cut_stops_when_it_is_told_to() {
    let file = Model::new(2).bytes();
    let mut source = Cursor::new(&file[..]);
    let planned = Gguf::read(&mut source)
        .unwrap()
        .cut(&mut source, &[1], None)
        .unwrap();
    let stopped = planned.write(&mut source, &mut Vec::new(), &mut |_| false);
    assert_eq!(stopped, Err(GgufError::Stopped));
    let lost = planned.write(&mut Cursor::new(&file[..99]), &mut Vec::new(), &mut |_| {
        true
    });
    assert!(matches!(lost, Err(GgufError::Read(_))));
}
