//! The effect of a cut, as tables: which keys count layers, name layers or repeat over layers,
//! which architectures make something of the layers' number or position that no key tells, and
//! which tensors hold experts. The keys and names are those of the Python package gguf 0.19 and of llama.cpp's
//! `llama-arch.cpp`; the architectures' rules are those of llama.cpp's model loaders.
//!
//! Keys in none of the tables: a scalar stays; an array with an element a layer is filtered;
//! another array of numbers is refused, for it might name layers.

/// The meaning of a scalar for the layers; keys are written without the architecture's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// The number of blocks: becomes the survivors' number.
    Blocks,
    /// The first so many layers are of another kind: becomes the survivors' number below it.
    Leading,
    /// The first so many layers take something in by their position: they must stay.
    LeadingStay,
    /// One layer in so many is of another kind: no survivor may change its place in the period.
    Period,
    /// The last so many blocks predict further tokens, and do not count as layers: they stay,
    /// and so does the number.
    Trailing,
    /// No cut can be described unless it is zero, and why.
    Zero(&'static str),
}

use Meaning::{Blocks, Leading, LeadingStay, Period, Trailing, Zero};

/// Scalars that speak of layers. An array under the same key is treated as any array.
pub const SCALARS: [(&str, Meaning); 15] = [
    ("block_count", Blocks),
    ("nextn_predict_layers", Trailing),
    ("leading_dense_block_count", Leading),
    ("hash_layer_count", Leading),
    ("n_deepstack_layers", LeadingStay),
    ("attention.sliding_window_pattern", Period),
    ("full_attention_interval", Period),
    ("interleave_moe_layer_step", Period),
    ("moe_every_n_layers", Period),
    (
        "attention.shared_kv_layers",
        Zero("counts last layers that use the keys and values of the layers before them"),
    ),
    (
        "embedding_length_per_layer_input",
        Zero("is the width of every layer's slice of one tensor"),
    ),
    (
        "rescale_every_n_layers",
        Zero("counts the layers between rescalings that the weights are divided for"),
    ),
    (
        "attn_res.block_size",
        Zero("counts the layers between residuals that attend to one another"),
    ),
    (
        "hrm.layers_per_stack",
        Zero("counts the layers of a stack that is run in cycles"),
    ),
    (
        "decoder_block_count",
        Zero("counts decoder blocks beside the encoder's"),
    ),
];

/// Arrays of layer numbers: dropped ones go, survivors are renumbered.
pub const INDICES: [&str; 2] = [
    "attention.layer_indices",
    "attention.cross_attention_layers",
];

/// Arrays that say nothing of layers, however many elements they have.
pub const NOT_PER_LAYER: [&str; 2] = ["rope.dimension_sections", "classifier.output_labels"];

/// Arrays that speak of layers in a way that no cut can keep, unless they are empty.
pub const UNCUTTABLE: [&str; 1] = ["ple.layers"];

/// Keys of other towers in the same file; they and their tensors stay.
pub const OTHER_TOWERS: [&str; 3] = ["vision.", "audio.", "projector."];

/// A prefix without architecture whose arrays have an element a layer (Apertus).
pub const PER_LAYER_PREFIX: &str = "xielu.";

/// A rule of llama.cpp's loader of an architecture that no key tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quirk {
    /// One layer in so many is of another kind.
    Every(u64),
    /// The same, unless a key gives the period or the kind layer by layer.
    EveryUnless(u64, &'static str),
    /// The same, and only where a key is there and not zero.
    EveryIf(u64, &'static str),
    /// A model of so many layers gets other constants than one of any other number.
    Count(u64),
    /// The first layer is of another kind.
    First,
    /// A constant is made of the number of layers, unless a key holds it.
    CountUnless(&'static str),
    /// 26 or 27 layers mean the variant without a key, and any other number the one with it.
    Lite(&'static str),
    /// No cut can be described, and why.
    Never(&'static str),
}

use Quirk::{Count, CountUnless, Every, EveryIf, EveryUnless, First, Lite, Never};

/// The period, or the kind layer by layer.
pub const PATTERN: &str = "attention.sliding_window_pattern";
const WINDOW: &str = "attention.sliding_window";
const INTERVAL: &str = "full_attention_interval";

/// Architectures and their quirks; one may have several.
pub const QUIRKS: [(&str, Quirk); 31] = [
    ("afmoe", EveryUnless(4, PATTERN)),
    ("cohere2", EveryUnless(4, PATTERN)),
    ("cohere2moe", EveryUnless(4, PATTERN)),
    ("exaone-moe", EveryUnless(4, PATTERN)),
    ("exaone4", EveryIf(4, WINDOW)),
    ("exaone4", Count(64)),
    ("gemma-embedding", EveryUnless(6, PATTERN)),
    ("gemma2", EveryUnless(2, PATTERN)),
    ("gemma2", Count(46)),
    ("gemma3", EveryIf(6, WINDOW)),
    ("gemma3", Count(62)),
    ("gemma3n", Never("shares keys and values from layer 20 on")),
    ("gpt-oss", EveryUnless(2, PATTERN)),
    ("laguna", EveryUnless(4, PATTERN)),
    ("llama4", Every(4)),
    ("modern-bert", EveryUnless(3, PATTERN)),
    ("olmo2", EveryIf(4, WINDOW)),
    ("plamo3", EveryUnless(8, PATTERN)),
    ("smallthinker", EveryIf(4, WINDOW)),
    ("smollm3", Every(4)),
    ("qwen3next", EveryUnless(4, INTERVAL)),
    ("qwen35", EveryUnless(4, INTERVAL)),
    ("qwen35moe", EveryUnless(4, INTERVAL)),
    ("rwkv7", First),
    ("arwkv7", First),
    ("minicpm", CountUnless("residual_scale")),
    (
        "minicpm3",
        Never("scales every layer by the number of layers"),
    ),
    ("deepseek2", Lite("attention.q_lora_rank")),
    (
        "baichuan",
        Never("takes rotary positions at 32 layers, ALiBi at 40, and nothing else"),
    ),
    ("t5", Never("has an encoder and a decoder")),
    (
        "t5encoder",
        Never("shares one table of relative positions, in its first layer"),
    ),
];

/// The number of experts of a layer, a scalar.
pub const EXPERT_COUNT: &str = "expert_count";

const WEIGHTS: &[&str] = &["weight", "bias", "scale", "input_scale"];

/// Tensors of a block with a part for every expert, one after the other in memory, and what may
/// stand behind their name.
pub const EXPERT_PARTS: [(&str, &[&str]); 7] = [
    ("ffn_gate_exps", WEIGHTS),
    ("ffn_up_exps", WEIGHTS),
    ("ffn_gate_up_exps", WEIGHTS),
    ("ffn_down_exps", WEIGHTS),
    ("ffn_gate_inp", &["weight", "bias"]),
    ("exp_probs_b", &["", "weight", "bias"]),
    ("ffn_exp_probs_b", &["", "weight", "bias"]),
];

/// Tensors of one expert in old files, with its number behind the name.
pub const ONE_EXPERT: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];

const CHUNK: &str = "holds experts that several others share";

/// Tensors that speak of several experts together, and how.
pub const SEVERAL_EXPERTS: [(&str, &str); 4] = [
    ("ffn_gate_chexps", CHUNK),
    ("ffn_up_chexps", CHUNK),
    ("ffn_down_chexps", CHUNK),
    (
        "ffn_gate_tid2eid",
        "sends tokens to experts by their number",
    ),
];

/// Tensors of a block that hold nothing of its routed experts, whatever their dimensions; `*`
/// stands for any ending. One of another name is refused if it has as many parts as there are
/// experts.
pub const NO_EXPERTS: [&str; 31] = [
    "altup_*",
    "attn_*",
    "channel_mix_*",
    "cross_attn_*",
    "ffn",
    "ffn_down",
    "ffn_down_shexp",
    "ffn_gate",
    "ffn_gate_inp_shexp",
    "ffn_gate_shexp",
    "ffn_latent_down",
    "ffn_latent_up",
    "ffn_norm",
    "ffn_norm_exps",
    "ffn_sub_norm",
    "ffn_up",
    "ffn_up_shexp",
    "hc_*",
    "indexer",
    "indexer_compressor_*",
    "inp_gate",
    "laurel_*",
    "layer_output_*",
    "nextn",
    "post_*",
    "pre_ffw_norm_2",
    "proj",
    "shortconv",
    "ssm_*",
    "time_mix_*",
    "vis_*",
];
