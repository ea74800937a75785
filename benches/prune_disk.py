"""What a cut on disk costs: time against ``cp`` of the bytes that stay, memory, kills.

    python benches/prune_disk.py [--model llama] [--gb 6] [--rounds 5] [--kills 20] [--folder /tmp]

Makes a Llama of random bytes in 4 shards, cuts a quarter of its layers by the command
``shallower prune``, or two of the 8 experts of every layer of a ``mixtral``, which has a tensor
for each, or a ``granitemoe``, which has stacks of them; and compares the hash of every tensor with
what should be left, before it times anything. Times are those of whole commands, start of Python
included, until the bytes are on disk (the cut flushes its files itself, those of ``cp`` are
flushed after it). Every round does both, in turns first, and drops what it reads from the page
cache before. Then the command is killed (SIGKILL) at random moments of its time: nothing may be
at ``--out``, or all of it; and one more run must leave the files of the first one and nothing
else. Everything is deleted afterwards.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
EXPERTS, EXPERT_SIZE, DROPPED = 8, 1024, (2, 5)
KEPT = [expert for expert in range(EXPERTS) if expert not in DROPPED]
ATTENTION = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN, HIDDEN),
}
MIXTURE = "block_sparse_moe"
LAYERS = {
    "llama": {
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        **ATTENTION,
    },
    "mixtral": {
        f"{MIXTURE}.gate.weight": (EXPERTS, HIDDEN),
        **{
            f"{MIXTURE}.experts.{expert}.{name}.weight": shape
            for expert in range(EXPERTS)
            for name, shape in (
                ("w1", (EXPERT_SIZE, HIDDEN)),
                ("w2", (HIDDEN, EXPERT_SIZE)),
                ("w3", (EXPERT_SIZE, HIDDEN)),
            )
        },
        **ATTENTION,
    },
    "granitemoe": {
        f"{MIXTURE}.input_linear.weight": (EXPERTS, 2 * EXPERT_SIZE, HIDDEN),
        f"{MIXTURE}.output_linear.weight": (EXPERTS, HIDDEN, EXPERT_SIZE),
        f"{MIXTURE}.router.layer.weight": (EXPERTS, HIDDEN),
        **ATTENTION,
    },
}
"""The tensors of a layer, by model."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
}
LAUNCHER = """
import json, os, sys, time
began = time.perf_counter()
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[
    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0)])
_, status, usage = os.wait4(pid, 0)
assert status == 0, status
print(json.dumps([time.perf_counter() - began, usage.ru_maxrss / 1024]))
"""
# A small process of its own: the peak of the one that forks would count as the child's.


def size(shape):
    count = 2
    for axis in shape:
        count *= axis
    return count


def tensors(model, num_layers):
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(num_layers):
        for name, shape in LAYERS[model].items():
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(folder, model, num_layers):
    """A bfloat16 model in 4 shards; its bytes are random, and differ from tensor to tensor."""
    folder.mkdir()
    noise = os.urandom(64 << 20)
    names = list(tensors(model, num_layers))
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
        "architectures": [CLASSES[model]], "model_type": model, "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "vocab_size": VOCABULARY,
        "num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 32,
    }  # fmt: skip
    if model != "llama":
        mixed = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}
        config |= {**mixed, "intermediate_size": EXPERT_SIZE}
    (folder / "config.json").write_text(json.dumps(config))


def digests(folder, rename=lambda name: name, parts=lambda _, length: [(0, length)]):
    """The hash of every tensor, or of its parts in bytes, by the name that it gets."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, info in header.items():
                if name == "__metadata__" or rename(name) is None:
                    continue
                first, end = info["data_offsets"]
                digest = hashlib.blake2b(digest_size=16)
                for start, stop in parts(name, end - first):
                    file.seek(8 + length + first + start)
                    while start < stop:
                        digest.update(chunk := file.read(min(8 << 20, stop - start)))
                        start += len(chunk)
                found[rename(name)] = digest.hexdigest()
    return found


def without_layers(start, stop):
    """The options of a cut of layers; and what it makes of a name, and of its bytes."""

    def rename(name):
        head, _, rest = name.partition("model.layers.")
        number, _, tail = rest.partition(".")
        if head or not rest or int(number) < start:
            return name
        place = int(number) - (stop - start)
        return None if int(number) < stop else f"model.layers.{place}.{tail}"

    return ["--drop", f"{start}:{stop}"], (rename,)


def without_experts(num_layers):
    """The same of a cut of experts."""

    def rename(name):
        head, single, rest = name.partition(".experts.")
        number, _, tail = rest.partition(".")
        if not single:
            return name
        return f"{head}{single}{KEPT.index(int(number))}.{tail}" if int(number) in KEPT else None

    def parts(name, length):
        if MIXTURE not in name or ".experts." in name:
            return [(0, length)]
        part = length // EXPERTS
        return [(expert * part, (expert + 1) * part) for expert in KEPT]

    gone = ",".join(map(str, DROPPED))
    named = ";".join(f"{layer}:{gone}" for layer in range(num_layers))
    return ["--drop-experts", named], (rename, parts)


def forget(folder):
    """Drop the files of a folder from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(command):
    """Seconds of a command, and the most MiB that it or a child of it held."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *map(str, command)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def copy(source, out):
    """Seconds of ``cp``, and until its files are on disk."""
    forget(source)
    copied, _ = run([shutil.which("cp"), "-r", source, out])
    began = time.perf_counter()
    for path in out.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return copied, copied + time.perf_counter() - began


def same(left, right):
    """Whether two folders hold the same files, byte by byte."""
    return subprocess.run(["diff", "-rq", left, right], stdout=subprocess.DEVNULL).returncode == 0


def kill_and_go_on(command, source, out, expected, seconds, kills):
    """Kill the command at random moments of its time; what was there after each, counted."""
    chance = random.Random(0)
    found = {"nothing": 0, "partial": 0, "complete": 0, "ended before": 0}
    while sum(found.values()) - found["ended before"] < kills:
        forget(source)
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as child:
            time.sleep(chance.uniform(0, seconds))
            child.kill()
        beside = {path.name for path in out.parent.iterdir()}
        if out.exists():
            assert same(out, expected), "something half-written is at --out"
            found["complete" if child.returncode < 0 else "ended before"] += 1
        else:
            found["partial" if f".{out.name}.partial" in beside else "nothing"] += 1
            run(command)
            assert same(out, expected), "the run that went on left something else"
        left = {path.name for path in out.parent.iterdir()}
        assert left == {out.name, source.name, expected.name}, left
        shutil.rmtree(out)
    return found


def summary(values, kept=None):
    """Median and range; with the bytes done, the median in GB/s too."""
    middle = statistics.median(values)
    rate = {"gb_per_s": round(kept / 1e9 / middle, 3)} if kept else {}
    return {"median": middle, "range": [min(values), max(values)], **rate}


def measure(options, root):
    """Make, check, time, kill."""
    layer_bytes = sum(map(size, LAYERS[options.model].values()))
    num_layers = max(4, round((options.gb * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    source, out, copied, kept = (root / name for name in ("source", "out", "copied", "kept"))
    make(source, options.model, num_layers)
    layers = (num_layers // 2, num_layers // 2 + num_layers // 4)
    is_llama = options.model == "llama"
    drop, wanted = without_layers(*layers) if is_llama else without_experts(num_layers)
    command = [sys.executable, "-m", "shallower", "prune", source, *drop]
    command += ["--out", out, "--json"]
    run(command)
    assert digests(out) == digests(source, *wanted), "the cut is not what should be left"
    out.rename(kept)
    num_bytes = sum(path.stat().st_size for path in kept.iterdir())
    print(f"bytes asserted: {num_bytes} stay", file=sys.stderr)
    cuts, peaks, copies, flushed = [], [], [], []

    def prune():
        forget(source)
        seconds, peak = run(command)
        cuts.append(seconds)
        peaks.append(peak)
        shutil.rmtree(out)

    def cp():
        plain, until_flushed = copy(kept, copied)
        copies.append(plain)
        flushed.append(until_flushed)
        shutil.rmtree(copied)

    for round_ in range(options.rounds):
        for do in (prune, cp) if round_ % 2 else (cp, prune):
            do()
        print(f"cut {cuts[-1]:.2f} s, cp {flushed[-1]:.2f} s", file=sys.stderr)
    ratios = [theirs / ours for ours, theirs in zip(cuts, flushed, strict=True)]
    killed = kill_and_go_on(command, source, out, kept, min(cuts), options.kills)
    return {
        "num_layers": num_layers,
        "dropped": list(layers) if is_llama else f"experts {DROPPED} of {EXPERTS} of every layer",
        "bytes_kept": num_bytes,
        "cut_s": summary(cuts, num_bytes),
        "cp_and_flush_s": summary(flushed, num_bytes),
        "cp_alone_s": summary(copies, num_bytes),
        "throughput_of_cp_and_flush": summary(ratios),
        "peak_mib_of_the_command": summary(peaks),
        "killed_and_found": killed,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=LAYERS, default="llama")
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="shallower-bench-", dir=options.folder))
    try:
        result = measure(options, root)
    finally:
        shutil.rmtree(root)
    machine = platform.processor() or platform.machine()
    print(json.dumps({**vars(options), "machine": machine, **result}, indent=2))


if __name__ == "__main__":
    main()
