//! Writing a planned file, in constant memory.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::path::Path;

use super::cut::Cut;
use super::error::{GgufError, Result, unreadable};
use super::piece::Piece;

const CHUNK: usize = 1 << 22;

impl Cut {
    /// Bytes of the new file.
    pub fn size(&self) -> u64 {
        self.pieces.iter().map(Piece::size).sum()
    }

    /// Write the new file, telling `progress` the bytes that are done until it says stop.
    ///
    /// # Errors
    ///
    /// [`GgufError::Read`], [`GgufError::Write`]; [`GgufError::Stopped`] when `progress`
    /// gives false.
    pub fn write(
        &self,
        source: &mut (impl Read + Seek),
        out: &mut impl Write,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        let (mut done, mut told) = (0, 0);
        for piece in &self.pieces {
            let mut at = 0;
            while at < piece.size() {
                let size = (piece.size() - at).min(CHUNK as u64);
                piece.fill(at, source, &mut buffer[..size as usize])?;
                out.write_all(&buffer[..size as usize])
                    .map_err(|error| unwritable(&error))?;
                at += size;
                done += size;
                if done - told >= CHUNK as u64 {
                    told = done;
                    go_on(progress(done))?;
                }
            }
        }
        go_on(progress(done))
    }

    /// Write the new file to a path that is free, flush it to disk, and leave nothing there
    /// if that fails.
    ///
    /// # Errors
    ///
    /// As [`Cut::write`]; [`GgufError::Write`] where something is there.
    pub fn save(
        &self,
        source: &mut File,
        path: &Path,
        progress: &mut dyn FnMut(u64) -> bool,
    ) -> Result<()> {
        let size = source.metadata().map_err(|error| unreadable(&error))?.len();
        if size != self.old_size {
            return Err(GgufError::Read(
                "the file changed since its header was read; run again when it is no longer \
                 being written"
                    .into(),
            ));
        }
        let mut options = OpenOptions::new();
        let opened = options.write(true).create_new(true).open(path);
        let mut out = opened.map_err(|error| unwritable(&error))?;
        let written = self
            .write(source, &mut out, progress)
            .and_then(|()| out.sync_all().map_err(|error| unwritable(&error)));
        if written.is_err() {
            // The error that is on its way says more than one of the removal would.
            let _ = std::fs::remove_file(path);
        }
        written
    }
}

fn go_on(wanted: bool) -> Result<()> {
    if wanted {
        Ok(())
    } else {
        Err(GgufError::Stopped)
    }
}

fn unwritable(error: &std::io::Error) -> GgufError {
    GgufError::Write(error.to_string())
}
