//! A cut laid out: which bytes go where, and the copy that can be killed and goes on.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use serde_json::json;

use super::copy::{self, Piece, Progress};
use super::cut::Cut;
use super::error::Error;
use super::experts::{Experts, Stays};
use super::header::{Header, MAX_HEADER_BYTES, Tensor};
use super::source::{Checkpoint, INDEX_FILE, SINGLE_FILE, Shard};

/// A cut of a checkpoint, ready to be written.
#[derive(Debug)]
pub struct Job {
    checkpoint: Arc<Checkpoint>,
    cut: Cut,
    max_shard_size: u64,
    outputs: Vec<Output>,
}

#[derive(Debug)]
struct Output {
    name: String,
    tensors: Vec<String>,
    header: Vec<u8>,
    pieces: Vec<Piece>,
}

impl Output {
    fn data_len(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len).sum()
    }
}

/// A tensor that stays, under its new name and in its new shape, and its bytes in the source.
struct Kept {
    tensor: Tensor,
    pieces: Vec<Piece>,
}

impl Job {
    /// Lays out the shards of the cut checkpoint: the tensors that stay in the order of the
    /// source, a new shard wherever the next one would exceed `max_shard_size` bytes, and
    /// inside of a shard those of wider dtypes first, so that each is aligned.
    ///
    /// # Errors
    /// [`Error::NoSuchLayer`], [`Error::NoSuchExpert`], [`Error::Stack`], [`Error::ShardSize`].
    pub fn new(checkpoint: Arc<Checkpoint>, cut: Cut, max_shard_size: u64) -> Result<Self, Error> {
        if max_shard_size == 0 {
            let what = "expected at least 1".into();
            return Err(Error::ShardSize { size: 0, what });
        }
        let groups = split(kept(&checkpoint, &cut)?, max_shard_size);
        let metadata = common_metadata(&checkpoint.shards);
        let count = groups.len();
        let outputs = groups.into_iter().enumerate().map(|(position, group)| {
            let name = shard_name(position, count);
            output(name, group, metadata.clone(), max_shard_size)
        });
        Ok(Self {
            outputs: outputs.collect::<Result<_, _>>()?,
            checkpoint,
            cut,
            max_shard_size,
        })
    }

    /// Bytes of the tensors that stay.
    pub fn total_bytes(&self) -> u64 {
        self.outputs.iter().map(Output::data_len).sum()
    }

    /// The names of the files that [`Job::write`] makes, and their sizes; the index comes last.
    pub fn files(&self) -> Vec<(&str, u64)> {
        let shard = |output: &Output| output.header.len() as u64 + output.data_len();
        let mut files: Vec<_> = self
            .outputs
            .iter()
            .map(|output| (&*output.name, shard(output)))
            .collect();
        if self.outputs.len() > 1 {
            files.push((INDEX_FILE, self.index().len() as u64));
        }
        files
    }

    /// A text that binds half-done work to this job: the same text, the same output.
    pub fn journal(&self) -> String {
        let shards: Vec<_> = self.checkpoint.shards.iter().map(describe).collect();
        let journal = json!({
            "format": "shallower.cut",
            "version": env!("CARGO_PKG_VERSION"),
            "source": self.checkpoint.folder.to_string_lossy(),
            "shards": shards,
            "prefixes": self.cut.prefixes(),
            "num_layers": self.cut.num_layers(),
            "survivors": self.cut.survivors(),
            "experts": self.cut.experts().map(Experts::journal),
            "max_shard_size": self.max_shard_size,
        });
        format!("{journal:#}\n")
    }

    /// Writes the shards and their index into a folder that an earlier run of the same job may
    /// have left; complete shards are kept. `progress` hears of bytes done and bytes in all.
    ///
    /// # Errors
    /// [`Error::Write`], [`Error::Read`], [`Error::Changed`], [`Error::EndedEarly`],
    /// [`Error::Cancelled`]. What is complete by then stays in the folder.
    pub fn write(&self, folder: &Path, progress: Progress<'_>) -> Result<(), Error> {
        let total = self.total_bytes();
        let mut done = 0;
        let mut copied = |count: u64| {
            done += count;
            match progress(done, total) {
                std::ops::ControlFlow::Continue(()) => Ok(()),
                std::ops::ControlFlow::Break(()) => Err(Error::Cancelled),
            }
        };
        for output in &self.outputs {
            if is_complete(&folder.join(&output.name), output) {
                copied(output.data_len())?;
            } else {
                self.write_shard(folder, output, &mut copied)?;
            }
        }
        if self.outputs.len() > 1 {
            copy::write_whole(folder, INDEX_FILE, self.index().as_bytes())?;
        }
        copy::flush_folder(folder).map_err(Error::write(folder))
    }

    fn write_shard(
        &self,
        folder: &Path,
        output: &Output,
        copied: &mut dyn FnMut(u64) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let path = folder.join(&output.name);
        copy::finish(folder, &output.name, |mut file| {
            file.write_all(&output.header)
                .map_err(Error::write(&path))?;
            let mut sources: BTreeMap<usize, File> = BTreeMap::new();
            for &piece in &output.pieces {
                let shard = &self.checkpoint.shards[piece.shard];
                let from = match sources.remove(&piece.shard) {
                    Some(opened) => opened,
                    None => shard.open()?,
                };
                copy::append(piece, shard, &from, file, &path, copied)?;
                sources.insert(piece.shard, from);
            }
            sources
                .iter()
                .try_for_each(|(&shard, from)| self.checkpoint.shards[shard].check_unchanged(from))
        })
    }

    fn index(&self) -> String {
        let pairs = self.outputs.iter().flat_map(|output| {
            output
                .tensors
                .iter()
                .map(|tensor| (&**tensor, &*output.name))
        });
        let weight_map: BTreeMap<&str, &str> = pairs.collect();
        let index = json!({
            "metadata": {"total_size": self.total_bytes()},
            "weight_map": weight_map,
        });
        format!("{index:#}\n")
    }
}

fn describe(shard: &Shard) -> serde_json::Value {
    json!({
        "file": shard.name,
        "path": shard.path.to_string_lossy(),
        "size": shard.stamp.len,
        "modified": shard.stamp.modified,
        "header": format!("{:016x}", shard.header_hash),
    })
}

fn kept(checkpoint: &Checkpoint, cut: &Cut) -> Result<Vec<Kept>, Error> {
    let mut kept = Vec::new();
    for (shard, source) in checkpoint.shards.iter().enumerate() {
        for tensor in &source.header.tensors {
            let Some(name) = cut.rename(&tensor.name)? else {
                continue;
            };
            let Stays { shape, parts } = cut.stays(tensor)?;
            let first = source.position(tensor);
            let pieces: Vec<_> = parts
                .into_iter()
                .map(|part| Piece {
                    shard,
                    start: first + part.start,
                    len: part.end - part.start,
                })
                .collect();
            let tensor = Tensor {
                name,
                dtype: tensor.dtype.clone(),
                shape,
                start: 0,
                end: pieces.iter().map(|piece| piece.len).sum(),
            };
            kept.push(Kept { tensor, pieces });
        }
    }
    Ok(kept)
}

/// Consecutive tensors in groups of at most `max_shard_size` bytes; a larger one stays alone.
fn split(kept: Vec<Kept>, max_shard_size: u64) -> Vec<Vec<Kept>> {
    let mut groups = vec![Vec::new()];
    let mut room = max_shard_size;
    for item in kept {
        let len = item.tensor.len();
        if len > room && groups.last().is_some_and(|group| !group.is_empty()) {
            groups.push(Vec::new());
            room = max_shard_size;
        }
        room = room.saturating_sub(len);
        if let Some(group) = groups.last_mut() {
            group.push(item);
        }
    }
    groups
}

fn shard_name(position: usize, count: usize) -> String {
    if count == 1 {
        SINGLE_FILE.to_owned()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", position + 1)
    }
}

/// The free texts on which all files that have them agree.
fn common_metadata(shards: &[Shard]) -> BTreeMap<String, String> {
    let mut common: BTreeMap<String, Option<String>> = BTreeMap::new();
    for (name, value) in shards.iter().flat_map(|shard| &shard.header.metadata) {
        let entry = common
            .entry(name.clone())
            .or_insert_with(|| Some(value.clone()));
        if entry.as_ref() != Some(value) {
            *entry = None;
        }
    }
    let agreed = common
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    agreed.collect()
}

fn output(
    name: String,
    mut group: Vec<Kept>,
    metadata: BTreeMap<String, String>,
    max_shard_size: u64,
) -> Result<Output, Error> {
    group.sort_by_key(|item| std::cmp::Reverse(item.tensor.bits()));
    let mut pieces: Vec<Piece> = Vec::new();
    let mut tensors = Vec::with_capacity(group.len());
    let mut end = 0;
    for Kept {
        tensor,
        pieces: own,
    } in group
    {
        let len = tensor.len();
        for piece in own {
            match pieces.last_mut() {
                Some(last) if last.shard == piece.shard && last.start + last.len == piece.start => {
                    last.len += piece.len;
                }
                _ if piece.len > 0 => pieces.push(piece),
                _ => {}
            }
        }
        tensors.push(Tensor {
            start: end,
            end: end + len,
            ..tensor
        });
        end += len;
    }
    let names = tensors.iter().map(|tensor| tensor.name.clone()).collect();
    let header = Header { metadata, tensors }.to_bytes();
    if header.len() as u64 > MAX_HEADER_BYTES {
        let what = format!(
            "the header of {name} would exceed {MAX_HEADER_BYTES} bytes; ask for smaller ones"
        );
        return Err(Error::ShardSize {
            size: max_shard_size,
            what,
        });
    }
    Ok(Output {
        name,
        tensors: names,
        header,
        pieces,
    })
}

/// True if an earlier run finished this shard: files get their names when they are flushed.
fn is_complete(path: &Path, output: &Output) -> bool {
    let len = output.header.len() as u64 + output.data_len();
    let is_whole =
        fs::symlink_metadata(path).is_ok_and(|found| found.is_file() && found.len() == len);
    let mut header = vec![0; output.header.len()];
    let read = |mut file: File| file.read_exact(&mut header);
    is_whole && File::open(path).and_then(read).is_ok() && header == output.header
}
