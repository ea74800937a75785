"""What an installed wheel must do where nothing else is installed: no torch, no test runner.

``python tests/smoke.py`` reports the core, and cuts a folder and a GGUF file that it writes by
hand; ``--without-unix`` hides first what Windows and macOS lack. It ends with "cuts are right".
"""

import contextlib
import io
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

NUM_LAYERS, DROPPED = 4, "1:3"
STAYS = {0: 0, 3: 1}
WIDTHS = {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 10}
OF_UNIX = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "syslog", "curses")
OF_LINUX = (
    "copy_file_range", "fdatasync", "fork", "forkpty", "geteuid", "getloadavg", "getuid", "killpg",
    "lockf", "mkfifo", "nice", "posix_fadvise", "posix_fallocate", "pread", "preadv", "pwrite",
    "pwritev", "sched_getaffinity", "sendfile", "setsid", "splice", "sysconf", "uname",
    "O_CLOEXEC", "O_DIRECTORY", "O_DSYNC", "O_NOFOLLOW", "O_SYNC",
)  # fmt: skip


def hide_unix():
    """Take away modules and functions that not every system has.

    What others see of this system, they have seen by then.
    """
    import concurrent.futures.process
    import mmap
    import multiprocessing.pool
    import platform
    import signal

    import numpy.random
    import rich.progress
    import typer.main

    assert all((concurrent, multiprocessing, numpy, rich, typer, platform.platform()))

    for module in OF_UNIX:
        sys.modules[module] = None
    for name in OF_LINUX:
        if hasattr(os, name):
            delattr(os, name)
    for name in [name for name in dir(mmap) if name.startswith("MADV_")]:
        delattr(mmap, name)
    for name in ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "alarm", "setitimer"):
        delattr(signal, name)


def llama(folder):
    """A Llama of four layers in two files, every tensor's bytes its own."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "torch_dtype": "float32",
        **WIDTHS,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    names["lm_head.weight"] = (10, 8)
    for layer in range(NUM_LAYERS):
        at = f"model.layers.{layer}"
        names |= {f"{at}.self_attn.{one}_proj.weight": (8, 8) for one in "qkvo"}
        names |= {f"{at}.mlp.{one}_proj.weight": (12, 8) for one in ("gate", "up")}
        names[f"{at}.mlp.down_proj.weight"] = (8, 12)
        names |= dict.fromkeys(
            (f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"), (8,)
        )
    listed = sorted(names)
    places = {}
    for number, part in enumerate((listed[::2], listed[1::2]), 1):
        file = folder / f"model-{number:05}-of-00002.safetensors"
        places |= dict.fromkeys(part, file.name)
        header, data = {}, b""
        for name in part:
            size = 1
            for length in names[name]:
                size *= length
            values = struct.pack(f"<{size}f", *(listed.index(name) + i / 256 for i in range(size)))
            offsets = [len(data), len(data) + len(values)]
            header[name] = {"dtype": "F32", "shape": names[name], "data_offsets": offsets}
            data += values
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def tensors(folder):
    """Name -> bytes of every tensor of a folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        (size,) = struct.unpack_from("<Q", raw)
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                found[name] = raw[8 + size + start : 8 + size + stop]
    return found


def gguf(file):
    """A GGUF file of four layers, by its specification: version 3, little-endian, aligned to 32."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    def number(key, value):
        return text(key) + struct.pack("<II", 4, value)

    names = ["token_embd.weight", *(f"blk.{layer}.attn_norm.weight" for layer in range(NUM_LAYERS))]
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        number("llama.block_count", NUM_LAYERS),
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), len(entries)) + b"".join(entries)
    for place, name in enumerate(names):
        head += text(name) + struct.pack("<IQIQ", 1, 8, 0, 32 * place)
    head += bytes(-len(head) % 32)
    data = b"".join(struct.pack("<8f", *(place + i / 8 for i in range(8))) for place in range(5))
    file.write_bytes(head + data)


def renamed(name):
    """A tensor's name in the cut; None if it goes."""
    for before in range(NUM_LAYERS):
        if name.startswith(at := f"model.layers.{before}."):
            after = STAYS.get(before)
            return None if after is None else name.replace(at, f"model.layers.{after}.")
    return name


def run(*words):
    """Run a command of shallower in this process, and give back what it printed."""
    from shallower.cli import main

    printed = io.StringIO()
    before, sys.argv = sys.argv, ["shallower", *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as end:
        if end.code:
            raise AssertionError(f"{words} ended with {end.code}") from end
    finally:
        sys.argv = before
    return printed.getvalue()


def main():
    """Report the core, and cut both kinds of models; AssertionError where a cut is wrong."""
    if "--without-unix" in sys.argv:
        hide_unix()
    from shallower import _core

    assert "tier" in run("info")
    with tempfile.TemporaryDirectory(prefix="shallower-smoke-") as name:
        folder = Path(name)
        llama(folder / "whole")
        run("prune", folder / "whole", "--drop", DROPPED, "--out", folder / "cut", "--no-cache")
        before, after = tensors(folder / "whole"), tensors(folder / "cut")
        expected = {renamed(name): value for name, value in before.items() if renamed(name)}
        assert after == expected, f"{sorted(after)} are not {sorted(expected)}, or their bytes"
        config = json.loads((folder / "cut" / "config.json").read_text(encoding="utf-8"))
        assert config["num_hidden_layers"] == len(STAYS)

        gguf(folder / "whole.gguf")
        out = folder / "cut.gguf"
        run("prune", folder / "whole.gguf", "--drop", DROPPED, "--out", out, "--no-cache")
        whole, cut = (folder / "whole.gguf").read_bytes(), out.read_bytes()
        kept = whole[-5 * 32 : -3 * 32] + whole[-32:]  # the embedding, and layers 0 and 3
        assert cut.endswith(kept), "the cut of the GGUF file has other bytes"
        assert b"blk.1.attn_norm.weight" in cut
        assert b"blk.2.attn_norm.weight" not in cut
    assert "torch" not in sys.modules, "torch was imported"
    print(f"{_core.__file__}: tier {_core.tier()}; cuts are right")


if __name__ == "__main__":
    main()
