"""GGUF files to cut."""

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

from shallower.cutting.exports import EXPORT_FILES, export_path
from shallower.cutting.gguf import plan_path
from tests.models.gguf_files import written

CUT = range(12, 20)


def files_of_cut(out):
    """The names of all that a cut leaves: the file, its plan and the exports."""
    return [out, plan_path(out), *(export_path(out, name) for name in EXPORT_FILES)]


def write(path, num_layers=6, arch="llama", alignment=None, extra=(), types=(), split=None):
    """A synthetic model by gguf's own writer; every tensor's bytes are its own."""
    writer = GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(num_layers)
    for name, value, kind, sub in extra:
        writer.add_key_value(name, value, kind, sub)
    if split:
        writer.add_uint16("split.count", split)
    rng = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.normal(size=(7, 5)).astype(np.float32))
    for layer in range(num_layers):
        writer.add_tensor(
            f"blk.{layer}.attn_norm.weight", rng.normal(size=3 + layer).astype(np.float16)
        )
        for kind in types:
            _, size = GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 256, size=(3, 2 * size), dtype=np.uint8)
            name = f"blk.{layer}.{kind.name.lower()}.weight"
            writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=kind)
    return written(writer, path)
