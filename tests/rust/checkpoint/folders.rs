//! Folders whose index, files or links are not what they should be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use proptest::prelude::*;
use serde_json::json;
use shallower_core::checkpoint::{Checkpoint, Error, INDEX_FILE, Index, SINGLE_FILE};
use tempfile::{TempDir, tempdir};

use super::files::{file_bytes, open};

proptest! {
    #![proptest_config(crate::config(128))]

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
