//! Bytes from file to file in constant memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::Path;

use super::error::Error;
use super::source::Shard;

/// Bytes copied between two reports of progress.
const CHUNK: u64 = 16 << 20;

/// Adjacent bytes of one source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The source, by its position among the shards.
    pub shard: usize,
    /// The first byte, counted from the start of the file.
    pub start: u64,
    /// The number of bytes.
    pub len: u64,
}

/// A callback for the progress: bytes done and bytes in all; it may ask to stop.
pub(super) type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Appends the bytes of `piece` to `to`, and calls `copied` after every chunk.
///
/// On Linux the standard library copies between files in the kernel (`copy_file_range`, and
/// `sendfile` or a small buffer where the file systems do not support it): no byte passes here.
/// Elsewhere it reads and writes.
pub(super) fn append(
    piece: Piece,
    shard: &Shard,
    mut from: &File,
    mut to: &File,
    path: &Path,
    copied: &mut dyn FnMut(u64) -> Result<(), Error>,
) -> Result<(), Error> {
    from.seek(SeekFrom::Start(piece.start))
        .map_err(Error::read(&shard.path))?;
    let mut left = piece.len;
    while left > 0 {
        let wanted = left.min(CHUNK);
        let count = io::copy(&mut from.take(wanted), &mut to).map_err(Error::write(path))?;
        if count != wanted {
            return Err(Error::EndedEarly(shard.path.clone()));
        }
        left -= count;
        copied(count)?;
    }
    Ok(())
}

/// Puts the names in a folder on disk, where a folder can be opened and flushed.
#[cfg(unix)]
pub(super) fn flush_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps)]
pub(super) fn flush_folder(_: &Path) -> io::Result<()> {
    Ok(())
}

/// Writes a small file under a temporary name, flushes it, and gives it its name.
pub(super) fn write_whole(folder: &Path, name: &str, content: &[u8]) -> Result<(), Error> {
    let path = folder.join(name);
    finish(folder, name, |mut file| {
        file.write_all(content).map_err(Error::write(&path))
    })
}

/// Fills a file under a temporary name, flushes it, and gives it its name: a file that has its
/// name is complete, whenever the process dies.
pub(super) fn finish(
    folder: &Path,
    name: &str,
    fill: impl FnOnce(&File) -> Result<(), Error>,
) -> Result<(), Error> {
    let partial = folder.join(format!(".{name}.partial"));
    let file = File::create(&partial).map_err(Error::write(&partial))?;
    fill(&file)?;
    file.sync_all().map_err(Error::write(&partial))?;
    let path = folder.join(name);
    std::fs::rename(&partial, &path).map_err(Error::write(path))
}
