//! Checkpoints to test with, and a slow twin that reads every tensor.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use shallower_core::checkpoint::{
    Checkpoint, Cut, Error, Header, INDEX_FILE, Index, Job, SINGLE_FILE,
};
use tempfile::tempdir;

pub const DTYPES: [(&str, u64); 8] = [
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
pub type Given = (String, &'static str, Vec<u64>, Vec<u8>);
/// A tensor as a reader sees it.
pub type Seen = (String, Vec<usize>, Vec<u8>);

/// The bytes of a safetensors file, written by hand.
pub fn file_bytes(tensors: &[Given]) -> Vec<u8> {
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

pub fn framed(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Writes shards and, if there are several, their index.
pub fn write_checkpoint(folder: &Path, shards: &[Vec<Given>]) {
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
pub fn read_checkpoint(folder: &Path) -> BTreeMap<String, Seen> {
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

pub fn open(folder: &Path) -> Arc<Checkpoint> {
    Arc::new(Checkpoint::open(folder).unwrap())
}

pub fn job(folder: &Path, num_layers: u64, survivors: &[u64], max_shard_size: u64) -> Job {
    let cut = Cut::new(vec!["model.layers.".into()], num_layers, survivors.to_vec()).unwrap();
    Job::new(open(folder), cut, max_shard_size).unwrap()
}

pub fn write(job: &Job, folder: &Path) {
    job.write(folder, &mut |_, _| ControlFlow::Continue(()))
        .unwrap();
}

pub fn tensors() -> impl Strategy<Value = (u64, Vec<Vec<Given>>)> {
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

/// The content that the cut should have, name by name.
pub fn expected(shards: &[Vec<Given>], survivors: &[u64]) -> BTreeMap<String, (Vec<u64>, Vec<u8>)> {
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

pub fn survivors(num_layers: u64, mask: u64) -> Vec<u64> {
    let chosen: Vec<u64> = (0..num_layers).filter(|i| mask >> i & 1 == 1).collect();
    if chosen.is_empty() { vec![0] } else { chosen }
}

pub fn parse(bytes: &[u8]) -> Result<Header, String> {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join(SINGLE_FILE), bytes).unwrap();
    match Checkpoint::open(dir.path()) {
        Ok(mut checkpoint) => Ok(checkpoint.shards.remove(0).header),
        Err(Error::Damaged { what, .. }) => Err(what),
        Err(other) => panic!("{other}"),
    }
}
