//! A checkpoint on disk: its files found, its headers read and checked.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::error::Error;
use super::header::{Header, MAX_HEADER_BYTES, Tensor};
use super::index::Index;

/// The file of a checkpoint that has one.
pub const SINGLE_FILE: &str = "model.safetensors";

/// The index of a checkpoint that has several files.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The state of a file, which must be the same when it is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    place: Option<(u64, u64)>,
    pub(super) len: u64,
    pub(super) modified: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> io::Result<Self> {
        Ok(Self {
            place: place(metadata),
            len: metadata.len(),
            modified: since_1970(metadata.modified()?),
        })
    }
}

/// The file system and the file in it; what else systems call so is not stable in Rust.
#[cfg(unix)]
#[allow(clippy::unnecessary_wraps)]
fn place(metadata: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;

    Some((metadata.dev(), metadata.ino()))
}

#[cfg(not(unix))]
fn place(_: &Metadata) -> Option<(u64, u64)> {
    None
}

/// Whole seconds, rounded down, and the nanoseconds that follow them.
fn since_1970(time: SystemTime) -> (i64, i64) {
    const SECOND: i128 = 1_000_000_000;
    let nanoseconds = match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_nanos().cast_signed(),
        Err(error) => -error.duration().as_nanos().cast_signed(),
    };
    let (seconds, rest) = (
        nanoseconds.div_euclid(SECOND),
        nanoseconds.rem_euclid(SECOND),
    );
    (seconds as i64, rest as i64)
}

/// A file of a checkpoint, its header read.
#[derive(Debug)]
pub struct Shard {
    /// Name in the folder.
    pub name: String,
    /// Path, links followed.
    pub path: PathBuf,
    /// Header.
    pub header: Header,
    /// The start of its tensors in the file.
    pub data_start: u64,
    pub(super) header_hash: u64,
    pub(super) stamp: Stamp,
}

impl Shard {
    fn read(folder: &Path, name: &str) -> Result<Self, Error> {
        let path = resolve(folder, name)?;
        let file = File::open(&path).map_err(Error::read(&path))?;
        let stamp = file.metadata().and_then(|metadata| Stamp::of(&metadata));
        let stamp = stamp.map_err(Error::read(&path))?;
        let json = read_header(&file, stamp.len, &path)?;
        let data_start = json.len() as u64 + 8;
        let header = Header::parse(&json, stamp.len - data_start).map_err(Error::damaged(&path))?;
        Ok(Self {
            name: name.to_owned(),
            header,
            data_start,
            header_hash: fnv1a(&json),
            stamp,
            path,
        })
    }

    /// The start of the bytes of one of its tensors in the file.
    pub fn position(&self, tensor: &Tensor) -> u64 {
        self.data_start + tensor.start
    }

    /// Opens the file again, if it is still the one that was read.
    pub(super) fn open(&self) -> Result<File, Error> {
        let file = File::open(&self.path).map_err(Error::read(&self.path))?;
        self.check_unchanged(&file)?;
        Ok(file)
    }

    pub(super) fn check_unchanged(&self, file: &File) -> Result<(), Error> {
        let stamp = file.metadata().and_then(|metadata| Stamp::of(&metadata));
        if stamp.map_err(Error::read(&self.path))? == self.stamp {
            Ok(())
        } else {
            Err(Error::Changed(self.path.clone()))
        }
    }
}

/// The JSON of a header; nothing is allocated that the file does not hold.
fn read_header(mut file: &File, len: u64, path: &Path) -> Result<Vec<u8>, Error> {
    let damaged = |what: String| Error::damaged(path)(what);
    if len < 8 {
        return Err(damaged(format!(
            "its {len} bytes are too few for a safetensors file"
        )));
    }
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).map_err(Error::read(path))?;
    let header_len = u64::from_le_bytes(prefix);
    if header_len > MAX_HEADER_BYTES {
        return Err(damaged(format!(
            "its header claims {header_len} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )));
    }
    if header_len > len - 8 {
        return Err(damaged(format!(
            "its header claims {header_len} bytes, the file has {len}"
        )));
    }
    let mut json = vec![0; header_len as usize];
    file.read_exact(&mut json).map_err(Error::read(path))?;
    Ok(json)
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The path of a file in a folder without links; a link must stay in the folder, or lead into
/// the blobs of the hub's cache if the folder is one of its snapshots.
fn resolve(folder: &Path, name: &str) -> Result<PathBuf, Error> {
    let path = folder.join(name);
    let target = path.canonicalize().map_err(Error::read(&path))?;
    if !target.starts_with(folder) && !blobs(folder).is_some_and(|blobs| target.starts_with(blobs))
    {
        return Err(Error::Outside { path, target });
    }
    if !fs::metadata(&target).map_err(Error::read(&path))?.is_file() {
        return Err(Error::damaged(path)("it is not a regular file".into()));
    }
    Ok(target)
}

fn blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent()?;
    let repository = snapshots.parent()?;
    (snapshots.file_name()? == "snapshots").then(|| repository.join("blobs"))
}

/// A checkpoint whose headers are all read and consistent.
#[derive(Debug)]
pub struct Checkpoint {
    /// Folder, links followed.
    pub folder: PathBuf,
    /// Files, by name.
    pub shards: Vec<Shard>,
}

impl Checkpoint {
    /// Reads the headers of a folder's `model.safetensors` or, without one, of the files that
    /// its index names; a stock loader looks for them in the same order.
    ///
    /// # Errors
    /// [`Error::NoWeights`], [`Error::Read`], [`Error::Outside`], or [`Error::Damaged`]: a
    /// header or an index that is broken, a tensor that is not in the file that the index
    /// names, or that is in two files.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let folder = folder.canonicalize().map_err(Error::read(folder))?;
        if folder.join(SINGLE_FILE).symlink_metadata().is_ok() {
            let shards = vec![Shard::read(&folder, SINGLE_FILE)?];
            return Ok(Self { folder, shards });
        }
        if folder.join(INDEX_FILE).symlink_metadata().is_err() {
            return Err(Error::NoWeights(folder));
        }
        let path = folder.join(INDEX_FILE);
        let index =
            Index::parse(&read_small(&folder, INDEX_FILE)?).map_err(Error::damaged(&path))?;
        let shards = index
            .files()
            .into_iter()
            .map(|name| Shard::read(&folder, name))
            .collect::<Result<Vec<_>, _>>()?;
        check_places(&index, &shards).map_err(Error::damaged(path))?;
        Ok(Self { folder, shards })
    }

    /// The path of a file of the folder, links followed.
    ///
    /// # Errors
    /// [`Error::Read`] if it is not there, [`Error::Outside`] if it leads out of the folder,
    /// [`Error::Damaged`] if it is not a regular file.
    pub fn resolve(&self, name: &str) -> Result<PathBuf, Error> {
        resolve(&self.folder, name)
    }
}

fn read_small(folder: &Path, name: &str) -> Result<Vec<u8>, Error> {
    let path = resolve(folder, name)?;
    let len = fs::metadata(&path).map_err(Error::read(&path))?.len();
    if len > MAX_HEADER_BYTES {
        return Err(Error::damaged(path)(format!(
            "it has {len} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )));
    }
    fs::read(&path).map_err(Error::read(path))
}

/// Every tensor of the index is in its file, and in no other.
fn check_places(index: &Index, shards: &[Shard]) -> Result<(), String> {
    let mut places = BTreeMap::new();
    for shard in shards {
        for tensor in &shard.header.tensors {
            if let Some(other) = places.insert(&*tensor.name, &*shard.name) {
                let (name, file) = (&tensor.name, &shard.name);
                return Err(format!("the tensor {name} is in {other} and in {file}"));
            }
        }
    }
    match index
        .pairs
        .iter()
        .find(|(tensor, file)| places.get(&**tensor) != Some(&&**file))
    {
        Some((tensor, file)) => Err(format!(
            "it places the tensor {tensor} in {file}, which lacks it"
        )),
        None => Ok(()),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::time::Duration;

    use super::*;

    /// What the portable time gives is what Unix calls the file's, before 1970 as well.
    #[test]
    fn stamps_have_the_time_that_the_system_has() {
        let file = tempfile::tempfile().unwrap();
        let half = Duration::from_millis(500);
        for time in [
            UNIX_EPOCH + half,
            UNIX_EPOCH,
            UNIX_EPOCH - half,
            UNIX_EPOCH - half - half,
            SystemTime::now(),
        ] {
            file.set_modified(time).unwrap();
            let found = file.metadata().unwrap();
            let stamp = Stamp::of(&found).unwrap();
            assert_eq!(stamp.modified, (found.mtime(), found.mtime_nsec()));
            assert_eq!(stamp.place, Some((found.dev(), found.ino())));
        }
    }
}
