//! The parsers of headers, indexes and GGUF files, and the planning of cuts on top of them,
//! for as long as asked: `FUZZ_SECONDS=3600 make fuzz`, and a moment in every test run.
//!
//! Files are made valid, as lists of tokens, and then a few tokens are struck: replaced by
//! numbers and words that the formats know, copied, deleted, swapped, changed in a byte. A parser
//! must not panic, must not allocate more than in proportion to its input, and must refuse the
//! file or make a cut that it reads again, with the bytes of the source.
#![allow(unsafe_code)] // the allocator that counts

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::{Index as Place, select};
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use shallower_core::checkpoint::{
    Checkpoint, Cut, Header, INDEX_FILE, Index, Job, SINGLE_FILE, Tensor,
};
use shallower_core::gguf::Gguf;

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(held, Ordering::Relaxed);
        // SAFETY: the caller's, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's, passed on.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that a parser may hold for each byte that it reads, and for none.
const PER_BYTE: usize = 64;
const AT_LEAST: usize = 16 << 10;

/// Runs a parser on so many bytes and holds its memory against them.
fn bounded<T>(input: usize, parse: impl FnOnce() -> T) -> T {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let parsed = parse();
    let peak = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    let allowed = AT_LEAST + PER_BYTE * input;
    assert!(
        peak <= allowed,
        "{peak} bytes are held for {input} of input"
    );
    parsed
}

type Tokens = Vec<Vec<u8>>;

/// What is done to a list of tokens.
#[derive(Debug, Clone)]
enum Strike {
    Replace(Place, Vec<u8>),
    Add(Place, i8),
    Copy(Place, Place, Place),
    Delete(Place, Place),
    Swap(Place, Place),
    Byte(Place, Place, u8),
}

fn strikes(words: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<Strike>> {
    let place = any::<Place>;
    let strike = prop_oneof![
        4 => (place(), select(words)).prop_map(|(at, word)| Strike::Replace(at, word)),
        2 => (place(), any::<i8>()).prop_map(|(at, more)| Strike::Add(at, more)),
        1 => (place(), place(), place()).prop_map(|(a, b, to)| Strike::Copy(a, b, to)),
        1 => (place(), place()).prop_map(|(a, b)| Strike::Delete(a, b)),
        1 => (place(), place()).prop_map(|(a, b)| Strike::Swap(a, b)),
        2 => (place(), place(), any::<u8>()).prop_map(|(at, in_it, byte)| Strike::Byte(at, in_it, byte)),
    ];
    prop::collection::vec(strike, 0..4)
}

/// A short stretch of tokens from one place, at most up to another.
fn stretch(from: Place, to: Place, len: usize) -> Range<usize> {
    let start = from.index(len);
    start..len.min(start + 1 + to.index(12))
}

fn struck(mut tokens: Tokens, strikes: &[Strike]) -> Vec<u8> {
    for strike in strikes {
        let len = tokens.len();
        if len == 0 {
            break;
        }
        match strike {
            Strike::Replace(at, word) => tokens[at.index(len)].clone_from(word),
            Strike::Add(at, more) => add(&mut tokens[at.index(len)], *more),
            Strike::Copy(a, b, to) => {
                let copied = tokens[stretch(*a, *b, len)].to_vec();
                let to = to.index(len);
                tokens.splice(to..to, copied);
            }
            Strike::Delete(a, b) => drop(tokens.drain(stretch(*a, *b, len))),
            Strike::Swap(a, b) => tokens.swap(a.index(len), b.index(len)),
            Strike::Byte(at, in_it, byte) => {
                let token = &mut tokens[at.index(len)];
                if !token.is_empty() {
                    let place = in_it.index(token.len());
                    token[place] = *byte;
                }
            }
        }
    }
    tokens.concat()
}

/// Adds to a number, in digits or little-endian.
fn add(token: &mut Vec<u8>, more: i8) {
    let text = std::str::from_utf8(token).ok();
    if let Some(number) = text.and_then(|text| text.parse::<u64>().ok()) {
        *token = number.wrapping_add_signed(more.into()).to_string().into();
    } else if token.len() <= 8 {
        let mut bytes = [0; 8];
        bytes[..token.len()].copy_from_slice(token);
        let sum = u64::from_le_bytes(bytes).wrapping_add_signed(more.into());
        let len = token.len();
        token.copy_from_slice(&sum.to_le_bytes()[..len]);
    }
}

const NUMBERS: [u64; 14] = [
    0,
    1,
    8,
    9,
    255,
    1 << 16,
    1 << 31,
    1 << 32,
    1 << 61,
    1 << 63,
    u64::MAX,
    u64::MAX - 7,
    i64::MAX as u64,
    u64::MAX / 8,
];

// Safetensors.

const DTYPES: [(&str, u64); 8] = [
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
fn json_tokens(text: &str) -> Tokens {
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

fn json_words() -> Vec<Vec<u8>> {
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
type Shard = (Tokens, Vec<u8>);

fn shards() -> impl Strategy<Value = Vec<Shard>> {
    let axes = prop::collection::vec(0_u64..4, 0..3);
    let tensor = (0..DTYPES.len(), axes, 0_u64..3, 0..3_usize, any::<u8>());
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
                data.resize(end, byte);
                let name = match part {
                    0 => format!("other.{count}"),
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

fn index_of(shards: &[Shard]) -> Tokens {
    let mut weight_map = BTreeMap::new();
    for (i, (tokens, _)) in shards.iter().enumerate() {
        let header: BTreeMap<String, Value> = serde_json::from_slice(&tokens.concat()).unwrap();
        for name in header.into_keys().filter(|name| name != "__metadata__") {
            weight_map.insert(name, format!("part-{i}.safetensors"));
        }
    }
    json_tokens(&json!({"metadata": {"total_size": 7}, "weight_map": weight_map}).to_string())
}

fn framed(header: &[u8], data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header, data].concat()
}

/// Checks a parser; whether it accepts the input.
fn header_survives(json: &[u8], data_len: u64) -> bool {
    let Ok(header) = bounded(json.len(), || Header::parse(json, data_len)) else {
        return false;
    };
    let written = header.to_bytes();
    assert_eq!(Header::parse(&written[8..], data_len).unwrap(), header);
    let total: u64 = header.tensors.iter().map(Tensor::len).sum();
    assert_eq!(total, data_len);
    true
}

fn index_survives(json: &[u8]) -> bool {
    let Ok(index) = bounded(json.len(), || Index::parse(json)) else {
        return false;
    };
    for file in index.files() {
        assert_eq!(Path::new("folder").join(file).components().count(), 2);
    }
    true
}

/// The bytes of all tensors, by name.
fn contents(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<u8>> {
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

fn checkpoint_survives(
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
    let Ok(job) = bounded(input, || {
        Job::new(Arc::clone(&checkpoint), cut.clone(), size)
    }) else {
        return false;
    };
    assert!(job.journal().contains("shallower.cut"));
    job.write(out, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
    for (name, len) in job.files() {
        assert_eq!(fs::metadata(out.join(name)).unwrap().len(), len);
    }
    let expected = contents(&checkpoint).into_iter();
    let expected = expected.filter_map(|(name, bytes)| Some((cut.rename(&name).unwrap()?, bytes)));
    assert!(contents(&Checkpoint::open(out).unwrap()) == expected.collect());
    true
}

// GGUF.

const ARCHITECTURES: [&str; 10] = [
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
const KEYS: [&str; 22] = [
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
    "x",
];

fn gguf_text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn gguf_words() -> Vec<Vec<u8>> {
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
        "",
    ];
    words.extend(names.map(gguf_text));
    words
}

/// A value: its type and bytes, each a token.
fn gguf_value(blocks: u32) -> impl Strategy<Value = Tokens> {
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
fn gguf() -> impl Strategy<Value = (Tokens, usize, Vec<u8>)> {
    (1_u32..6, select(ARCHITECTURES.to_vec()), 3_u32..7).prop_flat_map(|(blocks, arch, log)| {
        let entry = (select(KEYS[1..].to_vec()), gguf_value(blocks));
        let entries = prop::collection::btree_map(entry.0, entry.1, 0..4);
        let tensors = prop::collection::vec((0..blocks, 1_u64..5, any::<u8>()), 0..6);
        (entries, tensors).prop_map(move |(entries, tensors)| {
            let alignment = 1_usize << log;
            let number = |value: u32| value.to_le_bytes().to_vec();
            let mut tokens = vec![b"GGUF".to_vec(), number(3)];
            tokens.push(
                (tensors.len() as u64 + u64::from(blocks))
                    .to_le_bytes()
                    .to_vec(),
            );
            tokens.push((entries.len() as u64 + 3).to_le_bytes().to_vec());
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
            for (key, value) in entries {
                tokens.push(gguf_text(&format!("{arch}.{key}")));
                tokens.extend(value);
            }
            let mut data = Vec::new();
            let every = (0..blocks).map(|block| (block, 2, 7));
            for (i, (block, len, byte)) in every.chain(tensors).enumerate() {
                tokens.extend([gguf_text(&format!("blk.{block}.t{i}")), number(1)]);
                tokens.push(len.to_le_bytes().to_vec());
                tokens.extend([number(0), (data.len() as u64).to_le_bytes().to_vec()]);
                data.resize(data.len() + 4 * len as usize, byte);
                data.resize(data.len().next_multiple_of(alignment), 0);
            }
            (tokens, alignment, data)
        })
    })
}

fn gguf_survives(file: &[u8], bits: usize) -> bool {
    let mut source = Cursor::new(file);
    let Ok(read) = bounded(file.len(), || Gguf::read(&mut source)) else {
        return false;
    };
    let layers = read.num_layers().min(64);
    let survivors: Vec<usize> = (0..layers).filter(|layer| bits >> layer & 1 == 1).collect();
    let Ok(cut) = bounded(file.len(), || read.cut(&mut source, &survivors)) else {
        return false;
    };
    let mut out = Vec::new();
    cut.write(&mut source, &mut out, &mut |_| true).unwrap();
    assert_eq!(out.len() as u64, cut.size());
    let again = Gguf::read(&mut Cursor::new(&*out)).unwrap();
    assert_eq!(again.num_layers(), survivors.len());
    true
}

// The loop.

/// What the last panic said, and where: each of them is many while a failure is made small.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

/// A thing to fuzz: runs some cases, and tells how many of them it accepted.
struct Target {
    name: &'static str,
    batch: Box<dyn Fn(&mut TestRunner) -> u64>,
}

fn target<S: Strategy + 'static>(
    name: &'static str,
    input: S,
    check: fn(S::Value) -> bool,
) -> Target {
    let batch = move |runner: &mut TestRunner| {
        let accepted = Cell::new(0);
        let checked = runner.run(&input, |value| {
            accepted.set(accepted.get() + u64::from(check(value)));
            Ok(())
        });
        if let Err(error) = checked {
            println!("{name}: {error}\n{}", LAST_PANIC.lock().unwrap());
            panic!();
        }
        accepted.get()
    };
    Target {
        name,
        batch: Box::new(batch),
    }
}

thread_local! {
    /// A folder in memory, where there is one.
    static FOLDER: RefCell<tempfile::TempDir> = RefCell::new(
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
    );
}

type Files = (
    Vec<Shard>,
    Vec<Vec<Strike>>,
    Vec<Strike>,
    Option<(Place, Place)>,
);

fn whole_checkpoint(
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

fn targets() -> Vec<Target> {
    let noise = || prop::collection::vec(prop_oneof![3 => 0_u8..14, 1 => any::<u8>()], 0..300);
    let file = (
        shards(),
        prop::collection::vec(strikes(json_words()), 3),
        strikes(json_words()),
        prop::option::weighted(0.1, any::<(Place, Place)>()),
    );
    vec![
        target(
            "headers",
            (shards(), strikes(json_words()), 0_u64..40),
            |(mut shards, strikes, more)| {
                let (tokens, data) = shards.remove(0);
                let json = struck(tokens, &strikes);
                header_survives(&json, more) | header_survives(&json, data.len() as u64)
            },
        ),
        target(
            "indexes",
            (shards(), strikes(json_words())),
            |(shards, strikes)| index_survives(&struck(index_of(&shards), &strikes)),
        ),
        target(
            "checkpoints",
            (file, (2_u64..6, any::<u64>(), 1_u64..200)),
            whole_checkpoint,
        ),
        target(
            "gguf files",
            (
                gguf(),
                strikes(gguf_words()),
                any::<usize>(),
                prop::option::weighted(0.1, any::<Place>()),
            ),
            |((tokens, alignment, data), strikes, bits, cut)| {
                let mut file = struck(tokens, &strikes);
                file.resize(file.len().next_multiple_of(alignment), 0);
                file.extend(data);
                if let Some(place) = cut {
                    file.truncate(place.index(file.len()));
                }
                gguf_survives(&file, bits) | gguf_survives(&file, bits | 1)
            },
        ),
        target("noise", (noise(), any::<u64>()), |(bytes, number)| {
            let json = header_survives(&bytes, number) | index_survives(&bytes);
            let start = [
                &b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..],
                &bytes,
            ]
            .concat();
            json | gguf_survives(&bytes, number as usize) | gguf_survives(&start, number as usize)
        }),
    ]
}

#[test]
fn parsers_survive() {
    let seconds = std::env::var("FUZZ_SECONDS").ok();
    let seconds = seconds.map_or(3, |seconds| seconds.parse().unwrap());
    std::panic::set_hook(Box::new(|info| {
        *LAST_PANIC.lock().unwrap() = info.to_string();
    }));
    let (began, mut told) = (Instant::now(), Instant::now());
    let targets = targets();
    let config = Config {
        cases: 256,
        failure_persistence: None,
        ..Config::default()
    };
    let (mut cases, mut accepted) = (0, vec![0; targets.len()]);
    while began.elapsed() < Duration::from_secs(seconds) {
        for (target, accepted) in targets.iter().zip(&mut accepted) {
            *accepted += (target.batch)(&mut TestRunner::new(config.clone()));
        }
        cases += config.cases;
        if told.elapsed() > Duration::from_secs(60) {
            told = Instant::now();
            tell(began.elapsed(), cases, &targets, &accepted);
        }
    }
    tell(began.elapsed(), cases, &targets, &accepted);
}

fn tell(time: Duration, cases: u32, targets: &[Target], accepted: &[u64]) {
    let each = targets.iter().zip(accepted);
    let counts: Vec<_> = each.map(|(t, n)| format!("{n} {}", t.name)).collect();
    let counts = counts.join(", ");
    println!(
        "{} s: {cases} cases of each, accepted: {counts}",
        time.as_secs()
    );
}
