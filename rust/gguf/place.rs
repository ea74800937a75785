//! The places of the tensors: each begins where the one before it ends, as llama.cpp loads them.
//! This makes the size of a tensor of an unknown ggml type unambiguous.

use super::error::{Result, damaged};
use super::record::{Info, Tensor};
use super::types::block;

/// The next multiple of the alignment; positions are below 2^60, so it exists.
pub fn pad(position: u64, alignment: u64) -> u64 {
    position.next_multiple_of(alignment)
}

/// The tensors at their places, each where the one before it ends.
pub(super) fn place(
    infos: Vec<Info>,
    data: u64,
    alignment: u64,
    file_size: u64,
) -> Result<Vec<Tensor>> {
    let room = file_size.saturating_sub(data);
    let mut offset = 0;
    let mut tensors = Vec::new();
    let mut infos = infos.into_iter().peekable();
    while let Some(info) = infos.next() {
        if info.offset != offset {
            return Err(damaged(
                info.at,
                format!(
                    "tensor {} is at offset {}, expected {offset}: tensors must follow one \
                     another as llama.cpp loads them; convert or quantise the model again",
                    info.name, info.offset
                ),
            ));
        }
        let next = infos.peek().map_or(room, |next| next.offset);
        let size = size(&info, next)?;
        if size > room - offset {
            return Err(damaged(
                info.at,
                format!(
                    "the data of tensor {} ends at byte {}, and the file at {file_size}: it is \
                     cut short; fetch it again",
                    info.name,
                    (data + offset).saturating_add(size)
                ),
            ));
        }
        let start = data + offset;
        offset = pad(offset + size, alignment);
        if infos.peek().is_some() && offset > room {
            return Err(damaged(
                info.at,
                "the file ends in the padding of a tensor: it is cut short",
            ));
        }
        tensors.push(Tensor {
            name: info.name,
            dims: info.dims,
            ggml_type: info.ggml_type,
            start,
            size,
        });
    }
    if offset < room && !tensors.is_empty() {
        return Err(damaged(
            data + offset,
            format!(
                "{} bytes follow the last tensor, and belong to none: remove them with \
                 `truncate -s {} FILE`",
                room - offset,
                data + offset
            ),
        ));
    }
    Ok(tensors)
}

/// Bytes of a tensor: by its type, or for an unknown type up to where the next one begins.
fn size(info: &Info, next: u64) -> Result<u64> {
    let values = info
        .dims
        .iter()
        .try_fold(1_u64, |product, &dim| product.checked_mul(dim))
        .filter(|&values| i64::try_from(values).is_ok());
    let Some(values) = values else {
        return Err(damaged(
            info.at,
            format!("tensor {} of {:?} is too large", info.name, info.dims),
        ));
    };
    let Some((block, bytes)) = block(info.ggml_type) else {
        return next.checked_sub(info.offset).ok_or_else(|| {
            damaged(
                info.at,
                format!(
                    "tensor {} is of the unknown ggml type {}, and the next offset does not \
                     tell its size",
                    info.name, info.ggml_type
                ),
            )
        });
    };
    let row = info.dims.first().copied().unwrap_or(1);
    if row % block != 0 {
        return Err(damaged(
            info.at,
            format!(
                "tensor {} has rows of {row} values: its ggml type {} packs {block} at a time",
                info.name, info.ggml_type
            ),
        ));
    }
    (values / block)
        .checked_mul(bytes)
        .filter(|&size| i64::try_from(size).is_ok())
        .ok_or_else(|| damaged(info.at, format!("tensor {} is too large", info.name)))
}
