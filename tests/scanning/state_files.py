"""Files of states to be analysed."""

import numpy as np
import torch
from safetensors.torch import save_file as save_tensors

from shallower.models.decoder import Decoder
from shallower.scanning import states_file
from shallower.scanning.hidden_states import stream
from shallower.scanning.states_file import FORMAT, Origin
from shallower.texts.batches import TokenBatches
from shallower.values.positions import Positions
from shallower.values.tokens import Tokens


def walk(num_samples=23, num_states=5, width=24, seed=0, dtype="float32"):
    """Residual streams as a torch tensor."""
    chance = np.random.default_rng(seed)
    steps = chance.standard_normal((num_samples, num_states, width)) * 0.3
    steps[:, 0] *= 5
    return torch.from_numpy(steps.cumsum(axis=1)).to(getattr(torch, dtype))


def as_numpy(states):
    return (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()


def write(path, states, **more):
    """The states in a file of the format that the name tells."""
    if path.suffix == ".npy":
        np.save(path, as_numpy(states))
    else:
        save_tensors({"hidden_states": states, **more}, path)
    return path


def keep(path, model, words, texts, *, positions="last", seed=0, batch_size=4):
    """The states that a scan of these texts compares, in a file that says where they are from."""
    batches = TokenBatches(words, texts, Tokens(256, batch_size))
    chosen = Positions.parse(positions, seed)
    parts = [(part.states.clone(), part.samples) for part in stream(model, batches, chosen)]
    states, samples = (list(kind) for kind in zip(*parts, strict=True))
    origin = Origin(
        Decoder.of(model).identity, (batches.identity,), batches.num_rejected,
        tuple(batches.rejections), chosen,
    )  # fmt: skip
    tensors = {
        "hidden_states": torch.cat(states, dim=1).transpose(0, 1).contiguous(),
        "samples": torch.from_numpy(np.concatenate(samples)),
    }
    save_tensors(tensors, path, metadata={FORMAT: origin.to_json()})
    return path


def set_buffers(monkeypatch, size):
    monkeypatch.setattr(states_file, "BUFFER_BYTES", size)
    monkeypatch.setattr(states_file, "MAX_BUFFER_BYTES", size)


# What is refused.
def npy(shape=(2, 3, 4), descr="<f4", order=False, length=None, header=None, version=1):
    """A .npy file by hand."""
    if header is None:
        header = repr({"descr": descr, "fortran_order": order, "shape": shape})
    text = header.encode()
    size = 2 if version == 1 else 4
    claimed = len(text) if length is None else length
    prefix = b"\x93NUMPY" + bytes([version, 0]) + claimed.to_bytes(size, "little")
    return prefix + text + bytes(96)
