//! Cuts of GGUF files against a slow twin that reads the format naively, and hostile files.

use std::collections::BTreeMap;
use std::io::Cursor;

use proptest::prelude::*;
use shallower_core::gguf::{Gguf, GgufError};

/// A value as the tests write and read it.
#[derive(Debug, Clone, PartialEq)]
enum V {
    U8(u8),
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Text(String),
    Array(u32, Vec<V>),
}

impl V {
    fn code(&self) -> u32 {
        match self {
            V::U8(_) => 0,
            V::U32(_) => 4,
            V::I32(_) => 5,
            V::F32(_) => 6,
            V::Bool(_) => 7,
            V::Text(_) => 8,
            V::Array(..) => 9,
            V::U64(_) => 10,
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            V::U8(v) => out.push(*v),
            V::U32(v) => out.extend(v.to_le_bytes()),
            V::I32(v) => out.extend(v.to_le_bytes()),
            V::U64(v) => out.extend(v.to_le_bytes()),
            V::F32(v) => out.extend(v.to_le_bytes()),
            V::Bool(v) => out.push((*v).into()),
            V::Text(v) => text(out, v),
            V::Array(code, values) => {
                out.extend(code.to_le_bytes());
                out.extend((values.len() as u64).to_le_bytes());
                for value in values {
                    value.write(out);
                }
            }
        }
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn u32s(values: &[u32]) -> V {
    V::Array(4, values.iter().map(|&v| V::U32(v)).collect())
}

fn bools(values: &[bool]) -> V {
    V::Array(7, values.iter().map(|&v| V::Bool(v)).collect())
}

/// A tensor as the tests write and read it: type, dimensions, bytes.
type T = (u32, Vec<u64>, Vec<u8>);

#[derive(Debug, Clone, PartialEq)]
struct Model {
    alignment: usize,
    entries: Vec<(String, V)>,
    tensors: Vec<(String, T)>,
}

impl Model {
    /// A model of the architecture `llama` whose tensors tell their block.
    fn new(blocks: u32) -> Self {
        Self::of("llama", blocks)
    }

    fn of(architecture: &str, blocks: u32) -> Self {
        let mut tensors = vec![("token_embd.weight".into(), (0, vec![3], vec![7; 12]))];
        for block in 0..blocks {
            let (byte, size) = (block as u8, 34 * (1 + block as usize % 2));
            let dims = vec![32, 1 + u64::from(block % 2)];
            tensors.push((
                format!("blk.{block}.ffn.weight"),
                (8, dims, vec![byte; size]),
            ));
            tensors.push((
                format!("blk.{block}.norm.weight"),
                (1, vec![5], vec![byte; 10]),
            ));
        }
        tensors.push(("output.weight".into(), (30, vec![1, 2], vec![9; 4])));
        let entries = vec![
            ("general.architecture".into(), V::Text(architecture.into())),
            (format!("{architecture}.block_count"), V::U32(blocks)),
        ];
        Self {
            alignment: 32,
            entries,
            tensors,
        }
    }

    fn with(mut self, key: &str, value: V) -> Self {
        self.entries.push((key.into(), value));
        self
    }

    fn aligned(mut self, alignment: u32) -> Self {
        self.alignment = alignment as usize;
        self.with("general.alignment", V::U32(alignment))
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            text(&mut out, key);
            out.extend(value.code().to_le_bytes());
            value.write(&mut out);
        }
        let mut data = Vec::new();
        for (name, (ggml_type, dims, bytes)) in &self.tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            for dim in dims {
                out.extend(dim.to_le_bytes());
            }
            out.extend(ggml_type.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(self.alignment), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }

    /// The slow twin of a cut: the model is built anew.
    fn without(&self, kept: &[usize], edits: &BTreeMap<String, V>) -> Self {
        let mut cut = self.clone();
        for (key, value) in &mut cut.entries {
            if let Some(edit) = edits.get(key) {
                *value = edit.clone();
            }
        }
        cut.tensors.retain_mut(|(name, _)| {
            let Some(rest) = name.strip_prefix("blk.") else {
                return true;
            };
            let (block, rest) = rest.split_once('.').unwrap();
            let block: usize = block.parse().unwrap();
            let Some(place) = kept.iter().position(|&kept| kept == block) else {
                return false;
            };
            *name = format!("blk.{place}.{rest}");
            true
        });
        cut
    }
}

fn cut(file: &[u8], survivors: &[usize]) -> Result<Vec<u8>, GgufError> {
    let mut source = Cursor::new(file);
    let planned = Gguf::read(&mut source)?.cut(&mut source, survivors)?;
    let mut out = Vec::new();
    planned.write(&mut source, &mut out, &mut |_| true)?;
    assert_eq!(out.len() as u64, planned.size());
    Ok(out)
}

fn read(file: &[u8]) -> Result<Gguf, GgufError> {
    Gguf::read(&mut Cursor::new(file))
}

fn edits(pairs: &[(&str, V)]) -> BTreeMap<String, V> {
    pairs
        .iter()
        .map(|(k, v)| ((*k).into(), v.clone()))
        .collect()
}

#[track_caller]
fn refused(model: &Model, survivors: &[usize], words: &str) {
    let error = cut(&model.bytes(), survivors).unwrap_err();
    assert!(matches!(error, GgufError::Refused { .. }), "{error}");
    assert!(error.to_string().contains(words), "{error}");
}

#[track_caller]
fn becomes(model: &Model, kept: &[usize], pairs: &[(&str, V)]) {
    let arch = match &model.entries[0].1 {
        V::Text(arch) => arch.clone(),
        other => panic!("{other:?}"),
    };
    let mut edits = edits(pairs);
    edits.insert(format!("{arch}.block_count"), V::U32(kept.len() as u32));
    let expected = model.without(kept, &edits).bytes();
    assert!(cut(&model.bytes(), kept).unwrap() == expected);
}

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
fn architectures_have_habits_that_no_key_tells() {
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
fn files_that_are_no_whole_model_are_refused() {
    let no_layers = |model: &Model, words: &str| {
        let error = read(&model.bytes()).unwrap_err();
        assert!(matches!(error, GgufError::NoLayers(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let mut short = Model::new(3);
    short
        .tensors
        .retain(|(name, _)| !name.starts_with("blk.1."));
    no_layers(&short, "no tensor is named blk.1");
    let mut long = Model::new(3);
    long.entries[1].1 = V::U32(2);
    no_layers(&long, "blk.2.ffn.weight is not in one of its 2 blocks");
    long.entries[1].1 = V::U32(u32::MAX);
    no_layers(&long, "no tensor is named blk.3");
    long.entries[1].1 = V::Text("3".into());
    no_layers(&long, "llama.block_count is missing");
    for name in [
        "blk.01.x",
        "blk.+1.x",
        "blk.-1.x",
        "blk..x",
        "blk.99999999999999999999.x",
    ] {
        let mut odd = Model::new(3);
        odd.tensors[1].0 = name.into();
        no_layers(&odd, name);
    }
    let all = Model::new(2).with("llama.nextn_predict_layers", V::U32(2));
    no_layers(&all, "of 2 blocks");
    let split = Model::new(2).with("split.count", V::U8(3));
    assert_eq!(read(&split.bytes()), Err(GgufError::Split(3)));
}

#[test]
fn versions_and_byte_orders_are_told_apart() {
    let file = Model::new(2).bytes();
    let versioned = |bytes: [u8; 4]| [&file[..4], &bytes[..], &file[8..]].concat();
    assert!(cut(&versioned([2, 0, 0, 0]), &[0]).unwrap()[4] == 2);
    let words = |file: &[u8]| read(file).unwrap_err().to_string();
    assert!(words(&versioned([0, 0, 0, 3])).contains("big-endian"));
    assert!(words(&versioned([1, 0, 0, 0])).contains("convert the model anew"));
    assert!(words(&versioned([4, 0, 0, 0])).contains("version 4, expected 2 or 3"));
    assert!(words(b"PK\x03\x04zip").contains("no GGUF file"));
    assert!(words(b"").contains("cut short"));
}

/// A file that consists of a header's beginning and whatever follows.
fn hostile(entries: u64, tensors: u64, rest: &[u8]) -> Vec<u8> {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend(tensors.to_le_bytes());
    file.extend(entries.to_le_bytes());
    file.extend(rest);
    file
}

#[test]
fn lengths_are_held_against_the_file() {
    let huge = u64::MAX.to_le_bytes();
    let key = |code: u32, rest: &[u8]| {
        let mut bytes = Vec::new();
        text(&mut bytes, "k");
        bytes.extend(code.to_le_bytes());
        bytes.extend(rest);
        bytes.extend([0; 64]);
        bytes
    };
    let array = |code: u32, count: u64| [&code.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for file in [
        hostile(u64::MAX, 0, &[0; 64]),
        hostile(0, u64::MAX, &[0; 64]),
        hostile(1 << 61, 1 << 61, &[0; 64]),
        hostile(1, 0, &[&huge[..], &[0; 64]].concat()),
        hostile(1, 0, &key(8, &huge)),
        hostile(1, 0, &key(8, &(i64::MAX as u64).to_le_bytes())),
        hostile(1, 0, &key(9, &array(10, u64::MAX / 8))),
        hostile(1, 0, &key(9, &array(10, 1 << 61))),
        hostile(1, 0, &key(9, &array(8, u64::MAX))),
        hostile(1, 0, &key(9, &array(9, u64::MAX))),
        hostile(1, 0, &key(9, &array(13, 1))),
        hostile(1, 0, &key(13, &[])),
        hostile(1, 0, &key(7, &[2])),
        hostile(2, 0, &[key(0, &[])[..14].to_vec(), key(0, &[])].concat()),
    ] {
        let error = read(&file).unwrap_err();
        assert!(matches!(error, GgufError::Damaged { .. }), "{error}");
    }
}

#[test]
fn nested_arrays_have_a_bottom() {
    let nest = |depth: usize| (0..depth).fold(u32s(&[1]), |inner, _| V::Array(9, vec![inner]));
    assert!(read(&Model::new(2).with("x", nest(7)).bytes()).is_ok());
    for depth in [8, 9, 20_000] {
        let mut deep = Model::new(2).with("x", V::U32(9)).bytes();
        let at = deep
            .windows(5)
            .position(|w| w == [b'x', 4, 0, 0, 0])
            .unwrap()
            + 1;
        let mut bytes = 9_u32.to_le_bytes().to_vec();
        for _ in 0..depth {
            bytes.extend(9_u32.to_le_bytes());
            bytes.extend(1_u64.to_le_bytes());
        }
        deep.splice(at..at + 8, bytes);
        let words = read(&deep).unwrap_err().to_string();
        assert!(words.contains("nested deeper than 8"), "{words}");
    }
}

#[test]
fn tensors_must_follow_one_another() {
    let damaged = |file: &[u8], words: &str| {
        let error = read(file).unwrap_err();
        assert!(matches!(error, GgufError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    let with = |change: fn(&mut T)| {
        let mut model = Model::new(2);
        change(&mut model.tensors[1].1);
        model.bytes()
    };
    damaged(&with(|t| t.2.extend([0; 64])), "expected 96");
    damaged(&with(|t| t.1 = vec![u64::MAX, 2]), "too large");
    damaged(&with(|t| t.1 = vec![1 << 63]), "too large");
    damaged(&with(|t| t.1 = vec![1 << 50]), "cut short");
    damaged(&with(|t| t.1 = vec![31]), "packs 32 at a time");
    damaged(&with(|t| t.1 = vec![1; 5]), "5 dimensions");
    let mut twice = Model::new(2);
    twice.tensors[2].0 = twice.tensors[1].0.clone();
    damaged(&twice.bytes(), "there twice");
    let whole = Model::new(2).bytes();
    damaged(&whole[..whole.len() - 29], "cut short");
    assert!(
        read(&whole[..whole.len() - 28]).is_ok(),
        "the last padding may be missing"
    );
    damaged(&[&whole[..], b"tail"].concat(), "truncate -s");
    for alignment in [V::U32(0), V::U32(48), V::U64(32), V::Text("32".into())] {
        damaged(
            &Model::new(2).with("general.alignment", alignment).bytes(),
            "power of two",
        );
    }
    let giant = Model::new(2).with("general.alignment", V::U32(1 << 31));
    damaged(&giant.bytes(), "");
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
fn an_unknown_type_cannot_reach_beyond_all_numbers() {
    let mut model = Model::new(1);
    model.tensors[1].1.0 = 137;
    let mut file = model.bytes();
    let name = b"blk.0.norm.weight";
    let next = file.windows(name.len()).position(|seen| seen == name);
    let offset = next.unwrap() + name.len() + 4 + 8 + 4;
    file[offset..offset + 8].copy_from_slice(&(u64::MAX - 7).to_le_bytes());
    let error = read(&file).unwrap_err().to_string();
    assert!(error.contains("it is cut short"), "{error}");
}

#[test]
fn a_cut_stops_when_it_is_told_to() {
    let file = Model::new(2).bytes();
    let mut source = Cursor::new(&file[..]);
    let planned = Gguf::read(&mut source)
        .unwrap()
        .cut(&mut source, &[1])
        .unwrap();
    let stopped = planned.write(&mut source, &mut Vec::new(), &mut |_| false);
    assert_eq!(stopped, Err(GgufError::Stopped));
    let lost = planned.write(&mut Cursor::new(&file[..99]), &mut Vec::new(), &mut |_| {
        true
    });
    assert!(matches!(lost, Err(GgufError::Read(_))));
}

fn models() -> impl Strategy<Value = Model> {
    let sizes = (1_u64..40, 1_u64..4, any::<u8>());
    (
        2_u32..7,
        0_u32..13,
        prop::collection::vec(sizes, 8),
        any::<bool>(),
    )
        .prop_map(|(blocks, log, sizes, dense)| {
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

/// What a reader must never do with a file: panic, hang, or make what it cannot read.
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
