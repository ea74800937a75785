//! Headers, indexes and whole checkpoints of safetensors.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index as Place;
use serde_json::{Value, json};
use shallower_core::checkpoint::{
    Checkpoint, Cut, Experts, Header, INDEX_FILE, Index, Job, SINGLE_FILE, Tensor,
};

use crate::memory::bounded;
use crate::strikes::{NUMBERS, Strike, Tokens, struck};

pub const DTYPES: [(&str, u64); 8] = [
    ("F32", 32),
    ("BF16", 16),
    ("U8", 8),
    ("I64", 64),
    ("F8_E4M3", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("X9", 8),
];

/// The words of a JSON text with what is between them.
pub fn json_tokens(text: &str) -> Tokens {
    let mut tokens: Tokens = Vec::new();
    let (mut quoted, mut escaped) = (false, false);
    for byte in text.bytes() {
        let goes_on = tokens.last().is_some_and(|token: &Vec<u8>| {
            quoted || (byte.is_ascii_alphanumeric() && token.iter().all(u8::is_ascii_alphanumeric))
        });
        if goes_on {
            tokens.last_mut().unwrap().push(byte);
        } else {
            tokens.push(vec![byte]);
        }
        if byte == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = quoted && byte == b'\\' && !escaped;
    }
    tokens
}

pub fn json_words() -> Vec<Vec<u8>> {
    let mut words: Vec<String> = NUMBERS.iter().map(u64::to_string).collect();
    let texts = [
        "__metadata__",
        "format",
        "dtype",
        "shape",
        "data_offsets",
        "weight_map",
        "metadata",
        "part-0.safetensors",
        "part-1.safetensors",
        "../x.safetensors",
        "/x.safetensors",
        "",
        "model.layers.0.a",
        "model.layers.1.a",
        "model.layers.01.a",
        "model.layers.99.a",
        "model.layers.18446744073709551616.a",
        "model.layers..a",
        "model.layers.0.experts.1.a",
        "model.layers.1.experts.01.a",
        "model.layers.0.experts.18446744073709551616",
        "model.layers.0",
        "F32",
        "F4",
        "X",
    ];
    words.extend(texts.map(|text| format!("\"{text}\"")));
    let others = [
        "-1",
        "1.5",
        "1e300",
        "18446744073709551616",
        "null",
        "true",
        "[]",
        "{}",
        "[",
        "]",
        "{",
        "}",
        ":",
        ",",
        "\"",
        "\\",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"é\"",
        "[[[[[[[[",
    ];
    words.extend(others.map(str::to_owned));
    words.into_iter().map(String::into_bytes).collect()
}

/// A file of safetensors: the tokens of its header, its data.
pub type Shard = (Tokens, Vec<u8>);

pub fn shards() -> impl Strategy<Value = Vec<Shard>> {
    let axes = prop::collection::vec(0_u64..4, 0..3);
    let tensor = (0..DTYPES.len(), axes, 0_u64..3, 0..4_usize, any::<u8>());
    prop::collection::vec(prop::collection::vec(tensor, 0..8), 1..3).prop_map(|shards| {
        let mut count = 0;
        let shard = shards.into_iter().map(|tensors| {
            let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
            header.insert("__metadata__".into(), json!({"format": "pt"}));
            for (dtype, mut shape, layer, part, byte) in tensors {
                count += 1;
                let (dtype, bits) = DTYPES[dtype];
                if bits < 8 {
                    shape.push(4);
                }
                let len = shape.iter().product::<u64>() * bits / 8;
                let (start, end) = (data.len(), data.len() + len as usize);
                data.extend((start..end).map(|at| byte.wrapping_add(at as u8)));
                let name = match part {
                    0 => format!("other.{count}"),
                    1 => format!("model.layers.{layer}.experts.{}.{count}", count % 3),
                    _ => format!("model.layers.{layer}.part.{count}"),
                };
                let described =
                    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]});
                header.insert(name, described);
            }
            (json_tokens(&Value::from(header).to_string()), data)
        });
        shard.collect()
    })
}

pub fn index_of(shards: &[Shard]) -> Tokens {
    let mut weight_map = BTreeMap::new();
    for (i, (tokens, _)) in shards.iter().enumerate() {
        let header: BTreeMap<String, Value> = serde_json::from_slice(&tokens.concat()).unwrap();
        for name in header.into_keys().filter(|name| name != "__metadata__") {
            weight_map.insert(name, format!("part-{i}.safetensors"));
        }
    }
    json_tokens(&json!({"metadata": {"total_size": 7}, "weight_map": weight_map}).to_string())
}

pub fn framed(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Checks a parser; whether it accepts the input.
pub fn header_survives(json: &[u8], data_len: u64) -> bool {
    let Ok(header) = bounded(json.len(), || Header::parse(json, data_len)) else {
        return false;
    };
    let written = header.to_bytes();
    assert_eq!(Header::parse(&written[8..], data_len).unwrap(), header);
    let total: u64 = header.tensors.iter().map(Tensor::len).sum();
    assert_eq!(total, data_len);
    true
}

pub fn index_survives(json: &[u8]) -> bool {
    let Ok(index) = bounded(json.len(), || Index::parse(json)) else {
        return false;
    };
    for file in index.files() {
        assert_eq!(Path::new("folder").join(file).components().count(), 2);
    }
    true
}

/// The bytes of all tensors, by name.
pub fn contents(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for shard in &checkpoint.shards {
        let bytes = fs::read(&shard.path).unwrap();
        for tensor in &shard.header.tensors {
            let start = shard.position(tensor) as usize;
            let content = bytes[start..start + tensor.len() as usize].to_vec();
            assert!(found.insert(tensor.name.clone(), content).is_none());
        }
    }
    found
}

pub fn checkpoint_survives(
    folder: &Path,
    out: &Path,
    num_layers: u64,
    survivors: &[u64],
    size: u64,
) -> bool {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let input = files
        .map(|file| file.metadata().unwrap().len() as usize)
        .sum();
    let Ok(checkpoint) = bounded(input, || Checkpoint::open(folder)) else {
        return false;
    };
    let Ok(cut) = Cut::new(vec!["model.layers.".into()], num_layers, survivors.to_vec()) else {
        return false;
    };
    let checkpoint = Arc::new(checkpoint);
    let kept: Vec<u64> = (0..3).filter(|expert| size >> expert & 1 == 1).collect();
    if let Ok(experts) = some_experts(&checkpoint, survivors, &kept) {
        cut_survives(
            &checkpoint,
            out,
            &cut.clone().with_experts(experts),
            (input, size),
            &kept,
        );
    }
    cut_survives(&checkpoint, out, &cut, (input, size), &[])
}

/// Three experts in every layer, of which some stay; stacks are all tensors that divide, and at
/// times one that may not.
fn some_experts(
    checkpoint: &Checkpoint,
    layers: &[u64],
    kept: &[u64],
) -> Result<Experts, shallower_core::checkpoint::Error> {
    let tensors = checkpoint
        .shards
        .iter()
        .flat_map(|shard| &shard.header.tensors);
    let stacks = tensors.filter(|tensor| {
        let outermost = tensor.shape.iter().find(|&&size| size != 1);
        let layer = layers.iter().any(|layer| {
            let head = format!("model.layers.{layer}.part");
            tensor.name.starts_with(&head)
        });
        layer && (outermost == Some(&3) || tensor.name.ends_with('7'))
    });
    let kept = layers.iter().map(|&layer| (layer, kept.to_vec())).collect();
    Experts::new(3, kept, stacks.map(|tensor| tensor.name.clone()).collect())
}

/// Makes a cut that is not refused, and compares it with the source; `kept` of three parts stay of
/// each stack.
fn cut_survives(
    checkpoint: &Arc<Checkpoint>,
    out: &Path,
    cut: &Cut,
    (input, size): (usize, u64),
    kept: &[u64],
) -> bool {
    let Ok(job) = bounded(input, || {
        Job::new(Arc::clone(checkpoint), cut.clone(), size)
    }) else {
        return false;
    };
    let _ = fs::remove_dir_all(out);
    fs::create_dir(out).unwrap();
    assert!(job.journal().contains("shallower.cut"));
    job.write(out, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
    for (name, len) in job.files() {
        assert_eq!(fs::metadata(out.join(name)).unwrap().len(), len);
    }
    let stacks: Value = serde_json::from_str(&job.journal()).unwrap();
    let stacks: BTreeSet<&str> = stacks["experts"]["stacks"]
        .as_array()
        .map_or_else(BTreeSet::new, |names| {
            names.iter().filter_map(Value::as_str).collect()
        });
    let expected = contents(checkpoint)
        .into_iter()
        .filter_map(|(name, bytes)| {
            let third = bytes.len() / 3;
            let part = |&expert: &u64| &bytes[expert as usize * third..][..third];
            let left = if stacks.contains(&*name) {
                kept.iter().flat_map(part).copied().collect()
            } else {
                bytes.clone()
            };
            Some((cut.rename(&name).unwrap()?, left))
        });
    assert!(contents(&Checkpoint::open(out).unwrap()) == expected.collect());
    true
}

thread_local! {
    /// A folder in memory, where there is one.
    static FOLDER: RefCell<tempfile::TempDir> = RefCell::new(
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
    );
}

pub type Files = (
    Vec<Shard>,
    Vec<Vec<Strike>>,
    Vec<Strike>,
    Option<(Place, Place)>,
);

pub fn whole_checkpoint(
    ((shards, strikes, on_index, cut), (n, bits, size)): (Files, (u64, u64, u64)),
) -> bool {
    FOLDER.with_borrow(|folder| {
        let (source, out) = (folder.path().join("source"), folder.path().join("out"));
        for folder in [&source, &out] {
            let _ = fs::remove_dir_all(folder);
            fs::create_dir(folder).unwrap();
        }
        let index = struck(index_of(&shards), &on_index);
        let mut files: Vec<_> = shards
            .into_iter()
            .zip(strikes)
            .map(|((tokens, data), strikes)| framed(&struck(tokens, &strikes), &data))
            .collect();
        if let Some((file, len)) = cut {
            let place = file.index(files.len());
            let len = len.index(files[place].len());
            files[place].truncate(len);
        }
        if let [file] = &*files {
            fs::write(source.join(SINGLE_FILE), file).unwrap();
        } else {
            fs::write(source.join(INDEX_FILE), index).unwrap();
            for (i, file) in files.iter().enumerate() {
                fs::write(source.join(format!("part-{i}.safetensors")), file).unwrap();
            }
        }
        let survivors: Vec<u64> = (0..n).filter(|layer| bits >> layer & 1 == 1).collect();
        checkpoint_survives(&source, &out, n, &survivors, size)
    })
}
