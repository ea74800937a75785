//! Checkpoints on disk: the parsers against the reference implementation and against junk,
//! the cut against a slow twin that reads every tensor.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use shallower_core::checkpoint::{
    Checkpoint, Cut, Error, Header, INDEX_FILE, Index, Job, MAX_HEADER_BYTES, SINGLE_FILE,
};
use tempfile::{TempDir, tempdir};

const DTYPES: [(&str, u64); 8] = [
    ("F32", 32),
    ("BF16", 16),
    ("U8", 8),
    ("I64", 64),
    ("BOOL", 8),
    ("F8_E4M3", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
];

/// A tensor of a test: its name, dtype, shape and bytes.
type Given = (String, &'static str, Vec<u64>, Vec<u8>);
/// What a reader sees of it.
type Seen = (String, Vec<usize>, Vec<u8>);

/// The bytes of a safetensors file, written by hand.
fn file_bytes(tensors: &[Given]) -> Vec<u8> {
    let mut entries = vec![r#""__metadata__":{"format":"pt"}"#.to_owned()];
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        data.extend(bytes);
        let value = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        entries.push(format!("{}:{value}", Value::from(&**name)));
    }
    framed(&format!("{{{}}}", entries.join(",")), &data)
}

fn framed(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Writes shards and, if there are several, their index.
fn write_checkpoint(folder: &Path, shards: &[Vec<Given>]) {
    if let [only] = shards {
        fs::write(folder.join(SINGLE_FILE), file_bytes(only)).unwrap();
        return;
    }
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in shards.iter().enumerate() {
        let name = format!("part-{i}.safetensors");
        fs::write(folder.join(&name), file_bytes(tensors)).unwrap();
        for (tensor, ..) in tensors {
            weight_map.insert(tensor.clone(), name.clone());
        }
    }
    let index = json!({"metadata": {"total_size": 7}, "weight_map": weight_map});
    fs::write(folder.join(INDEX_FILE), index.to_string()).unwrap();
}

/// All tensors of a folder, by the reference implementation and the index.
fn read_checkpoint(folder: &Path) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut places = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|suffix| suffix != "safetensors")
        {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let texts = metadata.metadata().clone().unwrap_or_default();
        assert_eq!(texts.get("format").map(|f| &**f), Some("pt"));
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let data = view.data();
            let offset = data.as_ptr() as usize - bytes.as_ptr() as usize;
            let bits = view.dtype().bitsize();
            assert!(
                data.is_empty() || bits < 8 || offset.is_multiple_of(bits / 8),
                "{name} is not aligned"
            );
            let found = (
                format!("{:?}", view.dtype()),
                view.shape().to_vec(),
                data.to_vec(),
            );
            assert!(seen.insert(name.clone(), found).is_none());
            places.insert(name, path.file_name().unwrap().to_str().unwrap().to_owned());
        }
    }
    if let Ok(index) = fs::read(folder.join(INDEX_FILE)) {
        let index = Index::parse(&index).unwrap();
        assert_eq!(index.pairs, places.into_iter().collect::<Vec<_>>());
    }
    seen
}

fn open(folder: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(folder).unwrap())
}

fn job(folder: &Path, num_layers: u64, survivors: &[u64], max_shard_size: u64) -> Job {
    let cut = Cut::new(vec!["model.layers.".into()], num_layers, survivors.to_vec()).unwrap();
    Job::new(open(folder), cut, max_shard_size).unwrap()
}

fn write(job: &Job, folder: &Path) {
    job.write(folder, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
}

fn tensors() -> impl Strategy<Value = (u64, Vec<Vec<Given>>)> {
    let tensor = (
        0..DTYPES.len(),
        prop::collection::vec(0_u64..4, 0..3),
        any::<u8>(),
    );
    let layer = prop::collection::vec(tensor.clone(), 1..4);
    let shape = (
        prop::collection::vec(layer, 2..7),
        prop::collection::vec(tensor, 0..4),
        1_usize..4,
    );
    shape.prop_map(|(layers, others, num_shards)| {
        let mut shards = vec![Vec::new(); num_shards];
        let mut place = 0_usize;
        let mut put = |name: String, (dtype, mut shape, seed): (usize, Vec<u64>, u8)| {
            let (dtype, bits) = DTYPES[dtype];
            if bits < 8 {
                shape.push(4);
            }
            let len = (shape.iter().product::<u64>() * bits / 8) as usize;
            let bytes = (0..len).map(|i| seed.wrapping_add(i as u8)).collect();
            place = (place * 5 + 3 + usize::from(seed)) % num_shards;
            shards[place].push((name, dtype, shape, bytes));
        };
        let num_layers = layers.len() as u64;
        for (i, layer) in layers.into_iter().enumerate() {
            for (j, tensor) in layer.into_iter().enumerate() {
                put(format!("model.layers.{i}.part.{j}"), tensor);
            }
        }
        for (i, tensor) in others.into_iter().enumerate() {
            put(format!("other.layers.{i}\n\"é"), tensor);
        }
        shards.retain(|shard: &Vec<Given>| !shard.is_empty());
        (num_layers, shards)
    })
}

/// What the cut should hold, name by name.
fn expected(shards: &[Vec<Given>], survivors: &[u64]) -> BTreeMap<String, (Vec<u64>, Vec<u8>)> {
    let mut kept = BTreeMap::new();
    for (name, _, shape, bytes) in shards.iter().flatten() {
        let parts: Vec<&str> = name.splitn(4, '.').collect();
        let name = if parts[0] == "model" {
            let Some(new) = survivors.iter().position(|s| s.to_string() == parts[2]) else {
                continue;
            };
            format!("model.layers.{new}.{}", parts[3])
        } else {
            name.clone()
        };
        kept.insert(name, (shape.clone(), bytes.clone()));
    }
    kept
}

fn survivors(num_layers: u64, mask: u64) -> Vec<u64> {
    let chosen: Vec<u64> = (0..num_layers).filter(|i| mask >> i & 1 == 1).collect();
    if chosen.is_empty() { vec![0] } else { chosen }
}

fn parse(bytes: &[u8]) -> Result<Header, String> {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join(SINGLE_FILE), bytes).unwrap();
    match Checkpoint::open(dir.path()) {
        Ok(mut checkpoint) => Ok(checkpoint.shards.remove(0).header),
        Err(Error::Damaged { what, .. }) => Err(what),
        Err(other) => panic!("{other}"),
    }
}

/// JSON near to a header, with everything that could be wrong about it.
fn header_like() -> impl Strategy<Value = String> {
    let number = prop_oneof![
        4 => (0_u64..40).prop_map(|n| n.to_string()),
        1 => any::<i64>().prop_map(|n| n.to_string()),
        1 => Just("18446744073709551616".to_owned()),
        1 => any::<f64>().prop_map(|n| n.to_string()),
    ];
    let dtype = prop_oneof![
        4 => prop::sample::select(DTYPES.map(|(name, _)| name).to_vec()).prop_map(str::to_owned),
        1 => "[A-Z0-9_]{0,6}",
    ];
    let list = prop::collection::vec(number.clone(), 0..4).prop_map(|axes| axes.join(","));
    let tensor = (dtype, list, number.clone(), number, "[ab]{1,2}").prop_map(
        |(dtype, shape, start, end, name)| {
            format!(
                r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}"#
            )
        },
    );
    prop::collection::vec(tensor, 0..4).prop_map(|entries| format!("{{{}}}", entries.join(",")))
}

fn check_invariants(header: &Header, data_len: u64) {
    let mut end = 0;
    for tensor in &header.tensors {
        assert_eq!(tensor.start, end);
        assert!(tensor.end >= tensor.start);
        end = tensor.end;
    }
    assert_eq!(end, data_len);
    let written = header.to_bytes();
    assert_eq!(written.len() % 8, 0);
    assert_eq!(&Header::parse(&written[8..], data_len).unwrap(), header);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(128)
    ))]

    #[test]
    fn junk_is_no_header(bytes in prop::collection::vec(any::<u8>(), 0..200), len in any::<u64>()) {
        if let Ok(header) = Header::parse(&bytes, len) {
            check_invariants(&header, len);
        }
        let _ = parse(&bytes);
    }

    #[test]
    fn what_is_accepted_the_reference_accepts(text in header_like(), data_len in 0_usize..40) {
        let bytes = framed(&text, &vec![0; data_len]);
        let ours = parse(&bytes);
        let theirs = SafeTensors::read_metadata(&bytes);
        if let Ok(header) = &ours {
            check_invariants(header, data_len as u64);
            let known = |t: &shallower_core::checkpoint::Tensor| DTYPES.iter().any(|(d, _)| *d == t.dtype);
            if header.tensors.iter().all(known) {
                prop_assert!(theirs.is_ok(), "{text} {theirs:?}");
            }
        } else if theirs.is_ok() {
            prop_assert!(ours.unwrap_err().contains("twice"), "{}", text);
        }
    }

    #[test]
    fn a_damaged_file_is_refused_or_read_as_the_reference_does(
        (_, shards) in tensors(), damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..3),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = file_bytes(&shards[0]);
        for (place, byte) in damage {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let theirs = SafeTensors::read_metadata(&bytes);
        match parse(&bytes) {
            Ok(header) => prop_assert!(
                theirs.is_ok() || header.tensors.iter().any(|t| !DTYPES.iter().any(|(d, _)| *d == t.dtype)),
                "{:?}", theirs
            ),
            Err(what) => prop_assert!(
                theirs.is_err() || ["twice", "unknown field", "begin with"].iter().any(|w| what.contains(w)),
                "{}", what
            ),
        }
    }

    #[test]
    fn junk_is_no_index(text in ".{0,60}", file in ".{0,20}", tensor in ".{0,20}") {
        let _ = Index::parse(text.as_bytes());
        let index = json!({"weight_map": {tensor: file}}).to_string();
        if let Ok(index) = Index::parse(index.as_bytes()) {
            let path = Path::new("folder").join(&index.pairs[0].1);
            prop_assert_eq!(path.parent(), Some(Path::new("folder")));
            prop_assert_eq!(path.components().count(), 2);
        }
    }

    #[test]
    fn a_cut_equals_the_slow_twin((n, shards) in tensors(), mask in any::<u64>(), size in 1_u64..200) {
        let (source, out, again) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        write_checkpoint(source.path(), &shards);
        let survivors = survivors(n, mask);
        let job = job(source.path(), n, &survivors, size);
        let mut last = (0, 0);
        job.write(out.path(), &mut |done, total| {
            assert!(done >= last.0 && done <= total);
            last = (done, total);
            ControlFlow::Continue(())
        }).unwrap();
        let seen = read_checkpoint(out.path());
        let wanted = expected(&shards, &survivors);
        prop_assert_eq!(seen.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
        for (name, (_, _, bytes)) in &seen {
            prop_assert_eq!(bytes, &wanted[name].1);
        }
        let total: u64 = wanted.values().map(|(_, bytes)| bytes.len() as u64).sum();
        prop_assert_eq!(job.total_bytes(), total);
        prop_assert!(total == 0 || last == (total, total));
        for (name, len) in job.files() {
            prop_assert_eq!(fs::metadata(out.path().join(name)).unwrap().len(), len);
        }
        write(&job, again.path());
        for entry in fs::read_dir(out.path()).unwrap() {
            let name = entry.unwrap().file_name();
            prop_assert_eq!(fs::read(out.path().join(&name)).unwrap(), fs::read(again.path().join(&name)).unwrap());
        }
    }

    #[test]
    fn a_stopped_job_goes_on((n, shards) in tensors(), mask in any::<u64>(), size in 1_u64..60, stop in 0_usize..6) {
        let (source, out, whole) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
        write_checkpoint(source.path(), &shards);
        let survivors = survivors(n, mask);
        let job = job(source.path(), n, &survivors, size);
        write(&job, whole.path());
        let mut calls = 0;
        let stopped = job.write(out.path(), &mut |_, _| {
            calls += 1;
            if calls > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        prop_assert!(stopped.is_ok() || matches!(stopped, Err(Error::Cancelled)));
        let complete: Vec<_> = job.files().iter().map(|(name, _)| out.path().join(name))
            .filter(|path| path.exists() && !path.ends_with(INDEX_FILE))
            .map(|path| (fs::metadata(&path).unwrap().ino(), path)).collect();
        write(&job, out.path());
        for (inode, path) in complete {
            prop_assert_eq!(fs::metadata(path).unwrap().ino(), inode);
        }
        prop_assert_eq!(read_checkpoint(out.path()), read_checkpoint(whole.path()));
        prop_assert_eq!(fs::read_dir(out.path()).unwrap().count(), job.files().len());
    }
}

fn refused(header: &str, data: &[u8], words: &str) {
    let what = parse(&framed(header, data)).unwrap_err();
    assert!(what.contains(words), "{header}: {what}");
}

fn tensor(name: &str, dtype: &str, shape: &str, start: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]}}"#)
}

#[test]
fn hostile_headers_are_refused_with_the_reason() {
    let a = tensor("a", "U8", "[4]", 0, 4);
    let two = |b: String| format!("{{{a},{b}}}");
    refused(
        &two(tensor("b", "U8", "[4]", 2, 6)),
        &[0; 6],
        "a and b overlap",
    );
    refused(
        &two(tensor("b", "U8", "[4]", 5, 9)),
        &[0; 9],
        "4 .. 5 belong to no tensor",
    );
    refused(&two(a.clone()), &[0; 4], "a is named twice");
    refused(&format!("{{{a}}}"), &[0; 3], "need 4 bytes, it holds 3");
    refused(&format!("{{{a}}}"), &[0; 5], "need 4 bytes, it holds 5");
    refused(
        &format!("{{{}}}", tensor("a", "F32", "[4]", 0, 4)),
        &[0; 4],
        "needs 128 bits",
    );
    refused(
        &format!("{{{}}}", tensor("a", "F4", "[3]", 0, 1)),
        &[0; 1],
        "needs 12 bits",
    );
    refused(
        &format!("{{{}}}", tensor("a", "U8", "[4]", 4, 0)),
        &[],
        "before its start",
    );
    let huge = tensor("a", "U8", "[4294967296,4294967296]", 0, 4);
    refused(&format!("{{{huge}}}"), &[0; 4], "overflows");
    let huge = tensor("a", "F64", "[2305843009213693952]", 0, 0);
    refused(&format!("{{{huge}}}"), &[], "overflows");
    refused(
        &format!("{{{}}}", tensor("a", "NEW", "[0]", 0, 4)),
        &[0; 4],
        "no values but 4 bytes",
    );
    refused(
        &format!("{{{}}}", tensor("a", "U8", "[-1]", 0, 4)),
        &[0; 4],
        "broken",
    );
    let deep = format!("[{}1]", "1,".repeat(64));
    refused(
        &format!("{{{}}}", tensor("a", "U8", &deep, 0, 1)),
        &[0; 1],
        "at most 64 axes",
    );
    refused(
        r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}"#,
        &[0],
        "unknown field",
    );
    refused(r#"{"__metadata__":{"a":"1","a":"2"}}"#, &[], "come twice");
    refused(r#"{"__metadata__":{},"__metadata__":{}}"#, &[], "duplicate");
    refused(" {}", &[], "begin with");
    refused("{} {}", &[], "broken");
    refused(&"[".repeat(100_000), &[], "begin with");
    refused(&format!("{{\"a\":{}", "[".repeat(100_000)), &[], "broken");
}

#[test]
fn unknown_dtypes_are_taken_by_their_offsets() {
    let text = format!(
        "{{{},{}}}",
        tensor("a", "F3_NEW", "[8]", 0, 3),
        tensor("b", "U8", "[4]", 3, 7)
    );
    let header = parse(&framed(&text, &[0; 7])).unwrap();
    assert_eq!(header.tensors.len(), 2);
    assert_eq!(header.tensors[0].bits(), 3);
}

#[test]
fn a_header_is_read_only_as_far_as_the_file_goes() {
    let long = |len: u64| parse(&[&len.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
    assert!(long(u64::MAX).contains("at most 100000000"));
    assert!(long(MAX_HEADER_BYTES + 1).contains("at most 100000000"));
    assert!(long(MAX_HEADER_BYTES).contains("the file has 10"));
    assert!(long(3).contains("the file has 10"));
    assert!(parse(b"1234567").unwrap_err().contains("7 bytes"));
}

fn with_index(index: &str) -> (TempDir, Result<Checkpoint, Error>) {
    let dir = tempdir().unwrap();
    fs::write(
        dir.path().join("a.safetensors"),
        file_bytes(&[("x".into(), "U8", vec![1], vec![7])]),
    )
    .unwrap();
    fs::write(dir.path().join(INDEX_FILE), index).unwrap();
    let opened = Checkpoint::open(dir.path());
    (dir, opened)
}

#[test]
fn hostile_indices_are_refused() {
    let outer = "expected the plain name";
    for (file, words) in [
        ("../a.safetensors", outer),
        ("/etc/a.safetensors", outer),
        ("b/a.safetensors", outer),
        ("..\\\\a.safetensors", outer),
        ("C:a.safetensors", outer),
        ("a.safetensors\\u0000", outer),
        ("..", outer),
        ("", outer),
        (".safetensors", outer),
        ("pytorch_model.bin", outer),
        ("missing.safetensors", "missing.safetensors"),
    ] {
        let (_dir, opened) = with_index(&format!(r#"{{"weight_map":{{"x":"{file}"}}}}"#));
        let message = opened.unwrap_err().to_string();
        assert!(message.contains(words), "{file}: {message}");
    }
    for (index, words) in [
        (
            r#"{"weight_map":{"x":"a.safetensors","y":"a.safetensors"}}"#,
            "y in a.safetensors, which lacks it",
        ),
        (
            r#"{"weight_map":{"x":"a.safetensors","x":"a.safetensors"}}"#,
            "named twice",
        ),
        (r#"{"weight_map":{}}"#, "names no tensor"),
        (r#"{"weight_map":{"x":3}}"#, "broken"),
        (r#"{"weight_map":["x"]}"#, "broken"),
        (
            r#"{"weight_map":{"x":"a.safetensors"},"weight_map":{}}"#,
            "duplicate",
        ),
        ("{}", "weight_map"),
        ("", "broken"),
    ] {
        let (_dir, opened) = with_index(index);
        let message = opened.unwrap_err().to_string();
        assert!(message.contains(words), "{index}: {message}");
    }
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let (dir, opened) = with_index(r#"{"weight_map":{"x":"a.safetensors"}}"#);
    opened.unwrap();
    let both = r#"{"weight_map":{"x":"a.safetensors","y":"b.safetensors"}}"#;
    fs::write(dir.path().join(INDEX_FILE), both).unwrap();
    let given = ["x", "y"].map(|name| (name.into(), "U8", vec![1], vec![7]));
    fs::write(dir.path().join("b.safetensors"), file_bytes(&given)).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("x is in a.safetensors and in b.safetensors"),
        "{message}"
    );
}

#[test]
fn links_stay_in_the_folder_or_the_hubs_blobs() {
    let hub = tempdir().unwrap();
    let snapshot = hub.path().join("models--a--b/snapshots/0123");
    let blobs = hub.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    let bytes = file_bytes(&[("x".into(), "U8", vec![1], vec![7])]);
    fs::write(blobs.join("f00"), &bytes).unwrap();
    symlink("../../blobs/f00", snapshot.join(SINGLE_FILE)).unwrap();
    assert_eq!(open(&snapshot).shards[0].header.tensors.len(), 1);

    let elsewhere = tempdir().unwrap();
    fs::write(elsewhere.path().join("x"), &bytes).unwrap();
    symlink(elsewhere.path().join("x"), hub.path().join(SINGLE_FILE)).unwrap();
    assert!(matches!(
        Checkpoint::open(hub.path()),
        Err(Error::Outside { .. })
    ));
    fs::remove_file(hub.path().join(SINGLE_FILE)).unwrap();
    symlink("nowhere", hub.path().join(SINGLE_FILE)).unwrap();
    assert!(matches!(
        Checkpoint::open(hub.path()),
        Err(Error::Read { .. })
    ));
    fs::remove_file(hub.path().join(SINGLE_FILE)).unwrap();
    fs::create_dir(hub.path().join(SINGLE_FILE)).unwrap();
    let message = Checkpoint::open(hub.path()).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
    assert!(matches!(
        Checkpoint::open(elsewhere.path()),
        Err(Error::NoWeights(_))
    ));
    assert!(matches!(
        Checkpoint::open(&hub.path().join("no")),
        Err(Error::Read { .. })
    ));
}

#[test]
fn a_cut_names_layers_that_are_there() {
    let cut = |prefixes: &[&str], n, survivors: &[u64]| {
        Cut::new(
            prefixes.iter().map(|&p| p.to_owned()).collect(),
            n,
            survivors.to_vec(),
        )
    };
    for (n, survivors) in [
        (3, &[][..]),
        (3, &[3]),
        (3, &[1, 1]),
        (3, &[2, 0]),
        (0, &[0]),
    ] {
        assert!(matches!(
            cut(&["l."], n, survivors),
            Err(Error::Survivors { .. })
        ));
    }
    for prefix in ["", ".", "layers"] {
        assert!(matches!(cut(&[prefix], 3, &[0]), Err(Error::Prefix(_))));
    }
    let cut = cut(&["a.l.", "b.l."], 12, &[0, 2, 11]).unwrap();
    for (name, new) in [
        ("a.l.0.w", Some("a.l.0.w")),
        ("a.l.1.w", None),
        ("b.l.2.w.l.2", Some("b.l.1.w.l.2")),
        ("a.l.11", Some("a.l.2")),
        ("a.l.norm", Some("a.l.norm")),
        ("c.l.1.w", Some("c.l.1.w")),
        ("xa.l.1.w", Some("xa.l.1.w")),
        ("a.l..w", Some("a.l..w")),
    ] {
        assert_eq!(cut.rename(name).unwrap().as_deref(), new, "{name}");
    }
    for name in [
        "a.l.12.w",
        "a.l.00.w",
        "a.l.02.w",
        "a.l.99999999999999999999.w",
    ] {
        assert!(
            matches!(cut.rename(name), Err(Error::NoSuchLayer { .. })),
            "{name}"
        );
    }
}

fn small() -> (TempDir, TempDir) {
    let (source, out) = (tempdir().unwrap(), tempdir().unwrap());
    let given = |i: u8| (format!("model.layers.{i}.w"), "U8", vec![5], vec![i; 5]);
    write_checkpoint(
        source.path(),
        &[vec![given(0), given(1)], vec![given(2), given(3)]],
    );
    (source, out)
}

#[test]
fn a_source_that_changes_is_refused() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let path = source.path().join("part-0.safetensors");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let failed = job.write(out.path(), &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(failed, Err(Error::Changed(_))), "{failed:?}");
    fs::write(&path, &bytes).unwrap();
    let failed = job.write(out.path(), &mut |_, _| ControlFlow::Continue(()));
    assert!(matches!(failed, Err(Error::Changed(_))), "{failed:?}");
}

#[test]
fn shards_that_are_not_this_jobs_are_written_anew() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let (name, len) = (job.files()[0].0.to_owned(), job.files()[0].1);
    fs::write(out.path().join(&name), vec![0; len as usize]).unwrap();
    fs::write(out.path().join(format!(".{name}.partial")), [1; 1000]).unwrap();
    write(&job, out.path());
    assert_eq!(read_checkpoint(out.path()).len(), 2);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 3);
}

#[test]
fn a_journal_is_of_one_job() {
    let (source, _out) = small();
    let journal = job(source.path(), 4, &[0, 2], 5).journal();
    assert_eq!(journal, job(source.path(), 4, &[0, 2], 5).journal());
    assert_ne!(journal, job(source.path(), 4, &[0, 1], 5).journal());
    assert_ne!(journal, job(source.path(), 4, &[0, 2], 6).journal());
    let path = source.path().join("part-0.safetensors");
    let text = fs::read(&path).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(&path, text).unwrap();
    assert_ne!(journal, job(source.path(), 4, &[0, 2], 5).journal());
}

#[test]
fn shards_have_the_size_that_is_asked() {
    let (source, _out) = small();
    for (size, files) in [(1, 5), (5, 5), (10, 3), (19, 3), (20, 1), (u64::MAX, 1)] {
        let names = job(source.path(), 4, &[0, 1, 2, 3], size);
        assert_eq!(names.files().len(), files, "{size}");
    }
    assert_eq!(job(source.path(), 4, &[1], 20).files()[0].0, SINGLE_FILE);
    let cut = Cut::new(vec!["model.layers.".into()], 4, vec![0]).unwrap();
    assert!(matches!(
        Job::new(open(source.path()), cut, 0),
        Err(Error::ShardSize { .. })
    ));
}

#[test]
fn a_place_that_cannot_be_written_to_is_an_error() {
    let (source, out) = small();
    let job = job(source.path(), 4, &[0, 2], 5);
    let failed = job.write(
        &out.path().join("no"),
        &mut |_, _| ControlFlow::Continue(()),
    );
    assert!(matches!(failed, Err(Error::Write { .. })), "{failed:?}");
}
