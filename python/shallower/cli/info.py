"""``shallower info``, what a bug report needs and nothing that is secret; ``shallower cache``."""

import os
import platform
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..processes import first_processor, memory_limits, processors
from ..settings.options import Option
from ..values.estimates import format_size
from .options import Json
from .output import print_json, show

if TYPE_CHECKING:
    from ..store.store import Store

_MORE_PACKAGES = (
    "accelerate", "safetensors", "tokenizers", "huggingface_hub", "hf_xet", "triton", "scipy",
    "datasets", "gguf", "lm_eval", "matplotlib", "ray", "psutil", "typer", "rich",
)  # fmt: skip

_VARIABLES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "XDG_CACHE_HOME", "TMPDIR",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "OMP_NUM_THREADS",
    "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM", "RAY_ADDRESS",
    "WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "TERM", "COLUMNS", "NO_COLOR",
)  # fmt: skip
"""Variables that change what is computed, found or shown; those of SHALLOWER_ beside them."""

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL", re.IGNORECASE)
_IN_VALUES = re.compile(r"(?<=/)[^/@\s]+(?=@)|\bhf_\w{16,}")
"""Users and passwords in addresses, and tokens of the hub wherever they stand."""


def info_command(*, as_json: Json = False) -> None:
    """Show what a bug report needs: versions, tiers and the machine.

    The tier in use is the best that this processor has; SHALLOWER_TIER forces another.
    With --json also memory, disks, CUDA devices and the environment, without any token.
    """
    from .._core import tier, tiers
    from ..values.provenance import versions

    used, known = tier(), dict(tiers())
    packages = versions() if not as_json else versions(*_MORE_PACKAGES)
    if as_json:
        about = {"tier": used, "tiers": known, "packages": packages, **machine()}
        print_json(_public(about))
        return
    show(
        f"tier {used} of {', '.join(name for name, there in known.items() if there)}; "
        f"not here: {', '.join(name for name, there in known.items() if not there) or 'none'}",
        *(f"{name} {version}" for name, version in packages.items()),
        f"python {platform.python_version()}",
        platform.platform(),
    )


def machine() -> dict[str, Any]:
    """Describe this machine and its settings; torch is not imported, and CUDA not initialised."""
    from ..store.store import store_folder

    return {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "glibc": " ".join(platform.libc_ver()).strip() or None,
        "torch_cuda": _torch_cuda(),
        "processor": first_processor().get("model name") or platform.machine(),
        "cores": {"all": os.cpu_count(), "ours": processors()},
        "memory": _memory(),
        "cuda_devices": _cuda_devices(),
        "cache": _place(store_folder()),
        "hub": {**_place(_hub_cache()), "token": _has_token()},
        "environment": _environment(),
    }


def _memory() -> dict[str, int | None]:
    """Bytes of memory, those that are free, and the limit of a container; None where unknown."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = {name: 1024 * int(kib) for name, kib in re.findall(r"(\w+): +(\d+) kB", text)}
    except OSError:
        found = {}
    return {
        "all": found.get("MemTotal"),
        "free": found.get("MemAvailable"),
        "limit": min((limit for limit, _ in memory_limits()), default=None),
    }


def _torch_cuda() -> str | None:
    """The CUDA that torch was built for, read from its files; None without torch or CUDA."""
    from importlib.util import find_spec

    spec = find_spec("torch")
    try:
        text = Path(str(spec and spec.origin)).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    found = re.search(r"^cuda\b[^=]*= *['\"]([^'\"]+)", text, re.MULTILINE)
    return found and found[1]


def _cuda_devices() -> list[dict[str, str]]:
    """The cards as their driver tells; empty where there is none."""
    from subprocess import SubprocessError, run

    fields = ("name", "memory.total", "memory.used", "driver_version", "compute_cap")
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, SubprocessError):
        return []
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def _hub_cache() -> Path | None:
    """Where huggingface_hub keeps what it has downloaded."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return None
    return Path(HF_HUB_CACHE)


def _has_token() -> bool:
    """Whether there is a token of the hub; not which."""
    try:
        from huggingface_hub.constants import HF_TOKEN_PATH
    except ImportError:
        return False
    return bool(os.environ.get("HF_TOKEN")) or Path(HF_TOKEN_PATH).is_file()


def _place(folder: Path | None) -> dict[str, Any]:
    """A folder that need not be there, and the free bytes of its disk."""
    from shutil import disk_usage

    if folder is None:
        return {"folder": None, "free": None}
    there = next((place for place in (folder, *folder.parents) if place.exists()), None)
    return {"folder": str(folder), "free": there and disk_usage(there).free}


def _environment() -> dict[str, str]:
    """The variables that matter, without what is secret in them."""
    names = {*_VARIABLES, *(name for name in os.environ if name.startswith("SHALLOWER_"))}
    return {
        name: os.environ[name]
        for name in sorted(names)
        if name in os.environ and not _SECRET.search(name)
    }


def _public(value: Any) -> Any:
    """The same values without what is secret, and with ``~`` for the home of this user."""
    home = os.path.expanduser("~")  # noqa: PTH111  Path.home() fails where there is none
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    if not isinstance(value, str):
        return value
    value = _IN_VALUES.sub("…", value)
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", value) if len(home) > 1 else value


def cache_command(
    *,
    clear: Annotated[bool, Option("Remove all entries, and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    """Show or clear the cache of measurements.

    A command that is given the same model, texts and settings again finds its measurements in the
    cache, and says so; with --no-cache it measures anew. The folder is SHALLOWER_CACHE, else
    shallower in XDG_CACHE_HOME, else ~/.cache/shallower.
    """
    from ..store.store import open_store

    store = open_store()
    folder = None if store.folder is None else str(store.folder)
    named = folder or "no folder: neither SHALLOWER_CACHE nor a home is set"
    if not clear:
        _show(store, named, as_json)
        return
    freed = store.clear()
    if as_json:
        print_json({"folder": folder, "cleared_bytes": freed})
    else:
        show(f"removed {format_size(freed)} from {named}")


def _show(store: "Store", named: str, as_json: bool) -> None:
    """Print what the store holds."""
    from ..reporting.story import Number, Table

    used = [
        (kind, count, size, _date(oldest), _date(newest))
        for kind, count, size, oldest, newest in store.usage()
    ]
    if as_json:
        names = ("kind", "entries", "bytes", "oldest", "newest")
        kinds = [dict(zip(names, usage, strict=True)) for usage in used]
        print_json({"folder": store.folder and str(store.folder), "kinds": kinds})
        return
    rows = tuple(
        (kind, Number.count(count), Number(format_size(size), size), oldest[:10], newest[:10])
        for kind, count, size, oldest, newest in used
    )
    head = ("kind", "entries", "size", "oldest", "newest")
    show(Table("cached results", head, rows) if rows else "nothing was measured yet", named)


def _date(time: int) -> str:
    return datetime.fromtimestamp(time).astimezone().isoformat(timespec="seconds")
