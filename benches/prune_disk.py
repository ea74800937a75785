"""Throughput and memory of a cut on disk, against ``cp`` of the bytes that stay.

    python benches/prune_disk.py [--gb 6] [--rounds 3] [--folder /tmp]

Makes a Llama of random bytes in 4 shards, cuts a quarter of its layers, and compares bit by
bit with what should be left, before it times anything. Every round cuts and copies in turn,
from a cold page cache and until the bytes are on disk. Everything is deleted afterwards.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
    "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
}
CHILD = """
import re, sys, time
from pathlib import Path
# Not getrusage: its peak survives exec, and would be this script's.
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) / 1024
source, out, num_layers, start, stop, alone = sys.argv[1:]
num_layers, start, stop = int(num_layers), int(start), int(stop)
from shallower._core import Checkpoint
from shallower.storage import resumable_folder
if alone == "no":
    from shallower import prune_checkpoint
before, began = peak(), time.perf_counter()
if alone == "yes":
    keep = [i for i in range(num_layers) if not start <= i < stop]
    job = Checkpoint(source).cut(["model.layers."], num_layers, keep, 5 * 10**9)
    with resumable_folder(Path(out), job.journal) as folder:
        job.write(folder)
else:
    prune_checkpoint(source, [range(start, stop)], out)
print(time.perf_counter() - began, before, peak())
"""


def size(shape):
    count = 2
    for axis in shape:
        count *= axis
    return count


def tensors(num_layers):
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(num_layers):
        for name, shape in LAYER.items():
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(folder, num_layers):
    """A bfloat16 Llama in 4 shards; its bytes are random, and differ from tensor to tensor."""
    folder.mkdir()
    noise = os.urandom(64 << 20)
    names = list(tensors(num_layers))
    weight_map = {}
    for shard in range(4):
        mine = names[shard * len(names) // 4 : (shard + 1) * len(names) // 4]
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in mine:
            offsets = [end, end + size(shape)]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
            end = offsets[1]
        text = json.dumps(header).encode()
        file = f"model-0000{shard + 1}-of-00004.safetensors"
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for position, (name, shape) in enumerate(mine):
                weight_map[name] = file
                left, skip = size(shape), (shard * 1000 + position) * 4099 % len(noise)
                while left:
                    left -= out.write(noise[skip : skip + left])
                    skip = 0
            os.fsync(out.fileno())
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def digests(folder, rename=lambda name: name):
    """The hash of every tensor, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, info in header.items():
                if name == "__metadata__" or rename(name) is None:
                    continue
                start, stop = info["data_offsets"]
                file.seek(8 + length + start)
                digest = hashlib.blake2b(digest_size=16)
                while start < stop:
                    digest.update(chunk := file.read(min(8 << 20, stop - start)))
                    start += len(chunk)
                found[rename(name)] = digest.hexdigest()
    return found


def forget(folder):
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source, out):
    """Seconds of ``cp``, and until its files are on disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    copied = time.perf_counter() - began
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return copied, time.perf_counter() - began


def prune(source, out, num_layers, start, stop, alone):
    """Seconds, resident MB before, and at most."""
    command = [sys.executable, "-c", CHILD, source, out, num_layers, start, stop, alone]
    done = subprocess.run(map(str, command), capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    options = parser.parse_args()
    layer_bytes = sum(map(size, LAYER.values()))
    num_layers = max(4, round((options.gb * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    start, stop = num_layers // 2, num_layers // 2 + num_layers // 4
    root = Path(tempfile.mkdtemp(prefix="shallower-bench-", dir=options.folder))
    try:
        source, out, copied = root / "source", root / "out", root / "copied"
        make(source, num_layers)
        print(f"{platform.platform()}, {os.cpu_count()} cores, {root}")

        def rename(name):
            head, _, rest = name.partition("model.layers.")
            number, _, tail = rest.partition(".")
            if head or not rest or int(number) < start:
                return name
            place = int(number) - (stop - start)
            return None if int(number) < stop else f"model.layers.{place}.{tail}"

        _, before, peak = prune(source, out, num_layers, start, stop, "no")
        assert digests(out) == digests(source, rename), "the cut is not what should be left"
        print(f"whole command: {before:.0f} MB resident after imports, {peak:.0f} MB at most")
        kept = sum(path.stat().st_size for path in out.iterdir())
        seconds = {"cut": [], "cp": [], "cp and flush": []}
        for _ in range(options.rounds):
            kept_folder = root / "kept"
            shutil.rmtree(kept_folder, ignore_errors=True)
            out.rename(kept_folder)
            forget(source)
            cut, before, peak = prune(source, out, num_layers, start, stop, "yes")
            forget(kept_folder)
            plain, flushed = copy(kept_folder, copied)
            shutil.rmtree(copied)
            for name, value in zip(seconds, (cut, plain, flushed), strict=True):
                seconds[name].append(value)
        print(f"core alone: {before:.0f} MB resident before, {peak:.0f} MB at most")
        for name, values in seconds.items():
            middle = statistics.median(values)
            print(
                f"{name}: {middle:.2f} s ({min(values):.2f} .. {max(values):.2f}), "
                f"{kept / 1e9 / middle:.2f} GB/s of {kept / 1e9:.2f} GB"
            )
        ratio = statistics.median(seconds["cp and flush"]) / statistics.median(seconds["cut"])
        print(f"throughput, cut : cp and flush = {ratio:.2f}")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
