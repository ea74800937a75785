"""Files of states to be analysed."""

import numpy as np
import torch
from safetensors.torch import save_file as save_tensors

from shallower.scanning import states_file


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
