//! GGUF files.

use std::io::Cursor;

use proptest::prelude::*;
use proptest::sample::select;
use shallower_core::gguf::{Experts, Gguf};

use crate::memory::bounded;
use crate::strikes::{NUMBERS, Tokens};

pub const ARCHITECTURES: [&str; 10] = [
    "llama",
    "gemma2",
    "gemma3",
    "llama4",
    "qwen3next",
    "deepseek2",
    "rwkv7",
    "minicpm",
    "exaone4",
    "t5",
];
pub const KEYS: [&str; 23] = [
    "block_count",
    "nextn_predict_layers",
    "leading_dense_block_count",
    "hash_layer_count",
    "n_deepstack_layers",
    "attention.sliding_window_pattern",
    "attention.sliding_window",
    "full_attention_interval",
    "interleave_moe_layer_step",
    "attention.shared_kv_layers",
    "embedding_length_per_layer_input",
    "rescale_every_n_layers",
    "attention.layer_indices",
    "rope.dimension_sections",
    "ple.layers",
    "vision.block_count",
    "attention.head_count_kv",
    "feed_forward_length",
    "residual_scale",
    "attention.q_lora_rank",
    "decoder_block_count",
    "expert_count",
    "x",
];

pub const TOLD: [&str; 4] = [
    "general.name",
    "general.size_label",
    "general.languages",
    "general.alignment",
];

pub fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub fn gguf_words() -> Vec<Vec<u8>> {
    let narrow = NUMBERS.iter().map(|&n| (n as u32).to_le_bytes().to_vec());
    let mut words: Vec<_> = narrow.collect();
    words.extend(NUMBERS.iter().map(|n| n.to_le_bytes().to_vec()));
    words.extend((0_u32..14).map(|kind| kind.to_le_bytes().to_vec()));
    for architecture in ARCHITECTURES {
        words.push(gguf_text(architecture));
        words.extend(
            KEYS.iter()
                .map(|key| gguf_text(&format!("{architecture}.{key}"))),
        );
    }
    let names = [
        "blk.0.a",
        "blk.1.a",
        "blk.01.a",
        "blk.99.a",
        "blk..a",
        "blk.0",
        "general.alignment",
        "general.architecture",
        "split.count",
        "xielu.alpha_p",
        "blk.0.ffn_up_exps.weight",
        "blk.1.ffn_gate.1.weight",
        "blk.0.exp_probs_b",
        "",
    ];
    words.extend(names.map(gguf_text));
    words
}

/// A value: its type and bytes, each a token.
pub fn gguf_value(blocks: u32) -> impl Strategy<Value = Tokens> {
    let number = prop_oneof![3 => 0..blocks + 2, 1 => any::<u32>()];
    let scalar = (
        select(vec![(4_u32, 4), (5, 4), (6, 4), (7, 1), (0, 1), (10, 8)]),
        number.clone(),
    );
    let scalar = scalar.prop_map(|((kind, width), number)| {
        let bytes = u64::from(number).to_le_bytes();
        vec![kind.to_le_bytes().to_vec(), bytes[..width].to_vec()]
    });
    let len = prop_oneof![3 => Just(blocks as usize), 1 => 0..8_usize];
    let list = len.prop_flat_map(move |len| prop::collection::vec(number.clone(), len));
    let list = list.prop_map(|values| {
        let mut tokens = vec![9_u32.to_le_bytes().to_vec(), 4_u32.to_le_bytes().to_vec()];
        tokens.push((values.len() as u64).to_le_bytes().to_vec());
        tokens.extend(values.iter().map(|value| value.to_le_bytes().to_vec()));
        tokens
    });
    let text = "[a-z]{0,4}".prop_map(|text| vec![8_u32.to_le_bytes().to_vec(), gguf_text(&text)]);
    prop_oneof![3 => scalar, 3 => list, 1 => text]
}

/// The tokens of the header, the alignment and the data of a model.
pub fn gguf() -> impl Strategy<Value = (Tokens, usize, Vec<u8>)> {
    (1_u32..6, select(ARCHITECTURES.to_vec()), 3_u32..7).prop_flat_map(|(blocks, arch, log)| {
        let entry = (select(KEYS[1..].to_vec()), gguf_value(blocks));
        let entries = prop::collection::btree_map(entry.0, entry.1, 0..4);
        let tensors = prop::collection::vec((0..blocks, 1_u64..5, any::<u8>()), 0..6);
        let with_experts = any::<bool>();
        (entries, tensors, with_experts).prop_map(move |(entries, tensors, with_experts)| {
            let alignment = 1_usize << log;
            let number = |value: u32| value.to_le_bytes().to_vec();
            let mut tokens = vec![b"GGUF".to_vec(), number(3)];
            tokens.push(
                (tensors.len() as u64 + u64::from(blocks))
                    .to_le_bytes()
                    .to_vec(),
            );
            tokens.push((entries.len() as u64 + 6).to_le_bytes().to_vec());
            tokens.extend([
                gguf_text("general.architecture"),
                number(8),
                gguf_text(arch),
            ]);
            tokens.extend([gguf_text("general.alignment"), number(4), number(1 << log)]);
            tokens.extend([
                gguf_text(&format!("{arch}.block_count")),
                number(4),
                number(blocks),
            ]);
            for (key, text) in [
                ("general.name", format!("m ({blocks} layers)")),
                ("general.size_label", "1B".into()),
            ] {
                tokens.extend([gguf_text(key), number(8), gguf_text(&text)]);
            }
            tokens.extend([gguf_text("general.languages"), number(9), number(8)]);
            tokens.extend([
                2_u64.to_le_bytes().to_vec(),
                gguf_text("en"),
                gguf_text("fr"),
            ]);
            for (key, value) in entries {
                tokens.push(gguf_text(&format!("{arch}.{key}")));
                tokens.extend(value);
            }
            let mut data = Vec::new();
            let every = (0..blocks).map(|block| (block, 3, 7));
            for (i, (block, len, byte)) in every.chain(tensors).enumerate() {
                let name = if with_experts && i < blocks as usize {
                    "exp_probs_b.bias".into()
                } else {
                    format!("t{i}")
                };
                tokens.extend([gguf_text(&format!("blk.{block}.{name}")), number(1)]);
                tokens.push(len.to_le_bytes().to_vec());
                tokens.extend([number(0), (data.len() as u64).to_le_bytes().to_vec()]);
                data.resize(data.len() + 4 * len as usize, byte);
                data.resize(data.len().next_multiple_of(alignment), 0);
            }
            (tokens, alignment, data)
        })
    })
}

pub fn gguf_survives(file: &[u8], bits: usize) -> bool {
    let mut source = Cursor::new(file);
    let Ok(read) = bounded(file.len(), || Gguf::read(&mut source)) else {
        return false;
    };
    for key in TOLD {
        bounded(file.len(), || read.told(&mut source, key));
    }
    let layers = read.num_layers().min(64);
    let survivors: Vec<usize> = (0..layers).filter(|layer| bits >> layer & 1 == 1).collect();
    let experts = read.expert_layers().into_iter().take(64);
    let kept = experts.map(|layer| (layer as u64, vec![bits as u64 % 3]));
    let experts = Experts::new(3 + bits as u64 % 2, kept.collect()).ok();
    bounded(file.len(), || {
        read.cut(&mut source, &survivors, experts.as_ref()).is_ok()
    });
    let Ok(cut) = bounded(file.len(), || read.cut(&mut source, &survivors, None)) else {
        return false;
    };
    let mut out = Vec::new();
    cut.write(&mut source, &mut out, &mut |_| true).unwrap();
    assert_eq!(out.len() as u64, cut.size());
    let again = Gguf::read(&mut Cursor::new(&*out)).unwrap();
    assert_eq!(again.num_layers(), survivors.len());
    true
}
