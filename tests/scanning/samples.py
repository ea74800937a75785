"""Samples to compare, and their distances by slower ways."""

import json
import struct
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from shallower import (
    ModelIdentity,
    Scan,
    TextsIdentity,
)
from shallower.scanning.builder import ScanBuilder
from shallower.scanning.scan_file import FORMAT, digest

BOTH = ("angular", "cosine")
DTYPES = ["float32", "float16", "bfloat16", "bfloat16 bits", "float64"]
TEXTS = TextsIdentity(24, 256, "0" * 64)


def model_of(num_layers, fingerprint="f" * 64):
    return ModelIdentity("tiny", "llama", num_layers, "bfloat16", fingerprint)


MODEL = model_of(3)


def rounded(values, dtype):
    """What the core is given in ``dtype``, and the same numbers in float64."""
    if not dtype.startswith("bfloat16"):
        states = values.astype(dtype)
        return states, states.astype(np.float64)
    import torch

    states = torch.from_numpy(values).to(torch.bfloat16)
    exact = states.double().numpy()
    return (states.view(torch.uint16).numpy() if dtype.endswith("bits") else states), exact


def random_states(shape, seed, outliers=False):
    """Normal values; with ``outliers`` two channels are a thousand times larger."""
    states = np.random.default_rng(seed).standard_normal(shape)
    if outliers:
        states[..., [0, shape[-1] // 2]] *= 1000
    return states


def bits(scan):
    """The bytes of every number that a scan gives."""
    return [
        values.tobytes()
        for metric in scan.metrics
        for values in (scan.mean(metric), scan.variance(metric), scan.stderr(metric))
    ]


def stored(scan):
    """The sums of a scan as they are saved, and its header without the parts' order."""
    with TemporaryDirectory() as folder:
        scan.save(Path(folder) / "scan")
        header, sums = opened((Path(folder) / "scan").read_bytes())
    described = json.loads(header.pop("__metadata__")[FORMAT])
    del described["sha256"]
    for key in ("rejections", "texts"):
        described[key] = sorted(described[key], key=str)
    return header, described, sums


def opened(content):
    """A safetensors file's header and data."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def closed(header, data):
    """The inverse of ``opened``."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def word_places(data):
    """Where the parts of stored sums lie in their bytes: slices of words of 64 bits by name.

    The core's own layout, for tests that damage it: a head of 8 words, two for the name of each
    metric, 68 for each norm, then four for each pair and metric, and eight more if there are
    sequences of several samples.
    """
    words = np.frombuffer(data, "<u8")
    _, num_states, _, several, *_, metrics = (int(word) for word in words[:8])
    pairs = num_states * (num_states - 1) // 2
    start = 8 + 2 * metrics
    places = {"norms": slice(start, start + 68 * num_states)}
    start += 68 * num_states
    for number in range(metrics):
        name = data[64 + 16 * number :][:16].rstrip(b"\0").decode()
        places[name] = slice(start, start + 4 * pairs)
        start += (12 if several else 4) * pairs
    assert start == len(words)
    return places


def exact_sums(scan, metric):
    """The sum of every pair over sequences of one sample, in units of 2**-48: integers."""
    data = scan.contents.sums.to_bytes()
    words = np.frombuffer(data, "<u8")[word_places(data)[metric]].reshape(-1, 4)
    sums = [int(low) + (int(high) << 64) for low, high in words[:, :2]]
    return [value - (value >> 127 << 128) for value in sums]


def scan_of(states, metrics=BOTH, model="of that depth", texts=(TEXTS,)):
    """A scan that remembers a model and texts."""
    if model == "of that depth":
        model = model_of(states.shape[1] - 1)
    builder = ScanBuilder(states.shape[1], metrics, model=model)
    builder.add(states, range(len(states)))
    return builder.finish(texts)


@st.composite
def batches(draw, min_samples=1):
    """Shapes (samples, L+1, D), and what the states hold."""
    shape = (
        draw(st.integers(min_samples, 6)),
        draw(st.integers(2, 6)),
        draw(st.sampled_from([1, 2, 7, 8, 9, 33, 511, 512, 513, 700])),
    )
    return random_states(shape, draw(st.integers(0, 2**32)), draw(st.booleans()))


def described(**values):
    """A valid scan file of 4 states and 5 samples, with another header."""
    with TemporaryDirectory() as folder:
        scan_of(random_states((5, 4, 8), 0)).save(Path(folder) / "scan")
        header, data = opened((Path(folder) / "scan").read_bytes())
    inner = {**json.loads(header["__metadata__"][FORMAT]), **values}
    return signed(header, inner, data), inner, data


def signed(header, inner, data):
    """The header with another description, its checksum made to fit where that can be."""
    with suppress(KeyError, TypeError, AttributeError, ValueError):
        sums = {}
        for name in header.keys() - {"__metadata__"}:
            start, stop = header[name]["data_offsets"]
            sums[name] = np.frombuffer(data[start:stop], np.uint8)
        plain = {name: value for name, value in inner.items() if name != "sha256"}
        inner = {**plain, "sha256": digest(plain, sums)}
    header["__metadata__"] = {FORMAT: json.dumps(inner)}
    return header


def changed_file(content, change):
    """A scan file after ``change`` of its description and arrays, its checksum made to fit."""
    header = json.loads(opened(content)[0]["__metadata__"][FORMAT])
    arrays = {name: array.copy() for name, array in load_arrays(content).items()}
    change(header, arrays)
    del header["sha256"]
    header["sha256"] = digest(header, arrays)
    return save_arrays(arrays, metadata={FORMAT: json.dumps(header)})


FOLDER = TemporaryDirectory()
"""One for thousands of files: to remove a folder costs more than to load a scan."""


def load(content):
    path = Path(FOLDER.name) / "scan"
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return Scan.load(path)
